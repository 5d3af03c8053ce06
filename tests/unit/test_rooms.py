"""Which package may import which: planning stays pure data, kernels know nothing of fp8sync."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = ["errors.py", "manifest.py", "recipe.py", "wire/__init__.py", "wire/header.py", "plan"]
HEAVY = {"torch", "numpy", "triton", "vllm", "transformers", "megatron", "fp8sync_kernels"}


def modules(*places: str) -> list[str]:
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(ROOT)) for path in found]


def imported(path: str) -> set[str]:
    """Full names of everything that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", modules(*(f"fp8sync/{place}" for place in PURE)))
def test_planning_is_pure_data(path: str) -> None:
    assert not top(imported(path)) & HEAVY
    rooms = {name for name in imported(path) if name.startswith("fp8sync.")}
    pure = tuple(f"fp8sync.{place.removesuffix('.py').replace('/', '.')}" for place in PURE)
    assert all(name.startswith(pure) for name in rooms)


@pytest.mark.parametrize("path", modules("kernels"))
def test_kernels_know_nothing_of_fp8sync(path: str) -> None:
    assert "fp8sync" not in top(imported(path))


@pytest.mark.parametrize("path", modules("fp8sync"))
def test_vllm_stays_in_its_room(path: str) -> None:
    if not path.startswith("fp8sync/engines/vllm/"):
        assert "vllm" not in top(imported(path))


@pytest.mark.parametrize("path", modules("fp8sync", "kernels"))
def test_nothing_here_can_unpickle(path: str) -> None:
    assert not top(imported(path)) & {
        "pickle",
        "cPickle",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
    }
    source = (ROOT / path).read_text(encoding="utf-8")
    banned = {
        "eval",
        "exec",
        "load",
        "broadcast_object_list",
        "all_gather_object",
        "recv_object_list",
    }
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
    }
    if not path.startswith(("kernels/gpu/", "fp8sync/cli")):  # tl.load reads memory, not objects
        assert not calls & banned
