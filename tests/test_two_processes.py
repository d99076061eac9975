"""The acceptance test across processes: any plan and policy, two exported checkpoints, the cache over a socket."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from heard import together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import plans, policies
from tiny_models import FAMILIES, tiny_model

from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.requests import Ask
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to

pytestmark = pytest.mark.usefixtures("forked_workers")


def lengths(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, most), min_size=1, max_size=3)


def padded(sizes: list[int], seed: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(sizes)
    ids = torch.randint(3, 64, (len(sizes), width), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(width)[None]
    count = torch.tensor(sizes)[:, None]
    mask = place >= width - count if left else place < count
    return ids * mask, mask


@settings(max_examples=24, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data(), st.sampled_from(FAMILIES), st.integers(0, 99))
def test_two_processes_over_a_socket_compute_what_the_student_does(data: st.DataObject, family: str, seed: int) -> None:
    model = tiny_model(family, seed=seed)
    parts = tuple(architecture_of(model.config).cuts)
    plan = data.draw(plans(4, model=reference_to(model, "tiny"), parts=parts))
    student = StagedCausalLM(model, plan)
    student.apply_policy(data.draw(policies(student.plan, kv=student.kv_shape, codecs=True)))
    with torch.no_grad():  # weights of a stage's own must differ from the shared ones to be told apart
        for gate in student.gates.values():
            for parameter in gate.untied.parameters():
                parameter.mul_(1.1)
    prompts = data.draw(lengths(12))
    responses = data.draw(st.lists(st.integers(1, 7), min_size=len(prompts), max_size=len(prompts)))
    prompt_ids, prompt_mask = padded(prompts, seed, left=True)
    response_ids, response_mask = padded(responses, seed + 1, left=False)
    with torch.no_grad():
        expected = student.logits(student(prompt_ids, response_ids, prompt_mask, response_mask).hidden)

    with tempfile.TemporaryDirectory() as folder:
        export = export_pair(student, Path(folder) / "export", tokenizer=None)
        rows = zip(prompt_ids, prompt_mask, response_ids, response_mask, strict=True)
        with Engine(export) as engine:
            heard = together(engine, [Ask.scoring(p[m].tolist(), r[n].tolist()) for p, m, r, n in rows])
    assert student.policy is not None
    for row, (answer, done) in enumerate(heard):
        torch.testing.assert_close(answer.logits, expected[row][response_mask[row]], atol=1e-4, rtol=0.0)
        assert done.stats is not None
        assert done.stats.kv_bytes == student.policy.sent_bytes(student.plan, prompts[row])
