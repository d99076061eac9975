"""A rich progress bar that shows the current plan."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from pdtrim_pl.module import PDTrimModule


class PlanProgressBar(RichProgressBar):
    """Lightning's rich bar that also shows the number of blocks per stage, such as `P27 D24`."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        assert isinstance(pl_module, PDTrimModule)
        return {"plan": f"P{len(pl_module.plan.prefill)} D{len(pl_module.plan.decode)}", **metrics}
