"""Messages between the parent and its workers. They are plain data: tensors would travel as shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pdtrim_pl.plan import Stage
from pdtrim_pl.serving.sampling import Sampling

Attention = Literal["sdpa", "eager"]
Rows = list[list[int]]
"""Token ids or a mask, one list per row, all of one length."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to start."""

    stage: Stage
    export: Path
    device: str
    backend: str
    """Backend of `torch.distributed`."""
    meeting_point: Path
    """File in which the two workers find each other."""
    attn_implementation: Attention | None
    """None means what the model needs."""


@dataclass(frozen=True)
class Encode:
    """To prefill: encode these prompts and hand them over."""

    prompt_ids: Rows
    prompt_mask: Rows
    sampling: Sampling
    with_logits: bool
    """Hand over the last position's logits too."""


@dataclass(frozen=True)
class Continue:
    """To decode: generate from what prefill hands over."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Force:
    """To decode: run these responses against what prefill hands over."""

    response_ids: Rows
    response_mask: Rows


@dataclass(frozen=True)
class Cancel:
    """To decode: stop, nobody reads more tokens."""


@dataclass(frozen=True)
class Ready:
    """From both: the checkpoint is loaded and the workers are connected."""


@dataclass(frozen=True)
class Tokens:
    """From decode: one token for every row."""

    ids: list[int]


@dataclass(frozen=True)
class Logits:
    """From decode: the logits of a forced response, a float32 array [B, R, V]."""

    values: Any


@dataclass(frozen=True)
class Encoded:
    """From prefill: what was handed over, and how long the prompt took."""

    kv_bytes: int
    header_bytes: int
    seconds: float
    """Time of the prefill pass. Blocks are encoded and sent meanwhile."""
    transfer_seconds: float
    """Time from the end of the pass until the last byte was sent."""


@dataclass(frozen=True)
class Decoded:
    """From decode: the request is done."""

    seconds: float
    """Time in decode passes."""
    steps: int
    """Tokens of a row that were fed to decode."""


@dataclass(frozen=True)
class Failed:
    """From both: the worker fails and exits."""

    kind: Literal["setting", "link", "fault"]
    """`setting`: a user's mistake; `link`: the other worker is gone; `fault`: anything else."""
    message: str


Command = Encode | Continue | Force | Cancel
Report = Ready | Tokens | Logits | Encoded | Decoded | Failed
