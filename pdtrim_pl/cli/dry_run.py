"""`pdtrim fit --dry_run`: counts the memory of a run. Builds neither the trainer nor any weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from transformers import AutoConfig, PreTrainedConfig

from pdtrim_pl.cli.parsed import ParsedRun
from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import DType, dtype_of
from pdtrim_pl.models.pretrained import usable_config
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.sizing.callback_load import TellsLoad
from pdtrim_pl.sizing.memory import GIB, Layout, Load, MemoryEstimate, memory_per_process
from pdtrim_pl.sizing.shape import Shape
from pdtrim_pl.strategies import Sharding, check_freezing, check_masters, check_strategy

ASSUMED_GPU = 79 * GIB
"""Bytes of a card sold as 80 GB; used if there is no GPU to ask."""


def run(args: Sequence[str], out: TextIO | None = None) -> int:
    """Print the memory per process of `pdtrim fit` with these arguments.

    Raises:
        UserError: the run does not fit, or its strategy or precision is refused.
    """
    own = argparse.ArgumentParser(prog="pdtrim fit --dry_run", add_help=False)
    own.add_argument("--dry_run", action="store_true")
    own.add_argument("--device_memory", type=float, default=None, metavar="GIB")
    own.add_argument("--host_memory", type=float, default=None, metavar="GIB")
    options, rest = own.parse_known_args(list(args))
    parsed = ParsedRun(rest)
    folders, adapter = parsed.shape_folders, parsed.model.architecture
    config = model_config(parsed.model.model_name, folders, adapter)
    teacher = parsed.model.loading.teacher
    teacher_config = config if teacher is None else model_config(teacher, folders, adapter)
    adapter_of_teacher = adapter if teacher_config.model_type == config.model_type else None
    layout = layout_of(parsed.model, parsed.trainer_settings, config, teacher_config)
    shape = Shape.of(config, adapter)
    same = teacher in (None, parsed.model.model_name)
    untrained = 0 if same else _dtype("auto", config).itemsize
    load = load_of(parsed.model, parsed.datamodule, parsed.trainer_settings.callbacks, untrained)
    memory = memory_per_process(shape, Shape.of(teacher_config, adapter_of_teacher), layout, load)
    limit = _limit(parsed.trainer_settings, layout, options.device_memory)
    on_a_node = _devices(parsed.trainer_settings.devices)
    on_host = parsed.trainer_settings.accelerator == "cpu"
    host = on_a_node * memory.total if on_host else memory.of_host(on_a_node)
    lines = _table(parsed.model.model_name, shape, layout, memory, limit)
    of = "" if options.host_memory is None else f"  of {options.host_memory:.1f}"
    lines.append(f"GiB in the host memory of the first node, with {on_a_node} process(es): {host / GIB:.1f}{of}")
    print("\n".join(lines), file=out or sys.stdout)
    if memory.total > limit:
        raise UserError(_too_large(memory, limit, layout, parsed.model))
    if options.host_memory is not None and host > options.host_memory * GIB:
        raise UserError(_too_large_for_host(host, options.host_memory, layout))
    return 0


def model_config(name: str, folders: Sequence[Path], architecture: Architecture | None = None) -> PreTrainedConfig:
    """The configuration of a model: from a file of published shapes in one of the folders, else its `config.json`."""
    for file in sorted(file for folder in folders for file in folder.glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if name in facts.pop("published_as"):
            return AutoConfig.for_model(**facts)
    return usable_config(name, architecture)


def layout_of(module: PDTrimModule, trainer: Namespace, model: PreTrainedConfig, teacher: PreTrainedConfig) -> Layout:
    """Processes, shards and element types of a configuration.

    Raises:
        UserError: a strategy or a precision that is refused.
    """
    strategy = trainer.strategy
    check_strategy(strategy)
    check_freezing(strategy, module.loading.freeze_embeddings)
    short = str(trainer.precision or "32-true")
    precision = {"bf16": "bf16-mixed", "16": "16-mixed"}.get(short, short)  # as Lightning reads them
    loaded = _dtype(module.loading.dtype, model)
    check_masters(strategy, precision, loaded)
    sharding = Sharding.of(strategy)
    half = sharding.casts and precision.startswith(("bf16", "16"))  # the engine casts the whole module
    student = loaded.itemsize
    theirs = _dtype(module.loading.teacher_dtype, teacher).itemsize
    return Layout(
        processes=_devices(trainer.devices) * int(trainer.num_nodes or 1),
        zero_stage=sharding.zero_stage, fsdp=sharding.fsdp,
        offload_optimizer=sharding.offload_optimizer, offload_parameters=sharding.offload_parameters,
        student_bytes=2 if half else student,
        teacher_bytes=2 if half else theirs, loaded_bytes=(student, theirs),
        compute_bytes=2 if half or "mixed" in precision else student,
        # FSDP gathers weights in bf16.
        autocast="mixed" in precision and not half and not sharding.fsdp and student == 4,
        optimizer_states=_states(module), frozen_embeddings=module.loading.freeze_embeddings,
    )  # fmt: skip


def load_of(
    module: PDTrimModule, data: PromptResponseDataModule, callbacks: Sequence[Callback] | None = None,
    untrained_bytes: int = 0,
) -> Load:  # fmt: skip
    """What one process works on at a time under these settings.

    Callbacks take turns, so the largest value of each kind counts.

    Args:
        module: settings of the models.
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
        chunk_tokens=module.chunk_tokens, gradient_checkpointing=module.loading.gradient_checkpointing,
        calibration=examples,
        merging=max(merges, key=lambda merging: merging.pairs_at_once, default=None),
        fitted_at_once=max((load.fitted_at_once for load in loads), default=0),
        narrowed_on=max((load.narrowed_on or examples for load in loads if load.narrowed_on is not None), default=0),
        widths_offered=max((load.widths_offered for load in loads), default=0),
        selection=selections[0] if selections else None,
        searches=bool(searches),
        search_cache_bytes=max(limit.base for limit in limits),
        search_teacher_bytes=max(limit.teacher for limit in limits),
        untrained_bytes=untrained_bytes if any(load.untrained_student for load in loads) else 0,
    )  # fmt: skip


