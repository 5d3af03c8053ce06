"""One link as a worker sees it: agree on a plan, receive versions, install them.

The conversation runs over the control channel (docs/wire-format.md, "Control messages"); buckets
arrive in a thread of their own from `start` on. What goes wrong is reported there, by name, instead of
being raised through vLLM's calls, so vLLM's own update session always closes.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from fp8sync.engines.vllm.install import ProcessInstall
from fp8sync.engines.vllm.layout import EngineLayout, describe_engine
from fp8sync.errors import (
    CorruptBucket,
    EngineLost,
    Fp8SyncError,
    InstallFailed,
    PlanMismatch,
    TransferTimeout,
)
from fp8sync.manifest import Manifest
from fp8sync.payload import unpack
from fp8sync.plan import Bucket, build_plan, fill_buckets
from fp8sync.recipe import Recipe
from fp8sync.transport import GlooGroup
from fp8sync.wire import ABORT, HEADER_BYTES, Header
from fp8sync_kernels import digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8sync.control import Channel

__all__ = ["WorkerSession"]

logger = logging.getLogger(__name__)


class WorkerSession:
    """A worker's side of a link.

    Args:
        channel: connected to the trainer's link.
        model: the live model.
        rank: this worker's rank among the engine's workers.
        device: where the model lives.
        dtype: the model's dtype.
    """

    def __init__(
        self,
        channel: Channel,
        model: torch.nn.Module,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._channel, self._model = channel, model
        self._rank, self._device, self._dtype = rank, device, dtype
        self._layout: EngineLayout | None = None
        self._buckets: list[Bucket] = []
        self._plan_digest = b""
        self._group: GlooGroup | None = None
        self._staging: dict[str, torch.Tensor] = {}
        self._receiver: threading.Thread | None = None
        self._failure: Fp8SyncError | None = None

    def agree(self) -> bool:
        """Describe this worker, build the plan, compare digests, join the transport.

        Returns:
            Whether the link stands; if not, the trainer has been told why.
        """
        return self._report(self._agree)

    def start(self) -> None:
        """Open a version: allocate staging and begin to receive."""
        version = int(self._channel.receive("version")["version"])
        self._failure = None
        self._receiver = threading.Thread(
            target=self._receive, args=(version,), name=f"fp8sync-receive-{version}", daemon=True
        )
        self._receiver.start()

    def wait_received(self) -> None:
        """Wait until all bytes are staged and verified, or until that has failed."""
        if self._receiver is not None:
            self._receiver.join()

    def finish(self) -> None:
        """Take part in the two-phase commit: prepare, vote, then install or abandon.

        Never raises for a lost trainer: the old weights stay, and vLLM's update session closes.
        """
        install: ProcessInstall | None = None
        try:
            install = self._prepare()
            self._vote(self._failure)
            go = self._channel.receive("decision")["commit"]
        except (EngineLost, TransferTimeout) as error:
            logger.warning("fp8sync: engine rank %d keeps its old weights: %s", self._rank, error)
            go = False
        if install is None or not go:
            if install is not None:
                install.abandon()
            return
        began = time.perf_counter()
        install.commit()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - began
        self._channel.try_send({"type": "committed", "commit_s": seconds})

    def close(self) -> None:
        """Leave the link."""
        self._channel.close()
        self._group = None

    def _agree(self) -> None:
        message = self._channel.receive("source")
        recipe = Recipe.from_json(message["recipe"])
        source = Manifest.from_json(message["manifest"])
        layout = describe_engine(self._model, list(source.tensors.values()), recipe, self._rank)
        self._channel.send({"type": "manifest", "manifest": layout.manifest.to_json()})
        plan = build_plan(source, layout.manifest)
        plan_digest = plan.digest(self._rank)
        mine = {str(self._rank): plan_digest}
        self._channel.send({"type": "plan", "digests": mine})
        if self._channel.receive("agreed")["digests"] != mine:
            details = {str(self._rank): plan.digests(self._rank)}
            self._channel.send({"type": "digests", "digests": details})
            raise PlanMismatch(f"trainer rank 0 has another plan than engine rank {self._rank}")
        group = self._channel.receive("transport")
        self._group = GlooGroup.join(
            group["host"], group["port"], group["rank"], group["size"], self._channel.timeout_s
        )
        self._buckets = fill_buckets(plan.to_rank(self._rank), message["bucket_bytes"])
        self._plan_digest = bytes.fromhex(plan_digest)[:16]
        self._layout = layout
        self._channel.send({"type": "ready"})

    def _receive(self, version: int) -> None:
        try:
            self._fill_staging(version)
        except Fp8SyncError as error:
            self._failure = error
        # The thread has no caller to raise to: the vote carries the reason.
        except Exception as error:
            logger.exception("fp8sync: receiving version %d failed", version)
            self._failure = Fp8SyncError(
                f"engine rank {self._rank}: {type(error).__name__}: {error}"
            )

    def _fill_staging(self, version: int) -> None:
        if self._layout is None or self._group is None:
            raise Fp8SyncError("the link was not established")
        specs = self._layout.storages.items()
        self._staging = {name: spec.allocate(self._device) for name, spec in specs}
        size = max((b.nbytes for b in self._buckets), default=0)
        message = torch.empty(HEADER_BYTES + size, dtype=torch.uint8)
        for bucket in self._buckets:
            used = message[: HEADER_BYTES + bucket.nbytes]
            self._group.receive(used, bucket.source_rank)
            try:
                self._take(bucket, used, version)
            except CorruptBucket as error:
                # What follows is taken off the wire, so that the senders are not left waiting.
                self._failure = self._failure or error

    def _take(self, bucket: Bucket, message: torch.Tensor, version: int) -> None:
        header = Header.unpack(bytes(message[:HEADER_BYTES].numpy()))
        if header.flags & ABORT:
            raise Fp8SyncError(f"trainer rank {bucket.source_rank} stopped sending")
        payload = message[HEADER_BYTES:]
        expected = Header(
            index=bucket.index,
            version=version,
            payload_bytes=bucket.nbytes,
            digest=digest(payload),
            plan=self._plan_digest,
            parts=len(bucket.parts),
        )
        header.check(expected, f"engine rank {self._rank}, bucket {bucket.index}")
        if self._failure is None:
            unpack(bucket, payload.to(self._device), self._staging)

    def _prepare(self) -> ProcessInstall | None:
        self._vote(self._failure)
        go = self._channel.receive("prepare")["go"]
        staging, self._staging = self._staging, {}
        if not go or self._failure is not None or self._layout is None:
            return None
        install = ProcessInstall(self._model, self._layout, staging, self._device, self._dtype)
        try:
            install.prepare()
        except InstallFailed as error:
            self._failure = error
            return None
        return install

    def _vote(self, failure: Fp8SyncError | None) -> None:
        error = failure.to_wire() if failure else None
        self._channel.send({"type": "vote", "error": error})

    def _report(self, step: Callable[[], Any]) -> bool:
        try:
            step()
        except Fp8SyncError as error:
            self._tell(error)
            return False
        # Anything else is a bug or an unknown vLLM; the trainer has to hear of it in either case.
        except Exception as error:
            logger.exception("fp8sync: engine rank %d could not join the link", self._rank)
            text = f"engine rank {self._rank}: {type(error).__name__}: {error}"
            self._tell(Fp8SyncError(text))
            return False
        return True

    def _tell(self, error: Fp8SyncError) -> None:
        try:
            self._channel.send({"type": "error", "error": error.to_wire()})
        except Fp8SyncError:
            logger.warning("fp8sync: the trainer is gone; it was to hear: %s", error)
