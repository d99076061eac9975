"""Loads one stage of an export: that stage's weights, the plan and the policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pdtrim_pl.errors import UserError
from pdtrim_pl.export.files import KV_ONLY_FILE, blaming
from pdtrim_pl.export.kv_only import insert_kv_only
from pdtrim_pl.export.own_widths import block_settings
from pdtrim_pl.export.schemas import validate_file
from pdtrim_pl.models.adapters import adapter_at
from pdtrim_pl.models.architectures import Architecture, architecture_of
from pdtrim_pl.models.model_files import check_description
from pdtrim_pl.models.pretrained import attention_for
from pdtrim_pl.plan import (
    FIRST_PLAN_FORMAT,
    FIRST_POLICY_FORMAT,
    PLAN_FILE,
    PLAN_FORMAT,
    POLICY_FILE,
    POLICY_FORMAT,
    STAGES,
    KVRetentionPolicy,
    PairManifest,
    Stage,
    StagePlan,
)
from pdtrim_pl.staged import StagedCausalLM


def load_plan_and_policy(export: Path) -> tuple[StagePlan, KVRetentionPolicy]:
    """The stage plan and the KV retention policy of an export.

    Raises:
        UserError: a file is missing, has another format, or contradicts the other one; the message names it.
    """
    plan_file, policy_file = export / PLAN_FILE, export / POLICY_FILE
    validate_file(plan_file, PLAN_FORMAT, FIRST_PLAN_FORMAT)
    written = validate_file(policy_file, POLICY_FORMAT, FIRST_POLICY_FORMAT)
    with blaming(plan_file):
        plan = StagePlan.load(plan_file)
    with blaming(policy_file):
        policy = KVRetentionPolicy.load(policy_file, plan)
        keys = ("original", "prefill", "decode")
        expected = [[entry[key] for key in keys] for entry in policy.to_json(plan)["blocks"]]
        if [[entry[key] for key in keys] for entry in written["blocks"]] != expected:
            raise UserError(f"its `blocks` are not the blocks of {PLAN_FILE} at their positions. Export again.")
    return plan, policy


def load_stage(
    export: Path, stage: Stage, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    attn_implementation: Literal["sdpa", "eager"] | None = None, architecture: Architecture | None = None,
    verify: bool = False,
) -> StagedCausalLM:  # fmt: skip
    """Load one stage of an export; reads the weights of that stage alone.

    Args:
        export: the directory that `export_pair` wrote.
        stage: `prefill` or `decode`.
        device: where the weights go.
        dtype: element type of the weights; None keeps the checkpoint's.
        attn_implementation: None means `sdpa`, or `eager` if the model needs it.
        architecture: adapter of the model's family; by default the one that the plan names, else the package's own.
        verify: compare the hashes of the weights with `pair.json` too; sizes and all other hashes always are.

    Returns:
        A staged model of this stage's blocks under their original indices, with plan and policy applied. Its plan names
        no untied weights and no widths: the checkpoint holds what its stage keeps, and nothing else.

    Raises:
        UserError: a file is missing, damaged, not that of `pair.json`, or contradicts the plan; the message names it.
    """
    if stage not in STAGES:
        raise UserError(f"Unknown `stage` {stage!r}: choose one of {', '.join(STAGES)}.")
    plan, policy = load_plan_and_policy(export)
    if architecture is None and plan.model.architecture is not None:
        with blaming(export / PLAN_FILE):
            architecture = adapter_at(plan.model.architecture)  # importing it may make its family known to transformers
    directory = export / stage
    with blaming(directory / "config.json"):
        description, _ = PreTrainedConfig.get_config_dict(directory, local_files_only=True)
        check_description(str(directory), description, architecture)
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        architecture = architecture or architecture_of(config)
        _check_config(config, plan, stage, architecture)
    PairManifest.load(export).check(export, (stage,), verify=verify)
    if attn_implementation is None:
        attn_implementation = attention_for(str(directory), config, architecture)
    model = _load_model(directory, dtype, attn_implementation)
    originals = plan.held(stage)
    if stage == "prefill" and set(plan.kv_only) - set(originals):
        originals = tuple(sorted({*plan.prefill, *plan.kv_only}))
        insert_kv_only(model, plan, directory / KV_ONLY_FILE, architecture)
    own_plan = replace(plan, untied={}, widths={})
    return StagedCausalLM(model, own_plan, policy, originals=originals, architecture=architecture).to(device)


def _check_config(config: PreTrainedConfig, plan: StagePlan, stage: Stage, architecture: Architecture) -> None:
    if config.model_type != plan.model.model_type:
        raise UserError(f"it is of type {config.model_type!r}, and {PLAN_FILE} is for {plan.model.model_type!r}.")
    expected = len(plan.held(stage))
    if config.num_hidden_layers != expected:
        raise UserError(
            f"it has {config.num_hidden_layers} blocks, and {PLAN_FILE} gives the `{stage}` stage {expected}. "
            "The files are not of one export: export again."
        )
    widths = plan.exported_widths(stage)
    for position, (block, settings) in enumerate(zip(plan.held(stage), block_settings(config), strict=True)):
        for part, wide in widths[block].items():
            setting = architecture.cuts[part].setting
            if (found := settings.get(setting)) != wide:
                raise UserError(
                    f"its `{setting}` of block {position} is {found}, and {PLAN_FILE} gives this block of the "
                    f"`{stage}` stage {wide} {part}. The files are not of one export: export again."
                )


def _load_model(directory: Path, dtype: torch.dtype | None, attention: str) -> PreTrainedModel:
    for file in sorted(directory.glob("*.safetensors")):
        with blaming(file), safe_open(file, framework="pt"):  # opening compares the size with the header
            pass
    with blaming(directory):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype or "auto",
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        # transformers only warns of these, and fills what is missing with random numbers.
        wrong = {what: sorted(map(str, info[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            raise UserError(f"its tensors are not the model's: {wrong}.")
    assert isinstance(model, PreTrainedModel)
    return model
