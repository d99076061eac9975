"""The acceptance test of the whole system: every way to run one request gives the same logits.

The two-process way is in test_serving.py.

Shapes: B batch, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import BOUNDARIES, RELATIONS, plans, policies, retentions
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, Relation, Retention, StagePlan, handled_positions
from pdtrim_pl.staged import StagedCausalLM, StagedOutput
from pdtrim_pl.staged.description import reference_to

BLOCKS = 4
WITHOUT_WINDOWS = ("llama", "qwen3", "gpt_neox", "olmo2", "granite")
TOLERANCE = 1e-4
SEND_EVERYTHING = (None, Retention(), Retention("first_last", 0.5, 0.5), Retention("first_last", 3, 20))
few = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
every_family = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Batch:
    """Random prompts, padded on the left, and responses, padded on the right."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor

    @classmethod
    def random(cls, prompts: Sequence[int], responses: Sequence[int], seed: int) -> Batch:
        """Random tokens for given lengths; padding holds random tokens too, so that using it shows."""
        generator = torch.Generator().manual_seed(seed)
        wide, long = max(prompts), max(responses)
        prompt_ids = torch.randint(3, 64, (len(prompts), wide), generator=generator)
        response_ids = torch.randint(3, 64, (len(prompts), long), generator=generator)
        prompt_mask = torch.arange(wide)[None] >= wide - torch.tensor(prompts)[:, None]
        response_mask = torch.arange(long)[None] < torch.tensor(responses)[:, None]
        return cls(prompt_ids, prompt_mask, response_ids, response_mask)

    def row(self, index: int) -> Batch:
        """One row alone, without padding."""
        prompt, response = self.prompt_mask[index], self.response_mask[index]
        prompt_ids, response_ids = self.prompt_ids[index][prompt][None], self.response_ids[index][response][None]
        everything = torch.ones_like(prompt_ids, dtype=torch.bool), torch.ones_like(response_ids, dtype=torch.bool)
        return Batch(prompt_ids, everything[0], response_ids, everything[1])

    def __len__(self) -> int:
        return len(self.prompt_ids)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Any shapes; often a row whose prompt is one token."""
    rows = draw(st.integers(1, 3))
    prompts = draw(st.lists(st.just(1) | st.integers(1, 10), min_size=rows, max_size=rows))
    responses = draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows))
    return Batch.random(prompts, responses, draw(st.integers(0, 99)))


@st.composite
def students(draw: st.DrawFn, family: str, relations: Sequence[Relation] = RELATIONS) -> StagedCausalLM:
    """A staged model under any plan, widths and policy, its untied weights moved away from the shared ones."""
    model = tiny_model(family, blocks=BLOCKS)
    parts = tuple(architecture_of(model.config).cuts)
    plan = draw(plans(BLOCKS, relations, model=reference_to(model, family), parts=parts))
    staged = StagedCausalLM(model, plan)
    staged.apply_policy(draw(st.none() | policies(plan, kv=staged.kv_shape)))
    return moved_apart(staged)


def moved_apart(staged: StagedCausalLM) -> StagedCausalLM:
    """The same model with its untied weights changed a little."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for gate in staged.gates.values():
            for parameter in gate.untied.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return staged


def forced(staged: StagedCausalLM, batch: Batch) -> Tensor:
    """Teacher-forced logits, [B, R, V]."""
    out = staged(batch.prompt_ids, batch.response_ids, batch.prompt_mask, batch.response_mask)
    return staged.logits(out.hidden)


