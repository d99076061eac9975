"""What the connector, its launcher and the router use of vLLM, name by name: a release that changes one fails here.

Beside the connector interface (`connector.py`, `stats.py`) all of it is in `pdtrim_pl/serving/vllm/engine.py`, the
server in `launch.py`, and its HTTP interface in `pdtrim_pl/serving/router/upstream.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

PACKAGE = Path(__file__).parents[2] / "pdtrim_pl" / "serving" / "vllm"
BASE = "distributed.kv_transfer.kv_connector.v1"
USED: dict[str, set[str]] = {
    # Configuration.
    "config.VllmConfig": {
        "model_config", "parallel_config", "cache_config", "compilation_config", "kv_transfer_config",
    },
    "config.ModelConfig": {"dtype", "get_total_num_hidden_layers", "get_total_num_kv_heads", "get_head_size"},
    "config.ParallelConfig": {
        "tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size", "use_ubatching",
    },
    "config.CacheConfig": {"cache_dtype", "block_size", "enable_prefix_caching"},
    "config.CompilationConfig": {"static_forward_context"},
    "config.KVTransferConfig": {
        "kv_connector", "kv_connector_module_path", "kv_role", "kv_load_failure_policy", "kv_connector_extra_config",
        "is_kv_producer", "is_kv_consumer",
    },
    # What the scheduler tells.
    "v1.request.Request": {"request_id", "num_prompt_tokens", "kv_transfer_params"},
    "v1.core.sched.output.SchedulerOutput": {
        "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "finished_req_ids",
        "kv_connector_block_state",
    },
    "v1.core.sched.output.NewRequestData": {"req_id", "num_computed_tokens"},
    "v1.core.sched.output.CachedRequestData": {"req_ids", "num_computed_tokens"},
    "v1.core.sched.output.KVConnectorBlockState": {"get_block_ids"},
    "v1.core.kv_cache_manager.KVCacheBlocks": {"get_block_ids"},
    # A forward pass.
    "forward_context.ForwardContext": {"attn_metadata", "slot_mapping", "no_compile_layers"},
    "model_executor.layers.attention.Attention": {"num_heads", "num_kv_heads", "head_size", "sliding_window"},
    "v1.attention.backends.cpu_attn.CPUAttentionMetadata": {
        "block_table", "seq_lens", "query_start_loc", "num_actual_tokens", "slot_mapping", "scheduler_metadata",
        "causal", "dynamic_causal",
    },
    "v1.attention.backends.flash_attn.FlashAttentionMetadata": {
        "block_table", "seq_lens", "query_start_loc", "num_actual_tokens", "slot_mapping", "scheduler_metadata",
    },
    # The connector interface.
    f"{BASE}.base.KVConnectorBase_V1": {"role", "_get_connector_metadata"},
    f"{BASE}.base.KVConnectorRole": {"SCHEDULER", "WORKER"},
    f"{BASE}.base.KVConnectorMetadata": set(),
    f"{BASE}.base.KVConnectorTransferResults": {"finished_recving", "failed_recving"},
    f"{BASE}.metrics.KVConnectorStats": {"data", "reset", "aggregate", "reduce", "is_empty"},
    f"{BASE}.metrics.KVConnectorPromMetrics": {"observe"},
    # The HTTP interface.
    "entrypoints.openai.completion.protocol.CompletionRequest": {
        "model", "prompt", "max_tokens", "stream", "temperature", "top_p", "top_k", "seed", "min_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos",
        "return_token_ids", "kv_transfer_params",
    },
    "entrypoints.openai.completion.protocol.CompletionResponse": {"choices", "kv_transfer_params"},
    "entrypoints.openai.completion.protocol.CompletionResponseChoice": {"token_ids", "finish_reason"},
    "entrypoints.openai.completion.protocol.CompletionStreamResponse": {"choices"},
    "entrypoints.openai.completion.protocol.CompletionResponseStreamChoice": {"token_ids", "finish_reason"},
    "entrypoints.serve.engine.protocol.ModelCard": {"id", "max_model_len"},
}  # fmt: skip
CALLED: dict[str, set[str]] = {
    "_custom_ops.cpu_attn_reshape_and_cache": set(),
    "_custom_ops.cpu_attn_get_scheduler_metadata": {
        "num_reqs", "num_heads", "num_kv_heads", "head_dim", "seq_lens", "dtype", "query_start_loc", "causal",
        "sliding_window_size", "isa", "enable_kv_split", "dynamic_causal", "kv_cache_dtype",
    },
    "forward_context.get_forward_context": set(),
    "forward_context.is_forward_context_available": set(),
    "distributed.get_tensor_model_parallel_rank": set(),
}  # fmt: skip
"""Functions -> arguments that are given by name."""


def found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"vllm.{module}"), name)


@cache
def members(owner: type) -> set[str]:
    """Names of a class: of its methods, its fields, and what its constructor sets."""
    names = set(dir(owner)) | set(owner.__init__.__code__.co_names if inspect.isfunction(owner.__init__) else ())
    for base in owner.__mro__:
        names |= set(vars(base).get("__annotations__", {}))
    if dataclasses.is_dataclass(owner):
        names |= {field.name for field in dataclasses.fields(owner)}
    return names | set(getattr(owner, "model_fields", {}))


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in USED.items() for name in sorted(names)])
def test_a_class_still_has(path: str, name: str) -> None:
    assert name in members(found(path))


@pytest.mark.parametrize("path", CALLED)
def test_a_function_still_takes(path: str) -> None:
    assert CALLED[path] - set(inspect.signature(found(path)).parameters) == set()


def test_the_cpus_write_still_takes_its_arguments_in_this_order() -> None:
    names = list(inspect.signature(found("_custom_ops.cpu_attn_reshape_and_cache")).parameters)
    assert names == [
        "key", "value", "key_cache", "value_cache", "slot_mapping", "isa", "k_scale", "v_scale", "kv_cache_dtype",
    ]  # fmt: skip


def test_every_method_of_the_connector_has_the_arguments_that_vllm_gives_it() -> None:
    from pdtrim_pl.serving.vllm.connector import PairConnector
    from pdtrim_pl.serving.vllm.stats import PairMetrics, PairStats

    for ours in (PairConnector, PairMetrics, PairStats):
        theirs = ours.__mro__[1]
        own = [name for name in vars(ours) if inspect.isroutine(getattr(ours, name)) and hasattr(theirs, name)]
        assert own
        for name in own:
            wanted, has = (list(inspect.signature(getattr(each, name)).parameters) for each in (theirs, ours))
            assert has == wanted, f"{ours.__name__}.{name}"


def test_no_method_that_the_connector_must_have_is_missing() -> None:
    from pdtrim_pl.serving.vllm.connector import PairConnector

    assert PairConnector.__abstractmethods__ == frozenset()


def test_nothing_is_imported_from_vllm_that_is_not_in_this_list() -> None:
    listed = {*USED, *CALLED, "_custom_ops", "envs", "v1.kv_cache_interface.KVCacheConfig"}
    taken = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                taken |= {f"{node.module}.{name.name}".removeprefix("vllm.") for name in node.names}
    assert len(taken) > 10
    assert taken - listed == set()


def test_the_server_and_its_environment_are_where_they_were() -> None:
    from vllm import envs

    from pdtrim_pl.serving.router.upstream import KEY_VARIABLE
    from pdtrim_pl.serving.vllm.launch import SERVER

    assert importlib.util.find_spec(SERVER) is not None
    assert {KEY_VARIABLE, "VLLM_CPU_ATTN_SPLIT_KV"} <= set(envs.environment_variables)


def test_the_server_still_has_the_launchers_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--help=all"], capture_output=True, text=True
    )
    for option in (
        "--model", "--served-model-name", "--dtype", "--kv-transfer-config", "--no-enable-prefix-caching",
        "--max-num-seqs", "--host", "--port",
    ):  # fmt: skip
        assert option in done.stdout, option


def test_settings_of_the_checkpoint_that_change_an_answer_are_all_overridden() -> None:
    from pdtrim_pl.serving.router.upstream import WITHHELD

    request = found("entrypoints.openai.completion.protocol.CompletionRequest")
    defaults = request.__private_attributes__["_DEFAULT_SAMPLING_PARAMS"].default
    assert {*WITHHELD, "temperature", "top_p", "top_k"} == set(defaults)
    assert {name: defaults[name] for name in WITHHELD} == WITHHELD
