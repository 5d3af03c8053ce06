"""Experts of a layer in one parameter (`moe_single_grouped_weight`), each as a parameter of its own.

Megatron-Bridge maps experts by number (`linear_fc1.weight0`, `weight1`, ...) and does not know the one
parameter `linear_fc1.weight`, in which Transformer Engine stacks them. Its registry is asked for the names
that the experts would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8sync.sources.megatron.mappings import why_no_boxes
from fp8sync.sources.megatron.parameters import LocalParameter

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["grouped_experts"]

_Experts = dict[tuple[int, str], list[LocalParameter]]


def grouped_experts(chunks: Sequence[Any], model_bridge: Any) -> tuple[_Experts, list[str]]:
    """List the experts that share a parameter.

    Args:
        chunks: unwrapped model chunks of this rank.
        model_bridge: a model bridge of Megatron-Bridge, whose parameter names have been exchanged.

    Returns:
        This rank's experts by (virtual stage, name of their parameter), and what cannot be read.
    """
    from megatron.bridge.models.conversion import model_bridge as conversion

    registry = model_bridge.mapping_registry()
    registry.set_process_groups_from_pg_collection(
        conversion._get_pg_collection_from_model(list(chunks))
    )
    experts: _Experts = {}
    faults: list[str] = []
    for stage, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            owner, _, attribute = name.rpartition(".")
            module = chunk.get_submodule(owner)
            if not getattr(module, f"single_grouped_{attribute}", False):
                continue
            found = experts[stage, name] = []
            for number in range(len(parameter)):
                one = conversion._megatron_local_name_to_global(
                    list(chunks), chunk.config, f"{name}{number}", stage
                )
                mapping = registry.megatron_to_hf_lookup(one)
                if mapping is None:
                    faults.append(
                        f"{one}: expected a mapping of {type(model_bridge).__name__}, found none"
                    )
                elif reason := why_no_boxes(mapping):
                    faults.append(f"{one}: {reason}, and one parameter holds all experts")
                else:
                    found.append(LocalParameter(one, mapping, module, attribute, expert=number))
    return experts, faults
