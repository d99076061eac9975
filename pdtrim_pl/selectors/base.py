"""The base class of KV selectors, and the measurements that a selector may use."""

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
"""Maximum number of calibration examples on which recall is measured."""


@dataclass(frozen=True)
class SelectorLoad:
    """What a selector keeps and runs on the models' device, for `pdtrim fit --dry_run`."""

    calibration: bool = False
    """Whether it keeps the prompt caches of the whole calibration set (it calls `SelectionContext.damage`)."""
    examples: int = 0
    """Number of calibration requests whose prompt caches it keeps (it calls `SelectionContext.energy` with it). As many
    requests that repeat their prompt, up to twice as long, are kept with them."""
    eager_attention: bool = False
    """Whether it runs a pass with eager attention (it reads `SelectionContext.mass`)."""


@dataclass(frozen=True)
class SelectionContext:
    """Measurements for a selector. Each is made when the selector asks for it; mass and recall are made once."""

    plan: StagePlan
    kv_shape: KVShape
    measure_mass: Callable[[], Mapping[int, float]]
    damage: Callable[[int, Retention], float]
    """Mean KL(teacher || student) in nats per response token if only this block of D sends by this rule."""
    energy: Callable[[Mapping[int, Retention], int], float]
    """Mean KL(teacher || student) in nats per response token under some rules. The second argument is the number of
    calibration requests. As many requests that repeat their prompt are added: ordinary text hardly attends far back, so
    on it alone the loss of the prompt would seem harmless."""
    measure_recall: Callable[[Mapping[int, Retention]], float]
    _recalled: dict[frozenset[tuple[int, Retention]], float] = field(default_factory=dict, init=False)

    @cached_property
    def mass(self) -> Mapping[int, float]:
        """Attention mass of the selector's rule for each block of D (see `evaluation.attention`)."""
        return self.measure_mass()

    def recall(self, rules: Mapping[int, Retention]) -> float:
        """Share of the tokens of repeated prompts that the student ranks first under some rules, teacher-forced."""
        key = frozenset(rules.items())
        if key not in self._recalled:
            self._recalled[key] = self.measure_recall(rules)
        return self._recalled[key]

    def sent_ratio(self, rules: Mapping[int, Retention], prompt_tokens: int = 1024) -> float:
        """Bytes that the unpruned model sends divided by bytes sent under `rules`, for one prompt; inf if none."""
        policy = KVRetentionPolicy(self.plan.boundary, self.kv_shape, rules)
        sent = policy.sent_bytes(self.plan, prompt_tokens)
        return policy.full_bytes(self.plan, prompt_tokens) / sent if sent else inf


class KVSelector(ABC):
    """Chooses a retention rule for blocks of D.

    Args:
        first: prompt positions at the start that a trimmed block sends: a count, or a share of the prompt.
        last: prompt positions at the end that a trimmed block sends: a count, or a share of the prompt.

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

    def load(self) -> SelectorLoad:
        """What this selector keeps and runs. A subclass that calls `damage` or `energy` must say so here."""
        return SelectorLoad(eager_attention=self.looks_at_mass)

    @abstractmethod
    def select(self, context: SelectionContext) -> dict[int, Retention]:
        """Original block index -> rule, for blocks of D only. A block without a rule sends everything."""


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
    """Make the context for the student's present plan. Nothing is measured yet.

    The first call of `damage` or `energy` runs prefill on every request and keeps the caches. Each further call is a
    decode pass that starts at the first block with another rule. With several ranks, all must ask for the same
    measurements in the same order.

    Args:
        student: the model that will send less.
        teacher: the reference of `damage` and `energy`.
        batches: calibration requests. They are kept, since every measurement reads them.
        kv_shape: shape of one block's KV per position.
        device: device of both models.
        first: the selector's `first`, for `mass`.
        last: the selector's `last`, for `mass`.
        memory: memory limits; only `base` is used. On batches that do not fit, every call runs prefill again.
        ranks: the batches of damages and energies are split among the ranks. Mass is measured on every rank; the result
            of rank 0 is used.
        journal: file of evaluations. A value that is found there is not measured again.
    """
    plan, requests = student.plan, list(batches)

    def policy(rules: Mapping[int, Retention]) -> KVRetentionPolicy:
        return KVRetentionPolicy(plan.boundary, kv_shape, rules)

    @cache
    def repeated() -> list[Batch]:
        longest = max(batch.response_ids.shape[1] for batch in requests)
        return requests_within(student, requests, REPEATED, longest)

    @cache
    def evaluator(examples: int | None) -> Evaluator:
        # No stored distributions: comparing with them subtracts entropies, and the damage of one block may be tiny.
        exact = replace(memory, teacher=0)
        chosen = requests
        if examples is not None:
            chosen = first_examples(requests, examples) + first_examples(repeated(), examples)
        made = Evaluator(student, teacher, chosen, device=device, memory=exact, ranks=ranks, journal=journal)
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
        chosen, texts = policy(rules), repeated()

        def found(batch: Batch) -> tuple[int, int]:
            return recalled_tokens(student, batch, plan=plan, policy=chosen)

        with eval_mode(student), torch.no_grad():
            if ranks.whole:
                counts = measured_by_ranks(ranks, texts, lambda batch, _: found(batch))
            else:  # every forward pass is a collective: all ranks run the same batches
                counts = [found(batch) for batch in texts]
        right, tokens = (sum(column) for column in zip(*counts, strict=True))
        return right / tokens

    def mass() -> Mapping[int, float]:
        found, *_ = ranks.together(lambda: attention_mass(student, requests, first=first, last=last, device=device))
        return found

    return SelectionContext(plan, kv_shape, mass, damage, energy, recall)


def first_examples(batches: Iterable[Batch], most: int) -> list[Batch]:
    """The first `most` examples. Batches keep their sizes; the last one may be cut."""
    found: list[Batch] = []
    for batch in batches:
        if most > 0:
            found.append(batch.cut(most)[0])
            most -= len(found[-1].prompt_ids)
    return found
