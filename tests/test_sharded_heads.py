"""Sharded heads are gathered once for all chunks of a batch, and give the gradients of whole ones."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from heads_worker import CASES, LOSSES, compare
from process_group import run_workers
from test_losses import batch, module_with
from tiny_models import tiny_model

from pdtrim_pl.losses import training_loss
from pdtrim_pl.losses.heads import gathered_once
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies.zero_heads import gather_heads_once

PROCESSES = 2
TIMEOUT = 240


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("heads")
    run_workers(compare, folder / "told.json", folder=folder, timeout=TIMEOUT, processes=PROCESSES)
    found: dict[str, list[dict[str, float]]] = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", [" ".join(map(str, case)) for case in CASES])
def test_loss_and_gradients_are_those_of_whole_heads_with_other_numbers_of_chunks_on_other_ranks(
    differences: dict[str, list[dict[str, float]]], case: str
) -> None:
    for found in differences[case]:
        assert found["gradient"] < 1e-4
        assert found["loss"] < 1e-5
    at_once, in_chunks = (found["gathers"] for found in differences[case])
    assert at_once == in_chunks > 0, "however many chunks there are"


def test_a_loss_in_the_heads_is_the_loss_outside_of_them() -> None:
    found = []
    for inside in (False, True):
        module = module_with(list(LOSSES))
        distilled = module.distilled(batch())
        if inside:
            distilled = replace(distilled, at_heads=gathered_once(module.student, module.teacher))
        loss, _ = training_loss(LOSSES, distilled, chunk_tokens=3)
        loss.backward()
        found.append([loss, *(w.grad for w in module.student.parameters() if w.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_under_zero_3_all_chunks_are_one_call_of_the_head_with_its_hooks(family: str) -> None:
    found, calls = [], list[str]()
    for gathered in (False, True):
        module = module_with(list(LOSSES), plan_change=False)
        module.student, module.teacher = (StagedCausalLM(tiny_model(family, seed=seed)) for seed in (0, 1))
        module.teacher.requires_grad_(False)
        if gathered:
            for name, model in (("student", module.student), ("teacher", module.teacher)):
                gather_heads_once(model)
                model.whole_head = nullcontext  # DeepSpeed's needs its engine
                head = model.model.get_output_embeddings()
                head.register_forward_hook(lambda *args, name=name: calls.append(name))
        distilled = module.distilled(batch())
        if gathered:
            distilled = replace(distilled, at_heads=gathered_once(module.student, module.teacher))
        loss, values = training_loss(LOSSES, distilled, chunk_tokens=3)
        loss.backward()
        found.append([loss, *values.values(), *(w.grad for w in module.student.parameters() if w.grad is not None)])
    assert calls == ["student"]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert module.student.compared_logits(torch.zeros(2, 32)).shape == (2, 64), "evaluation calls the head as ever"
    assert calls == ["student", "student"]
