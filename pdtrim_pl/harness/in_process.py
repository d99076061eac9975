"""An exported pair in one process: prompts through prefill, the policy on the cache, responses through decode.

Shapes: B batch, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from pdtrim_pl.export.load import load_stage
from pdtrim_pl.plan import STAGES
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.decoding import DecodeLoop, PickToken

Rows = Sequence[Sequence[int]]
"""Token ids, rows of any lengths."""


@dataclass(frozen=True, eq=False)
class InProcessPair:
    """Both halves of an export, on one device."""

    prefill: StagedCausalLM
    decode: StagedCausalLM

    @classmethod
    def load(cls, export: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Load both checkpoints; arguments and errors as for `load_stage`."""
        prefill, decode = (load_stage(export, stage, device=device, dtype=dtype).eval() for stage in STAGES)
        return cls(prefill, decode)

    @property
    def device(self) -> torch.device:
        """Where both halves are."""
        return self.decode.model.device

    @torch.no_grad()
    def response_logits(self, prompts: Rows, responses: Rows) -> Iterator[Tensor]:
        """Logits that predict each token of known responses, fp32 [R, V], one row after the other.

        Args:
            prompts: token ids, at least one token a row.
            responses: token ids, at least one token a row.
        """
        prompt, response = self._padded(prompts, left=True), self._padded(responses, left=False)
        request = Request.of(prompt[0], response[0], prompt[1], response[1], self.prefill.plan.boundary)
        encoded = self.prefill.prefill(request.tokens["prefill"], request.valid["prefill"])
        hidden = self.decode.respond(request, encoded.hidden, encoded.cache.retained(self.prefill.policy))
        for row, ids in enumerate(responses):
            yield self.decode.logits(hidden[row, : len(ids)]).float()

    @torch.no_grad()
    def stream(
        self, prompt_ids: Tensor, prompt_mask: Tensor, *, room: int, pick: PickToken, stop_ids: Collection[int]
    ) -> DecodeLoop:
        """Run prefill and return the loop that decodes.

        Args:
            prompt_ids: token ids, [B, P], padded on the left.
            prompt_mask: True on real tokens, [B, P].
            room: most tokens of a response.
            pick: chooses a token from the logits.
            stop_ids: a response ends at one of these tokens.
        """
        at_prefill = self.prefill.plan.boundary == "prefill"
        handled = prompt_ids.shape[1] - (not at_prefill)
        encoded = self.prefill.prefill(prompt_ids[:, :handled], prompt_mask[:, :handled])
        first = pick(self.prefill.logits(encoded.hidden[:, -1])) if at_prefill else None
        return DecodeLoop(
            self.decode, encoded.cache.retained(self.prefill.policy), room=room, first=first,
            last_prompt=prompt_ids[:, -1], pick=pick, stop_ids=stop_ids,
        )  # fmt: skip

    def _padded(self, rows: Rows, *, left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, [B, longest]."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            ids[index, place], real[index, place] = torch.tensor(row), True
        return ids.to(self.device), real.to(self.device)
