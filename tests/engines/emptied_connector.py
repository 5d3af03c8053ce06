"""KV connectors of these tests: one that vLLM can empty, over directories as its example, and one that is unknown."""

from __future__ import annotations

import shutil
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

__all__ = ["EmptiedConnector", "UnknownConnector"]


class EmptiedConnector(ExampleConnector):
    """Keeps keys and values under `shared_storage_path` until it is told to forget."""

    def reset_cache(self) -> bool:
        for prompt in Path(self._storage_path).iterdir():
            shutil.rmtree(prompt)
        return True


class UnknownConnector(KVConnectorBase_V1):
    """Says nothing of what it keeps."""
