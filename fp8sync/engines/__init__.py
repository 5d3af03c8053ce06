"""Inference engines: where the bytes go."""
