"""Whether a model still finds what stands far back: a text said once more, with its first copy as the prompt.

Perplexity hardly tells: most tokens of running text follow from the few before them. Here every token of the response
stands a whole copy back, in the prompt's KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pdtrim_pl.data import Batch, Collator, Example
from pdtrim_pl.evaluation.tokens import final_hidden
from pdtrim_pl.losses import chunks
from pdtrim_pl.staged import StagedCausalLM


def repeated_requests(batches: Iterable[Batch], collate: Collator, most: int) -> list[Batch]:
    """Requests whose prompt and response are both a whole example: its prompt with its response.

    Args:
        batches: the examples.
        collate: makes the new batches, as large as the old ones.
        most: take so many examples.
    """
    found: list[Batch] = []
    for batch in batches:
        rows = [_joined(batch, row) for row in range(min(len(batch.prompt_mask), most))]
        most -= len(rows)
        if rows:
            found.append(collate(rows))
    return found


@torch.no_grad()
def measure_recall(model: StagedCausalLM, batches: Sequence[Batch], *, chunk_tokens: int = 128) -> float:
    """Share of response tokens that are the model's most likely ones, teacher-forced, under its own plan and policy.

    Args:
        model: the model.
        batches: requests with known responses, on the model's device.
        chunk_tokens: tokens whose logits are alive at a time.
    """
    right = tokens = 0
    for batch in batches:
        targets, hidden = batch.response_ids[batch.response_mask], final_hidden(model, batch)
        for part in chunks(len(targets), chunk_tokens):
            right += int((model.logits(hidden[part]).argmax(dim=-1) == targets[part]).sum())
        tokens += len(targets)
    return right / tokens


def _joined(batch: Batch, row: int) -> Example:
    parts = (batch.prompt_ids[row][batch.prompt_mask[row]], batch.response_ids[row][batch.response_mask[row]])
    whole = torch.cat(parts)
    return Example(whole, whole)
