"""What a KV selector looks at, and the class that every selector extends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import inf
from pathlib import Path

import torch

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.attention import attention_mass
from pdtrim_pl.evaluation.evaluator import Evaluator, SearchMemory
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.recall import recalled_tokens, requests_within
from pdtrim_pl.evaluation.spread import measured_by_ranks
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import KVRetentionPolicy, KVShape, Retention, StagePlan
from pdtrim_pl.staged import StagedCausalLM

REPEATED = 32
"""Calibration examples whose prompts are repeated, at most, to measure recall."""


@dataclass(frozen=True)
class SelectionContext:
    """What a selector may look at. Measurements are taken when asked for, and once."""

    plan: StagePlan
    kv_shape: KVShape
    measure_mass: Callable[[], Mapping[int, float]]
    damage: Callable[[int, Retention], float]
    """Mean KL(teacher || student) in nats per response token when only that block of D is trimmed by that rule."""
    energy: Callable[[Mapping[int, Retention], int], float]
    """Mean KL(teacher || student) in nats per response token under some rules, over so many calibration requests and as
    many whose response repeats the prompt: running text hardly looks back, and losing the prompt looks free on it."""
    measure_recall: Callable[[Mapping[int, Retention]], float]
    _recalled: dict[frozenset[tuple[int, Retention]], float] = field(default_factory=dict, init=False)

    @cached_property
    def mass(self) -> Mapping[int, float]:
        """Attention mass of the selector's rule, per block of D (see `evaluation.attention`)."""
        return self.measure_mass()

    def recall(self, rules: Mapping[int, Retention]) -> float:
        """Share of the tokens of repeated prompts that the student finds under some rules, teacher-forced."""
        key = frozenset(rules.items())
        if key not in self._recalled:
            self._recalled[key] = self.measure_recall(rules)
        return self._recalled[key]

    def sent_ratio(self, rules: Mapping[int, Retention], prompt_tokens: int = 1024) -> float:
        """Bytes of the unpruned model sending everything over bytes sent under `rules`, for one prompt."""
        policy = KVRetentionPolicy(self.plan.boundary, self.kv_shape, rules)
        sent = policy.sent_bytes(self.plan, prompt_tokens)
        return policy.full_bytes(self.plan, prompt_tokens) / sent if sent else inf


class KVSelector(ABC):
    """Chooses a retention rule for blocks of D.

    Args:
        first: prompt positions at the start that a trimmed block sends: a count, or a share of the prompt.
        last: prompt positions at the end that it sends.

    Raises:
        UserError: a count or share out of range.
    """

    def __init__(self, first: int | float = 4, last: int | float = 0.2) -> None:
        self.rule = Retention("first_last", first, last)

    @property
    def first(self) -> int | float:
        """Prompt positions at the start that a trimmed block sends."""
        return self.rule.first

    @property
    def last(self) -> int | float:
        """Prompt positions at the end that a trimmed block sends."""
        return self.rule.last

    @property
    def looks_at_mass(self) -> bool:
        """Whether attention mass is measured, for the choice or for the report."""
        return True

    @abstractmethod
    def select(self, context: SelectionContext) -> dict[int, Retention]:
        """Rules by original block index, for blocks of D only; a block without one sends everything."""


def selection_context(
    student: StagedCausalLM,
    teacher: StagedCausalLM,
    batches: Iterable[Batch],
    kv_shape: KVShape,
    device: torch.device | str,
    first: int | float = 4,
    last: int | float = 0.2,
    *,
    memory: SearchMemory = SearchMemory(),
    ranks: Parallel = Parallel(),
    journal: Path | None = None,
) -> SelectionContext:
    """The context of a student's plan as it is now. Measures nothing yet.

    The first damage runs every prompt once and keeps its cache; each damage is then a decode pass from the block that
    is trimmed. Under several ranks every one must ask for the same measurements in the same order.

    Args:
        student: the model that will send less.
        teacher: the reference of `damage`.
        batches: calibration requests; held, for they are read once a measurement.
        kv_shape: shape of one block's KV per position.
        device: where both models are.
        first: the selector's `first`, for `mass`.
        last: the selector's `last`.
        memory: `base` is the most that `damage` keeps; on batches that do not fit a damage costs prefill too.
        ranks: damages split the batches among them; every rank measures the mass, and rank 0's counts.
        journal: file of evaluations; a damage that it knows is not measured again.
    """
    plan, held = student.plan, list(batches)

    def policy(rules: Mapping[int, Retention]) -> KVRetentionPolicy:
        return KVRetentionPolicy(plan.boundary, kv_shape, rules)

    @cache
    def repeated() -> list[Batch]:
        longest = max(batch.response_ids.shape[1] for batch in held)
        return requests_within(student, held, REPEATED, longest)

    @cache
    def evaluator(examples: int | None) -> Evaluator:
        # Kept distributions would cost digits: they subtract entropies, and the damage of one block may be tiny.
        exact = replace(memory, teacher=0)
        requests = held if examples is None else first_examples(held, examples) + first_examples(repeated(), examples)
        made = Evaluator(student, teacher, requests, device=device, memory=exact, ranks=ranks, journal=journal)
        made.rebase(plan, policy({}))
        return made

    def damage(block: int, rule: Retention) -> float:
        with eval_mode(student), eval_mode(teacher):
            return evaluator(None).energy(plan, policy({block: rule}))

    def energy(rules: Mapping[int, Retention], examples: int) -> float:
        with eval_mode(student), eval_mode(teacher):
            return evaluator(examples).energy(plan, policy(rules))

    def recall(rules: Mapping[int, Retention]) -> float:
        ranks.leave_if_asked()
        chosen, requests = policy(rules), repeated()

        def found(batch: Batch) -> tuple[int, int]:
            return recalled_tokens(student, batch, plan=plan, policy=chosen)

        with eval_mode(student), torch.no_grad():
            if ranks.whole:
                counts = measured_by_ranks(ranks, requests, lambda batch, _: found(batch))
            else:  # every forward pass is a collective: all run the same batches
                counts = [found(batch) for batch in requests]
        right, tokens = (sum(column) for column in zip(*counts, strict=True))
        return right / tokens

    def mass() -> Mapping[int, float]:
        found, *_ = ranks.together(lambda: attention_mass(student, held, first=first, last=last, device=device))
        return found

    return SelectionContext(plan, kv_shape, mass, damage, energy, recall)


def first_examples(batches: Iterable[Batch], most: int) -> list[Batch]:
    """The first so many examples, in batches as they come."""
    found: list[Batch] = []
    for batch in batches:
        if most > 0:
            found.append(batch.cut(most)[0])
            most -= len(found[-1].prompt_ids)
    return found
