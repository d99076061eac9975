"""What the host knows of padding is what the masks on the device say.

Shapes: B batch, N entries.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor

from pdtrim_pl.plan import STAGES, Boundary, KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged import masks as mask_room
from pdtrim_pl.staged.cache import Slots
from pdtrim_pl.staged.masks import LowerRight, fused_mask
from pdtrim_pl.staged.rows import RowCounts

BOUNDARIES: tuple[Boundary, ...] = ("prefill", "decode")


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Masks of prompts padded on the left and of responses padded on the right."""
    rows = draw(st.integers(1, 3))
    prompts = [draw(st.integers(1, 6)) for _ in range(rows)]
    responses = [draw(st.integers(1, 6)) for _ in range(rows)]
    width, spoken = max(prompts) + draw(st.integers(0, 2)), max(responses) + draw(st.integers(0, 2))
    prompt = torch.stack([torch.arange(width) >= width - tokens for tokens in prompts])
    return prompt, torch.stack([torch.arange(spoken) < tokens for tokens in responses])


def request_of(prompt: Tensor, response: Tensor, boundary: Boundary) -> Request:
    return Request.of(prompt.long(), response.long(), prompt, response, boundary, RowCounts.of(prompt, response))


def check_same(tokens: Slots, slots: Slots, window: int | None) -> None:
    """The mask of these slots is the same whether the host knows them or reads them."""
    assert slots.rows is not None
    unknown = Slots(slots.positions, slots.valid)
    ours, theirs = (fused_mask(tokens, each, window, torch.float32) for each in (slots, unknown))
    assert type(ours) is type(theirs)
    if isinstance(ours, LowerRight) and isinstance(theirs, LowerRight):
        assert list(ours.starts) == list(theirs.starts)
    elif ours is not None and theirs is not None:
        assert torch.equal(ours, theirs)


@given(masks(), st.sampled_from(BOUNDARIES), st.none() | st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_the_masks_of_both_stages_are_the_same_if_the_host_knows_the_rows(
    pair: tuple[Tensor, Tensor], boundary: Boundary, window: int | None, one_by_one: bool, kept: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_room, "DENSE", 0 if one_by_one else 2**20)
        request = request_of(*pair, boundary)
        valid, rows = request.valid["prefill"], request.rows["prefill"]
        handled = Slots((valid.cumsum(1) - 1).clamp(min=0), valid, rows)
        check_same(handled, handled, window)
        past, lengths = handled, valid.sum(1)
        if kept:
            order, past = handled.kept_by(Retention("first_last", kept // 2, 1 + kept // 2))
            expected_order, expected = Slots(handled.positions, valid).kept_by(
                Retention("first_last", kept // 2, 1 + kept // 2)
            )
            assert torch.equal(order, expected_order)
            assert torch.equal(past.valid, expected.valid)
        fed = request.valid["decode"]
        if not fed.shape[1]:
            return
        tokens = Slots(lengths[:, None] + torch.arange(fed.shape[1]), fed, request.rows["decode"])
        # A policy may keep positions that lie closer together than the host assumes: then a window gets a dense mask.
        check_same(tokens, past.extended(tokens), None if kept else window)


@given(masks())
def test_prompt_and_response_in_one_pass_have_the_rows_of_their_mask(pair: tuple[Tensor, Tensor]) -> None:
    request = request_of(*pair, "prefill")
    valid = torch.cat([request.valid[stage] for stage in STAGES], dim=1)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    for window in (None, *range(1, 12)):
        check_same(Slots(positions, valid), Slots(positions, valid, request.joined_rows), window)


@given(masks())
def test_counted_responses_are_where_the_mask_is_true(pair: tuple[Tensor, Tensor]) -> None:
    counts = RowCounts.of(*pair)
    assert counts is not None
    found = counts.real_responses(pair[1].shape[1], torch.device("cpu"))
    assert torch.equal(found, pair[1].flatten().nonzero()[:, 0])
    assert counts.longest == max((pair[0].sum(1) + pair[1].sum(1)).tolist())


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("keep_cache", [False, True])
def test_a_pass_with_counts_gives_the_hidden_states_of_one_without(
    family: str, boundary: Boundary, keep_cache: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    staged = StagedCausalLM(tiny_model(family)).eval()
    plan = StagePlan.full(staged.plan.model, boundary=boundary)
    prompt, response = (torch.randint(3, 60, (3, n), generator=generator) for n in (9, 7))
    prompt_mask, response_mask = torch.ones(3, 9, dtype=torch.bool), torch.ones(3, 7, dtype=torch.bool)
    prompt_mask[1, :4] = False
    response_mask[2, 3:] = False
    given: Any = (prompt, response, prompt_mask, response_mask)
    policy = KVRetentionPolicy(boundary, staged.kv_shape, {0: Retention("first_last", 1, 3)})
    counts = RowCounts.of(prompt_mask, response_mask)
    for sent in (None, policy):
        with torch.no_grad():
            ours, theirs = (
                staged(*given, plan=plan, policy=sent, keep_cache=keep_cache, counts=each).hidden
                for each in (counts, None)
            )
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_masks_that_are_padded_elsewhere_are_not_counted() -> None:
    whole = torch.ones(2, 3, dtype=torch.bool)
    for place in (0, 1, 2):
        mask = whole.clone()
        mask[1, place] = False
        assert (RowCounts.of(mask, whole) is None) == (place != 0)
        assert (RowCounts.of(whole, mask) is None) == (place != 2)
