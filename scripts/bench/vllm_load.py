"""What refits cost a vLLM that decodes: tokens per second with and without, and memory after many.

    python -m scripts.bench.vllm_load [--layers 48] [--pairs 10] [--soak 200] [--trainer-gpu 1]
    python -m scripts.bench.vllm_load --no-prefix-caching

An AsyncLLM on GPU 0 (dummy weights with the shapes of Qwen3-30B-A3B, CUDA graphs for decoding) keeps 32
sequences at work from the first to the last window; none ends, so no window has a prefill. The trainer's
random weights lie on GPU 1, or on GPU 0 as well. Windows take turns: one without a refit, one with --refits, one
every --every seconds, and so on, and one without at the end. Each with refits is compared with the mean of its two
neighbours, so what drifts steadily (sequences grow) falls out. Requests in flight are kept (--in-flight), in an
engine that caches prefixes, as vLLM's default is. Then, still decoding, --soak refits follow each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fp8sync
from scripts.bench import qwen30b

SEQUENCES = 32
POSITIONS = 16384
"""Longer than any sequence becomes."""
_STEADY = 100


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--every", type=float, default=5.0, help="seconds from refit to refit")
    parser.add_argument("--refits", type=int, default=2, help="of a window")
    parser.add_argument("--pairs", type=int, default=8, help="windows with refits")
    parser.add_argument("--in-flight", default="keep", choices=["keep", "recompute"])
    parser.add_argument("--warm-up", type=float, default=15.0, help="seconds before the first")
    parser.add_argument("--first-refits", type=int, default=0, help="before that, as many refits")
    parser.add_argument("--soak", type=int, default=200)
    parser.add_argument("--trainer-gpu", type=int, default=1, help="0: beside the engine")
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--transports", nargs="+", default=["auto"], help="one after the other")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    source = qwen30b.RandomQwen(options.layers, torch.device("cuda", options.trainer_gpu))
    torch.cuda.set_device(options.trainer_gpu)
    with tempfile.TemporaryDirectory() as name:
        qwen30b.write_folder(Path(name), options.layers, POSITIONS)
        engine = Busy(Path(name), options.prefix_caching)
        rows = []
        for way in options.transports:
            with connected(source, engine, way) as link:
                link.refit(options.in_flight)
                if not rows:
                    engine.begin()
                rows.append(measure_link(engine, link, options))
        lost = engine.end()
        engine.llm.shutdown()
    print(f"requests that ended before they were told to: {lost}")
    if options.out:
        lines = [json.dumps({**row, "requests_lost": lost}) + "\n" for row in rows]
        options.out.write_text("".join(lines))


def connected(source: Any, engine: Busy, way: str) -> fp8sync.Link:
    """A link by that transport; says how long it took to make."""
    began = time.perf_counter()
    link = fp8sync.connect(source, engine.llm, "blockwise-pow2", transport=way)
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in link.connect_s.items())
    print(f"connect: {time.perf_counter() - began:.2f} s, {stages}; {link.transport}", flush=True)
    return link


def measure_link(engine: Busy, link: fp8sync.Link, options: argparse.Namespace) -> dict[str, Any]:
    """All of one transport."""
    for _ in range(options.first_refits):
        link.refit(options.in_flight)
        time.sleep(options.every / 2)
    time.sleep(options.warm_up)
    record = measure(engine, link, options)
    record |= {"prefix_caching": options.prefix_caching, "in_flight": options.in_flight}
    record |= {"every_s": options.every, "refits_of_a_window": options.refits}
    record |= {"transport": link.transport, "connect_stages": dict(link.connect_s)}
    record["soak"] = soak(engine, link, options.soak) if options.soak else None
    return record


def measure(engine: Busy, link: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of windows without and with refits, in turns."""
    edges = [time.perf_counter()]
    refits = []
    for number in range(2 * options.pairs + 1):
        for place in range(options.refits if number % 2 else 0):
            sleep_until(edges[-1] + options.every * (place + 0.5))
            began = time.perf_counter()
            report = link.refit(options.in_flight)
            own = {"pause": report.pause_s, "host": report.host_s, "at": began}
            refits.append({**report.seconds, **own})
        sleep_until(edges[-1] + options.every * options.refits)
        edges.append(time.perf_counter())
    time.sleep(0.2)  # the tokens of the last steps
    rates = engine.rates(edges)
    without, with_one = rates[::2], rates[1::2]
    losses = [
        1 - rate / statistics.mean(pair)
        for rate, *pair in zip(with_one, without, without[1:], strict=False)
    ]
    print("tokens/s without: " + " ".join(f"{rate:.0f}" for rate in without))
    print("tokens/s with refits: " + " ".join(f"{rate:.0f}" for rate in with_one))
    error = statistics.stdev(losses) / len(losses) ** 0.5
    print(
        f"lost to a refit every {options.every:g} s: median {statistics.median(losses):.2%}, mean "
        f"{statistics.mean(losses):.2%} +- {error:.2%} (standard error), each "
        + " ".join(f"{loss:.2%}" for loss in losses)
    )
    for key in ("total", "quantize", "verify", "drain", "prepare", "commit", "pause", "host"):
        found = [refit[key] for refit in refits]
        print(f"{key}: median {statistics.median(found):.4f} s, most {max(found):.4f} s")
    gaps = [engine.longest_gap(refit["at"], refit["at"] + 1) for refit in refits]
    print(f"longest time between two tokens around a refit: median {statistics.median(gaps):.4f} s")
    found = {"without": without, "with": with_one}
    return {"tokens_per_s": found, "losses": losses, "refits": refits, "gaps_s": gaps}


