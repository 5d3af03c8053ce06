"""Tiny models and the layouts between which they travel."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fp8sync.layouts import EngineLayout, ModelShape, TrainerLayout
from fp8sync.recipe import Formula

T, E = TrainerLayout, EngineLayout


def dense(**changes: int | bool) -> ModelShape:
    numbers = {
        "layers": 1,
        "hidden": 128,
        "intermediate": 512,
        "vocabulary": 512,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 128,
        "qk_norm": True,
    }
    return ModelShape(**(numbers | changes))


QWEN = dense()
DEEP = dense(layers=3, intermediate=256)
WIDE = dense(hidden=384)
LLAMA = dense(layers=2, qk_norm=False, tied=True)
BIASED = dense(qk_norm=False, qkv_bias=True, kv_heads=2, heads=8)
FEW_KV = dense(kv_heads=2, heads=8)
THREE = dense(heads=3, kv_heads=3, hidden=192, intermediate=768, vocabulary=1000)
SIX = dense(heads=6, kv_heads=6, intermediate=768)
EXPERTS = {"layers": 2, "heads": 2, "kv_heads": 2, "intermediate": 256}
MOE = dense(
    **(EXPERTS | {"heads": 4, "kv_heads": 4}), experts=8, expert_intermediate=256, dense_layers=1
)
FIVE = dense(**EXPERTS, experts=5, expert_intermediate=128)
RAGGED_MOE = dense(**EXPERTS, experts=4, expert_intermediate=192, dense_layers=1)
HEAD_64 = dense(head_dim=64, heads=8, kv_heads=4)
HEAD_80 = dense(head_dim=80, heads=8, kv_heads=8, hidden=320)
HEAD_192 = dense(head_dim=192, heads=4, kv_heads=2)
LATENT = ModelShape(
    layers=2,
    hidden=128,
    intermediate=256,
    vocabulary=512,
    heads=4,
    kv_heads=4,
    head_dim=128,
    experts=4,
    expert_intermediate=128,
    shared_intermediate=256,
    dense_layers=1,
    correction_bias=True,
    q_lora_rank=256,
    kv_lora_rank=512,
    rope_dim=64,
    value_dim=128,
)
"""As DeepSeek-V3: kv_a_proj_with_mqa has 512 + 64 = 576 rows, the last block ragged."""


@dataclass(frozen=True)
class Case:
    """A model, a trainer, an engine, and what is to be noticed of the plan."""

    model: ModelShape
    trainer: TrainerLayout
    engine: EngineLayout
    amax: bool = False
    misc: bool = False


PAIRS: dict[str, Case] = {
    # One to one, and tensor parallelism on either side.
    "1-1": Case(QWEN, T(), E()),
    "1-tp2": Case(QWEN, T(), E(tp=2)),
    "1-tp4": Case(QWEN, T(), E(tp=4)),
    "tp2-1": Case(QWEN, T(tp=2), E()),
    "tp2-tp2": Case(QWEN, T(tp=2), E(tp=2)),
    "tp4-tp4": Case(QWEN, T(tp=4), E(tp=4)),
    "tp2-tp4": Case(QWEN, T(tp=2), E(tp=4)),
    "tp4-tp2": Case(QWEN, T(tp=4), E(tp=2)),
    "tp4-1": Case(QWEN, T(tp=4), E()),
    "tp3-1": Case(THREE, T(tp=3), E()),
    "tp3-tp3": Case(THREE, T(tp=3), E(tp=3)),
    "tp3-tp2": Case(SIX, T(tp=3), E(tp=2)),
    "tp2-tp3": Case(SIX, T(tp=2), E(tp=3)),
    "vocab1000-1-tp4": Case(dense(vocabulary=1000), T(), E(tp=4)),
    "vocab1000-tp4-tp4": Case(dense(vocabulary=1000), T(tp=4), E(tp=4)),
    "vocab1000-tp2-tp8": Case(
        dense(vocabulary=1000, heads=8, kv_heads=8, intermediate=1024), T(tp=2), E(tp=8)
    ),
    "unfused-tp2-tp2": Case(QWEN, T(tp=2, fused=False), E(tp=2)),
    # Fewer KV heads than ranks.
    "kv2-tp1-tp4": Case(FEW_KV, T(), E(tp=4)),
    "kv2-tp2-tp4": Case(FEW_KV, T(tp=2), E(tp=4)),
    "kv2-tp4-tp4": Case(FEW_KV, T(tp=4), E(tp=4)),
    "kv2-tp4-1": Case(FEW_KV, T(tp=4), E()),
    "kv1-tp2-tp2": Case(dense(kv_heads=1, heads=4), T(tp=2), E(tp=2)),
    # Context, pipeline and data parallelism.
    "cp2-tp2": Case(QWEN, T(cp=2), E(tp=2)),
    "tp2.cp2-tp2": Case(QWEN, T(tp=2, cp=2), E(tp=2)),
    "dp4-1": Case(QWEN, T(dp=4), E()),
    "dp3-dp2": Case(QWEN, T(dp=3), E(dp=2)),
    "pp3-1": Case(DEEP, T(pp=3), E()),
    "pp2uneven-tp2": Case(DEEP, T(pp=2, stages=(2, 1)), E(tp=2)),
    "pp2.vpp2uneven-1": Case(
        dense(layers=5, intermediate=256), T(pp=2, vpp=2, stages=(1, 2, 1, 1)), E()
    ),
    "pp2.tp2-pp3": Case(DEEP, T(pp=2, tp=2), E(pp=3)),
    "pp2-pp2.tp2": Case(DEEP, T(pp=2), E(pp=2, tp=2)),
    "pp2tied-pp2": Case(LLAMA, T(pp=2), E(pp=2)),
    "pp2tied.dp2-1": Case(LLAMA, T(pp=2, dp=2), E()),
    "order-pp-first": Case(DEEP, T(tp=2, pp=2, dp=2, order="tp-pp-cp-ep-dp"), E(tp=2)),
    "dp2-engines3": Case(QWEN, T(dp=2), E(engines=3)),
    "tp2-engines2.tp2": Case(QWEN, T(tp=2), E(tp=2, engines=2)),
    # Experts: two rank grids, dealt evenly or not.
    "moe-1-1": Case(MOE, T(), E()),
    "moe-ep2-ep2": Case(MOE, T(dp=2, ep=2), E(dp=2, expert_parallel=True)),
    "moe-tp2.ep4.etp1-tp2": Case(MOE, T(tp=2, dp=2, ep=4, etp=1), E(tp=2)),
    "moe-tp4.ep2.etp4-tp2": Case(
        replace(MOE, expert_intermediate=512, intermediate=512), T(tp=4, dp=2, ep=2, etp=4), E(tp=2)
    ),
    "moe-tp2.ep2.etp2-tp2.ep": Case(MOE, T(tp=2, dp=2, ep=2, etp=2), E(tp=2, expert_parallel=True)),
    "moe-tp2.pp2.ep4.etp1-tp4.ep": Case(
        replace(MOE, intermediate=512),
        T(tp=2, dp=2, pp=2, ep=4, etp=1),
        E(tp=4, expert_parallel=True),
    ),
    "moe-edp2-ep": Case(MOE, T(tp=2, dp=2, ep=2, etp=1), E(tp=2, dp=2, expert_parallel=True)),
    "moe-cp2.ep2-tp2": Case(MOE, T(cp=2, ep=2), E(tp=2)),
    "moe-roundrobin": Case(MOE, T(dp=2, ep=2), E(dp=4, expert_parallel=True, round_robin=True)),
    "moe-5experts-ep2": Case(FIVE, T(), E(dp=2, expert_parallel=True)),
    "moe-5experts-ep5-ep2": Case(
        FIVE, T(dp=5, ep=5), E(tp=2, expert_parallel=True, round_robin=True)
    ),
    "moe-dp2engine-expertscut": Case(MOE, T(tp=2), E(dp=2)),
    "moe-192rows-ep2": Case(RAGGED_MOE, T(dp=2, ep=2), E(dp=2, expert_parallel=True, scales=False)),
    # Latent attention, shared experts, 576 ragged rows.
    "mla-tp2.ep2-tp2.ep": Case(LATENT, T(tp=2, dp=2, ep=4, etp=1), E(tp=2, expert_parallel=True)),
    "mla-pp2-dp2.ep": Case(LATENT, T(pp=2), E(dp=2, expert_parallel=True)),
    "mla-cutdown-tp2": Case(
        LATENT, T(tp=2, cut_down=True), E(tp=2, expert_parallel=True), amax=True
    ),
    "mla-fsdp4-1": Case(LATENT, T(dp=4, fsdp=4), E(), amax=True),
    # FSDP: uneven chunks, either dim, with replicas and with tensor parallelism.
    "fsdp2-tp2": Case(dense(hidden=256), T(dp=2, fsdp=2), E(tp=2)),
    "fsdp3-1": Case(QWEN, T(dp=3, fsdp=3), E(), amax=True),
    "fsdp5-tp2": Case(WIDE, T(dp=5, fsdp=5), E(tp=2), amax=True),
    "fsdp7-tp4": Case(dense(layers=1), T(dp=7, fsdp=7), E(tp=4), amax=True),
    "fsdp3dim1-wide-tp2": Case(WIDE, T(dp=3, fsdp=3, fsdp_dim=1), E(tp=2), amax=True),
    "hsdp2x3-tp2": Case(QWEN, T(dp=6, fsdp=3), E(tp=2), amax=True),
    "fsdp3.tp2-1": Case(QWEN, T(tp=2, dp=3, fsdp=3), E(), amax=True),
    "fsdp3dim1.tp2-tp4": Case(QWEN, T(tp=2, dp=3, fsdp=3, fsdp_dim=1), E(tp=4), amax=True),
    "fsdp4.moe192": Case(RAGGED_MOE, T(dp=4, fsdp=4), E(scales=False), amax=True),
    "fsdp2.moe-ep2": Case(
        replace(MOE, hidden=256), T(dp=4, fsdp=2, ep=2), E(dp=2, expert_parallel=True)
    ),
    # Biases, fused as their weights are.
    "bias-tp4-tp2": Case(BIASED, T(tp=4), E(tp=2)),
    "bias-tp2-tp4": Case(BIASED, T(tp=2), E(tp=4)),
    # Head sizes that are no multiple of 128.
    "head64-1-1": Case(HEAD_64, T(), E(), amax=True),
    "head64-tp2-1": Case(HEAD_64, T(tp=2), E(), amax=True),
    "head64-tp4-1": Case(HEAD_64, T(tp=4), E(), amax=True),
    "head64-tp4-tp2": Case(HEAD_64, T(tp=4), E(tp=2), amax=True),
    "head80-unfused-tp2-1": Case(HEAD_80, T(tp=2, fused=False), E(), amax=True),
    "head80-tp2-1": Case(HEAD_80, T(tp=2), E(), amax=True),
    "head80-tp4-bf16": Case(HEAD_80, T(tp=4), E(tp=2, formula=None)),
    "head192-tp2-1": Case(HEAD_192, T(tp=2), E(), amax=True),
    "head192-1-1": Case(HEAD_192, T(), E(), amax=True),
    # Engines without FP8, and without quantization.
    "dequantize-tp2-tp2": Case(QWEN, T(tp=2), E(tp=2, scales=False)),
    "dequantize-fsdp3-1": Case(QWEN, T(dp=3, fsdp=3), E(scales=False), amax=True),
    "bf16-tp2-tp4": Case(QWEN, T(tp=2), E(tp=4, formula=None)),
    "bf16-fsdp5-pp2": Case(MOE, T(dp=5, fsdp=5), E(pp=2, formula=None)),
    # Primary FP8 pairs: passed through, or requantized where a box cuts a block.
    "pairs-tp2-tp4": Case(QWEN, T(tp=2, pairs=Formula.POW2), E(tp=4)),
    "pairs-moe-ep2-tp2": Case(MOE, T(dp=2, ep=2, pairs=Formula.POW2), E(tp=2)),
    # The engine's own loader.
    "misc-tp2-tp2": Case(
        QWEN,
        T(tp=2),
        E(tp=2, misc=(("model.layers.0.mlp.gate_proj.weight", "a transform"),)),
        misc=True,
    ),
}
