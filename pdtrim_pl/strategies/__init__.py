"""Strategies of the trainer, and how their processes communicate. YAML names two of them:

`strategy: {class_path: pdtrim_pl.strategies.PDTrimDeepSpeedStrategy, init_args: {stage: 2}}`, or
`strategy: {class_path: pdtrim_pl.strategies.PDTrimFSDPStrategy}`.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.strategies import Strategy

from pdtrim_pl.parallel import Parallel
from pdtrim_pl.strategies.checks import (
    Sharding,
    check_compiling,
    check_drops,
    check_freezing,
    check_kv_refits,
    check_masters,
    check_merges,
    check_new_widths,
    check_refits,
    check_skipping,
    check_strategy,
    check_teacher_bits,
    check_trainable,
    directory_stage,
)
from pdtrim_pl.strategies.data_parallel import DataParallel
from pdtrim_pl.strategies.deepspeed import ZERO_STAGES, PDTrimDeepSpeedStrategy
from pdtrim_pl.strategies.fsdp import PDTrimFSDPStrategy

__all__ = [
    "ZERO_STAGES", "PDTrimDeepSpeedStrategy", "PDTrimFSDPStrategy", "Sharding", "check_compiling", "check_drops",
    "check_freezing", "check_kv_refits", "check_masters", "check_merges", "check_new_widths", "check_refits",
    "check_skipping", "check_strategy", "check_teacher_bits", "check_trainable", "directory_stage", "parallel_of",
]  # fmt: skip


def parallel_of(strategy: Strategy, leave_if_asked: Callable[[], None] = lambda: None) -> Parallel:
    """The communication between the processes of a trainer.

    Args:
        strategy: strategy of the trainer.
        leave_if_asked: see `Parallel`.
    """
    if isinstance(strategy, PDTrimDeepSpeedStrategy | PDTrimFSDPStrategy):
        return strategy.parallel(leave_if_asked)
    return DataParallel(strategy, leave_if_asked)
