"""Save and restore every random generator that a training step may use."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from pdtrim_pl.parallel import of_every_rank

RandomState = dict[str, Any]
"""State of the generators of one process. It holds only tensors, numbers and lists, so that a checkpoint loads with
`weights_only`."""


def random_state(device: torch.device) -> RandomState:
    """State of the generators of Python, NumPy and torch in this process, and of `device` if it is a GPU."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: RandomState, device: torch.device) -> None:
    """Restore the generators from `random_state`. The state of a GPU is restored only on a GPU."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def random_states(device: torch.device) -> list[RandomState]:
    """The states of all processes, by rank. This is a collective: every process must call it."""
    return of_every_rank(random_state(device))
