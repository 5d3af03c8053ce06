"""What fp8sync uses of vLLM exists in its sources: the installed ones, and unpacked wheels.

FP8SYNC_VLLM_SOURCES names more directories (as PATH does) that hold a `vllm` package; only its text is
read, so that any version can be tried anywhere.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SIGNATURES = {
    "distributed/kv_transfer/kv_connector/factory.py": {
        "KVConnectorFactory.get_connector_class": ["kv_transfer_config"],
    },
    "distributed/kv_transfer/kv_connector/v1/base.py": {"KVConnectorBase_V1.reset_cache": []},
    "distributed/weight_transfer/base.py": {
        "WeightTransferEngine.__init__": ["config", "vllm_config", "device", "model"],
        "WeightTransferEngine.init_transfer_engine": ["init_info"],
        "WeightTransferEngine.start_weight_update": [],
        "WeightTransferEngine.receive_weights": ["update_info"],
        "WeightTransferEngine.finish_weight_update": [],
        "WeightTransferEngine.shutdown": [],
    },
    "distributed/weight_transfer/factory.py": {
        "WeightTransferEngineFactory.register_engine": ["name"],
    },
    "model_executor/model_loader/reload/layerwise.py": {"get_layerwise_info": ["layer"]},
    "model_executor/model_loader/reload/meta.py": {"restore_layer_on_meta": ["layer", "info"]},
    "utils/deep_gemm.py": {"is_deep_gemm_e8m0_used": []},
    "v1/engine/async_llm.py": {
        "AsyncLLM.init_weight_transfer_engine": ["request"],
        "AsyncLLM.start_weight_update": [],
        "AsyncLLM.update_weights": ["request"],
        "AsyncLLM.finish_weight_update": [],
        "AsyncLLM.resume_generation": [],
        "AsyncLLM.reset_prefix_cache": ["reset_running_requests", "reset_connector"],
        "AsyncLLM.reset_encoder_cache": [],
        "AsyncLLM.errored": [],
    },
    "v1/core/block_pool.py": {"BlockPool.get_num_free_blocks": []},
    "v1/core/kv_cache_manager.py": {"KVCacheManager.reset_prefix_cache": []},
    "v1/engine/core.py": {"EngineCore.collective_rpc": ["method", "timeout", "args", "kwargs"]},
    "v1/engine/core_client.py": {"AsyncMPClient.pause_scheduler_async": ["mode", "clear_cache"]},
    "v1/engine/llm_engine.py": {
        "LLMEngine.get_num_unfinished_requests": [],
        "LLMEngine.abort_request": ["request_ids", "internal"],
        "LLMEngine.reset_encoder_cache": [],
    },
}
EARLY = {
    "distributed/weight_transfer/base.py": {
        "WeightTransferEngine.__init__": ["config", "parallel_config", "model"],
        "WeightTransferEngine.init_transfer_engine": ["init_info"],
        "WeightTransferEngine.receive_weights": ["update_info"],
        "WeightTransferEngine.shutdown": [],
    },
    "v1/worker/gpu_worker.py": {
        "Worker.load_model": [],
        "Worker.start_weight_update": ["is_checkpoint_format"],
        "Worker.update_weights": ["update_info"],
        "Worker.finish_weight_update": [],
    },
    "v1/engine/async_llm.py": {
        **SIGNATURES["v1/engine/async_llm.py"],
        "AsyncLLM.start_weight_update": ["is_checkpoint_format"],
    },
    "device_allocator/cumem.py": {
        "CuMemAllocator.sleep": ["offload_tags"],
        "CuMemAllocator.wake_up": ["tags"],
    },
}
"""What is otherwise in 0.24, whose workers `early.py` wraps."""
LLM_CALLS = {
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "reset_prefix_cache",
}
ROUTES = {
    "/pause",
    "/resume",
    "/get_world_size",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/reset_encoder_cache",
    "/is_paused",
}


def source_trees() -> list[Path]:
    spec = find_spec("vllm")
    installed = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    more = os.environ.get("FP8SYNC_VLLM_SOURCES", "").split(os.pathsep)
    return installed + [Path(p) / "vllm" for p in more if p]


@pytest.fixture(params=source_trees(), ids=str)
def tree(request: pytest.FixtureRequest) -> Path:
    return request.param


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(path: Path) -> dict[str, ast.AST]:
    """Everything that a module defines or imports, methods as `Class.method`."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found[f"{node.name}.{inner.name}"] = inner
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name: node for alias in node.names}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.setdefault(node.value, node)  # names that a package imports when first asked for
    return found


