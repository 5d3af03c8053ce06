"""What only engines on GPUs do: kernels that requantize, CUDA graphs, sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu

COMPILED = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 4]}}
"""As vLLM compiles by default, with fewer graphs."""


def fresh(folder: Path, **options: Any) -> tuple[torch.Tensor, list[int]]:
    llm = world.start_engine(folder, **options)
    found = world.logprobs(llm), world.generate(llm)
    del llm
    world.forget_engines()
    return found


def test_blockwise_asks_each_kernel(tmp_path: Path) -> None:
    """Linears under DeepGEMM with E8M0 get pow2, Triton experts fp32; the report says which."""
    model = world.tiny_model("moe", 1)
    llm = world.start_engine(world.write_config(model, tmp_path / "config"), load_format="dummy")
    report = fp8sync.refit(model, llm, "blockwise")
    found = world.logprobs(llm)
    del llm
    world.forget_engines()
    formulas = {t.name: t.formula for t in report.tensors if t.encoding == "blockwise"}
    assert {f for n, f in formulas.items() if "self_attn" in n} == {"pow2"}
    assert {f for n, f in formulas.items() if ".experts." in n} == {"fp32"}
    # Written by the same formulas, a checkpoint loads to the same engine.
    folder = world.write_checkpoint(model, tmp_path / "mixed", formulas)
    assert (found - fresh(folder)[0]).abs().max().item() == 0.0


@pytest.mark.parametrize(("backend", "kept"), [("deep_gemm", "pow2"), ("marlin", "fp32")])
def test_other_kernels_of_experts(backend: str, kept: str, tmp_path: Path) -> None:
    """DeepGEMM's take pow2 as it is, and round fp32 a second time; Marlin's pack either: direct and process in turn."""
    models = [world.tiny_model("moe", seed, moe_intermediate_size=384) for seed in (1, 2)]
    options = {"moe_backend": backend}
    expected = [
        fresh(world.write_checkpoint(model, tmp_path / formula, formula), **options)
        for model, formula in zip(models, ("pow2", "fp32"), strict=True)
    ]
    folder = world.write_config(models[0], tmp_path / "config")
    llm = world.start_engine(folder, load_format="dummy", **options)
    report = fp8sync.refit(models[0], llm, "blockwise")
    assert {t.formula for t in report.tensors if ".experts." in t.name} == {kept}
    for turn in (0, 1, 0, 1):
        fp8sync.refit(models[turn], llm, f"blockwise-{('pow2', 'fp32')[turn]}")
        assert (world.logprobs(llm) - expected[turn][0]).abs().max().item() == 0.0
        assert world.generate(llm) == expected[turn][1]
    del llm
    world.forget_engines()


@pytest.mark.parametrize("options", [world.GRAPHS, COMPILED], ids=["graphs", "compiled"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_cuda_graphs(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Captured graphs read the refitted weights: the same tokens as a fresh engine decodes."""
    models = [world.tiny_model(kind, seed) for seed in (1, 2)]
    expected = [
        fresh(world.write_checkpoint(model, tmp_path / str(seed), "pow2"), **options)
        for seed, model in enumerate(models)
    ]
    folder = world.write_config(models[0], tmp_path / "config")
    llm = world.start_engine(folder, load_format="dummy", **options)
    for turn in (0, 1, 0):
        fp8sync.refit(models[turn], llm, "blockwise-pow2")
        assert (world.logprobs(llm) - expected[turn][0]).abs().max().item() == 0.0
        assert world.generate(llm) == expected[turn][1]
    del llm
    world.forget_engines()


@pytest.mark.parametrize("transport", ["ipc", "gloo"])
def test_parameters_offloaded_to_the_host(transport: str, tmp_path: Path) -> None:
    """Pinned ones are read by the GPU's kernels, over the bus."""
    model = world.tiny_model("moe", 1)
    expected = fresh(world.write_checkpoint(model, tmp_path / "0", "pow2"))
    for parameter in model.parameters():
        parameter.data = parameter.data.cpu()
        if transport == "ipc":
            parameter.data = parameter.data.pin_memory()
    llm = world.start_engine(world.write_config(model, tmp_path / "config"), load_format="dummy")
    with fp8sync.connect(model, llm, "blockwise-pow2") as link:
        assert link.transport.startswith(f"{transport}: ")
        link.refit()
        assert link.audit().equal
    assert (world.logprobs(llm) - expected[0]).abs().max().item() == 0.0
    assert world.generate(llm) == expected[1]
    del llm
    world.forget_engines()


def test_refit_between_the_wakes(tmp_path: Path) -> None:
    """Asleep at either level, weights awake, refit, KV cache awake: equal to a fresh engine.

    While the weights sleep a refit is refused.
    """
    models = [world.tiny_model("dense", seed) for seed in (1, 2)]
    expected = [
        fresh(world.write_checkpoint(model, tmp_path / str(seed), "pow2"))
        for seed, model in enumerate(models)
    ]
    folder = world.write_config(models[0], tmp_path / "config")
    llm = world.start_engine(folder, load_format="dummy", multiprocess=True, enable_sleep_mode=True)
    fp8sync.refit(models[0], llm, "blockwise-pow2")
    world.generate(llm)
    for turn, level in ((1, 1), (0, 2), (1, 2)):
        llm.sleep(level=level)
        llm.wake_up(tags=["weights"])
        fp8sync.refit(models[turn], llm, "blockwise-pow2")
        llm.wake_up(tags=["kv_cache"])
        assert (world.logprobs(llm) - expected[turn][0]).abs().max().item() == 0.0
        assert world.generate(llm) == expected[turn][1]
    llm.sleep(level=1)
    for model in reversed(models):  # by the link that there is, and by a new one
        with pytest.raises(fp8sync.InstallFailed, match="asleep"):
            fp8sync.refit(model, llm, "blockwise-pow2")
    llm.wake_up()
    assert (world.logprobs(llm) - expected[1][0]).abs().max().item() == 0.0
    world.stop_engine(llm)


def test_first_forward_on_a_full_gpu(tmp_path: Path) -> None:
    """What vLLM keeps free for its largest step is free for that after a refit, where all else is taken."""
    length, spare = 8192, 64 << 20
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8}
    model = world.tiny_model("dense", 1, max_position_embeddings=length, **sizes)
    folder = world.write_config(model, tmp_path / "config")
    options: dict[str, Any] = {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": None}
    options |= {"max_model_len": length, "max_num_batched_tokens": length}
    llm = world.start_engine(folder, load_format="dummy", **options)
    prompt = [(i * 37 + 11) % 256 for i in range(length - 1)]
    world.generate(llm, 1, prompt)  # loads whatever kernels and workspaces vLLM did not count
    (reserved,) = llm.collective_rpc(lambda worker: worker.peak_activation_memory)
    torch.cuda.empty_cache()
    left = torch.cuda.mem_get_info()[0] - reserved - spare
    others = torch.empty(left, dtype=torch.uint8, device="cuda")
    for version in (1, 2, 3):
        report = fp8sync.refit(model, llm, "blockwise")
        assert (report.version, report.bytes_sent > spare) == (version, True)
        assert len(world.generate(llm, 1, prompt)) == 1
    del llm, others
    world.forget_engines()
