"""KV selectors: which blocks they trim, when they measure, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_criteria import batches as calibration
from test_search import Threads
from test_teacher import counted
from tiny_models import tiny_model

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.attention import attention_mass
from pdtrim_pl.evaluation.evaluator import Evaluator, SearchMemory
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, KVShape, ModelRef, Retention, StagePlan
from pdtrim_pl.selectors import (
    BudgetSelector,
    Effort,
    KVSelector,
    MassSelector,
    NoSelector,
    SelectionContext,
    selection_context,
)
from pdtrim_pl.sizing.memory import REPEATED_LENGTH
from pdtrim_pl.staged import StagedCausalLM

BLOCKS = 6
KV = KVShape(2, 8)


def a_context(
    mass: Mapping[int, float], damage: Mapping[int, float] | None = None, decode: tuple[int, ...] = tuple(range(BLOCKS))
) -> SelectionContext:
    """A context whose measurements are given; asking for any other fails."""
    plan = StagePlan(ModelRef("tiny", "llama", BLOCKS), tuple(range(BLOCKS)), decode)
    unknown: dict[object, float] = {}
    return SelectionContext(
        plan, KV, lambda: mass, lambda block, _: (damage or {})[block], lambda rules, _: unknown["energy"],
        lambda rules: unknown["recall"],
    )  # fmt: skip


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
    selector = BudgetSelector(reduction, first=1, last=0.25, prompt_tokens=prompt_tokens, codecs=["none"])
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
    selector = BudgetSelector(1.6, first=4, last=0.2, order="damage", codecs=["none"])
    assert list(selector.select(a_context({}, damage))) == [1, 3, 5]


def test_budget_selector_measures_nothing_when_the_drops_alone_reach_the_reduction() -> None:
    assert BudgetSelector(3.0, codecs=["none"]).select(a_context({}, decode=(0, 5))) == {}


def test_a_reduction_out_of_reach_names_what_can_be_reached() -> None:
    message = r"`reduction: 9` cannot be reached: with all 6 decode blocks .* sends (4\.89) times fewer bytes"
    context = a_context({})
    with pytest.raises(ValueError, match=message):
        BudgetSelector(9, codecs=["none"]).select(context)
    reachable = a_context(dict.fromkeys(range(BLOCKS), 0.5))
    assert len(BudgetSelector(4.89, codecs=["none"]).select(reachable)) == BLOCKS


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


SHORT = Retention("first_last", 1, 0.2)


def a_pair(boundary: Boundary = "prefill") -> tuple[StagedCausalLM, StagedCausalLM]:
    """A student without some blocks, and another model as its teacher."""
    student, teacher = (StagedCausalLM(tiny_model("llama", blocks=BLOCKS, seed=seed)).eval() for seed in (0, 1))
    student.apply_plan(StagePlan(student.plan.model, (0, 1, 2, 3, 5), (0, 2, 3, 5), boundary=boundary))
    return student, teacher


def naive_damage(student: StagedCausalLM, teacher: StagedCausalLM, block: int, rule: Retention) -> float:
    policy = KVRetentionPolicy(student.plan.boundary, student.kv_shape, {block: rule})
    return measure_quality(student, teacher, calibration(), plan=student.plan, policy=policy).kl


@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@pytest.mark.parametrize("room", [0, 25_000, 10**9])
def test_a_damage_is_the_kl_with_that_block_alone_trimmed_whatever_was_kept(boundary: Boundary, room: int) -> None:
    student, teacher = a_pair(boundary)
    student.apply_policy(KVRetentionPolicy(boundary, student.kv_shape, {2: SHORT}))  # counts for nothing here
    context = selection_context(
        student, teacher, calibration(), student.kv_shape, "cpu", 1, 0.2, memory=SearchMemory(room, room)
    )
    for rule in (SHORT, Retention("first_last", 2, 2)):
        damages = {block: context.damage(block, rule) for block in student.plan.decode}
        assert damages == {block: naive_damage(student, teacher, block, rule) for block in student.plan.decode}
        assert len(set(damages.values())) == len(damages)


def test_prompts_run_once_however_many_blocks_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = a_pair()
    ours, theirs = counted(student, monkeypatch), counted(teacher, monkeypatch)
    passes = []
    for tried in (1, 4):
        ours.clear()
        theirs.clear()
        context = selection_context(student, teacher, calibration(), student.kv_shape, "cpu", 1, 0.2)
        assert not ours + theirs
        for block in student.plan.decode[:tried]:
            context.damage(block, SHORT)
        passes.append((ours.count("prefill"), ours.count("decode"), theirs.count("prefill")))
    batches = len(calibration())
    assert passes == [(batches, 2 * batches, batches), (batches, 5 * batches, batches)], "one decode is the base's"


@pytest.mark.parametrize(
    "selector",
    [
        NoSelector(1, 0.2),
        MassSelector(0.5, 1, 0.2),
        BudgetSelector(2.0, 1, 0.2, codecs=["none"]),
        BudgetSelector(2.0, 1, 0.2, codecs=["none"], order="damage"),
        BudgetSelector(2.0, effort=Effort(examples=2)),
        BudgetSelector(2.0, min_recall=0.0, effort=Effort(examples=3, exchanges=True)),
    ],
    ids=["none", "mass", "budget by mass", "budget by damage", "budget of bits", "budget of exchanged bits"],
)
def test_a_selector_keeps_and_runs_what_its_load_says(selector: KVSelector, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = a_pair()
    kept, widths, eager = list[int](), list[int](), list[object]()

    class Counting(Evaluator):
        def __init__(self, student: Any, teacher: Any, batches: Sequence[Batch], **settings: Any) -> None:
            kept.append(sum(len(batch.prompt_ids) for batch in batches))
            widths.extend(batch.prompt_ids.shape[1] + batch.response_ids.shape[1] for batch in batches)
            super().__init__(student, teacher, batches, **settings)

    def mass(*args: Any, **kwargs: Any) -> dict[int, float]:
        eager.append(args)
        return attention_mass(*args, **kwargs)

    monkeypatch.setattr("pdtrim_pl.selectors.base.Evaluator", Counting)
    monkeypatch.setattr("pdtrim_pl.selectors.base.attention_mass", mass)
    requests = calibration()
    context = selection_context(student, teacher, requests, student.kv_shape, "cpu", selector.first, selector.last)
    selector.select(context)
    if selector.looks_at_mass:  # the report shows it, whatever the choice looks at
        assert context.mass
    load = selector.load()
    whole, parts = sum(len(batch.prompt_ids) for batch in requests), 2 * load.examples
    assert kept == ([whole] if load.calibration else [parts] if parts else [])
    assert bool(eager) == load.eager_attention
    longest = max(batch.prompt_ids.shape[1] + batch.response_ids.shape[1] for batch in requests)
    assert max(widths, default=0) <= REPEATED_LENGTH * longest


@pytest.mark.parametrize("whole", [True, False])
def test_ranks_split_the_tries_and_choose_the_same(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = a_pair()
    selector, work = BudgetSelector(2.0, first=1, last=0.2, order="damage", codecs=["none"]), dict[int, int]()
    decode = student.decode

    def counting(*args: object, **kwargs: object) -> object:
        work[get_ident()] = work.get(get_ident(), 0) + 1
        return decode(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(student, "decode", counting)

    def choose(ranks: Parallel) -> tuple[dict[int, float], dict[int, Retention], int]:
        context = selection_context(student, teacher, calibration(), student.kv_shape, "cpu", 1, 0.2, ranks=ranks)
        rules = selector.select(context)
        return {block: context.damage(block, SHORT) for block in student.plan.decode}, rules, work.pop(get_ident())

    damages, rules, alone = choose(Parallel())
    assert 0 < len(rules) < len(damages)
    least = sorted(damages, key=lambda block: damages[block])[: len(rules)]
    assert list(rules) == sorted(least)
    for found, chosen, share in Threads(2, whole=whole).run(choose):
        assert (found, chosen) == (damages, rules)
        assert 2 * share == alone
