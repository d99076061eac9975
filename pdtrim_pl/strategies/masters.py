"""Whether the weights that train are kept in fp32."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

from pdtrim_pl.errors import UserError

_HALF = (torch.bfloat16, torch.float16)


def check_masters(strategy: Strategy | str, precision: str, dtype: torch.dtype | None) -> None:
    """Refuse training in which small steps round to nothing.

    bf16 has 8 bits of mantissa: at a rate of 1e-5 Adam changes no weight above 5e-3, and nothing tells. DeepSpeed keeps
    an fp32 copy of every weight that trains; a mixed precision keeps the weights themselves in fp32.

    Args:
        strategy: of the trainer, or its name.
        precision: of the trainer, as Lightning spells it in full.
        dtype: of the student's weights as they are loaded; None where it is not known yet.

    Raises:
        UserError: with the way out.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        return
    if precision in ("bf16-true", "16-true") or precision.startswith("transformer-engine"):
        mixed = "16-mixed" if precision == "16-true" else "bf16-mixed"
        raise UserError(
            f"`trainer.precision: {precision}` keeps the weights that train in 16 bits alone, so that at a learning "
            f"rate of 1e-5 most steps round to nothing. Use `precision: {mixed}`, or PDTrimDeepSpeedStrategy, which "
            "keeps fp32 copies."
        )
    if dtype in _HALF:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"The student's weights are {name} (`loading.dtype`), and under this `trainer.strategy` nothing keeps fp32 "
            "copies of them, so that at a learning rate of 1e-5 most steps round to nothing. Set `loading.dtype: "
            "float32` with `precision: bf16-mixed`, or use PDTrimDeepSpeedStrategy."
        )
