"""A real vLLM server, refitted over HTTP while it streams; and one whose engine is killed."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from fp8sync.engines.vllm import Server
from tests import ports
from tests.engines import serving, world
from tests.engines.sabotage import SABOTAGE, slowed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]  # its workers' extension is a test's


class Served:
    """vLLM's own server in a process of its own, on a free port of the loopback."""

    def __init__(self, folder: Path, log: Path | None = None, **changes: Any) -> None:
        self._log = log
        self._threads = ThreadPoolExecutor(serving.LANES * len(serving.PROMPTS))
        self.port = ports.free()
        self.url = f"http://127.0.0.1:{self.port}"
        place = {"host": "127.0.0.1", "port": self.port, "served_model_name": "tiny"}
        options = serving.settings(folder, **place, **SABOTAGE, **changes)
        options.pop("disable_log_stats")
        self._options = options
        self.start()

    def start(self) -> None:
        """Start it, or start it anew after `close`."""
        # The entry point of `vllm serve`, which wheels for the processor cannot start by that name.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in self._options.items():
            flag = "--" + name.replace("_", "-")
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            command += [flag] if value is True else [flag, text]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with nullcontext() if self._log is None else self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=log
            )
        self._wait()

    def _wait(self) -> None:
        ends = time.monotonic() + 400
        while time.monotonic() < ends:
            assert self.process.poll() is None, "the server ended while it started"
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                with closing(connection):
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        return
            time.sleep(0.5)
        raise TimeoutError("the server did not start")

    def complete(self, note: Callable[[dict[str, Any]], None], **request: Any) -> None:
        """One completion; `note` sees every chunk."""
        body = {"model": "tiny", "temperature": 0.0, "return_token_ids": True, **request}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            if not body.get("stream"):
                note(json.loads(answer.read())["choices"][0])
                return
            for line in answer:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    note(json.loads(data)["choices"][0])

    async def stream(self, prompt: list[int], tokens: int) -> serving.Sample:
        found: list[int] = []
        reasons: list[str] = []

        def note(choice: dict[str, Any]) -> None:
            found.extend(choice["token_ids"] or [])
            if choice["finish_reason"]:
                reasons.append(choice["finish_reason"])

        request = partial(
            self.complete, note, prompt=prompt, max_tokens=tokens, ignore_eos=True, stream=True
        )
        await asyncio.get_running_loop().run_in_executor(self._threads, request)
        # A stream that is aborted before its first token ends without a chunk.
        return found, reasons[-1] if found or reasons else "abort"

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        found: list[int] = []
        self.complete(
            lambda choice: found.extend(choice["token_ids"]),
            prompt=prompt,
            max_tokens=tokens,
            ignore_eos=True,
        )
        return found

    def logprobs(self) -> torch.Tensor:
        rows: list[torch.Tensor] = []

        def note(choice: dict[str, Any]) -> None:
            for row in choice["prompt_logprobs"][1:]:
                values = [row[str(token)]["logprob"] for token in range(256)]
                rows.append(torch.tensor(values, dtype=torch.float64))

        self.complete(note, prompt=world.PROMPT, max_tokens=1, prompt_logprobs=256)
        return torch.stack(rows)

    def count(self, name: str) -> int:
        """One of vLLM's metrics."""
        text = Server(self.url)._ask("GET", "/metrics")[1].decode()
        (line,) = (m for m in text.splitlines() if m.startswith(f"vllm:num_{name}{{"))
        return int(float(line.rsplit(" ", 1)[1]))

    def slow(self) -> AbstractContextManager[None]:
        post = Server(self.url)._post
        return slowed(lambda name, *args: post("/collective_rpc", {"method": name, "args": args}))

    def kill_engine(self) -> None:
        """End the engine's process, which vLLM starts as a child of the server's."""
        children = subprocess.check_output(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)]
        )
        engines = [
            line.split()[0] for line in children.decode().splitlines() if "EngineCore" in line
        ]
        os.kill(int(engines[0]), signal.SIGKILL)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL if world.END_S == 0.0 else signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)


