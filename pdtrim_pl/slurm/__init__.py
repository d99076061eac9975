"""SLURM: describes a job, renders its script, checks it and submits it. Imports no torch."""

from pdtrim_pl.slurm.commands import SlurmError
from pdtrim_pl.slurm.job import JobRequest
from pdtrim_pl.slurm.render import render
from pdtrim_pl.slurm.running import RunningJob

__all__ = ["JobRequest", "RunningJob", "SlurmError", "render"]
