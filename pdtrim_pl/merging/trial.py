"""A trial block for a run of neighbours: run it on the teacher's hidden states, and compare its output with the run's.

Shapes: B batch, T tokens of a stage, N real tokens of the stages that merge, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pdtrim_pl.errors import UserError
from pdtrim_pl.merging.recording import Recording
from pdtrim_pl.parallel import Gather
from pdtrim_pl.plan import STAGES, Move, Stage, StagePlan
from pdtrim_pl.staged import KVCache, StagedCausalLM
from pdtrim_pl.staged.copies import copy_of
from pdtrim_pl.staged.gate import Observer, Resume


@dataclass(frozen=True)
class Start:
    """The start of a fit: a merge, and the block whose weights the fit starts from (`move.into`)."""

    move: Move
    stands_for: Mapping[Stage, tuple[int, ...]]
    """Per stage that merges: the original blocks that the merged block replaces."""
    trailing_blocks: tuple[int, ...] = ()
    """Blocks after the run that learn with it. The target is then the teacher's hidden state after them."""

    @property
    def into(self) -> int:
        """The block that stays."""
        assert self.move.into is not None
        return self.move.into

    @property
    def first(self) -> int:
        """The first block of the run."""
        return min(min(run) for run in self.stands_for.values())

    @property
    def end(self) -> int:
        """The index after the last block that learns."""
        return max([*self.trailing_blocks, *(block for run in self.stands_for.values() for block in run)]) + 1

    @property
    def places(self) -> set[int]:
        """Block indices at which the teacher's hidden state is needed."""
        return {self.first, self.end, self.into}


@dataclass(eq=False)
class Trial:
    """A copy of one block that learns to replace a run, in the stages that merge it. Trailing blocks may learn with it.

    A block that is merged in prefill attends to its own keys and values of the prompt. A block that is merged only in
    decode attends to those of the student's prefill block with the same index, run on the teacher's hidden state.
    """

    student: StagedCausalLM
    start: Start
    blocks: nn.ModuleDict
    """Index -> fp32 copy of a block that learns: the merged block and the trailing blocks. They start from the weights
    of the first stage that merges."""
    plan: StagePlan
    """A plan that runs only these blocks, in both stages, merged."""
    last_projection: nn.Linear | None
    """The module in whose weights `output` is linear; None if the model family has none."""
    _sent: dict[int, KVCache] = field(default_factory=dict)
    """Key of a recording -> the cache that the student's prefill block sends, for merges only in decode."""

    @classmethod
    def of(cls, student: StagedCausalLM, start: Start, gather: Gather | None = None) -> Trial:
        """Make the trial of a merge in the student's plan. The student is not changed.

        Args:
            student: the model whose blocks are copied.
            start: the merge.
            gather: makes sharded weights whole, if the strategy shards them.

        Raises:
            UserError: `last_projection` of the model family is not a linear layer of its blocks.
        """
        now, stage = student.plan, next(iter(start.stands_for))
        learning = (start.into, *start.trailing_blocks)
        blocks = nn.ModuleDict()
        for index in learning:
            block = student.gates[index].weights(stage, now)
            blocks[str(index)] = copy_of(block) if gather is None else _whole_copy(student, index, block, gather)
        untied = {stage: tuple(index for index in learning if index in now.untied[stage]) for stage in STAGES}
        merged = {stage: {start.into: run} for stage, run in start.stands_for.items()}
        widths = {stage: {index: now.width(stage, index) for index in learning} for stage in STAGES}
        plan = StagePlan(now.model, learning, learning, "free", now.boundary, merged, untied, widths=widths)
        last = _linear(blocks[str(learning[-1])], student.architecture.last_projection)
        return cls(student, start, blocks.float().eval(), plan, last)

    def tokens(self, recording: Recording) -> int:
        """Number of positions at which the outputs are compared."""
        return sum(recording.tokens(stage) for stage in self.start.stands_for)

    def valid(self, recording: Recording) -> list[Tensor]:
        """Real tokens of each stage that merges and has tokens, bool [B, T]."""
        masks = [recording.request.valid[stage] for stage in self.start.stands_for]
        return [mask for mask in masks if mask.shape[1]]

    def target(self, recording: Recording) -> Tensor:
        """The teacher's hidden state that `output` should match, fp32 [N, H]."""
        return self._joined(recording, self.start.end)

    def change(self, recording: Recording) -> Tensor:
        """The target minus the input of the run, fp32 [N, H]."""
        return self.target(recording) - self._joined(recording, self.start.first)

    def _joined(self, recording: Recording, place: int) -> Tensor:
        return self._real(recording, {stage: recording.hidden[stage].get(place) for stage in self.start.stands_for})

    def output(self, recording: Recording) -> Tensor:
        """The output of the last block of the trial, fp32 [N, H]. Gradients flow to the weights of its blocks."""
        dtype = next(self.blocks.parameters()).dtype
        outputs: dict[Stage, Tensor] = {}

        def keeping(stage: Stage) -> Observer:
            def observe(_: int, __: Tensor, after: Tensor) -> None:
                outputs[stage] = after

            return observe

        with self._on_trial():
            sent = self._encode(recording, keeping("prefill"), dtype)
            tokens, valid = recording.request.tokens["decode"], recording.request.valid["decode"]
            if "decode" in self.start.stands_for and tokens.shape[1]:
                at = self._at(recording, "decode", self.start.first, dtype)
                self.student.decode(
                    tokens, sent, valid, plan=self.plan, observer=keeping("decode"), keep_cache=False, resume=at
                )
        return self._real(recording, outputs)

    def _real(self, recording: Recording, hidden: Mapping[Stage, Tensor | None]) -> Tensor:
        """The hidden states at real positions of the merging stages, fp32 [N, H]. Stages without tokens are skipped."""
        found = [(hidden.get(stage), recording.request.valid[stage]) for stage in self.start.stands_for]
        return torch.cat([states[valid].float() for states, valid in found if states is not None])

    def _encode(self, recording: Recording, observer: Observer, dtype: torch.dtype) -> KVCache:
        """The keys and values of the prompt for these blocks, as the policy sends them."""
        request = recording.request
        policy = None if self.student.policy is None else self.student.policy.restricted_to(self.plan)
        if "prefill" in self.start.stands_for:
            at = self._at(recording, "prefill", self.start.first, dtype)
            encoded = self.student.prefill(
                request.tokens["prefill"], request.valid["prefill"], plan=self.plan, observer=observer, resume=at
            )
            return encoded.cache.retained(policy)
        if id(recording) not in self._sent:
            at = self._at(recording, "prefill", self.start.into, self.student.model.dtype)
            with torch.no_grad():
                encoded = self.student.prefill(
                    request.tokens["prefill"], request.valid["prefill"], plan=self.plan, resume=at
                )
                self._sent[id(recording)] = encoded.cache.retained(policy)
        return self._sent[id(recording)]

    def _at(self, recording: Recording, stage: Stage, place: int, dtype: torch.dtype) -> Resume:
        return Resume(self.start.into, recording.hidden[stage][place].to(dtype), {})

    @contextmanager
    def _on_trial(self) -> Iterator[None]:
        """Let the gates run the trial's blocks during a pass."""
        gates = {int(index): self.student.gates[int(index)] for index in self.blocks}
        before = {index: dict(gate.offers) for index, gate in gates.items()}
        for index, gate in gates.items():
            gate.offers.clear()
            merges = [(stage, self.start.into, run) for stage, run in self.start.stands_for.items()]
            gate.offers.update(dict.fromkeys(merges, self.blocks[str(index)]))
        try:
            yield
        finally:
            for index, gate in gates.items():
                gate.offers.clear()
                gate.offers.update(before[index])

    @torch.no_grad()
    def judge(self, recordings: Sequence[Recording]) -> tuple[float, float]:
        """Mean cosine similarity to the target, and mean squared error per element."""
        cosine, error, positions, width = 0.0, 0.0, 0, 1
        for recording in recordings:
            if self.tokens(recording):
                found, expected = self.output(recording), self.target(recording)
                cosine += float(F.cosine_similarity(found, expected, dim=-1).double().sum())
                error += float((found - expected).double().square().sum())
                positions, width = positions + len(found), found.shape[1]
        return cosine / positions, error / (positions * width)


