"""KV-cache scales against what attention is really given, in a tiny Hugging Face model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fp8sync
from tests.engines import world

SEEN: dict[str, list[torch.Tensor]] = defaultdict(list)


def spy(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any):
    """Attention as usual; keys and values as they come to it, after norms and rotation."""
    for kind, tensor in (("k", key), ("v", value)):
        name = f"model.layers.{module.layer_idx}.self_attn.attn.{kind}_scale"
        SEEN[name].append(tensor.abs().amax((1, 3)).float())
    return sdpa_attention_forward(module, query, key, value, *args, **kw)


AttentionInterface.register("spy", spy)


@pytest.fixture
def model() -> Any:
    SEEN.clear()
    made = world.tiny_model("dense", 1).cpu()
    made.set_attn_implementation("spy")
    return made


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 256, (2, n), generator=generator) for n in (16, 24)]


def rounds_up_to(exact: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `scale` is the least BF16 value that is not below `exact`."""
    below = (scale.to(torch.bfloat16).view(torch.int16) - 1).view(torch.bfloat16).float()
    return bool(scale.to(torch.bfloat16).float() == scale and below < exact <= scale)


@pytest.mark.parametrize(("percentile", "margin"), [(100.0, 1.0), (90.0, 1.5)])
def test_scales_are_those_of_what_attention_sees(
    model: Any, percentile: float, margin: float
) -> None:
    found = fp8sync.calibrate_kv(model, batches(), percentile=percentile, margin=margin)
    assert set(found) == set(SEEN)
    assert len(found) == 4
    for name, scale in found.items():
        assert (scale.shape, scale.dtype) == ((), torch.float32)
        tokens = torch.cat([t.flatten() for t in SEEN[name]])
        assert tokens.numel() == 2 * 16 + 2 * 24
        assert rounds_up_to(torch.quantile(tokens, percentile / 100) * margin / 448, scale)


def test_hidden_tokens_do_not_count(model: Any) -> None:
    (first, _) = batches()
    mask = torch.ones_like(first)
    mask[:, :5] = 0
    found = fp8sync.calibrate_kv(model, [{"input_ids": first, "attention_mask": mask}])
    for name, scale in found.items():
        (tokens,) = SEEN[name]
        assert rounds_up_to(tokens[:, 5:].max() / 448, scale)


@pytest.mark.parametrize("masked", [False, True])
def test_a_window_forgets_no_token(masked: bool) -> None:
    SEEN.clear()
    kinds = ["full_attention", "sliding_attention"]
    model = world.tiny_model(
        "dense", 1, sliding_window=8, use_sliding_window=True, layer_types=kinds
    )
    model = model.cpu()
    model.set_attn_implementation("spy")
    (_, long) = batches()
    mask = torch.ones_like(long)
    mask[:, 20:] = 0
    given = {"input_ids": long, "attention_mask": mask} if masked else {"input_ids": long}
    found = fp8sync.calibrate_kv(model, [given])
    assert len(found) == 4
    for name, scale in found.items():
        (tokens,) = SEEN[name]
        assert tokens.shape == (2, 24)
        assert rounds_up_to(tokens[:, : 20 if masked else 24].max() / 448, scale)


def test_a_model_that_is_being_trained() -> None:
    """Neither dropout nor gradient checkpointing counts, and each module goes on in its mode."""
    model = world.tiny_model("dense", 1, attention_dropout=0.5).cpu().eval()
    expected = fp8sync.calibrate_kv(model, batches())
    model.gradient_checkpointing_enable()
    model.train()
    model.lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    found = fp8sync.calibrate_kv(model, batches())
    assert found == expected
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_any_number_of_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own quantile refuses more than 2^24."""
    tokens = {"a.attn.k_scale": torch.arange((1 << 24) + 1, dtype=torch.float32)}
    monkeypatch.setattr("fp8sync.calibrate.kv.largest_cached", lambda *_: tokens)
    (scale,) = fp8sync.calibrate_kv(model, batches(), percentile=50.0).values()
    assert rounds_up_to(torch.tensor(float(1 << 23)) / 448, scale)


def test_what_makes_no_sense_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no batches"):
        fp8sync.calibrate_kv(model, [])
    with pytest.raises(ValueError, match="percentile 0"):
        fp8sync.calibrate_kv(model, batches(), percentile=0)
    latent = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            kv_lora_rank=16,
        )
    )
    with pytest.raises(fp8sync.UnsupportedLayout, match="MLA"):
        fp8sync.calibrate_kv(latent, batches())
