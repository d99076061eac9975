"""Recall: whether a model can repeat a text that it has in its prompt.

Perplexity hardly measures this, since most tokens of ordinary text depend on the few tokens before them. Here the
response repeats the prompt, so every response token can be looked up in the KV cache of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pdtrim_pl.data import Batch, Collator, Example
from pdtrim_pl.evaluation.tokens import final_hidden
from pdtrim_pl.losses import chunks
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan
from pdtrim_pl.staged import StagedCausalLM

RECALL_MARGIN = 0.03
"""Share of its recall that a policy may lose before a report warns."""


def lost_recall(sent: float, everything: float, margin: float = RECALL_MARGIN) -> str | None:
    """A sentence if a policy loses more recall than the margin; else None.

    Args:
        sent: recall under the policy.
        everything: recall of the same models when everything is sent.
        margin: share of `everything` that may be lost.
    """
    if everything <= 0 or 1 - sent / everything <= margin:
        return None
    return (
        f"the KV policy loses {100 * (1 - sent / everything):.0f} % of the recall ({sent:.3f} of {everything:.3f} with "
        f"everything sent), more than the margin of {100 * margin:g} %. Send more: `pdtrim policy` with a lower "
        "`--reduction`."
    )


def repeated_requests(
    batches: Iterable[Batch], collate: Collator, most: int, response: int | None = None, context: int | None = None
) -> list[Batch]:
    """Make requests whose response repeats the prompt. The text is a whole example: its prompt with its response.

    Args:
        batches: the examples.
        collate: makes the new batches, of the same number of rows as the old ones.
        most: maximum number of examples.
        response: maximum number of response tokens. The prompt is then the text followed by its first quarter, and the
            response continues from there. By default, prompt and response are both the whole text.
        context: maximum number of tokens of a request; longer texts lose their end. No limit by default.
    """
    found: list[Batch] = []
    for batch in batches:
        rows = [_joined(batch, row, response, context) for row in range(min(len(batch.prompt_mask), most))]
        most -= len(rows)
        if rows:
            found.append(collate(rows))
    return found


def repetition(text: Tensor, others: Tensor | None = None, before: int = 0) -> Example:
    """A request whose response repeats a text of its prompt.

    The prompt ends with the first quarter of the repetition, so that the model can recognise it.

    Args:
        text: token ids, [N].
        others: other tokens of the prompt, [M]; none by default.
        before: number of them that stand before the text.
    """
    others, known = text[:0] if others is None else others, max(len(text) // 4, 1)
    return Example(torch.cat([others[:before], text, others[before:], text[:known]]), text[known:])


def requests_within(
    model: StagedCausalLM, batches: Iterable[Batch], most: int, response: int | None = None
) -> list[Batch]:
    """`repeated_requests` that fit into the model's context, on its device; arguments as there."""
    context = usable_context(model.model.config.to_dict())
    found = repeated_requests(batches, Collator(pad_id=0), most, response, context)
    return [batch.on(model.model.device) for batch in found]


@torch.no_grad()
def measure_recall(
    model: StagedCausalLM, batches: Sequence[Batch], *, plan: StagePlan | None = None,
    policy: KVRetentionPolicy | None = None, chunk_tokens: int = 128,
) -> float:  # fmt: skip
    """Share of response tokens that the model ranks first, teacher-forced; in [0, 1].

    Args:
        model: the model.
        batches: requests with known responses, on the model's device. They must have a response token.
        plan: plan to run under; the model's own plan and policy by default.
        policy: the policy to run under, if `plan` is given; None sends everything.
        chunk_tokens: number of tokens whose logits are in memory at once.
    """
    counts = [recalled_tokens(model, batch, plan=plan, policy=policy, chunk_tokens=chunk_tokens) for batch in batches]
    return sum(right for right, _ in counts) / sum(tokens for _, tokens in counts)


@torch.no_grad()
def recalled_tokens(
    model: StagedCausalLM, batch: Batch, *, plan: StagePlan | None = None, policy: KVRetentionPolicy | None = None,
    chunk_tokens: int = 128,
) -> tuple[int, int]:  # fmt: skip
    """Number of response tokens of one batch that the model ranks first, and number of all; see `measure_recall`."""
    targets, hidden = batch.response_ids[batch.response_mask], final_hidden(model, batch, plan, policy)
    return right_tokens(model, hidden, targets, chunk_tokens), len(targets)


def right_tokens(model: StagedCausalLM, hidden: Tensor, targets: Tensor, chunk_tokens: int = 128) -> int:
    """Number of targets [N] that are the most likely tokens under the final hidden states [N, H]."""
    parts = chunks(len(targets), chunk_tokens)
    return sum(int((model.logits(hidden[part]).argmax(dim=-1) == targets[part]).sum()) for part in parts)


def _joined(batch: Batch, row: int, response: int | None, context: int | None) -> Example:
    parts = (batch.prompt_ids[row][batch.prompt_mask[row]], batch.response_ids[row][batch.response_mask[row]])
    whole = torch.cat(parts)
    if response is None:
        whole = whole if context is None else whole[: context // 2]
        return Example(whole, whole)
    if context is not None:
        response = min(response, context // 2)
        whole = whole[: max((context - response) * 4 // 5, 2)]
    found = repetition(whole)
    return Example(found.prompt, found.response[:response])
