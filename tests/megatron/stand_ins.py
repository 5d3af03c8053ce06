"""Modules in the place of packages that want a GPU: what is asked of them is a class, never called."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch

__all__ = ["stand_in"]


def stand_in(name: str, version: str = "0") -> types.ModuleType:
    """Return a module of which every attribute is a `torch.nn.Module` class of that name."""
    module = types.ModuleType(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__version__ = version

    def anything(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        child = f"{name}.{attribute}"
        return sys.modules.get(child) or type(attribute, (torch.nn.Module,), {"__module__": name})

    module.__getattr__ = anything
    return module
