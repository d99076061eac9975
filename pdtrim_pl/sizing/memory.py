"""Memory of one process of a run: exact for weights and optimizer, an estimate for activations.

Shapes: B batch, T tokens of an example, H hidden, I inner size of the MLP, V vocabulary, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from pdtrim_pl.sizing.load import GIB, Layout, Load
from pdtrim_pl.sizing.shape import Shape

LOGIT_COPIES = 8
"""Number of fp32 tensors [tokens of a chunk, V] in memory at once: logits and log-probabilities of both models, and
their gradients. Half as many where the teacher is offline."""
HOST_BYTES = 2 * GIB
"""Python, its libraries and the data of one process; not measured on a machine with GPUs."""
CONTEXT_BYTES = 2 * GIB
"""CUDA's context, NCCL's buffers and what the allocator cannot give back."""
CPU_LOGIT_COPIES = 3
"""The same on a CPU, which turns a few rows at a time into fp32: logits of both models, and their gradient."""
CPU_HOST_BYTES = GIB * 5 // 8
"""Python and its libraries in a process that trains on a CPU. Measured: 0.54 GiB."""
CPU_CONTEXT_BYTES = GIB // 10
"""Data, tokenizer and the buffers of libraries in such a process."""
GATHERED_PARAMETERS = 10**9
"""DeepSpeed's default for the whole weights that ZeRO-3 keeps in memory (`stage3_max_live_parameters`)."""
GRAM_MATRICES = 10
"""Number of fp64 matrices, as wide as the MLP, that are in memory at once while a block is made narrower: Gram matrices
of both stages to fit to and to judge by, and those of the solution."""
REPEATED_LENGTH = 2
"""A request that repeats its prompt is at most so many times as long as an example."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by purpose."""

    device: Mapping[str, int]
    """Bytes on the device."""
    host: Mapping[str, int]
    """Bytes in host memory that offloading moves there."""
    loading: int = 0
    """Bytes in host memory while models are loaded, before anything is offloaded."""
    first: int = 0
    """Additional bytes in the host memory of rank 0, while it exports or writes a whole checkpoint."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    def of_host(self, processes: int) -> int:
        """Peak bytes in the memory of the first host, which runs `processes` processes."""
        moved = processes * sum(self.host.values()) + self.first
        return processes * HOST_BYTES + max(moved, processes * self.loading)


def memory_per_process(student: Shape, teacher: Shape, layout: Layout, load: Load) -> MemoryEstimate:
    """Peak memory of one process over a whole run."""
    own, trains = _untied(student, load)
    trained = student.parameters + trains - (student.embeddings if layout.frozen_embeddings else 0)
    trained = trained if layout.trained is None else layout.trained
    theirs = teacher.parameters if layout.placement in ("copy", "sharded") else 0
    width = 4 if layout.adapters else layout.student_bytes
    device = {
        "student": (student.parameters + own) * layout.student_bytes // _shards(layout, 3) + 4 * layout.adapters,
        "teacher": _teacher_bytes(teacher, layout) if theirs else 0,
        "gradients": trained * width // _shards(layout, 2),
        "optimizer": trained * _optimizer_bytes(layout, width) // _shards(layout, 1),
    }
    host = {}
    if layout.offload_optimizer:
        # Until the step, the gradients are in host memory too, in fp32.
        host["optimizer"] = device.pop("optimizer") + trained * 4 // _shards(layout, 2)
        device.pop("gradients")
    if layout.offload_parameters:
        host["student"], host["teacher"] = device.pop("student"), device.pop("teacher")
    if layout.autocast:
        # Autocast keeps copies of weights that have gradients only.
        cast = student.parameters + trains if layout.trained is None else layout.trained
        device["autocast copies"] = cast * layout.compute_bytes
    device["communication"] = _communication(student, teacher, layout, trained * width)
    device["activations or search"] = max(
        _step(student, teacher, layout, load),
        _search(student, layout, load) + _logits(student, load) + _offers(student, layout, load),
        _selection(student, layout, load) + _logits(student, load),
        _fits(student, layout, load) + _offers(student, layout, load),
        _narrowing(student, layout, load) + _offers(student, layout, load),
        _activations(student, layout, load, kept=False)
        + _logits(student, load)
        + student.parameters * load.untrained_bytes,
    )
    device["reserve"] = CPU_CONTEXT_BYTES if layout.on_cpu else CONTEXT_BYTES
    # FSDP shards models that are loaded whole in host memory. The others load to the device, ZeRO-3 layer by layer.
    whole = (student.parameters * layout.loaded_bytes[0], theirs * layout.loaded_bytes[1])
    return MemoryEstimate(device, host, sum(whole) if layout.fsdp else 0, _first(student.parameters + own, layout))


def _step(student: Shape, teacher: Shape, layout: Layout, load: Load) -> int:
    """Activations and logits of a training step."""
    ours, logits = _activations(student, layout, load), _logits(student, load)
    if layout.on_cpu:
        logits = load.chunk_tokens * student.vocabulary * layout.compute_bytes * CPU_LOGIT_COPIES
        if layout.trained is None and not layout.frozen_embeddings:
            logits += 2 * student.vocabulary * student.hidden * 4  # gradients of the head: of a chunk, and their sum
    if layout.placement == "offline":
        return ours + logits // 2
    return ours + _activations(teacher, layout, load, kept=False) + logits


def _untied(student: Shape, load: Load) -> tuple[int, int]:
    """Numbers of weights that stages have of their own, and of weights that train more than without them.

    Where both stages have their own, the shared ones do not train. Of a KV-only block only projections train; where
    they make queries too, these are not counted.
    """
    own = (sum(load.untied) + load.untied_kv_only) * student.block
    kv_only = load.untied_kv_only * 2 * student.kv * student.hidden
    return own, min(sum(load.untied), student.blocks) * student.block + kv_only


def _teacher_bytes(teacher: Shape, layout: Layout) -> int:
    """Bytes of the teacher's weights that one process holds."""
    small = teacher.blocks * teacher.block if layout.teacher_eight_bits else 0
    return (small + (teacher.parameters - small) * layout.teacher_bytes) // _shards(layout, 3)


