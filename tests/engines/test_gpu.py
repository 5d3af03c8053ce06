"""What only engines on GPUs do: kernels that requantize, CUDA graphs, sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fp8sync
from tests.engines import world
from tests.engines.test_kv_scales import scales

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


@pytest.mark.parametrize(
    ("options", "formula"),
    [(world.GRAPHS, "pow2"), (COMPILED, "pow2"), (COMPILED, "fp32")],
    ids=["graphs", "compiled", "compiled-fp32"],
)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_cuda_graphs(kind: str, options: dict[str, Any], formula: str, tmp_path: Path) -> None:
    """Captured graphs read the refitted weights, also processed ones: a fresh engine decodes the same tokens."""
    models = [world.tiny_model(kind, seed) for seed in (1, 2)]
    expected = [
        fresh(world.write_checkpoint(model, tmp_path / str(seed), formula), **options)
        for seed, model in enumerate(models)
    ]
    folder = world.write_config(models[0], tmp_path / "config")
    llm = world.start_engine(folder, load_format="dummy", **options)
    for turn in (0, 1, 0):
        fp8sync.refit(models[turn], llm, f"blockwise-{formula}")
        assert (world.logprobs(llm) - expected[turn][0]).abs().max().item() == 0.0
        assert world.generate(llm) == expected[turn][1]
    del llm
    world.forget_engines()


@pytest.mark.multigpu(2)
def test_two_workers_with_all_of_it(tmp_path: Path) -> None:
    """Compiled, CUDA graphs, an FP8 cache with scales, both formulas in turn, awake and after sleep."""
    # Halved between two workers, 512 rows are still whole blocks.
    models = [world.tiny_model("moe", seed, moe_intermediate_size=256) for seed in (1, 2)]
    options: dict[str, Any] = {**COMPILED, "multiprocess": True, "tensor_parallel_size": 2}
    options |= {"kv_cache_dtype": "fp8", "enable_sleep_mode": True}
    expected = []
    for turn, (model, formula) in enumerate(zip(models, ("pow2", "fp32"), strict=True)):
        checkpoint = tmp_path / str(turn)
        world.write_checkpoint(model, checkpoint, formula, kv_scales=scales(turn))
        llm = world.start_engine(checkpoint, **options)
        expected.append((world.decoded_logprobs(llm), world.generate(llm)))
        world.stop_engine(llm)
    folder = world.write_config(models[0], tmp_path / "config")
    llm = world.start_engine(folder, load_format="dummy", **options)
    for turn, level in ((0, 0), (1, 0), (0, 0), (1, 1), (0, 2)):
        if level:
            llm.sleep(level=level)
            llm.wake_up(tags=["weights"])
        recipe = f"blockwise-{('pow2', 'fp32')[turn]}"
        fp8sync.refit(models[turn], llm, recipe, kv_scales=scales(turn))
        if level:
            llm.wake_up(tags=["kv_cache"])
        assert world.generate(llm) == expected[turn][1]
        found = world.decoded_logprobs(llm)
        assert (found - expected[turn][0]).abs().max().item() == 0.0
    world.stop_engine(llm)


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


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_refit_between_the_wakes(cache: str, tmp_path: Path) -> None:
    """Asleep at either level, weights awake, refit, KV cache awake: equal to a fresh engine.

    So are an FP8 cache's scales, which vLLM 0.25 resets when it wakes the cache. While the weights sleep a refit is
    refused.
    """
    models = [world.tiny_model("dense", seed) for seed in (1, 2)]
    given = [scales(turn) if cache == "fp8" else None for turn in range(2)]
    expected = []
    for turn, model in enumerate(models):
        world.write_checkpoint(model, tmp_path / str(turn), "pow2", kv_scales=given[turn])
        llm = world.start_engine(tmp_path / str(turn), kv_cache_dtype=cache)
        expected.append((world.generate(llm), world.decoded_logprobs(llm)))
        del llm
        world.forget_engines()
    folder = world.write_config(models[0], tmp_path / "config")
    options: dict[str, Any] = {"kv_cache_dtype": cache, "enable_sleep_mode": True}
    llm = world.start_engine(folder, load_format="dummy", multiprocess=True, **options)

    def check(turn: int) -> None:
        assert world.generate(llm) == expected[turn][0]
        assert (world.decoded_logprobs(llm) - expected[turn][1]).abs().max().item() == 0.0

    def refit(turn: int) -> None:
        fp8sync.refit(models[turn], llm, "blockwise-pow2", kv_scales=given[turn])

    refit(0)
    check(0)
    for turn, level in ((1, 1), (0, 2), (1, 2)):
        llm.sleep(level=level)
        llm.wake_up(tags=["weights"])
        refit(turn)
        llm.wake_up(tags=["kv_cache"])
        check(turn)
    llm.sleep(level=1)
    for turn in (1, 0):  # by the link that there is, and by a new one
        with pytest.raises(fp8sync.InstallFailed, match="asleep"):
            refit(turn)
    llm.wake_up()
    check(1)
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
