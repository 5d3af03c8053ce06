"""Engines that generate while they are refitted: greedy streams through a refit, and a judge of them."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    import torch

    import fp8sync

PROMPTS = [[(i * step + 11) % 256 for i in range(24)] for step in (37, 53, 71, 89)]
TOKENS = (160, 210, 270, 340)
"""Of each prompt's streams."""
LANES = 2
"""Streams of a prompt at once: more than the engine has room for, so that it is never idle."""
Sample = tuple[list[int], str]
"""Tokens and finish reason of one stream."""


def models() -> list[torch.nn.Module]:
    """Two models that write long enough for a refit to find them at it."""
    return [world.tiny_model("dense", seed, max_position_embeddings=512) for seed in (1, 2)]


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """An engine with room for the streams, on dummy weights unless asked for others."""
    return world.settings(folder, **{"load_format": "dummy", "max_model_len": 512, **options})


class LoopThread:
    """An event loop in a thread of its own, as a rollout server has one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def begin(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Any, timeout_s: float = 240.0) -> Any:
        return self.begin(coroutine).result(timeout_s)

    def close(self) -> None:
        """End what still runs in the loop, then the loop and its thread."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


async def refit_under_load(
    stream: Callable[[list[int], int], Any], refit: Callable[[], fp8sync.RefitReport]
) -> tuple[list[list[Sample]], fp8sync.RefitReport]:
    """Keep streams of every prompt running, one after the other, until a refit has ended.

    It begins when the first stream has ended: then the engine is at work, and the others wait for room.

    Args:
        stream: (prompt, tokens) -> (all tokens, finish reason).
        refit: blocks.

    Returns:
        What each prompt's streams became, and the refit's report.
    """
    first, ended = asyncio.Event(), asyncio.Event()
    found: list[list[Sample]] = [[] for _ in PROMPTS]

    async def busy(prompt: list[int], tokens: int, samples: list[Sample]) -> None:
        while not ended.is_set():
            samples.append(await stream(prompt, tokens))
            first.set()

    each = [*zip(PROMPTS, TOKENS, found, strict=True)] * LANES
    tasks = [asyncio.ensure_future(busy(*item)) for item in each]
    try:
        await asyncio.wait_for(first.wait(), 120)
        report = await asyncio.to_thread(refit)
    finally:
        ended.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 120)
    return found, report


def greedy(ask: Callable[[list[int], int], list[int]]) -> list[list[int]]:
    """What an engine says to each prompt while nobody disturbs it."""
    return [ask(prompt, tokens) for prompt, tokens in zip(PROMPTS, TOKENS, strict=True)]


def judge(
    mode: str,
    found: list[list[Sample]],
    old: list[list[int]],
    new: list[list[int]],
    new_after: Callable[[list[int], int], list[int]],
) -> None:
    """No stream is lost, and none holds what neither version would have said, but of `keep` after the refit.

    Args:
        mode: what was asked for.
        found: of `refit_under_load`.
        old: the old version's own streams.
        new: the new version's own streams.
        new_after: (prompt and tokens so far, tokens) -> the new version's continuation.
    """
    mixed = aborted = 0
    for prompt, samples, before, after in zip(PROMPTS, found, old, new, strict=True):
        for tokens, reason in samples:
            if reason == "abort":
                aborted += 1
                assert tokens == before[: len(tokens)]
                assert len(tokens) < len(before)
                continue
            assert reason == "length"
            if tokens not in (before, after):
                mixed += 1
                assert len(tokens) == len(before)
                same = next(i for i, token in enumerate(before) if tokens[i] != token)
                if mode == "recompute":  # so the rest is as the new version says it afresh
                    assert tokens[same:] == new_after([*prompt, *tokens[:same]], len(tokens) - same)
                else:
                    assert same
    assert not mixed or mode in {"keep", "recompute"}
    assert not aborted or mode == "abort"
    assert mode == "wait" or mixed + aborted, "the refit met no stream between two of its tokens"
