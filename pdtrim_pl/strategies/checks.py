"""Checks that refuse strategies for certain tasks, and the sharding of a strategy for the dry run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pdtrim_pl import compat
from pdtrim_pl.errors import UserError
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.staged.trainable import Trainable
from pdtrim_pl.strategies.deepspeed import PDTrimDeepSpeedStrategy
from pdtrim_pl.strategies.fsdp import PDTrimFSDPStrategy

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sharding:
    """How a strategy spreads a model over its processes."""

    zero_stage: int = 0
    """ZeRO stage of DeepSpeed; 3 under FSDP, which shards the same; 0 if every process holds everything."""
    fsdp: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    casts: bool = False
    """Whether an engine casts the whole module to the 16-bit type of the trainer's precision."""

    @classmethod
    def of(cls, strategy: Strategy | str) -> Sharding:
        """The sharding of a strategy, given as an object or by name."""
        if isinstance(strategy, PDTrimFSDPStrategy):
            return cls(3, fsdp=True)
        if not isinstance(strategy, PDTrimDeepSpeedStrategy):
            return cls()
        assert isinstance(strategy.config, dict)
        zero = strategy.config["zero_optimization"]
        return cls(
            strategy.stage, offload_optimizer="offload_optimizer" in zero, offload_parameters="offload_param" in zero,
            casts=True,
        )  # fmt: skip


def directory_stage(strategy: Strategy) -> int | None:
    """The ZeRO stage, if the strategy writes checkpoints as directories of shards; None if it writes files."""
    return strategy.stage if isinstance(strategy, PDTrimDeepSpeedStrategy) else None


def check_strategy(strategy: Strategy | str, stage: str = "fit") -> None:
    """Refuse a strategy (object or name) under which a run would not do what its configuration says.

    Args:
        strategy: strategy of the trainer, or its name.
        stage: what the trainer runs: `fit`, `validate`, `test` or `predict`.

    Raises:
        UserError: the strategy is refused. The message gives the reason and an alternative.
    """
    if isinstance(strategy, str) and any(name in strategy for name in ("deepspeed", "fsdp")):
        raise UserError(
            f"`trainer.strategy` is {strategy!r}, Lightning's own. Use `strategy: {{class_path: "
            "pdtrim_pl.strategies.PDTrimDeepSpeedStrategy, init_args: {stage: 2}}`, or stage 1 or 3, or `strategy: "
            "{class_path: pdtrim_pl.strategies.PDTrimFSDPStrategy}`."
        )
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, PDTrimDeepSpeedStrategy):
        raise UserError(
            f"`trainer.strategy` is Lightning's own {type(strategy).__name__}, which scales accumulated gradients "
            "twice and saves no plan beside its checkpoints. Use `strategy: {class_path: "
            "pdtrim_pl.strategies.PDTrimDeepSpeedStrategy, init_args: {stage: 2}}` (or 1 or 3; `offload_optimizer` "
            "and `offload_parameters` as before)."
        )
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, PDTrimFSDPStrategy):
        raise UserError(
            f"`trainer.strategy` is Lightning's own {type(strategy).__name__}, under which FSDP gathers a block's "
            "weights for gradients of its output only. Here gradients also reach a block through its keys and values. "
            "Use `strategy: {class_path: pdtrim_pl.strategies.PDTrimFSDPStrategy}`, or PDTrimDeepSpeedStrategy with "
            "`stage: 3`."
        )
    if stage == "predict" and Sharding.of(strategy).zero_stage == 3:
        raise UserError(
            "`predict` cannot run with sharded weights: every forward pass needs all ranks, and ranks may have "
            "different numbers of prompts. Use another `trainer.strategy`, or `pdtrim export` and `pdtrim generate`."
        )


