"""The results of lm-evaluation-harness as figures by document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pdtrim_pl.harness.figures import Documents, Form, Kind, Scored

KIND_OF: Mapping[str, Kind] = {
    "generate_until": "generation", "loglikelihood": "likelihood", "multiple_choice": "choice",
    "loglikelihood_rolling": "text",
}  # fmt: skip
MAIN_METRICS = ("acc_norm", "exact_match", "acc")
"""The figure that stands for a task, the first of these that it has."""


def scores_of(results: Mapping[str, Any]) -> list[Scored]:
    """All figures of a run of the harness, of tasks and of groups.

    Args:
        results: what `simple_evaluate` returns, with samples.
    """
    found = []
    for task, told in results["results"].items():
        leaves = list(_leaves(task, results["group_subtasks"]))
        kind = KIND_OF[results["configs"][leaves[0]]["output_type"]]
        samples = [(f"{leaf} {sample['doc_id']}", sample) for leaf in leaves for sample in results["samples"][leaf]]
        for key, value in told.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            better = results["higher_is_better"].get(task, {}).get(metric) is not False
            shown = metric if name == "none" else f"{metric}, {name}"
            values = {doc: sample[metric] for doc, sample in samples if sample["filter"] == name and metric in sample}
            documents = _documents(values, value)
            if documents is None:
                error = told.get(f"{metric}_stderr,{name}")
                stderr = error if isinstance(error, int | float) else None
                found.append(Scored(task, shown, kind, better, float(value), stderr))
            else:
                found.append(Scored.of(task, shown, kind, documents, higher_is_better=better))
    return found


def main_score(scores: Sequence[Scored], task: str) -> Scored:
    """The figure that stands for a task: see `MAIN_METRICS`, else its first one."""
    own = [score for score in scores if score.task == task]
    ranks = {name: rank for rank, name in enumerate(MAIN_METRICS)}
    return min(own, key=lambda score: ranks.get(score.metric.partition(",")[0], len(ranks)))


def _leaves(task: str, below: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The tasks of a group; a task itself."""
    if not below.get(task):
        yield task
    for each in below.get(task, ()):
        yield from _leaves(each, below)


def _documents(values: Mapping[str, Any], told: float) -> Documents | None:
    """The documents of a figure, in the form that gives what the harness tells; None if there is none.

    Args:
        values: document -> a number, or a log-likelihood with its words or bytes.
        told: the figure of the harness.
    """
    pairs = {}
    for name, value in values.items():
        above, below = value if isinstance(value, list | tuple) and len(value) == 2 else (value, 1.0)
        if not isinstance(above, int | float) or not isinstance(below, int | float):
            return None
        pairs[name] = (float(above), float(below))
    if not pairs or sum(below for _, below in pairs.values()) == 0:
        return None
    forms: tuple[Form, ...] = get_args(Form)
    for form in forms:
        documents = Documents(pairs, form)
        try:
            if math.isclose(documents.value, told, rel_tol=1e-6, abs_tol=1e-9):
                return documents
        except OverflowError:
            continue
    return None
