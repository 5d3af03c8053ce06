"""A Hugging Face directory as a source: an engine can be seeded without a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fp8sync.errors import UnsupportedLayout
from fp8sync.manifest import ITEMSIZE, Box, Manifest, Placement, TensorInfo
from fp8sync.plan.boxes import block_shape
from fp8sync.recipe import BLOCK, Encoding, Formula
from fp8sync.sources.stacks import hf_parts
from fp8sync.trainers import rank_and_size

__all__ = ["SCALE_SUFFIX", "CheckpointSource"]

SCALE_SUFFIX = "_scale_inv"
"""What a checkpoint calls the scales of a weight: the weight's name, and this."""

INDEX = "model.safetensors.index.json"


class _Held(NamedTuple):
    weight: torch.Tensor
    scale_inv: torch.Tensor | None


class CheckpointSource:
    """The safetensors of a directory, BF16 or blockwise FP8, mapped into memory and read as needed.

    FP8 weights with `weight_scale_inv` of 128x128 blocks travel as they are. Their formula is read off
    the scales: `pow2` if every scale is a power of two.

    Args:
        folder: with `*.safetensors`, one file or several with an index, and `config.json`.
        rank: this trainer rank; where several ranks read one directory, they share the sending. None:
            that of torch.distributed's default group.

    Raises:
        UnsupportedLayout: files that are missing or unreadable, or no package safetensors.

    Examples:
        >>> fp8sync.refit(CheckpointSource("Qwen3-30B-A3B-FP8"), llm)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, rank: int | None = None) -> None:
        self.folder = Path(folder)
        self._rank = rank_and_size()[0] if rank is None else rank
        self._tensors = _mapped(self.folder)
        self._scales = {
            name: tensor.float()  # some directories keep them in BF16
            for name, tensor in self._tensors.items()
            if name.endswith(SCALE_SUFFIX)
        }

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` says; nothing, if there is none."""
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def storages(self) -> dict[str, torch.Tensor]:
        """Return the mapped tensors by name; pages are read from the files when they are needed."""
        return {**self._tensors, **self._scales}

    def manifest(self) -> Manifest:
        """Return one box per HF tensor.

        Raises:
            UnsupportedLayout: FP8 weights without scales of 128x128 blocks, scales without a weight,
                and dtypes that cannot travel; all of them at once.
        """
        infos: list[TensorInfo] = []
        boxes: list[Box] = []
        faults = self._orphans()
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        for name, weight in self._tensors.items():
            if name in self._scales:
                continue
            try:
                held = self._held(name, weight)
                parts = list(hf_parts(name, shapes))
            except ValueError as error:
                faults.append(f"{name}: {error}")
                continue
            for part in parts:
                infos.append(_info(part.name, part.shape, held))
                first = sum(i * s for i, s in zip(part.rect[0], weight.stride(), strict=True))
                at = Placement(name, first, tuple(weight.stride(d) for d in part.dims))
                scale_at = None
                if held.scale_inv is not None:
                    scale_at = Placement(name + SCALE_SUFFIX, 0, held.scale_inv.stride())
                boxes.append(Box(part.name, (0,) * len(part.shape), part.shape, at, scale_at))
        if faults:
            raise UnsupportedLayout(f"{self.folder} cannot be read as it is", faults)
        return Manifest.of(infos, {self._rank: boxes})

    def _held(self, name: str, weight: torch.Tensor) -> _Held:
        dtype = str(weight.dtype).removeprefix("torch.")
        if dtype not in ITEMSIZE:
            raise ValueError(f"dtype {dtype} cannot travel")
        if weight.dtype is not torch.float8_e4m3fn:
            return _Held(weight, None)
        scale_inv = self._scales.get(name + SCALE_SUFFIX)
        grid = block_shape(weight.shape)
        found = "none" if scale_inv is None else str(list(scale_inv.shape))
        if scale_inv is None or weight.dim() != 2 or tuple(scale_inv.shape) != grid:
            raise ValueError(
                f"expected scale_inv {list(grid)} of {BLOCK}x{BLOCK} blocks, found {found}"
            )
        return _Held(weight, scale_inv)

    def _orphans(self) -> list[str]:
        paired = {
            name + SCALE_SUFFIX
            for name, tensor in self._tensors.items()
            if tensor.dtype is torch.float8_e4m3fn
        }
        return [
            f"{name}: expected an FP8 weight, found none" for name in self._scales.keys() - paired
        ]


def _info(name: str, shape: tuple[int, ...], held: _Held) -> TensorInfo:
    dtype = str(held.weight.dtype).removeprefix("torch.")
    if held.scale_inv is None:
        return TensorInfo(name, shape, dtype)
    mantissa = torch.frexp(held.scale_inv).mantissa
    formula = Formula.POW2 if bool((mantissa == 0.5).all()) else Formula.FP32
    return TensorInfo(name, shape, dtype, Encoding.BLOCKWISE, formula)


def _mapped(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    holder: dict[str, str] = {}
    twice = []
    for path, names in _files(folder).items():
        read = _read(path, names)
        twice += [f"{n}: found in {holder[n]} and in {path.name}" for n in read if n in found]
        holder |= dict.fromkeys(read, path.name)
        found |= read
    if twice:
        raise UnsupportedLayout(f"{folder}: expected every tensor in one file", twice)
    return found


def _read(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Map a file's tensors into memory; `names` are those that it has to have."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UnsupportedLayout("reading a checkpoint needs the package safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UnsupportedLayout(f"{path} cannot be read: {error}") from error
    missing = [
        f"{name}: expected in {path.name}, found none" for name in names if name not in tensors
    ]
    if missing:
        raise UnsupportedLayout(f"{path} is not what its index says", missing)
    return tensors


def _files(folder: Path) -> dict[Path, list[str]]:
    """The files of a directory, with the names that an index expects in each."""
    index = folder / INDEX
    files: dict[Path, list[str]] = {}
    if index.exists():
        try:
            told = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedLayout(
                f"{index}: expected JSON with a weight_map: {error!r}"
            ) from error
        for name, file in told:
            files.setdefault(folder / file, []).append(name)
    else:
        files = {path: [] for path in sorted(folder.glob("*.safetensors"))}
    if not files:
        raise UnsupportedLayout(f"{folder}: expected *.safetensors, found none")
    return files
