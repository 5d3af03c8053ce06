"""Ports that nobody else takes between their choice and their use.

The system hands out ports from 32768 on (Linux's default); these lie below, apart for each process.
"""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

FOR_VLLM, EACH = 10, 20
_given = itertools.count()


def for_vllm() -> str:
    """Where vLLM begins to look for ports, as `VLLM_PORT`.

    It chooses the port of its workers seconds before one of them listens on it. On the processor it names by
    it the memory that they share, which it leaves behind, and does not start where it finds it.
    """
    for port in range(_first(), _first() + FOR_VLLM):
        for left in Path("/dev/shm").glob(f"{port}-*"):
            left.unlink(missing_ok=True)
    return str(_first())


def free(host: str = "127.0.0.1") -> int:
    """A port of `host` on which nothing listens."""
    for _ in range(EACH - FOR_VLLM):
        port = _first() + FOR_VLLM + next(_given) % (EACH - FOR_VLLM)
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) != 0:
                return port
    raise RuntimeError(f"ports {_first() + FOR_VLLM} to {_first() + EACH - 1} are all in use")


def _first() -> int:
    return 10_000 + os.getpid() % 1_000 * EACH
