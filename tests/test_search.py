"""Annealing and its journal: never worse than greedy, reproducible, and continued without repeating anything."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from math import inf
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plans
from test_criteria import batches
from tiny_models import tiny_model
from typing_extensions import override

from pdtrim_pl.criteria import GreedyKL, ScoringContext
from pdtrim_pl.data import Batch
from pdtrim_pl.evaluation.evaluator import Evaluator, SearchMemory
from pdtrim_pl.evaluation.journal import Journal, Sums
from pdtrim_pl.evaluation.neighbours import Candidate, Neighbours
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.evaluation.tokens import final_hidden
from pdtrim_pl.merging import Merging
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import KVRetentionPolicy, Relation, Retention, StagePlan, Target
from pdtrim_pl.search import Annealing, Guards, RoundSearch, anneal, choose_drops, distillation_set
from pdtrim_pl.search.rounds import Removals
from pdtrim_pl.staged import StagedCausalLM

NO_GUARDS = Guards(0, 0)


@pytest.fixture(scope="module")
def model() -> StagedCausalLM:
    return StagedCausalLM(tiny_model("llama", blocks=7)).eval()


def round_search(model: StagedCausalLM, journal: Path | None = None, target: Target = "decode") -> RoundSearch:
    evaluator = Evaluator(model, model, batches(), journal=journal)
    return RoundSearch(evaluator, model.plan, target, 3, NO_GUARDS)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_annealing_finds_the_best_of_all_states_on_a_small_model(model: StagedCausalLM) -> None:
    search = round_search(model)
    first, first_energy = search.greedy()
    best, energy = anneal(search, first, Annealing(300, temperature=0.2, cooling=0.99))
    states = [search.drops(blocks) for blocks in combinations(range(7), 3)]
    energies = [search.evaluator.energy(search.candidate(state).plan) for state in states]
    assert energy == min(energies)
    assert best == states[energies.index(energy)]
    assert energy <= first_energy


def test_after_exchanges_no_single_one_helps_and_annealing_starts_from_there(model: StagedCausalLM) -> None:
    search, states = round_search(model), list(combinations(range(7), 3))
    for first in states[::4]:
        state, energy = search.improved(search.drops(first))
        assert energy == search.known_energy(state) <= search.known_energy(search.drops(first))
        blocks = {move.run[0] for move in state}
        near = [search.drops(other) for other in states if len(blocks.intersection(other)) == 2]
        assert len(near) == 12
        assert min(map(search.known_energy, near)) >= energy
        assert anneal(search, search.drops(first), Annealing(1, temperature=1e-9))[1] <= energy
        alone = anneal(search, search.drops(first), Annealing(1, temperature=1e-9, descend=False))[0]
        assert len(set(alone) & set(search.drops(first))) >= 2, "one exchange at most"


def test_a_removal_that_nothing_can_replace_does_not_end_the_annealing(model: StagedCausalLM) -> None:
    evaluator = Evaluator(model, model, batches())
    start = StagePlan.full(model.plan.model).drop("decode", 2)
    # Prefill drops 2, which decode has lost, and 4; under the cap nothing but 2 can make room for another of both.
    search = RoundSearch(evaluator, start, "prefill", 2, Guards(0, 0, max_removed=2))
    state = search.drops([2, 4])
    assert search._exchanges(state, state[0]) == []
    assert search._exchanges(state, state[1])
    for seed in range(4):
        told: list[str] = []
        anneal(search, state, Annealing(5, temperature=1.0, seed=seed, descend=False), told.append)
        assert len(told) == 5


def test_the_time_limit_ends_the_descent_too(model: StagedCausalLM) -> None:
    search = round_search(model)
    told: list[str] = []
    first = search.drops([0, 1, 2])
    best, energy = anneal(search, first, Annealing(100, seconds=1e-9), told.append)
    assert len(told) == 1, "one move, for every search makes one"
    assert len(set(best) & set(first)) >= 2
    assert energy == search.known_energy(best) <= search.known_energy(first)


def test_the_greedy_state_is_the_one_that_greedy_kl_chooses(model: StagedCausalLM) -> None:
    search = round_search(model)
    state, energy = search.greedy()
    chosen = choose_drops(
        GreedyKL(), ScoringContext(model, model, batches()), model.plan, "decode", 3, guards=NO_GUARDS
    )
    assert search.candidate(state).plan.decode == chosen.decode
    assert chosen.history[-1].score == energy


def test_a_lazy_greedy_choice_looks_at_fewer_states(model: StagedCausalLM) -> None:
    exact, lazy = round_search(model), round_search(model)
    told: list[str] = []
    state, energy = lazy.greedy(lazy=True, progress=told.append)
    assert len(state) == 3
    assert told[0] == f"removal 1 of 3: energy {lazy.evaluator.energy(model.plan):.4f}, 0 of 7 candidates looked at"
    assert told[-1].startswith("removal 3 of 3: energy ")
    assert energy == lazy.evaluator.energy(lazy.candidate(state).plan)
    assert lazy.greedy(lazy=True) == (state, energy)
    first = [
        search.greedy(lazy=is_lazy)[0][0] for search, is_lazy in ((one_drop(exact), False), (one_drop(lazy), True))
    ]
    assert first[0] == first[1], "the first step is exact"


class Tabled(RoundSearch):
    """Energies from a table, by the blocks dropped."""

    table: ClassVar[dict[tuple[int, ...], float]] = {(1,): 1.1, (2,): 1.2, (3,): 1.3, (1, 2): 1.8, (1, 3): 1.4}

    def energy(self, state: Removals, limit: float = inf) -> float | None:
        energy = self.table.get(tuple(move.run[0] for move in state), 9.0)
        return energy if energy < limit else None


def test_a_lazy_greedy_choice_counts_rises_from_the_energy_of_its_start(
    model: StagedCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Evaluator(model, model, batches())
    monkeypatch.setattr(evaluator, "energy", lambda plan: 1.0)
    search = Tabled(evaluator, model.plan, "decode", 2, NO_GUARDS)
    assert search.greedy(lazy=True) == (search.drops([1, 3]), 1.4)


def spoilt(model: StagedCausalLM, *blocks: int) -> StagedCausalLM:
    """A copy that overflows wherever one of these blocks runs."""
    student = copy.deepcopy(model)
    for block in blocks:
        next(student.gates[block].parameters()).data.fill_(float("nan"))
    return student


def test_a_plan_that_overflows_is_never_chosen(model: StagedCausalLM) -> None:
    search = RoundSearch(Evaluator(spoilt(model, 2), model, batches()), model.plan, "both", 1, NO_GUARDS)
    state, energy = search.greedy()
    assert state == search.drops([2])
    assert anneal(search, state, Annealing(5)) == (state, energy)
    assert search.evaluator.energy(search.candidate(search.drops([1])).plan) == inf


def test_a_search_among_plans_that_all_overflow_says_so(model: StagedCausalLM) -> None:
    search = RoundSearch(Evaluator(spoilt(model, 1, 2), model, batches()), model.plan, "both", 1, NO_GUARDS)
    for start in (search.greedy, partial(anneal, search, search.drops([1]), Annealing(5))):
        with pytest.raises(ValueError, match="KL to the teacher on the calibration set is not finite"):
            start()


def test_a_cap_holds_for_greedy_and_for_every_neighbour(model: StagedCausalLM) -> None:
    evaluator = Evaluator(model, model, batches())
    capped = RoundSearch(evaluator, model.plan, "decode", 3, Guards(0, 0, max_removed=2))
    with pytest.raises(ValueError, match="Only 2 of 3 removals can be made in `decode`"):
        capped.greedy()
    nested = StagePlan.full(model.plan.model, "nested").drop("decode", 2)
    search, draw = RoundSearch(evaluator, nested, "prefill", 2, Guards(0, 0, max_removed=2)), random.Random(0)
    state = search.greedy()[0]
    for _ in range(30):
        plan = search.candidate(state).plan
        assert max(len(plan.removed("prefill")), len(plan.removed("decode"))) <= 2
        state = search.neighbour(state, draw) or state


def one_drop(search: RoundSearch) -> RoundSearch:
    return RoundSearch(search.evaluator, search.start, search.target, 1, NO_GUARDS)


def test_the_same_seed_gives_the_same_result(model: StagedCausalLM) -> None:
    searches = [round_search(model) for _ in range(2)]
    runs = [anneal(search, search.drops([1, 2, 3]), Annealing(30, temperature=0.3, seed=5)) for search in searches]
    assert runs[0] == runs[1]


def test_a_killed_search_goes_on_where_it_stopped_and_repeats_nothing(model: StagedCausalLM, tmp_path: Path) -> None:
    settings = Annealing(40, temperature=0.3)

    def run(path: Path, settings: Annealing) -> tuple[object, float]:
        search = round_search(model, path)
        return anneal(search, search.greedy()[0], settings)

    expected = run(tmp_path / "whole.jsonl", settings)
    path = tmp_path / "journal.jsonl"
    run(path, Annealing(15, temperature=0.3))
    with path.open("a") as file:
        file.write('{"search": "a", "remo')  # the kill
    assert run(path, settings) == expected
    entries = [json.loads(line) for line in lines(path) if not line.endswith("remo")]
    assert len({(entry["plan"], entry["batch"]) for entry in entries}) == len(entries)

    assert run(path, settings) == expected
    assert len(lines(path)) == len(entries) + 1, "a finished search evaluates nothing again"


def test_a_greedy_choice_killed_in_the_middle_repeats_nothing(model: StagedCausalLM, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = round_search(model, whole).greedy()
    cut.write_text("".join(line + "\n" for line in lines(whole)[:9]))
    assert round_search(model, cut).greedy() == expected
    entries = [json.loads(line) for line in lines(cut)]
    assert len({(entry["plan"], entry["batch"]) for entry in entries}) == len(entries)


def test_a_journal_of_other_weights_is_not_believed(model: StagedCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    ours = Evaluator(model, model, batches(), journal=path)
    ours.energy(model.plan.drop("decode", 3))
    other = StagedCausalLM(tiny_model("llama", blocks=7, seed=1)).eval()
    theirs = Evaluator(other, model, batches(), journal=path)
    plan = model.plan.drop("decode", 3)
    assert theirs.energy(plan) == Evaluator(other, model, batches()).energy(plan) != ours.energy(plan)


def test_a_sum_that_is_not_finite_is_kept_as_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).add("plan", {0: Sums(inf, inf)})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    assert [json.loads(line, parse_constant=refuse)["kl"] for line in lines(path)] == [None]
    assert Journal(path).known("plan") == {0: Sums(inf, inf)}


def test_only_the_first_rank_writes(model: StagedCausalLM, tmp_path: Path) -> None:
    ranks = Parallel()
    ranks.rank, ranks.size = 1, 2
    journal = Journal(tmp_path / "journal.jsonl", "a", ranks)
    journal.add("plan", {1: Sums(0.5, 1.0)})
    assert journal.known("plan") == {1: Sums(0.5, 1.0)}
    assert not (tmp_path / "journal.jsonl").exists()


class Threads:
    """Ranks that are threads of one process."""

    def __init__(self, size: int, *, whole: bool = True) -> None:
        self.size, self.whole, self.barrier = size, whole, Barrier(size, timeout=60)
        self.values: list[object] = [None] * size

    def run(self, search: Callable[[Parallel], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: search(Thread(self, rank)), range(self.size)))


class Thread(Parallel):
    """One of them."""

    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__()
        self.threads, self.rank, self.size, self.whole = threads, rank, threads.size, threads.whole

    @override
    def gather(self, value: object) -> list[object]:
        self.threads.values[self.rank] = value
        self.threads.barrier.wait()
        values = list(self.threads.values)
        self.threads.barrier.wait()
        return values

    @override
    def agree(self, value: object) -> object:
        return self.gather(value)[0]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_finds_the_same_with_less_work_for_each(
    model: StagedCausalLM, size: int, whole: bool
) -> None:
    data = batches(0) + batches(1) + batches(2)[:1]

    def search(ranks: Parallel) -> tuple[object, float, float, int]:
        evaluator = Evaluator(model, model, data, ranks=ranks)
        rounds = RoundSearch(evaluator, model.plan, "decode", 3, NO_GUARDS)
        best, energy = anneal(rounds, rounds.greedy()[0], Annealing(10, temperature=0.3))
        return best, energy, evaluator.measure(model.plan.drop("both", 1)).nll, evaluator.block_tokens

    *expected, work = search(Parallel())
    for *found, share in Threads(size, whole=whole).run(search):
        assert found == expected
        assert share < work


def projected(project: Callable[..., Any], note: Callable[[], None], *args: Any) -> Any:
    note()
    return project(*args)


def repeated(batch: Batch, times: int) -> Batch:
    return Batch(*(torch.cat([part] * times) for part in batch))


@pytest.mark.parametrize(
    "memory", [SearchMemory(), SearchMemory(base=300_000, teacher=30_000), SearchMemory(base=500_000)]
)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("target", ["prefill", "decode"])
def test_ranks_that_hold_parts_of_the_weights_keep_step(size: int, memory: SearchMemory, target: Target) -> None:
    """They split the batches too, and run the same blocks, and the heads as often, at the same time."""
    small, large = batches(1), [repeated(batch, 9) for batch in batches(0)]  # whose head runs twice
    single = small[0]._replace(response_ids=small[0].response_ids[:, :1], response_mask=small[0].response_mask[:, :1])
    data = [small[0], large[0], large[1], single, *batches(2)[:1]]
    monitored = StagedCausalLM(tiny_model("llama", blocks=7)).eval()
    expected = Evaluator(monitored, monitored, data)
    calls: dict[int, list[str]] = {}
    start = StagePlan.full(monitored.plan.model, "free")

    def note(name: str, *_: Any) -> None:
        calls.setdefault(get_ident(), []).append(name)

    for index, gate in monitored.gates.items():
        gate.block.register_forward_pre_hook(partial(note, str(index)))
        gate.project = partial(projected, gate.project, partial(note, f"keys and values of {index}"))
    for name in ("input", "output"):
        getattr(monitored.model, f"get_{name}_embeddings")().register_forward_pre_hook(partial(note, name))

    def search(ranks: Parallel) -> tuple[object, float, list[str]]:
        evaluator = Evaluator(monitored, monitored, data, ranks=ranks, memory=memory)
        rounds = RoundSearch(evaluator, start, target, 2, NO_GUARDS)
        best, energy = anneal(rounds, rounds.greedy()[0], Annealing(10, temperature=0.3))
        return best, energy, calls.pop(get_ident())

    rounds = RoundSearch(expected, start, target, 2, NO_GUARDS)
    best, energy = anneal(rounds, rounds.greedy()[0], Annealing(10, temperature=0.3))
    found = Threads(size, whole=False).run(search)
    assert [rank[0] for rank in found] == [best] * size
    assert [rank[1] for rank in found] == [pytest.approx(energy, rel=1e-6)] * size
    assert len({tuple(rank[2]) for rank in found}) == 1


@settings(max_examples=25)
@given(st.data(), st.sampled_from([10**9, 60_000]))
def test_a_base_made_from_the_base_before_gives_the_same_hidden_states(
    model: StagedCausalLM, data: st.DataObject, cache_bytes: int
) -> None:
    neighbours = Neighbours(model, batches(), cache_bytes)
    assert neighbours.kept == len(batches())
    drawn = data.draw(st.lists(plans(7, model=model.plan.model), min_size=4, max_size=6))
    asked = [Candidate(replace(plan, merged={}, untied={})) for plan in drawn]
    for base, candidate in pairwise(asked):
        neighbours.rebase(base)
        for index, batch in enumerate(batches()):
            with torch.no_grad():
                expected = final_hidden(model, batch, candidate.plan)
            torch.testing.assert_close(neighbours.response(candidate, index), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(st.data())
def test_a_policy_of_its_own_is_evaluated_from_where_it_differs(model: StagedCausalLM, data: st.DataObject) -> None:
    kept = Retention("first_last", 1, 2)
    asked = []
    for _ in range(3):
        dropped = data.draw(st.sets(st.integers(1, 6), max_size=2))
        plan = StagePlan.full(model.plan.model, "free")
        for block in dropped:
            plan = plan.drop(data.draw(st.sampled_from(["prefill", "decode", "both"])), block)
        trimmed = data.draw(st.sets(st.sampled_from(plan.decode)))
        asked.append((plan, KVRetentionPolicy("prefill", model.kv_shape, dict.fromkeys(trimmed, kept))))
    evaluator = Evaluator(model, model, batches())
    evaluator.rebase(*asked[0])
    for plan, policy in asked:
        naive = measure_quality(model, model, batches(), plan=plan, policy=policy).kl
        assert evaluator.energy(plan, policy) == pytest.approx(naive, abs=1e-6)


@pytest.mark.parametrize(("relation", "target"), [("nested", "prefill"), ("unified", "both"), ("free", "prefill")])
def test_every_state_keeps_the_relation(relation: Relation, target: Target) -> None:
    model = StagedCausalLM(tiny_model("llama", blocks=7)).eval()
    model.apply_plan(StagePlan.full(model.plan.model, relation))
    search = round_search(model, target=target)
    best, _ = anneal(search, search.greedy()[0], Annealing(25, temperature=1.0))
    plan = search.candidate(best).plan
    assert plan.relation == relation
    assert len(plan.removed("prefill")) == 3
    assert len(plan.decode) == (7 if relation == "free" else 4)


def test_drops_and_merges_of_a_state_never_touch_the_same_block(model: StagedCausalLM) -> None:
    student, settings = StagedCausalLM(tiny_model("llama", blocks=7)).eval(), Merging(min_cosine=-1, steps=1)
    context = ScoringContext(student, model, batches())
    merges = distillation_set(context, model.plan, "decode", settings, NO_GUARDS)
    assert [move.run for move in merges] == [(block, block + 1) for block in range(6)]
    search = RoundSearch(context.evaluator, model.plan, "decode", 3, NO_GUARDS, merges, settings)
    draw, state = random.Random(0), search.greedy()[0]
    for _ in range(200):
        other = search.neighbour(state, draw)
        assert other is not None
        state = other
        touched = [block for move in state for block in move.run]
        assert len(touched) == len(set(touched))
        assert len(search.candidate(state).plan.removed("decode")) == 3


@pytest.mark.parametrize(
    ("relation", "target"), [("nested", "both"), ("nested", "decode"), ("unified", "both"), ("free", "prefill")]
)
def test_the_energy_of_merges_is_that_of_a_naive_evaluation(relation: Relation, target: Target) -> None:
    student, teacher = (StagedCausalLM(tiny_model("llama", blocks=5)).eval() for _ in range(2))
    student.apply_plan(StagePlan.full(student.plan.model, relation))
    context = ScoringContext(student, teacher, batches())
    fitted = Merging(min_cosine=-1, steps=8)
    merges = distillation_set(context, student.plan, target, fitted, NO_GUARDS)
    search = RoundSearch(context.evaluator, student.plan, target, 2, NO_GUARDS, merges, fitted)
    draw, state = random.Random(0), search.greedy()[0]
    for _ in range(12):
        neighbour = search.neighbour(state, draw)
        assert neighbour is not None
        naive = measure_quality(student, teacher, batches(), plan=search.candidate(neighbour).plan).kl
        assert search.energy(neighbour) == pytest.approx(naive, abs=1e-6)
        search.rebase(neighbour)
        state = neighbour


def test_a_round_that_cannot_be_filled_is_refused(model: StagedCausalLM) -> None:
    search = RoundSearch(Evaluator(model, model, batches()), model.plan, "decode", 7, NO_GUARDS)
    with pytest.raises(ValueError, match="Only 6 of 7 removals can be made in `decode`"):
        search.greedy()


def test_a_budget_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`annealing` needs `evaluations` >= 1"):
        Annealing(0)
