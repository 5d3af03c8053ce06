"""Registers the backend; vLLM calls this in every process through its plugin entry point."""

from contextlib import suppress

__all__ = ["register"]


def register() -> None:
    """Make `weight_transfer_config={"backend": "fp8sync"}` known to vLLM; safe to call again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from fp8sync.engines.vllm.early import leave_updates_to_backend
    from fp8sync.engines.vllm.prefixes import renew_at_install

    leave_updates_to_backend()
    # A vLLM that is built otherwise is paused, and computes requests again.
    with suppress(ImportError, AttributeError):
        renew_at_install()
    if "fp8sync" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "fp8sync", "fp8sync.engines.vllm.backend", "Fp8SyncWeightTransferEngine"
        )
