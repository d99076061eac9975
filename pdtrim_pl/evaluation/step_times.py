"""Time of one decode step, compared with Hugging Face's own `generate` on the same weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import DecodeLoop, stream


@dataclass(frozen=True)
class Clocks:
    """Wall-clock seconds, and CPU seconds of this process, which other processes do not affect."""

    wall: float
    cpu: float

    @classmethod
    def now(cls, device: torch.device) -> Clocks:
        """The clocks, after the work that is queued on `device`."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Clocks) -> Clocks:
        """The time between two readings."""
        return Clocks(self.wall - start.wall, self.cpu - start.cpu)


@dataclass(frozen=True)
class StepTimes:
    """Times of one step of both sides."""

    ours: Clocks
    theirs: Clocks


def compare_steps(
    ours: StagedCausalLM, theirs: PreTrainedModel, prompt_ids: Tensor, *, steps: int, warmup: int = 4
) -> list[StepTimes]:
    """Times of greedy decode steps without a stop token. Both sides take turns: a step of theirs, a step of ours.

    Args:
        ours: the model, in eval mode.
        theirs: another copy of it, which has no gates.
        prompt_ids: token ids without padding, [B, P].
        steps: number of steps to return.
        warmup: number of steps before them.
    """
    assert theirs.generation_config is not None
    new = 1 + warmup + steps
    turns = _Turns(stream(ours, prompt_ids, max_new_tokens=new))
    stops, theirs.generation_config.eos_token_id = theirs.generation_config.eos_token_id, None
    try:
        theirs.generate(  # type: ignore[operator]
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=new, do_sample=False,
            pad_token_id=0, stopping_criteria=StoppingCriteriaList([turns]),
        )  # fmt: skip
    finally:
        theirs.generation_config.eos_token_id = stops
    return turns.steps[warmup:]


class _Turns(StoppingCriteria):
    """Never stops. `generate` calls it after every token: it records the time, and lets our side take a step."""

    def __init__(self, loop: DecodeLoop) -> None:
        self.loop = loop
        self.steps: list[StepTimes] = []
        self._since: Clocks | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        since, between = self._since, Clocks.now(input_ids.device)
        next(self.loop)
        self._since = Clocks.now(input_ids.device)
        if since is not None:  # None at the first token, which prefill predicts
            self.steps.append(StepTimes(self._since.since(between), between.since(since)))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