def check_freezing(strategy: Strategy | str, freeze_embeddings: bool) -> None:
    """Refuse frozen embeddings under strategies that shard: checkpoints would lack them, or it is untested.

    Raises:
        UserError: embeddings are frozen under DeepSpeed or FSDP.
    """
    if freeze_embeddings and isinstance(strategy, PDTrimDeepSpeedStrategy | PDTrimFSDPStrategy):
        raise UserError(
            "`loading.freeze_embeddings` does not go with a strategy that shards weights or optimizer: DeepSpeed's "
            "checkpoints leave frozen weights out. Leave it off, or use `strategy: ddp`."
        )


def check_trainable(strategy: Strategy | str, trainable: Trainable | LoRA) -> None:
    """Refuse frozen weights under strategies that cannot do without gradients of some weights.

    Raises:
        UserError: a part of the weights trains under DeepSpeed or FSDP, or a part that grows during the run under DDP.
    """
    if trainable == "all":
        return
    if isinstance(strategy, PDTrimDeepSpeedStrategy | PDTrimFSDPStrategy):
        raise UserError(
            "`trainable` freezes weights, and this `trainer.strategy` shards weights or optimizer: DeepSpeed's "
            "checkpoints leave frozen weights out. Use `trainable: all`, or `strategy: "
            "ddp_find_unused_parameters_true`."
        )
    if trainable == "merged" and (isinstance(strategy, DDPStrategy) or "ddp" in str(strategy)):
        raise UserError(
            "`trainable: merged` lets weights train that were frozen when the run began, and DDP sums gradients only "
            "of those that trained then. Use `trainable: all`, or one device."
        )


def check_compiling(strategy: Strategy | str, trainable: Trainable | LoRA) -> None:
    """Refuse compiled blocks where every block has hooks in its layers: blocks with hooks run as they are.

    Raises:
        UserError: weights are sharded, or adapters train.
    """
    why = None
    if Sharding.of(strategy).zero_stage == 3:
        why = "this `trainer.strategy` gathers sharded weights by hooks in every block. Use ZeRO-1, ZeRO-2 or DDP"
    elif trainable == "lora" or isinstance(trainable, LoRA):
        why = "`trainable: lora` adds adapters by hooks in every layer. Use `trainable: all`"
    if why is not None:
        raise UserError(f"`loading.compile` would compile nothing: {why}, or leave `compile` out.")


def check_teacher_bits(strategy: Strategy | str, bits: int | None) -> None:
    """Refuse a teacher in 8 bits under strategies that cast or shard its weights.

    Raises:
        UserError: the teacher is in 8 bits under DeepSpeed or FSDP.
    """
    if bits is not None and isinstance(strategy, PDTrimDeepSpeedStrategy | PDTrimFSDPStrategy):
        raise UserError(
            f"`loading.teacher_bits: {bits}` does not go with a strategy that casts or shards every model. Leave it "
            "out and set `loading.teacher_dtype: bfloat16`, use `teacher.placement: offline`, or use `strategy: "
            "ddp_find_unused_parameters_true`."
        )


def check_drops(strategy: Strategy) -> None:
    """Refuse a strategy under which blocks cannot be dropped during a run.

    Raises:
        UserError: DDP needs a gradient of every parameter. The message gives an alternative.
    """
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        return
    settings = compat.ddp_settings(strategy)
    if settings.get("static_graph") or not settings.get("find_unused_parameters"):
        raise UserError(
            "`trainer.strategy` is DDP that waits for a gradient of every parameter at every step "
            f"({settings or 'its default'}), but dropped blocks have none. Use `strategy: "
            "ddp_find_unused_parameters_true`, without `static_graph`."
        )


def check_merges(strategy: Strategy, tied: bool) -> None:
    """Refuse merges that a strategy cannot apply during a run.

    Args:
        strategy: strategy of the trainer.
        tied: whether merged blocks are written into weights that both stages share.

    Raises:
        UserError: the strategy cannot add weights during a run. The message gives an alternative.
    """
    if not tied:
        _refuse_new_weights(
            strategy,
            "Set `tied: true` for the merges: then they are made only in both stages at once (this does not work with "
            "JointDrop, which merges in one stage at a time). Or use `strategy: ddp_find_unused_parameters_true`.",
        )


