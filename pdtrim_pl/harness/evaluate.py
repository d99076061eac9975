"""`pdtrim eval`: tasks of lm-evaluation-harness and measures of generation, on a pair and beside the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pdtrim_pl.errors import UserError
from pdtrim_pl.harness.device import present_device
from pdtrim_pl.harness.figures import Figure, Scored, compared, table
from pdtrim_pl.harness.in_process import InProcessPair, Mode, load_mode
from pdtrim_pl.harness.measures import DEPTHS, Measures, MeasureSettings
from pdtrim_pl.harness.scores import scores_of
from pdtrim_pl.harness.tasks import Tasks, TaskSettings
from pdtrim_pl.models.pretrained import load_tokenizer
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.generate import stop_ids_of
from pdtrim_pl.staged import StagedCausalLM

FORMAT = "pdtrim.evaluation/1"
Recall = list[list[float]]
"""Recall by prompt length and depth."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a pair."""

    facts: Mapping[str, Any]
    """Id of the pair, mode, the dense model, settings and date."""
    results: Mapping[str, Mapping[str, Any]]
    """Mode -> results of the harness with all answers; empty without tasks."""
    figures: Sequence[Figure] = ()
    """The pair beside the dense model; empty if that was not asked for."""
    recall: Mapping[str, Any] | None = None
    """Recall by prompt length and depth, of pair, dense model and the pair when it sends everything."""

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON values, without the answers."""
        return {
            "format": FORMAT, **self.facts, "figures": [figure.to_json() for figure in self.figures],
            "recall": self.recall,
        }  # fmt: skip

    def table(self) -> str:
        """The figures beside those of the dense model; without it the table of the harness."""
        if self.figures:
            return table(self.figures)
        from lm_eval.utils import make_table

        (results,) = self.results.values()
        text: str = make_table(results)
        return text


def evaluate_pair(
    export: Path, tasks: TaskSettings, measures: MeasureSettings, *,
    mode: Mode = "disaggregated", against: Literal["dense"] | None = None, model: str | None = None,
    device: str | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate a pair, and the dense model on the same documents.

    Args:
        export: directory of the pair.
        tasks: tasks of the harness; none needs no harness.
        measures: measures of generation; they need `against`.
        mode: what answers: see `PairLM`.
        against: `dense` answers the same documents, for comparison.
        model: see `PairLM`.
        device: default `cuda` if there is a GPU, else `cpu`.

    Raises:
        UserError: a task or measure is unknown, the harness is not installed, or the export cannot be loaded.
    """
    if not tasks.names and not measures.names:
        raise UserError("There is nothing to evaluate: name `tasks` or `measures`.")
    if measures.names and against is None:
        raise UserError("`measures` compare with another model: add `--against dense`.")
    if against == mode:
        raise UserError(f"`against` is {against}, as `mode` is: name another one.")
    wanted = Tasks(tasks) if tasks.names else None
    exported = ExportedPair.read(Path(export))
    run = _Run(exported, wanted, measures, model, device)
    modes: list[Mode] = [mode] if against is None else [against, mode]
    scores = {each: run.scores(each, reference=each == against) for each in modes}
    settings = {"tasks": asdict(tasks), "measures": asdict(measures)}
    facts = {
        "pair": PairManifest.load(exported.path).id, "mode": mode, "against": against,
        "dense_model": model or exported.plan.model.name_or_path, "settings": _plain(settings),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    if against is None:
        return Evaluation(facts, run.results)
    other = {(each.task, each.metric): each for each in scores[against]}
    figures = [compared(each, other[each.task, each.metric]) for each in scores[mode]]
    recall = None if "recall" not in measures.names else {
        "prompts": list(measures.prompts), "depths": list(DEPTHS), "margin": measures.margin,
        **{name: None if of is None else _by_depth(of, measures.prompts)
           for name, of in (("pair", scores[mode]), ("dense", scores[against]), ("everything_sent", run.whole))},
    }  # fmt: skip
    return Evaluation(facts, run.results, figures, recall)


class _Run:
    """One evaluation: loads a mode, runs everything on it, and lets it go before the next one."""

    def __init__(
        self, exported: ExportedPair, tasks: Tasks | None, measures: MeasureSettings, model: str | None,
        device: str | None,
    ) -> None:  # fmt: skip
        self.exported, self.tasks, self.model, self.device = exported, tasks, model, device
        self.tokenizer = load_tokenizer(str(exported.path / "prefill"))
        self.stop_ids = stop_ids_of(exported.path, self.tokenizer)
        self.measures = (
            Measures(measures, self.tokenizer, exported.path, exported.context, self.stop_ids)
            if measures.names
            else None
        )
        self.results: dict[str, Mapping[str, Any]] = {}
        self.whole: list[Scored] | None = None
        """Recall of the pair when it sends everything, if its policy does not."""

    def scores(self, mode: Mode, *, reference: bool) -> list[Scored]:
        """All figures of one mode. The reference comes first."""
        answering = load_mode(self.exported, mode, model=self.model, device=present_device(self.device))
        found: list[Scored] = []
        if self.tasks is not None:
            from pdtrim_pl.harness.model import InProcessLM

            size = self.tasks.settings.batch_size
            lm = InProcessLM(answering, self.tokenizer, self.stop_ids, batch_size=size)
            self.results[mode] = self.tasks.run(lm)
            found += scores_of(self.results[mode])
        if self.measures is not None:
            pair = answering if isinstance(answering, InProcessPair) else InProcessPair.of(StagedCausalLM(answering))
            found += self.measures.dense(pair) if reference else self.measures.of(pair)
            if not reference and pair.policy is not None and "recall" in self.measures.settings.names:
                self.whole = self.measures.recall(replace(pair, policy=None))
        return found


def _by_depth(scores: Sequence[Scored], prompts: Sequence[int]) -> Recall:
    """Recall by prompt length and depth; the first figure of recall is that over all."""
    cells = [score.value for score in scores if score.task == "recall"][1:]
    return [cells[at * len(DEPTHS) : (at + 1) * len(DEPTHS)] for at in range(len(prompts))]


def _plain(value: Any) -> Any:
    """Settings as JSON values."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
