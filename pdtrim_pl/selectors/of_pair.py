"""The measurements of a selector for an exported pair. The reference is the pair itself when it sends everything.

Shapes: B batch, R response tokens, N response tokens of a batch without padding, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.recall import requests_within, right_tokens
from pdtrim_pl.evaluation.tokens import score_tokens
from pdtrim_pl.plan import KVRetentionPolicy, KVShape, Retention
from pdtrim_pl.selectors.base import SelectionContext
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.model import StagedOutput


@dataclass(frozen=True, eq=False)
class _Encoded:
    """What is kept of one batch after prefill."""

    batch: Batch
    request: Request
    out: StagedOutput
    reference: Tensor
    """Final hidden states of the response tokens when everything is sent, [N, H]."""


class PairRequests:
    """Requests with known responses, after prefill: every measurement under a policy is a decode pass.

    The caches of all requests are kept on the device of the decode half.

    Args:
        prefill: the prefill half of the pair.
        decode: the decode half of the pair; the same model may be both.
        batches: the requests, on the device of the decode half.
    """

    def __init__(self, prefill: StagedCausalLM, decode: StagedCausalLM, batches: Sequence[Batch]) -> None:
        self.prefill, self.decode = prefill, decode
        self.tokens = sum(int(batch.response_mask.sum()) for batch in batches)
        """Response tokens."""
        self._encoded = [self._after_prefill(batch) for batch in batches]

    @torch.no_grad()
    def losses(self, policy: KVRetentionPolicy) -> tuple[float, float]:
        """KL relative to sending everything, and negative log-likelihood; nats, sums over all response tokens."""
        kl = nll = 0.0
        head = self.decode.logits
        for encoded in self._encoded:
            targets = encoded.batch.response_ids[encoded.batch.response_mask]
            scores = score_tokens(self._under(policy, encoded), encoded.reference, targets, head, head)
            kl, nll = kl + float(scores.kl.double().sum()), nll + float(scores.nll.double().sum())
        return kl, nll

    @torch.no_grad()
    def recall(self, policy: KVRetentionPolicy) -> float:
        """Share of response tokens that are the most likely ones."""
        right = 0
        for encoded in self._encoded:
            targets = encoded.batch.response_ids[encoded.batch.response_mask]
            right += right_tokens(self.decode, self._under(policy, encoded), targets)
        return right / self.tokens

    @torch.no_grad()
    def _after_prefill(self, batch: Batch) -> _Encoded:
        request = Request.of(*batch.request, self.prefill.plan.boundary)
        out = self.prefill.prefill(request.tokens["prefill"], request.valid["prefill"])
        out = StagedOutput(out.hidden[:, -1:], out.cache)
        reference = self.decode.respond(request, out.hidden, out.cache)[batch.response_mask]
        return _Encoded(batch, request, out, reference)

    def _under(self, policy: KVRetentionPolicy, encoded: _Encoded) -> Tensor:
        """Final hidden states of the response tokens under a policy, [N, H]."""
        sent = encoded.out.cache.retained(policy)
        return self.decode.respond(encoded.request, encoded.out.hidden, sent)[encoded.batch.response_mask]


class PairMeasures:
    """Measures policies on an exported pair.

    Args:
        prefill: the prefill half of the pair.
        decode: the decode half of the pair; the same model may be both.
        batches: requests with known responses. As many requests that repeat their prompt are added.

    Raises:
        UserError: there is no request.
    """

    def __init__(self, prefill: StagedCausalLM, decode: StagedCausalLM, batches: Sequence[Batch]) -> None:
        self.plan = decode.eval().plan
        device = decode.model.device
        if not batches:
            raise UserError("There is no request to measure a policy on: give a source with at least one example.")
        rows, longest = sum(len(batch.prompt_ids) for batch in batches), max(b.response_ids.shape[1] for b in batches)
        plain, repeated = [batch.on(device) for batch in batches], requests_within(decode, batches, rows, longest)
        self.plain = PairRequests(prefill.eval(), decode, plain)
        self.repeated = PairRequests(prefill, decode, [batch.on(device) for batch in repeated])

    def context(self, shape: KVShape) -> SelectionContext:
        """The context for a selector. It has no attention mass, and energies look at all requests.

        Args:
            shape: shape of one block's KV per position, in the element type on the wire.
        """

        def policy(rules: Mapping[int, Retention]) -> KVRetentionPolicy:
            return KVRetentionPolicy(self.plan.boundary, shape, rules)

        def mass() -> Mapping[int, float]:
            raise UserError("Attention mass needs the whole model: use `codecs`, or choose the policy in a run.")

        @cache
        def kl(requests: PairRequests, rules: frozenset[tuple[int, Retention]]) -> float:
            """Sum over the response tokens."""
            return requests.losses(policy(dict(rules)))[0]

        def energy(rules: Mapping[int, Retention], _: int) -> float:
            chosen = frozenset(rules.items())
            total = kl(self.plain, chosen) + kl(self.repeated, chosen)
            return total / (self.plain.tokens + self.repeated.tokens)

        return SelectionContext(
            self.plan, shape, mass,
            damage=lambda block, rule: kl(self.plain, frozenset({(block, rule)})) / self.plain.tokens,
            energy=energy,
            measure_recall=lambda rules: self.repeated.recall(policy(rules)),
        )  # fmt: skip
