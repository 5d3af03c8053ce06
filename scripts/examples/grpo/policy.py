"""The trainer's side: a short supervised start, then GRPO's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from scripts.demo.models import build_model
from scripts.demo.training import MasterOptimizer
from scripts.examples.grpo.task import PROMPT_BYTES, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM_START_LOSS = 0.6
"""Nats per byte of an answer at which the warm start ends: well-formed answers, often wrong."""
WARM_START_STEPS = 400
WARM_START_ROWS = 64
WARM_START_RATE = 1e-3
RATE = 3e-4
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
"""Of the ratio between the trainer's and the engine's probability of a token; higher above, as in DAPO."""


@dataclass(frozen=True)
class Rollout:
    """What the engine made of a batch of prompts, several completions to a prompt.

    Args:
        tokens: prompt and completion, int64 [rows, PROMPT_BYTES + completion].
        behaviour: the engine's log-probability of each completion token, float32 [rows, completion].
        rewards: float32 [prompts, completions of a prompt]; rows are in this order.
    """

    tokens: torch.Tensor
    behaviour: torch.Tensor
    rewards: torch.Tensor

    def advantages(self) -> torch.Tensor:
        """Rewards against the mean of their group, in its standard deviations: float32 [rows]."""
        centred = self.rewards - self.rewards.mean(dim=1, keepdim=True)
        return (centred / (self.rewards.std(dim=1, keepdim=True) + 1e-4)).reshape(-1)


class Policy:
    """A byte-level Qwen3 that learns to add."""

    def __init__(self, seed: int) -> None:
        self.model = build_model("dense", seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._optimizer: MasterOptimizer | None = None

    def warm_start(self) -> float:
        """Learns the form of an answer, and a little arithmetic, from right answers.

        Returns:
            The last loss, in nats per byte of the answer.
        """
        optimizer = MasterOptimizer(self.model, WARM_START_RATE, 20)
        loss = torch.tensor(0.0)
        for _ in range(WARM_START_STEPS):
            problems = draw(WARM_START_ROWS, self.generator)
            rows = torch.tensor([problem.prompt + problem.answer for problem in problems])
            loss = -self._of_completions(rows).mean()
            optimizer.step(loss)
            if loss.item() < WARM_START_LOSS:
                break
        self._optimizer = MasterOptimizer(self.model, RATE, 5)
        return loss.item()

    def learn(self, rollout: Rollout) -> torch.Tensor:
        """Takes one step of GRPO on a rollout.

        Returns:
            The trainer's log-probability of each completion token before the step, float32.
        """
        if self._optimizer is None:
            raise ValueError("warm_start comes first")
        own = self._of_completions(rollout.tokens)
        # The engine drew the tokens, so its probabilities are the ones to correct for.
        ratio = (own - rollout.behaviour).exp()
        advantages = rollout.advantages().unsqueeze(1)
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        self._optimizer.step(-torch.minimum(ratio * advantages, clipped * advantages).mean())
        return own.detach()

    def _of_completions(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens).logits[:, PROMPT_BYTES - 1 : -1]
        chosen = tokens[:, PROMPT_BYTES:].unsqueeze(-1)
        return logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1)


def stack(
    prompts: Sequence[list[int]],
    completions: Sequence[Sequence[tuple[list[int], list[float]]]],
    rewards: Sequence[Sequence[float]],
) -> Rollout:
    """Makes tensors of an engine's completions: by prompt, pairs of token ids and log-probabilities."""
    rows = [
        prompt + ids for prompt, group in zip(prompts, completions, strict=True) for ids, _ in group
    ]
    behaviour = [logprobs for group in completions for _, logprobs in group]
    return Rollout(torch.tensor(rows), torch.tensor(behaviour), torch.tensor(rewards))
