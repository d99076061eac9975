"""The words of a plan: stages, relations, boundaries, and the model and removals it names. Imports no torch."""

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
"""The relations under which blocks can leave one target alone."""


@dataclass(frozen=True)
class ModelRef:
    """The original model a plan speaks of."""

    name_or_path: str
    """Hub id, path or embedded name it was loaded from."""
    model_type: str
    """transformers' `config.model_type`."""
    num_blocks: int
    """Number of decoder blocks of the original model."""
    architecture: str | None = None
    """Class path of the adapter of its family, where it is not the package's own."""


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
    """The criterion's score, lower is less harm; None where nothing was scored."""
