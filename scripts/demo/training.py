"""The trainer: BF16 weights for the policy, FP32 masters for the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scripts.demo.corpus import Corpus

ROWS = 8
LENGTH = 128
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 20


class MasterOptimizer:
    """AdamW on FP32 masters of a model's BF16 weights; the weights follow the masters at every step.

    Args:
        model: in BF16.
        learning_rate: after a linear warm-up.
        warmup_steps: of the learning rate.
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float, warmup_steps: int) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._masters = [weight.detach().float().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self._warmup = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps
        )

    def step(self, loss: torch.Tensor) -> None:
        """Takes one step down the loss, with gradients clipped to a norm of 1."""
        loss.backward()
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._warmup.step()
        with torch.no_grad():
            for master, weight in zip(self._masters, self._weights, strict=True):
                weight.copy_(master)


class Trainer:
    """Trains one model on one corpus, some steps at a time."""

    def __init__(self, model: PreTrainedModel, corpus: Corpus, seed: int) -> None:
        self.model = model
        self._corpus = corpus
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = MasterOptimizer(model, LEARNING_RATE, WARMUP_STEPS)

    def train(self, steps: int, label: str) -> None:
        """Takes optimizer steps under a progress bar that shows the loss in nats per byte."""
        self.model.train()
        with tqdm(total=steps, desc=label, unit="step", leave=True) as bar:
            for _ in range(steps):
                bar.set_postfix(loss=f"{self._step():.3f}", refresh=False)
                bar.update()

    @torch.no_grad()
    def log_probabilities(self, windows: torch.Tensor) -> torch.Tensor:
        """What the policy says of every next byte.

        Args:
            windows: token ids, int64 [rows, length].

        Returns:
            Natural logarithms, float32 [rows, length - 1, vocabulary]; position p is the
            distribution of windows[:, p + 1].
        """
        self.model.eval()
        logits = self.model(input_ids=windows, output_router_logits=False).logits
        return logits[:, :-1].float().log_softmax(dim=-1)

    def _step(self) -> float:
        batch = self._corpus.batch(ROWS, LENGTH, self._generator)
        loss = self.model(input_ids=batch, labels=batch).loss
        self._optimizer.step(loss)
        return loss.item()
