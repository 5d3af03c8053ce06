"""The row order of fused attention projections: by query group, as Megatron-Core's attention reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8sync.sources.megatron.pieces import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Heads"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, query groups (key/value heads) and the rows of one head.

    `gated` says that every query group also has a gate of the query's size, which HF keeps within
    `q_proj`, head by head: query rows, then gate rows.
    """

    heads: int
    groups: int
    rows: int
    gated: bool = False

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Read the numbers of a Megatron `TransformerConfig`.

        Raises:
            ValueError: the heads cannot be divided among the groups.
        """
        heads, groups = config.num_attention_heads, config.num_query_groups
        if heads % groups:
            raise ValueError(f"{heads} query heads cannot be divided among {groups} query groups")
        rows = config.kv_channels or config.hidden_size // heads
        return cls(heads, groups, rows, bool(getattr(config, "attention_output_gate", False)))

    def qkv(self, q: str, k: str, v: str) -> Iterator[Run]:
        """Yield the runs of `[q... (gate...) k v]`, group by group."""
        for group in range(self.groups):
            yield from self._queries(q, group)
            yield Run(k, group * self.rows, self.rows)
            yield Run(v, group * self.rows, self.rows)

    def kv(self, k: str, v: str) -> Iterator[Run]:
        """Yield the runs of `[k v]`, group by group."""
        for group in range(self.groups):
            yield Run(k, group * self.rows, self.rows)
            yield Run(v, group * self.rows, self.rows)

    def concatenated_qkv(self, qkv: str) -> Iterator[Run]:
        """Yield the runs for an HF tensor that holds all queries, then all keys, then all values.

        Raises:
            ValueError: the queries have gates; their place in such a tensor is not defined.
        """
        if self.gated:
            raise ValueError("gated queries in one concatenated tensor")
        keys = self.heads * self.rows
        below = {"q": 0, "k": keys, "v": keys + self.groups * self.rows}
        for run in self.qkv("q", "k", "v"):
            yield Run(qkv, below[run.tensor] + run.first, run.count)

    def _queries(self, q: str, group: int) -> Iterator[Run]:
        each = self.heads // self.groups
        heads = range(group * each, (group + 1) * each)
        if not self.gated:
            yield Run(q, heads[0] * self.rows, each * self.rows)
            return
        for part in (0, 1):
            for head in heads:
                yield Run(q, (2 * head + part) * self.rows, self.rows)
