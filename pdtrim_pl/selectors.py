"""KV selectors: which blocks of D send only the first and last prompt positions. Named in YAML by class path.

A new selector is a subclass of `KVSelector` with one method. For example, to trim every second block of D:

    class EverySecond(KVSelector):
        def select(self, context: SelectionContext) -> dict[int, Retention]:
            return {block: self.rule for block in context.plan.decode[::2]}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from typing import Literal, get_args

import torch

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.attention import attention_mass
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.policy import KVRetentionPolicy, KVShape, Retention
from pdtrim_pl.staged import StagedCausalLM

Order = Literal["mass", "damage"]


@dataclass(frozen=True)
class SelectionContext:
    """What a selector may look at. Measurements are taken when asked for, and once."""

    plan: StagePlan
    kv_shape: KVShape
    measure_mass: Callable[[], Mapping[int, float]]
    damage: Callable[[int, Retention], float]
    """Mean KL(teacher || student) in nats per response token when only that block of D is trimmed by that rule."""

    @cached_property
    def mass(self) -> Mapping[int, float]:
        """Attention mass of the selector's rule, per block of D (see `evaluation.attention`)."""
        return self.measure_mass()

    def sent_ratio(self, rules: Mapping[int, Retention], prompt_tokens: int = 1024) -> float:
        """Bytes of the unpruned model sending everything over bytes sent under `rules`, for one prompt."""
        policy = KVRetentionPolicy(self.plan.boundary, self.kv_shape, rules)
        sent = policy.sent_bytes(self.plan, prompt_tokens)
        return policy.full_bytes(self.plan, prompt_tokens) / sent if sent else inf


class KVSelector(ABC):
    """Chooses a retention rule for blocks of D.

    Args:
        first: prompt positions at the start that a trimmed block sends: a count, or a share of the prompt.
        last: prompt positions at the end that it sends.

    Raises:
        ValueError: a count or share out of range.
    """

    def __init__(self, first: int | float = 4, last: int | float = 0.2) -> None:
        self.rule = Retention("first_last", first, last)

    @property
    def first(self) -> int | float:
        """Prompt positions at the start that a trimmed block sends."""
        return self.rule.first

    @property
    def last(self) -> int | float:
        """Prompt positions at the end that a trimmed block sends."""
        return self.rule.last

    @abstractmethod
    def select(self, context: SelectionContext) -> dict[int, Retention]:
        """Rules by original block index, for blocks of D only; a block without one sends everything."""


class NoSelector(KVSelector):
    """Everything is sent. The counts only say which attention mass the report shows."""

    def select(self, context: SelectionContext) -> dict[int, Retention]:
        return {}


class MassSelector(KVSelector):
    """Trims every block that pays at least `threshold` of its prompt attention to the positions kept.

    Args:
        threshold: share of attention mass in [0, 1].
        first: see `KVSelector`.
        last: see `KVSelector`.

    Raises:
        ValueError: a threshold, count or share out of range.
    """

    def __init__(self, threshold: float = 0.9, first: int | float = 4, last: int | float = 0.2) -> None:
        super().__init__(first, last)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"`threshold` is {threshold!r}: give a share of the attention mass, from 0 to 1.")
        self.threshold = threshold

    def select(self, context: SelectionContext) -> dict[int, Retention]:
        return {block: self.rule for block in context.plan.decode if context.mass[block] >= self.threshold}


class BudgetSelector(KVSelector):
    """Trims as few blocks as reach a reduction of the bytes on the wire, the least harmful first.

    The reduction counts against the unpruned model sending everything, so decode blocks that were dropped are part of
    it. The default is the figure of PDTrim (arXiv 2509.04467).

    Args:
        reduction: full bytes over sent bytes, at least 1.
        first: see `KVSelector`.
        last: see `KVSelector`.
        order: `mass` trims blocks in descending attention mass; `damage` in ascending KL to the teacher when only that
            block is trimmed, which costs one pass over the calibration data a block.
        prompt_tokens: length of the prompt at which the bytes are counted.

    Raises:
        ValueError: an argument out of range; and from `select`, a reduction that cannot be reached.
    """

    def __init__(
        self,
        reduction: float = 4.95,
        first: int | float = 4,
        last: int | float = 0.2,
        order: Order = "mass",
        prompt_tokens: int = 1024,
    ) -> None:
        super().__init__(first, last)
        if reduction < 1.0:
            raise ValueError(f"`reduction` is {reduction!r}: give full bytes over sent bytes, at least 1.")
        if order not in get_args(Order):
            raise ValueError(f"`order` is {order!r}, not one of {', '.join(get_args(Order))}.")
        if prompt_tokens < 2:
            raise ValueError(f"`prompt_tokens` is {prompt_tokens!r}: count the bytes of a prompt of at least 2 tokens.")
        self.reduction, self.order, self.prompt_tokens = reduction, order, prompt_tokens

    def select(self, context: SelectionContext) -> dict[int, Retention]:
        self._check_reachable(context)
        rules: dict[int, Retention] = {}
        waiting = iter(() if self._reached(context, rules) else self._least_harmful_first(context))
        while not self._reached(context, rules):
            rules[next(waiting)] = self.rule
        return dict(sorted(rules.items()))

    def _reached(self, context: SelectionContext, rules: Mapping[int, Retention]) -> bool:
        return context.sent_ratio(rules, self.prompt_tokens) >= self.reduction

    def _least_harmful_first(self, context: SelectionContext) -> list[int]:
        if self.order == "mass":
            return sorted(context.plan.decode, key=lambda block: -context.mass[block])
        return sorted(context.plan.decode, key=lambda block: context.damage(block, self.rule))

    def _check_reachable(self, context: SelectionContext) -> None:
        most = context.sent_ratio(dict.fromkeys(context.plan.decode, self.rule), self.prompt_tokens)
        if most < self.reduction:
            raise ValueError(
                f"`reduction: {self.reduction}` cannot be reached: with all {len(context.plan.decode)} decode blocks "
                f"trimmed to `first: {self.first}` and `last: {self.last}`, a prompt of {self.prompt_tokens} tokens "
                f"sends {_floor(most):.2f} times fewer bytes. Lower `reduction` to that, lower `last` or `first`, or "
                "drop more decode blocks."
            )


def selection_context(
    student: StagedCausalLM,
    teacher: StagedCausalLM,
    batches: Iterable[Batch],
    kv_shape: KVShape,
    device: torch.device | str,
    first: int | float,
    last: int | float,
) -> SelectionContext:
    """The context of a student's plan as it is now. Measures nothing yet.

    Args:
        student: the model that will send less.
        teacher: the reference of `damage`.
        batches: calibration requests; held, for they are read once a measurement.
        kv_shape: shape of one block's KV per position.
        device: where both models are.
        first: the selector's `first`, for `mass`.
        last: the selector's `last`.
    """
    plan, held = student.plan, list(batches)

    @cache
    def damage(block: int, rule: Retention) -> float:
        policy = KVRetentionPolicy(plan.boundary, kv_shape, {block: rule})
        with eval_mode(student), eval_mode(teacher):
            return measure_quality(student, teacher, held, plan=plan, policy=policy, device=device).kl

    def mass() -> Mapping[int, float]:
        return attention_mass(student, held, first=first, last=last, device=device)

    return SelectionContext(plan, kv_shape, mass, damage)


def _floor(ratio: float) -> float:
    """Rounded down to two digits, so that the value named in a message can be reached."""
    return int(ratio * 100) / 100
