"""Serves what `fp8sync verify --engine-at FOLDER` asks for: on another node, or in another environment.

    python -m fp8sync.verify.host FOLDER --address 10.0.0.3

Whoever can write into FOLDER can let this process serve any model; whoever reaches the address can replace
its weights (docs/operating.md, Security).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8sync.doctor import environment
from fp8sync.engines.vllm.probe import fp8_is_supported, placement
from fp8sync.verify.orders import Message, read, write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_POLL_S = 0.2
_END_S = 30.0
_ERROR = re.compile(r"^(?:\(.*?\) )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception): .*)", re.MULTILINE)
"""The last line of a traceback, as vLLM's processes log it."""


class Host:
    """At most one server at a time.

    Args:
        folder: empty, and shared with the trainer.
        address: that the server binds, and by which the trainer reaches it.
        port: the same.
        trainers: ranks on this node, which take the first GPUs.
    """

    def __init__(self, folder: Path, address: str, port: int, trainers: int) -> None:
        self._folder, self._address, self._port = folder, address, port
        self._trainers = trainers
        self._server: subprocess.Popen[bytes] | None = None
        self._log = folder / "engine.log"
        self._about = {
            "where": f"{address}:{port}",
            "fp8": fp8_is_supported(),
            "versions": environment(),
        }

    def run(self) -> None:
        """Follow orders until the process is ended."""
        done = 0
        self._answer(done)
        while True:
            order = read(self._folder, "order.json")
            if order["number"] > done:
                done = order["number"]
                self.stop()
                if order["settings"] is None:
                    self._answer(done)
                else:
                    self._serve(done, order["settings"])
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the server and all its processes."""
        server, self._server = self._server, None
        if server is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def _serve(self, number: int, settings: Message) -> None:
        own = placement(int(settings.get("tensor_parallel_size", 1)), self._trainers)
        # The entry point of `vllm serve`, which wheels for the processor cannot start by that name.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--served-model-name", "verify", "--host", self._address]
        command += ["--port", str(self._port), *_flags(settings)]
        with self._log.open("wb") as log:
            server = self._server = subprocess.Popen(
                command,
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1", **own},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        url = f"http://{self._address}:{self._port}"
        while not _answers(url):
            if server.poll() is not None:
                return self._answer(number, failed=self._reason())
            if read(self._folder, "order.json")["number"] > number:
                return None  # the trainer waits no longer
            time.sleep(_POLL_S)
        return self._answer(number, url=url)

    def _answer(self, number: int, **said: str) -> None:
        write(self._folder, "host.json", {"number": number, **self._about, **said})

    def _reason(self) -> str:
        """The first error that the server's log tells of, else its last line."""
        text = self._log.read_bytes().decode(errors="replace")
        errors, lines = _ERROR.findall(text), text.splitlines()
        return errors[0] if errors else (lines or ["it said nothing"])[-1]


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif isinstance(value, dict):
            flags += [flag, json.dumps(value)]
        elif value is not False:
            flags += [flag, str(value)]
    return flags


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="shared with the trainer")
    parser.add_argument("--address", default="127.0.0.1", help="that the trainer reaches")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--trainers-here", type=int, default=0, help="trainer ranks on this node")
    options = parser.parse_args(arguments)
    if (options.folder / "order.json").exists():
        parser.error(f"{options.folder} was used before: its orders would be followed again")
    host = Host(options.folder, options.address, options.port, options.trainers_here)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        host.run()
    finally:
        host.stop()


if __name__ == "__main__":
    main()
