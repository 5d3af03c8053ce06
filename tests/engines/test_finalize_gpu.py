"""What follows the weights, on a GPU with CUDA graphs: MLA's derived weights, KV-cache scales, routers.

Few engines, each with several of these at once: every start takes its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world
from tests.engines.test_kv_scales import held, loaded, scales

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu

GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4],
    },
}
TURNS = ((0, "paired"), (1, "paired"), (0, "misc"), (1, "misc"), (1, "paired"))
"""(model, where scales go): forth and back, and one after the other on the same modules."""


def seen(llm: Any) -> torch.Tensor:
    return torch.cat([world.logprobs(llm), world.decoded_logprobs(llm)])


def addresses(llm: Any) -> dict[str, int]:
    """Where MLA's derived weights lie; captured graphs hold these addresses."""

    def read(model: torch.nn.Module) -> dict[str, int]:
        return {
            f"{name}.{derived}": getattr(module, derived).data_ptr()
            for name, module in model.named_modules()
            for derived in ("W_UV", "W_UK_T")
            if hasattr(module, derived)
        }

    (found,) = llm.apply_model(read)
    return found


def told(kind: str, where: str, report: fp8sync.RefitReport) -> None:
    spent = {stage: round(1e3 * s, 2) for stage, s in report.seconds.items()}
    print(f"{kind} scales={where}: pause {1e3 * report.pause_s:.2f} ms, ms by stage {spent}")


def test_mla_follows_its_weights(tmp_path: Path) -> None:
    """Tiny DeepSeek-V3: W_UV and W_UK_T are derived anew, at their old addresses."""
    models = [world.tiny_model("mla", seed) for seed in (1, 2)]
    fresh = world.start_engine(world.write_checkpoint(models[1], tmp_path / "1", "pow2"), **GRAPHS)
    expected = seen(fresh)
    world.stop_engine(fresh)
    del fresh
    folder = world.write_config(models[0], tmp_path / "config")
    live = world.start_engine(folder, load_format="dummy", **GRAPHS)
    before = addresses(live)
    assert len(before) == 4
    for turn, where in TURNS:
        report = fp8sync.refit(models[turn], live, "blockwise-pow2", scales=where)
        told("mla", where, report)
        assert addresses(live) == before
        difference = (seen(live) - expected).abs().max().item()
        assert (difference == 0.0) == (turn == 1)
    del live
    world.forget_engines()


def test_quantized_router_tied_embeddings_and_kv_scales(tmp_path: Path) -> None:
    changes = {"num_experts": 64, "tie_word_embeddings": True}
    models = [world.tiny_model("moe", seed, **changes) for seed in (1, 2)]
    options = GRAPHS | {"kv_cache_dtype": "fp8", "attention_backend": "FLASH_ATTN"}
    checkpoint = world.write_checkpoint(
        models[1], tmp_path / "1", "pow2", router=True, kv_scales=scales(1)
    )
    fresh = world.start_engine(checkpoint, **options)
    assert held(fresh) == loaded(scales(1))
    expected = seen(fresh)
    world.stop_engine(fresh)
    del fresh
    folder = world.write_config(models[0], tmp_path / "config", router=True)
    live = world.start_engine(folder, load_format="dummy", **options)
    for turn, where in TURNS:
        report = fp8sync.refit(
            models[turn], live, "blockwise-pow2", kv_scales=scales(turn), scales=where
        )
        told("router, tied, kv", where, report)
        routers = [t for t in report.tensors if t.name.endswith(".mlp.gate.weight")]
        assert {t.encoding for t in routers} == {"blockwise"}
        assert held(live) == loaded(scales(turn))
        difference = (seen(live) - expected).abs().max().item()
        assert (difference == 0.0) == (turn == 1)
    fp8sync.refit(models[1], live, "blockwise-pow2")  # no scales sent: the engine keeps its own
    assert (seen(live) - expected).abs().max().item() == 0.0
    del live
    world.forget_engines()
