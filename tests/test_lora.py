"""What trains: adapters beside frozen blocks, or a part of the weights; an export is the student with its adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from short_text import SHORT
from test_losses import batch
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from callbacks import BlockDrop, ExportPair, SpanMerge, WidthDrop
from pdtrim_pl.checkpoints.continuation import Continuation
from pdtrim_pl.criteria import GreedyKL
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.export.from_checkpoint import export_checkpoint
from pdtrim_pl.export.load import load_plan_and_policy, load_stage
from pdtrim_pl.export.merged import without_adapters
from pdtrim_pl.losses import KL, CrossEntropy
from pdtrim_pl.merging import Merging
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Retention, Stage, Width
from pdtrim_pl.search import Guards
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.lora import BlockAdapters, LoRA, adapters_of, merged
from pdtrim_pl.staged.lora import without_adapters as bare
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_trainable

SETTINGS = (LoRA(4, 8.0), LoRA(4, 8.0, tied=False))
APART = pytest.mark.parametrize("settings", SETTINGS, ids=["tied", "one a stage"])


def adapted_model(settings: LoRA, family: str = "llama") -> StagedCausalLM:
    """A student under a plan with KV-only blocks and a policy; its adapters add something."""
    student = StagedCausalLM(tiny_model(family))
    student.train_only(settings)
    for seed, parameter in enumerate(adapter_parameters(student).values()):
        draw = torch.Generator().manual_seed(seed)
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    student.apply_plan(student.plan.drop("decode", 2).drop("prefill", 2).drop("prefill", 1))
    rule = Retention("first_last", 1, 3)
    student.apply_policy(KVRetentionPolicy("prefill", student.kv_shape, {0: rule}))
    student.freeze_unused()
    return student.eval()


def adapter_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in student.named_parameters() if ".adapters." in name}


def product(adapter: nn.Module) -> Tensor:
    """What a trained adapter of rank 4 adds to its layer's weight before it is scaled, [O, I]."""
    down, up = adapter.parameters()
    assert down.shape[0] == up.shape[1] == 4
    return up @ down


def outputs(student: StagedCausalLM) -> Tensor:
    with torch.no_grad():
        hidden = student(*batch().request).hidden[batch().response_mask]
        return student.logits(hidden)


@APART
def test_new_adapters_change_nothing_and_trained_ones_do(settings: LoRA) -> None:
    plain, fresh = StagedCausalLM(tiny_model("llama")), StagedCausalLM(tiny_model("llama"))
    fresh.train_only(settings)
    assert torch.equal(outputs(plain), outputs(fresh))
    student = adapted_model(settings)
    plain.apply_plan(student.plan)
    plain.apply_policy(student.policy)
    assert (outputs(student) - outputs(plain)).abs().max() > 0.1
    with bare():
        assert torch.equal(outputs(student), outputs(plain))


@APART
@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_with_merged_adapters_computes_what_the_student_computes(family: str, settings: LoRA) -> None:
    student = adapted_model(settings, family)
    whole = without_adapters(student)
    assert not adapter_parameters(whole)
    assert whole.plan.untied["decode"] == (() if settings.tied else student.plan.decode)
    torch.testing.assert_close(outputs(whole), outputs(student), atol=2e-4, rtol=2e-4)


@APART
def test_the_copy_of_a_narrow_student_with_weights_of_its_own_in_a_stage_computes_the_same(settings: LoRA) -> None:
    student = adapted_model(settings)
    plan = student.plan.narrow("decode", 0, Width(channels=(0, 3, 5, 40)))
    student.apply_plan(replace(plan, untied={"decode": (3,)}))
    for parameter in student.gates[3].untied["decode"].parameters():
        parameter.data += 0.1
    torch.testing.assert_close(outputs(without_adapters(student)), outputs(student), atol=2e-4, rtol=2e-4)


