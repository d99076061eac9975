"""Codecs: how keys and values of one block are encoded on the wire, and the size in bytes. Imports no torch.

docs/formats.md describes every byte of the format. Shapes: c kept positions of one row, K key/value heads,
D head dimension, b bits of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Any, Literal, get_args

from pdtrim_pl.errors import UserError

Form = Literal["none", "fp8", "int8", "int4", "int3", "int2"]
FORMS: tuple[Form, ...] = get_args(Form)
CODE_BITS: Mapping[str, int] = MappingProxyType({"int8": 8, "int4": 4, "int3": 3, "int2": 2})
PARAMETER_BYTES = 2
"""Bytes of the parameters of one group in an integer form: one byte for its step, one for its centre."""
GROUP = 64
"""Number of positions of a group by default."""
SCALE_BYTES = 2
"""Bytes of one bf16 number: a head's scale or largest step, or a channel's mean."""


@dataclass(frozen=True)
class Codec:
    """How a block encodes the positions that it keeps.

    The integer forms are asymmetric: keys have a step and a centre per channel for every `group` positions, values
    have them per position and head. `fp8` is e4m3 with one scale per head and row. `none` writes the element type of
    the cache.

    Raises:
        UserError: an unknown form, a group below 1, or a rotation or exact positions together with the form `none`.
    """

    keys: Form = "none"
    values: Form = "none"
    rotate_keys: bool = False
    """Rotate every key by an orthonormal Hadamard matrix before it is rounded."""
    rotate_values: bool = False
    group: int = GROUP
    """Number of positions that share the step and the centre of a key channel. Keys in other forms have no groups: then
    it is the default."""
    exact: int = 0
    """Number of first positions that are sent in the element type of the cache. The first token of a prompt is an
    attention sink: its keys are much larger than all others, and would make the steps of their group coarse."""

    def __post_init__(self) -> None:
        for name, form, rotated in (("keys", self.keys, self.rotate_keys), ("values", self.values, self.rotate_values)):
            if form not in FORMS:
                raise UserError(f"`codec.{name}` is {form!r}, not one of {', '.join(FORMS)}.")
            if rotated and form == "none":
                raise UserError(
                    f"`codec.rotate` names {name}, which `codec.{name}: none` does not round: leave it out."
                )
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise UserError(f"`codec.group` is {self.group!r}: give a number of positions, at least 1.")
        if isinstance(self.exact, bool) or not isinstance(self.exact, int) or self.exact < 0:
            raise UserError(f"`codec.exact` is {self.exact!r}: give a number of positions, at least 0.")
        if self.keys not in CODE_BITS:
            object.__setattr__(self, "group", GROUP)  # nothing is grouped: codecs that write the same are equal
        if self.exact and self.is_none:
            raise UserError("`codec.exact` names positions, and `codec` rounds none: leave it out.")

    @property
    def is_none(self) -> bool:
        """Whether keys and values are both sent in the element type of the cache."""
        return self.keys == self.values == "none"

    def row_bytes(self, positions: int, heads: int, width: int, element_bytes: int) -> int:
        """Bytes of the keys and values of one row in one block.

        Args:
            positions: number of kept positions, c.
            heads: key/value heads, K.
            width: head dimension, D.
            element_bytes: bytes of one element of the cache.
        """
        return sum(self.part_bytes(positions, heads, width, element_bytes))

    def part_bytes(self, positions: int, heads: int, width: int, element_bytes: int) -> tuple[int, int]:
        """Bytes of the keys and bytes of the values; arguments as of `row_bytes`."""
        if not positions:
            return 0, 0
        exact = min(self.exact, positions)
        whole, positions = exact * heads * width * element_bytes, positions - exact
        elements = positions * heads * width
        groups = ceil(positions / self.group) * heads * width
        keys = heads * width * SCALE_BYTES + groups * PARAMETER_BYTES
        values = positions * heads * PARAMETER_BYTES
        return (
            whole + _stream_bytes(self.keys, elements, heads, keys, element_bytes),
            whole + _stream_bytes(self.values, elements, heads, values, element_bytes),
        )

    def to_json(self) -> dict[str, Any]:
        """The value of `codec` in `kv_policy.json`. `rotate` and `group` are left out where they change nothing."""
        out: dict[str, Any] = {"keys": self.keys, "values": self.values}
        rotated = [name for name, on in (("keys", self.rotate_keys), ("values", self.rotate_values)) if on]
        if rotated:
            out["rotate"] = rotated
        if self.keys in CODE_BITS:
            out["group"] = self.group
        if self.exact:
            out["exact"] = self.exact
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Codec:
        """Read what `to_json` wrote.

        Raises:
            UserError: an unknown key or value.
        """
        unknown = sorted(set(data) - {"keys", "values", "rotate", "group", "exact"})
        rotate = list(data.get("rotate", ()))
        if unknown or not set(rotate) <= {"keys", "values"}:
            raise UserError(
                f"`codec` has {unknown or rotate}: use keys, values, rotate (a list of them), group and exact."
            )
        return cls(
            data.get("keys", "none"), data.get("values", "none"), "keys" in rotate, "values" in rotate,
            data.get("group", GROUP), data.get("exact", 0),
        )  # fmt: skip

    def __str__(self) -> str:
        return "none" if self.is_none else f"keys {self.keys}, values {self.values}"


NO_CODEC = Codec()


def _stream_bytes(form: Form, elements: int, heads: int, parameters: int, element_bytes: int) -> int:
    if form == "none" or not elements:
        return elements * element_bytes
    if form == "fp8":
        return heads * SCALE_BYTES + elements
    return heads * SCALE_BYTES + parameters + ceil(elements * CODE_BITS[form] / 8)
