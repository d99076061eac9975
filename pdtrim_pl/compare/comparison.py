"""The comparison: every method at every count, each finished row kept, tables and pictures at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.judge import Judge
from pdtrim_pl.compare.ledger import Ledger, key_of
from pdtrim_pl.compare.meter import Spent
from pdtrim_pl.compare.method import Method
from pdtrim_pl.compare.outcome import Outcome, accuracy_row
from pdtrim_pl.compare.settings import Measures, Output, Rows, Subject, Training
from pdtrim_pl.compare.texts import Texts, read_texts
from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.pretrained import check_model
from pdtrim_pl.plan import KVRetentionPolicy

log = logging.getLogger(__name__)

ROWS = 1
"""Raised when what a row holds or means changes, so that older ones are made again."""
NO_ADAPTER = ("architecture", None)
DENSE = "dense"
"""Name of the unpruned model in the accuracy table."""


@dataclass(frozen=True)
class Results:
    """All rows of a comparison."""

    outcomes: tuple[Outcome, ...]
    accuracy: tuple[Mapping[str, Any], ...] = ()
    """Rows of the accuracy table, the dense model's first; none where no set is asked for."""

    def with_(self, outcome: Outcome) -> Results:
        """These and one more."""
        more = (outcome.accuracy_row(),) if outcome.accuracy else ()
        return Results((*self.outcomes, outcome), (*self.accuracy, *more))


