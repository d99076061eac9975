"""The SLURM job that this process is a task of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pdtrim_pl.slurm.commands import SlurmError, call


@dataclass(frozen=True)
class RunningJob:
    """A job, seen from inside."""

    id: str
    """Its name for `scontrol` and `squeue`; a task of an array has its own."""
    restarts: int
    """How often SLURM has started it again, for any reason."""

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> RunningJob | None:
        """The job of this process; None outside SLURM."""
        environment = os.environ if environment is None else environment
        if "SLURM_JOB_ID" not in environment:
            return None
        return cls(environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0")))

    def state(self) -> str:
        """SLURM's name for the job's state, such as RUNNING or COMPLETING.

        Raises:
            SlurmError: SLURM does not answer.
        """
        return call(["squeue", "--noheader", "--states=all", f"--jobs={self.id}", "--format=%T"]).strip()

    def requeue(self) -> None:
        """Put the job back into the queue. SLURM ends its processes soon after.

        A job that does not run any more is not requeued: after `scancel`, `scontrol requeue` would bring it back, and a
        job that SLURM itself preempts is already in the queue.

        Raises:
            SlurmError: the job does not run any more, or SLURM refuses (`--no-requeue`, or not a batch job).
        """
        state = self.state()
        if state != "RUNNING":
            raise SlurmError(f"job {self.id} is {state or 'unknown'}, not RUNNING: it was cancelled or is ending.")
        call(["scontrol", "requeue", self.id])
