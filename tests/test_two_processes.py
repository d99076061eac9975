"""The acceptance test across processes: any plan and policy, two exported checkpoints, the cache over a socket."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process_group import end, start
from strategies import plans, policies
from tiny_models import FAMILIES, tiny_model
from two_process_worker import serve_many

from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.serving import messages as say
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to

Workers = dict[Stage, Connection]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A prefill and a decode process that have met."""
    meeting_point = tmp_path_factory.mktemp("meeting") / "store"
    ends: Workers = {}
    started = []
    for stage in STAGES:
        ends[stage], theirs = Pipe()
        started.append(start(serve_many, stage, meeting_point, theirs))
        theirs.close()
    yield ends
    for ours in ends.values():
        ours.close()
    end(started, 30)


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
def test_two_processes_over_a_socket_compute_what_the_student_does(
    workers: Workers, data: st.DataObject, family: str, seed: int
) -> None:
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
        for end in workers.values():
            end.send(export)
        first = student.plan.boundary == "prefill"
        workers["prefill"].send(say.Encode(prompt_ids.tolist(), prompt_mask.tolist(), Sampling(), with_logits=first))
        workers["decode"].send(say.Force(response_ids.tolist(), response_mask.tolist()))
        logits, encoded, _ = (workers[stage].recv() for stage in ("decode", "prefill", "decode"))
    found = torch.from_numpy(logits.values)
    torch.testing.assert_close(found[response_mask], expected[response_mask], atol=1e-4, rtol=0.0)
    assert student.policy is not None
    assert encoded.kv_bytes == sum(student.policy.sent_bytes(student.plan, length) for length in prompts)
