"""The layouts on paper hold what real ranks hold: chunks and concatenations, written down plainly."""

from __future__ import annotations

import pytest
import torch

from fp8sync.layouts import EngineLayout, TrainerLayout, manifest
from fp8sync.layouts.grid import Grid
from tests.layouts import wire
from tests.layouts.cases import DEEP, FEW_KV, FIVE, LATENT, LLAMA, MOE, QWEN, THREE, dense

ATTENTION = "model.layers.0.self_attn."
MLP = "model.layers.0.mlp."


def held(layout, model):
    sides = manifest(layout, model)
    tensors = wire.random_tensors(sides)
    return sides, tensors, wire.storages(sides, tensors)


@pytest.mark.parametrize(
    ("model", "tp"), [(QWEN, 1), (QWEN, 2), (THREE, 3), (FEW_KV, 2), (FEW_KV, 4), (FEW_KV, 8)]
)
def test_megatron_fuses_by_query_group(model, tp: int) -> None:
    _, tensors, ranks = held(TrainerLayout(tp=tp), model)
    q, k, v = (tensors[f"{ATTENTION}{n}_proj.weight"] for n in "qkv")
    groups = [x.view(model.kv_heads, -1, model.hidden) for x in (q, k, v)]
    fused = torch.cat(groups, dim=1).reshape(-1, model.hidden)
    for rank, local in enumerate(fused.chunk(tp)):
        found = ranks[rank][ATTENTION + "linear_qkv.weight"]
        assert torch.equal(found.view(-1, model.hidden), local)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_megatron_keeps_gate_and_up_of_a_rank_together(tp: int) -> None:
    _, tensors, ranks = held(TrainerLayout(tp=tp), QWEN)
    gate, up, down = (tensors[f"{MLP}{n}_proj.weight"] for n in ("gate", "up", "down"))
    for rank in range(tp):
        fused = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        assert torch.equal(ranks[rank][MLP + "linear_fc1.weight"].view_as(fused), fused)
        cut = down.chunk(tp, dim=1)[rank]
        assert torch.equal(ranks[rank][MLP + "down_proj.weight"].view_as(cut), cut)


