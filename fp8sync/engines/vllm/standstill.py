"""How long a worker computes nothing for the sake of a version."""

from __future__ import annotations

import time

import torch

__all__ = ["Standstill"]


class Standstill:
    """From where the step under way ends, or where this is made if none is, to `installed`.

    A GPU is still at its last step when vLLM calls the worker, and told to install before it has ended. So the
    GPU's own clock is asked, by events before and after what installs.

    Args:
        device: the worker's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self._mark()

    def installed(self) -> None:
        """Everything was enqueued."""
        self._mark()

    def seconds(self) -> float:
        """Wait for what was enqueued, and return how long the worker stood.

        Raises:
            RuntimeError: of the GPU.
        """
        if not self._events:
            began, ended = self._times
            return ended - began
        before, after = self._events
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def _mark(self) -> None:
        if self._device.type == "cpu":
            self._times.append(time.perf_counter())
            return
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record(torch.cuda.current_stream(self._device))
