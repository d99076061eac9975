"""Attention mass equals a naive computation on unpadded rows of the plain Hugging Face model, and leaves no trace."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.data.examples import Example
from pdtrim_pl.evaluation.attention import attention_mass
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, Retention, StagePlan, handled_positions
from pdtrim_pl.staged import StagedCausalLM

Row = tuple[int, int]
"""Lengths of a prompt and its response."""


def rows_to_batch(rows: list[Row], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = [[torch.randint(3, 64, (n,), generator=generator) for n in row] for row in rows]
    return Collator(pad_id=0)([Example(prompt, response) for prompt, response in ids])


@torch.no_grad()
def naive_mass(model: PreTrainedModel, batch: Batch, rule: Retention, boundary: Boundary) -> list[float]:
    """Row by row, without padding, over the attention of the whole text at once."""
    model.set_attn_implementation("eager")
    shares: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    for prompt, seen, response, real in zip(*batch[:4], strict=True):
        text = torch.cat([prompt[seen], response[real]])[None]
        tokens = handled_positions(int(seen.sum()), boundary)
        first, last = rule.counts(tokens)
        out = model(text, output_attentions=True)
        for block, weights in enumerate(out.attentions):
            to_prompt = weights[0, :, tokens : text.shape[1] - 1, :tokens]
            kept = to_prompt[..., :first].sum(-1) + to_prompt[..., tokens - last :].sum(-1)
            whole = to_prompt.sum(-1)
            shares[block].append((kept / whole)[whole > 0])
    found = [torch.cat([part.flatten() for part in parts]) for parts in shares]
    return [float(part.mean()) if len(part) else 1.0 for part in found]


def without(model: PreTrainedModel, gone: set[int]) -> PreTrainedModel:
    """A plain copy that lacks some blocks."""
    small = copy.deepcopy(model)
    kept = [block for index, block in enumerate(small.base_model.layers) if index not in gone]
    small.base_model.layers = torch.nn.ModuleList(kept)
    small.config.num_hidden_layers = len(kept)
    for position, block in enumerate(kept):
        block.self_attn.layer_idx = position
    return small


@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mass_equals_the_naive_one_in_every_family(family: str, boundary: Boundary) -> None:
    batch, rule = rows_to_batch([(9, 4), (5, 2), (3, 8)]), Retention("first_last", 1, 0.3)
    expected = naive_mass(tiny_model(family), batch, rule, boundary)
    model = StagedCausalLM(tiny_model(family))
    model.apply_plan(replace(model.plan, boundary=boundary))
    found = attention_mass(model, [batch], first=rule.first, last=rule.last)
    assert list(found) == [0, 1, 2, 3]
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=8)
@given(
    rows=st.lists(st.tuples(st.integers(2, 9), st.integers(2, 6)), min_size=2, max_size=4),
    gone=st.sets(st.integers(0, 3), max_size=3),
    rule=st.sampled_from([Retention("first_last", *pair) for pair in [(1, 0), (0, 2), (2, 0.5), (0.2, 0.2), (50, 0)]]),
    boundary=st.sampled_from(["prefill", "decode"]),
)
def test_mass_of_a_pruned_plan_equals_the_mass_of_a_pruned_model(
    rows: list[Row], gone: set[int], rule: Retention, boundary: Boundary
) -> None:
    batch = rows_to_batch(rows)
    expected = naive_mass(without(tiny_model("llama"), gone), batch, rule, boundary)
    model = StagedCausalLM(tiny_model("llama"))
    kept = tuple(block for block in range(4) if block not in gone)
    model.apply_plan(StagePlan(model.plan.model, kept, kept, "unified", boundary))
    split = [Batch(*(tensor[:1] for tensor in batch)), Batch(*(tensor[1:] for tensor in batch))]
    found = attention_mass(model, split, first=rule.first, last=rule.last)
    assert list(found) == list(kept)
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)


def test_mass_is_measured_with_everything_sent_whatever_the_policy() -> None:
    model, batch = StagedCausalLM(tiny_model("llama")), rows_to_batch([(9, 4), (5, 2)])
    before = attention_mass(model, [batch], first=1, last=1)
    model.apply_policy(KVRetentionPolicy("prefill", model.kv_shape, {1: Retention("first_last", 1, 1)}))
    assert attention_mass(model, [batch], first=1, last=1) == before


def test_tokens_past_a_sliding_window_are_left_out_and_a_block_that_never_sees_the_prompt_has_mass_one() -> None:
    batch, rule = rows_to_batch([(6, 9), (4, 5)]), Retention("first_last", 1, 1)
    for window in (1, 3):
        expected = naive_mass(tiny_model("mistral", sliding_window=window), batch, rule, "prefill")
        found = attention_mass(StagedCausalLM(tiny_model("mistral", sliding_window=window)), [batch], first=1, last=1)
        assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    assert all(value < 1 for value in found.values())
    alone = StagedCausalLM(tiny_model("mistral", sliding_window=1))
    assert set(attention_mass(alone, [batch], first=1, last=1).values()) == {1.0}


def test_attention_implementation_modes_and_logits_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = StagedCausalLM(tiny_model("llama")), rows_to_batch([(9, 4), (5, 2)])
    arguments = (batch.prompt_ids, batch.response_ids, batch.prompt_mask, batch.response_mask)
    expected = model(*arguments).hidden
    model.model.train()
    attention_mass(model, [batch], first=1, last=1)
    assert model.model.training
    model.eval()
    assert model.model.config._attn_implementation == "sdpa"
    assert torch.equal(model(*arguments).hidden, expected)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(model, "decode", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        attention_mass(model, [batch], first=1, last=1)
    assert model.model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


def test_untied_decode_weights_are_the_ones_measured() -> None:
    model, batch = StagedCausalLM(tiny_model("llama")), rows_to_batch([(9, 4), (5, 2)])
    tied = attention_mass(model, [batch], first=1, last=1)
    model.apply_plan(replace(model.plan, untied={"decode": (2,)}))
    assert attention_mass(model, [batch], first=1, last=1) == tied
    torch.nn.init.zeros_(model.gates[2].untied["decode"].self_attn.q_proj.weight)
    changed = attention_mass(model, [batch], first=1, last=1)
    assert changed[1] == tied[1]
    assert changed[2] != pytest.approx(tied[2], abs=1e-3)


def test_a_decode_stage_without_tokens_is_an_error() -> None:
    model = StagedCausalLM(tiny_model("llama"))
    with pytest.raises(ValueError, match="every response has one token"):
        attention_mass(model, [rows_to_batch([(4, 1), (3, 1)])], first=1, last=1)


def test_counts_that_keep_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="would send nothing"):
        attention_mass(StagedCausalLM(tiny_model("llama")), [], first=0, last=0)
