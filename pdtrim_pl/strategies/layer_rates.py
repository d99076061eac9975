"""Learning rates by block: the full rate beside what a plan changed, lower ones further away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, StagePlan, Width
from pdtrim_pl.staged import StagedCausalLM

_BLOCK = "block"
"""Key of a parameter group of the optimizer: the block whose weights it holds."""


@dataclass(frozen=True)
class LayerRates:
    """Each block trains at the rate of the optimizer times a factor, which falls with the distance from a change.

    A block is changed if a stage does not run it, if it stands for several, or if it is narrower. It and the blocks
    beside it train at the full rate. Every further block in between multiplies the rate by `decay`, but not below
    `floor`. With the default, blocks 1, 2 and 3 away from a dropped one have the factors 1, 0.8 and 0.64.

    The embeddings count as a block before the first, final norm and head as one behind the last. As long as nothing is
    changed, all factors are 1. They follow the plan; the optimizer keeps its states.

    Raises:
        UserError: a setting is out of range.
    """

    decay: float = 0.8
    """Factor for one more block of distance, in (0, 1]."""
    floor: float = 0.1
    """Lowest factor, in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or not 0 <= self.floor <= 1:
            raise UserError(
                f"`layer_rates` has `decay: {self.decay}` and `floor: {self.floor}`: give a decay above 0 and up to 1, "
                "and a floor from 0 to 1."
            )

    def factors(self, plan: StagePlan) -> dict[int, float]:
        """Factor of every block's rate under a plan; -1 is the embeddings, the number of blocks is norm and head."""
        places, changed = range(-1, plan.model.num_blocks + 1), changed_blocks(plan)
        if not changed:
            return dict.fromkeys(places, 1.0)
        further = {place: max(min(abs(place - block) for block in changed) - 1, 0) for place in places}
        return {place: max(self.decay**steps, self.floor) for place, steps in further.items()}


def changed_blocks(plan: StagePlan) -> set[int]:
    """Blocks that some stage does not run, or runs narrower or for several."""
    dropped = {block for block in range(plan.model.num_blocks) if not all(block in plan.blocks(s) for s in STAGES)}
    narrow = {block for stage in STAGES for block, width in plan.widths[stage].items() if width != Width()}
    return dropped | narrow | {block for stage in STAGES for block in plan.merged[stage]}


def groups_by_block(student: StagedCausalLM, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one a block, which keep the order of the parameters.

    Args:
        student: the model that has the parameters.
        parameters: all that the optimizer is to have.
    """
    gates = student.gates
    owner = {id(parameter): index for index, gate in gates.items() for parameter in gate.parameters()}
    groups: dict[int, dict[str, Any]] = {}
    for parameter in parameters:
        outside = len(gates) if groups.keys() - {-1} else -1
        block = owner.get(id(parameter), outside)
        groups.setdefault(block, {"params": [], _BLOCK: block})["params"].append(parameter)
    return list(groups.values())


def group_of(optimizer: Optimizer, block: int) -> dict[str, Any]:
    """The parameter group that new weights of a block join: the block's own, or the first if there is none."""
    groups: dict[Any, dict[str, Any]] = {group.get(_BLOCK): group for group in optimizer.param_groups}
    return groups.get(block, optimizer.param_groups[0])


@contextmanager
def scaled_rates(optimizer: Optimizer, factors: Mapping[int, float]) -> Iterator[None]:
    """Multiply the rates of the groups inside the `with` block. Schedulers and checkpoints see the rates without it."""
    groups = [group for group in optimizer.param_groups if _BLOCK in group]
    rates = [group["lr"] for group in groups]
    try:
        for group in groups:
            group["lr"] = group["lr"] * factors[group[_BLOCK]]
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def check_same_groups(checkpoint: Mapping[str, Any], rates: LayerRates | None) -> None:
    """Refuse the checkpoint of a run whose optimizer has other groups. Those of DeepSpeed's shards are not here.

    Raises:
        UserError: one of the two runs has rates by block, the other has not.
    """
    saved = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
    if saved and any(_BLOCK in group for group in saved) != (rates is not None):
        has = "one rate for all blocks" if rates is not None else "rates by block"
        way = "leave `model.layer_rates` out" if rates is not None else "set `model.layer_rates` as it was there"
        raise UserError(f"The checkpoint is of a run with {has}, whose optimizer has other groups. To continue, {way}.")
