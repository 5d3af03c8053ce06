"""Moving uint8 buckets between ranks: one small interface, several ways."""

from fp8sync.transport.gloo import GlooGroup
from fp8sync.transport.invitation import Choice, Invitation
from fp8sync.transport.rendezvous import Rendezvous

__all__ = ["Choice", "GlooGroup", "Invitation", "Rendezvous"]
