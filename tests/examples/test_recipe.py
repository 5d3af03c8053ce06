"""The recipe with one option changed: a real server ends with the trainer's last weights each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engines import world
from tests.engines.test_megatron import PYTHON as MEGATRON_PYTHON
from tests.engines.test_server import Served

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
RANKS = {"hf": 1, "fsdp2": 2, "megatron": 2}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipe")
    model = world.tiny_model("dense", 1)
    model.save_pretrained(made / "hf")
    world.write_config(model, made / "engine")
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    served = Served(folder / "engine", max_model_len=128)
    yield served
    served.close()


@pytest.mark.parametrize("trainer", RANKS)
def test_the_engine_has_the_last_step(served: Served, folder: Path, trainer: str) -> None:
    saved = folder / f"{trainer}-saved"
    options = ["--trainer", trainer, "--model", str(folder / "hf"), "--engine", served.url]
    options += [
        "--recipe",
        "blockwise-pow2",
        "--save",
        str(saved),
        *([] if world.FP8 else ["--dequantize"]),
    ]
    ranks = [*TORCHRUN, f"--nproc_per_node={RANKS[trainer]}"] if RANKS[trainer] > 1 else []
    command = [sys.executable, *ranks, "-m", "scripts.examples.recipe", *options]
    if trainer == "megatron":
        if not MEGATRON_PYTHON.exists():
            pytest.skip("needs Megatron's environment")
        on_processor = ["-m", "tests.megatron.training", "scripts.examples.recipe"]
        command = [str(MEGATRON_PYTHON), "-W", "ignore", *ranks, *on_processor, *options]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "step 2: loss " in ran.stdout
    fresh = world.start_engine(saved)
    assert (served.logprobs() - world.logprobs(fresh)).abs().max().item() == 0.0
    world.stop_engine(fresh)
