"""Bit allocation: choose the bits of keys and values of each block, for the least damage within a number of bytes.

A *part* is the keys or the values of one block. The damage of the two coarsest forms is measured for each part, under
the contract. The damage of finer forms is extrapolated: with every bit, rounding noise and KL fall by a factor of four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pdtrim_pl.plan import NO_CODEC, Codec, Retention, handled_positions
from pdtrim_pl.plan.codec import Form
from pdtrim_pl.selectors.base import SelectionContext

Side = Literal["keys", "values"]
Part = tuple[int, Side]
Choice = Mapping[Part, Form]
NOISE_BITS: Mapping[Form, float] = {"none": 16.0, "fp8": 5.0, "int8": 8.0, "int4": 4.0, "int3": 3.0, "int2": 2.0}
"""Bits of the integer form with the same rounding noise. e4m3 keeps three bits of mantissa at every magnitude."""
MEASURED = 2
"""Number of forms that are measured for each part: the coarsest ones."""
STEPS = 60
"""Number of bisection steps on the price of a byte."""


@dataclass
class Allocation:
    """Chooses a form for every part.

    Args:
        context: context of the selector.
        forms: forms that a part may have, besides `none`.
        prompt_tokens: length of the prompt for which bytes are counted.
        examples: number of calibration requests to measure damage on; as many requests that repeat their prompt are
            added.
    """

    context: SelectionContext
    forms: Sequence[Form]
    prompt_tokens: int
    examples: int = 8
    damages: dict[Part, dict[Form, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts: list[Part] = [(block, side) for block in self.context.plan.decode for side in ("keys", "values")]
        self.menu: list[Form] = sorted({"none", *self.forms}, key=lambda form: -NOISE_BITS[form])
        self._bytes = {(side, form): self._part_bytes(side, form) for side in ("keys", "values") for form in self.menu}

    def rules(self, choice: Choice) -> dict[int, Retention]:
        """The rules of a choice. A block whose parts are both `none` has no rule."""
        codecs = {block: codec_of(choice[block, "keys"], choice[block, "values"]) for block in self.context.plan.decode}
        return {block: Retention(codec=codec) for block, codec in codecs.items() if not codec.is_none}

    def bytes_of(self, choice: Choice) -> int:
        """Bytes of one request under a choice."""
        return sum(self._bytes[side, form] for (_, side), form in choice.items())

    def energy(self, choice: Choice) -> float:
        """KL(teacher || student) under a choice, nats. Every rank must call it."""
        return self.context.energy(self.rules(choice), self.examples)

    def measure(self) -> None:
        """Measure the damage of every part alone. Every rank must call it."""
        nothing: dict[Part, Form] = dict.fromkeys(self.parts, "none")
        base, coarse = self.energy(nothing), self.menu[-MEASURED:]
        for part in self.parts:
            found = {form: self.energy({**nothing, part: form}) - base for form in coarse}
            finest = coarse[0]
            for form in self.menu:
                bits = NOISE_BITS[form] - NOISE_BITS[finest]
                value = found.get(form, found[finest] * 4.0**-bits)
                self.damages.setdefault(part, {})[form] = 0.0 if form == "none" else max(value, 0.0)

    def cheapest(self, budget: float) -> dict[Part, Form]:
        """The choice of least predicted damage within `budget` bytes; the coarsest choice if none is small enough.

        Bisection finds one price of a byte for all parts (Lagrange multiplier). The rest of the budget is then spent
        where a byte reduces the damage most.
        """
        low, high = 1e-18, 1e6
        best = dict.fromkeys(self.parts, self.menu[-1])
        for _ in range(STEPS):
            price = (low * high) ** 0.5
            choice = {part: self._best_form(part, price) for part in self.parts}
            if self.bytes_of(choice) > budget:
                low = price
            else:
                high, best = price, choice
        return self.filled_up(best, budget)

    def exchanged(self, choice: Choice, budget: float) -> dict[Part, Form]:
        """Exchange bits: make one part finer and another one coarser, as long as the joint energy falls.

        The saving of a finer form and the cost of a coarser one are measured once for every part, with all other parts
        as chosen. Every rank must call it.
        """
        best, energy = dict(choice), self.energy(choice)
        saves = self._steps(best, -1, energy)
        costs = self._steps(best, +1, energy)
        sums = ((saves[up] + costs[down], up, down) for up in saves for down in costs if up != down)
        pairs = sorted(sums, key=lambda pair: pair[0])
        moved: set[Part] = set()
        for gain, up, down in pairs:
            if gain >= 0:
                break
            if moved & {up, down}:
                continue
            tried = {**best, up: self._neighbour(best[up], -1), down: self._neighbour(best[down], +1)}
            if self.bytes_of(tried) > budget:
                continue
            found = self.energy(tried)
            if found >= energy:
                break
            best, energy = tried, found
            moved |= {up, down}
        return best

    def _steps(self, choice: Choice, step: int, energy: float) -> dict[Part, float]:
        """For each part that has a next form: the change of the joint energy if only this part takes it."""
        changed = {part: {**choice, part: form} for part, form in self._neighbours(choice, step).items()}
        return {part: self.energy(other) - energy for part, other in changed.items()}

    def _neighbours(self, choice: Choice, step: int) -> dict[Part, Form]:
        found = {part: self._neighbour(form, step) for part, form in choice.items()}
        return {part: form for part, form in found.items() if form != choice[part]}

    def _neighbour(self, form: Form, step: int) -> Form:
        """The next finer (-1) or coarser (+1) form; the same form at the end of the menu."""
        return self.menu[min(max(self.menu.index(form) + step, 0), len(self.menu) - 1)]

    def _best_form(self, part: Part, price: float) -> Form:
        return min(self.menu, key=lambda form: self.damages[part][form] + price * self._bytes[part[1], form])

    def filled_up(self, choice: dict[Part, Form], budget: float) -> dict[Part, Form]:
        """Make parts finer, one after the other, where a byte reduces the damage most, up to `budget` bytes."""
        while True:
            left = budget - self.bytes_of(choice)
            offers = [
                ((self.damages[part][choice[part]] - self.damages[part][form]) / more, part, form)
                for part, form in self._neighbours(choice, -1).items()
                if 0 < (more := self._bytes[part[1], form] - self._bytes[part[1], choice[part]]) <= left
            ]
            if not offers:
                return choice
            _, part, form = max(offers, key=lambda offer: offer[0])
            choice = {**choice, part: form}

    def _part_bytes(self, side: Side, form: Form) -> int:
        positions = handled_positions(self.prompt_tokens, self.context.plan.boundary)
        keys, values = codec_of(form, form).part_bytes(positions, *self.context.kv_shape.sizes)
        return keys if side == "keys" else values


def codec_of(keys: Form, values: Form) -> Codec:
    """The codec of two forms. Integer forms rotate before rounding: this costs no byte and halves the KL."""
    if keys == values == "none":
        return NO_CODEC
    return Codec(keys, values, rotate_keys=keys.startswith("int"), rotate_values=values.startswith("int"))
