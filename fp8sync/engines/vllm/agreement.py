"""How a worker agrees with a link: what it wants, the plan that both sides compute, and where bytes go.

The worker's half of what `link.conductor` does before the first version (docs/wire-format.md, "Control
messages").
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from fp8sync.engines.vllm.compat import weights_asleep
from fp8sync.engines.vllm.direct import DirectInstall
from fp8sync.engines.vllm.install import ProcessInstall
from fp8sync.engines.vllm.intake import Intake
from fp8sync.engines.vllm.layout import describe_engine
from fp8sync.engines.vllm.live import LiveWeights, worker_ledger
from fp8sync.engines.vllm.portions import Portion, memory_short, storages_by_portion
from fp8sync.engines.vllm.receive import open_receivers
from fp8sync.engines.vllm.strategy import direct_modules
from fp8sync.errors import Fp8SyncError, InstallFailed
from fp8sync.manifest import Manifest
from fp8sync.plan import Plan, build_plan, in_portions
from fp8sync.plan.forward import from_runs, with_forwarding
from fp8sync.plan.merge import with_misc
from fp8sync.recipe import Recipe
from fp8sync.transport.memory import gpu_id
from fp8sync.transport.seat import Seat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    import torch

    from fp8sync.audit.ledger import Ledger
    from fp8sync.control import Channel
    from fp8sync.engines.vllm.intake import Receiver
    from fp8sync.engines.vllm.staging import Staging
    from fp8sync.engines.vllm.storage import EngineLayout
    from fp8sync.transport.memory import ExportedMemory

__all__ = ["Agreed", "Worker", "agree", "place", "plan_with"]

logger = init_logger("vllm.fp8sync")  # vLLM prints what is below its own name, and nothing else


@dataclass(frozen=True)
class Worker:
    """A worker whose weights a link is to refit.

    Args:
        model: the live model.
        rank: this worker's rank among the engines' workers.
        staging: its staging memory.
        device: where the model lives.
        dtype: the model's dtype.
    """

    model: torch.nn.Module
    rank: int
    staging: Staging
    device: torch.device
    dtype: torch.dtype

    def check_awake(self) -> None:
        """Refuse to read or write weights that are not mapped, which ends the process."""
        if weights_asleep():
            text = f"engine rank {self.rank}: expected weights that are awake, found them asleep"
            raise InstallFailed(f'{text}: call wake_up(tags=["weights"]) first')


@dataclass(frozen=True)
class Agreed:
    """What a link does at this worker.

    Args:
        portions: in which versions come and are installed.
        forwards: whether workers hand on to one another what they have received.
        audit: makes a ledger of the live weights.
    """

    portions: Sequence[Portion]
    forwards: bool
    audit: Callable[[], Ledger]

    def close(self) -> None:
        """Free what the ways in hold."""
        for portion in self.portions:
            portion.receiver.close()


def agree(channel: Channel, worker: Worker) -> Agreed:
    """Describe a worker, build the plan, compare digests, join the transport.

    Raises:
        Fp8SyncError: the link cannot stand; the trainer has not been told why.
    """
    message = channel.receive("source")
    worker.check_awake()
    recipe = Recipe.from_json(message["recipe"])
    source = Manifest.from_json(message["manifest"])
    layout = describe_engine(worker.model, list(source.tensors.values()), recipe, worker.rank)
    short = memory_short(layout, worker.staging.nbytes, worker.device)
    where = worker.rank, worker.device
    plan, commit = plan_with(
        channel, source, layout.manifest, *where, short=short, requantize=recipe.requantizes
    )
    layout = layout.with_misc_of(plan)
    storages = [list(layout.storages)]
    if commit == "in-place":
        storages = storages_by_portion(layout, message["bucket_bytes"])
    layouts = [layout.only(own) for own in storages]
    _lay_out(worker, layouts)
    channel.send(place(worker.device, storages, _exported(worker), worker.staging.offsets))
    # Trainer ranks open their ways out meanwhile.
    direct, unproven = direct_modules(worker.model, layout, worker.device, worker.dtype)
    choice = channel.receive("transport")
    # Another worker may have more portions; this one receives nothing in them.
    count = max(len(own) for _, own in choice["portions"])
    layouts += [layout.only(())] * (count - len(layouts))
    plans = in_portions(plan, dict(choice["portions"]))
    about = channel, worker.staging, source, layout.manifest
    with ExitStack() as failed:
        receivers = open_receivers(choice, [Intake(*about, own, *where) for own in plans])
        for receiver in receivers:
            failed.callback(receiver.close)
        portions = [
            _portion(worker, number, own, receiver, direct)
            for number, (own, receiver) in enumerate(zip(layouts, receivers, strict=True))
        ]
        processed = sum(portion.process.modules for portion in portions)
        strategies = {"direct": len(direct), "process": processed}
        channel.send({"type": "ready", **strategies, "unproven": unproven})
        failed.pop_all()
    # Made anew for every audit, as it remembers what it read.
    live = partial(LiveWeights, worker.model, layout, direct, worker.device, worker.dtype)
    audit = partial(worker_ledger, live, plan, worker.rank, message["bucket_bytes"])
    return Agreed(portions, bool(choice["forward_bytes"]), audit)


def plan_with(
    channel: Channel,
    source: Manifest,
    wanted: Manifest,
    rank: int,
    device: torch.device,
    *,
    short: str = "",
    requantize: bool = False,
) -> tuple[Plan, str]:
    """Say what a worker wants, build the plan, and compare its digests with the trainer's.

    Args:
        channel: connected to the trainer's link.
        source: the boxes of all trainer ranks.
        wanted: the boxes of this worker.
        rank: its rank.
        device: where its weights are.
        short: why staging does not fit into its memory; empty where it does.
        requantize: as `build_plan`.

    Returns:
        The plan, and how versions are to be installed.
    """
    seat = Seat.at(device).to_json()
    channel.send({"type": "manifest", "manifest": wanted.to_json(), "seat": seat, "short": short})
    plan = build_plan(source, wanted, exchange_amax=True, requantize=requantize)
    said = channel.receive("shared")
    if said["misc"]:
        wanted = with_misc(wanted, said["misc"])
        plan = build_plan(source, wanted, exchange_amax=True, requantize=requantize)
    sharers = from_runs(said["runs"])
    # Not as many as copies: then the plans differ, which is found when they are compared.
    if len(sharers) == len(plan.copies):
        plan = with_forwarding(plan, {rank: sharers})
    mine = {str(rank): plan.digest(rank)}
    channel.send({"type": "plan", "digests": mine})
    agreed = channel.receive("agreed")
    if agreed["digests"] != mine:
        channel.send({"type": "digests", "digests": {str(rank): plan.digests(rank)}})
        channel.receive("error")  # the trainer's, which names the tensor
    return plan, str(agreed["commit"])


def place(
    device: torch.device,
    portions: Sequence[Sequence[str]],
    memory: ExportedMemory | None,
    offsets: dict[str, int],
) -> dict[str, object]:
    """Return the message that says where a worker's bytes go.

    Args:
        device: where its weights are.
        portions: the storages of each portion.
        memory: staging memory that a writer on the same host can map, if there is any.
        offsets: of the storages in it, in bytes.
    """
    return {
        "type": "place",
        "gpu": gpu_id(device),
        "portions": list(portions) if len(portions) > 1 else [],
        "memory": memory.to_json() if memory else None,
        "offsets": offsets if memory else {},
    }


def _lay_out(worker: Worker, layouts: Sequence[EngineLayout]) -> None:
    try:
        worker.staging.lay_out([own.storages for own in layouts])
    except InstallFailed as error:
        raise InstallFailed(f"engine rank {worker.rank}: {error}") from error


def _exported(worker: Worker) -> ExportedMemory | None:
    if worker.device.type != "cuda":
        return None
    try:
        return worker.staging.export()
    except Fp8SyncError as error:
        logger.warning("fp8sync: staging memory cannot be shared: %s", error)
        return None


def _portion(
    worker: Worker, number: int, layout: EngineLayout, receiver: Receiver, direct: Set[str]
) -> Portion:
    staged = worker.staging.views(number) if direct else {}
    return Portion(
        layout,
        receiver,
        DirectInstall(worker.model, direct, staged, worker.device),
        ProcessInstall(worker.model, layout, worker.device, worker.dtype, direct),
    )
