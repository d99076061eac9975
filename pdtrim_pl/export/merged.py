"""The student with its adapters merged into its weights, for an export."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from pdtrim_pl.export.checkpoints import cast
from pdtrim_pl.export.verify import rounded_copy
from pdtrim_pl.plan import STAGES
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.lora import Adapters, adapters_of, merged


def without_adapters(staged: StagedCausalLM) -> StagedCausalLM:
    """A copy of the student on the CPU whose weights contain its adapters; the student itself if it has none.

    If each stage has adapters of its own, every block of decode gets weights of its own, and the plan of the copy says
    so.

    Args:
        staged: the student with whole weights; it is not changed.
    """
    if staged.lora is None:
        return staged
    used: dict[int, Adapters] = {}
    for gate in staged.gates.values():
        used[id(gate.block)] = adapters_of(gate.adapters, "prefill")
        for stage in STAGES:
            if stage in gate.untied:
                used[id(gate.untied[stage])] = adapters_of(gate.adapters, stage)

    def state_of(module: nn.Module) -> Mapping[str, Tensor]:
        return _merged(module, used.get(id(module), {}))

    found, dtype = rounded_copy(staged, staged.model.dtype, state_of), staged.model.dtype
    if staged.lora.tied:
        return found
    plan = staged.plan
    for index in plan.decode:
        gate, own = staged.gates[index], copy.deepcopy(found.gates[index].block)
        if index not in plan.untied["decode"]:
            state = _merged(gate.block, adapters_of(gate.adapters, "decode"))
            own.load_state_dict(cast(state, dtype), assign=True)
            found.gates[index].untied["decode"] = own
    found.apply_plan(replace(plan, untied={**plan.untied, "decode": plan.decode}))
    return found


def _merged(module: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """The weights of a module, with adapters in them."""
    state: dict[str, Tensor] = {name: x.detach() for name, x in module.state_dict().items()}
    for name, adapter in adapters.items():
        state[f"{name}.weight"] = merged(adapter, state[f"{name}.weight"]).detach()
    return state
