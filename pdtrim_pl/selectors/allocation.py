"""How many bits keys and values of each block get, for a number of bytes: the least damage.

A *part* is the keys or the values of one block. Damages of the two coarsest forms are measured part by part, under the
contract; those of finer forms follow from them, for rounding noise falls by four with every bit, and the KL with it.
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
"""Bits of an integer form that rounds as coarsely; e4m3 keeps three bits of a number, whatever its size."""
MEASURED = 2
"""Forms of a part that are measured, the coarsest ones."""
STEPS = 60
"""Halvings of the interval of prices."""


@dataclass
class Allocation:
    """Chooses a form for every part.

    Args:
        context: of the selector.
        forms: what a part may be written as, besides `none`.
        prompt_tokens: length of the prompt at which bytes are counted.
        examples: requests that damages are measured on, and as many that repeat their prompt.
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
        """The rules of a choice; a block whose parts both cross as they are has none."""
        codecs = {block: codec_of(choice[block, "keys"], choice[block, "values"]) for block in self.context.plan.decode}
        return {block: Retention(codec=codec) for block, codec in codecs.items() if not codec.is_none}

    def bytes_of(self, choice: Choice) -> int:
        """Bytes of one request."""
        return sum(self._bytes[side, form] for (_, side), form in choice.items())

    def energy(self, choice: Choice) -> float:
        """KL to the teacher under a choice, nats; every rank must call it."""
        return self.context.energy(self.rules(choice), self.examples)

    def measure(self) -> None:
        """Measure every part alone; every rank must call it."""
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
        """The choice of least predicted damage that takes at most `budget` bytes; the coarsest where none is so small.

        One price for a byte, found by bisection (Lagrange); what is left of the budget goes where a byte helps most.
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
        """Give one part a finer form and another one a coarser, as long as the joint energy falls; all ranks together.

        What one step up saves and one step down costs is measured once for every part, with all others as chosen.
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
        """Change of the joint energy if a part alone takes the next form, for all parts that can."""
        changed = {part: {**choice, part: form} for part, form in self._neighbours(choice, step).items()}
        return {part: self.energy(other) - energy for part, other in changed.items()}

    def _neighbours(self, choice: Choice, step: int) -> dict[Part, Form]:
        found = {part: self._neighbour(form, step) for part, form in choice.items()}
        return {part: form for part, form in found.items() if form != choice[part]}

    def _neighbour(self, form: Form, step: int) -> Form:
        """The next finer (-1) or coarser (+1) form; itself at the end."""
        return self.menu[min(max(self.menu.index(form) + step, 0), len(self.menu) - 1)]

    def _best_form(self, part: Part, price: float) -> Form:
        return min(self.menu, key=lambda form: self.damages[part][form] + price * self._bytes[part[1], form])

    def filled_up(self, choice: dict[Part, Form], budget: float) -> dict[Part, Form]:
        """Finer forms for a choice, one after the other where a byte helps most, up to `budget` bytes."""
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
    """The codec of two forms: what is rounded to integers is rotated before, which costs no byte and halves the KL."""
    if keys == values == "none":
        return NO_CODEC
    return Codec(keys, values, rotate_keys=keys.startswith("int"), rotate_values=values.startswith("int"))
