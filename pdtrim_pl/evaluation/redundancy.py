"""Redundancy of blocks: how similar the output of each block is to its input, per stage.

Shapes: B batch, T tokens of a stage, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import measured_by_ranks
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.gate import Observer


def block_redundancy(
    model: StagedCausalLM, batches: Iterable[Batch], *, device: torch.device | str = "cpu", ranks: Parallel = Parallel()
) -> dict[Stage, dict[int, float]]:
    """Mean cosine similarity of a block's input and output over the real tokens of each stage, in fp32.

    Source: Block Influence of ShortGPT (arXiv 2403.03853) is one minus this value, without stages.

    Args:
        model: the model, measured under its own plan and policy, in eval mode.
        batches: requests with known responses.
        device: device of the model.
        ranks: the batches are split among the ranks. The means are the same as on one rank.

    Returns:
        Per stage, original block index -> mean cosine in [-1, 1]. Blocks that a stage does not run are absent. A stage
        without input tokens has no blocks (decode, if every response has one token).

    Raises:
        UserError: there is no token.
    """

    def measured(raw: Batch, _: Sequence[Batch]) -> dict[Stage, tuple[dict[int, float], int]]:
        """Per stage, the sum of cosines over the tokens of one batch for each block, and the number of tokens."""
        batch, sums = raw.on(device), {stage: dict[int, float]() for stage in STAGES}
        valid = Request.of(*batch.request, model.plan.boundary).valid
        model(*batch.request, observers={stage: _adding_to(sums[stage], valid[stage]) for stage in STAGES})
        return {stage: (sums[stage], int(valid[stage].sum())) for stage in STAGES}

    sums: dict[Stage, dict[int, float]] = {stage: {} for stage in STAGES}
    tokens: dict[Stage, int] = dict.fromkeys(STAGES, 0)
    with torch.no_grad(), eval_mode(model):
        for found in measured_by_ranks(ranks, list(batches), measured):
            for stage, (values, count) in found.items():
                tokens[stage] += count
                for block, value in values.items():
                    sums[stage][block] = sums[stage].get(block, 0.0) + value
    if not any(tokens.values()):
        raise UserError("There is no token to measure redundancy on: the data part is empty (see `parts` of the data).")
    return {s: {block: total / tokens[s] for block, total in sums[s].items() if tokens[s]} for s in STAGES}


def _adding_to(sums: dict[int, float], valid: Tensor) -> Observer:
    def observe(block: int, before: Tensor, after: Tensor) -> None:
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)  # [B, T]
        sums[block] = sums.get(block, 0.0) + float(cosine[valid].sum())

    return observe
