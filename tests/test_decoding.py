"""Token by token in a preallocated cache: the same as a cache that grows, and when the loop ends.

Shapes: B batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BOUNDARIES
from test_contract import Batch, batches, every_family, few, students
from tiny_models import tiny_model
from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.staged import KVCache, StagedCausalLM
from pdtrim_pl.staged.decoding import DecodeLoop, PickToken, generate, stream
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.staged.preallocated import PreallocatedCache


def sent_for(staged: StagedCausalLM, batch: Batch) -> KVCache:
    handed = batch.prompt_ids.shape[1] - (staged.plan.boundary == "decode")
    return staged.prefill(batch.prompt_ids[:, :handed], batch.prompt_mask[:, :handed]).cache.retained(staged.policy)


def saying(*rows: list[int]) -> PickToken:
    """A picker that says given tokens, one list a row, whatever the logits."""
    steps = count()
    return lambda _: torch.tensor(rows)[:, next(steps)]


@every_family
@few
@given(data=st.data(), batch=batches(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_every_step_in_a_preallocated_cache_is_bit_for_bit_the_step_with_a_cache_that_grows(
    family: str, data: st.DataObject, batch: Batch, dtype: torch.dtype
) -> None:
    staged = data.draw(students(family)).to(dtype)
    growing = sent_for(staged, batch)
    room = PreallocatedCache(growing, batch.response_ids.shape[1])
    for token in batch.response_ids.unbind(dim=1):
        out = staged.decode(token[:, None], growing)
        growing = out.cache
        assert staged.step(token, room).equal(out.hidden[:, -1])
        assert room.lengths.equal(growing.lengths)
    for index in staged.plan.decode:
        assert room.blocks[index].keys.equal(growing.blocks[index].keys)
        assert room.blocks[index].values.equal(growing.blocks[index].values)


@torch.no_grad()
def test_a_block_that_was_sent_no_position_decodes_from_the_response_alone() -> None:
    model = tiny_model("llama")
    staged = StagedCausalLM(model, StagePlan.full(reference_to(model), boundary="decode"))
    rules = {1: Retention("first_last", 2, 0)}
    staged.apply_policy(KVRetentionPolicy("decode", staged.kv_shape, rules))
    batch = Batch.random([1, 1], [5, 5], seed=1)  # decode takes the whole prompt
    sent = sent_for(staged, batch)
    assert sent.blocks[1].keys.shape[2] == 0
    room = PreallocatedCache(sent, 5)
    for token in batch.response_ids.unbind(dim=1):
        out = staged.decode(token[:, None], sent)
        sent = out.cache
        assert staged.step(token, room).equal(out.hidden[:, -1])
    assert room.blocks[1].keys.shape[2] == 5


@torch.no_grad()
def test_steps_write_into_one_memory_and_leave_what_was_sent_as_it_was() -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    batch = Batch.random([6, 3], [4, 4], seed=0)
    sent = sent_for(staged, batch)
    before = {index: kv.keys.clone() for index, kv in sent.blocks.items()}
    room = PreallocatedCache(sent, 4)
    places = []
    for token in batch.response_ids.unbind(dim=1):
        staged.step(token, room)
        places.append([(kv.keys.data_ptr(), kv.values.data_ptr()) for kv in room.blocks.values()])
    assert places == places[:1] * 4
    assert all(before[index].equal(kv.keys) for index, kv in sent.blocks.items())


@torch.no_grad()
def test_a_cache_of_another_element_type_is_taken_up_in_that_of_the_stage() -> None:
    staged = StagedCausalLM(tiny_model("llama")).to(torch.bfloat16)
    batch = Batch.random([6], [3], seed=0)
    sent = StagedCausalLM(tiny_model("llama")).prefill(batch.prompt_ids).cache
    room = PreallocatedCache(sent, 3)
    for token in batch.response_ids.unbind(dim=1):
        out = staged.decode(token[:, None], sent)
        sent = out.cache
        assert staged.step(token, room).equal(out.hidden[:, -1])
    assert {kv.keys.dtype for kv in room.blocks.values()} == {torch.bfloat16}


def test_more_tokens_than_there_is_room_for_are_refused() -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    batch = Batch.random([6], [2], seed=0)
    with torch.no_grad():
        room = PreallocatedCache(sent_for(staged, batch), 1)
        staged.step(batch.response_ids[:, 0], room)
        with pytest.raises(AssertionError, match="no room"):
            staged.step(batch.response_ids[:, 1], room)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_row_that_has_stopped_repeats_its_stop_token_until_every_row_has_one(boundary: Boundary) -> None:
    model = tiny_model("llama")
    staged = StagedCausalLM(model, StagePlan.full(reference_to(model), boundary=boundary))
    prompt = torch.tensor([[5, 2], [6, 9]])  # the stop token that ends a prompt stops nothing
    said = saying([5, 2, 8, 9, 9, 9], [6, 6, 6, 7, 9, 9])
    found = generate(staged, prompt, max_new_tokens=6, stop_ids=(2, 7), pick=said)
    assert found.tolist() == [[5, 2, 2, 2], [6, 6, 6, 7]]


def test_a_loop_ends_after_its_room_or_at_a_first_token_that_stops() -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    prompt = torch.tensor([[5, 6, 7]])
    for tokens in (1, 2, 5):
        assert len(list(stream(staged, prompt, max_new_tokens=tokens))) == tokens
    first, sent = torch.tensor([2]), staged.prefill(prompt).cache
    loop = DecodeLoop(staged, sent, room=9, first=first, last_prompt=prompt[:, -1], stop_ids=(2,))
    assert [token.tolist() for token in loop] == [[2]]
    assert list(DecodeLoop(staged, sent, room=0, first=first, last_prompt=prompt[:, -1])) == []


@torch.no_grad()
def test_a_loop_chooses_what_the_whole_sequence_predicts() -> None:
    original = tiny_model("llama")
    staged, prompt = StagedCausalLM(tiny_model("llama")), torch.tensor([[5, 6, 7, 8], [9, 3, 4, 5]])
    expected = original.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 4:]  # type: ignore
    assert generate(staged, prompt, max_new_tokens=8).equal(expected)


def test_no_token_and_more_than_the_context_are_refused() -> None:
    staged, prompt = StagedCausalLM(tiny_model("llama")), torch.ones(1, 120, dtype=torch.long)
    with pytest.raises(UserError, match="`max_new_tokens` is 0"):
        stream(staged, prompt, max_new_tokens=0)
    with pytest.raises(UserError, match="take 129 tokens"):
        stream(staged, prompt, max_new_tokens=9)


def test_no_step_records_a_graph() -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    seen: list[Tensor] = []

    def pick(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(dim=-1)

    generate(staged, torch.tensor([[5, 6, 7]]), max_new_tokens=3, pick=pick)
    assert len(seen) == 3
    assert not any(logits.requires_grad for logits in seen)
