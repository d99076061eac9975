"""Choose where the teacher lives: what settings allow, and among that what fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.placement import Placement, TeacherPlace
from pdtrim_pl.sizing.load import GIB


@dataclass(frozen=True)
class Allowed:
    """What the settings of a run say of the teacher's place."""

    adapters: bool
    """Whether adapters train and the weights below them do not."""
    same: bool
    """Whether the teacher is the model that is trimmed."""
    shards: bool
    """Whether the strategy shards weights."""
    eight_bits: bool = False
    """Whether the teacher's weights are to be in 8 bits."""

    def places(self, asked: TeacherPlace) -> list[Placement]:
        """The places that are possible, the best one first; the one that was asked for, if there is one.

        Raises:
            UserError: what was asked for is not possible.
        """
        if asked.placement == "auto":
            found: list[Placement] = ["sharded" if self.shards else "copy"]
            if self.adapters and self.same and not self.shards and not self.eight_bits:
                found.append("shared")
            return found if asked.cache is None else [*found, "offline"]
        if asked.placement == "shared":
            self._check_shared()
        if asked.placement == "sharded" and not self.shards:
            raise UserError(
                "`teacher.placement: sharded` needs a strategy that shards weights: PDTrimDeepSpeedStrategy with "
                "`stage: 3`, or PDTrimFSDPStrategy. Use one, or `placement: copy`."
            )
        if asked.placement == "copy" and self.shards:
            raise UserError(
                "`teacher.placement: copy` keeps a whole teacher on every device, and this `trainer.strategy` shards "
                "every model. Use `placement: sharded`, or `strategy: ddp_find_unused_parameters_true`."
            )
        return [asked.placement]

    def _check_shared(self) -> None:
        if not self.adapters:
            raise UserError(
                "`teacher.placement: shared` runs the student's own weights as the teacher, and training changes them. "
                "Use `trainable: lora`, which leaves them as they are, or `placement: copy`."
            )
        if not self.same:
            raise UserError(
                "`teacher.placement: shared` runs the student's own weights, and `loading.teacher` names another "
                "model. Leave it out, or use `placement: copy`."
            )
        if self.eight_bits:
            raise UserError(
                "`teacher.placement: shared` runs the student's own weights, and `loading.teacher_bits` wants others. "
                "Leave it out, or use `placement: copy`."
            )


@dataclass(frozen=True)
class Choice:
    """Where the teacher lives, and why."""

    placement: Placement
    why: str


def choose(places: Sequence[Placement], needs: Callable[[Placement], int], room: int) -> Choice:
    """The first place that fits; if none does, the one that needs least.

    Args:
        places: what is possible, the best one first.
        needs: memory of one process with the teacher at a place, in bytes.
        room: bytes that it may use.
    """
    if len(places) == 1:
        return Choice(places[0], "nothing else is possible with these settings")
    needed = {place: needs(place) for place in places}
    fitting = [place for place in places if needed[place] <= room]
    chosen = fitting[0] if fitting else min(places, key=needed.__getitem__)
    said = ", ".join(f"{place} {need / GIB:.2f}" for place, need in needed.items())
    none = "" if fitting else "; none fits, this one needs least"
    return Choice(chosen, f"GiB needed on a device: {said}; there are {room / GIB:.2f}{none}")
