"""The costs of one request under a plan and a policy, computed from the model's shapes without running it.

Shapes: P prompt positions that prefill handles, R response tokens, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from transformers import PreTrainedConfig

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture, architecture_of
from pdtrim_pl.plan import (
    BYTES_PER_ELEMENT,
    KEEP_ALL,
    Boundary,
    KVRetentionPolicy,
    KVShape,
    Part,
    Retention,
    StagePlan,
    handled_positions,
)
from pdtrim_pl.sizing.block_size import BlockSize, elements, matrices_of
from pdtrim_pl.sizing.shape import meta_model
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of

Widths = Mapping[int, Mapping[Part, int]]
"""Block -> its numbers of channels and heads; what is missing is as in the model."""

ROUNDING = 1e-9
"""Relative tolerance of the comparison with a target, so that 24 of 30 blocks meet a target of 0.8."""


@dataclass(frozen=True)
class Costs:
    """Costs of one request as shares of the dense model's costs. The full plan that sends everything costs 1.0."""

    prefill_flops: float
    decode_bytes: float
    wire_bytes: float


@dataclass(frozen=True)
class CostTarget:
    """Maximum costs of a request, as shares of the dense model's costs, each in (0, 1].

    Raises:
        UserError: a share out of range.
    """

    prefill_flops: float = 1.0
    """Floating-point operations of prefill."""
    decode_bytes: float = 1.0
    """Bytes that a decode step reads."""
    wire_bytes: float = 1.0
    """Bytes of keys and values that prefill sends to decode."""

    def __post_init__(self) -> None:
        faults = [f"`target.{name}` is {share!r}" for name, share in vars(self).items() if not 0.0 < share <= 1.0]
        if faults:
            raise UserError(f"{', '.join(faults)}: give a share of the dense model's cost in (0, 1]; 1 sets no limit.")

    def met(self, costs: Costs) -> bool:
        """Whether no cost is above its target, up to rounding."""
        return self.excess(costs) == 0.0

    def excess(self, costs: Costs) -> float:
        """By how much the costs exceed the target: the sum of the relative excess of each cost; 0 if all are met.

        It is a sum, so that a saving in any cost that is too high brings a search nearer to the target.
        """
        ratios = (
            costs.prefill_flops / self.prefill_flops,
            costs.decode_bytes / self.decode_bytes,
            costs.wire_bytes / self.wire_bytes,
        )
        return sum(ratio - 1.0 for ratio in ratios if ratio > 1.0 + ROUNDING)


