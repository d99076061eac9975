"""Which run wrote an export. That run, continued after a kill, may write it again; no other run may."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pdtrim_pl.checkpoints.run_record import check_run_name
from pdtrim_pl.plan.json_files import write_whole

ORIGIN_FILE = "origin.json"
ORIGIN_FORMAT = "pdtrim.export_origin/1"


@dataclass(frozen=True)
class Origin:
    """A run and its planned end. The same run continued to a later end makes another export."""

    run: str
    """Name that the run gave itself; its checkpoints have it too."""
    max_epochs: int | None
    max_steps: int

    def __post_init__(self) -> None:
        check_run_name(self.run)

    def save(self, export: Path) -> None:
        """Write it into an export."""
        origin = {"format": ORIGIN_FORMAT, **asdict(self)}
        write_whole(export / ORIGIN_FILE, json.dumps(origin, indent=2) + "\n")

    @classmethod
    def of(cls, export: Path) -> Origin | None:
        """Read it from an export; None if there is none that this version can read."""
        try:
            origin = json.loads((export / ORIGIN_FILE).read_text(encoding="utf-8"))
            return cls(**origin) if origin.pop("format") == ORIGIN_FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