@pytest.mark.parametrize(("model", "tp"), [(QWEN, 2), (QWEN, 4), (FEW_KV, 4), (FEW_KV, 8)])
def test_vllm_repeats_kv_heads_and_fuses_qkv(model, tp: int) -> None:
    _, tensors, ranks = held(EngineLayout(tp=tp, formula=None), model)
    q, k, v = (tensors[f"{ATTENTION}{n}_proj.weight"] for n in "qkv")
    repeats = max(1, tp // model.kv_heads)
    for rank in range(tp):
        parts = [q.chunk(tp)[rank]]
        parts += [x.chunk(tp // repeats)[rank // repeats] for x in (k, v)]
        fused = torch.cat(parts)
        assert torch.equal(ranks[rank][ATTENTION + "qkv_proj.weight"].view_as(fused), fused)


def test_vllm_pads_the_vocabulary() -> None:
    """1000 rows on 4 ranks: 1024 after padding, 256 a rank, 232 on the last."""
    model = dense(vocabulary=1000)
    sides, tensors, ranks = held(EngineLayout(tp=4, formula=None), model)
    rows = [
        box.shape[0]
        for boxes in sides.ranks.values()
        for box in boxes
        if box.tensor == "lm_head.weight"
    ]
    assert rows == [256, 256, 256, 232]
    assert torch.equal(
        torch.cat([ranks[r]["lm_head.weight"].view(-1, model.hidden) for r in range(4)]),
        tensors["lm_head.weight"],
    )


def test_vllm_deals_five_experts_unevenly() -> None:
    _, tensors, ranks = held(EngineLayout(tp=2, expert_parallel=True, formula=None), FIVE)
    stacks = [[0, 1, 2], [3, 4]]
    prefix = MLP + "experts"
    for rank, experts in enumerate(stacks):
        gate_up = torch.stack(
            [
                torch.cat([tensors[f"{prefix}.{e}.{n}_proj.weight"] for n in ("gate", "up")])
                for e in experts
            ]
        )
        assert torch.equal(ranks[rank][prefix + ".w13_weight"].view_as(gate_up), gate_up)
        down = torch.stack([tensors[f"{prefix}.{e}.down_proj.weight"] for e in experts])
        assert torch.equal(ranks[rank][prefix + ".w2_weight"].view_as(down), down)


def test_vllm_deals_in_turn() -> None:
    sides = manifest(EngineLayout(dp=2, expert_parallel=True, round_robin=True), FIVE)
    owners = {
        rank: {int(b.tensor.split(".")[5]) for b in boxes if ".experts." in b.tensor}
        for rank, boxes in sides.ranks.items()
    }
    assert owners == {0: {0, 2, 4}, 1: {1, 3}}


def test_dense_and_expert_grids_differ() -> None:
    """Eight ranks as Megatron's own rank generator lays them out."""
    layout = TrainerLayout(tp=2, dp=4, ep=4, etp=1)
    assert layout.dense.ranks(tp=0) == (0, 2, 4, 6)
    assert layout.expert.ranks(ep=1) == (1, 5)
    assert TrainerLayout(tp=4, dp=2, ep=2, etp=4).expert.ranks(ep=0) == (0, 1, 2, 3)
    assert TrainerLayout(tp=4, dp=2, ep=2, etp=4).expert.ranks(tp=0) == (0, 4)
    layout = TrainerLayout(tp=2, dp=2, ep=2, etp=2, cp=2)
    assert [layout.expert.ranks(tp=0, ep=e) for e in range(2)] == [(0, 4), (2, 6)]
    layout = TrainerLayout(tp=2, pp=2, dp=2, ep=4, etp=1)
    assert layout.dense.ranks(tp=0, dp=0) == (0, 4)
    assert layout.expert.ranks(pp=1) == (4, 5, 6, 7)


def test_stages_may_be_uneven_and_virtual() -> None:
    sides = manifest(TrainerLayout(pp=2, stages=(1, 2)), DEEP)
    layers = {
        r: {b.tensor.split(".")[2] for b in bs if "layers" in b.tensor}
        for r, bs in sides.ranks.items()
    }
    assert layers == {0: {"0"}, 1: {"1", "2"}}
    model = dense(layers=5)
    sides = manifest(TrainerLayout(pp=2, vpp=2, stages=(1, 2, 1, 1)), model)
    layers = {
        r: {b.tensor.split(".")[2] for b in bs if "layers" in b.tensor}
        for r, bs in sides.ranks.items()
    }
    assert layers == {0: {"0", "3"}, 1: {"1", "2", "4"}}
    assert {b.tensor for b in sides.ranks[1]} >= {"model.norm.weight", "lm_head.weight"}


def test_tied_embeddings_are_on_both_ends_of_the_pipeline() -> None:
    for layout in (TrainerLayout(pp=2), EngineLayout(pp=2)):
        sides = manifest(layout, LLAMA)
        for boxes in sides.ranks.values():
            assert "model.embed_tokens.weight" in {b.tensor for b in boxes}
        assert "lm_head.weight" not in sides.tensors


def test_fsdp_cuts_as_torch_chunk_does() -> None:
    for dim, tensor in ((0, ATTENTION + "q_proj.weight"), (1, MLP + "down_proj.weight")):
        layout = TrainerLayout(dp=3, fsdp=3, fsdp_dim=dim)
        _, tensors, ranks = held(layout, QWEN)
        for rank, local in enumerate(tensors[tensor].chunk(3, dim=dim)):
            assert torch.equal(ranks[rank][tensor].view_as(local), local)


def test_fsdp_cuts_what_tensor_parallelism_left() -> None:
    _, tensors, ranks = held(TrainerLayout(tp=2, dp=3, fsdp=3), QWEN)
    name = ATTENTION + "o_proj.weight"
    for rank in range(6):
        local = tensors[name].chunk(2, dim=1)[rank % 2].chunk(3)[rank // 2]
        assert torch.equal(ranks[rank][name].view_as(local), local)


def test_latent_attention_has_a_ragged_block() -> None:
    sides, tensors, ranks = held(EngineLayout(formula=None), LATENT)
    names = [ATTENTION + n for n in ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")]
    fused = torch.cat([tensors[n] for n in names])
    assert sides.tensors[names[1]].shape[0] == 576
    assert torch.equal(ranks[0][ATTENTION + "fused_qkv_a_proj.weight"].view_as(fused), fused)


def test_every_rank_holds_its_share_once() -> None:
    grid = Grid((("tp", 2), ("dp", 3), ("pp", 2)))
    assert sorted(grid.ranks(tp=0) + grid.ranks(tp=1)) == list(range(grid.size))
    with pytest.raises(ValueError, match="no axis named ep"):
        grid.ranks(ep=0)
    sides = manifest(TrainerLayout(tp=2, dp=2, ep=4, etp=1), MOE)
    experts = [b.tensor for boxes in sides.ranks.values() for b in boxes if ".experts." in b.tensor]
    assert len(experts) == len(set(experts)) == MOE.experts * 3
