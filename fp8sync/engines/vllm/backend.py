"""fp8sync as a vLLM weight-transfer backend, driven by vLLM's own four calls.

`init_weight_transfer_engine` joins the trainer's link, `start_weight_update` opens a version and
begins to receive, `update_weights` waits for the bytes, `finish_weight_update` installs them. The
calls return nothing; all answers go over the control channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from fp8sync.collector import uncollected
from fp8sync.control import Channel
from fp8sync.engines.vllm.agreement import Worker
from fp8sync.engines.vllm.compat import asleep, engine_commit, unreached, worker_rank
from fp8sync.engines.vllm.early import backend_arguments
from fp8sync.engines.vllm.kv_cache import caching_modules, restore_scales, watch_scales
from fp8sync.engines.vllm.portions import Installed
from fp8sync.engines.vllm.session import WorkerSession
from fp8sync.engines.vllm.staging import Staging, reserved_bytes
from fp8sync.errors import RefitInProgress, UnsupportedLayout
from fp8sync.sending.usual import compile_taking

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["Fp8SyncInitInfo", "Fp8SyncUpdateInfo", "Fp8SyncWeightTransferEngine"]


@dataclass
class Fp8SyncInitInfo(WeightTransferInitInfo):
    """Where the trainer's link listens, the token that lets a worker in, and its engine's first rank.

    `owner` is what others are told who want to refit the engine meanwhile. With `woken` there is no link to join: vLLM
    has woken the KV cache, whose scales are put back. `renews` comes from the engine's own process, which answers
    `begun` by itself (`prefixes.py`).
    """

    host: str = ""
    port: int = 0
    token: str = ""
    timeout_s: float = 0.0
    first_rank: int = 0
    owner: str = ""
    woken: bool = False
    begun: bool = False
    renews: bool = False


@dataclass
class Fp8SyncUpdateInfo(WeightTransferUpdateInfo):
    """The version being sent; the worker knows everything else from the plan.

    `renew` is for the engine's own process, which takes it out (`prefixes.py`).
    """

    version: int
    renew: bool = False


class Fp8SyncWeightTransferEngine(WeightTransferEngine[Fp8SyncInitInfo, Fp8SyncUpdateInfo]):
    """The worker's end of fp8sync, made by vLLM in `load_model`."""

    init_info_cls = Fp8SyncInitInfo
    update_info_cls = Fp8SyncUpdateInfo
    supports_draft_weight_update = False
    _session: WorkerSession | None = None
    _channel: Channel | None = None
    _owner = ""
    _updating = False
    """Whether vLLM takes an update for open, also after the trainer that opened it has died."""

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        """Reserve staging memory, and load kernels; vLLM sizes its KV cache afterwards."""
        super().__init__(*backend_arguments(config, vllm_config, device, model))
        # Which 0.24's base class does not keep.
        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.device = device
        with set_current_vllm_config(vllm_config):
            watch_scales(model)
        nbytes = reserved_bytes(model, engine_commit(vllm_config))
        self._staging = Staging(device, nbytes if device.type == "cuda" else 0)
        self._installed = Installed()
        compile_taking(device)

    def init_transfer_engine(self, init_info: Fp8SyncInitInfo) -> None:
        """Join a link and agree on a plan; an earlier link is left, unless it is refitting."""
        if init_info.begun:
            raise RuntimeError(
                "fp8sync: the engine's process does not say which requests have begun"
            )
        if init_info.woken:
            restore_scales(caching_modules(self.model))
            return
        info = init_info
        channel = Channel.connect(info.host, info.port, info.token, info.timeout_s)
        rank = info.first_rank + worker_rank(self.parallel_config)
        if why := unreached(self.parallel_config):  # a server's config is not served
            text = f"engine rank {rank}: {why}"
            channel.send({"type": "error", "error": UnsupportedLayout(text).to_wire()})
            channel.close()
            return
        busy = self._session is not None and self._session.busy
        installed = self._installed
        if not busy:
            self.shutdown()  # first, so that its link sees at once that it is left
            if asleep():  # who put it to sleep since lets it go on
                installed.stopped = ""
        found = {"mixed": installed.mixed, "stopped": installed.stopped}
        found |= {"updating": self._updating, "renews": info.renews}
        channel.send({"type": "join", "role": "engine", "rank": rank, **found})
        if busy:
            text = f"engine rank {rank} is being refitted by {self._owner}"
            channel.send({"type": "error", "error": RefitInProgress(text).to_wire()})
            channel.close()
            return
        self._owner, self._channel = info.owner, channel
        channel.heed = installed.heed
        where = self._staging, self.device, self.model_config.dtype
        session = WorkerSession(channel, Worker(self.model, rank, *where), installed)
        # 0.25 does not set the current config around these calls; later versions do.
        with set_current_vllm_config(self.vllm_config), uncollected():
            if session.agree():
                self._session = session
            else:
                session.close()

    def start_weight_update(self) -> None:
        """Open a version and begin to receive."""
        self._open_session().start()
        self._updating = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Wait for a version, as the base class does, but not for the GPU: it is at the engine's own steps."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Fp8SyncUpdateInfo) -> None:
        """Wait until the version is staged and verified."""
        if update_info.renew:
            raise RuntimeError("fp8sync: the engine's process does not renew its prefix cache")
        self._open_session().wait_received()

    def finish_weight_update(self) -> None:
        """Install the version, or leave the old weights: as the link decides."""
        self._updating = False
        with set_current_vllm_config(self.vllm_config), uncollected():
            self._open_session().finish()

    def shutdown(self) -> None:
        """Leave the link, once what it has said is heeded."""
        if self._channel is not None:
            self._channel.drain()
            self._channel = None
        if self._session is not None:
            self._session.close()
            self._session = None

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Not used: `fp8sync.refit` is the trainer's side."""
        raise NotImplementedError("call fp8sync.refit(model, engine) in the trainer")

    def _open_session(self) -> WorkerSession:
        if self._session is None:
            raise RuntimeError("fp8sync: no link; call fp8sync.connect(model, engine) first")
        return self._session