class Comparison:
    """The same model, calibration text and counts through several methods.

    Args:
        model: what is trimmed.
        data: calibration and training text, and held-out text (`test`) unless `measures.held_out` names another source.
        methods: by the name of their row; a method that starts from another comes after it.
        rows: counts, and which methods to run.
        training: of rows that train.
        measures: what rows are judged by.
        output: where results go.

    Raises:
        UserError: a method that starts from one that is not there before it, or an unknown name in `rows.only`.
    """

    def __init__(
        self,
        model: Subject,
        data: PromptResponseDataModule,
        methods: dict[str, Method],
        rows: Rows = Rows(),
        training: Training = Training(),
        measures: Measures = Measures(),
        output: Output = Output(),
    ) -> None:
        self.model, self.data, self.rows, self.training = model, data, rows, training
        self.measures, self.output = measures, output
        _check(methods, rows)
        self.methods = {name: method for name, method in methods.items() if name in _wanted(methods, rows)}

    def run(self, settings: Mapping[str, Any], on_row: Callable[[Results], None] = lambda results: None) -> Results:
        """Make every row that is not there yet.

        Args:
            settings: the resolved configuration this was built from; which rows a change in it touches is found there.
            on_row: called after every row with what there is.

        Returns:
            All rows, by count and then in the order of `methods`.
        """
        check_model(self.model.name, self.model.architecture)
        ledger = Ledger(self.output.folder)
        texts = read_texts(self.data, self.measures.held_out)
        prompt, response = texts.request()
        request = (self.measures.prompt or prompt, self.measures.response or response)
        bench = Bench(self.model, texts, self.training, self.rows.guards, request, ledger.rows)
        _check_counts(self.rows, bench)
        judge = Judge(bench, self.measures, self.data.tokenizer)
        run = _Run(self.methods, bench, judge, ledger, settings, self._shared(texts, settings))
        accuracy = run.dense_accuracy()
        results = Results((), (accuracy_row(DENSE, bench.full("nested"), accuracy),) if accuracy else ())
        for count in self.rows.counts:
            for name in self.methods:
                results = results.with_(run.outcome(name, count))
                on_row(results)
        return results

    def _shared(self, texts: Texts, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What every row depends on."""
        return {
            "rows": ROWS,
            "texts": texts.fingerprint(),
            "choices": {name: sha256(path.read_bytes()).hexdigest() for name, path in self.measures.choices.items()},
            # No adapter is no entry, as before there were any: the rows that were made then stay.
            "model": {name: value for name, value in settings["model"].items() if (name, value) != NO_ADAPTER},
            "measures": settings["measures"],
        }


class _Run:
    """One run over one ledger."""

    def __init__(
        self, methods: Mapping[str, Method], bench: Bench, judge: Judge, ledger: Ledger, settings: Mapping[str, Any],
        shared: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.methods, self.bench, self.judge, self.ledger = methods, bench, judge, ledger
        self.settings, self.shared = settings, shared
        self.keys: dict[tuple[str, int], str] = {}
        self.outcomes: dict[tuple[str, int], Outcome] = {}

    def dense_accuracy(self) -> dict[str, float]:
        """Of the unpruned model, by set."""
        key = key_of(self.shared)
        accuracy = self.ledger.dense_accuracy(key)
        if accuracy is None:
            accuracy = self.judge.accuracy(self.bench.teacher)
            self.ledger.put_dense_accuracy(accuracy, key)
        return accuracy

    def outcome(self, name: str, count: int) -> Outcome:
        """The row, from the ledger or made now."""
        method, earlier = self.methods[name], self._earlier(name, count)
        start = (method.start, count) if method.start is not None else earlier
        key = self.keys[name, count] = self._key(name, count, start)
        needed = any(other.start == name for other in self.methods.values()) or method.continues
        known = self.ledger.get(name, count, key, with_weights=needed)
        if known is None:
            log.info("%s at %d: running.", name, count)
            known = self._make(name, count, key, start, needed)
        self.outcomes[name, count] = known
        judged, spent = known.judged, known.spent
        log.info(
            "%s at %d: KL %.4f, NLL %.4f, agreement %.3f; search %.0f s, %.3g block-token evaluations.",
            name, count, judged.kl, judged.nll, judged.agreement, spent.seconds, spent.block_tokens,
        )  # fmt: skip
        return known

    def _earlier(self, name: str, count: int) -> tuple[str, int] | None:
        """The method's own row at the count before, where it goes on from it."""
        counts = [c for n, c in self.outcomes if n == name and c < count]
        return (name, max(counts)) if counts and self.methods[name].continues else None

    def _key(self, name: str, count: int, start: tuple[str, int] | None) -> str:
        method = self.methods[name]
        return key_of({
            **self.shared,
            "guards": self.settings["rows"]["guards"],
            "method": self.settings["methods"][name],
            "count": count,
            "training": self.settings["training"] if method.trains else None,
            "start": self.keys[start] if start else None,
        })  # fmt: skip

    def _make(self, name: str, count: int, key: str, start: tuple[str, int] | None, needed: bool) -> Outcome:
        killed = self.ledger.spent_before(name, count, key)
        journal = self.ledger.journal(name, count)
        with self.bench.row(journal, lambda spent: self.ledger.note_spent(name, count, key, killed + spent)) as meter:
            found = self.methods[name].find(self.bench, None if start is None else self._found(start), count)
        spent = (Spent() if start is None else self.outcomes[start].spent) + killed + meter.spent
        student = self.bench.student(found)
        policy = found.policy or KVRetentionPolicy(found.plan.boundary, student.kv_shape)
        judged, accuracy = self.judge.judge(student), self.judge.accuracy(student)
        outcome = Outcome(name, count, found.plan, policy, found.trained_tokens, spent, judged, accuracy)
        self.ledger.put(outcome, key, found.weights, with_weights=needed)
        return outcome

    def _found(self, row: tuple[str, int]) -> Found:
        known = self.outcomes[row]
        return Found(known.plan, known.policy, self.ledger.weights(*row), known.trained_tokens)


def _check(methods: Mapping[str, Method], rows: Rows) -> None:
    before: list[str] = []
    faults = []
    for name, method in methods.items():
        if not name.replace("_", "").replace("-", "").isalnum():
            faults.append(f"`methods` has the name {name!r}: use letters, digits, `_` and `-`")
        faults += [
            f"`methods.{name}` starts from {other!r}, which is not before it ({', '.join(before) or 'nothing'} is)"
            for other in [method.start]
            if other is not None and other not in before
        ]
        before.append(name)
    if not methods:
        faults.append("`methods` names none")
    faults += [
        f"`rows.only` has the unknown method {name!r} ({', '.join(methods)} are known)"
        for name in rows.only or ()
        if name not in methods
    ]
    if faults:
        raise UserError("; ".join(faults) + ".")


def _check_counts(rows: Rows, bench: Bench) -> None:
    guards, blocks = rows.guards, bench.model.num_blocks
    free = bench.full("unified").drop_candidates("both", guards.protect_first, guards.protect_last)
    most = min(len(free), blocks - 1)
    most = most if guards.max_removed is None else min(most, guards.max_removed)
    if rows.counts[-1] > most:
        raise UserError(
            f"`rows.counts` asks for {rows.counts[-1]} blocks of {blocks}, and {guards} let at most {most} go. "
            "Lower it, or loosen `rows.guards`."
        )


def _wanted(methods: Mapping[str, Method], rows: Rows) -> set[str]:
    """The methods asked for, and what they start from."""
    wanted: set[str] = set()
    for name in methods if rows.only is None else rows.only:
        needed: str | None = name
        while needed is not None:
            wanted.add(needed)
            needed = methods[needed].start
    return wanted
