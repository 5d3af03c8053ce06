"""A KV connector that vLLM can empty, as its OffloadingConnector, over directories as its example's."""

from __future__ import annotations

import shutil
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

__all__ = ["EmptiedConnector"]


class EmptiedConnector(ExampleConnector):
    """Keeps keys and values under `shared_storage_path` until it is told to forget."""

    def reset_cache(self) -> bool:
        for prompt in Path(self._storage_path).iterdir():
            shutil.rmtree(prompt)
        return True
