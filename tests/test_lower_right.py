"""Where rows are whole, the decode pass computes what a dense mask gives, and builds none.

Shapes: B batch, T new tokens, N entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_masks import Widest
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pdtrim_pl.plan import ModelRef, StagePlan
from pdtrim_pl.staged import StagedCausalLM, gate, masks
from pdtrim_pl.staged.cache import Slots, attention_mask
from pdtrim_pl.staged.gate import StagePass
from pdtrim_pl.staged.masks import LowerRight, fused_mask

FUSED = [family for family in FAMILIES if family != "gemma2"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@contextmanager
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give every pass a dense mask."""
    with monkeypatch.context() as patch:
        patch.setattr(gate, "fused_mask", lambda tokens, slots, window, _: attention_mask(tokens, slots, window))
        yield


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(0))


def right_padded(rows: int, length: int) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1, -2:] = False
    return mask


def slots_of(length: int, start: int = 0, rows: int = 1) -> Slots:
    return Slots(start + torch.arange(length).expand(rows, -1), torch.ones(rows, length, dtype=torch.bool))


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_whole_rows_give_the_hidden_states_and_gradients_of_a_dense_mask(
    family: str, grad: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "CHUNK", chunk)
    found: list[list[Tensor]] = []
    real = right_padded(2, 8)
    staged = StagedCausalLM(tiny_model(family)).requires_grad_(grad)

    def run() -> None:
        staged.zero_grad()
        hidden = staged(ids(2, 9), ids(2, 8), response_mask=real).hidden[real]
        if grad:
            hidden.square().sum().backward()
        gradients = [weight.grad.clone() for weight in staged.parameters() if weight.grad is not None]
        assert bool(gradients) == grad
        found.append([hidden.detach(), *gradients])

    run()
    with dense(monkeypatch):
        run()
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in found[1]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_rows_padded_at_both_ends_give_the_hidden_states_and_gradients_of_a_dense_mask(
    family: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "CHUNK", 3)
    monkeypatch.setattr(masks, "DENSE", 0)
    found: list[list[Tensor]] = []
    real = right_padded(3, 8)
    prompt = real.flip(1)
    prompt[2, :-1] = False
    staged = StagedCausalLM(tiny_model(family)).requires_grad_(grad)

    def run() -> None:
        staged.zero_grad()
        hidden = [staged(ids(3, 8), ids(3, 8), prompt, real, keep_cache=keep).hidden[real] for keep in (True, False)]
        torch.testing.assert_close(hidden[0], hidden[1], atol=1e-4, rtol=1e-4)
        if grad:
            hidden[0].square().sum().backward()
        gradients = [weight.grad.clone() for weight in staged.parameters() if weight.grad is not None]
        assert bool(gradients) == grad
        found.append([hidden[0].detach(), *gradients])

    run()
    with dense(monkeypatch):
        run()
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in found[1]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("past", "new"), [(4, 3), (0, 7), (2, 5)])
def test_rows_that_are_padded_before_their_first_token_are_computed_one_by_one(
    past: int, new: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "CHUNK", 2)
    monkeypatch.setattr(masks, "DENSE", 0)
    valid = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [0] * 7], device=device)
    slots = Slots(torch.arange(7, device=device).expand(4, -1), valid.bool())
    tokens = Slots(slots.positions[:, past:], slots.valid[:, past:])
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(4, 2, n, 8, generator=generator).to(device).requires_grad_() for n in (new, 7, 7)]
    mask = fused_mask(tokens, slots, None, torch.float32)
    assert isinstance(mask, LowerRight)
    assert list(mask.starts) == [3, 0, 1, 0]
    assert list(mask.to(torch.bfloat16).starts) == [3, 0, 1, 0], "a strategy that casts inputs loses nothing"
    results = []
    for each in (attention_mask(tokens, slots, None), mask):
        out = scaled_dot_product_attention(*given, attn_mask=each).transpose(1, 2)[tokens.valid]
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("new", "entries"), [(1, 7), (2, 7), (5, 7), (7, 20)])
def test_attention_without_a_dense_mask_equals_attention_with_one(
    new: int, entries: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, new, 8), (2, 4, entries, 8), (2, 4, entries, 8)]
    given = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    seen = torch.ones(new, entries, dtype=torch.bool, device=device).tril(entries - new)
    results = []
    for mask in (seen, LowerRight.of(new, entries, dtype, torch.device(device))):
        out = scaled_dot_product_attention(*given, attn_mask=mask)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    atol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(results[1], results[0], atol=atol, rtol=0)
    assert type(results[1][0]) is Tensor


