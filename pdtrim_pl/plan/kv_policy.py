"""The KV retention policy: which keys and values prefill sends to decode, and how they are encoded.

Imports no torch, so another engine can apply a policy file with this module alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.codec import NO_CODEC
from pdtrim_pl.plan.json_files import check_format, read_json, write_whole
from pdtrim_pl.plan.retention import KEEP_ALL, Retention
from pdtrim_pl.plan.stage_plan import StagePlan
from pdtrim_pl.plan.stages import STAGES, Boundary

POLICY_FORMAT = "pdtrim.kv_policy/2"
FIRST_POLICY_FORMAT = "pdtrim.kv_policy/1"
"""The first version has no codecs. This package still reads it."""
POLICY_FILE = "kv_policy.json"
BYTES_PER_ELEMENT: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
REPORTED_PROMPTS = (128, 1024, 8192)


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
    def sizes(self) -> tuple[int, int, int]:
        """Key/value heads, head dimension and bytes of an element: arguments of `Codec.row_bytes`."""
        return self.num_key_value_heads, self.head_dim, BYTES_PER_ELEMENT[self.dtype]

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

    @property
    def sends_everything(self) -> bool:
        """Whether every position of every block is sent as it is."""
        return all(rule.is_whole for rule in self.rules.values())

    def rule(self, block: int) -> Retention:
        """The rule of one block, by original index."""
        return self.rules.get(block, KEEP_ALL)

    def check(self, plan: StagePlan) -> None:
        """Refuse a policy that was made for another plan.

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
        return sum(self.block_bytes(block, positions) for block in plan.decode)

    def block_bytes(self, block: int, positions: int) -> int:
        """Bytes of one block's KV on the wire, if the prefill node handled `positions` prompt positions."""
        return self.rule(block).bytes_sent(positions, *self.kv.sizes)

    def codecs(self, plan: StagePlan) -> dict[str, list[int]]:
        """Description of each codec -> original indices of the blocks of D that use it, ascending.

        Blocks without a codec are left out.
        """
        found: dict[str, list[int]] = {}
        for block in plan.decode:
            if not self.rule(block).codec.is_none:
                found.setdefault(str(self.rule(block).codec), []).append(block)
        return dict(sorted(found.items()))

    def uncoded(self) -> KVRetentionPolicy:
        """The same positions without codecs: keys and values are sent in the element type of the cache."""
        return replace(self, rules={block: rule.written_as(NO_CODEC) for block, rule in self.rules.items()})

    def full_bytes(self, plan: StagePlan, prompt_tokens: int) -> int:
        """Bytes that the unpruned model sends for a prompt of `prompt_tokens` tokens."""
        return self.kv.bytes_per_position * plan.model.num_blocks * handled_positions(prompt_tokens, plan.boundary)

    def reduction(self, plan: StagePlan, prompts: Sequence[int] = REPORTED_PROMPTS) -> list[dict[str, Any]]:
        """The rows of `reduction` in `kv_policy.json`, one for each prompt length in `prompts`."""
        rows = []
        for tokens in prompts:
            full, sent = self.full_bytes(plan, tokens), self.sent_bytes(plan, tokens)
            ratio = round(full / sent, 4) if sent else None
            rows.append({"prompt_tokens": tokens, "full_bytes": full, "sent_bytes": sent, "ratio": ratio})
        return rows

    def to_json(self, plan: StagePlan) -> dict[str, Any]:
        """The policy as the `pdtrim.kv_policy/2` object, with positions in the exported checkpoints of `plan`."""
        self.check(plan)
        prefill, decode = ({block: at for at, block in enumerate(plan.held(stage))} for stage in STAGES)
        blocks = [
            {"original": block, "prefill": prefill.get(block), "decode": decode[block], **self.rule(block).to_json()}
            for block in plan.decode
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
        """Read a `pdtrim.kv_policy/2` object, or one of version 1 (without codecs).

        Raises:
            UserError: wrong format or version, missing keys, or a rule out of range.
        """
        if not isinstance(data, Mapping) or data.get("format") != FIRST_POLICY_FORMAT:
            check_format(data, POLICY_FORMAT, "KV policy")
        try:
            rules = {entry["original"]: Retention.from_json(entry) for entry in data["blocks"]}
            return cls(data["boundary"], KVShape(**data["kv"]), rules)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"The KV policy is malformed near {error}. Write it with `save`.") from error

    def save(self, path: Path, plan: StagePlan) -> None:
        """Write the policy as indented JSON."""
        write_whole(path, json.dumps(self.to_json(plan), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path, plan: StagePlan | None = None) -> KVRetentionPolicy:
        """Read a policy file. With `plan`, also check that the policy fits it.

        Raises:
            UserError: the file is missing, malformed or for another plan. The message names the file.
        """
        data = read_json(path, "KV policy")
        try:
            policy = cls.from_json(data)
            if plan is not None:
                policy.check(plan)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        return policy


def handled_positions(prompt_tokens: int, boundary: Boundary) -> int:
    """Number of prompt positions that prefill handles. Under `boundary: decode`, decode handles the last one."""
    return prompt_tokens if boundary == "prefill" else max(prompt_tokens - 1, 0)