@dataclass(frozen=True)
class CostModel:
    """Costs of one request of a fixed shape. Build it with `of` or `of_config`.

    `prefill_flops` counts two operations for every multiply-add of the linear layers and of the two attention
    products. Attention is counted as in `torch.utils.flop_counter.FlopCounterMode`: every query with every key, also
    above the diagonal and outside a sliding window. If prefill predicts the first token (`boundary: prefill`), the head
    runs once, for the last position.

    `decode_bytes` are the bytes that a decode step must read, in the model's own element type: the weights of its
    blocks, the final norm, the head, one row of the embeddings, and the keys and values that the new token attends to
    (its own included). It is the mean over the steps of the response.

    `wire_bytes` are the bytes of keys and values that the policy sends.

    Blocks are counted as wide as an export writes them: all as the widest one of their stage, unless the plan has
    `export_widths: per_block`.

    Shares are relative to the dense model with the `boundary` of the plan, so the full plan costs 1.0 under both.
    """

    prompt: int
    response: int
    kv: KVShape
    query_heads: int
    """Number of query heads."""
    blocks: tuple[BlockSize, ...]
    head_matrix: int
    """Number of weights of the head's linear layer."""
    step_parameters: int
    """Number of weights outside the blocks that a decode step reads: final norm, head, one row of the embeddings."""

    def __post_init__(self) -> None:
        for name, value, least in (("prompt", self.prompt, 2), ("response", self.response, 2)):
            if value < least:
                raise UserError(
                    f"`{name}` of the cost model is {value} token(s): give at least {least}. With fewer, one of the "
                    "stages has nothing to do."
                )

    @classmethod
    def of(cls, model: StagedCausalLM, prompt: int, response: int) -> CostModel:
        """The cost model of a loaded model. Its weights may be sharded.

        Args:
            model: the model, with all its blocks.
            prompt: number of prompt tokens.
            response: number of response tokens.

        Raises:
            UserError: prompt or response has fewer than two tokens.
        """
        architecture, dtype = model.architecture, model.model.dtype
        return cls.of_config(model.model.config, prompt, response, dtype=dtype, architecture=architecture)

    @classmethod
    def of_config(
        cls, config: PreTrainedConfig, prompt: int, response: int, *, dtype: torch.dtype | None = None,
        architecture: Architecture | None = None,
    ) -> CostModel:  # fmt: skip
        """The cost model of a configuration, without weights.

        Args:
            config: configuration of a decoder-only model.
            prompt: number of prompt tokens.
            response: number of response tokens.
            dtype: element type of weights and KV; by default that of the configuration, else float32.
            architecture: adapter of the model's family, if the package has none.

        Raises:
            UserError: there is no adapter for the family, or prompt or response has fewer than two tokens.
        """
        architecture = architecture or architecture_of(config)
        model = meta_model(config)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        assert head is not None
        blocks = architecture.blocks(model)
        others = elements(blocks.parameters()) + elements(embeddings.parameters())
        norm = elements(model.base_model.parameters()) - others
        row = embeddings.get_parameter("weight").shape[-1]
        kv = kv_shape_of(model, dtype)
        return cls(
            prompt, response, kv,
            query_heads=config.num_attention_heads,
            blocks=tuple(
                BlockSize.of(block, position, architecture, config)
                for position, block in enumerate(blocks)
            ),
            head_matrix=matrices_of(head),
            step_parameters=norm + elements(head.parameters()) + row,
        )  # fmt: skip

    def prefill_flops(self, plan: StagePlan) -> int:
        """Floating-point operations of prefill, counted as in `FlopCounterMode`."""
        return self._prefill(plan.prefill, plan.kv_only, plan.boundary, plan.exported_widths("prefill"))

    def decode_bytes(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> float:
        """Bytes that a decode step reads, as the mean over the steps of the response. No policy sends everything."""
        return self._decode(plan.decode, policy, plan.boundary, plan.exported_widths("decode"))

    def wire_bytes(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> int:
        """Bytes of keys and values on the wire; see `KVRetentionPolicy.sent_bytes`. No policy sends everything."""
        positions = handled_positions(self.prompt, plan.boundary)
        shape = self.kv if policy is None else policy.kv
        if policy is None:
            return shape.bytes_per_position * positions * len(plan.decode)
        return sum(_sent_bytes(policy.rule(block), positions, shape) for block in plan.decode)

    def shares(self, plan: StagePlan, policy: KVRetentionPolicy | None = None) -> Costs:
        """All three costs as shares of those of the dense model, which runs every block and sends everything."""
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
        return {b: (self._prefill(every, (), b, {}), self._decode(every, None, b, {})) for b in boundaries}

    def _prefill(self, runs: Iterable[int], projects: Iterable[int], boundary: Boundary, widths: Widths) -> int:
        positions, adds = handled_positions(self.prompt, boundary), 0
        for block in runs:
            wide = widths.get(block, {})
            pairs = wide.get("heads", self.query_heads) * positions * positions
            adds += self.blocks[block].narrowed(wide).matrices * positions
            adds += 2 * self.kv.head_dim * pairs  # scores, and their product with the values
        adds += sum(self.blocks[block].kv_matrices * positions for block in projects)
        return 2 * (adds + (self.head_matrix if boundary == "prefill" else 0))

    def _decode(
        self, runs: Iterable[int], policy: KVRetentionPolicy | None, boundary: Boundary, widths: Widths
    ) -> float:
        positions, steps = handled_positions(self.prompt, boundary), self.response - (boundary == "prefill")
        weights, entries = self.step_parameters, 0
        for index in runs:
            block, rule = self.blocks[index], KEEP_ALL if policy is None else policy.rule(index)
            kept = _counts(rule.keep, rule.first, rule.last, positions)
            weights += block.narrowed(widths.get(index, {})).parameters
            entries += _entries(*kept, positions, steps, block.window)
        return weights * BYTES_PER_ELEMENT[self.kv.dtype] + self.kv.bytes_per_position * entries / steps


@lru_cache(maxsize=4096)
def _sent_bytes(rule: Retention, positions: int, kv: KVShape) -> int:
    return rule.bytes_sent(positions, *kv.sizes)


@lru_cache(maxsize=4096, typed=True)  # `typed` tells the count 1 from the share 1.0
def _counts(keep: str, first: int | float, last: int | float, positions: int) -> tuple[int, int]:
    return Retention("all" if keep == "all" else "first_last", first, last).counts(positions)


@lru_cache(maxsize=4096)
def _entries(first: int, last: int, positions: int, steps: int, window: int | None) -> int:
    """Number of cache entries that the new tokens of all steps attend to, summed over the steps.

    Args:
        first: number of first prompt positions that were sent.
        last: number of last prompt positions that were sent.
        positions: number of prompt positions that prefill handles.
        steps: number of decode steps.
        window: sliding window in tokens; None for no window.
    """
    total = 0
    for step in range(steps):
        hidden = 0 if window is None else max(positions + step + 1 - window, 0)  # earlier ones are out of the window
        own = step + 1 if window is None else min(step + 1, window)
        total += max(first - hidden, 0) + max(positions - max(positions - last, hidden), 0) + own
    return total
