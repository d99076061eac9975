"""The measurements of a selector for an exported pair. The reference is the pair itself when it sends everything.

Shapes: B batch, R response tokens, N response tokens of a batch without padding, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.recall import requests_within, right_tokens
from pdtrim_pl.evaluation.tokens import score_tokens
from pdtrim_pl.plan import KVRetentionPolicy, KVShape, Retention
from pdtrim_pl.selectors.base import SelectionContext
from pdtrim_pl.staged import KVCache, Request, StagedCausalLM
from pdtrim_pl.staged.model import StagedOutput


@dataclass(frozen=True, eq=False)
class _Encoded:
    """What is kept of one batch after prefill."""

    batch: Batch
    request: Request
    out: StagedOutput
    reference: Tensor
    """Final hidden states of the response tokens when everything is sent, [N, H]."""


class PairMeasures:
    """Measures policies on an exported pair. Prefill runs once per request; every measurement is a decode pass.

    The caches of all requests are kept on the device of the decode half.

    Args:
        prefill: the prefill half of the pair.
        decode: the decode half of the pair.
        batches: requests with known responses. As many requests that repeat their prompt are added.

    Raises:
        UserError: there is no request.
    """

    def __init__(self, prefill: StagedCausalLM, decode: StagedCausalLM, batches: Sequence[Batch]) -> None:
        self.prefill, self.decode = prefill.eval(), decode.eval()
        device = decode.model.device
        if not batches:
            raise UserError("There is no request to measure a policy on: give a source with at least one example.")
        rows, longest = sum(len(batch.prompt_ids) for batch in batches), max(b.response_ids.shape[1] for b in batches)
        self.plain = [self._encoded(batch.on(device)) for batch in batches]
        self.repeated = [self._encoded(batch) for batch in requests_within(decode, batches, rows, longest)]

    def context(self, shape: KVShape) -> SelectionContext:
        """The context for a selector. It has no attention mass.

        Args:
            shape: shape of one block's KV per position, in the element type on the wire.
        """
        plan = self.decode.plan

        def policy(rules: Mapping[int, Retention]) -> KVRetentionPolicy:
            return KVRetentionPolicy(plan.boundary, shape, rules)

        def mass() -> Mapping[int, float]:
            raise UserError("Attention mass needs the whole model: use `codecs`, or choose the policy in a run.")

        return SelectionContext(
            plan, shape, mass,
            damage=lambda block, rule: self._kl(policy({block: rule}), self.plain),
            energy=lambda rules, examples: self._kl(policy(rules), self.plain + self.repeated),
            measure_recall=lambda rules: self._recall(policy(rules)),
        )  # fmt: skip

    @torch.no_grad()
    def _encoded(self, batch: Batch) -> _Encoded:
        request = Request.of(*batch.request, self.prefill.plan.boundary)
        out = self.prefill.prefill(request.tokens["prefill"], request.valid["prefill"])
        out = StagedOutput(out.hidden[:, -1:], out.cache)
        return _Encoded(batch, request, out, self._hidden(batch, request, out, out.cache))

    def _hidden(self, batch: Batch, request: Request, out: StagedOutput, sent: KVCache) -> Tensor:
        """Final hidden states of the response tokens, [N, H]."""
        parts = [out.hidden[:, -1:]] if self.prefill.plan.boundary == "prefill" else []
        fed, valid = request.tokens["decode"], request.valid["decode"]
        if fed.shape[1]:
            parts.append(self.decode.decode(fed, sent, valid, keep_cache=False).hidden)
        return torch.cat(parts, dim=1)[batch.response_mask]

    def _under(self, policy: KVRetentionPolicy, encoded: _Encoded) -> Tensor:
        sent = encoded.out.cache.retained(policy)
        return self._hidden(encoded.batch, encoded.request, encoded.out, sent)

    @torch.no_grad()
    def _kl(self, policy: KVRetentionPolicy, requests: Sequence[_Encoded]) -> float:
        """Mean KL of a policy relative to sending everything, nats per response token."""
        total, tokens = 0.0, 0
        for encoded in requests:
            targets = encoded.batch.response_ids[encoded.batch.response_mask]
            head = self.decode.logits
            scores = score_tokens(self._under(policy, encoded), encoded.reference, targets, head, head)
            total, tokens = total + float(scores.kl.double().sum()), tokens + len(targets)
        return total / tokens

    @torch.no_grad()
    def _recall(self, policy: KVRetentionPolicy) -> float:
        right = tokens = 0
        for encoded in self.repeated:
            targets = encoded.batch.response_ids[encoded.batch.response_mask]
            right += right_tokens(self.decode, self._under(policy, encoded), targets)
            tokens += len(targets)
        return right / tokens
