"""Strategies under which every process holds whole weights: one device, DDP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from pdtrim_pl import compat
from pdtrim_pl.strategies.base import S, StrategyParallel


class OptimizerOfLightning(StrategyParallel[S]):
    """Where Lightning's own optimizers step over the parameters themselves, whole or sharded."""

    @override
    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[nn.Parameter]) -> None:
        for optimizer in self.strategy.optimizers:
            for parameter in written:
                optimizer.state.pop(parameter, None)
            # Not a group of their own: schedulers keep one rate for every group that was there when they were made.
            optimizer.param_groups[0]["params"].extend(created)


class DataParallel(OptimizerOfLightning[Strategy]):
    """One device, or DDP."""

    @override
    def write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(self._agreed_weight(value, parameter))

    @override
    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[nn.Parameter]) -> None:
        super().renew_optimizer(written, created)
        wrapper = self.strategy.model
        # DDP sums gradients only of the parameters that were there when it wrapped the module.
        if created and isinstance(self.strategy, DDPStrategy) and isinstance(wrapper, DistributedDataParallel):
            compat.remove_gradient_hooks(wrapper)  # else every gradient is summed twice
            self.strategy.model = self.strategy.lightning_module
            self.strategy.configure_ddp()