@pytest.fixture(scope="module")
def fresh(models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Log-probabilities of a fresh engine of the second model."""
    folder = world.write_checkpoint(models[1], tmp_path_factory.mktemp("fresh"), "pow2")
    llm = world.start_engine(folder)
    found = world.logprobs(llm)
    del llm
    world.forget_engines()
    return found


@pytest.fixture(scope="module")
def served(
    fresh: torch.Tensor, models: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    served = Served(world.write_config(models[0], tmp_path_factory.mktemp("served")))
    yield served
    served.close()


@pytest.mark.parametrize("mode", ["wait", "keep", "recompute", "abort"])
def test_requests_in_flight(
    served: Served, models: list[torch.nn.Module], fresh: torch.Tensor, mode: str
) -> None:
    recipe = world.recipe("blockwise-pow2")
    last = fp8sync.refit(models[0], served.url, recipe).weight_version
    old = serving.greedy(served.greedy)
    link = fp8sync.connect(models[1], served.url, recipe)
    before = served.count("preemptions_total")
    found, report = asyncio.run(
        serving.refit_under_load(served.stream, lambda: link.refit(in_flight=mode))
    )
    assert (served.count("preemptions_total") > before) == (mode == "recompute")
    # The API rounds nothing: JSON holds the very doubles that vLLM computed.
    assert (served.logprobs() - fresh).abs().max().item() == 0.0
    new = serving.greedy(served.greedy)
    serving.judge(mode, found, old, new, served.greedy)
    Server(served.url).reset_caches("wait", stale=False)
    assert new == serving.greedy(served.greedy)
    assert report.weight_version == (None if last is None else str(int(last) + 1))
    link.close()


def own_address() -> str:
    """An address of this machine that is not the one everything binds by default."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("198.51.100.1", 9))  # sends nothing
        return probe.getsockname()[0]
    return "127.0.0.2"


def test_workers_join_at_the_address_that_is_given(
    served: Served, models: list[torch.nn.Module], fresh: torch.Tensor
) -> None:
    recipe, address = world.recipe("blockwise-pow2"), own_address()
    with fp8sync.connect(models[1], served.url, recipe, host=address, transport="gloo") as link:
        assert link.refit().version == 1
        assert link.audit().equal
    assert (served.logprobs() - fresh).abs().max().item() == 0.0
    with pytest.raises(fp8sync.UnsupportedLayout, match="one address of this host"):
        fp8sync.connect(models[1], served.url, recipe, host="0.0.0.0")


def test_a_paused_server_stays_paused(
    served: Served, models: list[torch.nn.Module], fresh: torch.Tensor
) -> None:
    server = Server(served.url)
    assert (server.workers, server.replicas) == (1, 1)
    server.pause("keep", once=False)
    fp8sync.refit(models[1], served.url, world.recipe("blockwise-pow2"))
    assert server.paused()
    server.resume()
    assert not server.paused()
    assert (served.logprobs() - fresh).abs().max().item() == 0.0


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_requests_of_a_paused_server_are_not_waited_for(
    served: Served,
    models: list[torch.nn.Module],
    fresh: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    """It may let them end (`wait`), or hold them (`keep`): in neither case are they of two versions.

    They begin, and it is paused, when all bytes are there, so that they have not ended when it is looked at.
    """
    recipe, server = world.recipe("blockwise-pow2"), Server(served.url)
    fp8sync.refit(models[0], served.url, recipe)
    prompt, began = serving.PROMPTS[0], threading.Event()
    old, found = served.greedy(prompt, 400), list[int]()

    def note(choice: dict[str, Any]) -> None:
        found.extend(choice["token_ids"] or [])
        began.set()

    ask: Any = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        fp8sync.connect(models[1], served.url, recipe) as link,
        ThreadPoolExecutor(2) as pool,
    ):
        update, calls = Server.update, list[Any]()

        def paused_meanwhile(handle: Server, version: int, **options: bool) -> None:
            update(handle, version, **options)
            calls.append(pool.submit(served.complete, note, **ask))
            assert began.wait(60)
            calls.append(pool.submit(server._post, "/pause", mode=mode))
            while not server.paused():
                time.sleep(0.01)

        with served.slow(), monkeypatch.context() as patch:
            patch.setattr(Server, "update", paused_meanwhile)
            with pytest.raises(fp8sync.Fp8SyncError, match="in flight that have begun, found 1"):
                link.refit("wait")
        stream, pause = calls
        pause.result(60)
        if mode == "wait":
            stream.result(60)
        assert stream.done() is (mode == "wait")
        assert server.paused()
        server.resume()
        stream.result(60)
        assert found == old
        server.pause("keep", once=False)
        link.refit("wait")  # nothing is in flight any more
        assert server.paused()
        server.resume()
    assert (served.logprobs() - fresh).abs().max().item() == 0.0


def test_server_elsewhere_needs_an_address(served: Served) -> None:
    server = Server(served.url)
    server.check_host("127.0.0.1")
    server._parts = server._parts._replace(netloc="203.0.113.7:8000")
    with pytest.raises(fp8sync.UnsupportedLayout, match=r"pass connect\(host="):
        server.check_host("127.0.0.1")


def test_nobody_there() -> None:
    with pytest.raises(fp8sync.EngineLost, match="is gone during /get_world_size"):
        Server(f"http://127.0.0.1:{ports.free()}")


def test_engine_killed_behind_its_server(
    served: Served, models: list[torch.nn.Module], fresh: torch.Tensor
) -> None:
    """Named within the timeout; the server that takes its place is healed by the next refit."""
    link = fp8sync.connect(models[1], served.url, world.recipe("blockwise-pow2"), timeout_s=60.0)
    link.refit()
    served.kill_engine()
    began = time.monotonic()
    with pytest.raises(fp8sync.EngineLost, match=r"died during|is gone"):
        link.refit()
    assert time.monotonic() - began < 60.0
    served.close()
    served.start()
    assert (served.logprobs() - fresh).abs().max().item() > 0.0
    link.refit()
    assert (served.logprobs() - fresh).abs().max().item() == 0.0
    link.close()
