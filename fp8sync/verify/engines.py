"""The engine that is looked at: in a process of its own here, or wherever a host serves it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.engines.vllm import probe
from fp8sync.errors import EngineLost, Fp8SyncError
from fp8sync.verify.orders import Orders

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Local", "NotRun", "Served", "start_engine"]

_ANSWER_S = 600.0


class NotRun(Fp8SyncError):
    """This machine lacks what a proof needs, an engine or a trainer: nothing of fp8sync was tried."""


class Local:
    """A `vllm.LLM`.

    Args:
        directory: config.json and, unless `load_format="dummy"`, weights.
        vocabulary: how many log-probabilities are asked for.
        options: more of `vllm.LLM`.
    """

    def __init__(self, directory: Path, vocabulary: int, options: dict[str, Any]) -> None:
        self.handle = probe.start_engine(directory, vocabulary, **options)
        self._vocabulary = vocabulary

    def sample(self, prompts: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        """Continue prompts: int64 [rows, prompt length + count]."""
        return probe.sample(self.handle, prompts, count, seed)

    def log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ask for the distribution of every next token: float32 [rows, length - 1, vocabulary]."""
        return probe.log_probabilities(self.handle, tokens, self._vocabulary)

    def stop(self) -> None:
        """End its processes."""
        probe.stop_engine(self.handle)


class Served:
    """The same as a `vllm serve`, started by the host (`fp8sync.verify.host`) that shares a folder.

    Args:
        orders: through which the host is told.
        directory: as for `Local`; the host has to see it under this path.
        vocabulary: how many log-probabilities are asked for: about 100 bytes of JSON each.
        options: more of `vllm serve`.

    Raises:
        EngineLost: the server did not start; says why.
        TransferTimeout: the host does not answer.
    """

    def __init__(
        self, orders: Orders, directory: Path, vocabulary: int, options: dict[str, Any]
    ) -> None:
        self._orders, self._vocabulary = orders, vocabulary
        self.handle = orders.serve(probe.settings(directory, vocabulary, **options))

    def sample(self, prompts: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        """Continue prompts: int64 [rows, prompt length + count]."""
        asked = {"max_tokens": count, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        rows = [
            self._complete(prompt, return_token_ids=True, **asked)["token_ids"]
            for prompt in prompts.tolist()
        ]
        return torch.cat([prompts, torch.tensor(rows)], dim=1)

    def log_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ask for the distribution of every next token: float32 [rows, length - 1, vocabulary]."""
        found = torch.full(
            (len(tokens), tokens.shape[1] - 1, self._vocabulary), -torch.inf, dtype=torch.float32
        )
        for row, prompt in enumerate(tokens.tolist()):
            said = self._complete(prompt, max_tokens=1, prompt_logprobs=self._vocabulary)
            for position, each in enumerate(said["prompt_logprobs"][1:]):
                ids = torch.tensor([int(token) for token in each])
                found[row, position, ids] = torch.tensor(
                    [e["logprob"] for e in each.values()], dtype=torch.float32
                )
        return found

    def stop(self) -> None:
        """Let the host end it."""
        self._orders.stop()

    def _complete(self, prompt: list[int], **asked: Any) -> dict[str, Any]:
        body = json.dumps({"model": "verify", "prompt": prompt, **asked}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.handle + "/v1/completions", body, headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:  # noqa: S310
                return json.loads(answer.read())["choices"][0]
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise EngineLost(f"{self.handle} answered {error.code}: {text}") from error
        except OSError as error:
            raise EngineLost(f"{self.handle} is gone: {error}") from error


def start_engine(
    host: Path | None, directory: Path, vocabulary: int, options: dict[str, Any]
) -> Local | Served:
    """Start one here, or let the host that shares the folder `host` start it.

    Raises:
        NotRun: it does not start; says why.
    """
    try:
        if host is None:
            return Local(directory, vocabulary, options)
        return Served(Orders(host), directory, vocabulary, options)
    except Exception as error:
        raise NotRun(f"the engine does not start: {error}") from error
