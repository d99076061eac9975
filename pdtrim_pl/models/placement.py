"""Where the teacher lives: settings of the module. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdtrim_pl.errors import UserError

Placement = Literal["auto", "copy", "shared", "sharded", "offline"]


@dataclass(frozen=True)
class TeacherPlace:
    """Where the teacher lives while the student trains."""

    placement: Placement = "auto"
    """`copy`: a model of its own on every device. `sharded`: the same, cut up by ZeRO-3 or FSDP. `shared`: the
    student's frozen weights with all blocks and without adapters, for `trainable: lora`. `offline`: no teacher, but
    what `pdtrim cache-teacher` wrote. `auto` is `sharded` where the strategy shards weights. Elsewhere it is `copy`, or
    what else is possible if a copy does not fit; the log says why."""
    cache: Path | None = None
    """Folder that `pdtrim cache-teacher` wrote, for `offline` and `auto`."""

    def __post_init__(self) -> None:
        if self.placement == "offline" and self.cache is None:
            raise UserError(
                "`teacher.placement: offline` needs `teacher.cache`: the folder that `pdtrim cache-teacher --config "
                "run.yaml --output DIR` wrote."
            )
        if self.cache is not None and self.placement not in ("offline", "auto"):
            raise UserError(
                f"`teacher.cache` is {self.cache}, and `teacher.placement: {self.placement}` reads none. Set "
                "`placement: offline`, or leave `cache` out."
            )
