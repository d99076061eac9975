"""The LightningModule: precisions, vocabulary, teacher, what `state_dict` holds."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy
from short_text import SHORT
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks import BlockDrop, PlanProgressBar
from pdtrim_pl.criteria import CosineRedundancy, GreedyKL, Taylor
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.losses import KL, CrossEntropy, HiddenMatch
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import KVRetentionPolicy, KVShape, ModelRef, StagePlan, Structure
from pdtrim_pl.search import Guards
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_masters
from pdtrim_pl.strategies.schedule import Schedule


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_precision_trains_and_validates(
    precision: str, checkpointing: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = PDTrimModule(
        str(tiny_llama_dir), losses=[KL(), HiddenMatch(0.1)], loading=Loading(gradient_checkpointing=checkpointing),
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4),
    )  # fmt: skip
    data = PromptResponseDataModule(
        str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), parts=Parts(validation=4, calibration=4, max_train=16)
    )
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=3, accelerator="cpu", devices=1, precision=precision, logger=False,  # type: ignore[arg-type]
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[BlockDrop("decode", CosineRedundancy(), {0: 1}, Guards(0, 0))],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    first, *_, last = [loss for _, loss in module.record.losses]
    if precision != "bf16-mixed":
        quality = measure_quality(module.student.eval(), module.teacher, data.val_dataloader())
        assert module.record.validations[-1][1]["ppl"] == pytest.approx(quality.perplexity, rel=1e-5)
        assert module.record.validations[-1][1]["kl"] == pytest.approx(quality.kl, rel=1e-5)
    assert last < first, module.record.losses
    assert module.student.model.dtype == torch.float32
    buffers = dict(module.student.named_buffers())
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}, "RoPE frequencies stay exact"


@pytest.mark.parametrize(
    ("precision", "loading", "message"),
    [
        ("bf16-true", Loading(), r"`trainer.precision: bf16-true` keeps .* in 16 bits alone.*`precision: bf16-mixed`"),
        ("16-true", Loading(), r"`trainer.precision: 16-true`.*`precision: 16-mixed`, or PDTrimDeepSpeedStrategy"),
        ("32-true", Loading("bfloat16"), r"weights are bfloat16 \(`loading.dtype`\).*`loading.dtype: float32`"),
        ("bf16-mixed", Loading("float16"), r"weights are float16 \(`loading.dtype`\).*`loading.dtype: float32`"),
        ("bf16-mixed", Loading("auto"), r"weights are bfloat16 \(`loading.dtype`\).*`loading.dtype: float32`"),
    ],
)
def test_training_in_sixteen_bits_alone_is_refused_before_the_first_step(
    precision: str, loading: Loading, message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    data = PromptResponseDataModule(
        str(tmp_path / "model"),
        SHORT,
        lengths=Lengths(24, 8, 16),
        parts=Parts(validation=4, calibration=4, max_train=16),
    )
    settings: Any = {"precision": precision, "logger": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_checkpointing=False, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.fit(PDTrimModule(str(tmp_path / "model"), loading=loading), datamodule=data)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_checkpointing=False, **settings)
    (metrics,) = trainer.validate(PDTrimModule(str(tmp_path / "model"), loading=loading), datamodule=data)
    assert metrics["val/kl"] < 1e-3, "evaluation needs no copies"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_that_keeps_copies_may_train_in_sixteen_bits(stage: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check_masters(PDTrimDeepSpeedStrategy(stage), "bf16-true", dtype)


def test_a_step_at_a_rate_of_1e_5_moves_every_weight(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = PDTrimModule(
        str(tiny_llama_dir), losses=[CrossEntropy()], optimizer=lambda params: torch.optim.Adam(params, lr=1e-5)
    )
    data = PromptResponseDataModule(
        str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), parts=Parts(validation=0, calibration=4, max_train=16)
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_checkpointing=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=1, precision="bf16-mixed",
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    before = dict(module.teacher.gates[1].block.named_parameters())
    for name, weight in module.student.gates[1].block.named_parameters():
        assert (weight != before[name]).float().mean() > 0.99, name


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_embeddings_and_head_stay_and_every_other_weight_trains(
    tied: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    config = AutoConfig.from_pretrained(tiny_llama_dir, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    module = PDTrimModule(
        str(tmp_path / "model"), losses=[CrossEntropy()], loading=Loading(freeze_embeddings=True),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
    )  # fmt: skip
    data = PromptResponseDataModule(
        str(tmp_path / "model"),
        SHORT,
        lengths=Lengths(24, 8, 16),
        parts=Parts(validation=0, calibration=4, max_train=8),
    )
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    before = dict(module.teacher.model.named_parameters())
    same = {name for name, now in module.student.model.named_parameters() if torch.equal(now, before[name])}
    assert same == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})


@pytest.mark.parametrize("strategy", [PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy])
def test_frozen_embeddings_are_refused_where_checkpoints_leave_frozen_weights_out(strategy: type[Strategy]) -> None:
    module = PDTrimModule("any", loading=Loading(freeze_embeddings=True))
    module._trainer = SimpleNamespace(strategy=strategy.__new__(strategy))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"`loading.freeze_embeddings` does not go with a strategy that shards"):
        module.setup("fit")


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


def padded_teacher(tiny_llama_dir: Path, folder: Path, rows: int) -> Path:
    """The same model with more rows of padding behind its embedding, and its tokenizer."""
    shutil.copytree(tiny_llama_dir, folder)
    model = load_causal_lm(str(tiny_llama_dir))
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def test_a_teacher_with_another_padded_vocabulary_is_compared_on_the_tokens_of_the_tokenizer(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = padded_teacher(tiny_llama_dir, tmp_path / "padded", 320)
    found = []
    for teacher in (None, str(folder)):
        data = PromptResponseDataModule(
            str(tiny_llama_dir),
            SHORT,
            lengths=Lengths(24, 8, 16),
            parts=Parts(validation=4, calibration=4, max_train=8),
        )
        trainer = Trainer(
            default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[BlockDrop("decode", GreedyKL(), {0: 1}), BlockDrop("prefill", Taylor(), {0: 1})],
        )  # fmt: skip
        module = PDTrimModule(str(tiny_llama_dir), loading=Loading(teacher=teacher))
        seed_everything(0, verbose=False)
        trainer.fit(module, datamodule=data)
        assert module.student.compared_tokens == (None if teacher is None else 259)
        found.append((module.record.losses, module.record.validations, module.plan.prefill, module.plan.decode))
    assert found[0][2:] == found[1][2:]
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for (step, ours), (other, theirs) in zip(found[0][1], found[1][1], strict=True):
        assert step == other
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_teacher_whose_tokenizer_has_other_ids_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = padded_teacher(tiny_llama_dir, tmp_path / "padded", 320)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = [token for token, index in vocabulary.items() if index in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content), encoding="utf-8")
    module = PDTrimModule(str(tiny_llama_dir), loading=Loading(teacher=str(folder)))
    with pytest.raises(
        ValueError, match=r"vocabulary of 320 tokens and `model` one of 259: the token .* has the id 101"
    ):
        module.configure_model()


def test_a_teacher_whose_tokenizer_has_another_token_in_a_place_is_refused(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = padded_teacher(tiny_llama_dir, tmp_path / "padded", 320)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    (old,) = (token for token, index in vocabulary.items() if index == 200)
    vocabulary["another"] = vocabulary.pop(old)
    path.write_text(json.dumps(content), encoding="utf-8")
    module = PDTrimModule(str(tiny_llama_dir), loading=Loading(teacher=str(folder)))
    with pytest.raises(ValueError, match=r"the id 200 is the token 'another' in the teacher"):
        module.configure_model()


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "other")
    data = PromptResponseDataModule(str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), parts=Parts(4, 4))
    trainer = Trainer(logger=False, accelerator="cpu", devices=1, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(ValueError, match=r"vocabulary"):
        trainer.fit(PDTrimModule(str(tmp_path / "other")), datamodule=data)


def test_a_plan_of_another_kind_of_model_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    StagePlan.full(ModelRef("other", "qwen2", 4)).save(tmp_path / "plan.json")
    module = PDTrimModule(str(tiny_llama_dir), structure=Structure(plan=tmp_path / "plan.json"))
    with pytest.raises(ValueError, match=r"for a model of type 'qwen2'"):
        module.configure_model()


def test_a_plan_file_may_name_its_model_by_another_path(tiny_llama_dir: Path, tmp_path: Path) -> None:
    StagePlan.full(ModelRef("somewhere/else", "llama", 4)).drop("decode", 2).save(tmp_path / "plan.json")
    module = PDTrimModule(str(tiny_llama_dir), structure=Structure(plan=tmp_path / "plan.json"))
    module.configure_model()
    assert module.plan.model.name_or_path == str(tiny_llama_dir)


def test_a_plan_change_takes_its_untied_weights_out_of_use() -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 13)[None]
    expected = model(ids).logits
    staged = StagedCausalLM(model)
    full = staged.plan
    staged.apply_plan(StagePlan(full.model, full.prefill, full.decode, untied={"decode": (2,)}))
    with torch.no_grad():
        for parameter in staged.gates[2].untied["decode"].parameters():
            parameter.mul_(3)
    assert not torch.allclose(staged.logits(staged(ids[:, :5], ids[:, 5:]).hidden), expected[:, 4:9], atol=1e-3)
    staged.apply_plan(full)
    torch.testing.assert_close(staged.logits(staged(ids[:, :5], ids[:, 5:]).hidden), expected[:, 4:9])


def test_rows_that_fill_the_context_from_both_sides_are_no_fault() -> None:
    staged = StagedCausalLM(tiny_model("llama", max_position_embeddings=16))
    prompt_mask = torch.tensor([[True] * 12, [False] * 8 + [True] * 4])
    response_mask = torch.tensor([[True] * 4 + [False] * 8, [True] * 12])
    ids = torch.full((2, 12), 5)
    assert staged(ids, ids, prompt_mask, response_mask).hidden.shape[1] == 12
    with pytest.raises(ValueError, match=r"take 24 tokens, and the context of `model` is 16"):
        staged(ids, ids)


def test_a_policy_of_another_kv_shape_is_refused() -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"`kv` of the policy is 64 heads of 64, and `model` has 2 of 8"):
        staged.apply_policy(KVRetentionPolicy("prefill", KVShape(64, 64)))


def test_a_longrope_model_serves_its_original_context_only() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    assert usable_context({"max_position_embeddings": 131072, "rope_parameters": rope}) == 4096
    assert usable_context({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default"}}) == 131072
    with pytest.raises(ValueError, match=r"`max_position_embeddings` None"):
        usable_context({})


def test_attention_without_masks_of_the_contracts_kind_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"`attn_implementation` is 'paged\|sdpa'"):
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


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(warmup=0.5, decay="linear"), [1 / 3, 2 / 3, 1.0, 0.5]),
        (Schedule(warmup=0.0), [1.0, 0.85355339, 0.5, 0.14644661]),
        (Schedule(warmup=0.25, decay="none"), [0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_follows_the_schedule_over_the_steps_of_the_trainer(
    schedule: Schedule, expected: list[float], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Two epochs of four batches, two of which make a step: four steps."""
    module = PDTrimModule(str(tiny_llama_dir), optimizer=partial(torch.optim.SGD, lr=1.0), schedule=schedule)
    data = PromptResponseDataModule(
        str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), Parts(validation=0, calibration=4, max_train=8), batch_size=2
    )
    rates = Rates()
    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, max_epochs=2, accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[rates],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert rates.seen == pytest.approx(expected)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_clips_in_bf16_as_another_one(algorithm: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """As in the shipped configurations for SmolLM2."""
    weights: list[torch.Tensor] = []
    for fused, clip in ((True, 1e-3), (False, 1e-3), (False, None)):
        seed_everything(0, verbose=False)
        module = PDTrimModule(str(tiny_llama_dir), optimizer=partial(torch.optim.SGD, lr=10.0, fused=fused))
        data = PromptResponseDataModule(
            str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), Parts(validation=0, calibration=4, max_train=4),
            batch_size=4,
        )  # fmt: skip
        module.structure = Structure(plan=_without_a_block(tiny_llama_dir, tmp_path))
        Trainer(
            accelerator="cpu", devices=1, default_root_dir=tmp_path, max_epochs=1, precision="bf16-mixed", logger=False,
            gradient_clip_val=clip, gradient_clip_algorithm=algorithm, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, datamodule=data)  # fmt: skip
        weights.append(module.student.model.get_input_embeddings().weight.detach())
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-4)