def check_refits(strategy: Strategy, tied: bool) -> None:
    """Refuse refits that a strategy cannot apply during a run.

    Args:
        strategy: strategy of the trainer.
        tied: whether a layer is refitted only if all stages that use it lose the same.

    Raises:
        UserError: the strategy cannot add weights during a run. The message gives an alternative.
    """
    if not tied:
        _refuse_new_weights(
            strategy,
            "Set `repair: {tied: true}`, which refits a layer only if both stages lose the same, set `repair: null`, "
            "or use `strategy: ddp_find_unused_parameters_true`.",
        )


def check_kv_refits(strategy: Strategy) -> None:
    """Refuse refits of keys and values that a strategy cannot apply during a run.

    Raises:
        UserError: the strategy cannot add weights during a run. The message gives an alternative.
    """
    _refuse_new_weights(strategy, "Set `refit_examples: 0`, or use `strategy: ddp_find_unused_parameters_true`.")


def check_new_widths(strategy: Strategy) -> None:
    """Refuse strategies that cannot try refitted layers of narrower blocks during a search.

    Raises:
        UserError: the strategy shards weights, so that no rank can run a block with one layer of its own.
    """
    _refuse_new_weights(
        strategy,
        "JointDrop tries narrower blocks with layers of their own: leave its `width` out, narrow with WidthDrop and "
        "`repair: {tied: true}`, or use `strategy: ddp_find_unused_parameters_true`.",
    )


def _refuse_new_weights(strategy: Strategy, way_out: str) -> None:
    """Refuse a strategy that cannot add weights during a run."""
    if isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy):
        engine = "DeepSpeed" if isinstance(strategy, DeepSpeedStrategy) else "FSDP"
        raise UserError(
            f"`trainer.strategy` is {engine}, whose shards are cut once, at the start, so that no block can get "
            f"weights of its own later. {way_out}"
        )


def check_skipping(strategy: Strategy, skip: int) -> None:
    """Refuse to skip steps under DeepSpeed, where no callback can undo gradients.

    Raises:
        MisconfigurationException: `skip` is above 0 under DeepSpeed.
    """
    if skip and isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"`skip` of the loss guard is {skip}, and DeepSpeed's engine holds gradients where no callback "
            "can take them back. Set it to 0: the run then saves the batch and stops. Continue it with `--ckpt_path`."
        )


def check_masters(strategy: Strategy | str, precision: str, dtype: torch.dtype | None) -> None:
    """Refuse training in which small steps are lost to rounding.

    bf16 has 8 bits of mantissa: at a learning rate of 1e-5, Adam does not change any weight above 5e-3, without any
    warning. Training needs fp32 weights. DeepSpeed keeps an fp32 copy of every weight that it trains; a mixed precision
    keeps the weights themselves in fp32.

    Args:
        strategy: strategy of the trainer, or its name.
        precision: precision of the trainer, in Lightning's full spelling.
        dtype: element type of the student's weights as they are loaded; None if it is not known yet.

    Raises:
        UserError: the weights would train in 16 bits only. The message gives an alternative.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        return
    if precision in ("bf16-true", "16-true") or precision.startswith("transformer-engine"):
        mixed = "16-mixed" if precision == "16-true" else "bf16-mixed"
        raise UserError(
            f"`trainer.precision: {precision}` keeps the weights that train in 16 bits alone, so that at a learning "
            f"rate of 1e-5 most steps round to nothing. Use `precision: {mixed}`, or PDTrimDeepSpeedStrategy, which "
            "keeps fp32 copies."
        )
    if dtype in _HALF:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"The student's weights are {name} (`loading.dtype`), and under this `trainer.strategy` nothing keeps fp32 "
            "copies of them, so that at a learning rate of 1e-5 most steps round to nothing. Set `loading.dtype: "
            "float32` with `precision: bf16-mixed`, or use PDTrimDeepSpeedStrategy."
        )
