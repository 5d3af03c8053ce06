"""`vllm serve`, over the HTTP routes that it has with VLLM_SERVER_DEV_MODE=1."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from fp8sync.engines.vllm.answers import in_thread
from fp8sync.engines.vllm.compat import number_of_label
from fp8sync.engines.vllm.handle import Handle, check_emptied
from fp8sync.engines.vllm.prefixes import HAVE_BEGUN
from fp8sync.errors import EngineLost, Fp8SyncError, TransferTimeout, UnsupportedLayout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8sync.engines.vllm.handle import InFlight

__all__ = ["Server"]

_ASK_S = 30.0
_REST_S = 1.0
"""The longest time for which a server goes on before it is paused again, for requests that have begun."""
_HEALTH_S = 2.0
"""How often a server that has not answered yet is asked whether it lives."""


class Server(Handle):
    """A server started with `--weight-transfer-config '{"backend": "fp8sync"}'`.

    Whoever reaches these routes can change the weights: keep them on loopback or behind a proxy.

    Args:
        url: `http://host:port`, or https, and a path where a gateway has several servers.
        headers: sent with every call, for a proxy in front of the server.

    Raises:
        ValueError: not such a URL.
        EngineLost, TransferTimeout: nobody is there, or nobody answers within 30 s.
        UnsupportedLayout: the server has no weight-transfer routes.
        Fp8SyncError: it answers with another error, or not as vLLM does.

    Examples:
        >>> server = Server(
        ...     "https://rollout.example:8000", {"Authorization": secret}
        ... )  # doctest: +SKIP
        >>> fp8sync.connect(model, server, host="10.0.0.7").refit()  # doctest: +SKIP
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or parts.hostname is None:
            raise ValueError(f"expected http://host:port, found {url!r}")
        self._prefix = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self._parts, self._headers = parts, dict(headers or {})
        self.timeout_s = _ASK_S
        self._seen = 0.0
        status, body = self._ask("GET", "/get_world_size")
        if status == HTTPStatus.NOT_FOUND:
            raise UnsupportedLayout(
                f"{self.url} has no weight-transfer routes: start it with VLLM_SERVER_DEV_MODE=1"
            )
        workers = self._good("/get_world_size", status, body).get("world_size")
        if not isinstance(workers, int):
            raise _unexpected(f"{self.url}/get_world_size", "its world_size", body)
        super().__init__(self.url, workers)
        status, body = self._ask("GET", "/get_world_size?include_dp=false")
        size = self._good("/get_world_size", status, body).get("world_size")
        self.replicas = workers // size if isinstance(size, int) and size else 1

    def check_host(self, host: str) -> None:
        """A server elsewhere cannot reach a rendezvous on this host's loopback."""
        if _is_loopback(host) and not _is_loopback(self._parts.hostname or ""):
            raise UnsupportedLayout(
                f"the rendezvous binds {host}, which {self.url} cannot reach: "
                "pass connect(host=...) with an address of this host"
            )

    def check_held(self) -> None:
        if count := self._begun():
            raise Fp8SyncError(
                f"{self.url} is paused, with in_flight='wait': expected no requests in flight that have begun, "
                f"found {count}; let it go on before the refit, or choose in_flight='keep' or 'abort'"
            )

    def initialize(self, info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": info})

    def start(self) -> None:
        self._post("/start_weight_update", {})  # 0.24 wants a body

    def update(self, version: int, *, renew: bool = False) -> None:
        self._post("/update_weights", {"update_info": self.note_update(version, renew)})

    def finish(self) -> None:
        self._post("/finish_weight_update")

    def pause(self, in_flight: InFlight, *, once: bool) -> float:  # noqa: ARG002  (its caches are not known)
        # With `wait`, as often as requests are left that have begun: those that vLLM has preempted.
        ends, rest_s = time.monotonic() + self.patience_s, 0.01
        while True:
            # vLLM would have requests that are kept computed again.
            self._post("/pause", mode=in_flight, clear_cache=str(in_flight != "keep").lower())
            since = time.perf_counter()
            if in_flight != "wait" or not self._begun():
                return since
            if time.monotonic() > ends:
                raise TransferTimeout(
                    f"{self.url} did not end all requests that have begun within {self.patience_s:g} s: choose "
                    "in_flight='abort' or a longer timeout_s"
                )
            self._post("/resume")
            rest_s = min(2 * rest_s, _REST_S)
            time.sleep(rest_s)

    def _begun(self) -> int:
        """Return how many requests have begun, of one of its engines that has some; vLLM's metrics lag behind."""
        path = "/init_weight_transfer_engine"
        status, body = self._watched("POST", path, {"init_info": {"begun": True}})
        if status != HTTPStatus.OK and (said := re.search(rf"(\d+) {HAVE_BEGUN}", _text(body))):
            return int(said[1])
        self._good(path, status, body)
        return 0

    def resume(self) -> None:
        self._post("/resume")

    def paused(self) -> bool:
        status, body = self._watched("GET", "/is_paused")
        return bool(self._good("/is_paused", status, body).get("is_paused"))

    def reset_caches(self, in_flight: InFlight, *, stale: bool) -> None:
        if stale or not self._renews:
            recompute = str(in_flight == "keep").lower()
            answer = self._post(
                "/reset_prefix_cache", reset_running_requests=recompute, reset_external="true"
            )
            check_emptied(lambda: answer.get("success"))
        if in_flight == "keep":  # else it went when the server was paused
            self._post("/reset_encoder_cache")

    def last_label(self) -> int:
        path = "/weight_info"
        status, body = self._watched("GET", path)
        if status == HTTPStatus.NOT_FOUND:
            return 0
        return number_of_label(str(self._good(path, status, body).get("weight_version")))

    def label(self, version: str) -> bool:
        path = "/update_weight_version"
        status, body = self._watched("POST", path, {"new_version": version})
        if status == HTTPStatus.NOT_FOUND:
            return False
        self._good(path, status, body)
        return True

    def _post(self, path: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        target = f"{path}?{urlencode(query)}" if query else path
        return self._good(path, *self._watched("POST", target, body))

    def _watched(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        """Return status and body; a server whose engine has died may leave a call unanswered for ever."""
        answer = in_thread(lambda: self._exchange(method, target, body, self.patience_s))
        return self.answered(answer, target.partition("?")[0], self._is_dead)

    def _is_dead(self) -> bool:
        if time.monotonic() - self._seen < _HEALTH_S:
            return False
        try:
            status, _ = self._ask("GET", "/health", timeout_s=_HEALTH_S)
        except TransferTimeout:
            return False  # busy
        except EngineLost:
            return True
        self._seen = time.monotonic()
        return status != HTTPStatus.OK

    def _good(self, path: str, status: int, body: bytes) -> dict[str, Any]:
        if status == HTTPStatus.OK:
            return _parsed(f"{self.url}{path}", body) if body else {}
        self._seen = 0.0
        if self._is_dead():
            raise EngineLost(f"the engine of {self.url} died during {path}")
        raise Fp8SyncError(f"{self.url}{path} answered {status}: {_text(body)}")

    def _ask(self, method: str, target: str, timeout_s: float | None = None) -> tuple[int, bytes]:
        """Return status and body within the limit, also if the server goes on sending, bit by bit."""
        limit_s = timeout_s or self.timeout_s
        answer = in_thread(lambda: self._exchange(method, target, None, limit_s))
        try:
            return answer.result(limit_s)
        except FutureTimeout:
            text = f"{self.url} did not answer {target} within {limit_s:g} s"
            raise TransferTimeout(text) from None

    def _exchange(self, method: str, target: str, body: Any, limit_s: float) -> tuple[int, bytes]:
        parts = self._parts
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", **self._headers}
        data = None if body is None else json.dumps(body).encode()
        with closing(connect(parts.hostname or "", parts.port, timeout=limit_s)) as connection:
            try:
                connection.request(method, self._prefix + target, data, headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except TimeoutError as error:
                text = f"{self.url} did not answer {target} within {limit_s:g} s"
                raise TransferTimeout(text) from error
            except (OSError, http.client.HTTPException) as error:
                raise EngineLost(f"{self.url} is gone during {target}: {error}") from error


def _parsed(url: str, body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise _unexpected(url, "a JSON object", body)
    return answer


def _unexpected(url: str, expected: str, body: bytes) -> Fp8SyncError:
    return Fp8SyncError(f"{url} answered 200: expected {expected}, found {_text(body)}")


def _text(body: bytes) -> str:
    return body.decode(errors="replace").strip()[:500]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False
