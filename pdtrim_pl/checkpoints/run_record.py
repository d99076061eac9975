"""What a run saw on its way: kept in its checkpoints, shown in the report of its export. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Removal, Stage

MAX_LOSS_POINTS = 2000


@dataclass
class RunRecord:
    """Facts of a run, in the order they happened."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """(optimizer step, training loss); thinned to every second point when it grows past MAX_LOSS_POINTS."""
    loss_stride: int = 1
    """One in so many steps is kept."""
    validations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(optimizer step, {"ppl", "kl", "agreement", ...})."""
    removals: list[tuple[int, Removal]] = field(default_factory=list)
    """(optimizer step, what left which stage)."""
    redundancy: dict[Stage, dict[int, float]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    """Mean cosine between block input and output per stage, of the unpruned model (or the first round seen)."""
    attention_mass: dict[int, float] = field(default_factory=dict)
    """Share of prompt attention on the first and last positions, per block of D."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Seeds, data fingerprints, versions: plain JSON values."""

    def add_loss(self, step: int, loss: float) -> None:
        """Keep one training loss; one that is not finite would end in JSON and pictures that nobody can read."""
        if step % self.loss_stride or not isfinite(loss):
            return
        self.losses.append((step, loss))
        if len(self.losses) > MAX_LOSS_POINTS:
            self.loss_stride *= 2
            self.losses = [point for point in self.losses if point[0] % self.loss_stride == 0]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunRecord:
        """Read what `to_json` wrote, also after a trip through JSON, whose keys are strings."""
        return cls(
            losses=[(int(step), float(loss)) for step, loss in data["losses"]],
            loss_stride=data["loss_stride"],
            validations=[(int(step), dict(values)) for step, values in data["validations"]],
            removals=[(int(step), Removal(**removal)) for step, removal in data["removals"]],
            redundancy={s: {int(k): float(v) for k, v in data["redundancy"][s].items()} for s in STAGES},
            attention_mass={int(k): float(v) for k, v in data["attention_mass"].items()},
            notes=dict(data["notes"]),
        )


def check_run_name(name: object) -> None:
    """Refuse what no run calls itself: the name becomes part of file names and patterns.

    Raises:
        UserError: with the name.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", name):
        raise UserError(
            f"`run` is {name!r}: a run's name has at most 64 letters, digits, _ and -. The file was changed by hand, "
            "or is none of this package; continue from another checkpoint."
        )
