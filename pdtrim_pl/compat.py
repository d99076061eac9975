"""Everything private that this package uses of its dependencies, and the behaviour that it relies on.

`tests/test_compat.py` tests each function alone. If a release of a dependency changes one, the failing test names it.

Private methods that our classes override cannot be listed as functions here:

- `torch.nn.Module._apply`, by which `to`, `half` and `cuda` move tensors (`staged/gate.py`, `staged/structure.py`);
- in `cli/lightning_cli.py`: `LightningCLI._parse_ckpt_path`, which is called before anything is built;
  `_run_subcommand`, which runs the trainer's command; `_prepare_subcommand_kwargs`, whose result is passed to this
  command; and `_get`.

Functions import their dependencies themselves, and types are `Any`. So a serving process starts without Lightning and
DeepSpeed, and a command line is parsed without torch.
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
    """Whether the optimizer steps after this batch. Call it inside `training_step`, or before the step.

    True for every `accumulate_grad_batches`-th batch and for the last batch of an epoch.
    """
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def keep_sigterm_local(trainer: Any) -> None:
    """Stop Lightning from broadcasting before every batch whether rank 0 got SIGTERM, and from waiting for the answer.

    For a run that handles SIGTERM itself. Without several processes, Lightning does not broadcast.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def ddp_settings(strategy: Any) -> Mapping[str, Any]:
    """Keyword arguments that a `DDPStrategy` passes to `DistributedDataParallel`."""
    settings: Mapping[str, Any] = strategy._ddp_kwargs
    return settings


def hand_out_weights(strategy: Any, weights: Mapping[str, Tensor]) -> None:
    """Under ZeRO-3: copy whole weights of rank 0 into the shards of all ranks. Missing weights do not change."""
    strategy._restore_zero_state({"state_dict": weights}, strict=False)


class LoopProgress:
    """Keys in the `loops` of a Lightning checkpoint.

    Each progress has `total` and `current`, each with the counts `ready`, `started`, `processed` and `completed`. They
    are incremented in this order: before a batch, after it is loaded, after its step, after its `on_train_batch_end`.
    """

    FIT: ClassVar[str] = "fit_loop"
    EPOCHS: ClassVar[str] = "epoch_progress"
    BATCHES: ClassVar[str] = "epoch_loop.batch_progress"
    VALIDATION_BATCHES: ClassVar[str] = "epoch_loop.val_loop.batch_progress"
    EPOCH_STATE: ClassVar[str] = "epoch_loop.state_dict"
    STEPPED: ClassVar[str] = "_batches_that_stepped"


# transformers


def attention_of(model: PreTrainedModel) -> Any:
    """Name of a model's attention implementation, such as `sdpa` or `eager`. Its blocks read it at every call."""
    return model.config._attn_implementation


def has_model_file(path: str, name: str, revision: str | None = None) -> bool:
    """Whether a model has a file. In offline mode, only the local cache of the Hub is searched.

    Args:
        path: a directory or a Hub id.
        name: name of the file.
        revision: git revision of a Hub model; `main` by default.
    """
    from transformers.utils.hub import has_file

    return bool(has_file(path, name, revision=revision))


def model_file(path: str, name: str, revision: str | None = None) -> str:
    """Local path of a file of a model. A file of a Hub model is downloaded unless the cache has it.

    Raises:
        OSError: there is no such file.
    """
    from transformers.utils.hub import cached_file

    file = cached_file(path, name, revision=revision)
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
    """Options of a parser and of its subcommands, each once, without leading dashes."""
    options: list[str] = []
    for action in parser._actions:
        if isinstance(action.choices, dict):  # subcommands
            options += [option for command in action.choices.values() for option in options_of(command)]
        options += [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
    return list(dict.fromkeys(options))


def refusing_parser(parser: ArgumentParser, error: Exception | None) -> ArgumentParser:
    """The parser that refused a command line: that of the subcommand which jsonargparse's error names, or `parser`."""
    found: ArgumentParser = parser if error is None else vars(error).get("subcommand_parser", parser)
    return found


# torch


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called. Copies of a module are not compiled."""
    return module._compiled_call_impl is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this module runs hooks, in forward or in backward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def remove_gradient_hooks(wrapper: DistributedDataParallel) -> None:
    """Stop a DDP wrapper that is being discarded from summing gradients."""
    wrapper._remove_autograd_hooks()


# DeepSpeed


def own_shard(parameter: nn.Parameter) -> Tensor:
    """The part of a weight that this rank holds under ZeRO-3, as a flat tensor."""
    shard: Tensor = vars(parameter)["ds_tensor"]
    return shard


def fp32_parts(engine: Any, stage: int) -> list[Tensor]:
    """The fp32 copies of weights on this rank, one flat tensor per group. The optimizer reads their `grad`."""
    zero = engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def clear_optimizer_state(engine: Any, stage: int, parameter: nn.Parameter) -> None:
    """Set the momenta of one weight to zero. The step count does not change: all weights of a shard share it."""
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
    mapping = vars(parameter)["_hp_mapping"]  # None if another rank holds the shard
    for key in [] if mapping is None or mapping.optim_fragment is None else mapping.get_optim_state_keys():
        safe_set_full_optimizer_state(parameter, torch.zeros_like(parameter, dtype=torch.float32), key)


def recovery_script_step(engine: Any) -> tuple[Any, str]:
    """Object and name of the method with which an engine writes its recovery script beside the shards.

    Everything else in a checkpoint is written by `engine.checkpoint_engine.makedirs(path)` and `.save(state_dict,
    path)`, if `save_latest` is False.
    """
    assert callable(engine._copy_recovery_script)
    return engine, "_copy_recovery_script"


def model_state_file(directory: str, stage: int) -> str:
    """Path of the file in a DeepSpeed checkpoint directory that holds the state of the run."""
    from deepspeed.utils.zero_to_fp32 import get_model_state_file

    return str(get_model_state_file(directory, stage))
