"""Blocks on trial for a run of neighbours: run under the contract from the teacher's hidden state, and compared.

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
from pdtrim_pl.staged.gate import Observer, Resume, copy_of


@dataclass(frozen=True)
class Start:
    """One way to make a merge: from which block's weights."""

    move: Move
    stands_for: Mapping[Stage, tuple[int, ...]]
    """Per stage that merges, the original blocks that the merged one is to stand for."""
    trailing_blocks: tuple[int, ...] = ()
    """Blocks behind the run that learn with it, towards what the teacher's state is behind them."""

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
        """The block behind all that learns."""
        return max([*self.trailing_blocks, *(block for run in self.stands_for.values() for block in run)]) + 1

    @property
    def places(self) -> set[int]:
        """Where the teacher's hidden state is needed."""
        return {self.first, self.end, self.into}


@dataclass(eq=False)
class Trial:
    """A copy of one block that shall do what the run does, in the stages that merge it; blocks behind may help it.

    A block that is merged in decode alone attends, at prompt positions, to the keys and values that the student's own
    prefill block of that index makes of the teacher's hidden state there; merged in prefill, to its own.
    """

    student: StagedCausalLM
    start: Start
    blocks: nn.ModuleDict
    """The copy, and those of the blocks behind the run that learn with it, by index, in fp32: from what the first
    merging stage runs now."""
    plan: StagePlan
    """These blocks alone, in both stages, merged."""
    last_projection: nn.Linear | None
    """The module in whose weights `output` is linear; None where the model family has none."""
    _sent: dict[int, KVCache] = field(default_factory=dict)

    @classmethod
    def of(cls, student: StagedCausalLM, start: Start, gather: Gather | None = None) -> Trial:
        """The trial of a merge into the student's own plan; the student is not changed.

        Raises:
            UserError: the model family's `last_projection` is not a linear layer of its blocks.
        """
        now, stage = student.plan, next(iter(start.stands_for))
        learning = (start.into, *start.trailing_blocks)
        blocks = nn.ModuleDict()
        for index in learning:
            block = student.gates[index].weights(stage, now)
            blocks[str(index)] = copy_of(block) if gather is None else _whole_copy(student, index, block, gather)
        untied = {stage: tuple(index for index in learning if index in now.untied[stage]) for stage in STAGES}
        merged = {stage: {start.into: run} for stage, run in start.stands_for.items()}
        plan = StagePlan(now.model, learning, learning, "free", now.boundary, merged, untied)
        last = _linear(blocks[str(learning[-1])], student.architecture.last_projection)
        return cls(student, start, blocks.float().eval(), plan, last)

    def tokens(self, recording: Recording) -> int:
        """Positions at which the block is compared."""
        return sum(recording.tokens(stage) for stage in self.start.stands_for)

    def valid(self, recording: Recording) -> list[Tensor]:
        """Real tokens of each stage that merges and was fed any, bool [B, T]."""
        masks = [recording.request.valid[stage] for stage in self.start.stands_for]
        return [mask for mask in masks if mask.shape[1]]

    def target(self, recording: Recording) -> Tensor:
        """The run's output, fp32 [N, H]."""
        return self._joined(recording, self.start.end)

    def change(self, recording: Recording) -> Tensor:
        """What the run adds to its input, fp32 [N, H]."""
        return self.target(recording) - self._joined(recording, self.start.first)

    def _joined(self, recording: Recording, place: int) -> Tensor:
        return self._real(recording, {stage: recording.hidden[stage].get(place) for stage in self.start.stands_for})

    def output(self, recording: Recording) -> Tensor:
        """The output of the last of the blocks where the teacher's is `target`, fp32 [N, H]; gradients reach them."""
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
        """The real positions of the merging stages, fp32 [N, H]; a stage that was fed nothing has no hidden state."""
        found = [(hidden.get(stage), recording.request.valid[stage]) for stage in self.start.stands_for]
        return torch.cat([states[valid].float() for states, valid in found if states is not None])

    def _encode(self, recording: Recording, observer: Observer, dtype: torch.dtype) -> KVCache:
        """The prompt's keys and values of this block, as the policy sends them."""
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
        """The blocks are what their gates run, for the length of a pass."""
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
        """Mean cosine with the run's output, and mean squared error of one element."""
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
            "Name the one whose output is added to the residual stream last and as it is, or set it to None."
        )
    return found


def empty_block(student: StagedCausalLM, index: int, *, whole: bool) -> nn.Module:
    """A block as a fitted one is, in the student's element type and on its device, for weights that are to come.

    Args:
        student: whose block it is like.
        index: which.
        whole: whether the student's own weights are whole here.
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
    """A copy of a sharded block that no engine knows of: made anew, for an engine's hooks are copied with a block."""
    fresh = _on_meta(student, index, block)
    weights: dict[str, Tensor] = {}
    for name, parameter in block.named_parameters():
        with gather([parameter]):
            weight = parameter.detach()
            weights[name] = (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()
    fresh.load_state_dict(weights, assign=True)
    return fresh.requires_grad_(True)
