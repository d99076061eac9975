"""A request to the engine: what is asked, what is heard of it, and its figures.

Shapes: R response tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pdtrim_pl.serving.engine.messages import Encoded
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.sampling import Sampling

Reason = Literal["stop", "length", "cancelled", "deadline", "error", "unavailable"]
"""Why a request ended: at a stop token, at its most tokens, by its caller, by its time, by a fault, or because an
engine that it needs is gone."""


class Overloaded(RuntimeError):
    """The queue is full: try again later."""


@dataclass(frozen=True)
class Token:
    """A token of a response."""

    id: int


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits that predict each token of a known response."""

    values: Any
    """A float32 array [R, V]."""


@dataclass(frozen=True)
class RequestStats:
    """Figures of one request."""

    prompt_tokens: int
    new_tokens: int
    kv_bytes: int
    """Bytes of keys and values, counted while they were sent."""
    full_bytes: int
    """Bytes that the unpruned model would send."""
    header_bytes: int
    """Other bytes of the handover: headers of frames, lengths, the first token and, if asked for, its logits."""
    prefill_seconds: float
    transfer_seconds: float
    """Time from the end of prefill until the last byte was sent; before that, prefill and transfer run together."""
    decode_seconds: float
    """Time of the decode steps that it took part in, alone or with others."""
    decode_steps: int
    """Tokens that were fed to decode."""

    @property
    def ratio(self) -> float | None:
        """Bytes of the unpruned model over bytes sent; None if nothing was sent."""
        return self.full_bytes / self.kv_bytes if self.kv_bytes else None

    @property
    def prefill_seconds_per_token(self) -> float:
        """Prefill time over the prompt's tokens."""
        return self.prefill_seconds / self.prompt_tokens

    @property
    def decode_seconds_per_token(self) -> float | None:
        """Decode time per token fed to decode; None if decode had nothing to run."""
        return self.decode_seconds / self.decode_steps if self.decode_steps else None


@dataclass(frozen=True)
class Done:
    """The end of a request. Nothing follows."""

    reason: Reason
    message: str = ""
    """What went wrong, if something did."""
    stats: RequestStats | None = field(default=None, compare=False)
    """Its figures; None if its prompt was not handed over."""

    def raise_fault(self) -> None:
        """Raise what went wrong, if something did.

        Raises:
            RuntimeError: the response is not complete.
        """
        if self.reason not in ("stop", "length"):
            raise RuntimeError(self.message or f"The request was {self.reason}.")


Event = Token | Logits | Done
Listener = Callable[[Event], None]
"""Hears of a request, in the engine's own thread: it must return at once."""


@dataclass(frozen=True)
class Ask:
    """A request for tokens."""

    prompt_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    deadline: float | None = None
    """Seconds from now; then the request ends, finished or not."""
    forced: tuple[int, ...] | None = None
    """A known response, see `scoring`."""

    @classmethod
    def scoring(cls, prompt_ids: list[int], response_ids: list[int]) -> Self:
        """Ask for the logits of a known response instead of new tokens. `Logits` comes in their place."""
        return cls(prompt_ids, len(response_ids), forced=tuple(response_ids))


@dataclass(eq=False)
class Running:
    """A request that has not ended."""

    number: int
    ask: Ask
    tell: Listener
    began: float = field(default_factory=time.monotonic)
    state: Literal["waiting", "prefill", "decode"] = "waiting"
    first: float | None = None
    """When its first token came."""
    tokens: int = 0
    encoded: Encoded | None = None
    """What prefill reported."""
    decode_seconds: float = 0.0
    decode_steps: int = 0
    reporting: bool = False
    """Whether prefill's report is to come."""
    over: tuple[Reason, str] | None = None
    """How it has ended, while prefill's report is still to come."""

    @property
    def ends_at(self) -> float:
        """When its time is over."""
        if self.ask.deadline is None or self.over is not None:
            return float("inf")
        return self.began + self.ask.deadline

    def decoded(self, tokens: int, steps: int, seconds: float) -> None:
        """Count what decode reports."""
        self.state = "decode"  # decode's report may come before that of prefill
        self.tokens += tokens
        self.decode_steps += steps
        self.decode_seconds += seconds

    def stats(self, pair: ExportedPair) -> RequestStats | None:
        """Its figures so far; None before prefill has reported."""
        if self.encoded is None:
            return None
        prompt = len(self.ask.prompt_ids)
        return RequestStats(
            prompt_tokens=prompt,
            new_tokens=self.tokens,
            kv_bytes=self.encoded.kv_bytes,
            full_bytes=pair.policy.full_bytes(pair.plan, prompt),
            header_bytes=self.encoded.header_bytes,
            prefill_seconds=self.encoded.seconds,
            transfer_seconds=self.encoded.transfer_seconds,
            decode_seconds=self.decode_seconds,
            decode_steps=self.decode_steps,
        )
