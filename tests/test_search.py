"""Annealing and its journal: never worse than greedy, reproducible, and continued without repeating anything."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from test_criteria import batches
from tiny_models import tiny_model

from pdtrim_pl.criteria import GreedyKL, ScoringContext
from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.plan import Relation, StagePlan, Target
from pdtrim_pl.search import Annealing, Guards, Journal, RoundSearch, anneal, choose_drops
from pdtrim_pl.staged import StagedCausalLM

NO_GUARDS = Guards(0, 0)


@pytest.fixture(scope="module")
def model() -> StagedCausalLM:
    return StagedCausalLM(tiny_model("llama", blocks=7)).eval()


def round_search(model: StagedCausalLM, journal: Journal | None = None, target: Target = "decode") -> RoundSearch:
    evaluator = Evaluator(model, model, batches())
    return RoundSearch(evaluator, model.plan, target, 3, NO_GUARDS, journal=journal or Journal(None, "test"))


def test_annealing_finds_the_best_of_all_states_on_a_small_model(model: StagedCausalLM) -> None:
    search = round_search(model)
    greedy = choose_drops(
        GreedyKL(), ScoringContext(model, model, batches()), model.plan, "decode", 3, guards=NO_GUARDS
    )
    best, energy = anneal(search, greedy.removed("decode"), Annealing(300, temperature=0.2, cooling=0.99))
    every = {state: search.evaluator.energy(search.plan(state)) for state in combinations(range(7), 3)}
    assert energy == pytest.approx(min(every.values()), abs=1e-6)
    assert every[best] == pytest.approx(energy, abs=1e-6)
    assert energy <= every[greedy.removed("decode")] + 1e-6


def test_the_same_seed_gives_the_same_result(model: StagedCausalLM) -> None:
    runs = [anneal(round_search(model), (1, 2, 3), Annealing(30, temperature=0.3, seed=5)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_killed_search_goes_on_where_it_stopped_and_repeats_nothing(model: StagedCausalLM, tmp_path: Path) -> None:
    settings = Annealing(40, temperature=0.3)
    whole = round_search(model, Journal(tmp_path / "whole.jsonl", "a"))
    expected = anneal(whole, (1, 2, 3), settings)

    path = tmp_path / "journal.jsonl"
    anneal(round_search(model, Journal(path, "a")), (1, 2, 3), Annealing(15, temperature=0.3))
    with path.open("a") as file:
        file.write('{"search": "a", "remo')  # the kill
    lines = len(path.read_text().splitlines())
    rest = round_search(model, Journal(path, "a"))
    assert anneal(rest, (1, 2, 3), settings) == expected
    assert rest.evaluated == whole.evaluated - (lines - 1)

    again = round_search(model, Journal(path, "a"))
    assert anneal(again, (1, 2, 3), settings) == expected
    assert again.evaluated == 0


def test_a_journal_of_another_search_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "round 0").add((1, 2), 0.5, 1.0)
    Journal(path, "round 0").add((1, 3), None, 0.7)
    same, other = Journal(path, "round 0"), Journal(path, "round 1")
    assert (same.energy((1, 2)), same.at_least((1, 3))) == (0.5, 0.7)
    assert (other.energies, other.bounds) == ({}, {})


def test_only_one_rank_writes(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl", "a", writes=False).add((1,), 0.5, 1.0)
    assert not (tmp_path / "journal.jsonl").exists()


@pytest.mark.parametrize(("relation", "target"), [("nested", "prefill"), ("unified", "both"), ("free", "prefill")])
def test_every_state_keeps_the_relation(relation: Relation, target: Target) -> None:
    model = StagedCausalLM(tiny_model("llama", blocks=7)).eval()
    model.apply_plan(StagePlan.full(model.plan.model, relation))
    first = choose_drops(GreedyKL(), ScoringContext(model, model, batches()), model.plan, target, 3, guards=NO_GUARDS)
    best, _ = anneal(round_search(model, target=target), first.removed("prefill"), Annealing(25, temperature=1.0))
    plan = round_search(model, target=target).plan(best)
    assert plan.relation == relation
    assert len(plan.removed("prefill")) == 3
    torch.testing.assert_close(len(plan.decode), 7 if relation == "free" else 4)


def test_a_budget_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`annealing` needs `evaluations` >= 1"):
        Annealing(0)
