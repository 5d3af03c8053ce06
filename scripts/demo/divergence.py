"""How far apart two policies are: per-token Kullback-Leibler divergence of full distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Divergence:
    """Mean per-token divergence of an engine and a trainer over one text, in nats."""

    engine_trainer: float
    trainer_engine: float


def measure(engine: torch.Tensor, trainer: torch.Tensor) -> Divergence:
    """Compares two policies on the same tokens.

    Args:
        engine: natural log-probabilities [rows, positions, vocabulary].
        trainer: the same of the trainer.

    Returns:
        KL(engine || trainer) and KL(trainer || engine), each a mean over all positions.

    Raises:
        ValueError: the shapes differ.
    """
    if engine.shape != trainer.shape:
        raise ValueError(
            f"log-probabilities: engine {tuple(engine.shape)}, trainer {tuple(trainer.shape)}"
        )
    engine, trainer = engine.double(), trainer.double()
    difference = engine - trainer
    return Divergence(
        engine_trainer=(engine.exp() * difference).sum(dim=-1).mean().item(),
        trainer_engine=-(trainer.exp() * difference).sum(dim=-1).mean().item(),
    )


def nats_per_byte(log_probabilities: torch.Tensor, windows: torch.Tensor) -> float:
    """Mean negative log-probability of the bytes that really follow.

    Args:
        log_probabilities: natural logarithms [rows, length - 1, vocabulary].
        windows: token ids, int64 [rows, length].
    """
    chosen = log_probabilities.gather(-1, windows[:, 1:].unsqueeze(-1))
    return -chosen.double().mean().item()
