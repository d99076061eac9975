"""Compiled blocks compute what plain ones do, whatever a plan makes of them, and leave names of weights alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from short_text import SHORT
from test_losses import batch
from tiny_models import tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.losses import KL, CrossEntropy, HiddenMatch, KVMatch, LossTerm, training_loss
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import KVRetentionPolicy, Retention, Width
from pdtrim_pl.staged import StagedCausalLM, compiled
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_compiling

EVERY: tuple[LossTerm, ...] = (KL(), HiddenMatch(), KVMatch())
Result = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture(params=["aot_eager"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(compiled, "BACKEND", request.param)
    torch._dynamo.reset()
    counters.clear()
    yield request.param
    torch._dynamo.reset()


def module_of(losses: tuple[LossTerm, ...] = (KL(),), blocks: int = 3) -> PDTrimModule:
    module = PDTrimModule("tiny", losses=list(losses))
    module.student = StagedCausalLM(tiny_model("llama", blocks=blocks, seed=1))
    module.teacher = StagedCausalLM(tiny_model("llama", blocks=blocks)).requires_grad_(False)
    return module


def trained(module: PDTrimModule) -> Result:
    """The loss of one batch, and the gradients of the student."""
    module.student.zero_grad()
    loss, _ = training_loss(module.losses, module.distilled(batch()))
    loss.backward()
    weights = module.student.named_parameters()
    return loss.detach(), {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def check_same(ours: Result, theirs: Result) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], atol=1e-5, rtol=1e-4)


def change(module: PDTrimModule) -> None:
    """Decode loses a block, prefill another, decode gets weights of its own for a third, and less is sent."""
    module.student.gates[0].untie("decode")
    module.student.apply_plan(module.plan.drop("both", 1))
    module.apply_policy(KVRetentionPolicy("prefill", module.student.kv_shape, {0: Retention("first_last", 1, 3)}))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"], indirect=True)
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_plain_blocks_before_and_after_a_change_of_plan(
    backend: str, recompute: bool
) -> None:
    plain, fast = module_of(EVERY), module_of(EVERY)
    for module in (plain, fast):
        module.student.train().gradient_checkpointing = recompute
    for model in (fast.student, fast.teacher):
        model.compile_blocks()
    for step in (lambda module: None, change):
        for module in (plain, fast):
            step(module)
        check_same(trained(fast), trained(plain))
    assert counters["stats"]["unique_graphs"] > 0


def test_all_blocks_share_what_was_compiled(backend: str) -> None:
    module = module_of(blocks=4)
    for model in (module.student, module.teacher):
        model.compile_blocks()
    trained(module)
    assert counters["stats"]["unique_graphs"] == 2, "with gradients and without"


def test_a_block_that_becomes_narrow_or_is_measured_after_it_was_compiled_runs_with_its_hooks(backend: str) -> None:
    plain, fast = module_of(), module_of()
    fast.student.compile_blocks()
    check_same(trained(fast), trained(plain))
    for module in (plain, fast):
        module.student.apply_plan(module.plan.narrow("both", 1, Width(tuple(range(0, 48, 2)), (0, 2))))
    narrow = trained(plain)
    check_same(trained(fast), narrow)
    seen: list[Tensor] = []
    handle = fast.student.gates[2].block.get_submodule("mlp").register_forward_hook(lambda *args: seen.append(args[2]))
    check_same(trained(fast), narrow)
    assert seen
    handle.remove()
    seen.clear()
    check_same(trained(fast), narrow)
    assert not seen


def test_weights_keep_their_names_and_a_copy_of_a_model_is_whole(backend: str) -> None:
    plain, fast = module_of(), module_of()
    fast.student.compile_blocks()
    trained(fast)
    assert list(fast.student.state_dict()) == list(plain.student.state_dict())
    inputs: Any = batch().request
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(fast.student)(*inputs).hidden, plain.student(*inputs).hidden)


def test_a_run_trains_to_the_losses_of_a_plain_one(backend: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    found = []
    for setting in (False, True):
        seed_everything(0, verbose=False)
        data = PromptResponseDataModule(
            str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), parts=Parts(validation=2, calibration=2, max_train=8),
            batch_size=4,
        )  # fmt: skip
        optimizer = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
        module = PDTrimModule(
            str(tiny_llama_dir), losses=[CrossEntropy()], loading=Loading(compile=setting), optimizer=optimizer
        )
        trainer = Trainer(
            default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", devices=1, logger=False, barebones=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        found.append([loss for _, loss in module.record.losses])
        assert (counters["stats"]["unique_graphs"] > 0) == setting
    assert found[0][-1] != found[0][0] > 1, "it learns"
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "trainable", "message"),
    [
        (PDTrimFSDPStrategy, "all", r"gathers sharded weights by hooks in every block. Use ZeRO-1, ZeRO-2 or DDP"),
        (lambda: PDTrimDeepSpeedStrategy(3), "all", r"gathers sharded weights by hooks"),
        (lambda: "ddp", "lora", r"`trainable: lora` adds adapters by hooks in every layer"),
        (lambda: "auto", LoRA(2), r"`trainable: lora` adds adapters by hooks in every layer"),
    ],
)
def test_where_every_block_has_hooks_compiling_is_refused(strategy: Any, trainable: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"`loading.compile` would compile nothing: .*" + message):
        check_compiling(strategy(), trainable)


@pytest.mark.parametrize("strategy", ["ddp", "auto", *(PDTrimDeepSpeedStrategy(stage) for stage in (1, 2))])
def test_where_weights_are_whole_compiling_is_taken(strategy: Any) -> None:
    for trainable in ("all", "merged", "norms"):
        check_compiling(strategy, trainable)