def test_under_autocast_queries_keys_and_values_of_several_types_are_cast() -> None:
    given = [torch.randn(1, 2, length, 8, dtype=dtype) for length, dtype in
             [(3, torch.float32), (5, torch.float32), (5, torch.bfloat16)]]  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        mask = fused_mask(slots_of(3, 2), slots_of(5), None, torch.float32)
        assert isinstance(mask, LowerRight)
        assert mask.dtype == torch.bfloat16
        found = scaled_dot_product_attention(*given, attn_mask=mask)
        seen = torch.ones(3, 5, dtype=torch.bool).tril(2)
        expected = scaled_dot_product_attention(*given, attn_mask=seen)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("new", "entries"), [(16_384, 32_768), (32_768, 32_768), (1, 32_768)])
def test_at_32k_tokens_no_pass_builds_a_mask_of_tokens_times_entries(new: int, entries: int, padded: bool) -> None:
    tokens, past = slots_of(new, entries - new, rows=2), slots_of(entries - new, rows=2)
    if padded:
        (past if new < entries else tokens).valid[1, :9] = False
    plan = StagePlan.full(ModelRef("tiny", "llama", 4))
    with Widest() as widest:
        current = StagePass("decode", plan, tokens, None, False)
        current.mask(past.extended(tokens), None, torch.bfloat16)
    assert widest.bytes <= 8 * masks.CHUNK * entries
    assert widest.bytes < new * entries or new == 1


def test_attention_of_a_long_pass_takes_no_more_at_a_time_than_its_result_and_one_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masks, "CHUNK", 16)
    new, entries = 1000, 2000
    given = [torch.randn(1, 1, length, 8, requires_grad=True) for length in (new, entries, entries)]
    with Widest() as widest:
        mask = LowerRight.of(new, entries, torch.float32, torch.device("cpu"))
        scaled_dot_product_attention(*given, attn_mask=mask).sum().backward()
    assert widest.bytes == 4 * 16 * entries


@pytest.mark.parametrize(
    ("past", "new", "expected"),
    [
        ([1, 1, 1], [1, 1], LowerRight),
        ([1, 1, 1], [1, 0], LowerRight),
        ([0, 1, 1], [1, 1], Tensor),
        ([1, 1, 0], [1, 1], Tensor),
        ([1, 1, 1], [0, 1], Tensor),
        ([1, 1, 1], [1], type(None)),
        ([0, 1, 1], [1], Tensor),
        ([], [1, 1, 0], type(None)),
        ([], [0, 1, 1], Tensor),
    ],
)
def test_only_padding_after_the_last_token_needs_no_dense_mask(
    past: list[int], new: list[int], expected: type[Any]
) -> None:
    tokens = Slots(len(past) + torch.arange(len(new))[None], torch.tensor([new]).bool())
    before = Slots(torch.arange(len(past))[None], torch.tensor([past]).bool())
    assert type(fused_mask(tokens, before.extended(tokens), None, torch.float32)) is expected


@pytest.mark.parametrize(("window", "expected"), [(None, LowerRight), (9, LowerRight), (8, Tensor), (5, Tensor)])
def test_a_window_that_cuts_a_row_needs_a_dense_mask(window: int | None, expected: type[Any]) -> None:
    past = Slots(torch.tensor([[0, 1, 5, 6]]), torch.ones(1, 4, dtype=torch.bool))  # a policy kept the two ends
    tokens = slots_of(2, start=7)
    assert type(fused_mask(tokens, past.extended(tokens), window, torch.float32)) is expected