def sleep_until(then: float) -> None:
    """Sleep to a point of `perf_counter`."""
    time.sleep(max(then - time.perf_counter(), 0))


def soak(engine: Busy, link: Any, count: int) -> dict[str, Any]:
    """Many refits while decoding: seconds of each, and what memory they leave behind."""
    used: dict[int, list[int]] = {}
    seconds = []
    tokens = engine.tokens
    for number in range(1, count + 1):
        began = time.perf_counter()
        link.refit("keep")
        seconds.append(time.perf_counter() - began)
        if number in {20, count}:
            used[number] = memory()
    grown = [b - a for a, b in zip(used[20], used[count], strict=True)]
    print(f"soak: {count} refits, median {statistics.median(seconds):.4f} s, ", end="")
    print(f"{engine.tokens - tokens} tokens meanwhile")
    names = (*(f"GPU {n}" for n in range(torch.cuda.device_count())), "trainer host, peak")
    for name, grew in zip(names, grown, strict=True):
        print(f"soak: {name}: {grew / 2**20:+.1f} MiB from refit 20 to refit {count}")
    return {"seconds": seconds, "grown_bytes": grown}


def memory() -> list[int]:
    """Bytes in use on each GPU, by all processes, and this process's peak on the host."""
    used = []
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        used.append(total - free)
    return [*used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10]


class Busy:
    """An AsyncLLM in an event loop of its own that decodes 32 sequences without end."""

    def __init__(self, folder: Path, prefix_caching: bool) -> None:
        self.tokens = self._lost = 0
        self._stop = False
        self._times: list[float] = []
        self._counts: list[int] = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        began = time.perf_counter()
        self.llm = self._run(self._start(folder, prefix_caching))
        print(f"engine: {time.perf_counter() - began:.0f} s", flush=True)

    def begin(self) -> None:
        """Submit all sequences; returns once they have come some way, as kernels are compiled first."""
        self._streams = [
            asyncio.run_coroutine_threadsafe(self._stream(index), self._loop)
            for index in range(SEQUENCES)
        ]
        while len(self._times) < _STEADY:
            time.sleep(0.1)

    def end(self) -> int:
        """Abort all sequences and return how many had ended before."""
        self._stop = True
        for stream in self._streams:
            stream.result(120)
        return self._lost

    def rates(self, edges: list[float]) -> list[float]:
        """Tokens per second between points of time; between two steps tokens count in parts."""
        counts = np.interp(edges, self._times, self._counts)
        return [float(rate) for rate in np.diff(counts) / np.diff(edges)]

    def longest_gap(self, began: float, ended: float) -> float:
        """Seconds between two tokens of one sequence."""
        times = np.array(self._times)
        return float(np.diff(times[(times > began) & (times < ended)]).max())

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self, folder: Path, prefix_caching: bool) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        graphs = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [SEQUENCES],
        }
        settings = qwen30b.options(
            folder,
            "fp8sync",
            enforce_eager=False,
            compilation_config=graphs,
            enable_prefix_caching=prefix_caching,
            max_model_len=POSITIONS,
            kv_cache_memory_bytes=50 << 30,
        )
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    async def _stream(self, index: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {"prompt_token_ids": [(i * 37 + index) % 1000 for i in range(32)]}
        params = SamplingParams(
            temperature=0.0,
            max_tokens=POSITIONS - 32,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        async for output in self.llm.generate(prompt, params, f"r{index}"):
            self.tokens += len(output.outputs[0].token_ids)
            if index == 0:
                self._times.append(time.perf_counter())
                self._counts.append(self.tokens)
            if self._stop:
                await self.llm.abort(f"r{index}")
                return
        self._lost += 1


if __name__ == "__main__":
    main()
