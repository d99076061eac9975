"""DeepSpeed with the changes that drops between epochs, and a teacher beside the student, require."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
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
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies.base import StrategyParallel
from pdtrim_pl.strategies.zero_heads import gather_heads_once

ZERO_STAGES = (1, 2, 3)


class PDTrimDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with changes for this package.

    - Gradients of accumulated batches are scaled once. The last batches of an epoch take an optimizer step even if they
      are fewer than `accumulate_grad_batches`, as under every other strategy.
    - Under ZeRO-3 no rank holds a whole Hugging Face model: only rank 0 reads weights, from memory-mapped files, and
      sends them to the other ranks layer by layer. The RoPE tables stay exact.
    - Checkpoints are directories, with plan, policy and YAML beside them. They are written under a temporary name and
      never contain the teacher. A checkpoint of another number of processes, ZeRO stage or model is refused. If one
      rank cannot write its shard, all ranks stop with the same error.
    - CPU offload works with any optimizer, and a dropped block does not get its last gradient again at every step.

    Args:
        stage: ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also weights (of the teacher too).
        **kwargs: arguments of Lightning's `DeepSpeedStrategy`, such as `offload_optimizer` and `offload_parameters`.

    Raises:
        UserError: `stage` is not 1, 2 or 3.
    """

    def __init__(self, stage: int = 2, **kwargs: Any) -> None:
        super().__init__(stage=stage, exclude_frozen_parameters=True, **kwargs)
        assert isinstance(self.config, dict)
        self.stage = int(self.config.get("zero_optimization", {}).get("stage", 0))
        if self.stage not in ZERO_STAGES:
            raise UserError(f"`stage` of the DeepSpeed strategy is {self.stage}: give 1, 2 or 3.")
        # Otherwise DeepSpeed requires its own Adam for offloaded states, which it compiles at the first use.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def parallel(self, leave_if_asked: Callable[[], None] = lambda: None) -> ZeroParallel:
        """The communication between the processes of the run; see `Parallel`."""
        return ZeroParallel(self, leave_if_asked)

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning decides when an optimizer step is due, and `training_step` tells the engine."""
        return False

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        yield  # the engine sums sharded gradients at every batch; this cannot be switched off

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
                unset_hf_deepspeed_config()  # models loaded later (an export on rank 0) must not be sharded
                del config
        assert self.lightning_module is not None
        for model in self.lightning_module.children():
            if isinstance(model, StagedCausalLM):
                model.rebuild_rope()  # DeepSpeed created all floating-point tensors in the element type of the weights
                gather_heads_once(model)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        due = compat.optimizer_step_is_due(self.lightning_module.trainer)
        self.deepspeed_engine.set_gradient_accumulation_boundary(due)
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has already divided the loss by the number of accumulated batches.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def forget_gradients(self) -> None:
        """Clear the gradient buffers of an offloaded optimizer, between two optimizer steps.

        A step overwrites only the gradients of parameters that took part in it. Without this, a dropped block gets its
        last gradient again at every step, even if it is frozen (DeepSpeed 0.19).
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
        """The files that all ranks have written.

        Raises:
            OSError: a rank could not write. Raised on every rank, after the incomplete checkpoint is deleted.
        """
        results = self.parallel().gather((writer.files, writer.error))
        failed = {rank: error for rank, (_, error) in enumerate(results) if error}
        if not failed:
            return {name: size for files, _ in results for name, size in files.items()}
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
            # DeepSpeed loads ZeRO-3 weights with the optimizer states, and there is no optimizer: rank 0 sends them.
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
        # Do not move the module to the CPU: shards do not move with it, and an export needs both on one device.
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


class ZeroParallel(StrategyParallel[PDTrimDeepSpeedStrategy]):
    """The communication in a DeepSpeed run. The engine keeps sharded fp32 copies of weights, and optimizer states."""

    def __init__(self, strategy: PDTrimDeepSpeedStrategy, leave_if_asked: Callable[[], None] = lambda: None) -> None:
        super().__init__(strategy, leave_if_asked)
        self.whole = not strategy.zero_stage_3
        self.gathers_heads = strategy.zero_stage_3

    @override
    def whole_weights(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        if self.whole:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters))
        return gathered

    @override
    def own_part(self, parameter: nn.Parameter) -> Tensor:
        return parameter if self.whole else compat.own_shard(parameter)

    @override
    def write_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        value = self._agreed_weight(value, parameter)
        if self.whole:
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        safe_set_local_fp32_param(parameter, compat.own_shard(parameter).float())

    @override
    def renew_optimizer(self, written: Sequence[nn.Parameter], created: Sequence[tuple[int, nn.Parameter]]) -> None:
        assert not created, "`check_merges` refuses this"
        stage = 2 if self.whole else 3  # stages 1 and 2 keep optimizer states in the same way
        for parameter in written:
            compat.clear_optimizer_state(self.strategy.deepspeed_engine, stage, parameter)

    @override
    def forget_gradients(self) -> None:
        self.strategy.forget_gradients()
