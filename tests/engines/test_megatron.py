"""Megatron-Core trainers of several ranks, in an environment of their own, refit real servers over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import time
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
    "dense": ("dense", 2, {}, ["tp=2", "pp=2", "tp=2,own=1", "tp=2,master=1"]),
    "dense into TP2": ("dense", 2, TP2, ["tp=2", "pp=2"]),
    "moe": ("moe", 2, {}, ["ep=2", "tp=2,ep=2"]),
    "moe on four ranks": ("moe", 4, {}, ["tp=2,pp=2,ep=2"]),
}

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="needs Megatron's environment"),
    pytest.mark.timeout(600),
]


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
        model = world.tiny_model(kind, seed, **SHAPE)
        model.save_pretrained(folder / layout / "hf")
        fresh = world.write_checkpoint(model, folder / layout / "fresh", "pow2")
        expected[layout] = logprobs_of(fresh, options)
    config = world.write_config(model, folder / "served")
    served = Served(config, max_model_len=128, **options)
    try:
        yield refitted(served, folder, ranks, layouts, expected)
    finally:
        served.close()
        patch.undo()


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
    recipe = json.dumps(world.recipe("blockwise-pow2").to_json())
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


def test_no_collective_touches_a_weight(trained: dict[str, Any]) -> None:
    for layout, (_, _, ranks) in trained.items():
        if "own" in layout:  # attention's projections, two layers of them, by the bridge's export
            assert [told["collectives"] for told in ranks] == [{"all_gather": 2}] * len(ranks)
            continue
        assert [told["collectives"] for told in ranks] == [{}] * len(ranks)
        assert [told["weights_in_collectives"] for told in ranks] == [[]] * len(ranks)


def test_an_audit_is_of_all_ranks(trained: dict[str, Any]) -> None:
    """Every rank is told the same, of every tensor; a change on the last rank is found where it is."""
    for _, _, ranks in trained.values():
        before, after = (AuditReport.from_json(each) for each in ranks[0]["audits"])
        assert all(told["audits"] == ranks[0]["audits"] for told in ranks)
        assert before.equal
        assert not before.unread
        assert {d.tensor for d in after.differences} < {e.tensor for e in before.entries}
        assert after.differences[0].coordinate is not None
