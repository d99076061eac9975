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
from pdtrim_pl.plan.manifest import PAIR_FILE, PAIR_FORMAT, PairManifest, write_manifest
from pdtrim_pl.plan.moves import Move
from pdtrim_pl.plan.planned_stages import FIRST_PLAN_FORMAT, PLAN_FILE, PLAN_FORMAT
from pdtrim_pl.plan.retention import KEEP_ALL, Retention
from pdtrim_pl.plan.stage_plan import StagePlan
from pdtrim_pl.plan.stages import (
    ONLY_TARGET,
    PARTS,
    STAGES,
    WITH_KV_ONLY,
    Action,
    Boundary,
    ExportWidths,
    Layout,
    ModelRef,
    Part,
    Relation,
    Removal,
    Stage,
    Target,
)
from pdtrim_pl.plan.structure import Structure
from pdtrim_pl.plan.width import Width

__all__ = [
    "BYTES_PER_ELEMENT", "FIRST_PLAN_FORMAT", "FIRST_POLICY_FORMAT", "KEEP_ALL", "NO_CODEC", "ONLY_TARGET", "PAIR_FILE",
    "PAIR_FORMAT", "PARTS", "PLAN_FILE", "PLAN_FORMAT", "POLICY_FILE", "POLICY_FORMAT", "STAGES", "WITH_KV_ONLY",
    "Action", "Boundary", "Codec", "ExportWidths", "KVRetentionPolicy", "KVShape", "Layout", "ModelRef", "Move",
    "PairManifest", "Part", "Relation", "Removal", "Retention", "Stage", "StagePlan", "Structure", "Target", "Width",
    "handled_positions", "write_manifest",
]  # fmt: skip
