"""What the memory of one process depends on beside the sizes of the models."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_pl.merging import Merging
from pdtrim_pl.models.placement import Placement
from pdtrim_pl.selectors import SelectorLoad

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes, and its element types."""

    processes: int = 1
    zero_stage: int = 0
    """What is sharded, as a ZeRO stage; 0 if every process holds everything."""
    fsdp: bool = False
    """FSDP shards the same as ZeRO-3. It trains the fp32 shards themselves, and gathers weights to compute."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    student_bytes: int = 4
    """Bytes of one weight of the student."""
    teacher_bytes: int = 4
    """Bytes of one weight of the teacher."""
    teacher_eight_bits: bool = False
    """Whether the blocks of the teacher are in 8 bits, and only the rest of it has `teacher_bytes` a weight."""
    loaded_bytes: tuple[int, int] = (4, 4)
    """Bytes of one weight of student and teacher while they are loaded."""
    compute_bytes: int = 4
    """Bytes of one activation."""
    autocast: bool = False
    """Whether fp32 weights are cast in every step. The copies are kept until the end of the step."""
    optimizer_states: int = 2
    """Number of state tensors per weight: 2 for Adam."""
    frozen_embeddings: bool = False
    """Whether token embeddings and head have neither gradients nor optimizer states."""
    placement: Placement = "copy"
    """Where the teacher lives: only `copy` and `sharded` hold weights of it."""
    trained: int | None = None
    """Number of weights with gradients, if only a part trains; None for all, or all but frozen embeddings."""
    adapters: int = 0
    """Number of weights of adapters, which are in fp32; then only these train."""
    on_cpu: bool = False
    """Whether a CPU computes."""


@dataclass(frozen=True)
class Load:
    """The work of one process at one time."""

    batch: int
    """Examples in a training batch."""
    eval_batch: int
    """Examples in a batch of the calibration set, and of the text that merged blocks are fitted on."""
    tokens: int
    """Maximum number of tokens of an example."""
    chunk_tokens: int
    """Number of tokens whose logits are in memory at once."""
    gradient_checkpointing: bool
    padding: int = 0
    """Maximum number of tokens by which the padding of prompts and of responses lengthens a row of a batch."""
    calibration: int = 0
    """Number of examples of the calibration set. Its batches are split among the processes."""
    searches: bool = True
    """Whether a callback searches for removals."""
    merging: Merging | None = None
    """Settings of local fits; None if no blocks are merged."""
    fitted_at_once: int = 0
    """Number of blocks that local fits train at once."""
    narrowed_on: int = 0
    """Number of examples on which blocks are made narrower; 0 if none are."""
    widths_offered: int = 0
    """Number of widths that a search tries at once."""
    untied: tuple[int, int] = (0, 0)
    """Number of blocks for which prefill, and decode, get weights of their own."""
    untied_kv_only: int = 0
    """Number of KV-only blocks for which prefill gets projections of its own."""
    selection: SelectorLoad | None = None
    """What the KV selector keeps and runs; None if no policy is chosen."""
    search_cache_bytes: int = 4 * GIB
    """Limit of a search, and of a KV selector, for prompt caches and hidden states."""
    search_teacher_bytes: int = 2 * GIB
    """Limit of a search for the teacher's probabilities."""
    untrained_bytes: int = 0
    """Bytes of one weight of the student before training, if the export loads it again; else 0."""
