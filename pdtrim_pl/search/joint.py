"""A joint search over the blocks of both stages and the KV policy, to meet a cost target. For `relation: free`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

from pdtrim_pl.criteria.base import Progress
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.merging.settings import Merging
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Move, Stage, StagePlan
from pdtrim_pl.search.choose import warn_if_deep
from pdtrim_pl.search.greedy import LeastRise, Option, grow
from pdtrim_pl.search.guards import Guards
from pdtrim_pl.search.rounds import order
from pdtrim_pl.search.space import Space, after, fits
from pdtrim_pl.sizing.cost import CostModel, CostTarget

PolicyOf = Callable[[StagePlan], KVRetentionPolicy | None]
"""Returns the KV policy under which a plan is evaluated."""


@dataclass(frozen=True)
class JointState:
    """Removals in both stages."""

    removals: tuple[Move, ...] = ()

    def with_(self, move: Move) -> JointState:
        """This state with one more removal."""
        return JointState(tuple(sorted([*self.removals, move], key=_by_stage)))

    def without(self, move: Move) -> JointState:
        """This state without one of its removals."""
        return JointState(tuple(other for other in self.removals if other != move))


class JointSearch(Space[JointState]):
    """Searches for a plan and a policy that meet a cost target with the least energy.

    `policy_of` computes the policy of every plan. A removal in decode saves bytes on the wire, which the policy then
    spends on the remaining blocks.

    Args:
        evaluator: measures the energy.
        start: the plan before the search, of `relation: free`.
        target: maximum costs of prefill, decode and wire.
        cost: computes the costs of a plan and a policy.
        guards: limits on removals.
        policy_of: computes the policy of a plan. By default every plan has the policy of the student.
        merges: merges that may be chosen, besides drops. Each must be in one stage only.
        merging: settings with which they were fitted.

    Raises:
        UserError: the plan has another relation.
    """

    def __init__(
        self, evaluator: Evaluator, start: StagePlan, target: CostTarget, cost: CostModel, *,
        guards: Guards | None = None, policy_of: PolicyOf | None = None, merges: Sequence[Move] = (),
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
        self.start, self.target, self.cost, self.guards = start, target, cost, guards
        self._policy_of = policy_of or (lambda plan: evaluator.candidate(plan).policy)
        self._policies: dict[tuple[int, ...], KVRetentionPolicy | None] = {}
        drops = (
            Move(stage, (block,))
            for stage in STAGES
            for block in start.drop_candidates(stage, guards.protect_first, guards.protect_last)
        )
        self.pool: list[Move] = [*drops, *merges]

    def candidate(self, state: JointState) -> Candidate:
        plan = after(self.start, state.removals, self.merging)
        return Candidate(plan, self._policy(plan))

    def final(self, state: JointState, round: int, energy: float) -> Candidate:
        """Plan and policy of the state that a search returned. The history of the plan records round and energy."""
        plan = after(self.start, state.removals, self.merging, round=round, criterion="joint", score=energy)
        warn_if_deep(plan)
        return Candidate(plan, self._policy(plan))

    def excess(self, state: JointState) -> float:
        """By how much the costs of the state exceed the target; 0 if it meets the target. See `CostTarget.excess`."""
        candidate = self.candidate(state)
        return self.target.excess(self.cost.shares(candidate.plan, candidate.policy))

    def greedy(self, progress: Progress = lambda line: None) -> tuple[JointState, float]:
        """Greedy search: the next removal has the least rise of energy per reduction of the excess; see `LeastRise`.

        Raises:
            UserError: the target cannot be reached.
        """
        state = self._reached(self._grown(JointState(), STAGES, progress))
        return state, self.known_energy(state)

    def improved(
        self, state: JointState, progress: Progress = lambda line: None, over: Callable[[], bool] = lambda: False
    ) -> tuple[JointState, float]:
        """Undo all removals in prefill and choose them again; then in decode; until nothing helps.

        Exchanges of single removals cannot replace this. If a plan drops the same blocks in both stages, each exchange
        creates a KV-only block, which costs prefill time.
        """
        energy, idle = self.known_energy(state), 0
        for stage in cycle(STAGES):
            kept = JointState(tuple(move for move in state.removals if move.target != stage))
            other = state if kept == state else self._grown(kept, (stage,), progress)
            idle += 1
            if other is not None and other != state and self.known_energy(other) < energy:
                state, energy, idle = other, self.known_energy(other), 0
            if idle == len(STAGES) or over():
                break
        return state, energy

    def _grown(self, state: JointState, stages: Sequence[Stage], progress: Progress) -> JointState | None:
        """Add removals in some stages until the state meets the target; None if it cannot be met."""
        grown = grow(_Nearer(self, stages), state, LeastRise(self), self.known_energy(state), progress)
        return self._without_needless(grown.state, random.Random(0)) if grown.reached else None

    def _reached(self, state: JointState | None) -> JointState:
        if state is None:
            raise UserError(
                f"`target` {self.target} cannot be reached with everything chosen that may be. Raise its shares, "
                f"loosen `guards` {self.guards}, or allow coarser `wire.codecs`."
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
        """Exchange one removal for another of its stage, add removals until the target is met, undo needless ones."""
        if not state.removals:
            return None
        out = draw.choice(state.removals)
        left = state.without(out)
        same = [move for move in self._open(left) if move != out and move.target == out.target]
        if same:
            left = left.with_(draw.choice(same))
        met = self._met(left, draw)
        return state if met is None else self._without_needless(met, draw)

    def _met(self, state: JointState, draw: random.Random) -> JointState | None:
        """Add random removals until the state meets the target; None if it cannot be met."""
        excess = self.excess(state)
        while excess > 0:
            options = self.nearer(state, excess)
            if not options:
                return None
            state = draw.choice(options).state
            excess = self.excess(state)
        return state

    def nearer(self, state: JointState, excess: float, stages: Sequence[Stage] = STAGES) -> list[Option[JointState]]:
        """States with one more removal that are nearer to the target. Their gain is the reduction of the excess."""
        more = [(move, state.with_(move)) for move in self._open(state) if move.target in stages]
        options = [Option(move, other, excess - self.excess(other)) for move, other in more]
        return [option for option in options if option.gain > 0]

    def _open(self, state: JointState) -> list[Move]:
        """Removals that may be added to a state."""
        plan = self.candidate(state).plan
        moves = [move for move in self.pool if fits(move, state.removals)]
        return [move for move in moves if move not in state.removals and self._keeps_enough(plan, move)]

    def _keeps_enough(self, plan: StagePlan, move: Move) -> bool:
        assert move.target != "both"
        left = len(plan.blocks(move.target)) - move.removed
        cap = self.guards.max_removed
        return left >= 1 and (cap is None or plan.model.num_blocks - left <= cap)

    def _without_needless(self, state: JointState, draw: random.Random) -> JointState:
        """Undo, in random order, removals without which the target is still met."""
        for move in draw.sample(state.removals, len(state.removals)):
            spared = state.without(move)
            if self.excess(spared) == 0:
                state = spared
        return state

    def _policy(self, plan: StagePlan) -> KVRetentionPolicy | None:
        if plan.decode not in self._policies:
            self._policies[plan.decode] = self._policy_of(plan)
        return self._policies[plan.decode]


@dataclass(frozen=True)
class _Nearer:
    """The `Growth` of a joint search: removals in some stages lead towards its target."""

    search: JointSearch
    stages: Sequence[Stage]

    def reached(self, state: JointState) -> bool:
        return self.search.excess(state) <= 0

    def options(self, state: JointState) -> list[Option[JointState]]:
        return self.search.nearer(state, self.search.excess(state), self.stages)

    def step(self, state: JointState, progress: Progress) -> Progress:
        made, excess = len(state.removals), self.search.excess(state)
        progress(f"{made} removals made for {' and '.join(self.stages)}, costs still {excess:.3f} too high")
        return progress


def _by_stage(move: Move) -> tuple[str, tuple[int, ...], int]:
    return move.target, *order(move)
