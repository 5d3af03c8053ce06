"""Megatron-Core trainers of several ranks, in an environment of their own, refit real servers over HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fp8sync.audit import AuditReport
from tests.engines import world
from tests.engines.test_server import Served

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("FP8SYNC_MEGATRON_PYTHON", ROOT / ".venv-megatron/bin/python"))
SHAPE = {"intermediate_size": 512}
TP2 = {"tensor_parallel_size": 2}
CASES = {  # model, trainer ranks, the engine's options, the trainer's layouts
    "dense": ("dense", 2, {}, ["tp=2", "pp=2", "tp=2,own=1", "tp=2,master=1", "pp=2,saved=1"]),
    "dense into TP2": ("dense", 2, TP2, ["tp=2", "pp=2"]),
    "moe": ("moe", 2, {}, ["ep=2", "tp=2,ep=2"]),
    "moe on four ranks": ("moe", 4, {}, ["tp=2,pp=2,ep=2", "tp=2,ep=2,master=1"]),
    "Mamba": ("hybrid", 2, {}, ["tp=2", "tp=2,saved=1"]),
}
EXPORTED = {("dense", "tp=2,own=1"): 2, ("Mamba", "tp=2"): 11}
"""All-gathers of the bridge's own export: attention's projections of two layers; of Mamba's, five parts of the
projection and three of the convolution's weight and bias each."""
HYBRID = {"layers_block_type": ["mamba", "attention", "mlp"]}  # vLLM's for the processor
IN_PROJ = "model.layers.0.mixer.in_proj.weight"
"""Its parts do not end with blocks: no engine can hold it in blockwise FP8."""

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="needs Megatron's environment")


@pytest.fixture(scope="module", params=CASES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """By trainer layout: (a fresh engine's log-probabilities, the refitted server's, what ranks said)."""
    kind, ranks, options, layouts = CASES[request.param]
    folder = tmp_path_factory.mktemp("megatron")
    patch = pytest.MonkeyPatch()
    workers = range(1 if not options else 2)
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(number) for number in workers))
    expected: dict[str, torch.Tensor] = {}
    for seed, layout in enumerate(layouts):
        model = world.tiny_model(kind, seed, **SHAPE, **(HYBRID if kind == "hybrid" else {}))
        save(model, folder / layout / "hf")
        fresh = world.write_checkpoint(model, folder / layout / "fresh", "pow2", plain=[IN_PROJ])
        expected[layout] = logprobs_of(fresh, options)
    config = world.write_config(model, folder / "served", plain=[IN_PROJ])
    served = Served(config, max_model_len=128, **options)
    try:
        yield refitted(served, folder, ranks, layouts, expected)
    finally:
        served.close()
        patch.undo()


def save(model: torch.nn.Module, folder: Path) -> None:
    """As transformers saves it; sorts of layers by the words of the older one that Megatron-Bridge wants."""
    model.save_pretrained(folder)
    if model.config.model_type != "nemotron_h":
        return
    told = (folder / "config.json").read_text()
    for new, old in (("linear_attention", "mamba"), ("full_attention", "attention")):
        told = told.replace(f'"{new}"', f'"{old}"')
    (folder / "config.json").write_text(told)


def logprobs_of(folder: Path, options: dict[str, Any]) -> torch.Tensor:
    llm = world.start_engine(folder, multiprocess=True, **options)
    found = world.logprobs(llm)
    world.stop_engine(llm)
    return found


def refitted(
    served: Served,
    folder: Path,
    ranks: int,
    layouts: list[str],
    expected: dict[str, torch.Tensor],
) -> dict[str, Any]:
    recipe = world.recipe("blockwise-pow2")
    recipe = json.dumps(replace(recipe, unquantized=(*recipe.unquantized, "*.in_proj")).to_json())
    command = [str(PYTHON), "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", "tests.engines.megatron_trainer"]
    trainer = subprocess.Popen(
        [*command, served.url, str(folder), recipe, *layouts],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = {}
    try:
        for layout in layouts:
            told = [folder / layout / f"{rank}.json" for rank in range(ranks)]
            wait_for(told, trainer)
            said = [json.loads(path.read_text()) for path in told]
            found[layout] = expected[layout], served.logprobs(), said
            (folder / layout / "seen").touch()
        assert trainer.wait(60) == 0
    finally:
        trainer.kill()
    return found


def wait_for(paths: list[Path], trainer: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 240
    while not all(path.exists() and path.read_text().endswith("}") for path in paths):
        assert trainer.poll() is None, "the trainer ended before it had refitted the server"
        assert time.monotonic() < ends, "the trainer has not refitted the server in time"
        time.sleep(0.2)


def test_the_server_is_as_a_fresh_load(trained: dict[str, Any]) -> None:
    for expected, found, ranks in trained.values():
        assert (expected - found).abs().max().item() == 0.0
        assert {told["version"] for told in ranks} == {2}
        assert min(told["bytes"] for told in ranks) > 0  # each rank sends a share of its own


def test_no_collective_touches_a_weight(
    trained: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    for layout, (_, _, ranks) in trained.items():
        if exported := EXPORTED.get((request.node.callspec.params["trained"], layout)):
            assert [told["collectives"] for told in ranks] == [{"all_gather": exported}] * len(
                ranks
            )
            continue
        assert [told["collectives"] for told in ranks] == [{}] * len(ranks)
        assert [told["weights_in_collectives"] for told in ranks] == [[]] * len(ranks)


def test_an_audit_is_of_all_ranks(trained: dict[str, Any]) -> None:
    """Every rank is told the same, of every tensor; a change on the last rank is found where it is."""
    for layout, (_, _, ranks) in trained.items():
        if "saved" in layout:  # nothing of it changes
            continue
        before, after = (AuditReport.from_json(each) for each in ranks[0]["audits"])
        assert all(told["audits"] == ranks[0]["audits"] for told in ranks)
        assert before.equal
        # What the bridge exports is loaded by the engine itself: of Mamba's layer, which is the first.
        assert all(".layers.0.mixer." in name for name in before.unread)
        assert {d.tensor for d in after.differences} < {e.tensor for e in before.entries}
        assert after.differences[0].coordinate is not None


def test_a_nan_on_one_rank_is_refused(trained: dict[str, Any]) -> None:
    """In a BF16 parameter or in an FP32 master: all ranks are told, and what is seen next are the old weights."""
    for layout, (_, _, ranks) in trained.items():
        if "saved" in layout:  # nothing of it changes
            continue
        kind, fault = ranks[0]["refused"]
        assert all(told["refused"] == [kind, fault] for told in ranks)
        assert kind == "NonFiniteWeight"
        rank = len(ranks) - 1
        where = rf"layers\.\d\.\S+\.down_proj\.weight \(trainer rank {rank}\)"
        assert re.search(f"{where}: expected finite values, found 1 NaN or Inf$", fault)
