"""The teacher reference: one causal pass gives what two stages give, and nothing runs twice that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_criteria import batches
from tiny_models import FAMILIES, tiny_model

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.evaluator import Evaluator, SearchMemory
from pdtrim_pl.evaluation.quality import measure_quality, quality_against
from pdtrim_pl.evaluation.summary import summarise
from pdtrim_pl.evaluation.teacher import TeacherReference, is_whole, teacher_states
from pdtrim_pl.evaluation.tokens import final_hidden
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.staged import StagedCausalLM

SINGLE = Batch(*(part[:, :1] if index > 1 else part for index, part in enumerate(batches()[0])))
"""Every response is one token, which prefill predicts."""


def counted(model: StagedCausalLM, monkeypatch: pytest.MonkeyPatch, *stages: str) -> list[str]:
    """The passes that a model makes from now on."""
    calls: list[str] = []

    def watch(stage: str) -> None:
        run = getattr(model, stage)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(stage)
            return run(*args, **kwargs)

        monkeypatch.setattr(model, stage, counting)

    for stage in stages or ("prefill", "decode"):
        watch(stage)
    return calls


@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_causal_pass_gives_the_states_of_prefill_and_decode(
    family: str, boundary: Boundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    teacher = StagedCausalLM(model)
    teacher.apply_plan(StagePlan.full(teacher.plan.model, boundary=boundary))
    calls = counted(teacher, monkeypatch)
    for batch in (*batches(), SINGLE):
        with torch.no_grad():
            expected = final_hidden(teacher, batch)
            calls.clear()
            torch.testing.assert_close(teacher_states(teacher, batch), expected, atol=2e-5, rtol=2e-5)
        assert calls == ["prefill"]


def pruned(teacher: StagedCausalLM) -> None:
    teacher.apply_plan(StagePlan.full(teacher.plan.model).drop("decode", 2))


def trimmed(teacher: StagedCausalLM) -> None:
    rules = {1: Retention("first_last", 1, 1)}
    teacher.apply_policy(KVRetentionPolicy(teacher.plan.boundary, teacher.kv_shape, rules))


def untied(teacher: StagedCausalLM) -> None:
    every = tuple(range(4))
    teacher.apply_plan(StagePlan(teacher.plan.model, every, every, untied={"decode": (1,)}))
    with torch.no_grad():
        for parameter in teacher.gates[1].untied["decode"].parameters():
            parameter.mul_(0.5)


@pytest.mark.parametrize("change", [pruned, trimmed, untied])
def test_a_teacher_that_is_not_whole_runs_in_two_stages(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = StagedCausalLM(tiny_model("llama"))
    assert is_whole(teacher)
    change(teacher)
    assert not is_whole(teacher)
    calls = counted(teacher, monkeypatch)
    with torch.no_grad():
        for batch in batches():
            calls.clear()
            states = teacher_states(teacher, batch)
            assert calls == ["prefill", "decode"]
            torch.testing.assert_close(states, final_hidden(teacher, batch), atol=0, rtol=0)


def test_a_request_beyond_the_context_is_refused() -> None:
    teacher = StagedCausalLM(tiny_model("llama", max_position_embeddings=12))
    with pytest.raises(ValueError, match="Prompt and response take 15 tokens, and the context of `model` is 12"):
        TeacherReference(teacher, batches()).prepare()


def test_states_that_fit_are_made_once_and_others_whenever_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = StagedCausalLM(tiny_model("llama"))
    size = int(batches()[0].response_mask.sum()) * 32 * 4
    for room, passes in ((10**9, [1, 1]), (size, [1, 3]), (size - 1, [3, 3])):
        calls = counted(teacher, monkeypatch, "prefill")
        reference = TeacherReference(teacher, batches(), states=room)
        assert not calls, "nothing has been asked for yet"
        for index, expected in enumerate(passes):
            calls.clear()
            states = [reference.states(index) for _ in range(3)]
            assert len(calls) == expected
            assert all(torch.equal(states[0], other) for other in states)


def test_the_summary_and_the_evaluator_run_the_teacher_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = StagedCausalLM(tiny_model("llama")), StagedCausalLM(tiny_model("llama", seed=1))
    base = StagedCausalLM(tiny_model("llama", seed=2))
    calls = counted(teacher, monkeypatch)
    summarise(student, teacher, batches(), base=base)
    assert calls == ["prefill"] * 2
    for memory in (SearchMemory(), SearchMemory(teacher=0)):
        calls.clear()
        evaluator = Evaluator(student, teacher, batches(), memory=memory)
        for block in range(3):
            evaluator.energy(student.plan.drop("decode", block))
        assert calls == ["prefill"] * 2


@pytest.mark.parametrize("room", [0, 10**9])
def test_quality_does_not_depend_on_what_is_kept_of_the_teacher(room: int) -> None:
    teacher, student = StagedCausalLM(tiny_model("llama")), StagedCausalLM(tiny_model("llama", seed=1))
    reference = TeacherReference(teacher, batches(), states=room)
    plan = student.plan.drop("decode", 1)
    assert quality_against(reference, student, plan=plan) == measure_quality(student, teacher, batches(), plan=plan)
