"""Layouts and models from text, as a command line gives them.

tp=8,pp=16,dp=8,ep=64,etp=1        a trainer
tp=8,dp=4,ep,engines=16            an engine
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fp8sync.layouts.engine import EngineLayout
from fp8sync.layouts.models import ModelShape, from_config
from fp8sync.layouts.presets import PRESETS
from fp8sync.layouts.trainer import TrainerLayout
from fp8sync.recipe import Formula

__all__ = ["parse_engine", "parse_model", "parse_settings", "parse_trainer"]

T = TypeVar("T")
N = TypeVar("N", int, float)


def parse_model(text: str) -> ModelShape:
    """Return a preset by name, or the model of a Hugging Face `config.json` by its path.

    Raises:
        ValueError: neither, or no such config, or one that lacks a number.
    """
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return _described(path)
    raise ValueError(f"model {text!r} is neither a config.json nor one of {', '.join(PRESETS)}")


def parse_trainer(text: str) -> TrainerLayout:
    """Return a trainer's layout from `axis=size,...`; see `TrainerLayout` for the names.

    Raises:
        ValueError: an unknown name, or a value of the wrong kind.
    """
    return parse_settings(TrainerLayout, text)


def parse_engine(text: str) -> EngineLayout:
    """Return an engine's layout from `axis=size,...`; `ep` stands for `expert_parallel`.

    Raises:
        ValueError: an unknown name, or a value of the wrong kind.
    """
    return parse_settings(EngineLayout, text, {"ep": "expert_parallel"})


def parse_settings(kind: type[T], text: str, aliases: dict[str, str] | None = None) -> T:
    """Return a dataclass from `name=value,...`; a name alone means true, stages are `5:6:6`.

    Raises:
        ValueError: an unknown name, or a value of the wrong kind.
    """
    known = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    settings: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        name = (aliases or {}).get(name, name)
        if name not in known:
            raise ValueError(
                f"{item!r}: {kind.__name__} has no {name!r}; it has {', '.join(known)}"
            )
        settings[name] = _value(name, value, known[name])
    return kind(**settings)


def _described(path: Path) -> ModelShape:
    text = f"{path}: expected a model's config.json, found"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{text} what is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{text} {type(data).__name__}")  # noqa: TRY004  (told in one line)
    try:
        model = from_config(data)
    except KeyError as error:
        raise ValueError(f"{path}: expected {error}, found none") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, TypeError) as error:
        raise ValueError(f"{text} one that is malformed: {error!r}") from error
    sizes = {f.name: getattr(model, f.name) for f in fields(model) if f.type == "int"}
    faults = [f"{n} {size!r}" for n, size in sizes.items() if type(size) is not int or size < 0]
    if faults:
        raise ValueError(f"{path}: expected integers of at least 0, found {', '.join(faults)}")
    return model


def _value(name: str, text: str, kind: str) -> Any:
    if kind == "bool":
        if text.lower() not in {"", "1", "true", "yes", "0", "false", "no"}:
            raise ValueError(f"{name}={text}: expected true or false")
        return text.lower() in {"", "1", "true", "yes"}
    if kind == "int":
        return _number(name, text, int)
    if kind == "float":
        return _number(name, text, float)
    if kind == "str":
        return text
    if kind == "Formula | None":
        known = [f.value for f in Formula]
        if text not in {"", "none", "bf16", *known}:
            raise ValueError(f"{name}: expected none or one of {', '.join(known)}, found {text!r}")
        return None if text in {"", "none", "bf16"} else Formula(text)
    if kind == "tuple[int, ...]":
        return tuple(_number(name, part, int) for part in text.split(":"))
    raise ValueError(f"{name} cannot be given as text")


def _number(name: str, text: str, kind: type[N]) -> N:
    try:
        return kind(text)
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}: expected {what}, found {text!r}") from None