def _linear(block: nn.Module, name: str | None) -> nn.Linear | None:
    if name is None:
        return None
    found = dict(block.named_modules()).get(name)
    if not isinstance(found, nn.Linear):
        raise UserError(
            f"`last_projection` of the model's Architecture is {name!r}, and a block has no linear layer of that name. "
            "Name the one whose output is added to the residual stream last and unchanged, or set it to None."
        )
    return found


def empty_block(student: StagedCausalLM, index: int, *, whole: bool) -> nn.Module:
    """A block that receives fitted weights from another rank, in the student's element type and on its device.

    Args:
        student: the model that has the block.
        index: original index of the block.
        whole: whether this process holds whole weights of the student.
    """
    block, like = student.gates[index].block, student.model
    if whole:
        return copy_of(block).requires_grad_(False)
    return _on_meta(student, index, block).to(like.dtype).to_empty(device=like.device).eval().requires_grad_(False)


def _on_meta(student: StagedCausalLM, index: int, block: nn.Module) -> nn.Module:
    with torch.device("meta"):
        fresh: nn.Module = type(block)(student.model.config, student.originals.index(index))
    return fresh


def _whole_copy(student: StagedCausalLM, index: int, block: nn.Module, gather: Gather) -> nn.Module:
    """A whole copy of a sharded block. The block is built anew: a deep copy would contain the hooks of the engine."""
    fresh = _on_meta(student, index, block)
    weights: dict[str, Tensor] = {}
    for name, parameter in block.named_parameters():
        with gather([parameter]):
            weight = parameter.detach()
            weights[name] = (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()
    fresh.load_state_dict(weights, assign=True)
    return fresh.requires_grad_(True)