def module_of(tree: Path, name: str) -> Path:
    path = tree.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_imported_names_exist(tree: Path) -> None:
    missing = []
    for path in sorted((ROOT / "fp8sync").rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                module = module_of(tree, node.module or "")
                names = {alias.name for alias in node.names}
                here = set(defined(module)) if module.exists() else set()
                parts = {n for n in names if module_of(tree, f"{node.module}.{n}").exists()}
                lacking = names - here - parts
                missing += [f"{path.name}: {node.module}.{name}" for name in sorted(lacking)]
    assert not missing


def test_signatures(tree: Path) -> None:
    base = "distributed/weight_transfer/base.py"
    early = "WeightTransferEngine.start_weight_update" not in defined(tree / base)
    faults = []
    for place, functions in {**SIGNATURES, **(EARLY if early else {})}.items():
        known = defined(tree / place)
        for name, wanted in functions.items():
            node = known.get(name)
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                faults.append(f"{place}: no {name}")
                continue
            arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
            found = [a for a in arguments if a not in {"self", "cls"}]
            if found[: len(wanted)] != wanted:
                faults.append(f"{place}: {name} takes {found}, expected {wanted}")
    assert not faults


def test_names_of_blocks(tree: Path) -> None:
    """What `prefixes` looks at and changes, and how it makes a pool's reset find all blocks free."""
    core = tree / "v1/core"
    request = _attributes(parsed(tree / "v1/request.py"))
    assert request >= {"num_computed_tokens", "cache_salt", "block_hashes"}
    assert "Request.num_output_tokens" in defined(tree / "v1/request.py")
    scheduler = _attributes(parsed(core / "sched/scheduler.py"))
    assert scheduler >= {"cache_config", "connector", "requests", "kv_cache_manager"}
    reset = defined(core / "sched/scheduler.py")["Scheduler.reset_prefix_cache"]
    assert {n.attr for n in ast.walk(reset) if isinstance(n, ast.Attribute) and _is_self(n)} <= {
        *("running", "_preempt_request", "prev_step_scheduled_req_ids", "kv_cache_manager"),
        *("reset_connector_cache", "aux_output_connector", "requests", "_pause_state"),
    }  # whatever else is emptied there may be named by blocks, too
    assert _attributes(parsed(tree / "v1/engine/core.py")) >= {"vllm_config", "scheduler"}
    assert "coordinator" in _attributes(parsed(core / "kv_cache_manager.py"))
    assert "single_type_managers" in _attributes(parsed(core / "kv_cache_coordinator.py"))
    assert "block_pool" in _attributes(parsed(core / "single_type_kv_cache_manager.py"))
    reset = defined(core / "block_pool.py")["BlockPool.reset_prefix_cache"]
    used = "num_used_blocks = self.num_gpu_blocks - self.get_num_free_blocks()"
    lines = ast.unparse(reset).splitlines()
    first = next(n for n, line in enumerate(lines) if "free_blocks" in line)
    assert [line.strip() for line in lines[first : first + 2]] == [used, "if num_used_blocks != 1:"]


def test_calls_that_the_engine_process_hears(tree: Path) -> None:
    """By what names `prefixes` finds an update's words in the call, of each kind of engine."""
    offline = [tree / "entrypoints/llm.py", *(tree / "entrypoints").rglob("offline.py")]
    for paths in ([tree / "v1/engine/async_llm.py"], offline):
        nodes = (node for path in paths for node in ast.walk(parsed(path)))
        found = {
            (call.args[0].value, key.value)
            for call in nodes
            if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)
            for keyword in call.keywords
            if keyword.arg == "kwargs" and isinstance(keyword.value, ast.Dict)
            for key in keyword.value.keys
            if isinstance(key, ast.Constant)
        }
        wanted = {("init_weight_transfer_engine", "init_info"), ("update_weights", "update_info")}
        assert found >= wanted, paths


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def _attributes(module: ast.Module) -> set[str]:
    return {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}


def test_records_of_sleep(tree: Path) -> None:
    """What `compat.weights_asleep` reads; `early.py` notes for 0.24 what it is that sleeps."""
    used = _attributes(parsed(tree / "device_allocator/cumem.py"))
    backend = defined(tree / "distributed/weight_transfer/base.py")
    early = "WeightTransferEngine.start_weight_update" not in backend
    assert used >= {"instance", "pointer_to_data", "tag", *([] if early else ["is_asleep"])}


def test_records_of_requests(tree: Path) -> None:
    """What `compat.pause` and the handles read."""
    nodes = [*ast.walk(parsed(tree / "v1/engine/output_processor.py"))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert used >= {"request_states", "parent_requests", "is_prefilling"}


def test_config_of_the_text_model(tree: Path) -> None:
    """What `compat.text_config` reads, and names of `further.py`."""
    nodes = [*ast.walk(parsed(tree / "config/model.py"))]
    assert "hf_text_config" in {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    loaders = (tree / "model_executor/models").glob("*.py")
    texts = "\n".join(path.read_text(encoding="utf-8") for path in loaders)
    for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules"):
        assert f'"{name}"' in texts


@pytest.mark.parametrize("name", ["fp8_linear", "fp8_backend"])
def test_what_says_the_formula_of_a_kernel(tree: Path, name: str) -> None:
    """A method without it would be taken for one that keeps fp32 scales."""
    text = (tree / "model_executor/layers/quantization/fp8.py").read_text(encoding="utf-8")
    assert re.search(rf"self\.{name}\b[^=\n]*=[^=]", text)


def test_calls_of_llm(tree: Path) -> None:
    """They moved from the class to a mixin after 0.32."""
    known = set(defined(tree / "entrypoints/llm.py"))
    for path in sorted((tree / "entrypoints").rglob("offline.py")):
        known |= set(defined(path))
    assert known >= LLM_CALLS


def test_routes(tree: Path) -> None:
    known: set[str] = set()
    for path in sorted((tree / "entrypoints").rglob("api_router.py")):
        known |= set(defined(path))
    assert known >= ROUTES


def test_a_label_can_be_read_where_it_can_be_set(tree: Path) -> None:
    """From 0.27 on; `LLM` has the same two methods."""
    known = set(defined(tree / "v1/engine/async_llm.py"))
    for path in sorted((tree / "entrypoints").rglob("api_router.py")):
        known |= set(defined(path))
    pairs = {
        "AsyncLLM.update_weight_version": "AsyncLLM.get_weight_version",
        "/update_weight_version": "/weight_info",
    }
    assert not {
        setter for setter, getter in pairs.items() if setter in known and getter not in known
    }
