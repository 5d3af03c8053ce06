"""Weights are installed and the prefix cache is emptied between the same two steps, and requests keep their blocks.

vLLM empties its cache in a call of its own, and only while no request holds a block. So an engine would have to
stand for both calls, and requests that a refit keeps would all be computed again, which costs far more than the
refit. Here the process that schedules does it as soon as its workers have installed: the cache forgets what it
knows, and requests that hold blocks get names for them, those still to come included, that no other request's
tokens lead to. What they have computed, and will, with keys and values of the old weights in it is theirs alone.

vLLM has no hook for that, so the plugin wraps the call by which weights arrive, `EngineCore.collective_rpc`. With
the link's first call it tells the workers, and they the trainer, that it is there (`renews`); where it is not,
the engine is paused, emptied, and requests are computed again. Not with a KV connector or whatever else keeps
something under the names of blocks.

The same wrapper answers what a server's routes do not: whether requests that have begun are left, once vLLM says
that it waited for them (`HAVE_BEGUN`). Those that it has preempted stand in its queue, with their tokens.
"""

from __future__ import annotations

import os
import secrets
from functools import wraps
from typing import Any

from fp8sync.engines.vllm.compat import has_our_backend

__all__ = ["HAVE_BEGUN", "renamed", "renew", "renew_at_install"]

HAVE_BEGUN = "requests have begun"
"""In the refusal of a call that asks whether there are such."""

_HASH_BYTES = 32


def renew_at_install() -> None:
    """Let vLLM's engine processes renew their prefix caches when weights were installed; safe to call again."""
    from vllm.v1.engine.core import EngineCore

    call = EngineCore.collective_rpc
    if vars(EngineCore).get("_fp8sync"):
        return
    EngineCore._fp8sync = True

    @wraps(call)
    def collective_rpc(
        self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None
    ) -> Any:
        if method not in ("init_weight_transfer_engine", "update_weights", "finish_weight_update"):
            return call(self, method, timeout, args, kwargs)
        said = dict(kwargs or {})
        if said.get("init_info", {}).get("begun"):
            return _refuse_begun(self.scheduler)
        if _can_renew(self):
            if "init_info" in said:
                said["init_info"] = {**said["init_info"], "renews": True}
            if "update_info" in said:
                said["update_info"] = {**said["update_info"]}
                self._fp8sync_renews = said["update_info"].pop("renew", False)
        answers = call(self, method, timeout, args, said)
        if method == "finish_weight_update" and vars(self).pop("_fp8sync_renews", False):
            renew(self.scheduler)
        return answers

    EngineCore.collective_rpc = collective_rpc


def _refuse_begun(scheduler: Any) -> list[Any]:
    tokens = [request for request in scheduler.requests.values() if request.num_output_tokens]
    begun = {r.request_id for r in (*scheduler.running, *tokens) if not r.is_finished()}
    if begun:
        raise RuntimeError(f"fp8sync: {len(begun)} {HAVE_BEGUN}")
    return []


def _can_renew(core: Any) -> bool:
    if not has_our_backend(core.vllm_config):
        return False
    scheduler = core.scheduler
    others = getattr(scheduler, "connector", None), getattr(scheduler, "aux_output_connector", None)
    cache = getattr(scheduler, "kv_cache_manager", None)
    if cache is None or others != (None, None):
        return False
    # A pool of its own, as for what HiSparse keeps on the host, has copies elsewhere.
    return {m.block_pool for m in cache.coordinator.single_type_managers} == {cache.block_pool}


def renew(scheduler: Any) -> None:
    """Empty the prefix cache, whoever holds blocks.

    Raises:
        RuntimeError: vLLM has not emptied it.
    """
    if not scheduler.cache_config.enable_prefix_caching:
        return
    for request in scheduler.requests.values():
        renamed(request)
    cache = scheduler.kv_cache_manager
    pool = cache.block_pool
    # Its own reset looks whether all blocks but the null block are free.
    pool.get_num_free_blocks = lambda: pool.num_gpu_blocks - 1
    try:
        if not cache.reset_prefix_cache():
            raise RuntimeError("vLLM kept prefixes of the old weights")
    finally:
        del pool.get_num_free_blocks


def renamed(request: Any) -> None:
    """Rename what a request has computed, and so, as names are chained, what it will compute.

    One that has computed nothing keeps its names: it will, with the new weights.
    """
    if not request.num_computed_tokens:
        return
    request.cache_salt = secrets.token_hex(_HASH_BYTES)  # for a first block that is not full yet
    hashes = request.block_hashes
    noise = os.urandom(_HASH_BYTES * len(hashes))
    hashes[:] = [noise[at : at + _HASH_BYTES] for at in range(0, len(noise), _HASH_BYTES)]
