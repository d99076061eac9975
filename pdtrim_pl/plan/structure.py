"""Where a run's structure starts: settings of the module. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdtrim_pl.plan.stages import Boundary, Relation


@dataclass(frozen=True)
class Structure:
    """Where a run's structure starts."""

    relation: Relation = "nested"
    """How the blocks of the two stages relate."""
    boundary: Boundary = "prefill"
    """Which stage handles the prompt's last token."""
    plan: Path | None = None
    """A `stage_plan.json` to start from instead of the full plan; it brings its own relation and boundary."""
    policy: Path | None = None
    """A `kv_policy.json` to start from instead of sending everything."""
