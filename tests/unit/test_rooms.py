"""Which package may import which: planning stays pure data, kernels know nothing of fp8sync."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).resolve().parents[2]
VALUES = {"errors.py", "recipe.py", "manifest.py", "report.py"}
PURE = ["errors.py", "manifest.py", "recipe.py", "wire/__init__.py", "wire/header.py", "plan"]
HEAVY = {"torch", "numpy", "triton", "vllm", "transformers", "megatron", "fp8sync_kernels"}


def modules(*places: str) -> list[str]:
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(ROOT)) for path in found]


def imported(path: str, nodes: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk) -> set[str]:
    """Full names of everything that a module imports, anywhere in it."""
    names = set()
    for node in nodes(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
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


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement and expression but what only annotations need."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from at_run_time(node)


def room_of(name: str) -> str:
    """The room that a module is in, as the architecture calls it; empty outside of the packages."""
    top, *inner = name.split(".")
    if top != "fp8sync" or not inner:
        return "kernels/" if top == "fp8sync_kernels" else ""
    if inner[0] == "engines":
        return "engines/vllm/"
    return f"{inner[0]}.py" if (ROOT / f"fp8sync/{inner[0]}.py").exists() else f"{inner[0]}/"


def imports_by_room() -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for path in modules("fp8sync", "kernels"):
        name = path.removesuffix(".py").replace("/", ".").replace("kernels.", "fp8sync_kernels.")
        if not (room := room_of(name)) or path == "fp8sync/__init__.py":
            continue
        found = {room_of(name) for name in imported(path, at_run_time)}
        rooms[room] = rooms.get(room, set()) | found
    return {room: found - VALUES - {room, ""} for room, found in rooms.items()}


def test_the_architecture_tells_what_imports_what() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Rooms")[2].partition("\n## ")[0]
    found = imports_by_room()
    wrong = []
    listed: set[str] = set()
    for line in table.splitlines():
        if not line.startswith("| `"):
            continue
        rooms, _, imports = (
            set(re.findall(r"`([a-z_/]+(?:\.py)?)`", cell)) for cell in cells(line)
        )
        rooms &= found.keys()
        listed |= rooms
        actual = set().union(*(found[room] for room in rooms))
        if actual != imports:
            wrong.append(f"{sorted(rooms)}: imports {sorted(actual)}, listed {sorted(imports)}")
    assert wrong == []
    assert listed == found.keys()


def cells(row: str) -> list[str]:
    return row.strip().strip("|").split("|")
