"""How far apart two policies are, by the measures that the field watches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Agreement", "compare"]


@dataclass(frozen=True)
class Agreement:
    """Two policies on the same tokens.

    Args:
        kl_engine_trainer: mean over positions of KL(engine || trainer), in nats.
        kl_trainer_engine: the other direction.
        probability_ratio: mean of exp(|log p_engine - log p_trainer|) of the tokens that follow; NeMo-RL
            watches it as `token_mult_prob_error`.
        max_difference: the largest |log p_engine - log p_trainer| of the tokens that follow.
    """

    kl_engine_trainer: float
    kl_trainer_engine: float
    probability_ratio: float
    max_difference: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def compare(engine: torch.Tensor, trainer: torch.Tensor, tokens: torch.Tensor) -> Agreement:
    """Compare full distributions.

    Args:
        engine: natural log-probabilities [rows, length - 1, vocabulary]; position p is the
            distribution of the token at p + 1.
        trainer: the same of the trainer.
        tokens: int64 [rows, length].

    Raises:
        ValueError: shapes do not fit.
    """
    if engine.shape != trainer.shape or engine.shape[:2] != tokens[:, 1:].shape:
        raise ValueError(
            f"log-probabilities: engine {tuple(engine.shape)}, trainer {tuple(trainer.shape)}, "
            f"tokens {tuple(tokens.shape)}"
        )
    engine, trainer = engine.double(), trainer.double()
    difference = engine - trainer
    chosen = difference.gather(-1, tokens[:, 1:].unsqueeze(-1)).abs()
    return Agreement(
        kl_engine_trainer=(engine.exp() * difference).sum(dim=-1).mean().item(),
        kl_trainer_engine=-(trainer.exp() * difference).sum(dim=-1).mean().item(),
        probability_ratio=chosen.exp().mean().item(),
        max_difference=chosen.max().item(),
    )
