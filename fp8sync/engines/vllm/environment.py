"""Variables of a launcher that vLLM would take for its own."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["without_torchrun"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@contextmanager
def without_torchrun() -> Iterator[None]:
    """Hide torchrun's variables: an engine that is started under torchrun would wait for the other ranks.

    They are back afterwards. Not for several threads at a time, as the environment is the process's.

    Examples:
        >>> with without_torchrun():  # doctest: +SKIP
        ...     llm = LLM(path, weight_transfer_config={"backend": "fp8sync"})
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(_TORCHRUN)}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)
