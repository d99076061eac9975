"""Exports whose blocks have widths of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from own_family import PerBlock, PerBlockConfig, PerBlockForCausalLM
from test_callbacks import data_for, module_for, trainer_for
from test_cost import counted
from test_export import student_of
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from callbacks import ExportPair
from pdtrim_pl.errors import UserError
from pdtrim_pl.export import load_stage
from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.export.schemas import validate
from pdtrim_pl.plan import PLAN_FORMAT, STAGES, Boundary, Relation, Stage, StagePlan, Width
from pdtrim_pl.sizing.cost import CostModel
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to

BLOCKS, CHANNELS = 4, 48
EVEN = Width(tuple(range(0, CHANNELS, 2)))


def narrow_student(relation: Relation = "nested", boundary: Boundary = "prefill") -> StagedCausalLM:
    torch.manual_seed(0)
    config = PerBlockConfig(
        vocab_size=64, hidden_size=32, intermediate_size=CHANNELS, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    model = PerBlockForCausalLM(config)
    reference = replace(reference_to(model, "tiny"), architecture="own_family.PerBlock")
    plan = StagePlan.full(reference, relation, boundary)
    for block in range(BLOCKS):
        plan = plan.narrow("prefill", block, Width(heads=(0, 3)))
    own: dict[Stage, dict[int, Width]] = {"prefill": {1: EVEN, 2: Width(tuple(range(30)))}}
    if relation != "prefill_only":
        own["decode"] = {0: Width(tuple(range(10))), 1: Width(tuple(range(0, CHANNELS, 4)))}
    for stage, widths in own.items():
        for block, width in widths.items():
            plan = plan.narrow(stage, block, width)
    return StagedCausalLM(model, plan, architecture=PerBlock()).eval()


@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@pytest.mark.parametrize("relation", ["nested", "free"])
def test_each_block_has_its_own_width_and_the_pair_computes_what_the_student_does(
    relation: Relation, boundary: Boundary, tmp_path: Path
) -> None:
    student = narrow_student(relation, boundary)
    export = export_pair(
        student, tmp_path / "export", tokenizer=None, widths="per_block"
    )  # compares tensors and logits
    validate(json.loads((export / "stage_plan.json").read_text()), PLAN_FORMAT)
    plan = StagePlan.load(export / "stage_plan.json")
    assert plan == replace(student.plan, export_widths="per_block")
    for stage in STAGES:
        model = AutoModelForCausalLM.from_pretrained(export / stage)
        found = [(b.mlp.down_proj.in_features, b.self_attn.o_proj.in_features // 8) for b in model.model.layers]
        kept = [
            tuple(len(plan.kept_units(stage, block, part)) for part in ("channels", "heads")) for block in range(BLOCKS)
        ]
        assert found == kept
        assert len(set(kept)) > 2


def test_costs_are_those_of_blocks_of_these_widths(tmp_path: Path) -> None:
    student = narrow_student()
    export = export_pair(student, tmp_path / "export", tokenizer=None, widths="per_block")
    plan, cost = replace(student.plan, export_widths="per_block"), CostModel.of(student, 9, 4)
    worker = load_stage(export, "prefill")
    assert cost.prefill_flops(plan) == counted(worker, worker.plan, 9) < cost.prefill_flops(student.plan)
    sizes = {
        name: sum(p.numel() for g in load_stage(path, "decode").gates.values() for p in g.block.parameters())
        for name, path in (("own", export), ("alike", export_pair(student, tmp_path / "alike", tokenizer=None)))
    }
    assert cost.decode_bytes(student.plan) - cost.decode_bytes(plan) == 4 * (sizes["alike"] - sizes["own"]) > 0


def test_blocks_that_prefill_only_projects_stand_among_those_of_their_own_width(tmp_path: Path) -> None:
    student = narrow_student("prefill_only", "decode")
    student.apply_plan(student.plan.drop("prefill", 0))
    export = export_pair(student, tmp_path / "export", tokenizer=None, widths="per_block")
    assert json.loads((export / "prefill" / "config.json").read_text())["per_layer_config"].keys() == {"0", "1"}


def test_blocks_that_are_there_for_padding_are_as_wide_as_the_widest(tmp_path: Path) -> None:
    student = narrow_student()
    student.apply_plan(student.plan.drop("decode", 1))
    export = export_pair(student, tmp_path / "export", tokenizer=None, widths="per_block", layout="padded")
    decode = AutoModelForCausalLM.from_pretrained(export / "decode").model.layers
    assert [block.mlp.down_proj.in_features for block in decode] == [10, 48, 30, 48]


def test_blocks_that_are_alike_need_no_settings_of_their_own_in_any_family(tmp_path: Path) -> None:
    student = student_of("llama")
    plan = student.plan
    for block in range(BLOCKS):
        plan = plan.narrow("both", block, Width(tuple(range(block, block + 20))))
    student.apply_plan(plan)
    export = export_pair(student, tmp_path / "export", tokenizer=None, widths="per_block")
    written = json.loads((export / "prefill" / "config.json").read_text())
    assert written["intermediate_size"] == 20
    assert "per_layer_config" not in written


def test_classes_that_build_all_blocks_alike_are_refused_with_the_way_out(tmp_path: Path) -> None:
    student = student_of("llama")
    student.apply_plan(student.plan.narrow("both", 1, Width(tuple(range(20)))))
    with pytest.raises(UserError, match=r"LlamaForCausalLM of transformers .* builds all blocks alike\. Use `wid"):
        export_pair(student, tmp_path / "export", tokenizer=None, widths="per_block")
    assert not any(tmp_path.iterdir())


def test_a_class_that_builds_other_widths_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    student = narrow_student()
    build = PerBlockForCausalLM.__init__

    def all_alike(self: PerBlockForCausalLM, config: PerBlockConfig) -> None:
        build(self, PerBlockConfig.from_dict({**config.to_dict(), "per_layer_config": None}))

    monkeypatch.setattr(PerBlockForCausalLM, "__init__", all_alike)
    with pytest.raises(UserError, match="gives block 1 48 channels instead of 24"):
        export_pair(student, tmp_path / "export", tokenizer=None, widths="per_block")


def test_heads_that_differ_between_blocks_are_refused_where_the_settings_cannot_say_it(tmp_path: Path) -> None:
    student = narrow_student("free")
    student.apply_plan(student.plan.narrow("decode", 2, Width(heads=(1, 2))))
    with pytest.raises(UserError, match=r"PerBlockForCausalLM of transformers .* builds all blocks alike"):
        export_pair(student, tmp_path / "export", tokenizer=None, widths="per_block")


def test_a_run_that_could_not_export_at_its_end_fails_before_its_first_step(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    export = ExportPair(tmp_path / "export", widths="per_block", measure=False)
    trainer = trainer_for(tmp_path, [export])
    with pytest.raises(UserError, match=r"`widths: per_block` cannot be exported: LlamaForCausalLM"):
        trainer.fit(module_for(tiny_llama_dir), datamodule=data_for(tiny_llama_dir))
    assert trainer.global_step == 0


def test_an_unknown_choice_of_widths_is_refused() -> None:
    plan = StagePlan.full(reference_to(tiny_model("llama")))
    with pytest.raises(UserError, match="`export_widths` is 'own', not one of uniform, per_block"):
        replace(plan, export_widths="own")  # type: ignore[arg-type]


def test_a_file_of_other_widths_than_its_plan_is_refused(tmp_path: Path) -> None:
    export = export_pair(narrow_student(), tmp_path / "export", tokenizer=None, widths="per_block")
    path = export / "decode" / "config.json"
    config = json.loads(path.read_text())
    config["per_layer_config"]["0"]["intermediate_size"] = 11
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"`intermediate_size` of block 0 is 11, and .* 10 channels"):
        load_stage(export, "decode")
