"""Megatron-Core through Megatron-Bridge: this rank's boxes, listed without gathering a weight.

tasks.py       the bridge's conversion tasks: which local parameter is which global one
parameters.py  a parameter of this rank, and what the bridge has to export
grouped.py     experts that share one parameter
mappings.py    a mapping class and its module: which rectangles of which HF tensors it holds
pieces.py      those rectangles, as plain integers
held.py        how a parameter is held: plain elements, or Transformer Engine FP8 pairs
gathered.py    tensors that are no boxes, from the bridge's own export
masters.py     the FP32 masters of a distributed optimizer, as rectangles
source.py      the `Source`
records.py     a distributed checkpoint's tensors, mapped into memory
recurrent.py   Mamba and gated delta networks in such a checkpoint
distributed.py such a checkpoint as a `Source`
"""

from fp8sync.sources.megatron.distributed import DistributedCheckpointSource
from fp8sync.sources.megatron.source import MegatronSource

__all__ = ["DistributedCheckpointSource", "MegatronSource"]
