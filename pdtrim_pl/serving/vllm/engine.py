"""Everything of vLLM that is not its connector interface. tests/with_vllm runs it, and looks for each name.

Written for vLLM 0.32. The CPU backend was run; the GPU part follows the source of its FlashAttention backend.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.vllm.compaction import cut_lengths, cut_slots
from pdtrim_pl.serving.vllm.layout import CacheLayout, EntryLayout, LearntLayout

LAYER = re.compile(r"(?P<model>.*?)layers\.(?P<index>\d+)\.")
"""Name of an attention layer, such as `model.layers.3.self_attn.attn`."""
DRAFT = "draft_model"
"""Draft models of their own are named so; draft heads continue the count of the model's layers."""


@dataclass(frozen=True)
class Engine:
    """Sizes of an engine."""

    layers: int
    heads: int
    width: int
    dtype: str
    ranks: int

    @classmethod
    def of(cls, config: VllmConfig) -> Engine:
        """Read an engine's configuration.

        Raises:
            UserError: it uses something that this connector cannot serve.
        """
        model, parallel = config.model_config, config.parallel_config
        if config.cache_config.cache_dtype != "auto":
            raise UserError(f"`--kv-cache-dtype` is {config.cache_config.cache_dtype}: use auto; codecs work on it.")
        if parallel.pipeline_parallel_size > 1:
            raise UserError("`--pipeline-parallel-size` is above 1: use tensor parallelism.")
        if parallel.decode_context_parallel_size > 1:
            raise UserError("`--decode-context-parallel-size` is above 1, and entries would lie on several ranks.")
        if parallel.use_ubatching:
            raise UserError("Dual batch overlap is on: turn it off (`--enable-dbo`).")
        return cls(
            model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size(),
            str(model.dtype).removeprefix("torch."), parallel.tensor_parallel_size,
        )  # fmt: skip


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """Attention layer -> its index in the model. Layers of a draft model are left out."""
    found = {name: LAYER.match(name) for name in names if not name.startswith(DRAFT)}
    return {name: int(match["index"]) for name, match in found.items() if match}


def windows_of(config: VllmConfig, names: Iterable[str]) -> dict[str, int]:
    """Attention layer -> its sliding window, for those that have one."""
    found = {}
    for name in names:
        window = config.compilation_config.static_forward_context[name].sliding_window
        if window not in (None, -1):
            found[name] = window
    return found


def progress_of(output: SchedulerOutput) -> dict[str, int]:
    """Request of a scheduler's step -> how many of its tokens are computed when the step ends."""
    before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return {request: count + output.num_scheduled_tokens[request] for request, count in before.items()}


def table_of(output: SchedulerOutput, request: str) -> list[int]:
    """Block table of a request of a scheduler's step."""
    assert output.kv_connector_block_state is not None
    tables = output.kv_connector_block_state.get_block_ids(request)
    assert tables is not None
    return list(tables[0])


def layout_of(config: VllmConfig, name: str, cache: Tensor) -> CacheLayout:
    """How the entries of a layer lie in its cache [N, K, S, 2 D]."""
    if cache.device.type != "cpu":
        return EntryLayout()
    isa = config.compilation_config.static_forward_context[name].isa

    def fill(keys: Tensor, values: Tensor, into: Tensor, slots: Tensor) -> None:
        count, heads, size, _ = into.shape
        halves = into.view(count, heads, 2 * size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa, 1.0, 1.0, "auto")

    return LearntLayout.learn(cache.shape[2], cache.shape[3] // 2, cache.dtype, fill)


def compact(context: ForwardContext, groups: Mapping[Any, list[str]], cuts: Mapping[Any, Tensor], size: int,
            config: VllmConfig) -> None:  # fmt: skip
    """Make layers of this forward pass read and write their entries where a compacted request has them.

    Args:
        context: of the pass, before it begins; its metadata and slots of these layers are replaced.
        groups: what a layer keeps -> the layers that keep it.
        cuts: the same -> cut of a request, by the first block of its table; int32 [N], on the cache's device.
        size: slots of a block.
        config: of the engine.
    """
    assert isinstance(context.attn_metadata, dict)
    assert isinstance(context.slot_mapping, dict)
    for rule, names in groups.items():
        done: dict[int, tuple[Any, Tensor]] = {}  # layers of one cache group share their metadata
        for name in names:
            old = context.attn_metadata[name]
            if id(old) not in done:
                layer = context.no_compile_layers[name]
                done[id(old)] = _compacted(old, context.slot_mapping[name], cuts[rule], size, layer, config)
            context.attn_metadata[name], context.slot_mapping[name] = done[id(old)]


def _compacted(old: Any, slots: Tensor, cuts: Tensor, size: int, layer: Any, config: VllmConfig) -> tuple[Any, Tensor]:
    rows = cuts[old.block_table[:, 0].long()].to(old.seq_lens.dtype)
    lengths = cut_lengths(old.seq_lens, rows)
    slots = cut_slots(
        slots, old.query_start_loc, old.seq_lens, old.block_table, rows, size, old.num_actual_tokens
    )  # fmt: skip
    changed = {"seq_lens": lengths, "slot_mapping": slots, "scheduler_metadata": None}
    if isinstance(old, CPUAttentionMetadata):
        changed["scheduler_metadata"] = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths), num_heads=layer.num_heads, num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size, seq_lens=lengths, dtype=config.model_config.dtype,
            query_start_loc=old.query_start_loc, causal=old.causal, sliding_window_size=-1, isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, dynamic_causal=old.dynamic_causal, kv_cache_dtype="auto",
        )  # fmt: skip
    return replace(old, **changed), slots
