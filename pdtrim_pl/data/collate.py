"""Collate examples of different lengths into one padded batch.

Shapes: B batch, P longest prompt of the batch, R longest response of the batch, in tokens.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pdtrim_pl.data.examples import Example


class _Fields(NamedTuple):
    prompt_ids: Tensor
    """int64 [B, P]."""
    prompt_mask: Tensor
    """bool [B, P], true at real tokens."""
    response_ids: Tensor
    """int64 [B, R]."""
    response_mask: Tensor
    """bool [B, R], true at real tokens."""
    response_weights: Tensor
    """float [B, R]: what a token counts in the training loss. Ones by default."""


class Batch(_Fields):
    """A padded batch. Prompts are padded on the left and responses on the right, so there is no gap between them."""

    def __new__(
        cls, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor,
        response_weights: Tensor | None = None,
    ) -> "Batch":  # fmt: skip
        if response_weights is None:
            response_weights = torch.ones(response_mask.shape, device=response_mask.device)
        return super().__new__(cls, prompt_ids, prompt_mask, response_ids, response_mask, response_weights)

    def on(self, device: torch.device | str) -> "Batch":
        """A copy of the batch on a device."""
        return Batch(*(tensor.to(device) for tensor in self))

    def cut(self, size: int) -> "list[Batch]":
        """Cut the batch into batches of at most `size` examples, in order. Padding is not removed."""
        return [Batch(*rows) for rows in zip(*(tensor.split(size) for tensor in self), strict=True)]

    def with_decode(self) -> "Batch":
        """The batch, with responses of at least two tokens (padding included), so that a decode pass has an input."""
        if self.response_ids.shape[1] > 1:
            return self
        return Batch(*self[:2], *(functional.pad(part, (0, 1)) for part in self[2:]))

    @property
    def request(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and masks, in the order of the arguments of `StagedCausalLM.forward` and `Request.of`."""
        return self.prompt_ids, self.response_ids, self.prompt_mask, self.response_mask


def fingerprint(batches: Iterable[Batch]) -> str:
    """SHA-256 of the real tokens of a data part, in order. Two runs on the same data have the same fingerprint."""
    digest = hashlib.sha256()
    for batch in batches:
        for ids, mask in ((batch.prompt_ids, batch.prompt_mask), (batch.response_ids, batch.response_mask)):
            for row, real in zip(ids, mask, strict=True):
                digest.update(row[real].cpu().numpy().tobytes() + b"|")
    return digest.hexdigest()


@dataclass(frozen=True)
class Collator:
    """Pads a list of examples to a `Batch`; the `collate_fn` of every loader of the data module."""

    pad_id: int
    """Token id at padded positions. The masks tell what is padding, not this id."""
    mean_weight: float = 1.0
    """Weights are divided by it. With that of a data part, an epoch over the part is a weighted mean."""

    def __call__(self, examples: Sequence[Example]) -> Batch:
        prompt_ids, prompt_mask = self._pad([example.prompt for example in examples], left=True)
        response_ids, response_mask = self._pad([example.response for example in examples], left=False)
        weights = torch.tensor([example.weight / self.mean_weight for example in examples])
        return Batch(prompt_ids, prompt_mask, response_ids, response_mask, weights[:, None].expand(response_ids.shape))

    def _pad(self, rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            span = slice(width - len(row), width) if left else slice(0, len(row))
            ids[index, span] = row
            mask[index, span] = True
        return ids, mask
