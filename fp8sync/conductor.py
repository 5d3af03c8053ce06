"""The trainer's conversation with an engine's workers: agree, send, commit.

Runs in one thread. Every wait is bounded by the link's timeout; every error names the worker.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch
from fp8sync_kernels import digest

from fp8sync.control import Channel, Listener
from fp8sync.errors import (
    Fp8SyncError,
    NonFiniteWeight,
    PlanMismatch,
    from_wire,
)
from fp8sync.manifest import Manifest
from fp8sync.payload import PartReport, pack
from fp8sync.plan import Bucket, Plan, build_plan, fill_buckets
from fp8sync.plan.coverage import check_all_used
from fp8sync.recipe import Recipe
from fp8sync.report import RefitReport, tensor_reports
from fp8sync.sources import Source
from fp8sync.transport import GlooGroup, Rendezvous
from fp8sync.wire import ABORT, HEADER_BYTES, Header

__all__ = ["Conductor", "Outcome"]

TRAINER_RANKS = 1


@dataclass(frozen=True)
class Outcome:
    """A committed transfer, before it becomes a report."""

    plan: Plan
    parts: tuple[PartReport, ...]
    bytes_sent: int
    seconds: dict[str, float]

    def report(self, version: int, pause_s: float, total_s: float) -> RefitReport:
        """Return the report, with what the caller measured."""
        seconds = {**self.seconds, "total": total_s}
        tensors = tensor_reports(self.plan, self.parts)
        return RefitReport(version, self.bytes_sent, seconds, pause_s, tensors)


class Conductor:
    """Leads one engine's workers.

    Args:
        source: where the weights are.
        recipe: what the engine is to hold.
        workers: how many will join.
        bucket_bytes: payload of a message.
        timeout_s: limit of every wait.
    """

    def __init__(
        self, source: Source, recipe: Recipe, workers: int, bucket_bytes: int, timeout_s: float
    ) -> None:
        self._source, self._recipe, self._workers = source, recipe, workers
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._channels: dict[int, Channel] = {}
        self._group: GlooGroup | None = None
        self._rendezvous: Rendezvous | None = None
        self._plan: Plan | None = None
        self._buckets: dict[int, list[Bucket]] = {}

    @property
    def plan(self) -> Plan:
        """The agreed plan."""
        if self._plan is None:
            raise Fp8SyncError("no plan yet")
        return self._plan

    def agree(self, listener: Listener) -> None:
        """Take every worker's manifest, build the plan, compare digests, open the transport."""
        manifest = self._source.manifest()
        opening = {
            "type": "source",
            "manifest": manifest.to_json(),
            "recipe": self._recipe.to_json(),
            "bucket_bytes": self._bucket_bytes,
        }
        for number in range(self._workers):
            channel = listener.accept(f"engine worker {number} of {self._workers}")
            rank = int(channel.receive("worker")["rank"])
            channel.peer = f"engine rank {rank}"
            self._channels[rank] = channel
            channel.send(opening)
        wanted = self._collect_manifests()
        check_all_used(wanted)
        plan = build_plan(manifest, wanted)
        for rank, channel in self._each():
            found = channel.receive("plan")["digest"]
            mine = plan.digest(rank)
            channel.send({"type": "agreed", "digest": mine})
            if found != mine:
                raise _difference(plan.digests(rank), channel.receive("digests")["digests"], rank)
        self._open_transport(listener.host)
        for _, channel in self._each():
            channel.receive("ready")
        self._buckets = {r: fill_buckets(plan.to_rank(r), self._bucket_bytes) for r in self._channels}
        self._plan = plan

    def open(self, version: int) -> None:
        """Announce a version; the workers read it in `start_weight_update`."""
        for _, channel in self._each():
            channel.send({"type": "version", "version": version})

    def transfer(self, version: int) -> Outcome:
        """Send everything, then lead the vote; returns once every worker has committed.

        Raises:
            Fp8SyncError: of the kind that stopped it; every worker has then kept its old weights.
        """
        clock: Counter[str] = Counter()
        parts: list[PartReport] = []
        failure: BaseException | None = None
        sent = 0
        began = time.perf_counter()
        try:
            sent = self._send_all(version, parts, clock)
            failure = _nonfinite(parts)
        # Whatever failed here, the workers have to hear of it before it is raised.
        except Exception as error:  # noqa: BLE001
            failure = error
        faults = self._votes()
        clock["receive"] = time.perf_counter() - began - clock["quantize"] - clock["send"]
        go = failure is None and not faults
        self._tell({"type": "prepare", "go": go})
        began = time.perf_counter()
        faults = faults or self._votes()
        clock["prepare"] = time.perf_counter() - began
        self._tell({"type": "decision", "commit": go and not faults})
        if failure is not None:
            raise failure
        if faults:
            raise faults[0]
        clock["commit"] = max(
            float(channel.receive("committed")["commit_s"]) for _, channel in self._each()
        )
        return Outcome(self.plan, tuple(parts), sent, dict(clock))

    def close(self) -> None:
        """Hang up; a thread that waits for a worker wakes with `EngineLost`."""
        for channel in self._channels.values():
            channel.close()
        self._group = None
        self._rendezvous = None

    def _each(self) -> list[tuple[int, Channel]]:
        return sorted(self._channels.items())

    def _tell(self, message: dict[str, object]) -> None:
        for _, channel in self._each():
            channel.send(message)

    def _collect_manifests(self) -> Manifest:
        found = [
            Manifest.from_json(channel.receive("manifest")["manifest"]) for _, channel in self._each()
        ]
        tensors = {}
        for manifest in found:
            for name, info in manifest.tensors.items():
                known = tensors.setdefault(name, info)
                if info.formula and not known.formula:
                    tensors[name] = info
        ranks = {rank: boxes for m in found for rank, boxes in m.ranks.items()}
        return Manifest.of(tensors.values(), ranks)

    def _open_transport(self, host: str) -> None:
        rendezvous = Rendezvous(host, self._timeout_s)
        size = TRAINER_RANKS + self._workers
        for number, (_, channel) in enumerate(self._each()):
            place = {"host": rendezvous.host, "port": rendezvous.port}
            rank = TRAINER_RANKS + number
            channel.send({"type": "transport", **place, "rank": rank, "size": size})
        names = {TRAINER_RANKS + n: c.peer for n, (_, c) in enumerate(self._each())}
        self._group = GlooGroup(rendezvous.store, 0, size, host, self._timeout_s, names)
        self._rendezvous = rendezvous

    def _send_all(self, version: int, parts: list[PartReport], clock: Counter[str]) -> int:
        storages = self._source.storages()
        device = next(iter(storages.values())).device
        queues = [(n, r, self._buckets[r]) for n, (r, _) in enumerate(self._each())]
        largest = max((b.nbytes for _, _, q in queues for b in q), default=0)
        message = torch.zeros(HEADER_BYTES + largest, dtype=torch.uint8)
        payload = message[HEADER_BYTES:] if device.type == "cpu" else None
        sent = 0
        for turn in range(max(len(queue) for _, _, queue in queues)):
            for number, rank, queue in queues:
                if turn >= len(queue):
                    continue
                bucket = queue[turn]
                used = message[: HEADER_BYTES + bucket.nbytes]
                began = time.perf_counter()
                try:
                    parts += self._fill(bucket, storages, used[HEADER_BYTES:], payload is None)
                    header = self._header(bucket, version, digest(used[HEADER_BYTES:]))
                except Exception:
                    self._abort(number, bucket, version, used)
                    raise
                packed = time.perf_counter()
                _write(used, header)
                self._send(used, number)
                clock["quantize"] += packed - began
                clock["send"] += time.perf_counter() - packed
                sent += used.numel()
        return sent

    def _fill(
        self,
        bucket: Bucket,
        storages: dict[str, torch.Tensor],
        out: torch.Tensor,
        on_device: bool,
    ) -> list[PartReport]:
        if not on_device:
            out.zero_()
            return pack(bucket, storages, out)
        device = next(iter(storages.values())).device
        payload = torch.zeros(bucket.nbytes, dtype=torch.uint8, device=device)
        reports = pack(bucket, storages, payload)
        out.copy_(payload)
        return reports

    def _header(self, bucket: Bucket, version: int, payload_digest: int, flags: int = 0) -> Header:
        return Header(
            index=bucket.index,
            version=version,
            payload_bytes=bucket.nbytes,
            digest=payload_digest,
            plan=bytes.fromhex(self.plan.digest(bucket.destination_rank))[:16],
            parts=len(bucket.parts),
            flags=flags,
        )

    def _abort(self, number: int, bucket: Bucket, version: int, used: torch.Tensor) -> None:
        _write(used, self._header(bucket, version, 0, ABORT))
        self._send(used, number)

    def _send(self, message: torch.Tensor, number: int) -> None:
        if self._group is None:
            raise Fp8SyncError("the transport is closed")
        self._group.send(message, TRAINER_RANKS + number)

    def _votes(self) -> list[Fp8SyncError]:
        votes = [channel.receive("vote")["error"] for _, channel in self._each()]
        return [from_wire(v) for v in votes if v is not None]


def _write(message: torch.Tensor, header: Header) -> None:
    message[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)


def _nonfinite(parts: list[PartReport]) -> NonFiniteWeight | None:
    bad: Counter[str] = Counter()
    for part in parts:
        bad[part.tensor] += part.nonfinite
    faults = [
        f"{name}: expected finite values, found {count} NaN or Inf (trainer rank 0)"
        for name, count in bad.items()
        if count
    ]
    return NonFiniteWeight("NaN or Inf in the trainer's weights", faults) if faults else None


def _difference(mine: dict[str, str], found: dict[str, str], rank: int) -> PlanMismatch:
    for name in {**mine, **found}:
        if mine.get(name) != found.get(name):
            return PlanMismatch(
                f"trainer and engine rank {rank} computed different plans",
                [f"{name}: first tensor that differs; trainer {mine.get(name)}, engine {found.get(name)}"],
            )
    return PlanMismatch(f"trainer and engine rank {rank} order their copies differently")
