"""Lightning callbacks over the public functions of pdtrim_pl, named in YAML by class path."""

from callbacks.block_drop import BlockDrop, RepeatedDrop
from callbacks.export_pair import ExportPair
from callbacks.joint_drop import JointDrop, RequestShape
from callbacks.kv_retention import KVRetention
from callbacks.loss_guard import LossGuard
from callbacks.plan_logger import PlanLogger
from callbacks.plan_progress_bar import PlanProgressBar
from callbacks.prediction_writer import PredictionWriter
from callbacks.preemption import Preemption
from callbacks.span_merge import SpanMerge
from callbacks.width_drop import Repair, WidthDrop

__all__ = [
    "BlockDrop",
    "ExportPair",
    "JointDrop",
    "KVRetention",
    "LossGuard",
    "PlanLogger",
    "PlanProgressBar",
    "PredictionWriter",
    "Preemption",
    "Repair",
    "RepeatedDrop",
    "RequestShape",
    "SpanMerge",
    "WidthDrop",
]
