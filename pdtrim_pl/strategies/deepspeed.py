"""DeepSpeed with the cures that drops between epochs and a teacher beside the student need; what other strategies bear.

Named in YAML: `strategy: {class_path: pdtrim_pl.strategies.PDTrimDeepSpeedStrategy, init_args: {stage: 2}}`, or
`strategy: {class_path: pdtrim_pl.strategies.PDTrimFSDPStrategy}`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from pdtrim_pl import compat
from pdtrim_pl.checkpoints.shard_writer import ShardWriter
from pdtrim_pl.checkpoints.sharded import (
    ShardedCheckpoint,
    check_harmless,
    put_in_place,
    read_run_state,
    read_weights,
    remove,
    unfinished,
)
from pdtrim_pl.checkpoints.state import CheckpointState, remove_beside, unwritable
from pdtrim_pl.errors import UserError
from pdtrim_pl.parallel import Ranks
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies.fsdp import PDTrimFSDPStrategy

ZERO_STAGES = (1, 2, 3)


class PDTrimDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, made right for this package.

    - Gradients of accumulated batches are scaled once, and the last batches of an epoch take their step even where
      they are fewer than `accumulate_grad_batches`, as under every other strategy.
    - Under ZeRO-3 no rank ever holds a whole Hugging Face model: only rank 0 reads the weights' values, out of mapped
      files, and hands them out one layer at a time. The RoPE tables stay exact.
    - Checkpoints are directories with the plan, policy and YAML beside them, written under a temporary name; the
      teacher is never in them. One of another number of processes, ZeRO stage or model is refused by name. Where one
      rank cannot write its shard, all stop with the same error.
    - CPU offload takes any optimizer, and a block that was dropped does not get its last gradient again and again.

    Args:
        stage: ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 weights too, the teacher's included.
        **kwargs: those of Lightning's `DeepSpeedStrategy`, such as `offload_optimizer` and `offload_parameters`.

    Raises:
        UserError: another stage.
    """

    def __init__(self, stage: int = 2, **kwargs: Any) -> None:
        super().__init__(stage=stage, exclude_frozen_parameters=True, **kwargs)
        assert isinstance(self.config, dict)
        self.stage = int(self.config.get("zero_optimization", {}).get("stage", 0))
        if self.stage not in ZERO_STAGES:
            raise UserError(f"`stage` of the DeepSpeed strategy is {self.stage}: give 1, 2 or 3.")
        # DeepSpeed else insists on its own Adam for offloaded states, which is compiled at its first use.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning says where a step is due, and `training_step` tells the engine."""
        return False

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        yield  # the engine sums gradients that are sharded at every batch, and has no way to leave that out

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        with super().model_sharded_context():
            if not self.zero_stage_3:
                yield
                return
            from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

            config = HfDeepSpeedConfig(self.config)  # `from_pretrained` finds it through a weak reference
            try:
                yield
            finally:
                unset_hf_deepspeed_config()  # what is loaded later (an export, by rank 0 alone) is not sharded
                del config
        assert self.lightning_module is not None
        for model in self.lightning_module.children():
            if isinstance(model, StagedCausalLM):
                model.rebuild_rope()  # DeepSpeed made every floating tensor in the element type of the weights

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        due = compat.optimizer_step_is_due(self.lightning_module.trainer)
        self.deepspeed_engine.set_gradient_accumulation_boundary(due)
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of accumulated batches already.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def forget_gradients(self) -> None:
        """Empty the buffers in which an offloaded optimizer gets its gradients, between two optimizer steps.

        A step writes there only what took part in it, so a block that was dropped would get its last gradient again
        at every step, frozen or not (DeepSpeed 0.19).
        """
        assert isinstance(self.config, dict)
        if "offload_optimizer" not in self.config["zero_optimization"]:
            return
        for part in compat.fp32_parts(self.deepspeed_engine, self.stage):
            if part.grad is not None:
                part.grad.zero_()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("`storage_options` is for a checkpoint file, and DeepSpeed writes a directory of shards.")
        path = self.broadcast(filepath)
        writer = ShardWriter(unfinished(path))
        if self.is_global_zero:
            writer.attempt(remove, unfinished(path))
        writer.save(self.deepspeed_engine, checkpoint)
        files = self._agree(writer, path)
        if self.is_global_zero:
            writer.attempt(self._finish, CheckpointState.of(checkpoint), files, path)
        self._agree(writer, path)

    def _agree(self, writer: ShardWriter, path: str | Path) -> dict[str, int]:
        """What all ranks have written; if one of them could not, none goes on.

        Raises:
            OSError: on every rank; the part that was written is deleted.
        """
        told = ranks_of(self).gather((writer.files, writer.error))
        failed = {rank: error for rank, (_, error) in enumerate(told) if error}
        if not failed:
            return {name: size for files, _ in told for name, size in files.items()}
        if self.is_global_zero:
            with suppress(OSError):
                remove(unfinished(path))
        self.barrier("what was written is deleted")
        first = min(failed)
        raise unwritable(path, f"rank {first}, one of {len(failed)} that could not: {failed[first]}")

    def _finish(self, state: CheckpointState, files: Mapping[str, int], path: str | Path) -> None:
        note = ShardedCheckpoint.of(self.stage, self.world_size, self._student(), state.to_json(), files)
        note.save(unfinished(path))
        state.write_beside(path)
        put_in_place(path)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        saved = ShardedCheckpoint.load(checkpoint_path)
        saved.check(ShardedCheckpoint.of(self.stage, self.world_size, self._student()), checkpoint_path)
        check_harmless(checkpoint_path)
        assert self.lightning_module is not None
        if self.zero_stage_3 and self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            # DeepSpeed keeps ZeRO-3 weights with the optimizer's, and has no optimizer here: rank 0 hands them out.
            weights = read_weights(checkpoint_path) if self.is_global_zero else {}
            compat.hand_out_weights(self, weights)
            return read_run_state(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove(filepath)
            remove_beside(filepath)

    @override
    def teardown(self) -> None:
        # Not moved to the CPU: shards do not move with their module, and exporting needs both in one place.
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def _student(self) -> StagedCausalLM:
        assert self.lightning_module is not None
        student = self.lightning_module.get_submodule("student")
        assert isinstance(student, StagedCausalLM)
        return student


def shards_weights(strategy: Strategy) -> bool:
    """Whether no rank holds whole weights, so that a forward pass of any block is a matter of all ranks together."""
    return isinstance(strategy, PDTrimFSDPStrategy) or _is_zero_3(strategy)


def check_freezing(strategy: Strategy, freeze_embeddings: bool) -> None:
    """Refuse frozen embeddings where they would be missing from checkpoints, or where nobody has tried them.

    Raises:
        UserError: with the reason and the way out.
    """
    if freeze_embeddings and isinstance(strategy, PDTrimDeepSpeedStrategy | PDTrimFSDPStrategy):
        raise UserError(
            "`loading.freeze_embeddings` does not go with a strategy that shards weights or optimizer: DeepSpeed's "
            "checkpoints leave frozen weights out. Leave it off, or use `strategy: ddp`."
        )


def gathered(strategy: Strategy, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole weights on every rank while the context lasts; every rank must enter it. Changes to them are lost.

    FSDP's are cut up after the model is built, and are then tensors that can make themselves whole.
    """
    if not _is_zero_3(strategy):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def forget_gradients(strategy: Strategy) -> None:
    """After a plan has changed: keep no gradient of a block that takes none any more."""
    if isinstance(strategy, PDTrimDeepSpeedStrategy):
        strategy.forget_gradients()


def check_strategy(strategy: Strategy, stage: str = "fit") -> None:
    """Refuse a strategy that would train something else than what the configuration says.

    Raises:
        UserError: with the reason and the way out.
    """
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
    if stage == "predict" and shards_weights(strategy):
        raise UserError(
            "`predict` cannot run with sharded weights: ranks have unequal numbers of prompts, and no rank can run a "
            "block alone. Use another `trainer.strategy`, or `pdtrim export` and `pdtrim generate`."
        )


def _is_zero_3(strategy: Strategy) -> bool:
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3


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


def agreed(strategy: Strategy, value: Any) -> Any:
    """Rank 0's value on every rank, for decisions that floating-point noise must not let differ."""
    return strategy.broadcast(value)


def ranks_of(strategy: Strategy) -> Ranks:
    """How the processes of a run evaluate together."""
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    rank, size = dist.get_rank(), dist.get_world_size()
    whole = not shards_weights(strategy)
    gather_weights = None if whole else partial(gathered, strategy)
    assert isinstance(strategy, ParallelStrategy)
    assert strategy.cluster_environment is not None
    return Ranks(
        rank, size, partial(agreed, strategy), gather, dist.broadcast, strategy.cluster_environment.main_address,
        _own_part(strategy), gather_weights, whole,
    )  # fmt: skip


def _own_part(strategy: Strategy) -> Callable[[nn.Parameter], Tensor]:
    """What a rank holds of a weight."""
    if isinstance(strategy, PDTrimFSDPStrategy):
        return lambda weight: weight.to_local() if isinstance(weight, DTensor) else weight
    if _is_zero_3(strategy):
        return compat.own_shard
    return lambda weight: weight


def largest(strategy: Strategy, value: int, device: torch.device) -> int:
    """The largest of the ranks' values."""
    return int(strategy.reduce(torch.tensor(value, device=device), reduce_op="max"))
