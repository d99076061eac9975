"""The end of a local fit: the last projection by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_contract import BLOCKS
from test_merging import QUICK, TARGETS, batches, few, staged
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from pdtrim_pl.data import Batch
from pdtrim_pl.merging import fit_runs
from pdtrim_pl.merging.least_squares import PASSES, RIDGES, moments, solve_last_projection
from pdtrim_pl.merging.recording import Recording, record
from pdtrim_pl.merging.trial import Start, Trial
from pdtrim_pl.models.architectures import LlamaLine
from pdtrim_pl.plan import STAGES, Boundary, Move, Target
from pdtrim_pl.staged import StagedCausalLM

NO_LAST_PROJECTION = {"gemma2", "gemma3_text", "olmo2", "granite"}
"""Families that norm or scale what the MLP gives before it is added."""


def inputs_of(trial: Trial, recordings: Sequence[Recording]) -> Tensor:
    """What the last projection is fed at real tokens, [N, I]."""
    projection, seen = trial.last_projection, list[Tensor]()
    assert projection is not None
    for recording in recordings:
        fed = list[Tensor]()
        hook = projection.register_forward_hook(lambda _, inputs, __, fed=fed: fed.append(inputs[0].detach()))
        trial.output(recording)
        hook.remove()
        stages = [stage for stage in STAGES if stage in trial.start.stands_for]
        seen += [x[recording.request.valid[s]] for x, s in zip(fed, stages, strict=True)]
    return torch.cat(seen)


def on_trial(student: StagedCausalLM, teacher: StagedCausalLM, target: Target, behind: int) -> tuple[Trial, Start]:
    """Block 1 for 1 and 2, and one behind it, away from the teacher's weights."""
    stages = STAGES if target == "both" else (target,)
    start = Start(Move(target, (1, 2), 1), dict.fromkeys(stages, (1, 2)), (3,) * behind)
    trial = Trial.of(student, start)
    generator = torch.Generator().manual_seed(1)
    for parameter in trial.blocks.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trial, start


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(target=st.sampled_from(TARGETS), boundary=st.sampled_from(["prefill", "decode"]), behind=st.integers(0, 1))
def test_the_last_projection_ends_where_the_ridge_regression_has_no_gradient(
    family: str, target: Target, boundary: Boundary, behind: int
) -> None:
    behind = behind if target == "both" else 0
    scaled = {"residual_multiplier": 0.5} if family == "granite" else {}
    student, teacher = (staged(family, boundary=boundary, **scaled) for _ in range(2))
    trial, start = on_trial(student, teacher, target, behind)
    seen = [record(teacher, batch, boundary, start.places) for batch in batches(3)]
    before = {name: weight.detach().clone() for name, weight in trial.blocks.named_parameters()}
    assert (trial.last_projection is None) is (family in NO_LAST_PROJECTION)
    if trial.last_projection is None:
        return
    solve_last_projection(trial, seen, seen)
    (name,) = (name for name, weight in trial.blocks.named_parameters() if not torch.equal(weight, before[name]))
    assert name.startswith("3." if behind else "1.mlp.")
    weight = trial.blocks.get_parameter(name)
    with torch.enable_grad():
        errors = [0.5 * (trial.output(one) - trial.target(one)).square().sum() for one in seen]
        (gradient,) = torch.autograd.grad(torch.stack(errors).sum(), weight)
    ridge = min(RIDGES) * inputs_of(trial, seen).square().sum(0).mean()
    torch.testing.assert_close(
        gradient, ridge * (before[name] - weight), atol=1e-3 * float(gradient.abs().max()), rtol=0
    )


