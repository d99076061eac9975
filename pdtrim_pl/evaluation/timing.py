"""Prefill and decode time per token, for the dense and the trimmed model, measured in one run.

Shapes: B batch, P prompt tokens, R new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Stage, StagePlan
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import DecodeLoop


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds per token position, for the whole batch."""

    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Timing:
    """The times of one measurement."""

    turns: tuple[tuple[StageTimes, StageTimes], ...]
    """Times of every repeat: the dense variant, then the trimmed one."""
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    device: str

    @cached_property
    def dense(self) -> StageTimes:
        """Medians of the full plan, with everything sent."""
        return _medians([dense for dense, _ in self.turns])

    @cached_property
    def trimmed(self) -> StageTimes:
        """Medians of the trimmed plan and its policy."""
        return _medians([trimmed for _, trimmed in self.turns])

    @property
    def prefill_speedup(self) -> float:
        """Dense time divided by trimmed time of the prefill stage."""
        return self.dense.prefill_ms / self.trimmed.prefill_ms

    @property
    def decode_speedup(self) -> float:
        """Dense time divided by trimmed time of the decode stage."""
        return self.dense.decode_ms / self.trimmed.decode_ms


def measure_timing(
    model: StagedCausalLM,
    *,
    plan: StagePlan | None = None,
    policy: KVRetentionPolicy | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seed: int = 0,
    sliced: Mapping[Stage, StagedCausalLM] | None = None,
) -> Timing:
    """Time one request of random tokens under the full plan and under a trimmed plan.

    After a warm-up, the two variants are timed in turns, so that changes in the speed of the machine affect both. The
    prefill time includes all blocks, and the head on the last position. The decode time includes one pass and one head
    per token. The transfer is not timed. In the dense variant, a merged or untied block still uses its own weights.

    Args:
        model: the model. It is timed in eval mode; its mode is restored afterwards.
        plan: the trimmed plan; the model's own plan and policy by default.
        policy: the policy of the trimmed variant, if `plan` is given; None sends everything.
        prompt_tokens: number of positions that prefill handles.
        new_tokens: number of tokens that decode takes, one by one.
        batch_size: number of requests in the batch.
        repeats: number of timed repeats of each variant.
        seed: seed of the random token ids.
        sliced: per stage, a model that is as narrow as its blocks are under the trimmed plan, for that variant;
            `model` itself for a stage whose blocks are not narrow.

    Raises:
        UserError: a count is below 1, or there are more tokens than the model's context holds.
    """
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats}
    low = {name: value for name, value in counts.items() if value < 1}
    if low:
        raise UserError("; ".join(f"`{name}` is {value}: give at least 1" for name, value in low.items()) + ".")
    config = model.model.config
    context = usable_context(config.to_dict())
    if prompt_tokens + new_tokens > context:
        raise UserError(
            f"`prompt_tokens: {prompt_tokens}` and `new_tokens: {new_tokens}` exceed the context of the model, "
            f"{context} tokens. Lower them."
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, prompt_tokens + new_tokens)
    device = next(model.parameters()).device
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    request = (ids[:, :prompt_tokens], ids[:, prompt_tokens:])
    if plan is None:
        plan, policy = model.plan, model.policy
    whole: Mapping[Stage, StagedCausalLM] = dict.fromkeys(STAGES, model)
    full = StagePlan.full(plan.model, plan.relation, plan.boundary)
    narrow = plan if sliced is None else replace(plan, widths={})
    variants = ((whole, full, None), (sliced or whole, narrow, policy))
    with torch.no_grad(), eval_mode(model):
        turns = [(_time_once(request, *variants[0]), _time_once(request, *variants[1])) for _ in range(repeats + 1)]
    return Timing(tuple(turns[1:]), prompt_tokens, new_tokens, batch_size, device.type)  # the first is a warm-up


def _time_once(
    request: tuple[Tensor, Tensor], models: Mapping[Stage, StagedCausalLM], plan: StagePlan,
    policy: KVRetentionPolicy | None,
) -> StageTimes:  # fmt: skip
    prompt, response = request
    model, decoder = models["prefill"], models["decode"]
    clock = _clock(prompt.device)
    start = clock()
    encoded = model.prefill(prompt, plan=plan)
    model.logits(encoded.hidden[:, -1])
    prefill = clock() - start
    cache = encoded.cache.retained(policy)
    start = clock()
    known = iter([*response.unbind(dim=1), response[:, 0]])  # the loop picks one more token than it runs
    loop = DecodeLoop(
        decoder,
        cache,
        room=response.shape[1],
        first=None,
        last_prompt=next(known),
        pick=lambda _: next(known),
        plan=plan,
    )
    for _ in loop:
        pass
    decode = clock() - start
    return StageTimes(1000 * prefill / prompt.shape[1], 1000 * decode / response.shape[1])


def _clock(device: torch.device) -> Callable[[], float]:
    """A function that returns the time in seconds. On a GPU it first waits for the work that is queued."""
    if device.type != "cuda":
        return perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return synchronised


def _medians(times: list[StageTimes]) -> StageTimes:
    return StageTimes(median(t.prefill_ms for t in times), median(t.decode_ms for t in times))
