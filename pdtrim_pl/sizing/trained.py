"""How many weights of a model train."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.staged.trainable import Trainable


def trained_weights(
    config: PreTrainedConfig, trainable: Trainable | LoRA, architecture: Architecture | None = None
) -> tuple[int | None, int]:  # fmt: skip
    """Number of weights that train, and of those that are adapters. None stands for the whole model.

    `merged` counts all blocks, since a run may merge any of them.

    Args:
        config: configuration of the model.
        trainable: what trains.
        architecture: adapter of the model's family, if the package has none.
    """
    if trainable == "all":
        return None, 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        student = StagedCausalLM(model, architecture=architecture)
        if trainable == "merged":
            return sum(p.numel() for gate in student.gates.values() for p in gate.block.parameters()), 0
        student.train_only(trainable)
    count = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    return count, 0 if student.lora is None else count
