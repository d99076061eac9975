"""Plans and policies: what each stage runs, and what crosses between them. Imports no torch."""

from pdtrim_pl.plan.codec import NO_CODEC, Codec
from pdtrim_pl.plan.kv_policy import (
    BYTES_PER_ELEMENT,
    FIRST_POLICY_FORMAT,
    POLICY_FILE,
    POLICY_FORMAT,
    KVRetentionPolicy,
    KVShape,
    handled_positions,
)
from pdtrim_pl.plan.moves import Move
from pdtrim_pl.plan.retention import KEEP_ALL, Retention
from pdtrim_pl.plan.stage_plan import PLAN_FILE, PLAN_FORMAT, StagePlan
from pdtrim_pl.plan.stages import ONLY_TARGET, STAGES, Action, Boundary, ModelRef, Relation, Removal, Stage, Target
from pdtrim_pl.plan.structure import Structure

__all__ = [
    "BYTES_PER_ELEMENT", "FIRST_POLICY_FORMAT", "KEEP_ALL", "NO_CODEC", "ONLY_TARGET", "PLAN_FILE", "PLAN_FORMAT",
    "POLICY_FILE", "POLICY_FORMAT", "STAGES", "Action", "Boundary", "Codec", "KVRetentionPolicy", "KVShape",
    "ModelRef", "Move", "Relation", "Removal", "Retention", "Stage", "StagePlan", "Structure", "Target",
    "handled_positions",
]  # fmt: skip
