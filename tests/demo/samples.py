"""Made-up runs, for the tests of what the demo says about a run."""

from fp8sync import RefitReport, TensorReport
from fp8sync.verify import Agreement
from scripts.demo.rounds import ModelRun, Round


def sample_round(number=1, stale=0.2, fresh=1e-4, text="x"):
    tensors = (
        TensorReport(
            f"model.layers.{number % 2}.mlp.experts.3.gate_proj.weight",
            "bulk",
            "",
            "blockwise",
            "pow2",
            66_000,
            0.026,
        ),
        TensorReport("lm_head.weight", "misc", "not quantized", "plain", "", 131_072, 0.0),
    )
    report = RefitReport(
        version=number,
        bytes_sent=197_072,
        seconds={"quantize": 0.02, "commit": 0.001, "total": 0.05},
        pause_s=0.03,
        tensors=tensors,
    )
    return Round(
        number=number,
        steps=40,
        stale=Agreement(stale, stale, 1.0, 0.0),
        fresh=Agreement(fresh, fresh, 1.0, 0.0),
        trainer_loss=2.3,
        engine_loss=2.31,
        text=text,
        report=report,
    )


def sample_run(*rounds, kind="dense"):
    return ModelRun(kind, "Qwen3ForCausalLM", 1_300_000, rounds or (sample_round(),))
