"""Triton kernels. Importing this package imports Triton; nothing else in the library does."""

from __future__ import annotations
