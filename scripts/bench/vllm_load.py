"""What refits cost a vLLM that decodes: tokens per second with and without, and memory after many.

    python -m scripts.bench.vllm_load [--layers 48] [--seconds 10] [--every 5] [--soak 200] [--trainer-gpu 1]

An AsyncLLM on GPU 0 (dummy weights with the shapes of Qwen3-30B-A3B, CUDA graphs for decoding) keeps 32
sequences at work; the trainer's random weights lie on GPU 1, or on GPU 0 as well. Kernels are compiled as
batches of new sizes come up, hence the warm-up. Windows without and with a refit every few seconds take turns. Requests in flight are kept; the engine caches no prefixes, so they
need not be recomputed. Then, still decoding, --soak refits follow each other as fast as they can.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import fp8sync
from scripts.bench import qwen30b

SEQUENCES = 32


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window")
    parser.add_argument("--windows", type=int, default=2, help="of each kind")
    parser.add_argument("--warm-up", type=float, default=30.0, help="seconds before the first")
    parser.add_argument("--every", type=float, default=5.0, help="seconds from refit to refit")
    parser.add_argument("--soak", type=int, default=200)
    parser.add_argument("--trainer-gpu", type=int, default=1, help="0: beside the engine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    source = qwen30b.RandomQwen(options.layers, torch.device("cuda", options.trainer_gpu))
    torch.cuda.set_device(options.trainer_gpu)
    with tempfile.TemporaryDirectory() as name:
        qwen30b.write_folder(Path(name), options.layers)
        engine = Busy(Path(name))
        began = time.perf_counter()
        link = fp8sync.connect(source, engine.llm, "blockwise-pow2")
        print(f"connect: {time.perf_counter() - began:.2f} s; {link.transport}", flush=True)
        link.refit("keep")
        engine.begin()
        time.sleep(options.warm_up)
        record = measure(engine, link, options)
        record["soak"] = soak(engine, link, options.soak) if options.soak else None
        record["requests_lost"] = engine.drain()
        link.close()
        engine.llm.shutdown()
    print(f"requests that did not end with all their tokens: {record['requests_lost']}")
    if options.out:
        options.out.write_text(json.dumps(record) + "\n")


def measure(engine: Busy, link: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of both kinds of windows, in turns."""
    rates: dict[str, list[float]] = {"without": [], "with": []}
    pauses: list[float] = []
    for kind in ("without", "with") * options.windows:
        before, began = engine.tokens, time.perf_counter()
        ends = began + options.seconds
        while kind == "with" and time.perf_counter() + options.every / 2 < ends:
            time.sleep(options.every / 2)
            pauses.append(link.refit("keep").pause_s)
            time.sleep(max(min(options.every / 2, ends - time.perf_counter()), 0))
        time.sleep(max(ends - time.perf_counter(), 0))
        rates[kind].append((engine.tokens - before) / (time.perf_counter() - began))
        print(f"{kind} refits: {rates[kind][-1]:.0f} tokens/s", flush=True)
    mean = {kind: statistics.mean(found) for kind, found in rates.items()}
    loss = 1 - mean["with"] / mean["without"]
    print(f"{len(pauses)} refits under load, a refit every {options.every:g} s: ", end="")
    print(f"{loss:+.2%} of tokens lost; pause {statistics.median(pauses):.4f} s")
    return {"tokens_per_s": rates, "loss": loss, "pause_s": pauses}


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
    """An AsyncLLM in an event loop of its own that always has 32 sequences to decode."""

    def __init__(self, folder: Path) -> None:
        self.tokens = self._short = 0
        self._stop = False
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        began = time.perf_counter()
        self.llm = self._run(self._start(folder))
        print(f"engine: {time.perf_counter() - began:.0f} s", flush=True)

    def begin(self) -> None:
        """Submit the first sequences; each one that ends is replaced."""
        self._streams = [
            asyncio.run_coroutine_threadsafe(self._stream(index), self._loop)
            for index in range(SEQUENCES)
        ]

    def drain(self) -> int:
        """Let all sequences end and return how many lacked tokens."""
        self._stop = True
        for stream in self._streams:
            stream.result(120)
        return self._short

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self, folder: Path) -> Any:
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
            enable_prefix_caching=False,
            max_model_len=2048,
            kv_cache_memory_bytes=8 << 30,
        )
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    async def _stream(self, index: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        while not self._stop:
            length = 600 + 20 * index  # so that they do not all end at once
            params = SamplingParams(
                temperature=0.0,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": [(i * 37 + index) % 1000 for i in range(32)]}
            count = 0
            async for output in self.llm.generate(prompt, params, f"r{next(self._ids)}"):
                count += len(output.outputs[0].token_ids)
                self.tokens += len(output.outputs[0].token_ids)
            self._short += count != length


if __name__ == "__main__":
    main()
