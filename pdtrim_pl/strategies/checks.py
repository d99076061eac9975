"""Which strategies are refused for what, each with the reason and the way out, and what a dry run asks of one."""

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
from pdtrim_pl.strategies.deepspeed import PDTrimDeepSpeedStrategy
from pdtrim_pl.strategies.fsdp import PDTrimFSDPStrategy

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sharding:
    """How a strategy spreads a model over its processes."""

    zero_stage: int = 0
    """DeepSpeed's; 3 under FSDP, which shards the same; 0 where every process holds everything."""
    fsdp: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    casts: bool = False
    """Whether an engine casts the whole module to the trainer's 16 bits."""

    @classmethod
    def of(cls, strategy: Strategy | str) -> Sharding:
        """That of a strategy, or of its name."""
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
    """The ZeRO stage of checkpoints that are directories of shards; None where they are files."""
    return strategy.stage if isinstance(strategy, PDTrimDeepSpeedStrategy) else None


def check_strategy(strategy: Strategy | str, stage: str = "fit") -> None:
    """Refuse a strategy, or the name of one, that would train something else than what the configuration says.

    Raises:
        UserError: with the reason and the way out.
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
            "weights for its output alone, and here gradients also reach a block through the keys and values it sends. "
            "Use `strategy: {class_path: pdtrim_pl.strategies.PDTrimFSDPStrategy}`, or PDTrimDeepSpeedStrategy with "
            "`stage: 3`."
        )
    if stage == "predict" and Sharding.of(strategy).zero_stage == 3:
        raise UserError(
            "`predict` cannot run with sharded weights: ranks have unequal numbers of prompts, and no rank can run a "
            "block alone. Use another `trainer.strategy`, or `pdtrim export` and `pdtrim generate`."
        )


def check_freezing(strategy: Strategy | str, freeze_embeddings: bool) -> None:
    """Refuse frozen embeddings where they would be missing from checkpoints, or where nobody has tried them.

    Raises:
        UserError: with the reason and the way out.
    """
    if freeze_embeddings and isinstance(strategy, PDTrimDeepSpeedStrategy | PDTrimFSDPStrategy):
        raise UserError(
            "`loading.freeze_embeddings` does not go with a strategy that shards weights or optimizer: DeepSpeed's "
            "checkpoints leave frozen weights out. Leave it off, or use `strategy: ddp`."
        )


def check_drops(strategy: Strategy) -> None:
    """Refuse a strategy under which a block cannot leave in the middle of a run.

    Raises:
        UserError: with the reason and the way out.
    """
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        return
    settings = compat.ddp_settings(strategy)
    if settings.get("static_graph") or not settings.get("find_unused_parameters"):
        raise UserError(
            "`trainer.strategy` is DDP that waits for a gradient of every parameter at every step "
            f"({settings or 'its default'}), and blocks that were dropped give none. Use `strategy: "
            "ddp_find_unused_parameters_true`, without `static_graph`."
        )


def check_merges(strategy: Strategy, tied: bool) -> None:
    """Refuse merges that a strategy cannot take up in the middle of a run.

    Args:
        strategy: of the trainer.
        tied: whether merged blocks are written into weights that both stages share.

    Raises:
        UserError: with the reason and the way out.
    """
    if isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy) and not tied:
        engine = "DeepSpeed" if isinstance(strategy, DeepSpeedStrategy) else "FSDP"
        raise UserError(
            f"`trainer.strategy` is {engine}, whose shards are cut once, at the start, so that no block can get "
            "weights of its own later. Set `tied: true` for the merges, which then are made only in both stages at "
            "once (JointDrop merges in one at a time, so not here), or use `strategy: "
            "ddp_find_unused_parameters_true`."
        )


def check_skipping(strategy: Strategy, skip: int) -> None:
    """Refuse to skip steps where no callback can take gradients back.

    Raises:
        MisconfigurationException: with the reason and the way out.
    """
    if skip and isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"`skip` of the loss guard is {skip}, and DeepSpeed's engine holds gradients where no callback "
            "can take them back. Set it to 0: the run stops with the batch saved, and continues with `--ckpt_path`."
        )


def check_masters(strategy: Strategy | str, precision: str, dtype: torch.dtype | None) -> None:
    """Refuse training in which small steps round to nothing.

    bf16 has 8 bits of mantissa: at a rate of 1e-5 Adam changes no weight above 5e-3, and nothing tells. DeepSpeed keeps
    an fp32 copy of every weight that trains; a mixed precision keeps the weights themselves in fp32.

    Args:
        strategy: of the trainer, or its name.
        precision: of the trainer, as Lightning spells it in full.
        dtype: of the student's weights as they are loaded; None where it is not known yet.

    Raises:
        UserError: with the way out.
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
