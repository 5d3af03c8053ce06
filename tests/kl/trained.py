"""Models that were trained, on the demo's text; on random weights any bug passes a limit on KL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.verify import REGRESSION, Limit, limit_of
from scripts.demo.corpus import Corpus, read_corpus
from scripts.demo.models import build_model
from scripts.demo.training import Trainer
from tests.engines import world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

    import fp8sync

SEED = 7
STEPS = 60
"""Before the earlier weights, and again before the later ones."""
WINDOWS, LENGTH = 4, 64


@dataclass(frozen=True)
class Trained:
    """One kind of model with the weights of two moments of its training, and text it never saw."""

    kind: str
    model: Any
    earlier: dict[str, torch.Tensor]
    later: dict[str, torch.Tensor]
    windows: torch.Tensor

    def use(self, weights: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def log_probabilities(self) -> torch.Tensor:
        windows = self.windows.to(self.model.device)
        logits = self.model(input_ids=windows, output_router_logits=False).logits
        return logits[:, :-1].float().log_softmax(-1).cpu()


@cache
def train(kind: str) -> Trained:
    """Once in a process: files of tests ask in turn for the one kind and the other."""
    torch.set_num_threads(1)
    text: Corpus = read_corpus()
    trainer = Trainer(build_model(kind, SEED), text, SEED)
    moments = []
    for _ in range(2):
        trainer.train(STEPS, f"{kind}: training")
        moments.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    model = trainer.model.eval().to("cuda" if world.skips.cuda_devices() else "cpu")
    return Trained(kind, model, *moments, text.evaluation_windows(WINDOWS, LENGTH))


def limit(recipe: fp8sync.Recipe) -> Limit:
    """The narrow limit where only weights are rounded; an FP8 engine rounds activations, too."""
    return limit_of(recipe) if world.FP8 else REGRESSION[recipe.name]


def engine_log_probabilities(llm: Any, windows: torch.Tensor) -> torch.Tensor:
    return torch.stack([world.logprobs(llm, row) for row in windows.tolist()])


def live_engine(trained: Trained, folders: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine on dummy weights, until it is no longer used."""
    folder = world.write_config(trained.model, folders.mktemp(trained.kind))
    llm = world.start_engine(folder, load_format="dummy")
    yield llm
    del llm
    world.forget_engines()


def fresh_engine(trained: Trained, folder: Path, formula: str | dict[str, str] | None) -> Any:
    """An engine that loads the weights from a checkpoint, FP8 if there is a formula (or one of each)."""
    return world.start_engine(world.write_checkpoint(trained.model, folder, formula))
