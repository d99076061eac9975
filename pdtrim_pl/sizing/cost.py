"""What one request costs under a plan and a policy, counted from the model's shapes: no weights, no run, no clock.

Shapes: P prompt positions that prefill handles, R response tokens, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import nn
from transformers import PreTrainedConfig

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture, architecture_of
from pdtrim_pl.plan import (
    BYTES_PER_ELEMENT,
    KEEP_ALL,
    Boundary,
    KVRetentionPolicy,
    KVShape,
    Retention,
    StagePlan,
    handled_positions,
)
from pdtrim_pl.sizing.shape import meta_model
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of

ROUNDING = 1e-9
"""Relative slack of a comparison with a target: 24 of 30 blocks meet 0.8."""


@dataclass(frozen=True)
class Costs:
    """Costs of one request as shares of the dense model's: 1.0 is the full plan that sends everything."""

    prefill_flops: float
    decode_bytes: float
    wire_bytes: float


@dataclass(frozen=True)
class CostTarget:
    """The most a request may cost, as shares of the dense model's costs, each in (0, 1].

    Raises:
        UserError: a share out of range.
    """

    prefill_flops: float = 1.0
    """Floating-point operations of prefill."""
    decode_bytes: float = 1.0
    """Bytes that a step of decode reads."""
    wire_bytes: float = 1.0
    """Bytes of keys and values that cross from prefill to decode."""

    def __post_init__(self) -> None:
        faults = [f"`target.{name}` is {share!r}" for name, share in vars(self).items() if not 0.0 < share <= 1.0]
        if faults:
            raise UserError(f"{', '.join(faults)}: give a share of the dense model's cost in (0, 1]; 1 asks nothing.")

    def met(self, costs: Costs) -> bool:
        """Whether no cost is above its target, up to rounding."""
        return self.excess(costs) == 0.0

    def excess(self, costs: Costs) -> float:
        """By how much the costs are too high: the sum of what each is above its target, as a share of the target.

        A sum, so that every saving where there is too much brings a search nearer; 0 where the target is met.
        """
        ratios = (
            costs.prefill_flops / self.prefill_flops,
            costs.decode_bytes / self.decode_bytes,
            costs.wire_bytes / self.wire_bytes,
        )
        return sum(ratio - 1.0 for ratio in ratios if ratio > 1.0 + ROUNDING)


@dataclass(frozen=True)
class BlockSize:
    """What the costs of one block depend on."""

    parameters: int
    matrices: int
    """Weights in its linear layers: multiply-adds of one position."""
    kv_matrices: int
    """Those that a KV-only block needs, as this package runs it: a fused projection is run whole."""
    window: int | None
    """Sliding window in tokens; None where it sees everything."""


