"""Runs a program that trains with Megatron-Core, as it is written for GPUs, on the processor.

python -m torch.distributed.run --nproc_per_node=2 -m tests.megatron.training MODULE ARGUMENTS...
"""

from __future__ import annotations

import runpy
import sys
from functools import partialmethod
from typing import Any
from unittest.mock import patch

import torch

from tests.megatron import cpu


def main(module: str) -> None:
    torch.set_num_threads(1)
    cpu.import_bridge()
    from megatron.bridge.models.model_provider import ModelProviderMixin
    from megatron.core import tensor_parallel

    provide = partialmethod(
        ModelProviderMixin.provide_distributed_model, use_cpu_initialization=True
    )
    with (
        patch.object(ModelProviderMixin, "provide_distributed_model", provide),
        patch.object(tensor_parallel, "model_parallel_cuda_manual_seed", lambda _: None),
        cpu.one_stream(),
        _settled_providers(),
        cpu.said_to_be_cuda(),
    ):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _settled_providers() -> Any:
    from megatron.bridge import AutoBridge

    provide = AutoBridge.to_megatron_provider

    def settled(bridge: Any, *args: Any, **kwargs: Any) -> Any:
        provider = provide(bridge, *args, **kwargs)
        finalize = provider.finalize

        def finalized() -> None:
            for name, value in cpu.settings_of(provider).items():
                setattr(provider, name, value)
            finalize()

        provider.finalize = finalized
        return provider

    return patch.object(AutoBridge, "to_megatron_provider", settled)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    main(sys.argv[0])