def token_by_token(staged: StagedCausalLM, batch: Batch) -> Tensor:
    """Logits [B, R, V] of the three calls of the contract, one response token at a time."""
    steps: list[StagedOutput] = []
    prompt_ids, prompt_mask, fed = batch.prompt_ids, batch.prompt_mask, batch.response_ids[:, :-1]
    mask = batch.response_mask[:, :-1]
    if staged.plan.boundary == "decode":
        fed = torch.cat([prompt_ids[:, -1:], fed], dim=1)
        mask = torch.cat([prompt_mask[:, -1:], mask], dim=1)
        prompt_ids, prompt_mask = prompt_ids[:, :-1], prompt_mask[:, :-1]
    encoded = staged.prefill(prompt_ids, prompt_mask)
    cache = encoded.cache.retained(staged.policy)
    for step in range(fed.shape[1]):
        steps.append(staged.decode(fed[:, step : step + 1], cache, mask[:, step : step + 1]))
        cache = steps[-1].cache
    hidden = [encoded.hidden[:, -1:]] if staged.plan.boundary == "prefill" else []
    return staged.logits(torch.cat([*hidden, *(out.hidden for out in steps)], dim=1))


def assert_same(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Equal logits [B, R, V] wherever `mask` [B, R] counts."""
    torch.testing.assert_close(found[mask], expected[mask], atol=TOLERANCE, rtol=0.0)


@every_family
@few
@given(data=st.data(), batch=batches())
@torch.no_grad()
def test_teacher_forced_logits_are_the_token_by_token_logits(family: str, data: st.DataObject, batch: Batch) -> None:
    # In fp64: rounding alone reaches 1e-4 in fp32 where random weights are badly conditioned.
    staged = data.draw(students(family)).double()
    assert_same(forced(staged, batch), token_by_token(staged, batch), batch.response_mask)


@every_family
@few
@given(data=st.data(), batch=batches())
@torch.no_grad()
def test_a_row_of_a_padded_batch_is_that_row_alone(family: str, data: st.DataObject, batch: Batch) -> None:
    staged = data.draw(students(family))
    together = forced(staged, batch)
    for index in range(len(batch)):
        alone = batch.row(index)
        found = together[index : index + 1, : alone.response_ids.shape[1]]
        assert_same(found, forced(staged, alone), alone.response_mask)


@every_family
@few
@given(batch=batches(), boundary=st.sampled_from(BOUNDARIES), rule=st.sampled_from(SEND_EVERYTHING))
@torch.no_grad()
def test_the_full_plan_that_sends_everything_is_the_original_model(
    family: str, batch: Batch, boundary: Boundary, rule: Retention | None
) -> None:
    original, model = tiny_model(family, blocks=BLOCKS), tiny_model(family, blocks=BLOCKS)
    staged = StagedCausalLM(model, StagePlan.full(reference_to(model), boundary=boundary))
    if rule is not None:
        staged.apply_policy(KVRetentionPolicy(boundary, staged.kv_shape, dict.fromkeys(range(BLOCKS), rule)))
    found = forced(staged, batch)
    for index in range(len(batch)):
        alone = batch.row(index)
        logits = original(torch.cat([alone.prompt_ids, alone.response_ids], dim=1)).logits
        expected = logits[:, alone.prompt_ids.shape[1] - 1 : -1]
        assert_same(found[index : index + 1, : expected.shape[1]], expected, alone.response_mask)


@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
@few
@given(
    kept=st.sets(st.integers(0, BLOCKS - 1), min_size=1),
    rule=retentions(),
    boundary=st.sampled_from(BOUNDARIES),
    prompt=st.integers(1, 10),
    response=st.integers(1, 6),
)
@torch.no_grad()
def test_dropped_blocks_and_unsent_positions_are_deleted_blocks_and_masked_positions_of_the_original_model(
    family: str, kept: set[int], rule: Retention, boundary: Boundary, prompt: int, response: int
) -> None:
    batch, blocks = Batch.random([prompt], [response], seed=prompt), tuple(sorted(kept))
    model, original = tiny_model(family, blocks=BLOCKS), tiny_model(family, blocks=BLOCKS)
    staged = StagedCausalLM(model, StagePlan(reference_to(model), blocks, blocks, "unified", boundary))
    staged.apply_policy(KVRetentionPolicy(boundary, staged.kv_shape, dict.fromkeys(blocks, rule)))

    layers = staged.architecture.blocks(original)
    original.base_model.register_module("layers", nn.ModuleList(layers[index] for index in blocks))
    original.config.num_hidden_layers = len(blocks)
    total, handled = prompt + response, handled_positions(prompt, boundary)
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    first, last = rule.counts(handled)
    seen[handled:, first : handled - last] = False
    mask = torch.zeros(1, 1, total, total).masked_fill(~seen, torch.finfo(torch.float32).min)
    ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
    expected = original(ids, attention_mask=mask, use_cache=False).logits[:, prompt - 1 : -1]
    assert_same(forced(staged, batch), expected, batch.response_mask)


@every_family
@few
@given(data=st.data(), batch=batches())
@torch.no_grad()
def test_a_kv_only_block_gives_the_keys_and_values_it_would_give_if_it_ran(
    family: str, data: st.DataObject, batch: Batch
) -> None:
    model = tiny_model(family, blocks=BLOCKS)
    block = data.draw(st.integers(0, BLOCKS - 1))
    every = tuple(range(BLOCKS))
    others = data.draw(st.sets(st.sampled_from(every).filter(lambda other: other != block), min_size=1))
    without = StagePlan(reference_to(model), tuple(sorted(others)), every, "prefill_only")
    within = replace(without, prefill=tuple(sorted({*others, block})))
    staged = StagedCausalLM(model, without)
    projected = staged.prefill(batch.prompt_ids, batch.prompt_mask).cache.blocks[block]
    ran = staged.prefill(batch.prompt_ids, batch.prompt_mask, plan=within).cache.blocks[block]
    valid = batch.prompt_mask
    for found, expected in ((projected.keys, ran.keys), (projected.values, ran.values)):
        assert_same(found.transpose(1, 2), expected.transpose(1, 2), valid)


@every_family
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_loss_that_only_decode_sees_moves_the_prefill_weights_through_the_cache(
    family: str, boundary: Boundary
) -> None:
    model = tiny_model(family, blocks=BLOCKS)
    every = tuple(range(BLOCKS))
    plan = StagePlan(reference_to(model), every, every, boundary=boundary, untied={"decode": every})
    staged = StagedCausalLM(model, plan)
    rules = {block: Retention("first_last", 1, 0.5) for block in every}
    staged.apply_policy(KVRetentionPolicy(boundary, staged.kv_shape, rules))
    batch = Batch.random([6, 4], [3, 3], seed=0)
    forced(staged, batch)[:, 1:].square().mean().backward()
    for index in every:
        weights = staged.gates[index].weights("prefill", staged.plan)
        gradients = [p.grad for p in weights.parameters() if p.grad is not None]
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0, f"block {index} got no gradient"


@every_family
@settings(few, max_examples=2)
@given(data=st.data(), batch=batches())
def test_gradient_checkpointing_changes_neither_values_nor_gradients(
    family: str, data: st.DataObject, batch: Batch
) -> None:
    staged = data.draw(students(family)).train()
    results: list[tuple[Tensor, list[Tensor | None]]] = []
    for staged.gradient_checkpointing in (False, True):
        staged.zero_grad(set_to_none=True)
        logits = forced(staged, batch)
        logits[batch.response_mask].square().mean().backward()
        results.append((logits.detach(), [parameter.grad for parameter in staged.parameters()]))
    (plain, gradients), (recomputed, again) = results
    assert_same(recomputed, plain, batch.response_mask)
    for found, expected in zip(again, gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=1e-4)


def test_untied_weights_of_one_stage_change_that_stage_alone() -> None:
    model = tiny_model("llama", blocks=BLOCKS)
    every = tuple(range(BLOCKS))
    batch = Batch.random([5, 3], [4, 2], seed=3)
    staged = StagedCausalLM(model, StagePlan(reference_to(model), every, every, untied={"decode": (2,)}))
    with torch.no_grad():
        tied = forced(staged, batch)
        moved_apart(staged)
        untied = forced(staged, batch)
    assert_same(untied[:, :1], tied[:, :1], batch.response_mask[:, :1])  # prefill predicts the first token
    assert not torch.allclose(untied[:, 1], tied[:, 1], atol=TOLERANCE)
    assert [sorted(gate.untied) for gate in staged.gates.values()] == [[], [], ["decode"], []]
