"""`pdtrim fit --dry_run`: counts the memory of a run. Builds neither the trainer nor any weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from pdtrim_pl.cli.parsed import ParsedRun
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.eight_bits import check_eight_bits
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.sizing.callback_load import check_callbacks
from pdtrim_pl.sizing.load import GIB, Layout
from pdtrim_pl.sizing.memory import CPU_HOST_BYTES, MemoryEstimate
from pdtrim_pl.sizing.of_run import Processes, RunSize, room_on_device, size_of
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.strategies import check_teacher_bits
from pdtrim_pl.teacher.choice import Allowed, Choice, choose


@dataclass(frozen=True)
class Counted:
    """A run whose memory was counted."""

    module: PDTrimModule
    size: RunSize
    choice: Choice
    memory: MemoryEstimate
    limit: int
    """Bytes that one process may use."""
    on_a_node: int
    """Number of processes on a host."""
    on_cpu: bool

    @property
    def host(self) -> int:
        """Bytes in the memory of the first host."""
        if self.on_cpu:
            return self.on_a_node * (CPU_HOST_BYTES + self.memory.total)
        return self.memory.of_host(self.on_a_node)


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
    found = counted(rest, options.device_memory)
    of = "" if options.host_memory is None else f"  of {options.host_memory:.1f}"
    lines = [
        *_table(found),
        f"GiB in the host memory of the first node, with {found.on_a_node} process(es): {found.host / GIB:.1f}{of}",
    ]
    print("\n".join(lines), file=out or sys.stdout)
    if found.memory.total > found.limit:
        raise UserError(_too_large(found))
    if options.host_memory is not None and found.host > options.host_memory * GIB:
        raise UserError(_too_large_for_host(found.host, options.host_memory, found.size.layout))
    return 0


def counted(args: Sequence[str], device_memory: float | None = None) -> Counted:
    """Count the memory of `pdtrim fit` with these arguments.

    Args:
        args: command line without options of the dry run.
        device_memory: GiB of one device; by default this machine is asked.

    Raises:
        UserError: see `size_of`, or a callback cannot work with the teacher's place.
    """
    parsed = ParsedRun(args)
    module, trainer = parsed.model, parsed.trainer_settings
    on_a_node = _devices(trainer.devices)
    count = on_a_node * int(trainer.num_nodes or 1)
    on_cpu = trainer.accelerator == "cpu"
    processes = Processes(trainer.strategy, str(trainer.precision or "32-true"), count, on_cpu)
    size = size_of(module, parsed.datamodule, trainer.callbacks, processes, parsed.shape_folders)
    limit = int(device_memory * GIB) if device_memory is not None else room_on_device(trainer.accelerator, count)
    same = module.loading.teacher in (None, module.model_name)
    eight_bits = module.loading.teacher_bits is not None
    allowed = Allowed(isinstance(module.trainable, LoRA), same, size.layout.zero_stage == 3, eight_bits)
    choice = choose(allowed.places(module.place), lambda place: size.memory(place).total, limit)
    check_callbacks(
        trainer.callbacks or [], offline=choice.placement == "offline", adapters=isinstance(module.trainable, LoRA)
    )
    if choice.placement != "offline":
        check_teacher_bits(trainer.strategy, module.loading.teacher_bits)
        if eight_bits and on_cpu:
            check_eight_bits(torch.device("cpu"))
    memory = size.memory(choice.placement)
    return Counted(module, size, choice, memory, limit, on_a_node, on_cpu)


def _devices(devices: Any) -> int:
    """`devices` as Lightning reads it: a count, a list, or `auto`, here one process."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return text.count(",") + 1 if "," in text else max(int(text), 1) if text.lstrip("-").isdigit() else 1


def _table(found: Counted) -> list[str]:
    memory, choice, limit = found.memory, found.choice, found.limit
    name, shape, layout = found.module.model_name, found.size.student, found.size.layout
    trained = layout.trained
    sharded = "FSDP" if layout.fsdp else f"ZeRO-{layout.zero_stage}"
    spread = sharded if layout.zero_stage else "everything on each"
    return [
        f"{name}: {shape.parameters:,} parameters in {shape.blocks} blocks; {layout.processes} process(es), {spread}.",
        *([] if trained is None else [f"{trained:,} weights train, {layout.adapters:,} of them in adapters."]),
        f"teacher: {choice.placement} ({choice.why})",
        "GiB per process (activations are an estimate):",
        *(f"  {what:<24}{size / GIB:8.2f}" for what, size in memory.device.items()),
        f"  {'total':<24}{memory.total / GIB:8.2f}  of {limit / GIB:.1f}",
        *(f"  {what + ' (host)':<24}{size / GIB:8.2f}" for what, size in memory.host.items()),
        *([f"  {'loading (host)':<24}{memory.loading / GIB:8.2f}"] if memory.loading else []),
        f"GiB that the first process exports or saves from (host): {memory.first / GIB:.1f}",
    ]


def _too_large(found: Counted) -> str:
    memory, limit, layout = found.memory, found.limit, found.size.layout
    ways = []
    if not found.module.loading.gradient_checkpointing:
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
