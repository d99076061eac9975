"""Keys and values on the wire: what is decoded, how many bytes it takes, and who may decode it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import any_codec
from tiny_models import tiny_model
from torch import Tensor
from wire_decoder import decode_block

from pdtrim_pl.plan import Codec, KVRetentionPolicy, KVShape, ModelRef, Retention, StagePlan
from pdtrim_pl.plan.codec import FORMS, Form
from pdtrim_pl.selectors import BudgetSelector, SelectionContext
from pdtrim_pl.selectors.allocation import Allocation, codec_of
from pdtrim_pl.staged import BlockKV, Slots, StagedCausalLM
from pdtrim_pl.staged.cache import keeper
from pdtrim_pl.wire.codecs import encoded_keys, encoded_values, transferred
from pdtrim_pl.wire.packing import DamagedBlock, packed, packed_codes, unpacked, unpacked_codes
from pdtrim_pl.wire.rotation import rotated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_block(counts: list[int], heads: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Keys with channels of their own mean and size, as RoPE leaves them, and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(counts), heads, max(counts), width)
    keys, values = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    means, sizes = (torch.randn(shape[-1], generator=generator) * 3 for _ in range(2))
    return (keys * sizes + means).to(dtype), values.to(dtype)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any), heads=st.integers(1, 3),
    width=st.sampled_from((1, 6, 8)), dtype=st.sampled_from(DTYPES), codec=any_codec(), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_two_processes_see_is_what_one_sees_and_the_bytes_are_those_of_the_formula(
    counts: list[int], heads: int, width: int, dtype: torch.dtype, codec: Codec, seed: int
) -> None:
    keys, values = random_block(counts, heads, width, dtype, seed)
    lengths = torch.tensor(counts)
    data = packed(encoded_keys(keys, lengths, codec), encoded_values(values, lengths, codec), counts)
    assert len(data) == sum(codec.row_bytes(count, heads, width, dtype.itemsize) for count in counts)
    seen = transferred(keys, values, lengths, codec)
    arrived = [stream.decoded().to(dtype) for stream in unpacked(data, counts, codec, heads, width, dtype)]
    name = str(dtype).removeprefix("torch.")
    elsewhere = decode_block(bytes(data.tolist()), counts, codec.to_json(), heads, width, name)
    for row, count in enumerate(counts):
        for part in range(2):
            expected = seen[part][row, :, :count]
            assert torch.equal(arrived[part][row, :, :count], expected)
            foreign = torch.from_numpy(elsewhere[row][part].copy()).to(dtype)
            assert torch.equal(foreign.transpose(0, 1), expected), "a decoder that knows the format alone"


@given(bits=st.sampled_from((2, 3, 4, 8)), codes=st.lists(st.integers(0, 3), max_size=40))
def test_codes_are_packed_without_a_gap_and_come_back(bits: int, codes: list[int]) -> None:
    given_codes = torch.tensor(codes, dtype=torch.uint8)
    data = packed_codes(given_codes, bits)
    assert len(data) == -(-len(codes) * bits // 8)
    assert torch.equal(unpacked_codes(data, len(codes), bits), given_codes)


@pytest.mark.parametrize("width", [1, 6, 8, 64, 96])
def test_a_rotation_keeps_lengths_and_is_its_own_inverse(width: int) -> None:
    vectors = torch.randn(5, width)
    torch.testing.assert_close(rotated(vectors).norm(dim=-1), vectors.norm(dim=-1))
    torch.testing.assert_close(rotated(rotated(vectors)), vectors)


@pytest.mark.parametrize("rotate", [False, True])
def test_more_bits_round_less(rotate: bool) -> None:
    keys, values = random_block([150], 2, 16, torch.float32, 0)
    errors = []
    for form in ("int2", "int3", "int4", "int8"):
        seen = transferred(keys, values, torch.tensor([150]), Codec(form, form, rotate, rotate))  # type: ignore[arg-type]
        errors.append(
            [
                float((found - part).square().mean() / part.var())
                for found, part in zip(seen, (keys, values), strict=True)
            ]
        )
    for part in range(2):
        assert errors[0][part] > 2.5 * errors[1][part] > 6 * errors[2][part] > 100 * errors[3][part]
    assert max(errors[-1]) < 1e-4


def test_entries_that_do_not_count_change_nothing() -> None:
    keys, values = random_block([70, 5], 2, 8, torch.float32, 1)
    counts, codec = torch.tensor([70, 5]), Codec("int3", "int2", True, True)
    spoiled = [part.clone() for part in (keys, values)]
    for part in spoiled:
        part[1, :, 5:] = 1e6
    for found, expected in zip(
        transferred(*spoiled, counts, codec), transferred(keys, values, counts, codec), strict=True
    ):
        assert torch.equal(found[1, :, :5], expected[1, :, :5])
        assert torch.equal(found[0], expected[0])


def test_equal_numbers_and_zeros_cross_unharmed() -> None:
    for number in (0.0, 1.5, -300.0):
        keys = torch.full((1, 1, 7, 4), number)
        for form in FORMS:
            seen = transferred(keys, keys, torch.tensor([7]), Codec(form, form))
            for part in seen:
                torch.testing.assert_close(part, keys, rtol=0.08, atol=1e-6)


def test_the_gradient_passes_through_the_rounding() -> None:
    keys, values = (part.requires_grad_() for part in random_block([9], 1, 8, torch.float32, 2))
    seen = transferred(keys, values, torch.tensor([9]), Codec("int2", "int3", True, True))
    (seen[0] * 2 + seen[1]).sum().backward()
    assert keys.grad is not None
    assert values.grad is not None
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))
    assert torch.equal(values.grad, torch.ones_like(values))


def test_a_student_learns_through_what_it_sends() -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    rule = Retention(codec=codec_of("int4", "int4"))
    staged.apply_policy(KVRetentionPolicy("prefill", staged.kv_shape, dict.fromkeys(staged.plan.decode, rule)))
    prompt, response = torch.arange(20)[None] + 3, torch.arange(6)[None] + 3
    staged.logits(staged(prompt, response).hidden[:, 1:]).square().sum().backward()
    projection = staged.gates[1].block.get_submodule("self_attn.k_proj").weight
    assert projection.grad is not None
    assert projection.grad.abs().sum() > 0


@pytest.mark.parametrize("form", [form for form in FORMS if form != "none"])
def test_damaged_bytes_are_refused(form: Form) -> None:
    keys, values = random_block([5, 3], 2, 8, torch.bfloat16, 3)
    counts, codec = [5, 3], Codec(form, form)
    lengths = torch.tensor(counts)
    data = packed(encoded_keys(keys, lengths, codec), encoded_values(values, lengths, codec), counts)
    for wrong in (data[:-1], torch.cat([data, data[:1]]), data.to(torch.int16)):
        with pytest.raises(DamagedBlock, match=f"A packed block of 8 positions under keys {form}, values {form} has"):
            unpacked(wrong, counts, codec, 2, 8, torch.bfloat16)
    data[:2] = torch.tensor([0x80, 0x7F], dtype=torch.uint8)  # bf16 infinity
    with pytest.raises(DamagedBlock, match="not all finite"):
        unpacked(data, counts, codec, 2, 8, torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keys": "int5", "values": "none"}, "`codec.keys` is 'int5', not one of none, fp8"),
        ({"keys": "none", "values": "int4", "rotate": ["keys"]}, "`codec.rotate` names keys"),
        ({"keys": "int4", "values": "int4", "group": 0}, "`codec.group` is 0"),
        ({"keys": "int4", "values": "int4", "exact": -1}, "`codec.exact` is -1"),
        ({"keys": "none", "values": "none", "exact": 1}, "`codec.exact` names positions"),
        ({"keys": "int4", "values": "int4", "scale": 2}, r"`codec` has \['scale'\]"),
    ],
)
def test_a_codec_that_does_not_exist_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codec.from_json(wrong)


def test_a_policy_of_version_1_is_read_as_before() -> None:
    plan, shape = StagePlan.full(ModelRef("m", "llama", 3)), KVShape(2, 8)
    policy = KVRetentionPolicy("prefill", shape, {1: Retention("first_last", 4, 0.2)})
    old = {**policy.to_json(plan), "format": "pdtrim.kv_policy/1"}
    read = KVRetentionPolicy.from_json(old)
    assert [read.rule(block) for block in range(3)] == [policy.rule(block) for block in range(3)]
    assert (read.boundary, read.kv) == (policy.boundary, policy.kv)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_of_which_decode_gets_nothing_cross_too(form: Form) -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    plan = StagePlan.full(staged.plan.model, boundary="decode")
    rotate = form.startswith("int")
    rule = Retention(codec=Codec(form, form, rotate, rotate))
    policy = KVRetentionPolicy("decode", staged.kv_shape, dict.fromkeys(plan.decode, rule))
    one, response = torch.tensor([[5], [9]]), torch.arange(8).view(2, 4) + 3
    whole = staged(one, response, plan=plan).hidden
    assert torch.equal(staged(one, response, plan=plan, policy=policy).hidden, whole)
    cache = staged.prefill(one[:, :0], plan=plan).cache
    assert len(keeper()(cache.blocks[0], rule).packed(rule.codec)) == 0
    streams = unpacked(torch.empty(0, dtype=torch.uint8), [0, 0], rule.codec, 2, 8, torch.float32)
    assert [stream.decoded().shape[2] for stream in streams] == [0, 0]


def test_numbers_that_are_not_finite_are_told_where_they_are_written() -> None:
    keys, values = random_block([5], 1, 4, torch.float16, 0)
    values[0, 0, 2, 1] = torch.inf
    slots = Slots(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(FloatingPointError, match="Keys or values of the prompt are not finite"):
        BlockKV(keys, values, slots).packed(Codec("int4", "int4"))


# The choice of bits

PLAN = StagePlan.full(ModelRef("line", "llama", 4))
SENSITIVE = {(0, "keys"): 9.0, (1, "keys"): 1.0, (2, "keys"): 0.2, (3, "keys"): 3.0}


def noise(rules: Mapping[int, Retention]) -> float:
    """A damage that falls by four with every bit; the values of all blocks weigh as much as the keys of block 2."""
    total = 0.0
    for block in PLAN.decode:
        codec = rules.get(block, Retention()).codec
        for side, form in (("keys", codec.keys), ("values", codec.values)):
            bits = {"none": 30, "int8": 8, "int4": 4, "int3": 3, "int2": 2}[form]
            total += SENSITIVE.get((block, side), 0.2) * 4.0**-bits
    return total


def a_context(recall: float = 1.0) -> SelectionContext:
    def found(rules: Mapping[int, Retention]) -> float:
        return 1.0 - recall * noise(rules)

    return SelectionContext(PLAN, KVShape(2, 64), dict, lambda block, rule: 0.0, lambda rules, _: noise(rules), found)


def test_a_model_whose_kl_is_not_finite_gets_no_policy() -> None:
    with pytest.raises(ValueError, match="KL to the teacher is not finite when everything is sent"):
        BudgetSelector(4.0).select(replace(a_context(), energy=lambda rules, _: float("inf")))


FORGETFUL = (2, 3)
"""Blocks that lose nothing with their middle positions."""


def test_blocks_that_do_not_look_back_are_trimmed_where_bits_alone_do_not_reach_the_reduction() -> None:
    def energy(rules: Mapping[int, Retention], _: int) -> float:
        lost = [block for block, rule in rules.items() if rule.keep != "all" and block not in FORGETFUL]
        return noise(rules) + 100.0 * len(lost)

    context = replace(a_context(), energy=energy, measure_recall=lambda rules: 1.0)
    rules = BudgetSelector(8.0, prompt_tokens=512).select(context)
    assert context.sent_ratio(rules, 512) >= 8.0
    assert {block for block, rule in rules.items() if rule.keep != "all"} == set(FORGETFUL)
    with pytest.raises(
        ValueError, match=r"`reduction: 8.0` cannot be reached: with all keys and values in the coarsest"
    ):
        BudgetSelector(8.0, prompt_tokens=512, trim=False).select(context)


@settings(max_examples=25)
@given(reduction=st.floats(2.0, 6.5))
def test_bits_go_where_they_help_most_and_the_budget_is_kept(reduction: float) -> None:
    context = a_context(recall=0.0)
    rules = BudgetSelector(reduction, prompt_tokens=512).select(context)
    assert context.sent_ratio(rules, 512) >= reduction
    assert set(rules) <= set(PLAN.decode)
    bits = {block: rules[block].codec.keys for block in rules}
    order = ["none", "int8", "int4", "int3", "int2"]
    places = [order.index(bits.get(block, "none")) for block in (0, 3, 1, 2)]
    assert places == sorted(places), "the more harm, the more bits"
    for form in ("int4", "int3", "int2"):
        same = dict.fromkeys(PLAN.decode, Retention(codec=codec_of(form, form)))
        if context.sent_ratio(same, 512) >= reduction:
            assert noise(rules) <= noise(same) * (1 + 1e-9), f"{form} for all fits too"


def test_exchanges_never_cost_bytes_or_quality() -> None:
    context = a_context()
    allocation = Allocation(PLAN, context.kv_shape, ("int8", "int4", "int3", "int2"), 512)
    budget = KVRetentionPolicy("prefill", context.kv_shape).full_bytes(PLAN, 512) / 5
    allocation.measure(noise)
    allocation.offers = {
        block: [replace(offer, damage=0.0) for offer in offers] for block, offers in allocation.offers.items()
    }  # a bad prediction
    worst = allocation.cheapest(budget)
    better = allocation.exchanged(worst, budget, noise)
    assert allocation.bytes_of(better) <= budget
    assert noise(allocation.rules(better)) <= noise(allocation.rules(worst))


def test_recall_is_never_traded_for_bytes(caplog: pytest.LogCaptureFixture) -> None:
    free, floor = BudgetSelector(6.0, min_recall=0.0, prompt_tokens=512), BudgetSelector(6.0, prompt_tokens=512)
    context = a_context(recall=2.0)
    assert context.recall(free.select(context)) < 0.97
    with caplog.at_level("WARNING"):
        rules = floor.select(context)
    assert context.recall(rules) >= 0.97
    assert context.sent_ratio(rules, 512) < 6.0
    assert "`reduction: 6.00` would leave less than 0.97 (`min_recall`)" in caplog.text


def test_a_reduction_that_no_codec_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`reduction: 9` cannot be reached: with all keys and values in the coarsest"):
        BudgetSelector(9, prompt_tokens=512, trim=False).select(a_context())
    with pytest.raises(ValueError, match=r"`codecs` is \['int5'\]: give some of none, fp8"):
        BudgetSelector(codecs=["int5"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"`min_recall` is 1.5: give a share"):
        BudgetSelector(min_recall=1.5)


@given(any_codec())
def test_a_codec_is_read_back_equal(codec: Codec) -> None:
    assert Codec.from_json(codec.to_json()) == codec


@pytest.mark.parametrize("keys", ["none", "fp8"])
def test_codecs_whose_keys_have_no_groups_are_equal_whatever_group_is_given(keys: Form) -> None:
    assert Codec(keys, "int4", group=32) == Codec(keys, "int4")
    assert Codec("int4", "int4", group=32) != Codec("int4", "int4")
