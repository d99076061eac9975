"""An exported pair in one process: prompts through prefill, the policy on the cache, responses through decode.

Shapes: B batch, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim_pl.export.load import load_stage
from pdtrim_pl.models.adapters import adapter_at
from pdtrim_pl.models.loading import TORCH_DTYPES
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import STAGES, KVRetentionPolicy
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.decoding import DecodeLoop, PickToken, greedy

Mode = Literal["disaggregated", "unified", "dense"]
MODES: tuple[Mode, ...] = ("disaggregated", "unified", "dense")

Rows = Sequence[Sequence[int]]
"""Token ids, rows of any lengths."""


@dataclass(frozen=True, eq=False)
class InProcessPair:
    """Both halves of an export, on one device."""

    prefill: StagedCausalLM
    decode: StagedCausalLM
    """The same object as `prefill` for a model that runs both stages."""
    policy: KVRetentionPolicy | None
    """What is sent from one to the other; None for everything."""

    @classmethod
    def load(cls, export: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Load both checkpoints; arguments and errors as for `load_stage`."""
        prefill, decode = (load_stage(export, stage, device=device, dtype=dtype).eval() for stage in STAGES)
        return cls(prefill, decode, prefill.policy)

    @classmethod
    def of(cls, model: StagedCausalLM) -> Self:
        """A model that runs both stages, under its own plan and policy."""
        return cls(model, model, model.policy)

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
        hidden = self.decode.respond(request, encoded.hidden, encoded.cache.retained(self.policy))
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
            self.decode, encoded.cache.retained(self.policy), room=room, first=first,
            last_prompt=prompt_ids[:, -1], pick=pick, stop_ids=stop_ids,
        )  # fmt: skip

    def continuations(
        self, prompts: Rows, *, room: int, stop_ids: Collection[int], pick: PickToken = greedy
    ) -> list[list[int]]:
        """Responses, each up to its first stop token, which is part of it; arguments as for `stream`."""
        ids, mask = self._padded(prompts, left=True)
        loop = self.stream(ids, mask, room=room, pick=pick, stop_ids=stop_ids)
        rows = torch.stack(list(loop), dim=1).tolist()
        ends = [next((at for at, token in enumerate(row) if token in stop_ids), room) for row in rows]
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]

    def _padded(self, rows: Rows, *, left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, [B, longest]."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            ids[index, place], real[index, place] = torch.tensor(row), True
        return ids.to(self.device), real.to(self.device)


def load_mode(
    exported: ExportedPair, mode: Mode, *, model: str | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> InProcessPair | PreTrainedModel:  # fmt: skip
    """Load what answers in a mode: both halves, the decode checkpoint alone, or the unpruned model.

    Args:
        exported: the pair.
        mode: which of them.
        model: name, path or Hub id of the unpruned model, if it is not where the plan says.
        device: where it is put.
        dtype: element type; by default that of the checkpoint, and for the unpruned model that of the pair.

    Raises:
        UserError: it cannot be loaded.
    """
    if mode == "disaggregated":
        return InProcessPair.load(exported.path, device, dtype)
    named = exported.plan.model
    adapter = None if named.architecture is None else adapter_at(named.architecture)
    name = str(exported.path / "decode") if mode == "unified" else model or named.name_or_path
    if mode == "dense" and dtype is None:
        dtype = TORCH_DTYPES[exported.policy.kv.dtype]  # that of the pair, so that both round alike
    whole = load_causal_lm(name, dtype=dtype, architecture=adapter)
    torch.nn.Module.to(whole, torch.device(device))
    return whole.eval()