@dataclass(frozen=True)
class CostModel:
    """Costs of one request of a fixed shape. Build it with `of` or `of_config`.

    `prefill_flops` counts two operations for every multiply-add of the linear layers and of the two attention
    products. Attention is counted as `torch.utils.flop_counter.FlopCounterMode` counts it: every query against every
    key, also above the diagonal and outside a sliding window. The head runs once, for the last position, where prefill
    predicts the first token (`boundary: prefill`).

    `decode_bytes` is what a step of decode must read, in the model's own element type: the weights of the blocks it
    runs, the final norm, the head, one row of the embeddings, and the keys and values the new token attends to, its
    own among them; the mean over the steps that the response takes.

    `wire_bytes` are the bytes of keys and values that the policy sends.

    The dense model is that of the plan's own `boundary`, so that the full plan costs 1.0 under either.
    """

    prompt: int
    response: int
    kv: KVShape
    query_width: int
    """Query heads times their dimension."""
    blocks: tuple[BlockSize, ...]
    head_matrix: int
    """Weights of the head's linear layer."""
    step_parameters: int
    """Weights outside the blocks that a step of decode reads: final norm, head, one row of the embeddings."""

    def __post_init__(self) -> None:
        for name, value, least in (("prompt", self.prompt, 2), ("response", self.response, 2)):
            if value < least:
                raise UserError(
                    f"`{name}` of the cost model is {value} token(s): give at least {least}, for with fewer one of the "
                    "stages has nothing to do."
                )

    @classmethod
    def of(cls, model: StagedCausalLM, prompt: int, response: int) -> CostModel:
        """Costs of a model that is at hand, whether or not this process holds its weights whole.

        Args:
            model: with all its blocks.
            prompt: tokens of the prompt.
            response: tokens of the response.

        Raises:
            UserError: a prompt or response of fewer than two tokens.
        """
        architecture, dtype = model.architecture, model.model.dtype
        return cls.of_config(model.model.config, prompt, response, dtype=dtype, architecture=architecture)

    @classmethod
    def of_config(
        cls, config: PreTrainedConfig, prompt: int, response: int, *, dtype: torch.dtype | None = None,
        architecture: Architecture | None = None,
    ) -> CostModel:  # fmt: skip
        """Costs of a model that only its configuration describes.

        Args:
            config: of a decoder-only model.
            prompt: tokens of the prompt.
            response: tokens of the response.
            dtype: element type of weights and KV; the configuration's own by default, else float32.
            architecture: adapter of the model's family, where the package has none.

        Raises:
            UserError: no adapter for the family, or a prompt or response of fewer than two tokens.
        """
        architecture = architecture or architecture_of(config)
        model = meta_model(config)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        assert head is not None
        blocks = architecture.blocks(model)
        others = _elements(blocks.parameters()) + _elements(embeddings.parameters())
        norm = _elements(model.base_model.parameters()) - others
        row = embeddings.get_parameter("weight").shape[-1]
        kv = kv_shape_of(model, dtype)
        return cls(
            prompt, response, kv,
            query_width=config.num_attention_heads * kv.head_dim,
            blocks=tuple(
                BlockSize(
                    parameters=_elements(block.parameters()),
                    matrices=_matrices(block),
                    kv_matrices=sum(_matrices(block.get_submodule(name)) for name in architecture.kv_modules),
                    window=architecture.window(config, position),
                )
                for position, block in enumerate(blocks)
            ),
            head_matrix=_matrices(head),
            step_parameters=norm + _elements(head.parameters()) + row,
        )  # fmt: skip

    def prefill_flops(self, plan: StagePlan) -> int:
        """Floating-point operations of prefill, as `FlopCounterMode` counts them."""
        return self._prefill(plan.prefill, plan.kv_only, plan.boundary)

    def decode_bytes(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> float:
        """Bytes that a step of decode reads, mean over the response's steps; no policy sends everything."""
        return self._decode(plan.decode, policy, plan.boundary)

    def wire_bytes(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> int:
        """Bytes of keys and values on the wire, as `KVRetentionPolicy.sent_bytes`; no policy sends everything."""
        positions = handled_positions(self.prompt, plan.boundary)
        shape = self.kv if policy is None else policy.kv
        if policy is None:
            return shape.bytes_per_position * positions * len(plan.decode)
        return sum(_sent_bytes(policy.rule(block), positions, shape) for block in plan.decode)

    def shares(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> Costs:
        """All three as shares of the dense model's, which runs every block and sends everything."""
        flops, read = self._dense[plan.boundary]
        shape = self.kv if policy is None else policy.kv
        everything = shape.bytes_per_position * handled_positions(self.prompt, plan.boundary) * len(self.blocks)
        return Costs(
            self.prefill_flops(plan) / flops,
            self.decode_bytes(plan, policy) / read,
            self.wire_bytes(plan, policy) / everything,
        )

    @cached_property
    def _dense(self) -> dict[Boundary, tuple[int, float]]:
        every = range(len(self.blocks))
        boundaries: tuple[Boundary, ...] = ("prefill", "decode")
        return {b: (self._prefill(every, (), b), self._decode(every, None, b)) for b in boundaries}

    def _prefill(self, runs: Iterable[int], projects: Iterable[int], boundary: Boundary) -> int:
        positions = handled_positions(self.prompt, boundary)
        attention = 2 * self.query_width * positions * positions  # scores, and their product with the values
        adds = sum(self.blocks[block].matrices * positions + attention for block in runs)
        adds += sum(self.blocks[block].kv_matrices * positions for block in projects)
        return 2 * (adds + (self.head_matrix if boundary == "prefill" else 0))

    def _decode(self, runs: Iterable[int], policy: KVRetentionPolicy | None, boundary: Boundary) -> float:
        positions, steps = handled_positions(self.prompt, boundary), self.response - (boundary == "prefill")
        weights, entries = self.step_parameters, 0
        for index in runs:
            block, rule = self.blocks[index], KEEP_ALL if policy is None else policy.rule(index)
            kept = _counts(rule.keep, rule.first, rule.last, positions)
            weights += block.parameters
            entries += _entries(*kept, positions, steps, block.window)
        return weights * BYTES_PER_ELEMENT[self.kv.dtype] + self.kv.bytes_per_position * entries / steps


@lru_cache(maxsize=4096)
def _sent_bytes(rule: Retention, positions: int, kv: KVShape) -> int:
    return rule.bytes_sent(positions, *kv.sizes)


@lru_cache(maxsize=4096, typed=True)  # typed: 1 token is not a share of 1.0
def _counts(keep: str, first: int | float, last: int | float, positions: int) -> tuple[int, int]:
    return Retention("all" if keep == "all" else "first_last", first, last).counts(positions)


@lru_cache(maxsize=4096)
def _entries(first: int, last: int, positions: int, steps: int, window: int | None) -> int:
    """Cached entries that the new tokens of all steps attend to, of which decode was sent the first and last ones."""
    total = 0
    for step in range(steps):
        hidden = 0 if window is None else max(positions + step + 1 - window, 0)  # earlier ones are out of the window
        own = step + 1 if window is None else min(step + 1, window)
        total += max(first - hidden, 0) + max(positions - max(positions - last, hidden), 0) + own
    return total


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _matrices(module: nn.Module) -> int:
    return _elements(parameter for parameter in module.parameters() if parameter.dim() == 2)
