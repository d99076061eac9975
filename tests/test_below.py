"""Where the first blocks are the teacher's and nothing trains there, the teacher runs them for the student too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_losses import batch
from tiny_models import tiny_model
from torch import Tensor

from pdtrim_pl.losses import KL, HiddenMatch, KVMatch, LossTerm, training_loss
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Boundary, Codec, KVRetentionPolicy, Retention, StagePlan, Width
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.below import common_blocks

BLOCKS = 5
Change = Callable[[StagePlan], StagePlan]
MERGE_IN_BOTH: Change = lambda plan: plan.merge("both", (2, 3), into=2)  # noqa: E731
MERGE_IN_DECODE: Change = lambda plan: plan.merge("decode", (3, 4), into=3)  # noqa: E731
FORMS = {
    "at once": (MERGE_IN_BOTH, "prefill", [KL()]),
    "two stages": (MERGE_IN_DECODE, "prefill", [KL()]),
    "boundary decode": (MERGE_IN_DECODE, "decode", [KL()]),
    "caches": (MERGE_IN_DECODE, "prefill", [KL(), KVMatch()]),
}
Form = tuple[Change, Boundary, list[LossTerm]]


def module_of(form: Form, *, family: str = "llama") -> PDTrimModule:
    """A student with merged blocks that train, and its teacher."""
    change, boundary, losses = form
    module = PDTrimModule("tiny", losses=losses, trainable="merged")
    module.student = StagedCausalLM(tiny_model(family, blocks=BLOCKS)).train()
    module.teacher = StagedCausalLM(tiny_model(family, blocks=BLOCKS)).requires_grad_(False).eval()
    for model in (module.student, module.teacher):
        model.apply_plan(StagePlan.full(model.plan.model, boundary=boundary))
    module.student.apply_plan(change(module.plan))
    module.student.train_only("merged")
    generator = torch.Generator().manual_seed(1)
    for weight in module.student.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return module


def trained(module: PDTrimModule) -> tuple[Tensor, dict[str, Tensor], Counter[int]]:
    """Loss and gradients of a batch, and how often the student ran each block."""
    runs: Counter[int] = Counter()
    handles = [
        block.register_forward_hook(lambda *_, index=index: runs.update([index]))
        for index, gate in module.student.gates.items()
        for block in (gate.block, *gate.untied.values())
    ]
    module.student.zero_grad()
    loss, _ = training_loss(module.losses, module.distilled(batch()))
    loss.backward()
    for handle in handles:
        handle.remove()
    weights = module.student.named_parameters()
    return loss.detach(), {name: w.grad.clone() for name, w in weights if w.grad is not None}, runs


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_the_same_and_the_student_runs_fewer_blocks(
    form: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(FORMS[form], family=family)
    loss, gradients, runs = trained(module)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_common", lambda: 0)
        expected_loss, expected, all_runs = trained(module)
    assert loss > 0
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    first = min(min(blocks, default=BLOCKS) for blocks in module.plan.merged.values())
    assert first == common_blocks(module.student, module.teacher)
    assert not any(runs[index] for index in range(first))
    assert {index: count for index, count in all_runs.items() if index >= first} == dict(runs)
    assert all(all_runs[index] for index in range(first))


def test_a_loss_on_outputs_of_blocks_runs_all_of_them() -> None:
    module = module_of((MERGE_IN_DECODE, "prefill", [KL(), HiddenMatch()]))
    assert all(trained(module)[2][index] for index in range(BLOCKS))


def narrow(module: PDTrimModule) -> None:
    module.student.apply_plan(module.plan.narrow("decode", 1, Width(tuple(range(24)))))


def drop(module: PDTrimModule) -> None:
    module.student.apply_plan(module.plan.drop("decode", 1))


def send_less(module: PDTrimModule) -> None:
    rules = {1: Retention("first_last", 1, 3)}
    module.apply_policy(KVRetentionPolicy("prefill", module.student.kv_shape, rules))


def send_rounded(module: PDTrimModule) -> None:
    module.apply_policy(KVRetentionPolicy("prefill", module.student.kv_shape, {1: Retention(codec=Codec("int8"))}))


def write(module: PDTrimModule) -> None:
    module.student.gates[1].block.get_parameter("mlp.down_proj.weight").data[0, 0] += 1


def let_train(module: PDTrimModule) -> None:
    module.student.gates[1].block.requires_grad_(True)


def untie(module: PDTrimModule) -> None:
    module.student.apply_plan(module.plan.merge("prefill", (1, 2), into=1))


@pytest.mark.parametrize("change", [narrow, drop, send_less, send_rounded, write, let_train, untie])
def test_a_block_that_differs_in_anything_ends_what_is_in_common(change: Callable[[PDTrimModule], None]) -> None:
    module = module_of(FORMS["two stages"])
    assert common_blocks(module.student, module.teacher) == 3
    change(module)
    assert common_blocks(module.student, module.teacher) == 1


def test_nothing_is_in_common_where_embeddings_train_or_element_types_differ() -> None:
    module = module_of(FORMS["two stages"])
    module.student.model.get_input_embeddings().requires_grad_(True)
    assert common_blocks(module.student, module.teacher) == 0
    module = module_of(FORMS["two stages"])
    module.teacher.to(torch.bfloat16)
    assert common_blocks(module.student, module.teacher) == 0
    module = module_of(FORMS["two stages"])
    module.student.model.config.attention_dropout = 0.1
    assert common_blocks(module.student, module.teacher) == 0


def test_weights_are_compared_once_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = module_of(FORMS["two stages"]), list[int]()

    def counted(*models: Any) -> int:
        asked.append(common_blocks(*models))
        return asked[-1]

    monkeypatch.setattr("pdtrim_pl.teacher.placed.common_blocks", counted)
    for _ in range(2):
        trained(module)
    drop(module)
    trained(module)
    assert asked == [3, 1]
