"""KV connectors that cannot be emptied: those that keep keys and values are refused before anything is planned.

vLLM takes a connector without a `reset_cache` of its own for emptied, and MultiConnector its children.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from fp8sync.errors import UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_connectors"]

logger = init_logger("vllm.fp8sync")

_KEEPS = {
    "ExampleConnector",
    "FlexKVConnectorV1",
    "HF3FSKVConnector",
}
"""vLLM's own that hold prefixes for later requests, and have no `reset_cache`: so in 0.25.1, 0.27.1 and 0.33.0."""
_KEEPS_UNLESS_IT_HANDS_OVER = {
    "LMCacheConnectorV1",
    "LMCacheMPConnector",
    "LMCacheMPConnectorUpstream",
}
"""Those that may instead bring one request from an engine that prefills to one that decodes."""
_KEEPS_NOTHING = {
    "DecodeBenchConnector",
    "ExampleHiddenStatesConnector",
    "HiSparseConnector",
    "MoRIIOConnector",
    "MooncakeConnector",
    "NixlBaseConnector",
}
"""vLLM's own whose keys and values are of requests at work alone."""


def check_connectors(transfer: Any, rank: int) -> None:
    """Check that no KV connector serves what was computed with earlier weights.

    Of one whose class does not tell, vLLM's log has a warning, once.

    Args:
        transfer: vLLM's `kv_transfer_config`, or None.
        rank: of the worker, for the error.

    Raises:
        UnsupportedLayout: naming each connector that keeps keys and values and cannot be emptied.
    """
    kept = []
    for config in _each(transfer):
        name, known = config.kv_connector, _names(config)
        hands_over = config.kv_role != "kv_both"
        if not known or known & _KEEPS_NOTHING:
            continue
        if known & _KEEPS or (known & _KEEPS_UNLESS_IT_HANDS_OVER and not hands_over):
            kept.append(
                f"{name} (engine rank {rank}): expected a reset_cache of its own, found none"
            )
        else:
            logger.warning_once(
                "fp8sync: KV connector %s has no reset_cache of its own: should it keep keys and values "
                "for later requests, a refit does not empty it",
                name,
            )
    if kept:
        raise UnsupportedLayout(
            "a KV connector would go on serving keys and values of old weights: start the engine without it, "
            "with one that can be emptied (OffloadingConnector, SimpleCPUOffloadConnector, "
            "MooncakeStoreConnector), or with a subclass that overrides reset_cache "
            "(kv_connector_module_path)",
            kept,
        )


def _each(transfer: Any) -> Iterator[Any]:
    """Yield the config of every connector, MultiConnector's children for itself."""
    from vllm.config import KVTransferConfig

    if transfer is None or transfer.kv_connector is None:
        return
    found = _class_of(transfer)
    if found is None or all(base.__name__ != "MultiConnector" for base in found.__mro__):
        yield transfer
        return
    for child in transfer.kv_connector_extra_config.get("connectors", ()):
        yield from _each(KVTransferConfig(**{"engine_id": transfer.engine_id, **child}))


def _names(config: Any) -> set[str]:
    """Return the names of a connector's class and its bases; none if it can be emptied, or is not found here."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    found = _class_of(config)
    if found is None or found.reset_cache is not KVConnectorBase_V1.reset_cache:
        return set()
    return {base.__name__ for base in found.__mro__}


def _class_of(config: Any) -> Any:
    """Return a connector's class; None if it is not found here."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        return KVConnectorFactory.get_connector_class(config)
    # Whatever an import may raise: vLLM itself has found it, or says so.
    except Exception:  # noqa: BLE001
        return None
