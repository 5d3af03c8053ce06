"""The way into a link."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8sync.link.commit import check_commit
from fp8sync.link.follower import FollowerLink
from fp8sync.link.link import Link
from fp8sync.plan import DEFAULT_BUCKET_BYTES
from fp8sync.recipe import Recipe
from fp8sync.sources.kv_scales import KvScaleSource
from fp8sync.trainers import Opening, rank_and_size

if TYPE_CHECKING:
    from fp8sync.link.commit import Commit
    from fp8sync.sources.kv_scales import KvScales

__all__ = ["connect"]


def connect(
    model: Any,
    engine: Any,
    recipe: str | Recipe = "blockwise",
    *,
    timeout_s: float = 120.0,
    host: str = "127.0.0.1",
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    transport: str = "auto",
    kv_scales: KvScales | None = None,
    scales: str | None = None,
    commit: Commit = "staged",
) -> Link | FollowerLink:
    """Join a trainer's model and a live engine; nothing in the engine is changed.

    But one that a trainer had paused and that holds its old weights goes on, if that trainer is gone.

    On a trainer of several ranks (an initialized torch.distributed default group) every rank calls
    this, and later `refit`, like a collective. Rank 0 holds the engine; others may pass None.

    Args:
        model: a `torch.nn.Module` with Hugging Face names, or a `fp8sync.sources.Source`.
        engine: an engine, or a list of engines, as for `fp8sync.refit`.
        recipe: name or `Recipe`.
        timeout_s: limit of every single wait for a peer.
        host: address or name of this host that the rendezvous binds, and by which workers reach it (IPv4);
            loopback unless told otherwise.
        bucket_bytes: payload of a message; each side keeps at most two such buffers.
        transport: `ipc` (the trainer's kernels write into the engine's staging memory; one host),
            `nccl` (buckets between GPUs), `gloo` (buckets through host memory), `golden` (whole
            tensors to every worker, quantized there: slow, plain), or `auto`;
            `link.transport` says which, and why.
        kv_scales: scales of the engine's FP8 KV cache by vLLM's parameter name (`fp8sync.calibrate_kv`
            makes them). Its values are read at every refit, like the weights; rank 0's are sent.
        scales: `paired` or `misc`, if not as the recipe says; see `Recipe`.
        commit: `staged` (the engine generates until a whole version lies in staging memory as large as
            its weights; a failure leaves the old ones), `in-place` (it stands still while a version is
            received and installed, some modules at a time; staging memory is `bucket_bytes`, or as large
            as the largest module; see `Link.refit` for failures), or `auto`: staged where it fits into
            memory; `link.commit` says which, and why. Rank 0 decides.

    Returns:
        A link; `link.refit()` moves the weights.

    Raises:
        ValueError: unknown `recipe`, `scales`, `commit` or `transport`.
        TensorMismatch: a tensor is missing, superfluous or of another shape; a KV-cache scale is wrong.
        RecipeMismatch: the engine does not hold what the recipe makes.
        UnsupportedLayout: a layout that cannot be moved exactly, a `transport` that is not possible here,
            `golden` with another `commit` than `staged`, a `host` that workers cannot reach, or an engine
            that was not made for fp8sync.
        PlanMismatch: the two sides computed different plans.
        InstallFailed: a worker has no memory to stage a version in.
        RefitInProgress: the engine is already being refitted or connected.
        TransferTimeout, EngineLost: a worker or a trainer rank did not answer, or is gone.

    Examples:
        >>> link = fp8sync.connect(model, llm)  # doctest: +SKIP
        >>> link.refit().version  # doctest: +SKIP
        1
    """
    check_commit(commit, transport)
    wanted = Recipe.of(recipe, scales)
    if kv_scales is not None:
        model = KvScaleSource(model, kv_scales, rank_and_size()[0])
    if rank_and_size()[0] > 0:
        return FollowerLink(model, wanted, timeout_s)
    with Opening() as opening:
        return Link(
            model, engine, wanted, timeout_s, host, bucket_bytes, transport, commit, opening
        )
