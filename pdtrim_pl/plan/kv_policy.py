"""The KV retention policy: which prompt positions' keys and values cross the wire. The only truth about retention.

Imports no torch, so another engine can apply a policy file with this module alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.json_files import check_format, read_json, write_whole
from pdtrim_pl.plan.stage_plan import StagePlan
from pdtrim_pl.plan.stages import Boundary

Keep = Literal["all", "first_last"]
POLICY_FORMAT = "pdtrim.kv_policy/1"
POLICY_FILE = "kv_policy.json"
BYTES_PER_ELEMENT: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
REPORTED_PROMPTS = (128, 1024, 8192)


@dataclass(frozen=True, eq=False)
class Retention:
    """What one block sends: every prompt position, or the first and the last ones.

    `first` and `last` count tokens when they are integers and are shares of the prompt, rounded up, when they are
    floats in (0, 1]. A share is read as the decimal it is written as, so 0.07 of 100 tokens is 7.

    Raises:
        UserError: a count or share out of range, or a rule that could keep nothing.
    """

    keep: Keep = "all"
    first: int | float = 0
    last: int | float = 0

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise UserError(f"`keep` is {self.keep!r}, not one of {', '.join(get_args(Keep))}.")
        for name, value in (("first", self.first), ("last", self.last)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            share = isinstance(value, float) and 0.0 < value <= 1.0
            if not whole and not share:
                raise UserError(
                    f"`{name}` is {value!r}: give a number of tokens (an integer >= 0) or a share of the prompt "
                    "(a float in (0, 1])."
                )
        if self.keep == "all" and (self.first or self.last):
            raise UserError("`first` and `last` belong to `keep: first_last`, not to `keep: all`.")
        if self.keep == "first_last" and not (self.first or self.last):
            raise UserError("`keep: first_last` with `first: 0` and `last: 0` would send nothing: raise one of them.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Retention) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    @property
    def _parts(self) -> tuple[object, ...]:
        """The count 1 and the share 1.0 are equal numbers and different rules."""
        return self.keep, type(self.first), self.first, type(self.last), self.last

    def counts(self, positions: int) -> tuple[int, int]:
        """How many of the first and of the last `positions` are sent; they never overlap."""
        if self.keep == "all":
            return positions, 0
        first = min(_tokens(self.first, positions), positions)
        return first, min(_tokens(self.last, positions), positions - first)

    def kept(self, positions: int) -> int:
        """How many of `positions` prompt positions are sent."""
        return sum(self.counts(positions))

    def to_json(self) -> dict[str, Any]:
        """The rule's keys in `kv_policy.json`. A share of 1.0 is written as `all`, for JSON has one kind of number."""
        if self.keep == "all" or 1.0 in [v for v in (self.first, self.last) if isinstance(v, float)]:
            return {"keep": "all"}
        return {"keep": self.keep, "first": self.first, "last": self.last}


KEEP_ALL = Retention()


@dataclass(frozen=True)
class KVShape:
    """Shape of one block's keys (and values) per position."""

    num_key_value_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    """Element type on the wire: a key of `BYTES_PER_ELEMENT`."""

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_PER_ELEMENT:
            raise UserError(f"`kv.dtype` is {self.dtype!r}, not one of {', '.join(BYTES_PER_ELEMENT)}.")
        if self.num_key_value_heads < 1 or self.head_dim < 1:
            raise UserError(f"`kv` needs at least one head and one dimension, got {self}.")

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position's key and value in one block."""
        return 2 * self.num_key_value_heads * self.head_dim * BYTES_PER_ELEMENT[self.dtype]


