"""Merges: one block is fitted locally to replace a run of neighbouring blocks. A search may then choose it."""

from pdtrim_pl.merging.exchange import exchanged, share_of
from pdtrim_pl.merging.local_fits import FittedRuns, fit_runs
from pdtrim_pl.merging.settings import Merging
from pdtrim_pl.staged.fitted_run import FittedRun

__all__ = ["FittedRun", "FittedRuns", "Merging", "exchanged", "fit_runs", "share_of"]
