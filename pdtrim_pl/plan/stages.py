"""The types that a plan is made of: stages, relations, boundaries, removals, model reference. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Stage = Literal["prefill", "decode"]
Target = Literal["prefill", "decode", "both"]
Relation = Literal["nested", "unified", "prefill_only", "free"]
Boundary = Literal["prefill", "decode"]
Layout = Literal["compact", "padded"]
"""How the checkpoints of an export hold their blocks, see `PlannedStages.held`."""
ExportWidths = Literal["uniform", "per_block"]
"""How wide the blocks of an export are, see `PlannedStages.exported_widths`."""
Action = Literal["drop", "merge", "narrow"]
Part = Literal["channels", "heads"]
"""The parts of a block that can leave one by one: MLP channels, and query heads."""

STAGES: tuple[Stage, ...] = get_args(Stage)
PARTS: tuple[Part, ...] = get_args(Part)
ONLY_TARGET: Mapping[Relation, Target] = MappingProxyType({"unified": "both", "prefill_only": "prefill"})
"""Relations that allow only one target of removals -> that target."""
WITH_KV_ONLY: tuple[Relation, ...] = ("prefill_only", "free")
"""Relations under which decode may run blocks that prefill does not."""


@dataclass(frozen=True)
class ModelRef:
    """The original model that a plan is for."""

    name_or_path: str
    """Hub id, path or embedded name that the model was loaded from."""
    model_type: str
    """`config.model_type` of transformers."""
    num_blocks: int
    """Number of decoder blocks of the original model."""
    architecture: str | None = None
    """Class path of the adapter of the model's family; None for an adapter of this package."""
    channels: int | None = None
    """Number of MLP channels of every block; None if unknown."""
    heads: int | None = None
    """Number of query heads of every block; None if unknown."""
    kv_heads: int | None = None
    """Number of key/value heads of every block. Each serves `heads / kv_heads` query heads."""

    @property
    def sizes(self) -> dict[Part, int | None]:
        """Channels and query heads of every block; None if unknown."""
        return {"channels": self.channels, "heads": self.heads}

    def groups(self, part: Part) -> int:
        """Number of groups that lose equally many units: every key/value head loses the same number of query heads."""
        return (self.kv_heads or 1) if part == "heads" else 1


@dataclass(frozen=True)
class Removal:
    """One entry of a plan's history: what left one stage, and why."""

    round: int
    """Round of removal, from 0."""
    stage: Stage
    action: Action
    block: int
    """Original index of the block that left, or that got narrower."""
    criterion: str
    """Name of the criterion that chose it."""
    score: float | None
    """Score of the criterion: lower means less harm. None if nothing was scored."""
    left: int | None = None
    """Number of channels or query heads that a narrowed block has left; None for drops and merges."""
    part: Part | None = None
    """The part that a narrowed block lost; None for drops and merges."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. `left` and `part` are left out for drops and merges."""
        return {name: value for name, value in vars(self).items() if value is not None or name == "score"}
