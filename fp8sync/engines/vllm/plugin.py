"""Registers the backend; vLLM calls this in every process through its plugin entry point."""

__all__ = ["register"]


def register() -> None:
    """Make `weight_transfer_config={"backend": "fp8sync"}` known to vLLM; safe to call again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "fp8sync" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "fp8sync", "fp8sync.engines.vllm.backend", "Fp8SyncWeightTransferEngine"
        )
