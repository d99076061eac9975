"""Settings of the module: the plan and the policy that a run starts from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdtrim_pl.plan.stages import Boundary, Relation


@dataclass(frozen=True)
class Structure:
    """The plan and the policy that a run starts from."""

    relation: Relation = "nested"
    """How the blocks of the two stages relate."""
    boundary: Boundary = "prefill"
    """Which stage handles the prompt's last token."""
    plan: Path | None = None
    """A `stage_plan.json` to start from instead of the full plan. Its relation and boundary replace those above."""
    policy: Path | None = None
    """A `kv_policy.json` to start from instead of sending everything."""
