"""Megatron-Core model chunks as a `Source`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import Box, Manifest, TensorInfo
from fp8sync.sources.megatron.gathered import Gathered
from fp8sync.sources.megatron.masters import Masters
from fp8sync.sources.megatron.reading import describe, live
from fp8sync.sources.megatron.tasks import local_parameters
from fp8sync.trainers import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8sync.sources.megatron.parameters import LocalParameter, LooseTask

__all__ = ["MegatronSource"]

_Form = tuple[torch.dtype, torch.Size, tuple[int, ...]]


class MegatronSource:
    """This rank's part of a Megatron-Core model, under Hugging Face names.

    Every trainer rank makes one, at the same time: names (and nothing else) are exchanged over the
    pipeline group. The parameters are read where they lie, at every refit anew; BF16 parameters and
    Transformer Engine's blockwise FP8 parameters may be mixed. Tied output layers are listed once,
    as the embedding.

    Args:
        model_chunks: the list that `provide_distributed_model` returned, or its only chunk; wrapped in
            DDP or not.
        bridge: the `megatron.bridge.AutoBridge` of the model.
        master: whether to read the optimizer's FP32 masters instead of the parameters made from them.
            A distributed optimizer divides them among the data-parallel ranks; then the chunks have to
            be those that DDP wraps.

    What cannot be sent is refused by `manifest`, all of it at once.

    Examples:
        >>> source = MegatronSource(model_chunks, bridge)  # doctest: +SKIP
        >>> link = fp8sync.connect(source, llm)  # doctest: +SKIP
    """

    def __init__(self, model_chunks: Any, bridge: Any, *, master: bool = False) -> None:
        from megatron.bridge.models.conversion.utils import unwrap_model

        several = isinstance(model_chunks, (list, tuple))
        self._chunks = list(model_chunks) if several else [model_chunks]
        found = {type(c).__name__ for c in self._chunks if not isinstance(c, torch.nn.Module)}
        if found or not self._chunks:
            told = ", ".join(sorted(found)) or "none"
            raise UnsupportedLayout(f"expected Megatron-Core model chunks, found {told}")
        self._bridge = bridge
        self._masters = Masters(self._chunks) if master else None
        self._overlapping = [chunk for chunk in self._chunks if _overlaps(chunk)]
        self._rank = rank_and_size()[0]
        chunks = unwrap_model(self._chunks)
        listed = local_parameters(chunks, bridge)
        self._parameters = listed.boxed
        self._gathered = Gathered(bridge, chunks, listed.loose)
        self._complete = not self._needs_preparing
        self._faults = [*listed.faults, *self._unread_masters(listed.loose)]
        self._forms: dict[str, _Form] = {}

    @property
    def config(self) -> Any:
        """The Hugging Face config that the bridge was made from."""
        return getattr(self._bridge.hf_pretrained, "config", self._bridge.hf_pretrained)

    @property
    def tiles(self) -> bool:
        """Whether overlapping boxes can only be a wrong mapping.

        Replicas of a parameter are divided in one way; of its masters, each by its own optimizer.
        """
        return self._masters is None

    def manifest(self) -> Manifest:
        """Return this rank's boxes; nothing is gathered, nothing is allocated.

        Tensors that are no boxes are named with the reason; `prepare` has gathered them.

        Raises:
            UnsupportedLayout: naming every parameter that cannot be sent, with the reason.
        """
        if self._gathered and not self._complete:
            raise UnsupportedLayout(
                f"trainer rank {self._rank}: some of the model's tensors are no boxes of its parameters, "
                "and have to be gathered; expected prepare() on every rank"
            )
        faults = [*self._faults, *self._waiting()]
        infos: list[TensorInfo] = []
        boxes: list[Box] = []
        for parameter in self._parameters:
            try:
                described = describe(parameter, self._masters)
            except ValueError as error:
                faults.append(f"{parameter.name} ({_hf_names(parameter)}): {error}")
                continue
            infos += described.infos
            boxes += described.boxes
        if faults:
            summary = "parameters that cannot be sent as they lie"
            raise UnsupportedLayout(summary, self._at_rank(faults))
        self._forms = {name: _form(tensor) for name, tensor in self._read()[0].items()}
        infos += self._gathered.infos()
        boxes += self._gathered.boxes()
        return Manifest.of(infos, {self._rank: boxes})

    def prepare(self) -> None:
        """Make the parameters complete; every rank calls it after the step, before `storages`.

        A distributed optimizer with `overlap_param_gather` leaves its all-gather of parameters to the
        next forward. It is done here, as that forward would. Then tensors that are no boxes are
        exported by the bridge, one by one. For all others nothing happens.

        Raises:
            Fp8SyncError: the bridge's export fails, on whatever rank.
        """
        for chunk in self._overlapping:
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)
        with torch.no_grad():
            self._gathered.gather()
        self._complete = True

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the live parameters.

        Raises:
            UnsupportedLayout: a parameter is no longer held as the manifest says, or may not be
                complete.
        """
        if not self._complete:
            raise UnsupportedLayout(
                f"trainer rank {self._rank}: parameters are not complete, or not gathered, before "
                "prepare() on every rank; expected prepare() on every rank before they are read"
            )
        if waiting := self._at_rank(self._waiting()):
            raise UnsupportedLayout("parameters that are not complete", waiting)
        self._complete = not self._needs_preparing
        found, faults = self._read()
        if not faults:
            faults = [
                f"{name}: expected {_told(form)}, "
                f"found {_told(_form(found[name])) if name in found else 'nothing'}"
                for name, form in self._forms.items()
                if name not in found or _form(found[name]) != form
            ]
        if faults:
            summary = "parameters changed their form since the link was made"
            raise UnsupportedLayout(summary, self._at_rank(faults))
        return found | self._gathered.take()

    @property
    def _needs_preparing(self) -> bool:
        return bool(self._overlapping or self._gathered)

    def _waiting(self) -> list[str]:
        """Name chunks whose parameters somebody else's DDP completes, out of reach of `prepare`."""
        return [
            f"{type(chunk).__name__}: its parameters are left to the next forward (overlap_param_gather); "
            "expected the chunk as DDP wraps it"
            for chunk in self._chunks
            if any(_is_of_ddp(hook) for hook in chunk._forward_pre_hooks.values())
        ]

    def _unread_masters(self, loose: Sequence[LooseTask]) -> Iterator[str]:
        for task in loose:
            parameter = task.parameter
            if parameter and self._masters and hasattr(parameter.kept, "main_param"):
                yield f"{parameter.name}: the bridge exports the parameter, not its master ({task.reason})"

    def _read(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        found: dict[str, torch.Tensor] = {}
        faults = []
        for parameter in self._parameters:
            try:
                found |= live(parameter, self._masters)
            except ValueError as error:  # noqa: PERF203  (every fault is told, not the first alone)
                faults.append(f"{parameter.name}: {error}")
        return found, faults

    def _at_rank(self, faults: Sequence[str]) -> list[str]:
        return [f"trainer rank {self._rank}: {fault}" for fault in faults]


def _overlaps(chunk: Any) -> bool:
    return bool(getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False))


def _is_of_ddp(hook: Any) -> bool:
    """Whether Megatron's DDP has put it on a module that it wraps."""
    made_by = "DistributedDataParallel._make_forward_pre_hook"
    return getattr(hook, "__qualname__", "").startswith(made_by)


def _hf_names(parameter: LocalParameter) -> str:
    names = parameter.mapping.hf_param
    return ", ".join(names.values()) if isinstance(names, dict) else str(names)


def _form(tensor: torch.Tensor) -> _Form:
    return tensor.dtype, tensor.shape, tensor.stride()


def _told(form: _Form) -> str:
    return f"{form[0]} {list(form[1])} with strides {list(form[2])}"
