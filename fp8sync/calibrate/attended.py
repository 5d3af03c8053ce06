"""What a Megatron-Core model's core attention is given: keys normalized and rotated, and values.

The forward passes are run by Megatron-Core's own schedule, so that all pipeline stages take part, one
batch at a time. Tensor-parallel ranks hold a token's heads in parts; its amax is the largest of theirs.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.calibrate.evaluating import evaluating
from fp8sync.errors import UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["largest_attended"]


def largest_attended(
    chunks: Sequence[Any], bridge: Any, batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return every token's amax, by the name of the scale; of this pipeline stage's layers.

    Args:
        chunks: this rank's model chunks.
        bridge: the `megatron.bridge.AutoBridge` that knows the layers' Hugging Face names.
        batches: of this data-parallel rank; `input_ids`, and `attention_mask` where the end is padding.

    Raises:
        UnsupportedLayout: latent attention, or core attention that is not given keys per head.
    """
    from megatron.bridge.models.conversion.utils import unwrap_model
    from megatron.core import parallel_state

    layers = dict(_layers(unwrap_model(list(chunks)), bridge))
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    for given in batches:
        ids, mask = given["input_ids"], given.get("attention_mask")
        _check_padding(mask)
        found: dict[str, torch.Tensor] = {}
        with _watched(layers, found):
            _forward(chunks, ids)
        for name, largest in found.items():  # [length, batch]
            shown = largest.t() if mask is None else largest.t()[mask.bool()]
            seen[name].append(shown.flatten())
    amax = {name: torch.cat(parts) for name, parts in seen.items()}
    group = parallel_state.get_tensor_model_parallel_group()
    for tokens in amax.values() if group.size() > 1 else ():
        dist.all_reduce(tokens, dist.ReduceOp.MAX, group=group)
    return {name: tokens.cpu() for name, tokens in amax.items()}


def _layers(chunks: Sequence[Any], bridge: Any) -> Iterator[tuple[str, Any]]:
    """Yield the core attention of each layer of this rank, by its Hugging Face module's name."""
    registry = bridge._model_bridge.mapping_registry()
    for chunk in chunks:
        if chunk.config.multi_latent_attention:
            raise UnsupportedLayout("vLLM's MLA layers keep no KV-cache scales")
        for layer in chunk.decoder.layers:
            core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
            if core is None:
                continue
            name = f"decoder.layers.{layer.layer_number - 1}.self_attention.linear_qkv.weight"
            mapping = registry.megatron_to_hf_lookup(name)
            if mapping is None:
                raise UnsupportedLayout(f"{name}: expected a mapping to HF tensors, found none")
            named = mapping.hf_param
            key = named["k"] if isinstance(named, dict) else named
            yield key.removesuffix(".weight").rpartition(".")[0], core


@contextmanager
def _watched(layers: Mapping[str, Any], found: dict[str, torch.Tensor]) -> Iterator[None]:
    """Fill `found` with what each layer is first given."""

    def watch(name: str) -> Callable[..., None]:
        def look(_: Any, args: Any, kwargs: Any) -> None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            for kind in ("key", "value"):
                tensor = given[kind]
                if tensor.dim() != 4:
                    raise UnsupportedLayout(
                        f"{name}: expected a {kind} [length, batch, heads, dim], "
                        f"found {list(tensor.shape)}"
                    )
                largest = tensor.detach().abs().amax((2, 3)).float()
                found.setdefault(f"{name}.attn.{kind[0]}_scale", largest)

        return look

    with ExitStack() as hooks:
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(watch(name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _forward(chunks: Sequence[Any], ids: torch.Tensor) -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batch, length = ids.shape
    places = torch.arange(length, device=ids.device).expand(batch, length)
    # Virtual stages want as many microbatches as there are stages; only the first is looked at.
    count = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1

    def step(_: Any, chunk: Any) -> tuple[torch.Tensor, Callable[..., None]]:
        return chunk(ids, places, None), lambda *_, **__: None

    with evaluating(chunks):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(chunks),
            model=list(chunks),
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _check_padding(mask: torch.Tensor | None) -> None:
    """A causal model's tokens do not see padding that follows them; what comes first, they would."""
    if mask is not None and bool((mask.bool()[:, 1:] & ~mask.bool()[:, :-1]).any()):
        raise ValueError(
            "expected padding at the end of a sequence alone, found some before tokens"
        )
