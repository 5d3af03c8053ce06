"""The lasting connection of a trainer and its engines: who leads, who follows, and the story of a refit."""

from fp8sync.link.link import Link
from fp8sync.link.opening import connect

__all__ = ["Link", "connect"]
