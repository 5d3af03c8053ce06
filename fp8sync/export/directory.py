"""A Hugging Face directory, written while the weights stream by."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8sync.export.formats import encode, plan_formats, quantization_config
from fp8sync.export.ranks import agree
from fp8sync.export.shards import ShardFiles
from fp8sync.export.whole import Band, WholeTensors
from fp8sync.recipe import Recipe
from fp8sync.sources import as_source
from fp8sync.sources.checkpoint import INDEX, SCALE_SUFFIX, CheckpointSource
from fp8sync.trainers import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8sync.sources import Source

__all__ = ["DEFAULT_SHARD_BYTES", "Exported", "export_checkpoint"]

DEFAULT_BAND_BYTES = 16 << 20
DEFAULT_SHARD_BYTES = 5_000_000_000
_BESIDES = ("generation_config.json", "chat_template.*", "tokenizer*", "special_tokens_map.json",
            "added_tokens.json", "vocab.*", "merges.txt", "*preprocessor_config.json",
            "*.py")  # fmt: skip
"""Copied from beside the config; modules, too, as its `auto_map` may name some."""


@dataclass(frozen=True)
class Exported:
    """What `export_checkpoint` wrote.

    Args:
        folder: where.
        tensors: HF tensors, scales not counted.
        quantized: those of them in FP8.
        bytes: of data, scales included.
        files: with weights.

    Examples:
        >>> print(f"{export_checkpoint(model, 'step-100').bytes:,} bytes")  # doctest: +SKIP
    """

    folder: Path
    tensors: int
    quantized: int
    bytes: int
    files: int


def export_checkpoint(
    model: Any,
    folder: str | Path,
    recipe: str | Recipe = "bf16",
    *,
    bridge: Any = None,
    config: Any = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    band_bytes: int = DEFAULT_BAND_BYTES,
    progress: bool = True,
) -> Exported:
    """Write a model as a Hugging Face directory that transformers and vLLM load.

    On a trainer of several ranks every rank calls this, like a collective; rank 0 writes. Tensors
    stream through in bands of rows, so memory does not grow with the model: quantizing takes less
    than 40 bands on rank 0 (16 MiB each, if not told otherwise), where the weights are.

    Args:
        model: what `fp8sync.refit` takes: a module, the path of a directory, or a `Source`.
        folder: is made if it is not there.
        recipe: `bf16`, or a blockwise recipe: weights as FP8 with `weight_scale_inv`.
            `Recipe(..., dequantize=True)` writes the values of the FP8 weights, as BF16.
        bridge: for a Megatron-Core model, as for `fp8sync.refit`.
        config: a directory that has the model's `config.json` (tokenizer files are copied, too), a
            transformers config, or a dict. By default the model's own.
        shard_bytes: largest file, unless one tensor is larger.
        band_bytes: largest band, unless 128 rows of a matrix are larger.
        progress: whether to show a bar, if the package tqdm is there.

    Raises:
        ValueError: unknown recipe.
        UnsupportedLayout, RecipeMismatch: see `fp8sync.connect`.
        NonFiniteWeight: NaN or Inf.
        Fp8SyncError: the folder has weights already, there is no config, or writing fails.

    After an error no weight file of this call is left in the folder.

    Examples:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> model, config = torch.nn.Linear(256, 128, bias=False), {"model_type": "mine"}
        >>> with TemporaryDirectory() as folder:
        ...     wrote = export_checkpoint(model, folder, "blockwise-pow2", config=config)
        >>> wrote.tensors, wrote.quantized, wrote.bytes
        (1, 1, 32776)
    """
    wanted, folder = Recipe.of(recipe), Path(folder)
    source = as_source(model, bridge)
    whole = WholeTensors(source, band_bytes)
    written = plan_formats(whole.tensors, wanted)
    files = ShardFiles(folder, {n: w.entries() for n, w in written.items()}, shard_bytes)
    leads = rank_and_size()[0] == 0
    agree(lambda: _begin(folder, _config(config, model, source), source) if leads else None)
    try:
        with _bar(files.total_bytes, shown=progress and leads) as advance:

            def take(band: Band) -> None:
                weight, scale_inv = encode(band, written[band.tensor])
                files.append(band.tensor, weight)
                if scale_inv is not None:
                    files.append(band.tensor + SCALE_SUFFIX, scale_inv)
                    advance(scale_inv.nbytes)
                advance(weight.nbytes)

            whole.stream(take)
        told = _config(config, model, source)
        told |= dict.fromkeys({"dtype", *told.keys() & {"torch_dtype"}}, "bfloat16")
        told.pop("quantization_config", None)
        told |= quantization_config(written)
        agree(lambda: _finish(files, folder, told, config or source) if leads else None)
    except BaseException:
        if leads:
            files.remove()
        raise
    quantized = sum(w.formula is not None for w in written.values())
    return Exported(folder, len(written), quantized, files.total_bytes, len(files.names))


def _begin(folder: Path, config: dict[str, Any], source: Source) -> None:
    if not config:
        raise ValueError(
            "expected a config: a directory with config.json, or a transformers config"
        )
    if isinstance(source, CheckpointSource):
        method = (source.config.get("quantization_config") or {}).get("quant_method", "fp8")
        if method != "fp8":
            raise ValueError(f"{source.folder}: expected BF16 or blockwise FP8, found {method}")
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.glob("*.safetensors*"))
    if there:
        raise FileExistsError(f"{folder} has weights already: {', '.join(there)}")


def _finish(files: ShardFiles, folder: Path, config: dict[str, Any], besides: Any) -> None:
    files.close()
    if len(files.names) > 1:
        index = {"metadata": {"total_size": files.total_bytes}, "weight_map": files.weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    origin = getattr(besides, "folder", besides)
    if isinstance(origin, (str, Path)):
        for path in {path for pattern in _BESIDES for path in Path(origin).glob(pattern)}:
            if path.is_file() and not folder.samefile(origin):
                shutil.copy(path, folder / path.name)


def _config(config: Any, model: Any, source: Any) -> dict[str, Any]:
    """Return the model's config: as given, or the model's or the source's own."""
    if isinstance(config, (str, Path)):
        return json.loads((Path(config) / "config.json").read_text(encoding="utf-8"))
    for found in (config, getattr(model, "config", None), getattr(source, "config", None)):
        if isinstance(found, dict):
            return dict(found)
        if found is not None and hasattr(found, "to_json_string"):
            return json.loads(found.to_json_string(use_diff=False))
    return {}


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    if not shown or find_spec("tqdm") is None:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="export") as bar:
        yield bar.update
