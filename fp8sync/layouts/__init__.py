"""Layouts on paper: a model's shapes, a trainer's and an engine's way to spread them, as manifests.

For planning ahead and for tests. In a refit the trainer's manifest comes from its own metadata and the
engine's from its own loaders.
"""

from fp8sync.layouts.engine import EngineLayout
from fp8sync.layouts.models import ModelShape, Role, TensorShape, from_config
from fp8sync.layouts.pieces import Layout, Piece, geometry, join, manifest
from fp8sync.layouts.presets import PRESETS
from fp8sync.layouts.trainer import TrainerLayout

__all__ = [
    "PRESETS",
    "EngineLayout",
    "Layout",
    "ModelShape",
    "Piece",
    "Role",
    "TensorShape",
    "TrainerLayout",
    "from_config",
    "geometry",
    "join",
    "manifest",
]
