"""The teacher reference: nothing runs twice that is kept, and a model has no divergence from itself."""

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
from pdtrim_pl.evaluation.teacher import TeacherReference
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_teacher_has_no_divergence_at_all(family: str, dtype: torch.dtype) -> None:
    model = StagedCausalLM(tiny_model(family).to(dtype))
    assert measure_quality(model, model, [*batches(), SINGLE]).kl == 0.0
    assert Evaluator(model, model, batches(), memory=SearchMemory(teacher=0)).energy(model.plan) == 0.0


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
    assert calls == ["prefill", "decode"] * 4, "two batches, and both once more with their prompts repeated"
    for memory in (SearchMemory(), SearchMemory(teacher=0)):
        calls.clear()
        evaluator = Evaluator(student, teacher, batches(), memory=memory)
        for block in range(3):
            evaluator.energy(student.plan.drop("decode", block))
        assert calls == ["prefill", "decode"] * 2


@pytest.mark.parametrize("room", [0, 10**9])
def test_quality_does_not_depend_on_what_is_kept_of_the_teacher(room: int) -> None:
    teacher, student = StagedCausalLM(tiny_model("llama")), StagedCausalLM(tiny_model("llama", seed=1))
    reference = TeacherReference(teacher, batches(), states=room)
    plan = student.plan.drop("decode", 1)
    assert quality_against(reference, student, plan=plan) == measure_quality(student, teacher, batches(), plan=plan)