@APART
def test_every_weight_of_the_copy_is_the_weight_plus_the_product_of_its_adapter(settings: LoRA) -> None:
    student = adapted_model(settings)
    whole = without_adapters(student)
    for stage in STAGES:
        for index in student.plan.blocks(stage):
            theirs = whole.gates[index].weights(stage, whole.plan).state_dict()
            adapters = adapters_of(student.gates[index].adapters, stage)
            assert len(adapters) == 7, "attention and MLP"
            for name, weight in student.gates[index].block.state_dict().items():
                adapter = adapters.get(name.removesuffix(".weight"))
                wanted = weight if adapter is None else weight + 2.0 * product(adapter)
                torch.testing.assert_close(theirs[name], wanted)


@APART
@pytest.mark.parametrize("recompute", [False, True])
def test_only_adapters_of_blocks_that_run_get_gradients(settings: LoRA, recompute: bool) -> None:
    """Also where backward runs a block again."""
    student = adapted_model(settings).train()
    student.gradient_checkpointing = recompute
    module = PDTrimModule("tiny", losses=[CrossEntropy()], trainable=settings)
    module.student, module.teacher = student, StagedCausalLM(tiny_model("llama"))
    distilled = module.distilled(batch())
    CrossEntropy().per_token(student.logits(distilled.student), distilled.teacher, distilled.targets).mean().backward()
    got = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    def expected(index: int, stage: Stage) -> set[str]:
        """Projections alone where prefill only projects."""
        projects = stage == "prefill" and index in student.plan.kv_only
        if index not in student.plan.blocks(stage) and not projects:
            return set()
        names = adapters_of(student.gates[index].adapters, stage)
        kept = [n for n in names if not projects or n.endswith(("k_proj", "v_proj"))]
        owner = "both" if settings.tied else stage
        return {f"{owner}.layers.{n.replace('.', ':')}.lora_{part}.adapter.weight" for n in kept for part in "AB"}

    wanted = {
        f"model.model.layers.{index}.adapters.{name}"
        for index in range(4)
        for stage in STAGES
        for name in expected(index, stage)
    }
    assert got == wanted
    assert {name for name, p in student.named_parameters() if p.requires_grad} == wanted


def test_recomputed_blocks_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        student = adapted_model(SETTINGS[1]).train()
        student.gradient_checkpointing = recompute
        student(*batch().request).hidden.square().sum().backward()
        found.append({name: p.grad for name, p in adapter_parameters(student).items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-4, rtol=1e-4)


def test_adapters_are_in_fp32_beside_weights_of_any_type() -> None:
    student = StagedCausalLM(tiny_model("llama").to(torch.bfloat16))
    student.train_only(LoRA(2))
    assert {p.dtype for p in adapter_parameters(student).values()} == {torch.float32}
    assert outputs(student).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stabilized", [False, True])
def test_an_adapter_of_peft_adds_its_scaled_product_to_the_output_that_is_given(
    stabilized: bool, dtype: torch.dtype
) -> None:
    """What we rely on: peft passes on the output, adds to it, and merges the same."""
    block = nn.ModuleDict({"proj": nn.Linear(6, 5)}).to(dtype)
    (adapter,) = BlockAdapters(block, LoRA(4, 8.0, rank_stabilized=stabilized)).by_name().values()
    down, up = adapter.parameters()
    up.data = torch.randn(5, 4)
    inputs, out = torch.randn(2, 3, 6, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype)
    scale = 4.0 if stabilized else 2.0
    wanted = out.float() + scale * inputs.float() @ down.t() @ up.t()
    torch.testing.assert_close(adapter(inputs, out), wanted.to(dtype))
    weight = block["proj"].weight
    torch.testing.assert_close(merged(adapter, weight), (weight.float() + scale * up @ down).to(dtype))


def test_adapters_stand_beside_the_layers_that_are_named() -> None:
    student = StagedCausalLM(tiny_model("llama"))
    student.train_only(LoRA(4, targets=("q_proj", "mlp.up_proj")))
    names = {tuple(adapters_of(gate.adapters, "decode")) for gate in student.gates.values()}
    assert names == {("self_attn.q_proj", "mlp.up_proj")}
    assert len(adapter_parameters(student)) == 4 * 2 * 2
    with pytest.raises(ValueError, match=r"`targets: \['proj', 'mlp'\]`, and no linear layer .* self_attn.q_proj, "):
        student.train_only(LoRA(targets=("proj", "q_proj", "mlp")))


def test_dropout_hides_inputs_from_adapters_in_training_alone() -> None:
    student, plain = adapted_model(LoRA(4, 8.0, dropout=0.5)), adapted_model(LoRA(4, 8.0))
    assert torch.equal(outputs(student), outputs(plain))
    assert (outputs(student.train()) - outputs(plain.train())).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "give a rank of at least 1 and a positive alpha"),
        ({"alpha": 0.0}, "give a rank of at least 1 and a positive alpha"),
        ({"dropout": 1.0}, "`dropout: 1.0`: give a share of at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


# Whole runs


def data_of(model: Path) -> PromptResponseDataModule:
    parts = Parts(validation=4, calibration=4, max_train=16)
    return PromptResponseDataModule(str(model), SHORT, Lengths(24, 8, 16), parts=parts, batch_size=4)


def module_of(model: Path, trainable: Any, **settings: Any) -> PDTrimModule:
    return PDTrimModule(
        str(model), losses=[KL(), CrossEntropy()], trainable=trainable,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3), **settings,
    )  # fmt: skip


