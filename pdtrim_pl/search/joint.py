"""A joint search over the blocks of both stages and the KV policy, to meet a cost target. For `relation: free`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from pdtrim_pl.criteria.base import Progress
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.merging.settings import Merging
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Move, Retention, StagePlan
from pdtrim_pl.search.choose import warn_if_deep
from pdtrim_pl.search.greedy import LeastRise, Option, grow
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.rounds import order
from pdtrim_pl.search.space import Space, after, fits
from pdtrim_pl.sizing.cost import CostModel, CostTarget

FIRST_LAST = Retention("first_last", 4, 0.2)
KINDS = ("prefill", "decode", "wire")


@dataclass(frozen=True)
class Trim:
    """The choice to send only the first and last prompt positions to decode block `block`."""

    block: int


@dataclass(frozen=True)
class JointState:
    """Removals in both stages, and the blocks whose KV is trimmed."""

    removals: tuple[Move, ...] = ()
    trims: tuple[int, ...] = ()

    def with_(self, choice: Move | Trim) -> JointState:
        """This state with one more choice."""
        if isinstance(choice, Trim):
            return replace(self, trims=tuple(sorted({*self.trims, choice.block})))
        return replace(self, removals=tuple(sorted([*self.removals, choice], key=_by_stage)))

    def without(self, choice: Move | Trim) -> JointState:
        """This state without one of its choices."""
        if isinstance(choice, Trim):
            return replace(self, trims=tuple(block for block in self.trims if block != choice.block))
        return replace(self, removals=tuple(move for move in self.removals if move != choice))

    @property
    def choices(self) -> list[Move | Trim]:
        """All choices of this state."""
        return [*self.removals, *(Trim(block) for block in self.trims)]


class JointSearch(Space[JointState]):
    """Searches for a plan and a policy that meet a cost target with the least energy.

    Args:
        evaluator: measures the energy.
        start: the plan before the search, of `relation: free`.
        target: maximum costs of prefill, decode and wire.
        cost: computes the costs of a plan and a policy.
        guards: limits on removals.
        retention: what a trimmed block sends. No block is trimmed if `wire_bytes` of the target is 1.
        merges: merges that may be chosen, besides drops. Each must be in one stage only.
        merging: settings with which they were fitted.

    Raises:
        UserError: the plan has another relation.
    """

    def __init__(
        self, evaluator: Evaluator, start: StagePlan, target: CostTarget, cost: CostModel, *,
        guards: Guards | None = None, retention: Retention = FIRST_LAST, merges: Sequence[Move] = (),
        merging: Merging | None = None,
    ) -> None:  # fmt: skip
        super().__init__(evaluator)
        if start.relation != "free":
            raise UserError(
                f"A joint search needs `relation: free`, and the plan has `relation: {start.relation}`. Set it in "
                "`structure`, or drop blocks stage by stage with BlockDrop."
            )
        assert all(merge.target != "both" for merge in merges)
        self.merging = merging or Merging()
        guards = guards or Guards()
        self.start, self.target, self.cost, self.guards, self.retention = start, target, cost, guards, retention
        self.policy = evaluator.candidate(start).policy
        drops = (
            Move(stage, (block,))
            for stage in STAGES
            for block in start.drop_candidates(stage, guards.protect_first, guards.protect_last)
        )
        known = {} if self.policy is None else self.policy.rules
        trims = (Trim(block) for block in start.decode if target.wire_bytes < 1 and block not in known)
        self.pool: list[Move | Trim] = [*drops, *merges, *trims]

    def candidate(self, state: JointState) -> Candidate:
        plan = after(self.start, state.removals, self.merging)
        return Candidate(plan, self._policy(state, plan))

    def final(self, state: JointState, round: int, energy: float) -> Candidate:
        """Plan and policy of the state that a search returned. The history of the plan records round and energy."""
        plan = after(self.start, state.removals, self.merging, round=round, criterion="joint", score=energy)
        warn_if_deep(plan)
        return Candidate(plan, self._policy(state, plan))

    def excess(self, state: JointState) -> float:
        """By how much the costs of the state exceed the target; 0 if it meets the target. See `CostTarget.excess`."""
        candidate = self.candidate(state)
        return self.target.excess(self.cost.shares(candidate.plan, candidate.policy))

    def greedy(self, progress: Progress = lambda line: None) -> tuple[JointState, float]:
        """Greedy search: the next choice has the least rise of energy per reduction of the excess; see `LeastRise`.

        Raises:
            UserError: the target cannot be reached.
        """
        state = self._reached(self._grown(JointState(), KINDS, progress))
        return state, self.known_energy(state)

    def improved(
        self, state: JointState, progress: Progress = lambda line: None, over: Callable[[], bool] = lambda: False
    ) -> tuple[JointState, float]:
        """Undo all choices for prefill and choose them again; then for decode; then for the wire; until nothing helps.

        Exchanges of single choices cannot replace this. If a plan drops the same blocks in both stages, each exchange
        creates a KV-only block, which costs prefill time.
        """
        energy, idle = self.known_energy(state), 0
        for kind in cycle(KINDS):
            kept = state
            for choice in state.choices:
                kept = kept.without(choice) if _kind(choice) == kind else kept
            other = state if kept == state else self._grown(kept, (kind,), progress)
            idle += 1
            if other is not None and other != state and self.known_energy(other) < energy:
                state, energy, idle = other, self.known_energy(other), 0
            if idle == len(KINDS) or over():
                break
        return state, energy

    def _grown(self, state: JointState, kinds: Sequence[str], progress: Progress) -> JointState | None:
        """Grow a state with choices of some kinds until it meets the target; None if it cannot be met."""
        grown = grow(_Nearer(self, kinds), state, LeastRise(self), self.known_energy(state), progress)
        return self._without_needless(grown.state, random.Random(0)) if grown.reached else None

    def _reached(self, state: JointState | None) -> JointState:
        if state is None:
            raise UserError(
                f"`target` {self.target} cannot be reached with everything chosen that may be. Raise its shares, "
                f"loosen `guards` {self.guards}, or let `retention` keep less than {self.retention}."
            )
        return state

    def state_of(self, plan: StagePlan) -> JointState:
        """The state with the drops of another plan of the same model, as a start of a search.

        Further choices are drawn at random if this state does not meet the target.

        Raises:
            UserError: `plan` merges blocks or keeps a block that `start` has lost, or the target cannot be reached.
        """
        state = JointState()
        for stage in STAGES:
            kept, before = set(plan.blocks(stage)), set(self.start.blocks(stage))
            if kept - before or plan.merged[stage] != self.start.merged[stage]:
                raise UserError("A joint search can only start from a plan that drops blocks of its first plan.")
            for block in sorted(before - kept):
                state = state.with_(Move(stage, (block,)))
        return self._reached(self._met(state, random.Random(0)))

    def neighbour(self, state: JointState, draw: random.Random) -> JointState | None:
        """Exchange one choice for another of its kind, add choices until the target is met, and undo needless ones."""
        if not state.choices:
            return None
        out = draw.choice(state.choices)
        left = state.without(out)
        same = [choice for choice in self._open(left) if choice != out and _kind(choice) == _kind(out)]
        if same:
            left = left.with_(draw.choice(same))
        met = self._met(left, draw)
        return state if met is None else self._without_needless(met, draw)

    def _met(self, state: JointState, draw: random.Random) -> JointState | None:
        """Add random choices until the state meets the target; None if it cannot be met."""
        excess = self.excess(state)
        while excess > 0:
            options = self.nearer(state, excess)
            if not options:
                return None
            state = draw.choice(options).state
            excess = self.excess(state)
        return state

    def nearer(self, state: JointState, excess: float, kinds: Sequence[str] = KINDS) -> list[Option[JointState]]:
        """States with one more choice that are nearer to the target. Their gain is the reduction of the excess."""
        more = [(choice, state.with_(choice)) for choice in self._open(state) if _kind(choice) in kinds]
        options = [Option(choice, other, excess - self.excess(other)) for choice, other in more]
        return [option for option in options if option.gain > 0]

    def _open(self, state: JointState) -> list[Move | Trim]:
        """Choices that can be added to a state."""
        plan = self.candidate(state).plan
        moves = [choice for choice in self.pool if isinstance(choice, Move) and fits(choice, state.removals)]
        allowed = [move for move in moves if move not in state.removals and self._keeps_enough(plan, move)]
        trims = [c for c in self.pool if isinstance(c, Trim) and c.block in plan.decode and c.block not in state.trims]
        return [*allowed, *trims]

    def _keeps_enough(self, plan: StagePlan, move: Move) -> bool:
        assert move.target != "both"
        left = len(plan.blocks(move.target)) - move.removed
        cap = self.guards.max_removed
        return left >= 1 and (cap is None or plan.model.num_blocks - left <= cap)

    def _without_needless(self, state: JointState, draw: random.Random) -> JointState:
        """Undo, in random order, choices without which the target is still met."""
        for choice in draw.sample(state.choices, len(state.choices)):
            spared = state.without(choice)
            if self.excess(spared) == 0:
                state = spared
        trims = set(self.candidate(state).plan.decode)
        return replace(state, trims=tuple(block for block in state.trims if block in trims))

    def _policy(self, state: JointState, plan: StagePlan) -> KVRetentionPolicy | None:
        rules = {block: self.retention for block in state.trims if block in plan.decode}
        if self.policy is None and not rules:
            return None
        known = {} if self.policy is None else dict(self.policy.restricted_to(plan).rules)
        return KVRetentionPolicy(plan.boundary, self.evaluator.student.kv_shape, {**known, **rules})


@dataclass(frozen=True)
class _Nearer:
    """The `Growth` of a joint search: choices of some kinds lead towards its target."""

    search: JointSearch
    kinds: Sequence[str]

    def reached(self, state: JointState) -> bool:
        return self.search.excess(state) <= 0

    def options(self, state: JointState) -> list[Option[JointState]]:
        return self.search.nearer(state, self.search.excess(state), self.kinds)

    def step(self, state: JointState, progress: Progress) -> Progress:
        made, excess = len(state.choices), self.search.excess(state)
        progress(f"{made} choices made for {' and '.join(self.kinds)}, costs still {excess:.3f} too high")
        return progress


def _kind(choice: Move | Trim) -> str:
    return "wire" if isinstance(choice, Trim) else choice.target


def _by_stage(move: Move) -> tuple[str, tuple[int, ...], int]:
    return move.target, *order(move)
