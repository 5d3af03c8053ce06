"""Real text that every Python ships: the standard library's sources and its licence, as bytes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

HELD_OUT_FILES = ("bisect.py", "heapq.py", "shlex.py", "statistics.py", "textwrap.py")


@dataclass(frozen=True)
class Corpus:
    """Two byte strings without a file in common, each as a 1-D uint8 tensor."""

    train: torch.Tensor
    held_out: torch.Tensor

    def batch(self, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draws random training windows.

        Args:
            rows: how many windows.
            length: bytes in each.
            generator: the only source of randomness.

        Returns:
            Token ids, int64 [rows, length].
        """
        starts = torch.randint(len(self.train) - length, (rows, 1), generator=generator)
        return self.train[starts + torch.arange(length)].long()

    def evaluation_windows(self, rows: int, length: int) -> torch.Tensor:
        """Cuts evenly spaced windows out of the held-out text, the same ones at every call.

        Returns:
            Token ids, int64 [rows, length].
        """
        starts = torch.linspace(0, len(self.held_out) - length, rows).long().unsqueeze(1)
        return self.held_out[starts + torch.arange(length)].long()


def read_corpus(directory: Path | None = None) -> Corpus:
    """Reads the modules at the top of a standard library, and the licence that lies beside them.

    Args:
        directory: a folder of Python sources; the running Python's standard library if not given.

    Raises:
        FileNotFoundError: the folder lacks the sources to train on or those held out.
    """
    directory = directory or Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(directory.glob("*.py"))
    held_out = [path for path in sources if path.name in HELD_OUT_FILES]
    train = [path for path in sources if path.name not in HELD_OUT_FILES]
    if not train or not held_out:
        raise FileNotFoundError(
            f"{directory} holds {len(train)} sources to train on and {len(held_out)} of the "
            f"{len(HELD_OUT_FILES)} held out ({', '.join(HELD_OUT_FILES)}); need some of each"
        )
    licences = sorted(directory.glob("LICENSE*"))
    return Corpus(train=_read([*licences, *train]), held_out=_read(held_out))


def encode(text: str) -> list[int]:
    """Token ids of a text: its UTF-8 bytes."""
    return list(text.encode())


def decode(token_ids: list[int]) -> str:
    """The text of token ids; bytes that are not UTF-8 show as replacement characters."""
    return bytes(token_ids).decode(errors="replace")


def nats_per_byte(log_probabilities: torch.Tensor, windows: torch.Tensor) -> float:
    """Mean negative log-probability of the bytes that really follow.

    Args:
        log_probabilities: natural logarithms [rows, length - 1, vocabulary].
        windows: token ids, int64 [rows, length].
    """
    chosen = log_probabilities.gather(-1, windows[:, 1:].unsqueeze(-1))
    return -chosen.double().mean().item()


def _read(paths: list[Path]) -> torch.Tensor:
    joined = bytearray(b"\n".join(path.read_bytes() for path in paths))
    return torch.frombuffer(joined, dtype=torch.uint8)
