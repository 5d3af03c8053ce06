"""Servers that are no vLLM: what they answer is an error of fp8sync, within the limit."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest
import torch

from fp8sync.engines.vllm import Server, as_engine
from fp8sync.errors import Fp8SyncError, TransferTimeout, UnsupportedLayout
from fp8sync.link import connect

if TYPE_CHECKING:
    from collections.abc import Iterator


class Answering(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<html>welcome", "a JSON object, found <html>welcome"),
        (b"[1]", r"a JSON object, found \[1\]"),
        (b"\xff", "a JSON object, found \ufffd"),
        (b"", "its world_size, found "),
        (b'{"world_size": "many"}', "its world_size, found "),
    ],
)
def test_what_is_not_vllms(
    body: bytes, expected: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answering, "body", body)
    with pytest.raises(Fp8SyncError, match=f"/get_world_size answered 200: expected {expected}"):
        Server(url)


def test_servers_behind_one_gateway(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path tells them apart, and errors name it."""
    monkeypatch.setattr(Answering, "body", b'{"world_size": 1}')
    first, second = Server(f"{url}/rollout-0"), Server(f"{url}/rollout-1/")
    assert [first.url, second.url] == [f"{url}/rollout-0", f"{url}/rollout-1"]
    as_engine([first, second])
    with pytest.raises(UnsupportedLayout, match="listed twice"):
        as_engine([first, Server(f"{url}/rollout-0/")])
    monkeypatch.setattr(Answering, "body", b"[1]")
    with pytest.raises(Fp8SyncError, match="/rollout-1/is_paused answered 200: expected a JSON"):
        second.paused()


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b""])
def test_an_answer_that_does_not_end(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte comes in time."""
    monkeypatch.setattr("fp8sync.engines.vllm.server._ASK_S", 0.3)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with listener.accept()[0] as taken, suppress(OSError):
                taken.sendall(sent)
                for _ in range(400):
                    if not done.wait(0.02):
                        taken.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        text = "did not answer /get_world_size within 0.3 s"
        with pytest.raises(TransferTimeout, match=text):
            Server(f"http://127.0.0.1:{listener.getsockname()[1]}")
        done.set()
        thread.join()


class Misconfigured(Answering):
    body = b'{"world_size": 1}'

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"Weight transfer not configured")


def test_what_a_server_answers_is_said_when_connecting() -> None:
    """Not that the link was given up for it, which would be taken for the loss of an engine."""
    with HTTPServer(("127.0.0.1", 0), Misconfigured) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with pytest.raises(Fp8SyncError) as raised:
                connect(torch.nn.Linear(8, 8), f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert type(raised.value) is Fp8SyncError
    text = "/init_weight_transfer_engine answered 500: Weight transfer not configured"
    assert str(raised.value).endswith(text)
