"""Compares an exported pair with the student: every tensor, and the logits of one request.

Shapes: B batch, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim_pl.compat import attention_of
from pdtrim_pl.errors import UserError
from pdtrim_pl.export.checkpoints import assembled, cast, exported_config, stage_tensors, stock_tensors
from pdtrim_pl.export.kv_only import kv_only_tensors
from pdtrim_pl.export.load import load_plan_and_policy, load_stage
from pdtrim_pl.export.upcast import compute_in_float32
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.loading import warn_of_slow_bf16
from pdtrim_pl.plan import PLAN_FILE, Stage, StagePlan
from pdtrim_pl.staged import BlockKV, KVCache, StagedCausalLM

TOLERANCE = 1e-4
"""Largest allowed difference of keys, values and logits, relative to the largest of them if that is above 1. Weights
and device are the same on both sides and both compute in fp32, so only the order of additions differs: a sliced matrix
is added up in another one. A wrong block or mask gives a far larger difference."""


StateOf = Callable[[nn.Module], Mapping[str, Tensor]]
"""Maps a module to its weights and persistent buffers by name."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A request of fixed token ids: two prompts of unequal length, padded on the left, and their responses."""

    prompt_ids: Tensor
    """[B, P]."""
    prompt_mask: Tensor
    """[B, P]."""
    response_ids: Tensor
    """[B, R]."""

    @classmethod
    def of(cls, vocabulary: int, context: int) -> Probe:
        """A request that fits the model: 12 + 4 tokens, or fewer if the context is shorter."""
        prompt, response = min(12, max(2, context - 4)), min(4, max(1, context - 2))
        ids = (torch.arange(2 * (prompt + response)).view(2, -1) * 7919 + 5) % vocabulary
        mask = torch.ones(2, prompt, dtype=torch.bool)
        mask[0, : prompt // 3] = False
        return cls(ids[:, :prompt], mask, ids[:, prompt:])


def verify_pair(export: Path, staged: StagedCausalLM, *, dtype: torch.dtype | None = None) -> float:
    """Reload an export stage by stage on the CPU, and compare it with the student rounded to the export's dtype.

    Every tensor must be equal. Then both compute one request, in fp32 with these weights.

    Args:
        export: a directory that `export_pair` wrote.
        staged: the student; it is not changed.
        dtype: element type of the export; None means the student's own.

    Returns:
        The largest absolute difference between the pair's and the student's teacher-forced logits on a `Probe`.

    Raises:
        UserError: the plan or a tensor differs, or the logits by more than `TOLERANCE`; the message names it.
    """
    dtype = dtype or staged.model.dtype
    plan = load_plan_and_policy(export)[0]
    if plan != _written_as(staged.plan, plan):
        raise UserError(f"{export / PLAN_FILE} is not the student's plan. Export again.")
    warn_of_slow_bf16("cpu", dtype)  # the pair will compute in it wherever a CPU serves it
    config = staged.model.config
    probe = Probe.of(config.vocab_size, usable_context(config.to_dict()))
    with torch.no_grad():
        logits, encoded, sent = _of_pair(export, staged, probe, dtype)
        expected, own = _of_student(staged, probe, dtype, sent)
    for index, block in own.blocks.items():
        for name, ours, theirs in _keys_and_values(encoded.blocks[index], block):
            _check(export, f"student's {name} of block {index}", ours, theirs)
    return _check(export, "student's logits", logits, expected)


def _written_as(plan: StagePlan, written: StagePlan) -> StagePlan:
    """The plan, for checkpoints of the form that `written` has."""
    return replace(plan, layout=written.layout, export_widths=written.export_widths)


def _check(export: Path, what: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference.

    Raises:
        UserError: it is larger than `TOLERANCE` allows.
    """
    difference = float((found.float() - expected.float()).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise UserError(
            f"The exported pair in {export} does not compute the {what}: they differ by {difference:.3g}, and "
            f"{allowed:.3g} is allowed."
        )
    return difference


def _keys_and_values(ours: BlockKV, theirs: BlockKV) -> tuple[tuple[str, Tensor, Tensor], ...]:
    """Keys and values at the real tokens of the prompts, [tokens, K, D]."""
    valid = theirs.slots.valid
    pairs = (("keys", ours.keys, theirs.keys), ("values", ours.values, theirs.values))
    return tuple((name, one.transpose(1, 2)[valid], other.transpose(1, 2)[valid]) for name, one, other in pairs)


def rounded_copy(staged: StagedCausalLM, dtype: torch.dtype, state_of: StateOf | None = None) -> StagedCausalLM:
    """A copy of the student on the CPU, in eval mode, with floating weights as `dtype`.

    It shares tensors that already have this form, but no modules: the student keeps its hooks and modes.

    Args:
        staged: the student.
        dtype: element type of the floating weights.
        state_of: gives the whole weights of a module by name, if `state_dict` does not hold them.
    """
    state_of = state_of or nn.Module.state_dict
    gates = staged.gates
    shared = [gate.block for gate in gates.values()]
    tensors = stock_tensors(staged, state_of(staged.model), [state_of(block) for block in shared], dtype)
    model = assembled(type(staged.model), staged.model.config, tensors)
    fill_buffers(model, stock_tensors(staged, _buffers(staged.model), [_buffers(block) for block in shared]))
    plan = replace(staged.plan, untied={})
    rounded = StagedCausalLM(
        model, plan, staged.policy, originals=staged.originals, architecture=staged.architecture
    ).eval()
    for index, gate in gates.items():
        for name, weights in gate.untied.items():
            own = copy.deepcopy(rounded.gates[index].block)
            own.load_state_dict(cast(state_of(weights), dtype), assign=True)
            rounded.gates[index].untied[name] = own
    rounded.apply_plan(staged.plan)
    return rounded


def sliced_stage(staged: StagedCausalLM, plan: StagePlan, stage: Stage) -> StagedCausalLM:
    """A model of one stage as it would be exported under `plan`, on the student's device, in eval mode.

    Args:
        staged: its shared weights are taken; it is not changed.
        plan: without KV-only blocks, and without untied ones that `staged` lacks.
        stage: which.
    """
    tensors = stage_tensors(staged, stage, plan=plan)
    model = assembled(type(staged.model), exported_config(staged, plan, stage), tensors)
    blocks = [_buffers(staged.gates[index].block) for index in plan.held(stage)]
    fill_buffers(model, stock_tensors(staged, _buffers(staged.model), blocks))
    own = replace(plan, untied={}, widths={})
    return StagedCausalLM(
        model, own, originals=plan.held(stage), architecture=staged.architecture
    ).eval().to(staged.model.device)  # fmt: skip


def fill_buffers(model: PreTrainedModel, buffers: Mapping[str, Tensor]) -> None:
    """Give a model the buffers that no checkpoint has, such as RoPE tables."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)


def _of_student(
    staged: StagedCausalLM, probe: Probe, dtype: torch.dtype, sent: KVCache
) -> tuple[Tensor, KVCache]:  # fmt: skip
    """Teacher-forced logits [B, R, V] of the student, and its cache of the prompt before the policy.

    Its decode stage gets what the pair's prefill sent. A codec that rounds to few bits turns the last bits of a sum
    into whole steps, so two caches that went through it can differ by far more than what computed them.
    """
    student = compute_in_float32(rounded_copy(staged, dtype))
    first, cache = _prefilled(student, probe)
    return _decoded(student, probe, first, sent), cache


def _of_pair(
    export: Path, staged: StagedCausalLM, probe: Probe, dtype: torch.dtype
) -> tuple[Tensor, KVCache, KVCache]:  # fmt: skip
    """Teacher-forced logits [B, R, V] of the two checkpoints, and the cache before and after the policy.

    Only one checkpoint is in memory at a time.
    """
    first, cache, sent = _prefill_part(export, staged, probe, dtype)
    return _decoded(_worker(export, "decode", staged, dtype), probe, first, sent), cache, sent


def _prefill_part(
    export: Path, staged: StagedCausalLM, probe: Probe, dtype: torch.dtype
) -> tuple[Tensor, KVCache, KVCache]:  # fmt: skip
    prefill = _worker(export, "prefill", staged, dtype)
    first, cache = _prefilled(prefill, probe)
    return first, cache, cache.retained(prefill.policy)


def _prefilled(model: StagedCausalLM, probe: Probe) -> tuple[Tensor, KVCache]:
    """Logits after the last position that prefill handles, [B, 1, V], and the cache of all that it handles."""
    handled = probe.prompt_ids.shape[1] - (model.plan.boundary == "decode")
    out = model.prefill(probe.prompt_ids[:, :handled], probe.prompt_mask[:, :handled])
    return model.logits(out.hidden[:, -1:]), out.cache


def _decoded(model: StagedCausalLM, probe: Probe, first: Tensor, sent: KVCache) -> Tensor:
    """Logits that predict the response, [B, R, V]; the first are prefill's under `boundary: prefill`."""
    fed, parts = probe.response_ids[:, :-1], [first]
    if model.plan.boundary == "decode":
        fed, parts = torch.cat([probe.prompt_ids[:, -1:], fed], dim=1), []
    if fed.shape[1]:
        parts.append(model.logits(model.decode(fed, sent).hidden))
    return torch.cat(parts, dim=1).float()


def _worker(export: Path, stage: Stage, staged: StagedCausalLM, dtype: torch.dtype) -> StagedCausalLM:
    """Load one stage of the export and compare its tensors with the student's."""
    attention = attention_of(staged.model)
    worker = load_stage(export, stage, attn_implementation=attention, architecture=staged.architecture)
    plan = _written_as(staged.plan, worker.plan)
    _compare(export / stage, stage_tensors(worker, stage), stage_tensors(staged, stage, dtype, plan))
    if stage == "prefill":
        _compare(export / stage, kv_only_tensors(worker), kv_only_tensors(staged, dtype))
    worker = compute_in_float32(worker)
    if plan.layout == "padded":
        check_padding(worker, stage)
    return worker


def check_padding(worker: StagedCausalLM, stage: Stage) -> None:
    """Run a loaded stage as an engine does that knows no plan: blocks that are there for padding must change nothing.

    Raises:
        UserError: one of them changes its input.
    """
    plan = worker.plan
    held = plan.held(stage)
    every = StagePlan(plan.model, held, held, "unified", plan.boundary)

    def look(index: int, before: Tensor, after: Tensor) -> None:
        if index not in plan.blocks(stage) and not torch.equal(before, after):
            raise UserError(
                f"`layout: padded` needs blocks that pass their input on, and a block of {plan.model.model_type} with "
                f"weights of zero does not (block {index} of {stage}). Use `layout: compact`."
            )

    config = worker.model.config
    probe = Probe.of(config.vocab_size, usable_context(config.to_dict()))
    worker.prefill(probe.prompt_ids, probe.prompt_mask, plan=every, observer=look)


def _compare(directory: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        raise UserError(f"{directory} does not hold the student's tensors: {sorted(found.keys() ^ expected.keys())}.")
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor):
            raise UserError(f"{directory} does not hold the student's tensor {name}, or the student's is not a number.")


def _buffers(module: nn.Module) -> Mapping[str, Tensor]:
    return dict(module.named_buffers())
