"""The known bugs of the field, put into a worker between verifying a bucket and staging it.

All digests agree by then, so nothing but the policies' divergence and the audit can see them. Damage
begins with the second bucket: before it, the engine holds the earlier weights as it should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fp8sync.engines.vllm import buckets
from fp8sync.plan import Bucket
from fp8sync.wire import payload as bytes_of
from fp8sync_kernels import quantize_blockwise

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from fp8sync.plan import Copy, Part
    from fp8sync.wire.payload import Storages

Spoil = Callable[[Bucket, torch.Tensor, torch.Tensor], Bucket]
Touches = Callable[[str], bool]


@dataclass(frozen=True)
class Damage:
    """One bug.

    `spoil(bucket, payload, before)` changes the payload, or returns a bucket that puts parts
    elsewhere; `before` is the payload of the version before. `touches` says which tensors are wrong
    afterwards, but for those of whose scale_inv it is `harmless`: neighbouring blocks may share a scale.
    `says` is how the audit names what is wrong with one of them.
    """

    name: str
    kinds: tuple[str, ...]
    touches: Touches
    spoil: Spoil
    says: Callable[[str], str]
    harmless: Callable[[torch.Tensor], bool] = lambda _: False

    def inject(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[torch.Tensor] = []

        def unpack(bucket: Bucket, payload: torch.Tensor, staging: Storages) -> None:
            before = seen[-1] if seen else None
            seen.append(payload.clone())
            if before is not None:
                payload = payload.clone()
                bucket = self.spoil(bucket, payload, before)
            bytes_of.unpack(bucket, payload, staging)

        monkeypatch.setattr(buckets, "unpack", unpack)

    def tensors(self, weights: Iterable[tuple[str, torch.Tensor]], formula: str) -> set[str]:
        touched = [(name, weight) for name, weight in weights if self.touches(name)]
        return {
            name
            for name, weight in touched
            if weight.dim() == 1 or not self.harmless(quantize_blockwise(weight, formula).scale_inv)
        }


def is_half(name: str) -> bool:
    return name.endswith(("gate_proj.weight", "up_proj.weight"))


def is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight")


def is_expert(name: str) -> bool:
    return ".experts." in name


def is_router(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


def swapped_halves(name: str) -> str:
    kind, other = ("gate_proj", "up_proj") if "gate_proj" in name else ("up_proj", "gate_proj")
    return name.replace(kind, other)


def next_expert(name: str, step: int = 1) -> str:
    stem, _, rest = name.partition(".experts.")
    number, _, kind = rest.partition(".")
    return f"{stem}.experts.{(int(number) + step) % 8}.{kind}"


def exchanged(other: Callable[[str], str], touches: Touches) -> Spoil:
    """Put each tensor where another one belongs."""

    def spoil(bucket: Bucket, payload: torch.Tensor, before: torch.Tensor) -> Bucket:
        home = {part.copy.tensor: part.copy for part in bucket.parts}
        parts = [
            replace(p, copy=_at(p.copy, home[other(p.copy.tensor)]))
            if touches(p.copy.tensor)
            else p
            for p in bucket.parts
        ]
        return replace(bucket, parts=tuple(parts))

    return spoil


def _at(copy: Copy, home: Copy) -> Copy:
    return replace(copy, at=home.at, scale_at=home.scale_at)


def spoiled(touches: Touches, change: Callable[..., None]) -> Spoil:
    """Change the bytes of some parts in place."""

    def spoil(bucket: Bucket, payload: torch.Tensor, before: torch.Tensor) -> Bucket:
        for part in bucket.parts:
            if touches(part.copy.tensor):
                change(part, payload, before)
        return bucket

    return spoil


def scales_of(part: Part, payload: torch.Tensor) -> torch.Tensor:
    return payload[part.scale_offset : part.scale_offset + part.copy.scale_bytes]


def codes_of(part: Part, payload: torch.Tensor) -> torch.Tensor:
    return payload[part.offset : part.offset + part.copy.weight_bytes]


def stale_scales(part: Part, payload: torch.Tensor, before: torch.Tensor) -> None:
    scales_of(part, payload).copy_(scales_of(part, before))


def another_shards_scales(part: Part, payload: torch.Tensor, before: torch.Tensor) -> None:
    scales = scales_of(part, payload)
    scales.copy_(scales.roll(4))


def zeros(part: Part, payload: torch.Tensor, before: torch.Tensor) -> None:
    codes_of(part, payload).zero_()


def dropped(part: Part, payload: torch.Tensor, before: torch.Tensor) -> None:
    codes_of(part, payload).copy_(codes_of(part, before))


BOTH = ("dense", "moe")
DAMAGES = (
    Damage(
        "swapped w13 halves",
        BOTH,
        is_half,
        exchanged(swapped_halves, is_half),
        lambda name: f"it holds {swapped_halves(name)} from [0, 0]",
    ),
    Damage(
        "stale scales",
        BOTH,
        is_quantized,
        spoiled(is_quantized, stale_scales),
        lambda _: "its scale_inv is stale: ",
    ),
    Damage(
        "scale of another shard",
        BOTH,
        is_quantized,
        spoiled(is_quantized, another_shards_scales),
        lambda _: "its scale_inv is that of block [",
        harmless=lambda scales: torch.equal(scales, scales.flatten().roll(1).view_as(scales)),
    ),
    Damage(
        "missing up_proj",
        BOTH,
        lambda name: name.endswith("up_proj.weight"),
        spoiled(lambda name: name.endswith("up_proj.weight"), zeros),
        lambda _: "it holds zeros",
    ),
    Damage(
        "router dropped",
        ("moe",),
        is_router,
        spoiled(is_router, dropped),
        lambda _: "it is stale: what the trainer held at the audit before",
    ),
    Damage(
        "wrong expert mesh",
        ("moe",),
        is_expert,
        exchanged(next_expert, is_expert),
        lambda name: f"it holds {next_expert(name, -1)} from [0, 0]",
    ),
)
