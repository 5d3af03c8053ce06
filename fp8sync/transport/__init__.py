"""Moving uint8 buckets between ranks: one small interface, several ways."""

from fp8sync.transport.gloo import GlooGroup, Rendezvous

__all__ = ["GlooGroup", "Rendezvous"]