def fit(
    module: PDTrimModule, model: Path, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None,
    epochs: int = 2, **settings: Any
) -> Trainer:  # fmt: skip
    seed_everything(0, verbose=False)
    saver = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    trainer = Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
        callbacks=[*callbacks, saver], enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(model), ckpt_path=ckpt_path)
    return trainer


def drops() -> BlockDrop:
    return BlockDrop("decode", GreedyKL(), {0: 1}, Guards(0, 0))


@APART
def test_a_run_trains_adapters_alone_and_exports_what_it_trained(
    settings: LoRA, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = module_of(tiny_llama_dir, settings)
    export = ExportPair(tmp_path / "pair", dtype="float32", prompt_tokens=16, new_tokens=4)
    fit(module, tiny_llama_dir, tmp_path, drops(), export)
    stored = load_file(tiny_llama_dir / "model.safetensors")
    for name, parameter in module.student.named_parameters():
        if ".adapters." not in name:
            assert torch.equal(parameter, stored[name.removeprefix("model.").replace(".block.", ".")]), name
    losses = [loss for _, loss in module.record.losses]
    assert losses[-1] < losses[0]
    plan, _ = load_plan_and_policy(tmp_path / "pair")
    pair = load_stage(tmp_path / "pair", "decode")
    assert plan.untied["decode"] == (() if settings.tied else plan.decode)
    gates = module.student.gates
    for index in plan.decode:
        adapters = adapters_of(gates[index].adapters, "decode")
        for name, adapter in adapters.items():
            found = pair.gates[index].block.get_submodule(name).weight
            torch.testing.assert_close(found, merged(adapter, gates[index].block.get_submodule(name).weight))
    again = tmp_path / "again"
    export_checkpoint(tmp_path / "checkpoints" / "epoch=1.ckpt", again, dtype="float32")
    for stage in STAGES:
        one, other = (load_file(folder / stage / "model.safetensors") for folder in (tmp_path / "pair", again))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@APART
def test_a_resumed_run_ends_as_one_that_was_not_stopped(settings: LoRA, tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole, first, second = (module_of(tiny_llama_dir, settings) for _ in range(3))
    fit(whole, tiny_llama_dir, tmp_path / "whole", drops())
    fit(first, tiny_llama_dir, tmp_path / "parts", drops(), epochs=1)
    last = tmp_path / "parts" / "checkpoints" / "epoch=0.ckpt"
    Continuation(str(tiny_llama_dir), 1).check(last)
    fit(second, tiny_llama_dir, tmp_path / "rest", drops(), ckpt_path=last)
    assert whole.plan == second.plan
    for name, parameter in adapter_parameters(whole.student).items():
        assert torch.equal(parameter, second.student.get_parameter(name)), name
    with pytest.raises(ValueError, match=r"trained with LoRA\(rank=4.*and `trainable` gives none"):
        fit(module_of(tiny_llama_dir, "all"), tiny_llama_dir, tmp_path / "other", drops(), ckpt_path=last)
    with pytest.raises(ValueError, match=r"trained with LoRA\(rank=4.*gives LoRA\(rank=2"):
        fit(module_of(tiny_llama_dir, LoRA(2)), tiny_llama_dir, tmp_path / "other", drops(), ckpt_path=last)


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_block_that_has_left_both_stages_leaves_the_optimizer_too(
    trainable: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    both = [BlockDrop("both", GreedyKL(), {1: 1}, Guards(0, 0)) for _ in range(2)]
    whole, second = (module_of(tiny_llama_dir, trainable) for _ in range(2))
    trainer = fit(whole, tiny_llama_dir, tmp_path / "whole", both[0], epochs=3)
    (left,) = set(range(4)) - set(whole.plan.prefill)
    held = set(trainer.optimizers[0].state)
    assert not held & set(whole.student.gates[left].parameters())
    assert {p for p in whole.student.parameters() if p.requires_grad} <= held
    last = tmp_path / "whole" / "checkpoints" / "epoch=1.ckpt"
    fit(second, tiny_llama_dir, tmp_path / "rest", both[1], ckpt_path=last, epochs=3)
    for name, parameter in whole.student.named_parameters():
        assert torch.equal(parameter, second.student.get_parameter(name)), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_frozen_base_may_be_in_16_bits(precision: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = module_of(tiny_llama_dir, "lora", loading=Loading("bfloat16"))
    fit(module, tiny_llama_dir, tmp_path, precision=precision, epochs=1)
    assert module.student.lora == LoRA()
    assert module.student.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_parameters(module.student).values()} == {torch.float32}
    assert all(p.abs().max() > 0 for name, p in adapter_parameters(module.student).items() if ".lora_B." in name)


def test_only_the_norms_train(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = module_of(tiny_llama_dir, "norms")
    fit(module, tiny_llama_dir, tmp_path, epochs=1)
    before = dict(module.teacher.model.named_parameters())
    changed = {n for n, now in module.student.model.named_parameters() if not torch.equal(now, before[n])}
    assert changed == {n for n in before if "norm" in n}
    assert len(changed) == 9


def test_only_blocks_that_stand_for_several_train(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = module_of(tiny_llama_dir, "merged")
    fit(
        module,
        tiny_llama_dir,
        tmp_path,
        SpanMerge(1, merging=Merging(min_cosine=-1.0, steps=8), guards=Guards(0, 0), trailing_blocks=0),
        epochs=1,
    )
    trained = {name for name, p in module.student.named_parameters() if p.requires_grad}
    (kept,) = module.plan.merged["prefill"]
    assert trained
    assert all(f".layers.{kept}." in name for name in trained)


def test_a_run_in_which_nothing_trains_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leaves nothing that trains: no block of the plan stands for several"):
        fit(module_of(tiny_llama_dir, "merged"), tiny_llama_dir, tmp_path)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: SpanMerge(1), r"SpanMerge would write fitted weights.*`trainable: all`"),
        (lambda: WidthDrop("both", {0: 4}), r"WidthDrop would write fitted weights"),
    ],
)
def test_what_writes_weights_is_refused_beside_adapters(
    callback: Any, message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module_of(tiny_llama_dir, "lora"), tiny_llama_dir, tmp_path, callback())


@pytest.mark.parametrize("trainable", ["lora", "norms", "merged", LoRA(2)])
@pytest.mark.parametrize("strategy", [PDTrimDeepSpeedStrategy(2), PDTrimFSDPStrategy()], ids=["zero", "fsdp"])
def test_strategies_that_shard_are_refused_with_the_way_out(trainable: Any, strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"`trainable` freezes weights.*`strategy: ddp_find_unused_parameters_true`"):
        check_trainable(strategy, trainable)
    check_trainable(strategy, "all")


def test_what_grows_during_a_run_is_refused_under_ddp_and_what_shrinks_is_not() -> None:
    with pytest.raises(ValueError, match=r"`trainable: merged` lets weights train that were frozen.*one device"):
        check_trainable("ddp_find_unused_parameters_true", "merged")
    check_trainable("ddp_find_unused_parameters_true", "lora")
