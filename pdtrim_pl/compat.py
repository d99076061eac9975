"""Everything this package uses of its dependencies that is not their public interface, and the behaviour it relies on.

`tests/test_compat.py` tests each of these alone, so that a release that changes one fails there, by name. What our
classes override cannot stand here: `torch.nn.Module._apply`, through which `to`, `half` and `cuda` move a module's
tensors (`staged/gate.py`, `staged/structure.py`), and in `cli/lightning_cli.py` `LightningCLI._parse_ckpt_path`, called
before anything is built, `_run_subcommand`, which runs the trainer's command, `_prepare_subcommand_kwargs`, whose
result that command gets, and `_get`.

Functions import what they need themselves: a serving process starts without Lightning and DeepSpeed, and a command line
is parsed without torch. Hence `Any`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from datasets import Dataset
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


def has_model_file(path: str, name: str) -> bool:
    """Whether a model has a file of that name; in offline mode the Hub's cache answers.

    Args:
        path: a directory or a Hub id.
        name: of the file.
    """
    from transformers.utils.hub import has_file

    return bool(has_file(path, name))


def model_file(path: str, name: str) -> str:
    """Where one file of a model lies. A Hub model's file is downloaded first, unless the cache has it.

    Raises:
        OSError: there is no such file.
    """
    from transformers.utils.hub import cached_file

    file = cached_file(path, name)
    assert file is not None, "it raises for a file that is not there"
    return file


def tensors_of_file(file: str) -> dict[str, Tensor]:
    """Names, shapes and element types of the weights in a `.safetensors` or `.bin` file, on the meta device."""
    from transformers.modeling_utils import load_state_dict

    tensors: dict[str, Tensor] = load_state_dict(file, map_location="meta")
    return tensors


# datasets


def dataset_fingerprint(dataset: Dataset) -> str:
    """Hash of a dataset's source and of every step that made it; the same in every process."""
    return str(dataset._fingerprint)


# jsonargparse


def options_of(parser: ArgumentParser) -> list[str]:
    """Options of a parser without their dashes, each once, and those of its subcommands without the command's name."""
    options: list[str] = []
    for action in parser._actions:
        if isinstance(action.choices, dict):  # subcommands
            options += [option for command in action.choices.values() for option in options_of(command)]
        options += [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
    return list(dict.fromkeys(options))


def refusing_parser(parser: ArgumentParser, error: Exception | None) -> ArgumentParser:
    """The parser that refused a command line: of the subcommand that jsonargparse notes in its error, else `parser`."""
    found: ArgumentParser = parser if error is None else vars(error).get("subcommand_parser", parser)
    return found


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
    import torch
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
