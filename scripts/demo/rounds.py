"""One model's story: train, refit, generate, measure, round after round.

Round 0 is the first light: the engine comes from dummy weights. In every later round the stale
engine serves the policy of the round before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fp8sync
from fp8sync.engines.vllm import probe
from fp8sync.verify import compare
from scripts.demo import corpus, engine
from scripts.demo.corpus import nats_per_byte
from scripts.demo.models import build_model
from scripts.demo.training import Trainer

if TYPE_CHECKING:
    import torch

    from fp8sync import RefitReport
    from fp8sync.verify import Agreement
    from scripts.demo.corpus import Corpus
    from scripts.demo.stopwatch import Stopwatch

SEED = 20260
FIRST_STEPS = 240
ROUND_STEPS = 40
ROUNDS = 3
PROMPT = "def __init__(self, "
GENERATED = 96
WINDOWS = 16
WINDOW_LENGTH = 128


@dataclass(frozen=True)
class Round:
    """What one round showed; losses are nats per held-out byte."""

    number: int
    steps: int
    stale: Agreement
    fresh: Agreement
    trainer_loss: float
    engine_loss: float
    text: str
    report: RefitReport


@dataclass(frozen=True)
class ModelRun:
    """All rounds of one model."""

    kind: str
    architecture: str
    parameters: int
    rounds: tuple[Round, ...]


def run_model(kind: str, text: Corpus, stopwatch: Stopwatch, *, fp8: bool) -> ModelRun:
    """Trains one kind of model in this process while a vLLM in another follows it.

    Args:
        kind: "dense" or "moe".
        text: what to train on, and what is held out.
        stopwatch: counts the phases.
        fp8: whether the engine holds FP8; otherwise it holds BF16, dequantized on arrival.

    Raises:
        fp8sync.Fp8SyncError: a refit failed.
    """
    recipe = fp8sync.Recipe("blockwise", dequantize=not fp8)
    trainer = Trainer(build_model(kind, SEED), text, SEED)
    windows = text.evaluation_windows(WINDOWS, WINDOW_LENGTH)
    rounds = []
    with stopwatch.phase("start engines"):
        llm = engine.start_engine(trainer.model.config, fp8=fp8, seed=SEED)
    try:
        for number in range(ROUNDS + 1):
            done = _run_round(number, kind, trainer, llm, recipe, windows, stopwatch)
            print(
                f"{kind}, round {number}, the engine writes: {PROMPT}{done.text.rstrip()}",
                flush=True,
            )
            rounds.append(done)
    finally:
        with stopwatch.phase("stop engines"):
            probe.stop_engine(llm)
    return ModelRun(
        kind=kind,
        architecture=type(trainer.model).__name__,
        parameters=trainer.model.num_parameters(),
        rounds=tuple(rounds),
    )


def _run_round(
    number: int,
    kind: str,
    trainer: Trainer,
    llm: Any,
    recipe: fp8sync.Recipe,
    windows: torch.Tensor,
    stopwatch: Stopwatch,
) -> Round:
    steps = ROUND_STEPS if number else FIRST_STEPS
    with stopwatch.phase("train"):
        trainer.train(steps, f"{kind}, round {number}: training")
    with stopwatch.phase("measure"):
        expected = trainer.log_probabilities(windows)
        stale = engine.log_probabilities(llm, windows)
    with stopwatch.phase("refit"):
        report = fp8sync.refit(trainer.model, llm, recipe=recipe)
    with stopwatch.phase("generate"):
        new_ids = engine.generate(llm, corpus.encode(PROMPT), GENERATED, SEED)
    with stopwatch.phase("measure"):
        fresh = engine.log_probabilities(llm, windows)
    return Round(
        number=number,
        steps=steps,
        stale=compare(stale, expected, windows),
        fresh=compare(fresh, expected, windows),
        trainer_loss=nats_per_byte(expected, windows),
        engine_loss=nats_per_byte(fresh, windows),
        text=corpus.decode(new_ids),
        report=report,
    )
