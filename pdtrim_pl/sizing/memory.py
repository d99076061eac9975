"""How much memory one process of a run takes: exact for weights and optimizer, estimated for activations.

Shapes: B batch, T tokens of an example, H hidden, I inner size of the MLP, V vocabulary, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pdtrim_pl.merging import Merging
from pdtrim_pl.models.architectures import Architecture, architecture_of

GIB = 2**30
LOGIT_COPIES = 8
"""fp32 tensors [tokens of a chunk, V] alive at once: both logits, log-probabilities, their gradients."""
HOST_BYTES = 2 * GIB
"""Python, its libraries and the data of one process; not measured on a machine with GPUs."""
CONTEXT_BYTES = 2 * GIB
"""CUDA's context, NCCL's buffers and what the allocator cannot give back."""
GATHERED_PARAMETERS = 10**9
"""DeepSpeed's default for whole weights that ZeRO-3 keeps alive (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on."""

    parameters: int
    embeddings: int
    """Of them, those of token embeddings and head."""
    block: int
    """Parameters of one block."""
    largest: int
    """Parameters of the largest single weight."""
    hidden: int
    inner: int
    kv: int
    """Key (or value) elements of one block and position."""
    blocks: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig, architecture: Architecture | None = None) -> Shape:
        """Count a model that is built on the meta device: true shapes, no memory.

        Args:
            config: of a decoder-only model.
            architecture: adapter of the model's family, where the package has none.

        Raises:
            UserError: no adapter for its family.
        """
        adapter = architecture or architecture_of(config)
        model = meta_model(config)
        block = adapter.blocks(model)[0]
        facts = config.to_dict()
        heads = config.num_attention_heads
        size = facts.get("head_dim") or config.hidden_size // heads
        sizes = [parameter.numel() for parameter in model.parameters()]
        return cls(
            parameters=sum(sizes), embeddings=_embeddings(model),
            block=sum(parameter.numel() for parameter in block.parameters()), largest=max(sizes),
            hidden=config.hidden_size, inner=config.intermediate_size,
            kv=(facts.get("num_key_value_heads") or heads) * size, blocks=config.num_hidden_layers,
            vocabulary=config.vocab_size,
        )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes and in which element types it is held."""

    processes: int = 1
    zero_stage: int = 0
    """0 where every process holds everything."""
    fsdp: bool = False
    """FSDP cuts up what ZeRO-3 does; its shards are what trains, in fp32, and weights are gathered to compute with."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    student_bytes: int = 4
    """Bytes of one weight."""
    teacher_bytes: int = 4
    loaded_bytes: tuple[int, int] = (4, 4)
    """Of one weight of student and teacher as they are loaded."""
    compute_bytes: int = 4
    """Bytes of one activation."""
    autocast: bool = False
    """Weights in fp32 are cast for every step, and the copies are kept until its end."""
    optimizer_states: int = 2
    """State tensors of a weight's size: 2 for Adam."""
    frozen_embeddings: bool = False
    """Token embeddings and head have neither gradients nor optimizer states."""


