"""Merged weights in a run that is under way: in the optimizer, in DDP's wrapper, in shards of DeepSpeed and FSDP.

An engine keeps its own copies of weights and their optimizer states, cut up between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pdtrim_pl import compat
from pdtrim_pl.errors import UserError
from pdtrim_pl.merging.settings import Merging


def check_merges(strategy: Strategy, settings: Merging) -> None:
    """Refuse merges that a strategy cannot take up in the middle of a run.

    Raises:
        UserError: with the reason and the way out.
    """
    if isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy) and not settings.tied:
        engine = "DeepSpeed" if isinstance(strategy, DeepSpeedStrategy) else "FSDP"
        raise UserError(
            f"`trainer.strategy` is {engine}, whose shards are cut once, at the start, so that no block can get "
            "weights of its own later. Set `tied: true` for the merges, which then are made only in both stages at "
            "once (JointDrop merges in one at a time, so not here), or use `strategy: "
            "ddp_find_unused_parameters_true`."
        )


class WeightChange:
    """Writes fitted weights into parameters that train, and makes an optimizer and a strategy live with what changed.

    Args:
        strategy: of the trainer.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.written: list[nn.Parameter] = []

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Put rank 0's `value` into a parameter and all copies of it; every rank must call it."""
        value = value.detach().to(parameter.device, parameter.dtype).clone()
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(value, 0)  # rounding must not part the ranks
        if isinstance(self.strategy, DeepSpeedStrategy):
            _write_shards(self.strategy, parameter, value)
        else:
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            with torch.no_grad():
                parameter.copy_(value)
        self.written.append(parameter)

    def finish(self, created: Sequence[nn.Parameter]) -> None:
        """Forget optimizer states of the weights that were there before, and train `created` ones from now on."""
        if isinstance(self.strategy, DeepSpeedStrategy):
            assert not created, "`check_merges` refuses this"
            stage = 3 if self.strategy.zero_stage_3 else 2  # 1 keeps its states as 2 does
            for parameter in self.written:
                compat.clear_optimizer_state(self.strategy.deepspeed_engine, stage, parameter)
            return
        assert not (created and isinstance(self.strategy, ModelParallelStrategy)), "`check_merges` refuses this"
        for optimizer in self.strategy.optimizers:
            for parameter in self.written:
                optimizer.state.pop(parameter, None)
            # Not a group of their own: schedulers keep one rate for every group that was there when they were made.
            optimizer.param_groups[0]["params"].extend(created)
        if created:
            _wrap_again(self.strategy)


def _wrap_again(strategy: Strategy) -> None:
    """DDP sums gradients only of the parameters that were there when it wrapped the module."""
    wrapper = strategy.model
    if isinstance(strategy, DDPStrategy) and isinstance(wrapper, DistributedDataParallel):
        compat.remove_gradient_hooks(wrapper)  # else every gradient is summed twice
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def _write_shards(strategy: DeepSpeedStrategy, parameter: nn.Parameter, value: Tensor) -> None:
    """Into the weight, or this rank's shard of it, and into the engine's fp32 copy."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not strategy.zero_stage_3:
        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    safe_set_local_fp32_param(parameter, compat.own_shard(parameter).float())
