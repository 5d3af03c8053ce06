"""A made-up result, in the form that `fp8sync verify --json` writes; for the look of a page only."""

from __future__ import annotations

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def result(failures: tuple[str, ...] = ()) -> dict:
    stages = {"quantize": 0.02, "send": 0.05, "verify": 0.01, "commit": 0.001, "total": 0.08}
    names = [f"model.layers.{n}.{part}.weight" for n in range(4) for part in PROJECTIONS]
    return {
        "agreement": {
            "kl_engine_trainer": 4e-4,
            "kl_trainer_engine": 4.1e-4,
            "probability_ratio": 1.02,
            "max_difference": 0.1,
        },
        "fresh_difference": 0.0,
        "errors": {name: 0.02 + 0.001 * n for n, name in enumerate(names)},
        "links": [[a, b, 1_000_000 * (a + b + 1)] for a in range(4) for b in range(4)],
        "refits": [{"seconds": stages, "pause_s": 0.03}, {"seconds": stages, "pause_s": 0.02}],
        "unread": {"a<b>.weight": "the trainer's shards cut its blocks"},
        "misc": {"model.layers.0.self_attn.attn.k_scale": "loaded by the engine itself"},
        "versions": {"torch": "2.11.0", "vllm": "0.25.1", "platform": "Linux-" + "x" * 60},
        "failures": list(failures),
    }