@dataclass(frozen=True)
class KVRetentionPolicy:
    """One `Retention` for every block of D. A block without a rule of its own sends everything."""

    boundary: Boundary
    kv: KVShape
    rules: Mapping[int, Retention] = field(default_factory=lambda: MappingProxyType({}))
    """Original block index -> its rule."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", MappingProxyType(dict(sorted(self.rules.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        return KVRetentionPolicy, (self.boundary, self.kv, dict(self.rules))  # a read-only mapping cannot be pickled

    def rule(self, block: int) -> Retention:
        """The rule of one block, by original index."""
        return self.rules.get(block, KEEP_ALL)

    def check(self, plan: StagePlan) -> None:
        """Refuse a policy that speaks of another plan.

        Raises:
            UserError: a rule for a block outside D, or another boundary.
        """
        outside = sorted(set(self.rules) - set(plan.decode))
        if outside:
            raise UserError(
                f"The KV policy has rules for block(s) {outside}, which decode does not run. Blocks in D: "
                f"{list(plan.decode)}. Remove the rules, or use `restricted_to(plan)`."
            )
        if self.boundary != plan.boundary:
            raise UserError(f"The KV policy has `boundary: {self.boundary}` and the plan `boundary: {plan.boundary}`.")

    def restricted_to(self, plan: StagePlan) -> KVRetentionPolicy:
        """The same rules for the blocks that are still in the plan's D."""
        rules = {block: rule for block, rule in self.rules.items() if block in plan.decode}
        return replace(self, boundary=plan.boundary, rules=rules)

    def sent_bytes(self, plan: StagePlan, prompt_tokens: int) -> int:
        """Bytes of one request's KV on the wire, for a prompt of `prompt_tokens` tokens."""
        positions = handled_positions(prompt_tokens, plan.boundary)
        return self.kv.bytes_per_position * sum(self.rule(block).kept(positions) for block in plan.decode)

    def full_bytes(self, plan: StagePlan, prompt_tokens: int) -> int:
        """Bytes the unpruned model would send for the same positions."""
        return self.kv.bytes_per_position * plan.model.num_blocks * handled_positions(prompt_tokens, plan.boundary)

    def reduction(self, plan: StagePlan, prompts: Sequence[int] = REPORTED_PROMPTS) -> list[dict[str, Any]]:
        """Rows of `kv_policy.json`'s `reduction`, one a prompt length."""
        rows = []
        for tokens in prompts:
            full, sent = self.full_bytes(plan, tokens), self.sent_bytes(plan, tokens)
            ratio = round(full / sent, 4) if sent else None
            rows.append({"prompt_tokens": tokens, "full_bytes": full, "sent_bytes": sent, "ratio": ratio})
        return rows

    def to_json(self, plan: StagePlan) -> dict[str, Any]:
        """The policy as the `pdtrim.kv_policy/1` object, with positions in the exported checkpoints of `plan`."""
        self.check(plan)
        prefill = {block: position for position, block in enumerate(plan.prefill)}
        blocks = [
            {"original": block, "prefill": prefill.get(block), "decode": position, **self.rule(block).to_json()}
            for position, block in enumerate(plan.decode)
        ]
        return {
            "format": POLICY_FORMAT,
            "boundary": self.boundary,
            "kv": vars(self.kv).copy(),
            "blocks": blocks,
            "reduction": self.reduction(plan),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KVRetentionPolicy:
        """Read a `pdtrim.kv_policy/1` object.

        Raises:
            UserError: wrong format or version, missing keys, or a rule out of range.
        """
        check_format(data, POLICY_FORMAT, "KV policy")
        try:
            rules = {
                entry["original"]: Retention(entry["keep"], entry.get("first", 0), entry.get("last", 0))
                for entry in data["blocks"]
            }
            return cls(data["boundary"], KVShape(**data["kv"]), rules)
        except (KeyError, TypeError) as error:
            raise UserError(f"The KV policy is malformed near {error}. Write it with `save`.") from error

    def save(self, path: Path, plan: StagePlan) -> None:
        """Write the policy as indented JSON."""
        write_whole(path, json.dumps(self.to_json(plan), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path, plan: StagePlan | None = None) -> KVRetentionPolicy:
        """Read a policy file and, where a plan is given, check that they fit."""
        data = read_json(path, "KV policy")
        try:
            policy = cls.from_json(data)
            if plan is not None:
                policy.check(plan)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        return policy


def handled_positions(prompt_tokens: int, boundary: Boundary) -> int:
    """Prompt positions the prefill node handles: the last one is decode's under `boundary: decode`."""
    return prompt_tokens if boundary == "prefill" else max(prompt_tokens - 1, 0)


def _tokens(value: int | float, positions: int) -> int:
    return value if isinstance(value, int) else ceil(Fraction(repr(value)) * positions)
