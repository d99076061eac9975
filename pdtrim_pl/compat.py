"""Everything this package uses of its dependencies that is not their public interface, and the behaviour it relies on.

`tests/test_compat.py` tests each of these alone, so that a release that changes one fails there, by name. What our
classes override cannot stand here: `torch.nn.Module._apply`, through which `to`, `half` and `cuda` move a module's
tensors (`staged/gate.py`, `staged/structure.py`), and in `lightning_cli.py` `LightningCLI._parse_ckpt_path`, called
before anything is built, `_prepare_subcommand_kwargs`, whose result the trainer's command gets, and `_get`.

Lightning and DeepSpeed are not imported, so that a serving process starts without them; hence `Any`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

# Lightning


def optimizer_step_is_due(trainer: Any) -> bool:
    """Inside `training_step`: whether the optimizer steps after this batch.

    True at every `accumulate_grad_batches`-th batch and at the last one of an epoch.
    """
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def ddp_settings(strategy: Any) -> Mapping[str, Any]:
    """Keyword arguments that a `DDPStrategy` gives to `DistributedDataParallel`."""
    settings: Mapping[str, Any] = strategy._ddp_kwargs
    return settings


def hand_out_weights(strategy: Any, weights: Mapping[str, Tensor]) -> None:
    """Under ZeRO-3: put rank 0's whole weights into the shards of all ranks; names that it has not stay as they are."""
    strategy._restore_zero_state({"state_dict": weights}, strict=False)


class LoopProgress:
    """Names in the `loops` of a Lightning checkpoint, and of the counts below them.

    Each progress has `total` and `current` with `ready`, `started`, `processed` and `completed`, counted up in this
    order: before a batch, after its loading, after its step, after its `on_train_batch_end`.
    """

    FIT: ClassVar[str] = "fit_loop"
    EPOCHS: ClassVar[str] = "epoch_progress"
    BATCHES: ClassVar[str] = "epoch_loop.batch_progress"
    VALIDATION_BATCHES: ClassVar[str] = "epoch_loop.val_loop.batch_progress"
    EPOCH_STATE: ClassVar[str] = "epoch_loop.state_dict"
    STEPPED: ClassVar[str] = "_batches_that_stepped"


# transformers


def attention_of(model: PreTrainedModel) -> Any:
    """Name of the attention implementation that a model's blocks look up at every call: sdpa, eager or another."""
    return model.config._attn_implementation


# torch


def remove_gradient_hooks(wrapper: DistributedDataParallel) -> None:
    """Make a DDP wrapper that is given up sum no gradients any more."""
    wrapper._remove_autograd_hooks()


# DeepSpeed


def own_shard(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a weight under ZeRO-3, flat."""
    shard: Tensor = vars(parameter)["ds_tensor"]
    return shard


def fp32_parts(engine: Any, stage: int) -> list[Tensor]:
    """This rank's fp32 copies of the weights, one flat tensor a group; their `grad` is what the optimizer reads."""
    zero = engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def clear_optimizer_state(engine: Any, stage: int, parameter: nn.Parameter) -> None:
    """Make the momenta of one weight zero. The count of steps, which all weights of a shard share, stays."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if stage == 3:
        zero = engine.optimizer
        zeros = torch.zeros_like(own_shard(parameter), dtype=torch.float32)
        flat = zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(parameter)][0]]
        for key, state in zero.optimizer.state[flat].items():
            if torch.is_tensor(state) and state.shape == flat.shape:
                safe_set_local_optimizer_state(parameter, zeros, key)
        return
    mapping = vars(parameter)["_hp_mapping"]  # None where the shard is another rank's
    for key in [] if mapping is None or mapping.optim_fragment is None else mapping.get_optim_state_keys():
        safe_set_full_optimizer_state(parameter, torch.zeros_like(parameter, dtype=torch.float32), key)


def recovery_script_step(engine: Any) -> tuple[Any, str]:
    """Object and name of the method with which an engine writes its recovery script beside a checkpoint's shards.

    `engine.checkpoint_engine.makedirs(path)` and `.save(state_dict, path)` write the rest; nothing else does as long as
    `save_latest` is False.
    """
    assert callable(engine._copy_recovery_script)
    return engine, "_copy_recovery_script"


def model_state_file(directory: str, stage: int) -> str:
    """The file of a DeepSpeed checkpoint directory that holds the run's own state."""
    from deepspeed.utils.zero_to_fp32 import get_model_state_file

    return str(get_model_state_file(directory, stage))