def _dtype(name: DType, config: PreTrainedConfig) -> torch.dtype:
    chosen = dtype_of(name) or config.dtype or torch.float32
    assert isinstance(chosen, torch.dtype)
    return chosen


def _devices(devices: Any) -> int:
    """`devices` as Lightning reads it: a count, a list, or `auto`, here one process."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return text.count(",") + 1 if "," in text else max(int(text), 1) if text.lstrip("-").isdigit() else 1


def _states(module: PDTrimModule) -> int:
    """Count the optimizer's own state after one step on a single weight."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.ones_like(weight)
    optimizer = module.optimizer_of([weight])
    optimizer.step()
    return sum(isinstance(v, torch.Tensor) and v.shape == weight.shape for v in optimizer.state[weight].values())


def _limit(trainer: Namespace, layout: Layout, asked: float | None) -> int:
    if asked is not None:
        return int(asked * GIB)
    if trainer.accelerator == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // layout.processes
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else ASSUMED_GPU


def _table(name: str, shape: Shape, layout: Layout, memory: MemoryEstimate, limit: int) -> list[str]:
    sharded = "FSDP" if layout.fsdp else f"ZeRO-{layout.zero_stage}"
    spread = sharded if layout.zero_stage else "everything on each"
    return [
        f"{name}: {shape.parameters:,} parameters in {shape.blocks} blocks; {layout.processes} process(es), {spread}.",
        "GiB per process (activations are an estimate):",
        *(f"  {what:<24}{size / GIB:8.2f}" for what, size in memory.device.items()),
        f"  {'total':<24}{memory.total / GIB:8.2f}  of {limit / GIB:.1f}",
        *(f"  {what + ' (host)':<24}{size / GIB:8.2f}" for what, size in memory.host.items()),
        *([f"  {'loading (host)':<24}{memory.loading / GIB:8.2f}"] if memory.loading else []),
        f"GiB that the first process exports or saves from (host): {memory.first / GIB:.1f}",
    ]


def _too_large(memory: MemoryEstimate, limit: int, layout: Layout, module: PDTrimModule) -> str:
    ways = []
    if not module.loading.gradient_checkpointing:
        ways.append("`model.loading.gradient_checkpointing: true`")
    if layout.zero_stage < 3 and layout.processes > 1:
        ways.append(f"PDTrimDeepSpeedStrategy with `stage: {max(2, layout.zero_stage + 1)}`")
    if not layout.offload_optimizer:
        ways.append("PDTrimDeepSpeedStrategy with `offload_optimizer: true`")
    ways.append("a smaller `data.batch_size`, `data.lengths.max_length` or `model.chunk_tokens`")
    ways.append("more or larger devices (`--device_memory` says how large)")
    return (
        f"This run needs {memory.total / GIB:.1f} GiB on every device, and there are {limit / GIB:.1f}. Try one of: "
        f"{'; '.join(ways)}."
    )


def _too_large_for_host(needed: int, limit: float, layout: Layout) -> str:
    ways = ["more nodes with fewer processes each", "a larger host (`--host_memory` says how large)"]
    if layout.offload_parameters or layout.offload_optimizer:
        ways.insert(0, "offload less (`offload_parameters`, `offload_optimizer`)")
    elif layout.fsdp:
        ways.insert(0, "PDTrimDeepSpeedStrategy with `stage: 3`, under which no process loads a whole model")
    return (
        f"This run needs {needed / GIB:.1f} GiB of the first node's host memory, and there are {limit:.1f}. Try one "
        f"of: {'; '.join(ways)}."
    )
