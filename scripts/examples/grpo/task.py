"""The verifiable task: sums of two numbers below 10, written out in bytes, such as `7+8=15.`"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 9
PROMPT_BYTES = 4
ANSWER_BYTES = 3


@dataclass(frozen=True)
class Problem:
    """One sum. Answers are padded with a space, so that all are equally long."""

    left: int
    right: int

    @property
    def prompt(self) -> list[int]:
        """Token ids of the question: UTF-8 bytes."""
        return list(f"{self.left}+{self.right}=".encode())

    @property
    def answer(self) -> list[int]:
        """Token ids of the one right answer, with the full stop that ends it."""
        return list(f"{self.left + self.right:2}.".encode())

    def reward(self, completion: list[int]) -> float:
        """1.0 for the right answer, else 0.0."""
        return float(completion == self.answer)


def draw(count: int, generator: torch.Generator) -> list[Problem]:
    """Draws problems, with replacement."""
    numbers = torch.randint(LARGEST + 1, (count, 2), generator=generator).tolist()
    return [Problem(left, right) for left, right in numbers]
