"""Communication that is the same under all strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor
from typing_extensions import override

from pdtrim_pl.parallel import Parallel

S = TypeVar("S", bound=Strategy)


class StrategyParallel(Parallel, Generic[S]):
    """The communication between the processes of a trainer. Without a process group, the process is alone.

    Args:
        strategy: strategy of the trainer.
        leave_if_asked: see `Parallel`.
    """

    def __init__(self, strategy: S, leave_if_asked: Callable[[], None] = lambda: None) -> None:
        super().__init__(leave_if_asked)
        self.strategy = strategy
        self.together_with_others = dist.is_available() and dist.is_initialized()
        if self.together_with_others:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            assert isinstance(strategy, ParallelStrategy)
            assert strategy.cluster_environment is not None
            self.host = strategy.cluster_environment.main_address

    @override
    def agree(self, value: Any) -> Any:
        return self.strategy.broadcast(value) if self.together_with_others else value

    @override
    def gather(self, value: Any) -> list[Any]:
        if not self.together_with_others:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @override
    def hand_out(self, tensor: Tensor, source: int) -> None:
        if self.together_with_others:
            dist.broadcast(tensor, source)

    @override
    def largest(self, value: int) -> int:
        return int(self.strategy.reduce(torch.tensor(value, device=self.strategy.root_device), reduce_op="max"))

    def _agreed_weight(self, value: Tensor, like: Tensor) -> Tensor:
        """The value of rank 0, on the device and in the element type of `like`."""
        value = value.detach().to(like.device, like.dtype).clone()
        self.hand_out(value, 0)  # values may differ between ranks by rounding
        return value
