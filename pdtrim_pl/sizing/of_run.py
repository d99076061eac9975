"""What the memory of a run depends on, read from its settings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import Strategy
from transformers import AutoConfig, PreTrainedConfig

from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import DType, Loading, dtype_of
from pdtrim_pl.models.names import split_revision
from pdtrim_pl.models.placement import Placement
from pdtrim_pl.models.pretrained import usable_config
from pdtrim_pl.plan import Stage
from pdtrim_pl.sizing.callback_load import CallbackLoad, TellsLoad
from pdtrim_pl.sizing.load import GIB, Layout, Load
from pdtrim_pl.sizing.memory import MemoryEstimate, memory_per_process
from pdtrim_pl.sizing.shape import Shape
from pdtrim_pl.sizing.trained import trained_weights
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.staged.trainable import Trainable
from pdtrim_pl.strategies import Sharding, check_freezing, check_masters, check_strategy, check_trainable

ASSUMED_GPU = 79 * GIB
"""Bytes of a card sold as 80 GB; used if there is no GPU to ask."""


class ModelSettings(Protocol):
    """The settings of the module that memory depends on."""

    model_name: str
    loading: Loading
    chunk_tokens: int
    optimizer_of: OptimizerCallable
    trainable: Trainable | LoRA
    architecture: Architecture | None


@dataclass(frozen=True)
class Processes:
    """The trainer's side: what runs how often."""

    strategy: Strategy | str
    precision: str
    """As Lightning reads it, short or long."""
    count: int
    """Number of processes of the whole run."""
    on_cpu: bool = False
    """Whether they compute on CPUs."""


@dataclass(frozen=True)
class RunSize:
    """What the memory of a run depends on."""

    student: Shape
    teacher: Shape
    layout: Layout
    load: Load

    def memory(self, placement: Placement) -> MemoryEstimate:
        """Memory of one process, with the teacher at that place."""
        return memory_per_process(self.student, self.teacher, replace(self.layout, placement=placement), self.load)


def size_of(
    settings: ModelSettings, data: PromptResponseDataModule, callbacks: Sequence[Callback] | None,
    processes: Processes, folders: Sequence[Path] = (),
) -> RunSize:  # fmt: skip
    """Read what the memory of a run depends on. No weights are loaded.

    Args:
        settings: those of the module.
        data: lengths, batches and calibration set.
        callbacks: those of the run.
        processes: strategy, precision and number of processes.
        folders: folders with files of published shapes.

    Raises:
        UserError: a strategy or a precision that is refused.
    """
    adapter, teacher = settings.architecture, settings.loading.teacher
    config = model_config(settings.model_name, folders, adapter)
    of_teacher = config if teacher is None else model_config(teacher, folders, adapter)
    adapter_of_teacher = adapter if of_teacher.model_type == config.model_type else None
    layout = layout_of(settings, processes, config, of_teacher)
    same = teacher in (None, settings.model_name) and settings.loading.teacher_bits is None
    load = load_of(settings, data, callbacks, 0 if same else _dtype("auto", config).itemsize)
    shape = Shape.of(config, adapter)
    untied = min(load.untied[0], shape.blocks), min(load.untied[1], shape.blocks)
    load = replace(load, untied=untied, untied_kv_only=min(load.untied_kv_only, shape.blocks - untied[0]))
    return RunSize(shape, Shape.of(of_teacher, adapter_of_teacher), layout, load)


def room_on_device(accelerator: str | torch.device, processes: int) -> int:
    """Bytes that one process may use: of its GPU, or its share of the host's memory on a CPU.

    Args:
        accelerator: `cpu`, or anything else for a GPU.
        processes: number of processes on the host.
    """
    if str(accelerator) == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else ASSUMED_GPU


