"""Tiny models, real vLLM engines and checkpoints written without any of fp8sync's transfer code."""

from __future__ import annotations

import copy
import gc
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import fp8sync
from fp8sync.engines.vllm import without_torchrun
from fp8sync_kernels import dequantize_blockwise, quantize_blockwise
from tests import ports, skips

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

PROMPT = [(i * 37 + 11) % 256 for i in range(48)]
KINDS = ("dense", "moe", "llama")
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 4],
    },
}
"""Options of an engine that decodes by CUDA graphs."""
END_S = None if skips.cuda_devices() else 0.0
"""How long vLLM's processes may take to end; on the processor they would collect garbage for seconds."""
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
FP8 = bool(skips.cuda_devices()) or skips.has_amx()
"""Whether vLLM can hold FP8 weights here; if not, engines are BF16 and the bytes are dequantized."""


def recipe(name: str) -> fp8sync.Recipe:
    """The recipe for an engine of this machine."""
    return fp8sync.Recipe(name, dequantize=not FP8)


def tiny_model(kind: str, seed: int, **changes: Any) -> torch.nn.Module:
    """A random BF16 Qwen3, dense or MoE, whose fused parts are all multiples of 128 rows."""
    import transformers

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.06,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if kind == "mla":
        # The head sizes are those of DeepSeek-V3: kernels for MLA know no others.
        shape |= {"moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1}
        shape |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": 64}
        shape |= {"q_lora_rank": 256, "kv_lora_rank": 512, "first_k_dense_replace": 1}
        shape |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        shape |= {"num_key_value_heads": 4, "num_nextn_predict_layers": 0}
        config = transformers.DeepseekV3Config(**shape | {"topk_method": "noaux_tc"} | changes)
        model = transformers.DeepseekV3ForCausalLM(config)
    elif kind == "glm":
        shape |= {"moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1}
        shape |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        shape |= {"first_k_dense_replace": 1, "use_qk_norm": True, "num_nextn_predict_layers": 1}
        config = transformers.Glm4MoeConfig(**shape | changes)
        model = transformers.Glm4MoeForCausalLM(config)
        model.model.layers.append(_mtp_layer(model))
    elif kind == "neox":
        shape |= {"num_key_value_heads": 4, "head_dim": 64}  # it has no others, whatever it is told
        config = transformers.GPTNeoXConfig(**shape | {"rotary_pct": 1.0} | changes)
        model = transformers.GPTNeoXForCausalLM(config)
        model.embed_out = model._modules.pop("lm_head")  # as published checkpoints name it
    elif kind == "hybrid":
        # A layer of each sort: Mamba, experts without a gate, attention, MLP.
        shape |= {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}
        shape |= {"ssm_state_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2}
        shape |= {"moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128}
        shape |= {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
        del shape["num_hidden_layers"]
        config = transformers.NemotronHConfig(**shape | changes)
        model = transformers.NemotronHForCausalLM(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(**shape | changes)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "moe":
        shape |= {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
        config = transformers.Qwen3MoeConfig(**shape | {"norm_topk_prob": True} | changes)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.Qwen3Config(**shape | changes)
        model = transformers.Qwen3ForCausalLM(config)
    model.config.architectures = [type(model).__name__]
    return model.to("cuda" if skips.cuda_devices() else "cpu", torch.bfloat16)


def _mtp_layer(model: torch.nn.Module) -> torch.nn.Module:
    """A layer as checkpoints hold it that predicts one token further; transformers makes none."""
    layer = copy.deepcopy(model.model.layers[-1])
    size, words = model.config.hidden_size, model.config.vocab_size
    layer.eh_proj = torch.nn.Linear(2 * size, size, bias=False)
    layer.embed_tokens = torch.nn.Embedding(words, size)
    layer.enorm, layer.hnorm = copy.deepcopy((model.model.norm, model.model.norm))
    layer.shared_head = torch.nn.Module()
    layer.shared_head.norm = copy.deepcopy(model.model.norm)
    layer.shared_head.head = torch.nn.Linear(size, words, bias=False)
    return layer


def write_config(
    model: torch.nn.Module,
    folder: Path,
    *,
    fp8: bool = FP8,
    router: bool = False,
    plain: Collection[str] = (),
) -> Path:
    """Write config.json alone, with a blockwise FP8 quantization_config where asked.

    With `router` the routers are quantized, too; the weights that `plain` names are not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["dtype"] = config["torch_dtype"] = "bfloat16"
    if fp8:
        layers = range(model.config.num_hidden_layers)
        gates = [] if router else [f"model.layers.{n}.mlp.gate" for n in layers]
        gates += [name.removesuffix(".weight") for name in plain]
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", *gates],
        }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(
    model: torch.nn.Module,
    folder: Path,
    formula: str | dict[str, str] | None,
    *,
    fp8: bool = FP8,
    router: bool = False,
    plain: Collection[str] = (),
    kv_scales: Mapping[str, float] | None = None,
) -> Path:
    """Write what a fresh engine would load: FP8 pairs, or their dequantized values in BF16.

    Without a formula nothing is quantized; one formula serves all tensors, or each its own. `plain`
    names what is not quantized.
    """
    tensors = {name: torch.tensor(value) for name, value in (kv_scales or {}).items()}
    for name, weight in hf_tensors(model):
        linear = name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
        linear |= router and name.endswith(".mlp.gate.weight")
        if formula is None or not linear or name in plain:
            tensors[name] = weight.clone()
            continue
        q = quantize_blockwise(weight, formula[name] if isinstance(formula, dict) else formula)
        if fp8:
            tensors[name], tensors[name + "_scale_inv"] = q.weight, q.scale_inv
        else:
            tensors[name] = dequantize_blockwise(q.weight, q.scale_inv, torch.bfloat16)
    write_config(model, folder, fp8=fp8, router=router, plain=plain)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def hf_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under checkpoint names, expert stacks taken apart by hand."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        stem, _, last = name.rpartition(".experts.")
        if not stem:
            yield name, value
            continue
        for expert, matrix in enumerate(value):
            parts = {last: matrix}
            if last == "gate_up_proj":
                gate, up = matrix.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            for part, weight in parts.items():
                yield f"{stem}.experts.{expert}.{part}.weight", weight.contiguous()


def start_engine(
    folder: Path, *, multiprocess: bool = False, load_format: str = "auto", **options: Any
) -> Any:
    """A real vLLM on `folder`, also under torchrun."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(multiprocess))
    os.environ["VLLM_PORT"] = ports.for_vllm()
    with without_torchrun():
        from vllm import LLM, envs

        envs.disable_envs_cache()  # an engine started earlier in this process has frozen them
        return LLM(**settings(folder, load_format=load_format, **options))


def settings(folder: Path, *, load_format: str = "auto", **options: Any) -> dict[str, Any]:
    """How every engine of these tests is made.

    An only worker lives in the engine's own process, as on a GPU; vLLM for the processor would start
    another process for it, and half of the time of these tests is processes starting.
    """
    several = {"tensor_parallel_size", "pipeline_parallel_size"} & options.keys()
    own = {} if several or skips.cuda_devices() else {"distributed_executor_backend": ONE_PROCESS}
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_logprobs": 256,
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 64 << 20,
        "gpu_memory_utilization": 0.2,  # asked of what is free at the start: engines share a GPU
        "disable_log_stats": True,
        "load_format": load_format,
        "weight_transfer_config": {"backend": "fp8sync"},
        **own,
        **options,
    }


def stop_engine(llm: Any) -> None:
    """End an engine's processes; one in this process is left to the garbage collector.

    Shutting that one down would take vLLM's process groups from its neighbours.
    """
    core = llm.llm_engine.engine_core
    if type(core).__name__ != "InprocClient":
        core.shutdown(timeout=END_S)
    gc.collect()


@contextmanager
def failing_processing(llm: Any, target: str) -> Iterator[None]:
    """Let vLLM's own processing raise on one linear layer of a live engine."""

    def sabotage(model: torch.nn.Module) -> None:
        def fail(_: torch.nn.Module) -> None:
            raise RuntimeError("no memory left")

        model.get_submodule(target).quant_method.process_weights_after_loading = fail

    def repair(model: torch.nn.Module) -> None:
        del model.get_submodule(target).quant_method.process_weights_after_loading

    llm.apply_model(sabotage)
    try:
        yield
    finally:
        llm.apply_model(repair)


def forget_engines() -> None:
    """Take down what engines of this process shared; none of them may be used again."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def logprobs(llm: Any, prompt: list[int] = PROMPT) -> torch.Tensor:
    """Log-probabilities of all 256 tokens after every prompt token: float64 [len - 1, 256]."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=256, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return rows_of(output.prompt_logprobs)


def rows_of(prompt_logprobs: Any) -> torch.Tensor:
    """vLLM's prompt log-probabilities as float64 [len - 1, 256]."""
    rows = [[row[token].logprob for token in range(256)] for row in prompt_logprobs[1:]]
    return torch.tensor(rows, dtype=torch.float64)


def generate(llm: Any, tokens: int = 12, prompt: list[int] = PROMPT) -> list[int]:
    """Greedy continuation of a prompt; goes through the prefix cache, unlike `logprobs`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def weight_versions(llm: Any) -> list[str] | None:
    """Which versions vLLM says that the tokens of an output are of; None where outputs do not tell (before 0.32)."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    if not hasattr(output.outputs[0], "weight_versions"):
        return None
    return [span.version for span in output.outputs[0].weight_versions or ()]


def decoded_logprobs(llm: Any, tokens: int = 8) -> torch.Tensor:
    """Log-probabilities of all 256 tokens at every decoding step, float64 [tokens, 256].

    The tokens are given: each engine is asked for the same ones. Keys and values come from the cache.
    """
    from vllm import SamplingParams

    rows = []
    for length in range(len(PROMPT) - tokens, len(PROMPT)):
        forced = SamplingParams(temperature=0.0, max_tokens=2, logprobs=256, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": PROMPT[:length]}], forced, use_tqdm=False)
        last = output.outputs[0].logprobs[-1]
        rows.append([last[token].logprob for token in range(256)])
    return torch.tensor(rows, dtype=torch.float64)


def live_bytes(llm: Any) -> dict[str, int]:
    """A digest of every live parameter of an engine in this process."""
    from fp8sync_kernels import digest

    def read(model: torch.nn.Module) -> dict[str, int]:
        found = {}
        for name, parameter in model.named_parameters():
            flat = parameter.detach().contiguous().reshape(-1)
            found[name] = digest(flat.view(torch.uint8)) if flat.numel() else 0
        return found

    (result,) = llm.apply_model(read)
    return result


def keep_a_picture(worker: Any) -> None:
    """Let a worker remember what an encoder made of a picture."""
    runner = worker.model_runner
    if runner.encoder_cache is None:  # vLLM's newer runner makes it for models that encode
        from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

        runner.encoder_cache = EncoderCache()
    cache = runner.encoder_cache
    getattr(cache, "encoder_outputs", cache)["picture"] = torch.zeros(1)
