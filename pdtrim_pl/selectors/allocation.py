"""Allocation of bytes: choose positions and bits of each block, for the least damage within a number of bytes.

A *side* is the keys or the values of one block. The damage of the coarsest form is measured for each side, under the
contract. The damage of finer forms is extrapolated: with every bit, rounding noise and KL fall by a factor of four.
A block may also send only its first and last positions; that damage is measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import isfinite
from typing import Literal

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import KEEP_ALL, NO_CODEC, Codec, KVShape, Retention, StagePlan, handled_positions
from pdtrim_pl.plan.codec import Form

Side = Literal["keys", "values"]
SIDES: tuple[Side, ...] = ("keys", "values")
Choice = Mapping[int, Retention]
Energy = Callable[[Mapping[int, Retention]], float]
"""Returns the KL(teacher || student) under some rules, nats. Every rank must call it."""
NOISE_BITS: Mapping[Form, float] = {"none": 16.0, "fp8": 5.0, "int8": 8.0, "int4": 4.0, "int3": 3.0, "int2": 2.0}
"""Bits of the integer form with the same rounding noise. e4m3 keeps three bits of mantissa at every magnitude."""
TRIMMED_BITS = 4
"""Bits of a trimmed block. It sends few positions, so its bits cost few bytes."""
SINKS = 1
"""Number of first positions that are not rounded. With 3 bits, one more than halves the KL for 1 % more bytes."""
STEPS = 60
"""Number of bisection steps on the price of a byte."""


@dataclass(frozen=True)
class Offer:
    """One rule that a block may have."""

    rule: Retention
    size: int
    """Bytes of one request."""
    damage: float
    """Predicted increase of the KL, nats."""


@dataclass
class Allocation:
    """Chooses a rule for every block.

    Args:
        plan: its decode blocks send something.
        kv_shape: shape of one block's KV per position, as it crosses.
        forms: forms that a side may have, besides `none`.
        prompt_tokens: length of the prompt for which bytes are counted.
        trimmed: positions that a block may send instead of all; None: every block sends all positions.
    """

    plan: StagePlan
    kv_shape: KVShape
    forms: Sequence[Form]
    prompt_tokens: int
    trimmed: Retention | None = None
    offers: dict[int, list[Offer]] = field(default_factory=dict)
    """The rules that each block may have; `measure` fills it."""

    def __post_init__(self) -> None:
        self.blocks = self.plan.decode
        self.menu: list[Form] = sorted({"none", *self.forms}, key=lambda form: -NOISE_BITS[form])
        self._positions = handled_positions(self.prompt_tokens, self.plan.boundary)
        if self.trimmed is not None:
            fine = [form for form in self.menu if NOISE_BITS[form] >= TRIMMED_BITS]
            self.trimmed = self.trimmed.written_as(codec_of(fine[-1], fine[-1]))

    @property
    def smallest(self) -> dict[int, Retention]:
        """The choice with the fewest bytes."""
        return dict.fromkeys(self.blocks, self._smallest_rule)

    def rules(self, choice: Choice) -> dict[int, Retention]:
        """The rules of a choice. A block that sends everything without a codec has no rule."""
        return {block: rule for block, rule in choice.items() if not rule.is_whole}

    def size_of(self, rule: Retention) -> int:
        """Bytes of one block in one request."""
        return rule.bytes_sent(self._positions, *self.kv_shape.sizes)

    def bytes_of(self, choice: Choice) -> int:
        """Bytes of one request under a choice."""
        return sum(self.size_of(rule) for rule in choice.values())

    def measure(self, energy: Energy) -> None:
        """Measure the damage of every side, and of the trimmed positions of every block. Every rank must call it.

        Args:
            energy: KL under some rules; it is not kept.

        Raises:
            UserError: the energy is not finite when everything is sent.
        """
        base = energy({})
        if not isfinite(base):
            raise UserError(
                "The KL to the teacher is not finite when everything is sent, so no policy can be chosen. Check the "
                "model's weights, and use bfloat16 or float32 if they are float16."
            )
        for block in self.blocks:
            keys, values = (self._side_damages(block, side, energy, base) for side in SIDES)
            lost = 0.0 if self.trimmed is None else max(energy({block: self.trimmed}) - base, 0.0)
            for rule in self._rules():
                damage = lost if rule == self.trimmed else keys[rule.codec.keys] + values[rule.codec.values]
                self.offers.setdefault(block, []).append(Offer(rule, self.size_of(rule), damage))

    def _side_damages(self, block: int, side: Side, energy: Energy, base: float) -> dict[Form, float]:
        coarsest = self.menu[-1]
        if coarsest == "none":
            return {"none": 0.0}
        measured = max(energy({block: written(side, coarsest)}) - base, 0.0)
        damages = {form: measured * 4.0 ** (NOISE_BITS[coarsest] - NOISE_BITS[form]) for form in self.menu}
        return {**damages, "none": 0.0}

    def cheapest(self, budget: float, blocks: Sequence[int] | None = None) -> dict[int, Retention]:
        """The choice of least predicted damage within `budget` bytes; the smallest choice if none is small enough.

        Bisection finds one price of a byte for all blocks (Lagrange multiplier). The rest of the budget is then spent
        where a byte reduces the damage most.

        Args:
            budget: bytes of one request.
            blocks: decode blocks; by default those of the plan.
        """
        blocks = self.blocks if blocks is None else blocks
        low, high = 1e-18, 1e6
        best = dict.fromkeys(blocks, self._smallest_rule)
        for _ in range(STEPS):
            price = (low * high) ** 0.5
            choice = {
                block: min(self.offers[block], key=lambda offer: offer.damage + price * offer.size).rule
                for block in blocks
            }
            if self.bytes_of(choice) > budget:
                low = price
            else:
                high, best = price, choice
        return self.filled_up(best, budget)

    def filled_up(self, choice: Choice, budget: float) -> dict[int, Retention]:
        """Give blocks larger rules, first where a byte reduces the damage most, up to `budget` bytes in all."""
        filled = dict(choice)
        while True:
            left = budget - self.bytes_of(filled)
            steps = [
                ((now.damage - offer.damage) / (offer.size - now.size), block, offer.rule)
                for block, now in self._offered(filled).items()
                for offer in self.offers[block]
                if 0 < offer.size - now.size <= left and offer.damage <= now.damage
            ]
            if not steps:
                return filled
            _, block, rule = max(steps, key=lambda step: step[0])
            filled[block] = rule

    def exchanged(self, choice: Choice, budget: float, measure: Energy) -> dict[int, Retention]:
        """Exchange bytes: give one block a larger rule and another one a smaller, as long as the joint energy falls.

        The effect of every single step is measured once, with all other blocks as chosen. Every rank must call it.

        Args:
            choice: where to begin.
            budget: bytes of one request.
            measure: KL under some rules.
        """
        best, energy = dict(choice), measure(self.rules(choice))
        steps = [(block, rule) for block, rule in best.items() for rule in self._neighbours(rule)]
        rises = {step: measure(self.rules({**best, step[0]: step[1]})) - energy for step in steps}
        more = {step: self.size_of(step[1]) - self.size_of(best[step[0]]) for step in steps}
        pairs = [
            (rises[up] + rises[down], up, down)
            for up, down in product(steps, steps)
            if more[up] > 0 > more[down] and up[0] != down[0]
        ]
        moved: set[int] = set()
        for rise, up, down in sorted(pairs, key=lambda pair: pair[0]):
            if rise >= 0:
                break
            tried = {**best, up[0]: up[1], down[0]: down[1]}
            if moved & {up[0], down[0]} or self.bytes_of(tried) > budget:
                continue
            found = measure(self.rules(tried))
            if found >= energy:
                break
            best, energy = tried, found
            moved |= {up[0], down[0]}
        return best

    @property
    def _smallest_rule(self) -> Retention:
        return min(self._rules(), key=self.size_of)

    def _offered(self, choice: Choice) -> dict[int, Offer]:
        return {
            block: next(offer for offer in self.offers[block] if offer.rule == rule) for block, rule in choice.items()
        }

    def _rules(self) -> list[Retention]:
        """All rules that a block may have."""
        whole = [KEEP_ALL.written_as(codec_of(keys, values)) for keys, values in product(self.menu, self.menu)]
        return whole if self.trimmed is None else [*whole, self.trimmed]

    def _neighbours(self, rule: Retention) -> Iterator[Retention]:
        """Rules that are one step away: the next form of one side, or trimmed positions."""
        if rule == self.trimmed:
            yield KEEP_ALL.written_as(codec_of(self.menu[-1], self.menu[-1]))
            return
        for form, other in [*pairwise(self.menu), *pairwise(self.menu[::-1])]:
            if rule.codec.keys == form:
                yield KEEP_ALL.written_as(codec_of(other, rule.codec.values))
            if rule.codec.values == form:
                yield KEEP_ALL.written_as(codec_of(rule.codec.keys, other))
        if self.trimmed is not None:
            yield self.trimmed


def written(side: Side, form: Form) -> Retention:
    """The rule that sends all positions, with one side in a form and the other one as it is."""
    return KEEP_ALL.written_as(codec_of(form, "none") if side == "keys" else codec_of("none", form))


def codec_of(keys: Form, values: Form) -> Codec:
    """The codec of two forms. Integer forms are rotated, which costs no byte; attention sinks are not rounded."""
    if keys == values == "none":
        return NO_CODEC
    return Codec(keys, values, rotate_keys=keys.startswith("int"), rotate_values=values.startswith("int"), exact=SINKS)
