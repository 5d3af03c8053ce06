"""Which addresses a rendezvous takes: one of this host, by which others can come."""

from __future__ import annotations

import pytest

from fp8sync.errors import UnsupportedLayout
from fp8sync.transport.rendezvous import bound_address


def test_names_become_the_address_that_is_bound() -> None:
    assert bound_address("127.0.0.1") == "127.0.0.1"
    assert bound_address("localhost") == "127.0.0.1"
    assert bound_address("127.0.0.3") == "127.0.0.3"


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match=r"cannot bind '203\.0\.113\.7'"):
        bound_address("203.0.113.7")


def test_every_interface_at_once_is_refused() -> None:
    """Workers would be told to come to 0.0.0.0, which is their own host."""
    with pytest.raises(UnsupportedLayout, match="one address of this host"):
        bound_address("0.0.0.0")
