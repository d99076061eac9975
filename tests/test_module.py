"""The LightningModule: precisions, vocabulary, teacher, what `state_dict` holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_models import tiny_model

from callbacks import BlockDrop, PlanProgressBar
from pdtrim_pl.criteria import CosineRedundancy
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.losses import KL, HiddenMatch
from pdtrim_pl.module import Loading, PDTrimModule
from pdtrim_pl.search import Guards
from pdtrim_pl.staged import StagedCausalLM


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_precision_trains_and_validates(
    precision: str, checkpointing: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = PDTrimModule(
        str(tiny_llama_dir), losses=[KL(), HiddenMatch(0.1)], loading=Loading(gradient_checkpointing=checkpointing),
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4),
    )  # fmt: skip
    data = PromptResponseDataModule(
        str(tiny_llama_dir), lengths=Lengths(24, 8, 16), parts=Parts(validation=4, calibration=4, max_train=16)
    )
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=3, accelerator="cpu", devices=1, precision=precision, logger=False,  # type: ignore[arg-type]
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[BlockDrop("decode", CosineRedundancy(), {0: 1}, Guards(0, 0))],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    first, *_, last = [loss for _, loss in module.record.losses]
    assert last < first, module.record.losses
    assert module.student.model.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    buffers = dict(module.student.named_buffers())
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}, "RoPE frequencies stay exact"


def test_casting_a_staged_model_never_touches_its_rope_frequencies() -> None:
    staged = StagedCausalLM(tiny_model("gemma3_text"))
    before = {name: buffer.clone() for name, buffer in staged.named_buffers()}
    staged.to(torch.bfloat16)
    assert staged.model.dtype == torch.bfloat16
    for name, buffer in staged.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_teacher_of_another_vocabulary_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "other")
    module = PDTrimModule(str(tiny_llama_dir), loading=Loading(teacher=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"`loading.teacher` has a vocabulary of 64 tokens and `model` one of 259"):
        module.configure_model()


def test_attention_without_masks_of_the_contracts_kind_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"`attn_implementation` is 'flash_attention_2'"):
        StagedCausalLM(model)


def test_a_family_without_an_adapter_is_told_what_one_must_supply() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=16))
    with pytest.raises(ValueError, match=r"'gpt2', which has no adapter.*`kv_modules` and `keys_values`"):
        StagedCausalLM(model)


def test_the_teacher_stays_in_eval_mode_when_the_module_trains(tiny_llama_dir: Path) -> None:
    module = PDTrimModule(str(tiny_llama_dir))
    module.configure_model()
    module.train()
    assert module.student.training
    assert not module.teacher.training
    assert all(name.startswith("student.") for name in module.state_dict())


def test_the_progress_bar_shows_the_plan(tiny_llama_dir: Path) -> None:
    module = PDTrimModule(str(tiny_llama_dir))
    module.configure_model()
    module.apply_plan(module.plan.drop("decode", 2))
    trainer = Trainer(logger=False, accelerator="cpu", devices=1, enable_checkpointing=False)
    assert PlanProgressBar().get_metrics(trainer, module)["plan"] == "P4 D3"