def model_config(name: str, folders: Sequence[Path], architecture: Architecture | None = None) -> PreTrainedConfig:
    """The configuration of a model: from a file of published shapes in one of the folders, else its `config.json`."""
    for file in sorted(file for folder in folders for file in folder.glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if split_revision(name)[0] in facts.pop("published_as"):
            return AutoConfig.for_model(**facts)
    return usable_config(name, architecture)


def layout_of(
    settings: ModelSettings, processes: Processes, model: PreTrainedConfig, teacher: PreTrainedConfig
) -> Layout:  # fmt: skip
    """Processes, shards and element types of a configuration.

    Raises:
        UserError: a strategy or a precision that is refused.
    """
    strategy, short = processes.strategy, processes.precision
    check_strategy(strategy)
    check_freezing(strategy, settings.loading.freeze_embeddings)
    check_trainable(strategy, settings.trainable)
    precision = {"bf16": "bf16-mixed", "16": "16-mixed"}.get(short, short)  # as Lightning reads them
    loaded = _dtype(settings.loading.dtype, model)
    trained, adapters = trained_weights(model, settings.trainable, settings.architecture)
    check_masters(strategy, precision, None if adapters else loaded)
    sharding = Sharding.of(strategy)
    half = sharding.casts and precision.startswith(("bf16", "16"))  # the engine casts the whole module
    student = loaded.itemsize
    theirs = _dtype(settings.loading.teacher_dtype, teacher).itemsize
    return Layout(
        processes=processes.count,
        zero_stage=sharding.zero_stage, fsdp=sharding.fsdp,
        offload_optimizer=sharding.offload_optimizer, offload_parameters=sharding.offload_parameters,
        student_bytes=2 if half else student,
        teacher_bytes=2 if half else theirs, teacher_eight_bits=settings.loading.teacher_bits is not None,
        loaded_bytes=(student, theirs),
        compute_bytes=2 if half or "mixed" in precision else student,
        # FSDP gathers weights in bf16.
        autocast="mixed" in precision and not half and not sharding.fsdp and student == 4,
        optimizer_states=_states(settings), frozen_embeddings=settings.loading.freeze_embeddings,
        trained=trained, adapters=adapters, on_cpu=processes.on_cpu,
    )  # fmt: skip


def load_of(
    settings: ModelSettings, data: PromptResponseDataModule, callbacks: Sequence[Callback] | None = None,
    untrained_bytes: int = 0,
) -> Load:  # fmt: skip
    """What one process works on at a time under these settings.

    Callbacks take turns, so the largest value of each kind counts.

    Args:
        settings: those of the module.
        data: lengths, batches and calibration set.
        callbacks: those of the run.
        untrained_bytes: one weight of the student as its checkpoint stores it, where the teacher is another model.
    """
    loads = [callback.load() for callback in callbacks or () if isinstance(callback, TellsLoad)]
    searches = [load.search for load in loads if load.search]
    limits = searches or [SearchMemory()]
    selections = [load.selection for load in loads if load.selection]
    merges = [load.merging for load in loads if load.merging]
    calibration = data.parts.calibration
    examples = calibration if isinstance(calibration, int) else 256
    return Load(
        batch=data.batch_size, eval_batch=data.eval_batch_size, tokens=data.lengths.max_length,
        chunk_tokens=settings.chunk_tokens, gradient_checkpointing=settings.loading.gradient_checkpointing,
        padding=_padding(data),
        calibration=examples,
        merging=max(merges, key=lambda merging: merging.pairs_at_once, default=None),
        fitted_at_once=max((load.fitted_at_once for load in loads), default=0),
        narrowed_on=max((load.narrowed_on or examples for load in loads if load.narrowed_on is not None), default=0),
        widths_offered=max((load.widths_offered for load in loads), default=0),
        untied=(_untied(loads, "prefill"), _untied(loads, "decode")),
        untied_kv_only=sum(load.prefill_drops for load in loads) * any(load.refits_kv_only for load in loads),
        selection=selections[0] if selections else None,
        searches=bool(searches),
        search_cache_bytes=max(limit.base for limit in limits),
        search_teacher_bytes=max(limit.teacher for limit in limits),
        untrained_bytes=untrained_bytes if any(load.untrained_student for load in loads) else 0,
    )  # fmt: skip


def _untied(loads: Sequence[CallbackLoad], stage: Stage) -> int:
    return sum(load.untied.get(stage, 0) for load in loads)


def _padding(data: PromptResponseDataModule) -> int:
    """Tokens that the longest prompt and the longest response of a batch have beyond one example."""
    if data.batch_size == 1 or data.batches == "by_length":
        return 0
    return data.lengths.max_prompt - data.lengths.min_prompt


def _dtype(name: DType, config: PreTrainedConfig) -> torch.dtype:
    chosen = dtype_of(name) or config.dtype or torch.float32
    assert isinstance(chosen, torch.dtype)
    return chosen


def _states(settings: ModelSettings) -> int:
    """Count the optimizer's own state after one step on a single weight."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.ones_like(weight)
    optimizer = settings.optimizer_of([weight])
    optimizer.step()
    return sum(isinstance(v, torch.Tensor) and v.shape == weight.shape for v in optimizer.state[weight].values())
