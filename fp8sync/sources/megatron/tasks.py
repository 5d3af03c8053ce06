"""This rank's parameters, as Megatron-Bridge's conversion tasks name them."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8sync.sources.megatron.grouped import grouped_experts
from fp8sync.sources.megatron.mappings import why_no_boxes
from fp8sync.sources.megatron.parameters import LocalParameter, LooseTask

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

__all__ = [
    "VOCABULARIES",
    "Parameters",
    "hook_faults",
    "local_parameters",
    "vocabulary_of",
]

VOCABULARIES = ("embedding.word_embeddings.weight", "output_layer.weight")
"""How the names of vocabularies end."""
_HARMLESS_HOOKS = {
    # These only add rotary frequencies that a checkpoint happens to carry; no engine loads them.
    "MegatronModelBridge",
    "DeepSeekV3Bridge",
    "LlamaBridge",
}


class Parameters(NamedTuple):
    """Those of this rank that are boxes, the tasks of all others, and what cannot be read at all."""

    boxed: list[LocalParameter]
    loose: list[LooseTask]
    faults: list[str]


def local_parameters(chunks: Sequence[Any], bridge: Any) -> Parameters:
    """List this rank's parameters; collective over the pipeline group, for names alone.

    Args:
        chunks: unwrapped model chunks of this rank.
        bridge: a `megatron.bridge.AutoBridge`.
    """
    model_bridge = bridge._model_bridge
    tasks = model_bridge.build_conversion_tasks(bridge.hf_pretrained, list(chunks))
    tasks = [task for task in tasks if task is not None]
    held = [task for task in tasks if task.param_weight is not None]
    experts, faults = grouped_experts(chunks, model_bridge)
    known = {(task.vp_stage, task.param_name) for task in held} | experts.keys()
    faults += [*hook_faults(model_bridge), *_centred(chunks, bridge)]
    faults += _unmapped(chunks, model_bridge, known)
    vocabulary = vocabulary_of(bridge)
    found = Parameters([*chain(*experts.values())], [], faults)
    for task in tasks:
        parameter = _local(task, vocabulary)
        if model_bridge._should_skip_mtp_duplicate_embedding_export(task, chunks):
            parameter = None
        if reason := why_no_boxes(task.mapping):
            found.loose.append(LooseTask(task, parameter, reason))
        elif parameter is not None:
            found.boxed.append(parameter)
    return found


def _local(task: Any, vocabulary: int | None) -> LocalParameter | None:
    if task.param_weight is None:
        return None
    return LocalParameter(
        name=task.global_param_name,
        mapping=task.mapping,
        module=task.megatron_module,
        attribute=task.param_name.rpartition(".")[2],
        vocabulary=vocabulary if task.global_param_name.endswith(VOCABULARIES) else None,
    )


def _unmapped(
    chunks: Sequence[Any], model_bridge: Any, known: Container[tuple[int, str]]
) -> Iterator[str]:
    from megatron.bridge.models.conversion.utils import persistent_buffers

    kind = type(model_bridge).__name__
    for stage, chunk in enumerate(chunks):
        tied = getattr(chunk.config, "share_embeddings_and_output_weights", False)
        for name, _ in chain(chunk.named_parameters(), persistent_buffers(chunk)):
            if (stage, name) in known or (tied and name.endswith("output_layer.weight")):
                continue
            if model_bridge._is_adapter_param_name(name):
                yield f"{name}: a LoRA adapter; merge it into its layer first"
                continue
            yield (
                f"{name}: expected a mapping of {kind} to HF tensors that the checkpoint has, "
                "found none (is this the bridge of this model?)"
            )


def hook_faults(model_bridge: Any) -> Iterator[str]:
    """Say if a bridge changes tensors after its mappings; boxes would not be what it exports."""
    owner = type(model_bridge).maybe_modify_converted_hf_weight.__qualname__.partition(".")[0]
    if owner not in _HARMLESS_HOOKS:
        yield f"{owner}.maybe_modify_converted_hf_weight changes what the mappings give"


def _centred(chunks: Sequence[Any], bridge: Any) -> Iterator[str]:
    """Say if norms hold their weights minus one and the bridge's own model would not: no mapping adds it."""
    option = "layernorm_zero_centered_gamma"
    if not any(getattr(chunk.config, option, False) for chunk in chunks):
        return
    if not getattr(bridge.to_megatron_provider(load_weights=False), option, False):
        kind = type(bridge._model_bridge).__name__
        yield f"norms hold their weights minus one ({option}), expected {kind} to know of it"


def vocabulary_of(bridge: Any) -> int | None:
    """Return the rows of the HF embedding; what a parameter has beyond them is padding."""
    config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)
