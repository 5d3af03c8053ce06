"""The wire format: the header, what is in a bucket, and the plan as tables for the kernels."""
