"""vLLM as a destination: boxes traced from its loaders, weights installed by its own processing.

Only the handles (`handle`, `offline`, `online`, `server`, `fleet`) are imported in the trainer; everything else
runs inside vLLM's workers.
"""

from typing import Any

from fp8sync.engines.vllm.environment import without_torchrun
from fp8sync.engines.vllm.fleet import Fleet
from fp8sync.engines.vllm.handle import Handle, InFlight, check_in_flight
from fp8sync.engines.vllm.offline import LLMHandle
from fp8sync.engines.vllm.online import AsyncHandle
from fp8sync.engines.vllm.server import Server
from fp8sync.errors import UnsupportedLayout

__all__ = [
    "AsyncHandle",
    "Fleet",
    "Handle",
    "InFlight",
    "LLMHandle",
    "Server",
    "as_engine",
    "check_in_flight",
    "without_torchrun",
]


def as_engine(engine: Any) -> Handle:
    """Return a handle for an engine.

    Args:
        engine: a `vllm.LLM`, an `AsyncLLM`, the URL of a server, a handle, or a list of these.

    Raises:
        UnsupportedLayout: not an engine that fp8sync can drive.
    """
    if isinstance(engine, Handle):
        return engine
    if isinstance(engine, (list, tuple)) and engine:
        handles = [as_engine(each) for each in engine]
        return Fleet(handles) if len(handles) > 1 else handles[0]
    if isinstance(engine, str):
        return Server(engine)
    if hasattr(engine, "llm_engine"):
        return LLMHandle(engine)
    if hasattr(engine, "pause_generation"):
        return AsyncHandle(engine)
    raise UnsupportedLayout(
        f"cannot refit a {type(engine).__name__}: expected a vllm.LLM, an AsyncLLM or a server's URL"
    )
