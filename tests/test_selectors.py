"""KV selectors: which blocks they trim, when they measure, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import tiny_model

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.attention import attention_mass
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.plan import KVRetentionPolicy, KVShape, ModelRef, Retention, StagePlan
from pdtrim_pl.selectors import (
    BudgetSelector,
    KVSelector,
    MassSelector,
    NoSelector,
    SelectionContext,
    selection_context,
)
from pdtrim_pl.staged import StagedCausalLM

BLOCKS = 6
KV = KVShape(2, 8)


def a_context(
    mass: Mapping[int, float], damage: Mapping[int, float] | None = None, decode: tuple[int, ...] = tuple(range(BLOCKS))
) -> SelectionContext:
    """A context whose measurements are given; without `damage` asking for it fails."""
    plan = StagePlan(ModelRef("tiny", "llama", BLOCKS), tuple(range(BLOCKS)), decode)
    return SelectionContext(plan, KV, lambda: mass, lambda block, _: (damage or {})[block])


masses = st.lists(st.floats(0, 1), min_size=BLOCKS, max_size=BLOCKS).map(lambda values: dict(enumerate(values)))


@given(mass=masses, threshold=st.floats(0, 1))
def test_mass_selector_trims_exactly_the_blocks_at_or_above_the_threshold(
    mass: dict[int, float], threshold: float
) -> None:
    selector = MassSelector(threshold, first=2, last=0.5)
    rules = selector.select(a_context(mass))
    assert rules == {b: Retention("first_last", 2, 0.5) for b, value in mass.items() if value >= threshold}


@given(
    mass=masses,
    reduction=st.floats(1, 6),
    prompt_tokens=st.integers(2, 3000),
    decode=st.sets(st.integers(0, BLOCKS - 1), min_size=1).map(lambda blocks: tuple(sorted(blocks))),
)
def test_budget_selector_trims_the_fewest_heaviest_blocks_that_reach_the_reduction(
    mass: dict[int, float], reduction: float, prompt_tokens: int, decode: tuple[int, ...]
) -> None:
    context = a_context(mass, decode=decode)
    selector = BudgetSelector(reduction, first=1, last=0.25, prompt_tokens=prompt_tokens)
    assume(context.sent_ratio(dict.fromkeys(decode, selector.rule), prompt_tokens) >= reduction)
    rules = selector.select(context)
    assert context.sent_ratio(rules, prompt_tokens) >= reduction
    left = [mass[block] for block in decode if block not in rules]
    assert all(mass[block] >= other for block in rules for other in left)
    if rules:
        fewer = dict.fromkeys(sorted(rules, key=lambda block: -mass[block])[:-1], selector.rule)
        assert context.sent_ratio(fewer, prompt_tokens) < reduction


def test_budget_selector_by_damage_trims_the_least_damaging_first() -> None:
    damage = {0: 0.5, 1: 0.1, 2: 0.4, 3: 0.2, 4: 0.6, 5: 0.3}
    selector = BudgetSelector(1.6, first=4, last=0.2, order="damage")
    assert list(selector.select(a_context({}, damage))) == [1, 3, 5]


def test_budget_selector_measures_nothing_when_the_drops_alone_reach_the_reduction() -> None:
    assert BudgetSelector(3.0).select(a_context({}, decode=(0, 5))) == {}


def test_a_reduction_out_of_reach_names_what_can_be_reached() -> None:
    message = r"`reduction: 9` cannot be reached: with all 6 decode blocks .* sends (4\.89) times fewer bytes"
    context = a_context({})
    with pytest.raises(ValueError, match=message):
        BudgetSelector(9).select(context)
    reachable = a_context(dict.fromkeys(range(BLOCKS), 0.5))
    assert len(BudgetSelector(4.89).select(reachable)) == BLOCKS


def test_no_selector_sends_everything() -> None:
    assert NoSelector().select(a_context({})) == {}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MassSelector(1.5), "`threshold` is 1.5"),
        (lambda: MassSelector(first=-1), "`first` is -1"),
        (lambda: NoSelector(first=0, last=0), "would send nothing"),
        (lambda: BudgetSelector(0.5), "`reduction` is 0.5"),
        (lambda: BudgetSelector(order="size"), "`order` is 'size', not one of mass, damage"),
        (lambda: BudgetSelector(prompt_tokens=1), "`prompt_tokens` is 1"),
    ],
)
def test_selectors_refuse_settings_out_of_range(build: type[KVSelector], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_selector_of_a_users_own_is_one_method() -> None:
    class EverySecond(KVSelector):
        def select(self, context: SelectionContext) -> dict[int, Retention]:
            return dict.fromkeys(context.plan.decode[::2], self.rule)

    assert list(EverySecond().select(a_context({}))) == [0, 2, 4]


def test_the_context_measures_the_student_lazily_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = StagedCausalLM(tiny_model("llama")), StagedCausalLM(tiny_model("llama", seed=1))
    student.apply_plan(StagePlan(student.plan.model, (0, 1, 3), (0, 3)))
    generator = torch.Generator().manual_seed(0)
    prompt, response = (torch.randint(3, 64, (2, n), generator=generator) for n in (9, 4))
    batches = [Batch(prompt, torch.ones_like(prompt).bool(), response, torch.ones_like(response).bool())]
    rule = Retention("first_last", 1, 1)
    passes = []
    decode = student.decode

    def counted(*args: object, **kwargs: object) -> object:
        passes.append(kwargs)
        return decode(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(student, "decode", counted)
    context = selection_context(student, teacher, iter(batches), student.kv_shape, "cpu", 1, 1)
    assert not passes
    assert context.mass == attention_mass(student, batches, first=1, last=1)
    policy = KVRetentionPolicy("prefill", student.kv_shape, {3: rule})
    expected = measure_quality(student, teacher, batches, plan=student.plan, policy=policy).kl
    assert context.damage(3, rule) == expected
    done = len(passes)
    assert (context.mass[0] <= 1, context.damage(3, rule)) == (True, expected)
    assert len(passes) == done
    assert (student.policy, student.plan.decode) == (None, (0, 3))
