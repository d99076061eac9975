"""Attention mass: the share of the response's attention to the prompt that a `first_last` rule would keep.

Shapes: B batch, A attention heads, T tokens fed to decode, P prompt entries in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_pl.compat import attention_of
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.plan import Retention
from pdtrim_pl.staged import Request, Slots, StagedCausalLM


@dataclass
class _Tally:
    """Sum and number of shares; each query has one share per head."""

    total: float = 0.0
    count: int = 0

    def add(self, weights: Tensor, valid: Tensor, kept: Tensor) -> None:
        """Add the attention weights of one block.

        Args:
            weights: attention weights after the softmax, [B, A, T, P + T].
            valid: True for real queries, [B, T].
            kept: True for prompt entries that the rule keeps, [B, P].
        """
        prompt = weights[..., : kept.shape[1]].float()
        whole, part = prompt.sum(dim=-1), (prompt * kept[:, None, None]).sum(dim=-1)
        counted = (whole > 0) & valid[:, None]  # with a sliding window, a query may not see the prompt at all
        self.total += float((part[counted] / whole[counted]).sum())
        self.count += int(counted.sum())

    @property
    def mean(self) -> float:
        """Mean share; 1 if no query attends to the prompt, since the rule then removes nothing that is used."""
        return self.total / self.count if self.count else 1.0


def attention_mass(
    model: StagedCausalLM,
    batches: Iterable[Batch],
    *,
    first: int | float,
    last: int | float,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Attention to the first and last prompt positions, as a share of the attention to the whole prompt.

    The result is the mean over heads and over the real input tokens of decode, under the model's own plan, with
    everything sent. Tokens that do not see the prompt because of a sliding window are left out.

    Args:
        model: the model. It is measured in eval mode with eager attention; mode and attention are restored afterwards.
        batches: requests with known responses.
        first: prompt positions at the start, as a count or a share (see `Retention`).
        last: prompt positions at the end, as a count or a share.
        device: device of the model.

    Returns:
        Original index -> share in [0, 1], for every block of D.

    Raises:
        UserError: decode has no input token, or a count or share is out of range.
    """
    rule = Retention("first_last", first, last)
    tallies = {block: _Tally() for block in model.plan.decode}
    tokens = 0
    with torch.no_grad(), eval_mode(model), _eager_attention(model):
        for raw in batches:
            batch = raw.on(device)
            request = Request.of(*batch.request, model.plan.boundary)
            fed, valid = request.tokens["decode"], request.valid["decode"]
            if not valid.any():
                continue
            tokens += int(valid.sum())
            sent = model.prefill(request.tokens["prefill"], request.valid["prefill"]).cache
            with ExitStack() as hooks:
                for block, tally in tallies.items():
                    hook = _hook(tally, valid, _kept_entries(sent.blocks[block].slots, rule))
                    hooks.callback(_attention_of(model, block).register_forward_hook(hook).remove)
                model.decode(fed, sent, valid, keep_cache=False)
    if not tokens:
        raise UserError(
            "Attention mass is measured on the input tokens of decode, and there are none: the data part is empty, or "
            "every response has one token, which prefill predicts. Use longer responses (`lengths` of the data)."
        )
    return {block: tally.mean for block, tally in tallies.items()}


def _attention_of(model: StagedCausalLM, block: int) -> nn.Module:
    return model.gates[block].weights("decode", model.plan).get_submodule(model.architecture.attention_name)


def _kept_entries(prompt: Slots, rule: Retention) -> Tensor:
    """Which entries of a prompt's cache a rule keeps, bool [B, P]."""
    order, kept = prompt.kept_by(rule)
    return torch.zeros_like(prompt.valid).scatter(1, order, kept.valid)


def _hook(tally: _Tally, valid: Tensor, kept: Tensor) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], None]:
    def look(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        tally.add(output[1], valid, kept)

    return look


@contextmanager
def _eager_attention(model: StagedCausalLM) -> Iterator[None]:
    """Switch the model to eager attention, the only one that returns its weights, and restore it afterwards."""
    before = attention_of(model.model)
    model.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)
