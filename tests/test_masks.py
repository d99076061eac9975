"""The mask says which entries a token sees, in no more memory than itself.

Shapes: B batch, T new tokens, N cached entries.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdtrim_pl.plan import ModelRef, StagePlan
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.cache import Slots, attention_mask
from pdtrim_pl.staged.gate import StagePass

LONG = 1500


class Widest(TorchDispatchMode):
    """Keeps the largest number of bytes that any operation needed for one result of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@st.composite
def slots(draw: st.DrawFn) -> tuple[Slots, Slots]:
    """New tokens behind some entries that a policy kept: holes in the positions, some that do not count."""
    rows, past, new = draw(st.integers(1, 3)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    length = past + draw(st.integers(0, 4))
    kept = torch.stack([torch.randperm(length, generator=generator)[:past].sort().values for _ in range(rows)])
    before = Slots(kept, torch.rand(rows, past, generator=generator) < 0.7)
    positions = length + torch.arange(new).expand(rows, -1)
    after = Slots(positions, torch.rand(rows, new, generator=generator) < 0.7)
    return after, before.extended(after)


@given(slots(), st.none() | st.integers(1, 8))
def test_a_token_sees_itself_and_what_counts_at_or_before_it_within_the_window(
    pair: tuple[Slots, Slots], window: int | None
) -> None:
    queries, entries = pair
    found = attention_mask(queries, entries, window)
    (rows, new), held = queries.positions.shape, entries.positions.shape[1]
    assert found.shape == (rows, 1, new, held)
    assert found.dtype == torch.bool
    for row in range(rows):
        for token in range(new):
            for entry in range(held):
                ahead = int(queries.positions[row, token] - entries.positions[row, entry])
                near = ahead >= 0 and (window is None or ahead < window)
                itself = entry == held - new + token
                assert bool(found[row, 0, token, entry]) == (itself or (near and bool(entries.valid[row, entry])))


@pytest.mark.parametrize("window", [None, 700])
def test_a_mask_is_built_in_bytes_and_not_in_differences_of_positions(window: int | None) -> None:
    tokens = Slots(torch.arange(LONG)[None], torch.ones(1, LONG, dtype=torch.bool))
    with Widest() as widest:
        attention_mask(tokens, tokens, window)
    assert widest.bytes == LONG * LONG, "one byte for each token and entry, in every step"


def staged_pass(additive: bool) -> StagePass:
    tokens = Slots(torch.arange(LONG)[None], torch.ones(1, LONG, dtype=torch.bool))
    tokens.valid[0, 0] = False
    plan = StagePlan.full(ModelRef("tiny", "llama", 4))
    return StagePass("prefill", plan, tokens, None, additive)


def test_a_mask_that_eager_attention_adds_is_filled_in_place() -> None:
    current = staged_pass(additive=True)
    with Widest() as widest:
        mask = current.mask(current.tokens, None, torch.bfloat16)
    assert mask is not None
    assert widest.bytes == mask.untyped_storage().nbytes() == 2 * LONG * LONG


def test_blocks_with_one_past_share_one_mask_whatever_their_element_type_and_a_window_that_leaves_nothing_out() -> None:
    current = staged_pass(additive=False)
    masks = {
        id(current.mask(current.tokens, window, dtype))
        for window in (None, LONG, LONG + 1)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(masks) == 1
    assert id(current.mask(current.tokens, LONG - 1, torch.float32)) not in masks


def test_a_prompt_within_the_window_needs_no_mask_and_gives_the_logits_of_one_with_a_mask() -> None:
    staged = StagedCausalLM(tiny_model("gemma3_text")).eval()
    (window,) = {gate.window for gate in staged.gates.values()} - {None}
    assert window is not None
    ids = torch.randint(3, 60, (1, window), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids[:, :1], ids], dim=1)
    counts = torch.ones_like(padded, dtype=torch.bool)
    counts[0, 0] = False
    tokens = Slots(torch.arange(window)[None], torch.ones(1, window, dtype=torch.bool))
    assert StagePass("prefill", staged.plan, tokens, None, False).mask(tokens, window, torch.float32) is None
    with torch.no_grad():
        alone, beside = staged.prefill(ids).hidden[:, -1], staged.prefill(padded, counts).hidden[:, -1]
    torch.testing.assert_close(alone, beside, atol=1e-4, rtol=0)
