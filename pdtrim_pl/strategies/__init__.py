"""Strategies of the trainer, and what differs between them. Two are named in YAML.

`strategy: {class_path: pdtrim_pl.strategies.PDTrimDeepSpeedStrategy, init_args: {stage: 2}}`, or
`strategy: {class_path: pdtrim_pl.strategies.PDTrimFSDPStrategy}`.
"""

from pdtrim_pl.strategies.deepspeed import (
    ZERO_STAGES,
    PDTrimDeepSpeedStrategy,
    agreed,
    check_drops,
    check_freezing,
    check_strategy,
    forget_gradients,
    gathered,
    largest,
    ranks_of,
    shards_weights,
)
from pdtrim_pl.strategies.fsdp import PDTrimFSDPStrategy

__all__ = [
    "ZERO_STAGES", "PDTrimDeepSpeedStrategy", "PDTrimFSDPStrategy", "agreed", "check_drops", "check_freezing",
    "check_strategy", "forget_gradients", "gathered", "largest", "ranks_of", "shards_weights",
]  # fmt: skip