def _first(parameters: int, layout: Layout) -> int:
    """Bytes that rank 0 needs in host memory for an export or a whole checkpoint of a student.

    An export needs a copy of the student for verification, and under ZeRO-3 also the whole student. A checkpoint under
    FSDP needs whole weights and optimizer states.
    """
    weights = parameters * layout.student_bytes
    checkpoint = weights * (1 + layout.optimizer_states) if layout.fsdp else 0
    return max(checkpoint, (2 if layout.zero_stage == 3 else 1) * weights)


def _shards(layout: Layout, from_stage: int) -> int:
    return layout.processes if layout.zero_stage >= from_stage else 1


def _optimizer_bytes(layout: Layout, width: int) -> int:
    """Bytes of optimizer states per weight. DeepSpeed adds an fp32 copy of 16-bit weights; its states are in fp32."""
    if layout.zero_stage and not layout.fsdp and layout.student_bytes < 4:
        return 4 * (layout.optimizer_states + 1)
    return width * layout.optimizer_states


def _communication(student: Shape, teacher: Shape, layout: Layout, gradients: int) -> int:
    if layout.zero_stage == 3:
        whole = max(GATHERED_PARAMETERS, 2 * max(student.largest, teacher.largest))
        width = layout.compute_bytes if layout.fsdp else layout.student_bytes
        return min(whole, student.parameters + teacher.parameters) * width
    if layout.zero_stage or layout.offload_optimizer:
        return min(10**9, student.parameters) * layout.student_bytes  # two buckets of 5e8 elements
    return gradients if layout.processes > 1 else 0  # DDP's buckets


def _activations(shape: Shape, layout: Layout, load: Load, *, kept: bool = True) -> int:
    """Activations of B x T tokens that backward needs. With `kept=False`: of a pass without gradients, which holds
    the activations of one block, and the caches of all blocks."""
    tokens = load.batch * (load.tokens + load.padding)
    block = block_bytes(shape, layout)
    if not load.gradient_checkpointing and kept:
        return tokens * block * shape.blocks
    thin = (shape.hidden + 2 * shape.kv if kept else 2 * shape.kv) * layout.compute_bytes
    return tokens * (thin * shape.blocks + block)


