"""Errors with a meaning of their own. Imports no torch."""

from __future__ import annotations

import sys


class UserError(ValueError):
    """Something that a user can put right: the message names the setting, the value received and the way out.

    The command line tells it in one line. Every other ValueError is a fault, and is shown with its traceback.
    """


class AnotherRankFailed(RuntimeError):
    """Every rank leaves because one of them could not go on."""


class RankLost(AnotherRankFailed):
    """Another process of the run is gone."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU, or torch on the host, could not give memory; for the host torch has no class."""
    if "torch" not in sys.modules:
        return False
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
