"""The types that a plan is made of: stages, relations, boundaries, removals, model reference. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

Stage = Literal["prefill", "decode"]
Target = Literal["prefill", "decode", "both"]
Relation = Literal["nested", "unified", "prefill_only", "free"]
Boundary = Literal["prefill", "decode"]
Action = Literal["drop", "merge"]

STAGES: tuple[Stage, ...] = get_args(Stage)
ONLY_TARGET: Mapping[Relation, Target] = MappingProxyType({"unified": "both", "prefill_only": "prefill"})
"""Relations that allow only one target of removals -> that target."""


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


@dataclass(frozen=True)
class Removal:
    """One entry of a plan's history: a block that left one stage, and why."""

    round: int
    """Round of removal, from 0."""
    stage: Stage
    action: Action
    block: int
    """Original index of the block that left."""
    criterion: str
    """Name of the criterion that chose it."""
    score: float | None
    """Score of the criterion: lower means less harm. None if nothing was scored."""
