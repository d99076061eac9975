"""The part of the module that makes the optimizer and steps it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from pdtrim_pl.checkpoints.resumable import ResumableModule
from pdtrim_pl.strategies.layer_rates import LayerRates, check_same_groups, groups_by_block, scaled_rates
from pdtrim_pl.strategies.schedule import Schedule


class SteppedModule(ResumableModule):
    """Makes optimizer and schedule, and scales the rates of blocks around a step. A subclass has the settings."""

    optimizer_of: OptimizerCallable
    schedule: Schedule | None
    lr_scheduler_of: LRSchedulerCallable | None
    layer_rates: LayerRates | None

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_same_groups(checkpoint, self.layer_rates)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = self.optimized_parameters()
        by_block = self.layer_rates is not None
        optimizer = self.optimizer_of(groups_by_block(self.student, parameters) if by_block else parameters)
        if self.schedule is not None:
            scheduler: LRScheduler = self.schedule.over(self.trainer.estimated_stepping_batches, optimizer)
        elif self.lr_scheduler_of is not None:
            scheduler = self.lr_scheduler_of(optimizer)
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Step, and free the gradients: Lightning keeps them through the next forward pass."""
        factors = {} if self.layer_rates is None else self.layer_rates.factors(self.plan)
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with scaled_rates(own, factors):
            super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        self.zero_grad()

    @override
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:  # fmt: skip
        """Clip gradients also for fused optimizers in bf16, where Lightning refuses them."""
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and isinstance(plugin, MixedPrecision) and plugin.scaler is None:  # nothing is scaled
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