def _without_a_block(model: Path, folder: Path) -> Path:
    """A plan under which student and teacher differ."""
    path = folder / "plan.json"
    StagePlan.full(ModelRef(str(model), "llama", 4)).drop("both", 2).save(path)
    return path


class Rates(Callback):
    """Notes the learning rate of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_schedule_of_a_run_without_end_or_beside_another_scheduler_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match="`schedule` needs the length of the run, and this one has no end: give"):
        Schedule().over(math.inf, optimizer)
    with pytest.raises(UserError, match="`schedule` and `lr_scheduler` both set the learning rate"):
        PDTrimModule("a", schedule=Schedule(), lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=1.0))
    with pytest.raises(UserError, match=r"`schedule.warmup` is 1.0: give a share"):
        Schedule(warmup=1.0)
    with pytest.raises(UserError, match=r"`schedule.decay` is 'step', not one of cosine, linear, none"):
        Schedule(decay="step")  # type: ignore[arg-type]


def test_no_gradient_is_kept_through_the_next_forward_pass(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """With accumulation, only those that the step still needs."""
    held: list[bool] = []

    class Watch(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            held.append(any(parameter.grad is not None for parameter in pl_module.parameters()))

    data = PromptResponseDataModule(
        str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), Parts(validation=0, calibration=4, max_train=8), batch_size=2
    )
    Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, max_epochs=1, accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Watch()],
    ).fit(PDTrimModule(str(tiny_llama_dir)), datamodule=data)  # fmt: skip
    assert held == [False, True, False, True]
