"""SLURM from the command line: describe a job, render its script, check it, submit it. Imports no torch."""

from pdtrim_pl.slurm.commands import SlurmError
from pdtrim_pl.slurm.job import JobRequest
from pdtrim_pl.slurm.render import render
from pdtrim_pl.slurm.running import RunningJob

__all__ = ["JobRequest", "RunningJob", "SlurmError", "render"]
