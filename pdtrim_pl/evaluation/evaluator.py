"""The energy of a plan: mean KL(teacher || student) over calibration responses, under the contract.

Shapes: N response tokens of a batch without padding, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.quality import final_hidden, score_tokens
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.staged import Request, StagedCausalLM, StagedOutput


@dataclass(frozen=True)
class _Prompts:
    """What prefill made of every calibration prompt under one plan."""

    plan: StagePlan
    encoded: tuple[StagedOutput, ...]

    def serves(self, plan: StagePlan) -> bool:
        """Whether a plan's prefill would make the same: same prefill blocks and weights, no KV beyond what is here."""
        same = plan.prefill == self.plan.prefill and plan.untied["prefill"] == self.plan.untied["prefill"]
        return same and plan.boundary == self.plan.boundary and set(plan.decode) <= set(self.plan.decode)


class Evaluator:
    """Evaluates plans of one student on one calibration set.

    The teacher runs once. While only decode changes from plan to plan, the prompts' caches are kept and only response
    tokens are computed, as long as they fit in `cache_bytes`.

    Args:
        student: its weights must not change while the evaluator lives.
        teacher: the reference, under its own plan.
        batches: the calibration set.
        device: where both models are.
        cache_bytes: most bytes of prompt caches to keep.

    Raises:
        ValueError: the calibration set is empty.
    """

    def __init__(
        self, student: StagedCausalLM, teacher: StagedCausalLM, batches: Sequence[Batch], *,
        device: torch.device | str = "cpu", cache_bytes: int = 4 * 2**30,
    ) -> None:  # fmt: skip
        self.student, self.teacher = student, teacher
        self.batches = [Batch(*(tensor.to(device) for tensor in batch)) for batch in batches]
        self.targets = [batch.response_ids[batch.response_mask] for batch in self.batches]
        if not sum(len(targets) for targets in self.targets):
            raise ValueError("The calibration set has no response token: see `parts.calibration` of the data.")
        with torch.no_grad():
            self.reference = [final_hidden(teacher, batch) for batch in self.batches]
        positions = sum(batch.prompt_ids.numel() for batch in self.batches)
        self.keeps_prompts = positions * student.kv_shape.bytes_per_position * len(student.originals) <= cache_bytes
        self._prompts: _Prompts | None = None

    @torch.no_grad()
    def energy(self, plan: StagePlan) -> float:
        """Mean KL to the teacher over all response tokens, nats, every KV entry sent."""
        total, tokens = 0.0, 0
        for index, batch in enumerate(self.batches):
            hidden = self._response(plan, index, batch)
            heads = (self.student.logits, self.teacher.logits)
            scores = score_tokens(hidden, self.reference[index], self.targets[index], *heads)
            total += float(scores.kl.double().sum())
            tokens += len(self.targets[index])
        return total / tokens

    def _response(self, plan: StagePlan, index: int, batch: Batch) -> Tensor:
        """Final hidden states of the response tokens, [N, H]."""
        if not self.keeps_prompts:
            return final_hidden(self.student, batch, plan)
        encoded = self._encoded(plan)[index]
        request = _request(batch, plan)
        parts = [encoded.hidden[:, -1:]] if plan.boundary == "prefill" else []
        if request.tokens["decode"].shape[1]:
            tokens, valid = request.tokens["decode"], request.valid["decode"]
            parts.append(self.student.decode(tokens, encoded.cache, valid, plan=plan, keep_cache=False).hidden)
        return torch.cat(parts, dim=1)[batch.response_mask]

    def _encoded(self, plan: StagePlan) -> tuple[StagedOutput, ...]:
        if self._prompts is None or not self._prompts.serves(plan):
            self._prompts = None  # free the old caches before new ones are made
            runs = []
            for batch in self.batches:
                request = _request(batch, plan)
                encoded = self.student.prefill(request.tokens["prefill"], request.valid["prefill"], plan=plan)
                runs.append(replace(encoded, hidden=encoded.hidden[:, -1:]))
            self._prompts = _Prompts(plan, tuple(runs))
        return self._prompts.encoded


def _request(batch: Batch, plan: StagePlan) -> Request:
    return Request.of(batch.prompt_ids, batch.response_ids, batch.prompt_mask, batch.response_mask, plan.boundary)