@dataclass(frozen=True)
class Load:
    """What one process has in hand at a time."""

    batch: int
    eval_batch: int
    """Examples in a batch of the calibration set and of the text that merged blocks are fitted on."""
    tokens: int
    chunk_tokens: int
    gradient_checkpointing: bool
    calibration: int = 0
    """Examples of the calibration set, whose batches the processes share."""
    merging: Merging | None = None
    """How merged blocks are fitted, where any are."""
    fitted_at_once: int = 0
    """Blocks that local fits train at a time."""
    search_cache_bytes: int = 4 * GIB
    search_teacher_bytes: int = 2 * GIB
    untrained_bytes: int = 0
    """One weight of the student before training, where the export loads it again; 0 where it does not."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process by what they are for."""

    device: Mapping[str, int]
    host: Mapping[str, int]
    """What is moved to the host's memory."""
    loading: int = 0
    """In the host's memory while models are loaded, before anything is moved there."""
    first: int = 0
    """What the first process of all has in its host's memory besides, while it exports or writes a whole checkpoint."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    def of_host(self, processes: int) -> int:
        """Bytes in the memory of the first host, on which so many processes run, at the time when there are most."""
        moved = processes * sum(self.host.values()) + self.first
        return processes * HOST_BYTES + max(moved, processes * self.loading)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: every weight's shape, and no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _embeddings(model: PreTrainedModel) -> int:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def memory_per_process(student: Shape, teacher: Shape, layout: Layout, load: Load) -> MemoryEstimate:
    """The most one process needs at any time of a run."""
    trained = student.parameters - (student.embeddings if layout.frozen_embeddings else 0)
    device = {
        "student": student.parameters * layout.student_bytes // _shards(layout, 3),
        "teacher": teacher.parameters * layout.teacher_bytes // _shards(layout, 3),
        "gradients": trained * layout.student_bytes // _shards(layout, 2),
        "optimizer": trained * _optimizer_bytes(layout) // _shards(layout, 1),
    }
    host = {}
    if layout.offload_optimizer:
        # The gradients wait for the step in fp32 beside the states.
        host["optimizer"] = device.pop("optimizer") + trained * 4 // _shards(layout, 2)
        device.pop("gradients")
    if layout.offload_parameters:
        host["student"], host["teacher"] = device.pop("student"), device.pop("teacher")
    if layout.autocast:
        device["autocast copies"] = student.parameters * layout.compute_bytes
    device["communication"] = _communication(student, teacher, layout)
    device["activations or search"] = max(
        _activations(student, layout, load) + _activations(teacher, layout, load, kept=False) + _logits(student, load),
        _search(student, layout, load) + _logits(student, load) + _offers(student, layout, load),
        _fits(student, layout, load) + _offers(student, layout, load),
        _activations(student, layout, load, kept=False)
        + _logits(student, load)
        + student.parameters * load.untrained_bytes,
    )
    device["reserve"] = CONTEXT_BYTES
    # FSDP cuts up what is loaded already; all others load to the device, ZeRO-3 a layer at a time.
    whole = (student.parameters * layout.loaded_bytes[0], teacher.parameters * layout.loaded_bytes[1])
    return MemoryEstimate(device, host, sum(whole) if layout.fsdp else 0, _first(student, layout))


def _first(student: Shape, layout: Layout) -> int:
    """A copy of the student that the export is compared with, and the whole student where no process has it; under FSDP
    whole weights and states of every checkpoint."""
    weights = student.parameters * layout.student_bytes
    checkpoint = weights * (1 + layout.optimizer_states) if layout.fsdp else 0
    return max(checkpoint, (2 if layout.zero_stage == 3 else 1) * weights)


def _shards(layout: Layout, from_stage: int) -> int:
    return layout.processes if layout.zero_stage >= from_stage else 1


def _optimizer_bytes(layout: Layout) -> int:
    """An engine keeps fp32 weights beside those in 16 bits, and its states are in fp32."""
    if layout.zero_stage and not layout.fsdp and layout.student_bytes < 4:
        return 4 * (layout.optimizer_states + 1)
    return layout.student_bytes * layout.optimizer_states


def _communication(student: Shape, teacher: Shape, layout: Layout) -> int:
    if layout.zero_stage == 3:
        whole = max(GATHERED_PARAMETERS, 2 * max(student.largest, teacher.largest))
        width = layout.compute_bytes if layout.fsdp else layout.student_bytes
        return min(whole, student.parameters + teacher.parameters) * width
    if layout.zero_stage or layout.offload_optimizer:
        return min(10**9, student.parameters) * layout.student_bytes  # two buckets of 5e8 elements
    return student.parameters * layout.student_bytes if layout.processes > 1 else 0  # DDP's buckets


def _activations(shape: Shape, layout: Layout, load: Load, *, kept: bool = True) -> int:
    """What backward needs of B x T tokens; without gradients, what one block and all caches hold."""
    tokens = load.batch * load.tokens
    block = block_elements(shape)
    thin = shape.hidden + 2 * shape.kv if kept else 2 * shape.kv
    elements = thin * shape.blocks + block if load.gradient_checkpointing or not kept else block * shape.blocks
    return tokens * elements * layout.compute_bytes


def block_elements(shape: Shape) -> int:
    """Elements that autograd keeps of one block and token: norms in fp32, projections, attention, MLP."""
    return 11 * shape.hidden + 5 * shape.kv + 4 * shape.inner


def _logits(shape: Shape, load: Load) -> int:
    return load.chunk_tokens * shape.vocabulary * 4 * LOGIT_COPIES


def _search(shape: Shape, layout: Layout, load: Load) -> int:
    """Prompt caches and hidden states of the calibration set, and the teacher's distributions, up to their limits."""
    batches = ceil(load.calibration / max(load.eval_batch, 1))
    tokens = min(ceil(batches / layout.processes) * load.eval_batch, load.calibration) * load.tokens
    base = tokens * (2 * shape.kv + shape.hidden) * shape.blocks * layout.compute_bytes
    reference = tokens * shape.hidden * layout.compute_bytes
    distributions = tokens * shape.vocabulary * 4
    return min(base, load.search_cache_bytes) + min(distributions, load.search_teacher_bytes) + reference


def _fits(shape: Shape, layout: Layout, load: Load) -> int:
    """Hidden states to fit to, and the blocks in training: fp32 weights, gradients and Adam's two moments.

    Least squares, after the steps of all, has three fp64 matrices as wide as the MLP instead of gradients and moments.
    """
    if load.merging is None:
        return 0
    examples = load.merging.batches(load.eval_batch) * load.eval_batch
    places = examples * load.tokens * shape.hidden * layout.teacher_bytes * (shape.blocks + 1)
    steps = load.fitted_at_once * 16 * shape.block
    solving = load.fitted_at_once * 4 * shape.block + 3 * 8 * shape.inner * (shape.inner + shape.hidden)
    return min(places, load.merging.cache_bytes) + max(steps, solving)


def _offers(shape: Shape, layout: Layout, load: Load) -> int:
    """Every pair's fitted block waits beside the student until the round is over."""
    return 0 if load.merging is None else (shape.blocks - 1) * shape.block * layout.student_bytes
