"""Run student and teacher on one batch, and collect the input of the losses."""

from __future__ import annotations

import torch

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.losses.base import Distilled
from pdtrim_pl.losses.chunked import spoken_tokens, token_weights
from pdtrim_pl.losses.heads import gathered_once
from pdtrim_pl.staged import KVCache, Request, StagedCausalLM
from pdtrim_pl.staged.below import Below
from pdtrim_pl.staged.observed import BlockOutputs, run_observed
from pdtrim_pl.staged.rows import RowCounts


def run_pair(
    student: StagedCausalLM, teacher: StagedCausalLM, batch: Batch, *, watch_blocks: bool, keep_caches: bool = True,
    min_chunks: int = 0, counts: RowCounts | None = None, common: int = 0, gather_heads: bool = False,
) -> Distilled:  # fmt: skip
    """Run both models on a batch, the teacher without gradients.

    Args:
        student: the student. It runs under its own plan and policy.
        teacher: the teacher. It runs under its own plan. Its cache is cut to the positions of the student's policy.
        batch: requests with known responses.
        watch_blocks: whether to keep the outputs of blocks.
        keep_caches: whether to keep the caches.
        min_chunks: see `Distilled`.
        counts: numbers of real tokens of the batch, if the host knows them.
        common: number of first blocks that the teacher runs for both, as `common_blocks` counts them. Not used if
            outputs of blocks are kept.
        gather_heads: whether heads are sharded and are to be gathered once for all chunks.
    """
    at_once = student.runs_at_once and not keep_caches
    below = Below(common, at_once) if common and not watch_blocks else None
    ours, theirs = BlockOutputs(), BlockOutputs()
    with torch.no_grad():
        watch = theirs if watch_blocks else None
        reference = run_observed(teacher, batch, watch, keep_cache=keep_caches, counts=counts, below=below)
    watch = ours if watch_blocks else None
    out = run_observed(student, batch, watch, keep_cache=keep_caches, counts=counts, below=below)
    mask = batch.response_mask
    spoken = spoken_tokens(mask, counts)
    positions = None if student.policy is None else student.policy.uncoded()
    unused = KVCache({}, out.cache.lengths)
    return Distilled(
        student=out.hidden.flatten(0, 1)[spoken], teacher=reference.hidden.flatten(0, 1)[spoken],
        targets=batch.response_ids.flatten()[spoken], weights=token_weights(mask, spoken, batch.response_weights),
        student_head=student.compared_logits, teacher_head=teacher.compared_logits,
        student_head_weights=student.head_weights,
        student_cache=out.cache if keep_caches else unused,
        teacher_cache=reference.cache.retained(positions) if keep_caches else unused,
        student_blocks=ours.outputs, teacher_blocks=theirs.outputs,
        token_masks=Request.of(*batch.request, student.plan.boundary).valid, min_chunks=min_chunks,
        at_heads=gathered_once(student, teacher) if gather_heads else None,
    )  # fmt: skip
