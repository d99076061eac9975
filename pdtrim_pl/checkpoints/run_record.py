"""The record of a run: it is saved in checkpoints and shown in the report of the export. Imports no torch."""

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
    """Facts of a run, in the order in which they happened."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """(optimizer step, training loss). Beyond MAX_LOSS_POINTS points, every second point is dropped."""
    loss_stride: int = 1
    """Only steps that are multiples of this number are kept."""
    validations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(optimizer step, {"ppl", "kl", "agreement", ...})."""
    removals: list[tuple[int, Removal]] = field(default_factory=list)
    """(optimizer step, removal)."""
    redundancy: dict[Stage, dict[int, float]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    """Per stage: block -> mean cosine similarity of its input and output, measured in the first round."""
    attention_mass: dict[int, float] = field(default_factory=dict)
    """Block of D -> share of its attention to the prompt that goes to the first and last positions."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Seeds, data fingerprints and versions, as JSON values."""

    def add_loss(self, step: int, loss: float) -> None:
        """Add a training loss. A loss that is not finite is left out: JSON and plots cannot show it."""
        if step % self.loss_stride or not isfinite(loss):
            return
        self.losses.append((step, loss))
        if len(self.losses) > MAX_LOSS_POINTS:
            self.loss_stride *= 2
            self.losses = [point for point in self.losses if point[0] % self.loss_stride == 0]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunRecord:
        """Read what `to_json` wrote. Keys of mappings may be strings, as JSON makes them."""
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
    """Refuse an invalid name of a run. The name becomes part of file names and patterns.

    Raises:
        UserError: the name is not a string of at most 64 letters, digits, `_` and `-`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", name):
        raise UserError(
            f"`run` is {name!r}: a run's name has at most 64 letters, digits, _ and -. The file was changed by hand, "
            "or is none of this package; continue from another checkpoint."
        )
