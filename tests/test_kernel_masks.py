"""FlexAttention and FlashAttention compute what a dense mask says, or are refused.

FlexAttention runs on a CPU without gradients. FlashAttention does not: what its kernel does with a mask is written out
here, as its documentation says it.

Shapes: B batch, T new tokens, N entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from test_masks import slots
from test_rows import masks, request_of
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from transformers.integrations import flex_attention as flex_room

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.loading import Attention, Loading, check_attention
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, Retention
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.cache import Slots, attention_mask
from pdtrim_pl.staged.kernel_masks import flash_mask, flex_mask

ENDS = Retention("first_last", 1, 2)


class Eager:
    """FlexAttention as it is, for a CPU: compiling it takes a minute."""

    calls = 0

    def __init__(self, training: bool) -> None: ...

    def __call__(self) -> Any:
        Eager.calls += 1
        return flex_attention


@given(slots(), st.none() | st.integers(1, 8))
def test_a_block_mask_says_what_the_dense_mask_says(pair: tuple[Slots, Slots], window: int | None) -> None:
    tokens, held = pair
    (rows, new), entries = tokens.positions.shape, held.positions.shape[1]
    mask = flex_mask(tokens, held, window, torch.float32)
    assert isinstance(mask, BlockMask)
    assert mask.shape == (rows, 1, new, entries)
    dense = create_mask(mask.mask_mod, rows, 1, new, entries, device="cpu")
    assert torch.equal(dense, attention_mask(tokens, held, window))


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_gives_the_hidden_states_of_a_dense_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_room, "WrappedFlexAttention", Eager)
    monkeypatch.setattr(Eager, "calls", 0)
    found = []
    generator = torch.Generator().manual_seed(0)
    prompt, response = (torch.randint(3, 60, (3, n), generator=generator) for n in (9, 7))
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, -3:] = False
    prompt_mask = torch.ones(3, 9, dtype=torch.bool)
    prompt_mask[2, :4] = False
    for attention in ("eager", "flex_attention"):
        model = tiny_model(family)
        model.set_attn_implementation(attention)
        staged = StagedCausalLM(model).eval()
        plan = staged.plan.drop("decode", 1)
        policy = KVRetentionPolicy("prefill", staged.kv_shape, {0: ENDS})
        with torch.no_grad():
            for sent in (None, policy):
                out = staged(prompt, response, prompt_mask, real, plan=plan, policy=sent)
                found.append(out.hidden[real])
    assert Eager.calls == 2 * (4 + 3), "blocks of prefill and of decode, with and without a policy"
    half = len(found) // 2
    torch.testing.assert_close(found[half:], found[:half], atol=1e-4, rtol=1e-4)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """What FlashAttention computes: rows without padding, causal from the lower right, a window in entries."""
    (rows, new), entries = query.shape[:2], key.shape[1]
    out = torch.zeros_like(query)
    for row in range(rows):
        held = torch.ones(entries, dtype=torch.bool) if mask is None else mask[row]
        asked = held[entries - new :]
        keys, values, queries = key[row][held], value[row][held], query[row][asked]
        ahead = torch.arange(len(keys))[None] - (len(keys) - len(queries)) - torch.arange(len(queries))[:, None]
        scores = (queries @ keys.T).masked_fill((ahead > 0) | (ahead <= -(window or entries)), -torch.inf)
        out[row, asked] = scores.softmax(dim=-1) @ values
    return out


@given(masks(), st.sampled_from(["prefill", "decode"]), st.none() | st.integers(1, 9), st.integers(0, 5))
def test_flash_attention_computes_real_tokens_of_all_rows_that_it_is_given(
    pair: tuple[Tensor, Tensor], boundary: Boundary, window: int | None, kept: int
) -> None:
    request = request_of(*pair, boundary)
    valid = request.valid["prefill"]
    handled = Slots((valid.cumsum(1) - 1).clamp(min=0), valid, request.rows["prefill"])
    past = handled.kept_by(Retention("first_last", kept // 2, 1 + kept // 2))[1] if kept else handled
    fed = request.valid["decode"]
    tokens = Slots(valid.sum(1)[:, None] + torch.arange(fed.shape[1]), fed, request.rows["decode"])
    generator = torch.Generator().manual_seed(0)
    for asked, held in ((handled, handled), (tokens, past.extended(tokens))):
        new, entries = asked.valid.shape[1], held.valid.shape[1]
        if not new:
            continue
        query, key, value = (torch.randn(len(valid), n, 4, generator=generator) for n in (new, entries, entries))
        try:
            mask = flash_mask(asked, held, window, torch.bfloat16)
        except UserError:
            assert kept
            assert window is not None
            continue
        dense = attention_mask(asked, held, window)[:, 0]
        expected = (query @ key.mT).masked_fill(~dense, -torch.inf).softmax(dim=-1) @ value
        found = flash_attention(query, key, value, mask, window)
        torch.testing.assert_close(found[asked.valid], expected[asked.valid])


def test_flash_attention_refuses_a_window_over_entries_with_holes() -> None:
    prompt = Slots(torch.arange(9)[None], torch.ones(1, 9, dtype=torch.bool))
    tokens = Slots(torch.arange(9, 11)[None], torch.ones(1, 2, dtype=torch.bool))
    held = prompt.kept_by(ENDS)[1].extended(tokens)
    with pytest.raises(UserError, match=r"counts a block's window of 5 in entries.*`flex_attention`, or a policy"):
        flash_mask(tokens, held, 5, torch.bfloat16)
    assert flash_mask(tokens, held, 11, torch.bfloat16) is None, "a window that leaves nothing out"
    assert flash_mask(tokens, prompt.extended(tokens), 5, torch.bfloat16) is None, "nothing is missing"


@pytest.mark.parametrize(
    ("attention", "device", "message"),
    [
        ("flex_attention", "cpu", "FlexAttention trains on GPUs, and this device is cpu"),
        ("flash_attention_2", "cpu", "FlashAttention runs on GPUs of NVIDIA and AMD, and this device is cpu"),
        ("flash_attention_2", "cuda", "the package flash-attn is not installed"),
    ],
)
def test_attention_that_cannot_run_is_refused_with_the_reason(attention: Attention, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"`loading.attn_implementation: {attention}` cannot run here: {message}"):
        check_attention(attention, device, sixteen_bits=True)


def test_flash_attention_needs_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdtrim_pl.models.loading.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"computes in 16 bits only, and `precision: bf16-mixed` is not set"):
        check_attention("flash_attention_2", "cuda", sixteen_bits=False)
    check_attention("flash_attention_2", "cuda", sixteen_bits=True)


def test_attention_that_can_run_is_taken() -> None:
    check_attention("flex_attention", "cuda", sixteen_bits=False)
    for device in ("cuda", "cpu"):
        check_attention("sdpa", device, sixteen_bits=False)
        check_attention("eager", device, sixteen_bits=False)


def test_a_run_on_a_cpu_with_flex_attention_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    module = PDTrimModule("never-loaded", loading=Loading(attn_implementation="flex_attention"))
    settings: Any = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, max_epochs=1, **settings)
    with pytest.raises(ValueError, match=r"FlexAttention trains on GPUs, and this device is cpu. Use `sdpa`"):
        trainer.fit(module, [0])


def test_soft_capped_scores_are_computed_by_flex_attention_and_not_by_flash_attention() -> None:
    model = tiny_model("gemma2")
    model.set_attn_implementation("flex_attention")
    StagedCausalLM(model)
    model = tiny_model("gemma2")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"`attn_implementation: flash_attention_2` cannot compute gemma2 with soft-c"):
        StagedCausalLM(model)


def test_compiled_blocks_do_not_go_with_kernels_that_were_not_tried() -> None:
    with pytest.raises(UserError, match=r"`loading.compile` was not tried with `attn_implementation: flex_attention`"):
        Loading(compile=True, attn_implementation="flex_attention")