def block_bytes(shape: Shape, layout: Layout) -> int:
    """Bytes that autograd keeps for one block and token."""
    if layout.compute_bytes == 4:
        return 4 * (8 * shape.hidden + 2 * shape.kv + 4 * shape.inner)
    if layout.autocast:  # hidden states and norms in fp32, and copies of them for the layers
        return 2 * (15 * shape.hidden + 2 * shape.kv + 4 * shape.inner)
    return layout.compute_bytes * block_elements(shape)


def block_elements(shape: Shape) -> int:
    """Elements that autograd keeps for one block and token in 16 bits: norms in fp32, projections, attention, MLP."""
    return 11 * shape.hidden + 5 * shape.kv + 4 * shape.inner


def _logits(shape: Shape, load: Load) -> int:
    return load.chunk_tokens * shape.vocabulary * 4 * LOGIT_COPIES


def _search(shape: Shape, layout: Layout, load: Load) -> int:
    """Prompt caches and hidden states of the calibration set, and the teacher's distributions, up to their limits."""
    if not load.searches:
        return 0
    tokens = _share(load.calibration, layout, load) * load.tokens
    distributions = tokens * shape.vocabulary * 4
    return _kept(shape, tokens, layout, load) + min(distributions, load.search_teacher_bytes)


def _share(examples: int, layout: Layout, load: Load) -> int:
    """The largest number of examples that one process gets, if whole batches are split among all."""
    batches = ceil(examples / max(load.eval_batch, 1))
    return min(ceil(batches / layout.processes) * load.eval_batch, examples)


def _kept(shape: Shape, tokens: int, layout: Layout, load: Load) -> int:
    """Caches and hidden states between all blocks, up to the limit, and the teacher's final hidden states."""
    base = tokens * (2 * shape.kv + shape.hidden) * shape.blocks * layout.compute_bytes
    return min(base, load.search_cache_bytes) + tokens * shape.hidden * layout.compute_bytes


def _selection(shape: Shape, layout: Layout, load: Load) -> int:
    """What a KV selector needs: caches to try policies against, or one block's attention scores."""
    if load.selection is None:
        return 0
    examples = min(load.selection.examples, load.calibration)
    tokens = (1 + REPEATED_LENGTH) * _share(examples, layout, load) * load.tokens
    if load.selection.calibration:
        tokens = max(tokens, _share(load.calibration, layout, load) * load.tokens)
    caches = _kept(shape, tokens, layout, load)
    if not load.selection.eager_attention:
        return caches
    # Eager attention has its scores before and after the softmax in memory, and the softmax itself is in fp32.
    scores = load.eval_batch * shape.heads * load.tokens**2 * (2 * layout.compute_bytes + 4)
    return max(caches, scores + 2 * shape.kv * shape.blocks * load.eval_batch * load.tokens * layout.compute_bytes)


def _fits(shape: Shape, layout: Layout, load: Load) -> int:
    """Hidden states to fit to, and the blocks in training: fp32 weights, gradients and Adam's two moments.

    Least squares comes after the steps. It needs three fp64 matrices as wide as the MLP, but no gradients or moments.
    """
    if load.merging is None:
        return 0
    examples = load.merging.batches(load.eval_batch) * load.eval_batch
    places = examples * load.tokens * shape.hidden * layout.teacher_bytes * (shape.blocks + 1)
    steps = load.fitted_at_once * 16 * shape.block
    solving = load.fitted_at_once * 4 * shape.block + 3 * 8 * shape.inner * (shape.inner + shape.hidden)
    return min(places, load.merging.cache_bytes) + max(steps, solving)


def _narrowing(shape: Shape, layout: Layout, load: Load) -> int:
    """Hidden states in front of a block, on every process for all examples, and the matrices of its last layer."""
    if not load.narrowed_on:
        return 0
    matrices = GRAM_MATRICES * 8 * shape.inner**2
    return load.narrowed_on * load.tokens * shape.hidden * layout.compute_bytes + matrices


def _offers(shape: Shape, layout: Layout, load: Load) -> int:
    """What is kept until the end of a round: the fitted blocks of all pairs, and the refitted layers of all widths."""
    pairs = 0 if load.merging is None else (shape.blocks - 1) * shape.block
    layers = load.widths_offered * shape.blocks * shape.inner * shape.hidden
    return (pairs + layers) * layout.student_bytes
