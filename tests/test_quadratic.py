"""The quadratic model of the loss: its gradient is that of gates, and its solution is the best set."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merging import batches
from tiny_models import tiny_model
from torch import Tensor, nn

from pdtrim_pl.criteria import ScoringContext
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.search.quadratic import QuadraticModel
from pdtrim_pl.staged import StagedCausalLM

TEXT = batches(12, prompt=12, response=10)
STEP = 1e-3


def model_of(size: int, seed: int) -> QuadraticModel:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return QuadraticModel(tuple(range(10, 10 + size)), torch.randn(size, generator=generator).double(), rows.T @ rows)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(3, 9), seed=st.integers(0, 99), data=st.data())
def test_the_exact_solution_is_the_best_of_all_sets(size: int, seed: int, data: st.DataObject) -> None:
    count, model = data.draw(st.integers(1, size - 1)), model_of(size, seed)
    chosen, change = model.least(count)
    sets = list(combinations(range(size), count))
    every = [
        float(sum(model.linear[i] for i in one) + sum(model.curvature[i, j] for i in one for j in one) / 2)
        for one in sets
    ]
    assert change == pytest.approx(min(every))
    assert chosen == tuple(model.blocks[i] for i in sets[every.index(min(every))])


@pytest.mark.parametrize("seed", range(3))
def test_annealing_finds_the_exact_solution(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(10, seed)
    exact = model.least(4)
    monkeypatch.setattr("pdtrim_pl.search.quadratic.EXACT", 0)
    monkeypatch.setattr("pdtrim_pl.search.quadratic.STEPS", 300)
    assert model.least(4) == exact


def test_its_gradient_is_that_of_gates_before_the_blocks() -> None:
    student = StagedCausalLM(tiny_model("llama", blocks=4)).double().eval()
    context = ScoringContext(student, student, TEXT)
    fitted = QuadraticModel.fitted(context, student.plan, "both", (1, 2))

    def loss(block: int, gate: float) -> float:
        def scaled(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return args[0] + gate * (out - args[0])

        handle = student.gates[block].block.register_forward_hook(scaled)
        try:
            return measure_quality(student, student, TEXT).nll
        finally:
            handle.remove()

    for position, block in enumerate(fitted.blocks):
        slope = (loss(block, 1 - STEP) - loss(block, 1 + STEP)) / (2 * STEP)
        assert float(fitted.linear[position]) == pytest.approx(slope, rel=2e-2)
    assert torch.equal(fitted.curvature, fitted.curvature.T)
    assert bool((fitted.curvature.diagonal() > 0).all())


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"4 blocks cannot leave: 3 may"):
        model_of(3, 0).least(4)
