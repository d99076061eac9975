"""The first blocks, where student and teacher are the same and nothing trains: the teacher runs them for both.

Shapes: B batch, T tokens of a pass, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.staged.cache import BlockKV
from pdtrim_pl.staged.gate import Gate, Observer
from pdtrim_pl.staged.resume import Resume
from pdtrim_pl.staged.structure import GatedCausalLM


@dataclass
class Below:
    """What the teacher's pass over a batch leaves for the student's pass over the same batch.

    Give it to the teacher's `forward` first, and then to the student's.
    """

    block: int
    """Original index of the first block that the two do not have in common."""
    at_once: bool
    """Whether both run prompt and response in one pass, as prefill."""
    hidden: dict[Stage, Tensor] = field(default_factory=dict)
    """Hidden states that reach the block, [B, T, H]."""
    cached: Mapping[int, BlockKV] = field(default_factory=dict)
    """Keys and values of prefill."""
    filled: bool = False
    """Whether the teacher's pass is over."""

    @property
    def observers(self) -> Mapping[Stage, Observer]:
        """For the teacher's pass."""
        return {} if self.filled else {stage: self._keeping(stage) for stage in STAGES}

    @property
    def resumes(self) -> Mapping[Stage, Resume]:
        """For the student's pass."""
        if not self.filled:
            return {}
        return {stage: Resume(self.block, hidden, self.cached) for stage, hidden in self.hidden.items()}

    def _keeping(self, stage: Stage) -> Observer:
        def observe(index: int, _: Tensor, out: Tensor) -> None:
            if index == self.block - 1:
                self.hidden[stage] = out

        return observe


def common_blocks(student: GatedCausalLM, teacher: GatedCausalLM) -> int:
    """Number of first blocks that give the same in both models and train nothing.

    Both stages of the student run such a block, whole and with the weights that they share; the policy sends all of it.
    Weights are compared, so this waits for the device. Both models must have whole weights.
    """
    sizes = student.model.config.to_dict()
    dropout = any(value for key, value in sizes.items() if "drop" in key and isinstance(value, float))
    inputs = (student.model.get_input_embeddings(), teacher.model.get_input_embeddings())
    if dropout or student.plan.boundary != teacher.plan.boundary or not _same_and_frozen(*inputs):
        return 0
    count = 0
    for index, gate in student.gates.items():
        if not (_is_plain(gate, student) and _same_and_frozen(gate, teacher.gates[index])):
            break
        count = index + 1
    return count


def _is_plain(gate: Gate, student: GatedCausalLM) -> bool:
    plan, index = student.plan, gate.index
    whole = student.policy is None or student.policy.rule(index).is_whole
    runs = all(
        index in plan.blocks(stage) and index not in plan.untied[stage] and plan.widths[stage].get(index) is None
        for stage in STAGES
    )
    return whole and runs and not gate.offers and not gate.refit_offers and not len(gate.adapters)


def _same_and_frozen(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether no weight of `ours` trains, and all are equal to those of `theirs`, in value and element type."""
    expected = dict(theirs.named_parameters())
    return all(
        not weight.requires_grad
        and name in expected
        and weight.dtype == expected[name].dtype
        and torch.equal(weight, expected[name])
        for name, weight in ours.named_parameters()
    )
