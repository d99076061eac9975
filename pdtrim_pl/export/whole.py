"""Gathers a sharded student on one rank."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pdtrim_pl.export.verify import rounded_copy
from pdtrim_pl.parallel import Gather
from pdtrim_pl.staged import StagedCausalLM


def whole_copy(staged: StagedCausalLM, gather: Gather, *, keep: bool) -> StagedCausalLM | None:
    """Gather a student's weights on the CPU, one parameter at a time. Collective.

    Args:
        staged: the sharded student; it is not changed.
        gather: the strategy's context in which weights are whole.
        keep: whether this rank keeps them.

    Returns:
        An ordinary student in eval mode if `keep`, else None.
    """
    whole: dict[int, Tensor] = {}
    for parameter in staged.parameters():  # tied weights come once
        with gather([parameter]):
            tensor = parameter.detach()
            if isinstance(tensor, DTensor):  # of FSDP
                tensor = tensor.full_tensor()
            if keep:
                whole[id(parameter)] = tensor.cpu().clone()
    if not keep:
        return None

    def state_of(module: nn.Module) -> Mapping[str, Tensor]:
        return {name: whole.get(id(x), x) for name, x in module.state_dict(keep_vars=True).items()}

    return rounded_copy(staged, staged.model.dtype, state_of)
