"""What both workers of the engine are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from multiprocessing.connection import Connection

import torch

from pdtrim_pl.errors import UserError, is_out_of_memory
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.plan.agreement import agree
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.frames import FramedLink, LinkError
from pdtrim_pl.staged.model import StagedCausalLM

LARGEST_MANIFEST = 2**24
"""Bytes. A manifest has about 150 bytes for each file of the export."""
PATIENCE = 30.0
"""Seconds in which a request that arrives must have been announced by the engine."""


class Worker(ABC):
    """One half of the pair, which does what the engine asks."""

    def __init__(
        self, spec: say.WorkerSpec, staged: StagedCausalLM, manifest: PairManifest, parent: Connection
    ) -> None:
        assert staged.policy is not None
        self.spec, self.staged, self.manifest, self.parent = spec, staged, manifest, parent
        self.plan, self.policy, self.device = staged.plan, staged.policy, torch.device(spec.device)

    @abstractmethod
    def serve(self) -> None:
        """Do what the engine asks until it is gone."""


def agree_on_pair(link: FramedLink, manifest: PairManifest, *, first: bool) -> None:
    """Refuse another pair, on both sides; see `agree`. The one who connects speaks first."""
    agree(partial(link.hello, first=first), manifest)


def told(error: Exception) -> str:
    """What the engine tells of an error."""
    if is_out_of_memory(error):
        ways = "Give a shorter prompt, or another `device`"
        return f"memory ran out ({str(error).splitlines()[0]}). {ways}."
    return str(error) if isinstance(error, UserError | LinkError) else f"{type(error).__name__}: {error}"
