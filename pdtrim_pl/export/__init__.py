"""Writes and reads an export: a prefill/decode pair of checkpoints, the plan and the policy."""

from pdtrim_pl.export.checkpoints import stage_config, stage_tensors, write_checkpoint
from pdtrim_pl.export.kv_only import kv_only_tensors, write_kv_only
from pdtrim_pl.export.load import load_plan_and_policy, load_stage
from pdtrim_pl.export.pair import check_target, export_pair
from pdtrim_pl.export.schemas import validate_file
from pdtrim_pl.export.verify import verify_pair

__all__ = [
    "check_target",
    "export_pair",
    "kv_only_tensors",
    "load_plan_and_policy",
    "load_stage",
    "stage_config",
    "stage_tensors",
    "validate_file",
    "verify_pair",
    "write_checkpoint",
    "write_kv_only",
]
