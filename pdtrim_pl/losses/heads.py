"""Sharded heads, gathered once for all chunks of a batch.

Shapes: N response tokens of a batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from pdtrim_pl.losses.base import AtHeads, Computed, Distilled
from pdtrim_pl.staged import StagedCausalLM


def gathered_once(student: StagedCausalLM, teacher: StagedCausalLM | None) -> AtHeads:
    """A function that computes a loss while the weights of both heads are whole; see `Distilled.at_heads`.

    Args:
        student: its head is gathered with gradients.
        teacher: its head is gathered without; None if what stands for it is stored.
    """

    def at_heads(batch: Distilled, compute: Callable[[Distilled], Computed]) -> Computed:
        def work(hidden: Tensor) -> Computed:  # [N, H]
            theirs = batch.teacher_head if teacher is None else teacher.gathered_logits
            ours, weights = student.gathered_logits, student.head_weights
            return compute(
                replace(batch, student=hidden, student_head=ours, teacher_head=theirs, student_head_weights=weights)
            )

        with nullcontext() if teacher is None else teacher.whole_head():
            return student.at_head(batch.student, work)

    return at_heads
