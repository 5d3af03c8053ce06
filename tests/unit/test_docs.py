"""The reference names everything that is public, every name has an example, and examples are true."""

from __future__ import annotations

import ast
import doctest
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fp8sync
import fp8sync_kernels
from fp8sync import errors

ROOT = Path(__file__).resolve().parents[2]
API = "docs/api.md"
PARSER = doctest.DocTestParser()


def documented() -> dict[str, Any]:
    """What the reference lists, by full name; of a module its `__all__`."""
    page = (ROOT / API).read_text(encoding="utf-8")
    found = {}
    for path in re.findall(r"^::: (.+)$", page, re.MULTILINE):
        value = pkgutil.resolve_name(path)
        if isinstance(value, ModuleType):
            found |= {f"{path}.{name}": getattr(value, name) for name in value.__all__}
        else:
            found[path] = value
    return found


def with_examples() -> list[str]:
    """Modules with an example; `tests/pages` has those that draw."""
    found = []
    for package, folder in (("fp8sync", ROOT / "fp8sync"), ("fp8sync_kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                inner = path.relative_to(folder).with_suffix("").parts
                found.append(".".join((package, *inner)).removesuffix(".__init__"))
    return [name for name in found if not name.startswith("fp8sync.pages.")]


@pytest.mark.parametrize("package", [fp8sync, fp8sync_kernels])
def test_every_public_name_is_in_the_reference(package: Any) -> None:
    listed = {path.rpartition(".")[2] for path in documented()}
    assert set(package.__all__) <= listed


def test_every_public_name_has_an_example() -> None:
    page = (ROOT / API).read_text(encoding="utf-8")
    shown = " ".join(example.source for example in PARSER.get_examples(page))
    lacking = []
    for path, value in documented().items():
        own = [value, *vars(value).values()] if isinstance(value, type) else [value]
        if isinstance(value, type) and issubclass(value, errors.Fp8SyncError):
            own = [errors.Fp8SyncError]  # one for all; what to do is in the operating guide
        told = any(">>> " in (getattr(each, "__doc__", None) or "") for each in own)
        if callable(value) and not told and path.rpartition(".")[2] not in shown:
            lacking.append(path)
    assert lacking == []


def test_the_operating_guide_says_what_to_do_about_every_error() -> None:
    guide = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in guide.splitlines() if line.startswith("| `"))
    kinds = {n for n in errors.__all__ if isinstance(getattr(errors, n), type)}
    assert {kind for kind in kinds if f"`{kind}`" not in rows} == set()


@pytest.mark.parametrize("name", with_examples())
def test_examples_of(name: str) -> None:
    module = import_module(name)
    assert doctest.testmod(module).failed == 0
    # Those that need an engine are at least Python.
    for each in doctest.DocTestFinder().find(module):
        for example in each.examples:
            compile(example.source, each.name, "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_examples_of_the_reference() -> None:
    found = doctest.testfile(str(ROOT / API), module_relative=False)
    assert found.attempted > 0
    assert found.failed == 0
