"""Any source as a Hugging Face directory, in BF16 or blockwise FP8.

whole.py     whole tensors from all ranks' boxes, band by band on rank 0
formats.py   what becomes of each tensor, and the quantization_config that says so
shards.py    safetensors files, written as the bands come
ranks.py     what trainer ranks tell each other meanwhile
directory.py the directory: files, index, config
"""

from fp8sync.export.directory import DEFAULT_SHARD_BYTES, Exported, export_checkpoint

__all__ = ["DEFAULT_SHARD_BYTES", "Exported", "export_checkpoint"]
