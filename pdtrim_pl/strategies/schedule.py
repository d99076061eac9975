"""How the learning rate runs over a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, inf, pi
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pdtrim_pl.errors import UserError

Decay = Literal["cosine", "linear", "none"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate rises linearly at first, and then falls to zero until the run ends.

    The length of the run comes from the trainer: nothing here must be counted by hand.

    Raises:
        UserError: a setting is out of range.
    """

    warmup: float = 0.03
    """Share of the optimizer steps in which the rate rises, in [0, 1)."""
    decay: Decay = "cosine"
    """Form of the fall; `none` keeps the rate after its rise."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise UserError(f"`schedule.warmup` is {self.warmup}: give a share of the steps, from 0 to below 1.")
        if self.decay not in get_args(Decay):
            raise UserError(f"`schedule.decay` is {self.decay!r}, not one of {', '.join(get_args(Decay))}.")

    def over(self, steps: float, optimizer: Optimizer, rate: float = 1.0) -> LambdaLR:
        """The scheduler of a run; step it after every optimizer step.

        Args:
            steps: number of optimizer steps of the run.
            optimizer: its rates are the highest ones.
            rate: factor of the optimizer's rates.

        Raises:
            UserError: the run has no end, and the schedule needs one.
        """
        if steps == inf:
            raise UserError(
                "`schedule` needs the length of the run, and this one has no end: give `max_steps` or `max_epochs` of "
                "the trainer."
            )
        rising = round(self.warmup * steps)

        def factor(step: int) -> float:
            if step < rising:
                return rate * (step + 1) / (rising + 1)
            done = min((step - rising) / max(steps - rising, 1), 1.0)
            falls = {"cosine": 0.5 * (1 + cos(pi * done)), "linear": 1 - done, "none": 1.0}
            return rate * falls[self.decay]

        return LambdaLR(optimizer, factor)
