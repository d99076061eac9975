"""The inputs of each stage for a prompt and a known response.

Shapes: B batch, T tokens of a stage. Prompts are padded on the left, responses on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.plan import Boundary, Stage


@dataclass(frozen=True)
class Request:
    """Per stage, the inputs for a prompt and a known response: token ids and validity, each [B, T] of that stage."""

    tokens: Mapping[Stage, Tensor]
    valid: Mapping[Stage, Tensor]

    @classmethod
    def of(
        cls, prompt_ids: Tensor, response_ids: Tensor, prompt_mask: Tensor | None, response_mask: Tensor | None,
        boundary: Boundary,
    ) -> Request:  # fmt: skip
        """Split a request at the boundary. The last response token of a row is no input; if present, it is padding."""
        # Input i is valid if token i + 1 is real. So the inputs of a row do not depend on the length of other rows.
        prompt, response = as_bool(prompt_ids, prompt_mask), as_bool(response_ids, response_mask)[:, 1:]
        response_ids = response_ids[:, :-1]
        if boundary == "decode":
            response = torch.cat([prompt[:, -1:], response], dim=1)
            response_ids = torch.cat([prompt_ids[:, -1:], response_ids], dim=1)
            prompt_ids, prompt = never_empty(prompt_ids[:, :-1], prompt[:, :-1])
        return cls({"prefill": prompt_ids, "decode": response_ids}, {"prefill": prompt, "decode": response})


def never_empty(ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Replace a prompt without tokens by one padding token: models cannot run on zero tokens."""
    if ids.shape[1]:
        return ids, valid
    return ids.new_zeros(len(ids), 1), valid.new_zeros(len(ids), 1)


def as_bool(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as booleans; all True without a mask. Shape of `ids`."""
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
