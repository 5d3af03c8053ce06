"""`refit`: one call per optimizer step."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any

from fp8sync.link import FollowerLink, Link, connect
from fp8sync.recipe import Recipe
from fp8sync.sources import as_source

if TYPE_CHECKING:
    from fp8sync.engines.vllm import InFlight
    from fp8sync.report import RefitReport

__all__ = ["close_links", "refit"]

_links: dict[tuple[int, int | str], tuple[Link | FollowerLink, Any, Any]] = {}


def refit(
    model: Any,
    engine: Any,
    recipe: str | Recipe = "blockwise",
    *,
    in_flight: InFlight = "wait",
    bridge: Any = None,
) -> RefitReport:
    """Put a model's weights, as they are now, into a live engine.

    The first call connects (see `fp8sync.connect` for what can be wrong then); the link is kept for
    the next calls with the same model and engine, and made anew when the recipe changes.

    Args:
        model: a `torch.nn.Module` with Hugging Face names, or a `fp8sync.sources.Source`.
        engine: a `vllm.LLM`, an `AsyncLLM` or the URL of a `vllm serve`, made with
            `weight_transfer_config={"backend": "fp8sync"}`; or a handle of `fp8sync.engines.vllm`.
        recipe: `blockwise`, `blockwise-pow2`, `blockwise-fp32`, `bf16`, or a `fp8sync.Recipe`.
        in_flight: what becomes of requests in flight: `wait`, `keep` or `abort`; see `Link.refit`.
        bridge: for a Megatron-Core model, whose list of chunks is the `model`: its
            `megatron.bridge.AutoBridge`.

    Returns:
        What was done: version, bytes, seconds per stage, route and error per tensor.

    Raises:
        Fp8SyncError: one of `fp8sync.errors`; the engine then serves its old weights.

    Example:
        >>> report = fp8sync.refit(model, llm, recipe="blockwise")  # doctest: +SKIP
    """
    wanted = Recipe.of(recipe)
    key = id(model), engine if isinstance(engine, str) else id(engine)
    known = _links.get(key)
    if known is not None and known[0].recipe != wanted:
        del _links[key]
        known[0].close()
        known = None
    if known is None:
        # The key's objects are kept with the link, so that an id is not used again meanwhile.
        source = model if bridge is None else as_source(model, bridge)
        known = connect(source, engine, wanted), model, engine
        _links[key] = known
    return known[0].refit(in_flight)


@atexit.register
def close_links() -> None:
    """Close every link that `refit` keeps."""
    while _links:
        _links.popitem()[1][0].close()
