"""One link as a worker sees it: agree on a plan (`agreement`), receive versions, install them.

The conversation runs over the control channel (docs/wire-format.md, "Control messages"); bytes arrive in
a thread of their own from `start` on, which also votes on them. What goes wrong is reported there, by
name, instead of being raised through vLLM's calls, so vLLM's own update session always closes.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from fp8sync.engines.vllm.agreement import agree
from fp8sync.engines.vllm.kv_cache import caching_modules, restore_scales
from fp8sync.engines.vllm.standstill import Standstill
from fp8sync.errors import Fp8SyncError, InstallFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fp8sync.control import Channel
    from fp8sync.engines.vllm.agreement import Agreed, Worker
    from fp8sync.engines.vllm.install import ProcessInstall
    from fp8sync.engines.vllm.intake import Receiver
    from fp8sync.engines.vllm.portions import Installed, Portion

__all__ = ["WorkerSession"]

logger = init_logger("vllm.fp8sync")  # vLLM prints what is below its own name, and nothing else

_PATIENCE = 10
"""Timeouts until all bytes are here; each of their waits has a timeout of its own."""


class WorkerSession:
    """A worker's side of a link.

    Args:
        channel: connected to the trainer's link.
        worker: whose weights are refitted.
        installed: what earlier links have made of its weights.
    """

    def __init__(self, channel: Channel, worker: Worker, installed: Installed) -> None:
        self._channel, self._worker, self._installed = channel, worker, installed
        self._rank = worker.rank
        self._caching = caching_modules(worker.model)
        self._agreed: Agreed | None = None
        self._number = 0
        self._opened = False
        self._thread: threading.Thread | None = None
        self._staged: dict[str, torch.Tensor] = {}
        self._failure: Fp8SyncError | None = None
        self._auditing = False

    @property
    def _link(self) -> Agreed:
        if self._agreed is None:
            raise Fp8SyncError("the link was not established")
        return self._agreed

    @property
    def busy(self) -> bool:
        """Whether a version, or an audit, is under way, and whoever opened it is still there."""
        if not self._opened:
            return False
        receives = self._thread is not None and self._thread.is_alive()
        return receives or not self._channel.hung_up()

    def agree(self) -> bool:
        """Agree with the link.

        Returns:
            Whether it stands; if not, the trainer has been told why.
        """
        return self._report(self._agree)

    def start(self) -> None:
        """Open a version, or a later portion of one, and begin to receive."""
        message = self._channel.receive("version")
        self._failure, version = None, int(message["version"])
        self._opened, self._number = True, int(message["portion"])
        self._auditing = bool(message.get("audit"))
        if self._auditing:
            return
        self._thread = self._beside(partial(self._receive, version))

    def wait_received(self) -> None:
        """Wait until all bytes are staged and verified, or until that has failed."""
        if self._thread is not None and not self._auditing:
            self._thread.join(_PATIENCE * self._channel.timeout_s)
            if self._thread.is_alive():
                logger.error("fp8sync: engine rank %d: receiving does not end", self._rank)
                self._channel.close()  # the trainer hears of it; `finish` keeps the old weights

    def finish(self) -> None:
        """Take part in the two-phase commit: prepare, vote, then install or abandon.

        Never raises: until the decision the old weights stay, and vLLM's update session closes in any
        case. What happens after the decision is told in `committed`. There is nothing to do in a session
        that opened no version, where vLLM's update was left open by an earlier one.
        """
        opened, self._opened = self._opened, False
        if not opened:
            return
        if self._auditing:
            self._report(self._answer_audit)
            return
        portion = self._link.portions[self._number]
        prepared = False
        try:
            standstill = Standstill(self._worker.device)
            prepared = self._prepare(portion.process)
            self._vote(self._failure)
            go = bool(self._channel.receive("decision")["commit"])
        # A lost trainer, a message out of turn, a bug: all end with the old weights.
        except Exception as error:  # noqa: BLE001
            logger.warning("fp8sync: engine rank %d keeps its old weights: %s", self._rank, error)
            go = False
        if prepared and go:
            # Whether more of this version is to come.
            self._opened = self._number + 1 < len(self._link.portions)
            self._commit(portion, standstill)
        elif prepared:
            portion.process.abandon()

    def _answer_audit(self) -> None:
        self._worker.check_awake()
        self._link.audit().answer(self._channel)

    def _commit(self, portion: Portion, standstill: Standstill) -> None:
        """Install, and tell when it is done: a GPU is not waited for here, as the engine may go on at once.

        Its next step follows on the same stream.
        """
        began = time.perf_counter()
        # Until the link says otherwise: caches may be of the old version.
        self._installed.mixed = True
        try:
            self._install(portion)
            standstill.installed()
        # The live weights may be a mixture now; only the trainer can put that right.
        except Exception as error:
            logger.exception("fp8sync: engine rank %d failed while it installed", self._rank)
            self._committed(began, 0.0, f"{type(error).__name__}: {error}")
            return
        if self._worker.device.type == "cpu":
            self._await_commit(began, standstill)
        else:
            self._thread = self._beside(partial(self._await_commit, began, standstill))

    def _install(self, portion: Portion) -> None:
        """Enqueue everything."""
        portion.direct.commit()
        portion.process.commit()
        restore_scales(self._caching)

    def _await_commit(self, began: float, standstill: Standstill) -> None:
        stood_s, failure = 0.0, ""
        try:
            stood_s = standstill.seconds()
        except RuntimeError as error:  # the GPU's
            logger.exception("fp8sync: engine rank %d failed while it installed", self._rank)
            failure = str(error)
        self._committed(began, stood_s, failure)

    def _committed(self, began: float, stood_s: float, failure: str) -> None:
        said = {"commit_s": time.perf_counter() - began, "stood_s": stood_s, "failure": failure}
        self._channel.try_send({"type": "committed", **said})

    def close(self) -> None:
        """Leave the link."""
        self._channel.close()
        if self._agreed is not None:
            self._agreed.close()
            self._agreed = None

    def _agree(self) -> None:
        self._agreed = agree(self._channel, self._worker)

    def _receive(self, version: int) -> None:
        # `close` drops the link while it ends this thread's call.
        link, number = self._link, self._number
        receiver = link.portions[number].receiver
        self._stage(partial(self._take, receiver, version, number))
        if link.forwards and self._may_forward():
            self._stage(lambda: receiver.forward(version, self._staged))

    def _take(self, receiver: Receiver, version: int, portion: int) -> None:
        self._staged = self._worker.staging.views(portion)
        receiver.receive(version, self._staged)
        self._worker.check_awake()  # here, as a trainer that writes has to be heard to the end

    def _may_forward(self) -> bool:
        """Wait for the word that every worker has what trainer ranks sent, or that one has not."""
        try:
            return bool(self._channel.receive("forward", _PATIENCE * self._channel.timeout_s)["go"])
        except Fp8SyncError as error:
            self._failure = error
            return False

    def _stage(self, step: Callable[[], None]) -> None:
        """Vote on one step of filling staging memory."""
        try:
            step()
        except Fp8SyncError as error:
            logger.warning("fp8sync: engine rank %d keeps its old weights: %s", self._rank, error)
            self._failure = error
        # The thread has no caller to raise to: the vote carries the reason.
        except Exception as error:
            logger.exception("fp8sync: engine rank %d could not receive", self._rank)
            text = f"engine rank {self._rank}: {type(error).__name__}: {error}"
            self._failure = Fp8SyncError(text)
        said = self._failure.to_wire() if self._failure else None
        self._channel.try_send({"type": "vote", "error": said})

    def _beside(self, task: Callable[[], None]) -> threading.Thread:
        """Begin what the engine need not wait for."""
        thread = threading.Thread(target=task, name=f"fp8sync-{self._rank}", daemon=True)
        thread.start()
        return thread

    def _prepare(self, install: ProcessInstall) -> bool:
        """Return whether the version can be installed."""
        go = self._channel.receive("prepare", late="written")["go"]
        staged, self._staged = self._staged, {}
        if not go or self._failure is not None:
            return False
        try:
            self._worker.check_awake()
            install.prepare(staged)
        except Fp8SyncError as error:
            self._failure = error
            return False
        # Whatever it is, the trainer waits for a vote.
        except Exception as error:
            logger.exception("fp8sync: engine rank %d could not prepare", self._rank)
            self._failure = InstallFailed(f"{type(error).__name__}: {error}")
            return False
        return True

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
