"""One request to the workers, and its figures.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.messages import Decoded, Encoded, Rows


@dataclass(frozen=True)
class Padded:
    """Token rows of one length, as they are sent to a worker."""

    ids: Rows
    mask: Rows

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, name: str, pair: ExportedPair) -> Self:
        """Check token ids [B, T] and their mask (all real by default), and make lists of them.

        Raises:
            UserError: the ids are not a batch of tokens of this model, or the mask does not fit them.
        """
        if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
            raise UserError(
                f"`{name}_ids` must be whole numbers [B, T] with at least one token, got {ids.dtype} "
                f"{tuple(ids.shape)}."
            )
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if valid.shape != ids.shape or not bool(valid.any(dim=1).all()):
            raise UserError(f"`{name}_mask` must have the shape of `{name}_ids` and leave every row a token.")
        order = valid.int().diff(dim=1)
        if bool((order < 0 if name == "prompt" else order > 0).any()):
            side = "left" if name == "prompt" else "right"
            raise UserError(f"`{name}_mask` has padding elsewhere than on the {side}, where it belongs.")
        outside = ids[(ids < 0) | (ids >= pair.vocabulary)]
        if outside.numel():
            raise UserError(
                f"`{name}_ids` has {int(outside[0])}, outside this model's vocabulary 0..{pair.vocabulary - 1}. Use "
                "the export's own tokenizer."
            )
        return cls(ids.tolist(), valid.int().tolist())

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [sum(row) for row in self.mask]


@dataclass(frozen=True)
class RequestStats:
    """Figures of one request. Counts are sums over the rows of its batch."""

    prompt_tokens: int
    new_tokens: int
    kv_bytes: int
    """Bytes of keys and values, counted while they were sent."""
    full_bytes: int
    """Bytes that the unpruned model would send."""
    header_bytes: int
    """Other bytes of the handover: lengths, first tokens and, for forced responses, logits."""
    prefill_seconds: float
    transfer_seconds: float
    """Time from the end of prefill until the last byte was sent; before that, prefill and transfer run together."""
    decode_seconds: float
    decode_steps: int
    """Tokens of a row that were fed to decode."""

    @classmethod
    def of(cls, pair: ExportedPair, prompts: Padded, new_tokens: int, encoded: Encoded, decoded: Decoded) -> Self:
        """From the reports of the two workers."""
        return cls(
            prompt_tokens=sum(prompts.lengths),
            new_tokens=new_tokens,
            kv_bytes=encoded.kv_bytes,
            full_bytes=sum(pair.policy.full_bytes(pair.plan, length) for length in prompts.lengths),
            header_bytes=encoded.header_bytes,
            prefill_seconds=encoded.seconds,
            transfer_seconds=encoded.transfer_seconds,
            decode_seconds=decoded.seconds,
            decode_steps=decoded.steps,
        )

    @property
    def ratio(self) -> float | None:
        """Bytes of the unpruned model over bytes sent; None if nothing was sent."""
        return self.full_bytes / self.kv_bytes if self.kv_bytes else None

    @property
    def prefill_seconds_per_token(self) -> float:
        """Prefill time over the prompt tokens of all rows."""
        return self.prefill_seconds / self.prompt_tokens

    @property
    def decode_seconds_per_token(self) -> float | None:
        """Decode time per token fed to decode; None if decode had nothing to run."""
        return self.decode_seconds / self.decode_steps if self.decode_steps else None
