"""`refit`: one call per optimizer step."""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8sync.engines.vllm import as_engine
from fp8sync.link import connect
from fp8sync.recipe import Recipe
from fp8sync.sources import as_source

if TYPE_CHECKING:
    import torch

    from fp8sync.engines.vllm import InFlight
    from fp8sync.link import Link
    from fp8sync.link.commit import Commit
    from fp8sync.link.follower import FollowerLink
    from fp8sync.report import RefitReport
    from fp8sync.sources.kv_scales import KvScales

__all__ = ["close", "refit", "restore_kv_scales"]


@dataclass(frozen=True)
class _Kept:
    """A link, the scales that it reads, and what its key names, so that no id is used again meanwhile."""

    link: Link | FollowerLink
    commit: Commit
    kv_scales: dict[str, float | torch.Tensor]
    key: tuple[Any, Any]
    master: bool
    timeout_s: float

    def asked(self) -> tuple[object, ...]:
        """Return what it was made for."""
        scales = self.kv_scales.keys()
        return self.link.recipe, self.master, self.commit, scales, self.timeout_s


_Name = int | str | tuple["_Name", ...]
_links: dict[tuple[_Name, _Name], _Kept] = {}


def refit(
    model: Any,
    engine: Any,
    recipe: str | Recipe = "blockwise",
    *,
    in_flight: InFlight = "wait",
    bridge: Any = None,
    master: bool = False,
    kv_scales: KvScales | None = None,
    scales: str | None = None,
    commit: Commit = "staged",
    timeout_s: float = 120.0,
) -> RefitReport:
    """Put a model's weights, as they are now, into a live engine.

    The first call connects (see `fp8sync.connect` for what can be wrong then); the link is kept for
    the next calls with the same model and engine, and made anew when the recipe, `master`, `commit`,
    `timeout_s` or the names of KV-cache scales change. It holds on to both until `fp8sync.close`.

    Args:
        model: a `torch.nn.Module` with Hugging Face names, or a `fp8sync.sources.Source`.
        engine: a `vllm.LLM`, an `AsyncLLM` or the URL of a `vllm serve`, made with
            `weight_transfer_config={"backend": "fp8sync"}`; or a handle of `fp8sync.engines.vllm`; or
            a list of these, which get one version: all of them install it, or none.
        recipe: `blockwise`, `blockwise-pow2`, `blockwise-fp32`, `bf16`, or a `fp8sync.Recipe`.
        in_flight: what becomes of requests in flight: `wait`, `keep`, `recompute` or `abort`; see `Link.refit`.
        bridge: for a Megatron-Core model, whose list of chunks is the `model`: its
            `megatron.bridge.AutoBridge`.
        master: whether to quantize its optimizer's FP32 masters, not the parameters made from them; see
            `fp8sync.sources.megatron.MegatronSource`.
        kv_scales: scales of the engine's FP8 KV cache by vLLM's parameter name; without, the engine keeps
            its own. Every trainer rank gives the same names; rank 0's values are sent.
        scales: `paired` or `misc`, if not as the recipe says; see `fp8sync.Recipe`.
        commit: `staged`, `in-place` where the engine's memory is short, or `auto`; see `fp8sync.connect`.
        timeout_s: limit of every single wait for a peer; requests in flight have three times as long to
            end (`wait`).

    Returns:
        What was done: version, bytes, seconds per stage, route and error per tensor.

    Raises:
        ValueError: unknown `recipe`, `in_flight`, `scales` or `commit`.
        Fp8SyncError: one of `fp8sync.errors`: at the first call what `fp8sync.connect` raises, and always
            what `Link.refit` raises, which says what the engine serves then.

    Examples:
        >>> report = fp8sync.refit(model, llm, recipe="blockwise")  # doctest: +SKIP
        >>> report.version  # doctest: +SKIP
        1
    """
    wanted = Recipe.of(recipe, scales)
    key = _name(model), _name(engine)
    known = _links.get(key)
    asked = wanted, master, commit, (kv_scales or {}).keys(), timeout_s
    if known and known.asked() != asked:
        del _links[key]
        known.link.close()
        known = None
    if known is None:
        held = dict(kv_scales or {})
        source = model if bridge is None and not master else as_source(model, bridge, master=master)
        link = connect(
            source, engine, wanted, kv_scales=held or None, commit=commit, timeout_s=timeout_s
        )
        for other in list(_links.values()):
            other.link.let_go()
        both = _frozen(model), _frozen(engine)
        known = _links[key] = _Kept(link, commit, held, both, master, timeout_s)
    known.kv_scales.update(kv_scales or {})
    return known.link.refit(in_flight)


def restore_kv_scales(engine: Any) -> None:
    """Make an engine's KV-cache scales right again after its cache woke up.

    vLLM (0.25 to 0.27 at least) sets them to 1.0 on the device in `wake_up`, whatever they were. The
    engine's workers notice and put them back before the next forward, and at each refit; this call is
    for engines with cudagraph_mode FULL or torch's stock compilation, whose forwards they cannot see.

    Args:
        engine: as for `refit`.

    Raises:
        RefitInProgress: the engine is being refitted or connected.
        TransferTimeout, EngineLost: it did not answer, or is gone.
        UnsupportedLayout: not an engine that fp8sync can drive.

    Examples:
        >>> llm.wake_up(["kv_cache"])  # doctest: +SKIP
        >>> fp8sync.restore_kv_scales(llm)  # doctest: +SKIP
    """
    as_engine(engine).restore_kv_scales()


def close(model: Any = None, engine: Any = None) -> None:
    """Close the links that `refit` keeps, and let go of their models and engines.

    The engines go on with the weights that they have. What has no link is passed over.

    Args:
        model: only links of this model.
        engine: only links of this engine, or of this list of engines.

    Examples:
        >>> fp8sync.close(engine=llm)  # doctest: +SKIP
    """
    wanted = _name(model), _name(engine)
    for key in list(_links):
        if all(
            given is None or a == b
            for given, a, b in zip((model, engine), key, wanted, strict=True)
        ):
            _links.pop(key).link.close()


atexit.register(close)


def _name(given: Any) -> _Name:
    if isinstance(given, (list, tuple)):
        return tuple(_name(each) for each in given)
    return str(given) if isinstance(given, (str, Path)) else id(given)


def _frozen(given: Any) -> Any:
    """A list may change under its owner's hands; what was in it is kept."""
    return tuple(given) if isinstance(given, list) else given
