"""Scales of an FP8 KV cache, from what a trainer's model would put into one.

kv.py        `calibrate_kv`: percentile, margin, the largest of all ranks
cached.py    a Hugging Face model: what it puts into its own cache
attended.py  a Megatron-Core model: what its core attention is given
evaluating.py  either, while it is looked at
"""

from fp8sync.calibrate.kv import calibrate_kv

__all__ = ["calibrate_kv"]