@pytest.mark.parametrize(
    ("judged", "kept"),
    [
        ([(0.5, 1.0), (0.6, 0.9), (0.6, 0.9), (0.7, 0.8)], min(RIDGES)),
        ([(0.5, 1.0), (0.6, 0.9), (0.7, 0.95), (0.55, 0.8)], max(RIDGES)),
        ([(0.5, 1.0), (0.4, 0.9), (0.6, 1.1), (0.5, 1.0)], None),
    ],
)
def test_a_solution_is_kept_only_where_other_text_has_less_error_and_no_lower_cosine(
    judged: list[tuple[float, float]], kept: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = staged(), staged()
    trial, start = on_trial(student, teacher, "both", 1)
    seen = [record(teacher, batch, "prefill", start.places) for batch in batches(2)]
    assert trial.last_projection is not None
    weight = trial.last_projection.weight
    tried, told = list[Tensor](), iter(judged)

    def judge(_: Sequence[Recording]) -> tuple[float, float]:
        tried.append(weight.detach().clone())
        return next(told)

    monkeypatch.setattr(trial, "judge", judge)
    solve_last_projection(trial, seen[:1], seen[1:])
    expected = tried[0 if kept is None else 1 + RIDGES.index(kept)]
    assert torch.equal(weight, expected)
    assert len(tried) == PASSES
    assert not any(torch.equal(one, other) for one, other in pairwise(tried))


def test_what_one_batch_alone_is_fitted_to_is_not_solved_for_as_no_other_text_could_tell() -> None:
    merging = replace(QUICK, batch_size=2)
    alone, more = (fit_runs(staged(), staged(), batches(count), "both", [(1, 2)], merging) for count in (1, 2))
    steps = 3 * alone.tokens
    assert alone.block_tokens == 19 * BLOCKS + steps + 2 * 2 * 19
    assert more.block_tokens == 2 * 19 * BLOCKS + steps + 2 * 2 * 19 + 2 * (1 + PASSES) * 19


def test_a_last_projection_that_is_no_linear_layer_is_refused_before_any_step() -> None:
    class Wrong(LlamaLine):
        last_projection = "mlp.act_fn"

    student = StagedCausalLM(tiny_model("llama", blocks=BLOCKS), architecture=Wrong()).eval()
    with pytest.raises(ValueError, match=r"`last_projection` of the model's Architecture is 'mlp.act_fn', and a block"):
        fit_runs(student, staged(), batches(), "both", [(1, 2)], QUICK)


@pytest.mark.parametrize(("prompt", "response", "boundary"), [(1, 5, "decode"), (7, 1, "prefill"), (7, 1, "decode")])
def test_the_last_projection_is_solved_from_one_stage_where_the_other_is_fed_nothing(
    prompt: int, response: int, boundary: Boundary
) -> None:
    student, teacher = staged(boundary=boundary), staged(boundary=boundary)
    trial, start = on_trial(student, teacher, "both", 0)
    ids = torch.arange(3, 3 + 2 * (prompt + response)).view(2, -1)
    all_real = [torch.ones(2, length, dtype=torch.bool) for length in (prompt, response)]
    batch = Batch(ids[:, :prompt], all_real[0], ids[:, prompt:], all_real[1])
    seen = [record(teacher, batch, boundary, start.places)]
    _, error = trial.judge(seen)
    solve_last_projection(trial, seen, seen)
    assert trial.judge(seen)[1] < 0.9 * error


def test_a_fit_that_diverged_is_left_as_it_is_and_not_kept() -> None:
    student, teacher = staged(), staged()
    trial, start = on_trial(student, teacher, "both", 0)
    trial.blocks["1"].get_parameter("mlp.up_proj.weight").data.fill_(torch.nan)
    assert trial.last_projection is not None
    before = trial.last_projection.weight.detach().clone()
    seen = [record(teacher, batch, "prefill", start.places) for batch in batches(2)]
    solve_last_projection(trial, seen[:1], seen[1:])
    assert torch.equal(trial.last_projection.weight, before)
    (run,) = fit_runs(student, teacher, batches(), "both", [(1, 2)], replace(QUICK, learning_rate=1e30)).runs
    assert run.weights is None


def test_the_last_projection_is_solved_under_autocast_too() -> None:
    student, teacher = staged(), staged()
    errors = list[float]()
    for half in (False, True):
        trial, start = on_trial(student, teacher, "both", 1)
        seen = [record(teacher, batch, "prefill", start.places) for batch in batches(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            errors.append(trial.judge(seen)[1])
            solve_last_projection(trial, seen, seen)
            errors.append(trial.judge(seen)[1])
            gram, _ = moments(trial, seen)
            rows = inputs_of(trial, seen).double()
        torch.testing.assert_close(gram, rows.T @ rows, atol=1e-5 * float(gram.max()), rtol=0)
    assert errors[1] < 0.9 * errors[0]
    assert errors[2:] == pytest.approx(errors[:2], rel=0.01)
