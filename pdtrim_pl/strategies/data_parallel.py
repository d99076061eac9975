"""Communication under strategies where every process holds whole weights: one device, or DDP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from pdtrim_pl import compat
from pdtrim_pl.strategies.base import S, StrategyParallel
from pdtrim_pl.strategies.layer_rates import group_of


class OptimizerOfLightning(StrategyParallel[S]):
    """Resets optimizer state where Lightning's own optimizers update the parameters themselves, whole or sharded."""

    @override
    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[tuple[int, nn.Parameter]]) -> None:
        for optimizer in self.strategy.optimizers:
            for parameter in written:
                optimizer.state.pop(parameter, None)
            # Not in a new group: a scheduler only knows the groups that existed when it was created.
            for block, parameter in created:
                group_of(optimizer, block)["params"].append(parameter)


class DataParallel(OptimizerOfLightning[Strategy]):
    """One device, or DDP."""

    store = torch.device("cpu")
    """Where released weights lie, for checkpoints and the export."""

    @override
    def release(self, unused: Sequence[nn.Parameter]) -> None:
        for optimizer in self.strategy.optimizers:
            for parameter in unused:
                optimizer.state.pop(parameter, None)
        if self.strategy.root_device != self.store:
            move(unused, self.store)

    @override
    def write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(self._agreed_weight(value, parameter))

    @override
    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[tuple[int, nn.Parameter]]) -> None:
        super().renew_optimizer(written, created)
        wrapper = self.strategy.model
        # DDP sums only gradients of parameters that existed when it wrapped the module: wrap the module again.
        if created and isinstance(self.strategy, DDPStrategy) and isinstance(wrapper, DistributedDataParallel):
            compat.remove_gradient_hooks(wrapper)  # otherwise every gradient is summed twice
            self.strategy.model = self.strategy.lightning_module
            move(wrapper.parameters(), self.strategy.root_device)  # DDP refuses a module on two devices
            self.strategy.configure_ddp()


def move(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Move parameters, in place, and drop their gradients. Optimizers and modules keep the same objects."""
    for parameter in parameters:
        if parameter.device != device:
            parameter.grad = None
            parameter.data = parameter.data.to(device)
