"""FSDP2 for a student in which gradients also reach a block through its keys and values.

In backward, FSDP gathers the weights of a block when a gradient arrives at the block's output. Here decode attends to
the keys and values that prefill cached. So a gradient may arrive at the keys and values first, or only there. Therefore
the output, the keys and the values of a block pass through one autograd node. Its backward waits for all gradients and
always gives the output one (zeros if there is none), before the backward of the block starts. The projection of a
KV-only block is registered with FSDP as a forward method.

Shapes: B batch, T tokens, H hidden, K key/value heads, N entries, D head dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.torch_version import TorchVersion
from typing_extensions import override

from pdtrim_pl.checkpoints.state import CheckpointState, check_file, check_weights, mapped
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture, RoPE
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.cache import OneBlockCache
from pdtrim_pl.strategies.data_parallel import OptimizerOfLightning

OLDEST_TORCH = "2.13"
"""First version whose FSDP finds tensors in dataclasses, as stages return them. Earlier versions were not tested."""


class PDTrimFSDPStrategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer states of the student, and the teacher's weights, over all processes.

    Under `precision: bf16-mixed`, shards, gradients and optimizer states are in fp32, and weights are gathered in bf16.

    Checkpoints are single files with whole weights and states, the same as under DDP. Rank 0 must hold them in its host
    memory. Every process loads the whole model into host memory before it is sharded.

    Args:
        process_group_backend: backend of `torch.distributed`; by default `nccl` on GPUs and `gloo` on CPUs.

    Raises:
        UserError: torch is older than `OLDEST_TORCH`.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        if TorchVersion(torch.__version__) < TorchVersion(OLDEST_TORCH):
            raise UserError(
                f"PDTrimFSDPStrategy needs torch {OLDEST_TORCH} and this is {torch.__version__}. Install it, or use "
                "pdtrim_pl.strategies.PDTrimDeepSpeedStrategy with `stage: 3`."
            )
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def parallel(self, leave_if_asked: Callable[[], None] = lambda: None) -> FSDPParallel:
        """The communication between the processes of the run; see `Parallel`."""
        return FSDPParallel(self, leave_if_asked)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        # FSDP warns of in-place writes to views that a module returns. Nothing here writes to them.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor", UserWarning)
        for model in self.lightning_module.children():
            if isinstance(model, StagedCausalLM) and not isinstance(model, FSDPModule):
                shard(model, self.device_mesh["data_parallel"], str(trainer.precision))
        super().setup(trainer)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        check_file(checkpoint_path)
        state = CheckpointState.at(checkpoint_path)
        if state is not None and state.added:
            raise UserError(
                f"The checkpoint {checkpoint_path} is of a run that gave blocks weights of their own on its way "
                f"({list(state.added)}), which FSDP cannot take up. Continue with `strategy: "
                "ddp_find_unused_parameters_true`."
            )
        # Lightning does not compare names and shapes when it loads into shards. Memory-mapped weights stay on disk.
        check_weights(mapped(checkpoint_path)["state_dict"], self.lightning_module.state_dict())
        return super().load_checkpoint(checkpoint_path, weights_only)


class FSDPParallel(OptimizerOfLightning[PDTrimFSDPStrategy]):
    """The communication in an FSDP run. Weights are sharded after the model is built; each one can gather itself."""

    whole = False
    gathers_heads = True

    @override
    def own_part(self, parameter: nn.Parameter) -> Tensor:
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    @override
    def write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        value = self._agreed_weight(value, parameter)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with torch.no_grad():
            parameter.copy_(value)

    @override
    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[tuple[int, nn.Parameter]]) -> None:
        assert not created, "`check_merges` refuses this"
        super().renew_optimizer(written, created)


def shard(staged: StagedCausalLM, mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Shard the weights of a model over the processes of a mesh, in place: each block alone, and the rest together.

    Args:
        staged: the model.
        mesh: a device mesh with one dimension.
        precision: precision of the trainer. Under `bf16-mixed`, weights are gathered in bf16, and gradients are summed
            in fp32.
    """
    mixed = precision == "bf16-mixed"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for gate in staged.gates.values():
        for block in (gate.block, *gate.untied.values()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
            # Registered after FSDP's own hook, which must see the output before it passes through the node.
            block.register_forward_hook(_leave_together, with_kwargs=True)
            _add_forward_method(block, "keys_values", partial(gate.architecture.keys_values, block))
        gate.project = partial(_project, gate.architecture)
    # By default FSDP keeps the root's weights whole after a pass. After a pass without gradients they may be stale.
    fully_shard(staged, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    staged.whole_head = partial(_with_whole_head, staged)
    for name in ("prefill", "decode", "step", "logits", "compared_logits", "at_head"):
        register_fsdp_forward_method(staged, name)
    if mesh.device_type == "cpu":
        for module in staged.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean


@contextmanager
def _with_whole_head(staged: StagedCausalLM) -> Iterator[None]:
    """Gather the weights that are not in blocks, for use without gradients."""
    root: Any = staged
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def _add_forward_method(block: nn.Module, name: str, method: Callable[..., Any]) -> None:
    setattr(block, name, method)
    register_fsdp_forward_method(block, name)


def _project(architecture: Architecture, block: nn.Module, hidden: Tensor, rope: RoPE) -> tuple[Tensor, Tensor]:
    """Project keys and values, each [B, K, T, D]. The weights of the block are gathered meanwhile."""
    if not isinstance(block, FSDPModule):  # a fitted block that is offered
        return architecture.keys_values(block, hidden, rope)
    sharded: Any = block
    keys, values = sharded.keys_values(hidden, rope)
    return keys, values


def _leave_together(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
    """Forward hook: pass output, keys and values of a block through one autograd node."""
    (cache,) = (value for value in kwargs.values() if isinstance(value, OneBlockCache))
    if hidden.requires_grad:
        hidden, cache.keys, cache.values = _OneNode.apply(hidden, cache.keys, cache.values)
    return hidden


class _OneNode(torch.autograd.Function):
    """Identity on hidden state [B, T, H], keys and values [B, K, N, D]: its backward waits for all their gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients  # autograd fills in zeros for missing gradients
