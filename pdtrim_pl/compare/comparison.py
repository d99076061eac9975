"""The comparison: run every method at every count, keep finished rows, write tables and plots at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
"""Version of the rows. Raise it when the content of a row changes, so that older rows are computed again."""
NO_ADAPTER = ("architecture", None)
DENSE = "dense"
"""Name of the unpruned model in the accuracy table."""


@dataclass(frozen=True)
class Results:
    """All rows of a comparison."""

    outcomes: tuple[Outcome, ...]
    accuracy: tuple[Mapping[str, Any], ...] = ()
    """Rows of the accuracy table, the dense model first; empty if no task is measured."""

    def with_(self, outcome: Outcome) -> Results:
        """These results with one more row."""
        more = (outcome.accuracy_row(),) if outcome.accuracy else ()
        return Results((*self.outcomes, outcome), (*self.accuracy, *more))


class Comparison:
    """Runs several methods on the same model, text and numbers of blocks.

    Args:
        model: the model to trim.
        data: calibration and training text, and held-out text (`test`) unless `measures.held_out` names another source.
        methods: name of the row -> method. A method that starts from another one must come after it.
        rows: numbers of blocks, and the methods to run.
        training: settings of the training, for methods that train.
        measures: what is measured for every row.
        output: where results are written.

    Raises:
        UserError: a method starts from one that does not come before it, or `rows.only` has an unknown name.
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
        """Compute every row that is not finished yet.

        Args:
            settings: the resolved configuration of this comparison. It tells which finished rows are still valid.
            on_row: called after every row with the results so far.

        Returns:
            All rows, by count and then in the order of `methods`.

        Raises:
            UserError: the model cannot be trimmed, there is too little text, or the guards allow too few removals.
        """
        check_model(self.model.name, self.model.architecture)
        ledger = Ledger(self.output.folder)
        texts = read_texts(self.data, self.measures.held_out)
        prompt, response = texts.request()
        request = (self.measures.prompt or prompt, self.measures.response or response)
        bench = Bench(self.model, texts, self.training, self.rows.guards, request, ledger.rows)
        _check_counts(self.rows, bench)
        judge = Judge(bench, self.measures, self.data.tokenizer)
        run = _Run(self.methods, bench, judge, ledger, settings, self._shared(texts, judge.fingerprint(), settings))
        accuracy = run.dense_accuracy()
        results = Results((), (accuracy_row(DENSE, bench.full("nested"), accuracy),) if accuracy else ())
        for count in self.rows.counts:
            for name in self.methods:
                results = results.with_(run.outcome(name, count))
                on_row(results)
        return results

    def _shared(self, texts: Texts, tasks: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The facts that every row depends on."""
        return {
            "rows": ROWS,
            "texts": texts.fingerprint(),
            "tasks": dict(tasks),
            # Without an adapter the entry is left out, so that rows from before adapters existed stay valid.
            "model": {name: value for name, value in settings["model"].items() if (name, value) != NO_ADAPTER},
            "measures": settings["measures"],
        }


class _Run:
    """One run of a comparison, with its ledger of finished rows."""

    def __init__(
        self, methods: Mapping[str, Method], bench: Bench, judge: Judge, ledger: Ledger, settings: Mapping[str, Any],
        shared: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.methods, self.bench, self.judge, self.ledger = methods, bench, judge, ledger
        self.settings, self.shared = settings, shared
        self.keys: dict[tuple[str, int], str] = {}
        self.outcomes: dict[tuple[str, int], Outcome] = {}

    def dense_accuracy(self) -> dict[str, float]:
        """Accuracy of the unpruned model, by task."""
        key = key_of(self.shared)
        accuracy = self.ledger.dense_accuracy(key)
        if accuracy is None:
            accuracy = self.judge.accuracy(self.bench.teacher)
            self.ledger.put_dense_accuracy(accuracy, key)
        return accuracy

    def outcome(self, name: str, count: int) -> Outcome:
        """A row, from the ledger or computed now."""
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
        """The row of the same method at the next smaller count, if the method continues from it."""
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
            f"`rows.counts` asks for {rows.counts[-1]} blocks of {blocks}, but {guards} let at most {most} go. "
            "Lower it, or loosen `rows.guards`."
        )


def _wanted(methods: Mapping[str, Method], rows: Rows) -> set[str]:
    """Names of the methods to run, and of the methods that they start from."""
    wanted: set[str] = set()
    for name in methods if rows.only is None else rows.only:
        needed: str | None = name
        while needed is not None:
            wanted.add(needed)
            needed = methods[needed].start
    return wanted
