"""A made-up result, in the form that `fp8sync verify --json` writes; for the look of a page only."""

from __future__ import annotations

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def refused() -> dict:
    why = ["the layouts cannot be joined exactly", "model.layers.0.mlp.up_proj.weight: a hole"]
    nothing = {"errors": {}, "links": [], "refits": [], "unread": {}, "misc": {}}
    failures = [f"refused: {each}" for each in why]
    return nothing | {"versions": {}, "refused": why, "failures": failures}


def result(failures: tuple[str, ...] = ()) -> dict:
    stages = {"quantize": 0.02, "send": 0.05, "verify": 0.01, "commit": 0.001, "total": 0.08}
    agreement = {
        "kl_engine_trainer": 4e-4,
        "kl_trainer_engine": 4.1e-4,
        "probability_ratio": 1.02,
        "max_difference": 0.1,
    }
    refit = {"seconds": stages, "pause_s": 0.03, "error": 0.026, "weights": "trained"}
    names = [f"model.layers.{n}.{part}.weight" for n in range(4) for part in PROJECTIONS]
    return {
        "agreement": agreement,
        "limit": {"kl_engine_trainer": 1e-2},
        "fresh_difference": 0.0,
        "errors": {name: 0.02 + 0.001 * n for n, name in enumerate(names)},
        "links": [[a, b, 1_000_000 * (a + b + 1)] for a in range(4) for b in range(4)],
        "refits": [refit, refit | {"weights": "junk"}, *[refit | {"agreement": agreement}] * 3],
        "unread": {"a<b>.weight": "FusedMoE changes values of w13_weight"},
        "misc": {"model.layers.0.self_attn.attn.k_scale": "loaded by the engine itself"},
        "versions": {"torch": "2.11.0", "vllm": "0.25.1", "platform": "Linux-" + "x" * 60},
        "failures": list(failures),
    }
