"""vLLM as a destination: boxes traced from its loaders, weights installed by its own processing.

Only `handle` is imported in the trainer; everything else runs inside vLLM's workers.
"""

from fp8sync.engines.vllm.handle import LLMHandle, as_engine

__all__ = ["LLMHandle", "as_engine"]
