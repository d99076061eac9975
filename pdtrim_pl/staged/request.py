"""The inputs of each stage for a prompt and a known response.

Shapes: B batch, T tokens of a stage. Prompts are padded on the left, responses on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pdtrim_pl.plan import STAGES, Boundary, Stage
from pdtrim_pl.staged.rows import RowCounts, Rows

_NO_ROWS: Mapping[Stage, Rows | None] = MappingProxyType(dict.fromkeys(STAGES))


@dataclass(frozen=True)
class Request:
    """Per stage, the inputs for a prompt and a known response: token ids and validity, each [B, T] of that stage."""

    tokens: Mapping[Stage, Tensor]
    valid: Mapping[Stage, Tensor]
    rows: Mapping[Stage, Rows | None]
    """The same for the host; None if it is known on the device only."""

    @property
    def joined_rows(self) -> Rows | None:
        """Rows of prefill's inputs with decode's behind them."""
        prompts, responses = (self.rows[stage] for stage in STAGES)
        if prompts is None or responses is None:
            return None
        return Rows.counted(prompts.followed_by(responses, self.valid["prefill"].shape[1]).valid)

    @classmethod
    def of(
        cls, prompt_ids: Tensor, response_ids: Tensor, prompt_mask: Tensor | None, response_mask: Tensor | None,
        boundary: Boundary, counts: RowCounts | None = None,
    ) -> Request:  # fmt: skip
        """Split a request at the boundary. The last response token of a row is no input; if present, it is padding."""
        rows = _NO_ROWS if counts is None else _rows_of(counts, prompt_ids.shape[1], response_ids.shape[1], boundary)
        # Input i is valid if token i + 1 is real. So the inputs of a row do not depend on the length of other rows.
        prompt, response = as_bool(prompt_ids, prompt_mask), as_bool(response_ids, response_mask)[:, 1:]
        response_ids = response_ids[:, :-1]
        if boundary == "decode":
            response = torch.cat([prompt[:, -1:], response], dim=1)
            response_ids = torch.cat([prompt_ids[:, -1:], response_ids], dim=1)
            prompt_ids, prompt = never_empty(prompt_ids[:, :-1], prompt[:, :-1])
        return cls({"prefill": prompt_ids, "decode": response_ids}, {"prefill": prompt, "decode": response}, rows)


def never_empty(ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Replace a prompt without tokens by one padding token: models cannot run on zero tokens."""
    if ids.shape[1]:
        return ids, valid
    return ids.new_zeros(len(ids), 1), valid.new_zeros(len(ids), 1)


def as_bool(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as booleans; all True without a mask. Shape of `ids`."""
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _rows_of(counts: RowCounts, prompt_width: int, response_width: int, boundary: Boundary) -> dict[Stage, Rows | None]:
    """Rows of both stages. The widths are those of prompts and responses with their padding."""
    fed = 1 if boundary == "decode" else 0
    handled = [max(tokens - fed, 0) for tokens in counts.prompts]
    width, new = max(prompt_width - fed, 1), response_width - 1 + fed
    answered = [max(tokens - 1, 0) for tokens in counts.responses]
    first = [fed if not tokens else 0 for tokens in counts.prompts]  # an empty prompt has no last token to feed
    return {
        "prefill": Rows.counted([range(width - tokens, width) for tokens in handled]),
        "decode": Rows(
            tuple(range(start, fed + tokens) for start, tokens in zip(first, answered, strict=True)),
            tuple(range(tokens, tokens + new) for tokens in handled),
        ),
    }
