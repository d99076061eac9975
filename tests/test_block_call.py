"""How a gate learns to call its block: renamed arguments change nothing, unknown ways are refused."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.block_call import BlockCall
from pdtrim_pl.staged.decoding import generate


class Renamed(nn.Module):
    """A block of a future release: cache, mask and RoPE come under other names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def forward(
        self, x: Tensor, kv_store: Cache | None = None, bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        cache = BlockCall.of(self.block).cache
        out: Tensor = self.block(x, attention_mask=bias, position_embeddings=rotation, **{cache: kv_store})
        return out


class NotAnnotated(Renamed):
    """The same without annotations."""

    def forward(self, x, kv_store=None, bias: Any = None, rotation: Any = None):  # type: ignore[no-untyped-def]
        return super().forward(x, kv_store, bias, rotation)


def loop(base: Any, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
    """The loop over the blocks in a future release: it passes the new names, and no cache."""
    hidden = base.embed_tokens(input_ids)
    rotation = base.rotary_emb(hidden, position_ids)
    for layer in base.layers:
        hidden = layer(hidden, bias=attention_mask, rotation=rotation)
    return BaseModelOutputWithPast(last_hidden_state=base.norm(hidden))


def renamed(kind: type[Renamed]) -> PreTrainedModel:
    """A tiny Llama as a release with other names would have it."""
    model = tiny_model("llama")
    base = model.model
    for position, block in enumerate(base.layers):
        base.layers[position] = kind(block)
    base.forward = partial(loop, base)
    return model


def request() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 9).bool()
    mask[0, :3] = False
    return (
        torch.randint(3, 64, (2, 9), generator=generator),
        torch.randint(3, 64, (2, 5), generator=generator),
        mask,
    )


@pytest.mark.parametrize("kind", [Renamed, NotAnnotated])
def test_renamed_arguments_of_blocks_change_nothing(kind: type[Renamed]) -> None:
    known, future = StagedCausalLM(tiny_model("llama")), StagedCausalLM(renamed(kind))
    assert {gate.call.cache for gate in future.gates.values()} == {"kv_store"}
    plan = known.plan.drop("prefill", 1).drop("decode", 2)  # block 1 is KV-only: RoPE is found too
    for model in (known, future):
        model.apply_plan(plan)
    prompt, response, mask = request()
    assert torch.equal(known(prompt, response, mask).hidden, future(prompt, response, mask).hidden)
    found, expected = (generate(model, prompt, mask, max_new_tokens=4) for model in (future, known))
    assert torch.equal(found, expected)


def test_gradients_and_checkpointing_work_under_new_names() -> None:
    known, future = StagedCausalLM(tiny_model("llama")).train(), StagedCausalLM(renamed(Renamed)).train()
    future.gradient_checkpointing = True
    prompt, response, mask = request()
    for model in (known, future):
        model(prompt, response, mask).hidden.square().mean().backward()
    for block in range(4):
        expected = {name: p.grad for name, p in known.gates[block].block.named_parameters()}
        ours = future.gates[block].block.block
        assert {name: p.grad is not None for name, p in ours.named_parameters()} == dict.fromkeys(expected, True)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_how_its_blocks_take_the_cache(family: str) -> None:
    model = tiny_model(family)
    for gate in StagedCausalLM(model).gates.values():
        block = gate.block
        assert gate.call == BlockCall.of(block)


class Tuples(nn.Module):
    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, past: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        return x


class Hidden(nn.Module):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x


class TwoCaches(nn.Module):
    def forward(self, x: Tensor, cache: Cache | None = None, other: Cache | None = None) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Tuples(), r"blocks of class Tuples.* 0 of its arguments \(attention_mask, past\)"),
        (Hidden(), r"blocks of class Hidden.* 0 of its arguments \(none by name\)"),
        (TwoCaches(), r"blocks of class TwoCaches.* 2 of its arguments \(cache, other\)"),
    ],
)
def test_a_block_that_takes_no_cache_as_we_know_it_is_refused_when_the_gate_is_put_in_place(
    block: nn.Module, message: str
) -> None:
    model = tiny_model("llama")
    model.model.layers[2] = block
    with pytest.raises(ValueError, match=message):
        StagedCausalLM(model)


def test_a_block_that_ignores_its_cache_is_refused_by_name() -> None:
    class Ignores(nn.Module):
        def forward(self, x: Tensor, cache: Cache | None = None, **kwargs: Any) -> Tensor:
            return x

    model = tiny_model("llama")
    model.model.layers[2] = Ignores()
    with pytest.raises(ValueError, match=r"Block 2 of `model`, a Ignores, was given its cache as `cache`"):
        StagedCausalLM(model)(*request())


def test_the_gated_model_by_itself_is_refused() -> None:
    model = StagedCausalLM(tiny_model("llama"))
    with pytest.raises(RuntimeError, match=r"runs through `StagedCausalLM` only"):
        model.model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_a_deep_copy_and_two_threads_do_not_meet() -> None:
    first = StagedCausalLM(tiny_model("llama"))
    second = copy.deepcopy(first)
    second.apply_plan(second.plan.drop("prefill", 1).drop("decode", 2))
    prompt, response, mask = request()
    alone = [model(prompt, response, mask).hidden for model in (first, second)]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(model, prompt, response, mask) for _ in range(8) for model in (first, second)]
    for i, future in enumerate(both):
        assert torch.equal(future.result().hidden, alone[i % 2])


def test_a_mask_that_does_not_reach_the_blocks_is_refused() -> None:
    def by_position(base: Any, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = base.embed_tokens(input_ids)
        for layer in base.layers:
            hidden = layer(hidden, attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    model = tiny_model("llama")
    model.model.forward = partial(by_position, model.model)
    with pytest.raises(ValueError, match=r"does not pass a 4D attention mask on to its blocks"):
        StagedCausalLM(model)(*request())
