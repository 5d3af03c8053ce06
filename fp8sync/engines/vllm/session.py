"""One link as a worker sees it: agree on a plan, receive versions, install them.

The conversation runs over the control channel (docs/wire-format.md, "Control messages"); bytes arrive in
a thread of their own from `start` on, which also votes on them. What goes wrong is reported there, by
name, instead of being raised through vLLM's calls, so vLLM's own update session always closes.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from fp8sync.engines.vllm.compat import weights_asleep
from fp8sync.engines.vllm.direct import DirectInstall
from fp8sync.engines.vllm.install import ProcessInstall
from fp8sync.engines.vllm.intake import Intake
from fp8sync.engines.vllm.kv_cache import caching_modules, restore_scales
from fp8sync.engines.vllm.layout import describe_engine
from fp8sync.engines.vllm.live import LiveWeights, worker_ledger
from fp8sync.engines.vllm.portions import Portion, memory_short, storages_by_portion
from fp8sync.engines.vllm.receive import open_receivers
from fp8sync.engines.vllm.storage import module_of
from fp8sync.engines.vllm.strategy import direct_modules
from fp8sync.errors import Fp8SyncError, InstallFailed
from fp8sync.manifest import Manifest
from fp8sync.plan import Plan, build_plan, in_portions
from fp8sync.plan.forward import from_runs, with_forwarding
from fp8sync.recipe import Recipe
from fp8sync.transport.memory import gpu_id
from fp8sync.transport.seat import Seat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8sync.audit.ledger import Ledger
    from fp8sync.control import Channel
    from fp8sync.engines.vllm.intake import Receiver
    from fp8sync.engines.vllm.portions import Installed
    from fp8sync.engines.vllm.staging import Staging
    from fp8sync.engines.vllm.storage import EngineLayout

__all__ = ["WorkerSession"]

logger = init_logger("vllm.fp8sync")  # vLLM prints what is below its own name, and nothing else

_PATIENCE = 10
"""Timeouts until all bytes are here; each of their waits has a timeout of its own."""


class WorkerSession:
    """A worker's side of a link.

    Args:
        channel: connected to the trainer's link.
        model: the live model.
        rank: this worker's rank among the engine's workers.
        staging: this worker's staging memory.
        installed: what earlier links have made of its weights.
        device: where the model lives.
        dtype: the model's dtype.
    """

    def __init__(
        self,
        channel: Channel,
        model: torch.nn.Module,
        rank: int,
        staging: Staging,
        installed: Installed,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._channel, self._model = channel, model
        self._rank, self._staging, self._installed = rank, staging, installed
        self._device, self._dtype = device, dtype
        self._caching = caching_modules(model)
        self._receivers: Sequence[Receiver] = ()
        self._portions: list[Portion] = []
        self._number = 0
        self._opened = False
        self._direct_modules: set[str] = set()
        self._unproven: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        self._staged: dict[str, torch.Tensor] = {}
        self._failure: Fp8SyncError | None = None
        self._forwards = False
        self._audit: Callable[[], Ledger] | None = None
        self._auditing = False

    @property
    def busy(self) -> bool:
        """Whether a version, or an audit, is under way, and whoever opened it is still there."""
        if not self._opened:
            return False
        receives = self._thread is not None and self._thread.is_alive()
        return receives or not self._channel.hung_up()

    def agree(self) -> bool:
        """Describe this worker, build the plan, compare digests, join the transport.

        Returns:
            Whether the link stands; if not, the trainer has been told why.
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
        portion = self._portions[self._number]
        prepared = False
        try:
            prepared = self._prepare(portion.process)
            self._vote(self._failure)
            go = bool(self._channel.receive("decision")["commit"])
        # A lost trainer, a message out of turn, a bug: all end with the old weights.
        except Exception as error:  # noqa: BLE001
            logger.warning("fp8sync: engine rank %d keeps its old weights: %s", self._rank, error)
            go = False
        if prepared and go:
            self._opened = self._number + 1 < len(self._portions)  # more of this version is to come
            self._commit(portion)
        elif prepared:
            portion.process.abandon()

    def _answer_audit(self) -> None:
        if self._audit is None:
            raise Fp8SyncError("the link was not established")
        self._check_awake()
        self._audit().answer(self._channel)

    def _commit(self, portion: Portion) -> None:
        """Install, and tell when it is done: a GPU is not waited for here, as the engine may go on at once.

        Its next step follows on the same stream.
        """
        began, failure, event = time.perf_counter(), "", None
        self._installed.mixed = True
        try:
            event = self._install(portion)
            # While it is stopped, it may hold prefixes of the old version.
            self._installed.mixed = self._opened or bool(self._installed.stopped)
        # The live weights may be a mixture now; only the trainer can put that right.
        except Exception as error:
            logger.exception("fp8sync: engine rank %d failed while it installed", self._rank)
            failure = f"{type(error).__name__}: {error}"
        if event is None:
            self._committed(began, failure)
        else:
            self._thread = self._beside(partial(self._await_commit, began, event))

    def _install(self, portion: Portion) -> torch.cuda.Event | None:
        """Enqueue everything; the event follows it on a GPU."""
        if portion.direct is not None:
            portion.direct.commit()
        portion.process.commit()
        restore_scales(self._caching)
        if self._device.type == "cpu":
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def _await_commit(self, began: float, event: torch.cuda.Event) -> None:
        failure = ""
        try:
            event.synchronize()
        except RuntimeError as error:  # the GPU's
            logger.exception("fp8sync: engine rank %d failed while it installed", self._rank)
            self._installed.mixed, failure = True, str(error)
        self._committed(began, failure)

    def _committed(self, began: float, failure: str) -> None:
        seconds = time.perf_counter() - began
        self._channel.try_send({"type": "committed", "commit_s": seconds, "failure": failure})

    def close(self) -> None:
        """Leave the link."""
        self._channel.close()
        for receiver in self._receivers:
            receiver.close()
        self._receivers, self._portions = (), []

    def _check_awake(self) -> None:
        """Refuse to read or write weights that are not mapped, which ends the process."""
        if weights_asleep():
            text = f"engine rank {self._rank}: expected weights that are awake, found them asleep"
            raise InstallFailed(f'{text}: call wake_up(tags=["weights"]) first')

    def _agree(self) -> None:
        message = self._channel.receive("source")
        self._check_awake()
        recipe = Recipe.from_json(message["recipe"])
        source = Manifest.from_json(message["manifest"])
        layout = describe_engine(self._model, list(source.tensors.values()), recipe, self._rank)
        seat = Seat.at(self._device).to_json()
        short = memory_short(layout, self._staging.nbytes, self._device)
        own = {"manifest": layout.manifest.to_json(), "seat": seat, "short": short}
        self._channel.send({"type": "manifest", **own})
        plan = build_plan(
            source, layout.manifest, exchange_amax=True, requantize=recipe.requantizes
        )
        sharers = from_runs(self._channel.receive("shared")["runs"])
        # Not as many as copies: then the plans differ, which is found when they are compared.
        if len(sharers) == len(plan.copies):
            plan = with_forwarding(plan, {self._rank: sharers})
        commit = self._compare(plan)
        layout = layout.with_misc_of(plan)
        portions = [list(layout.storages)]
        if commit == "in-place":
            portions = storages_by_portion(layout, message["bucket_bytes"])
        self._open_portions(source, layout, plan, portions)
        # Made anew for every audit, as it remembers what it read.
        about = self._model, layout, self._direct_modules, self._device, self._dtype
        live = partial(LiveWeights, *about)
        self._audit = partial(worker_ledger, live, plan, self._rank, message["bucket_bytes"])
        processed = sum(portion.process.modules for portion in self._portions)
        strategies = {"direct": len(self._direct_modules), "process": processed}
        self._channel.send({"type": "ready", **strategies, "unproven": self._unproven})

    def _open_portions(
        self, held: Manifest, layout: EngineLayout, plan: Plan, portions: list[list[str]]
    ) -> None:
        layouts = [layout.only(own) for own in portions]
        try:
            self._staging.lay_out([own.storages for own in layouts])
        except InstallFailed as error:
            raise InstallFailed(f"engine rank {self._rank}: {error}") from error
        self._send_place(portions)
        # Trainer ranks open their ways out meanwhile.
        self._direct_modules, self._unproven = direct_modules(
            self._model, layout, self._device, self._dtype
        )
        choice = self._channel.receive("transport")
        self._forwards = bool(choice["forward_bytes"])
        # Another worker may have more portions; this one receives nothing in them.
        count = max(len(own) for _, own in choice["portions"])
        layouts += [layout.only(())] * (count - len(layouts))
        plans = in_portions(plan, dict(choice["portions"]))
        about = self._rank, self._device
        receivers = self._receivers = open_receivers(
            choice,
            [
                Intake(self._channel, self._staging, held, layout.manifest, own, *about)
                for own in plans
            ],
        )
        skip = self._direct_modules
        self._portions = [
            Portion(
                own,
                receiver,
                self._direct(number),
                ProcessInstall(self._model, own, self._device, self._dtype, skip),
            )
            for number, (own, receiver) in enumerate(zip(layouts, receivers, strict=True))
        ]

    def _direct(self, portion: int) -> DirectInstall | None:
        staged = self._staging.views(portion) if self._direct_modules else {}
        if not any(module_of(name) in self._direct_modules for name in staged):
            return None
        return DirectInstall(self._model, self._direct_modules, staged, self._device)

    def _compare(self, plan: Plan) -> str:
        """Compare digests with the trainer's; returns how versions are to be installed."""
        mine = {str(self._rank): plan.digest(self._rank)}
        self._channel.send({"type": "plan", "digests": mine})
        agreed = self._channel.receive("agreed")
        if agreed["digests"] != mine:
            details = {str(self._rank): plan.digests(self._rank)}
            self._channel.send({"type": "digests", "digests": details})
            self._channel.receive("error")  # the trainer's, which names the tensor
        return str(agreed["commit"])

    def _send_place(self, portions: list[list[str]]) -> None:
        place: dict[str, Any] = {"type": "place", "memory": None, "offsets": {}}
        place["portions"] = portions if len(portions) > 1 else []
        place["gpu"] = gpu_id(self._device)
        if self._device.type == "cuda":
            try:
                place["memory"] = self._staging.export().to_json()
                place["offsets"] = self._staging.offsets
            except Fp8SyncError as error:
                logger.warning("fp8sync: staging memory cannot be shared: %s", error)
        self._channel.send(place)

    def _receive(self, version: int) -> None:
        self._stage(partial(self._take, version))
        if self._forwards and self._may_forward():
            receiver = self._portions[self._number].receiver
            self._stage(lambda: receiver.forward(version, self._staged))

    def _take(self, version: int) -> None:
        self._staged = self._staging.views(self._number)
        self._portions[self._number].receiver.receive(version, self._staged)
        self._check_awake()  # here, as a trainer that writes has to be heard to the end

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
        go = self._channel.receive("prepare")["go"]
        staged, self._staged = self._staged, {}
        if not go or self._failure is not None:
            return False
        try:
            self._check_awake()
            install.prepare(staged)
        except InstallFailed as error:
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
