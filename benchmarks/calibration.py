"""Effect of the calibration text, its size and the rule of choice on the quality of a pruned model on held-out text.

    python benchmarks/calibration.py --text wikitext=TRAIN.raw --text c4=C4.jsonl --held_out VALID.raw [--output CSV]
    python benchmarks/calibration.py --target prefill --again 0.5 --text wikitext=TRAIN.raw --held_out VALID.raw
    python benchmarks/calibration.py --chosen CSV --held_out VALID.raw --skip 96 [--output CSV]

Blocks are dropped one after another, from both stages or from prefill only. With `--again`, the first text is also
tried with this share of repeated prompts (`data.parts.repeated_prompts`: the response is the prompt again). Every
choice is evaluated by KL and NLL on held-out text, and by recall (column `look_back`, see
`pdtrim_pl.evaluation.recall`). The third command evaluates the choices of an earlier run on other text, since a table
must not report the text that a default was chosen on.

Candidates are scored on parts of eight windows. A candidate with more than twice the best KL on the first part is not
scored on the others, since no rule would choose it. Rules:

    cosine   the most redundant blocks by cosine of input and output, chosen at once (ShortGPT)
    nll      least mean response NLL (SLEB)
    kl       least mean KL to the teacher
    kl_pool  least mean KL among the twelve most redundant blocks by cosine
    kl_se    least mean KL plus its standard error over the parts
    kl_worst least KL on the worst part
    kl_cross cross-fitted: take the three best on one half of the parts, and of these the best on the other half; do the
             same with the halves exchanged; of the two winners, take the one with the lower mean KL
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean, stdev

import torch
import transformers

from pdtrim_pl.criteria import CosineRedundancy, ScoringContext
from pdtrim_pl.data import Batch, Collator, Lengths, Parts, PromptResponseDataModule, TextSource
from pdtrim_pl.evaluation.evaluator import Energy, Evaluator
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.evaluation.recall import measure_recall, repeated_requests
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import StagePlan, Target
from pdtrim_pl.staged import StagedCausalLM

COLUMNS = (
    "text", "windows", "rule", "target", "removed", "blocks",
    "calibration_kl", "held_out_kl", "held_out_nll", "look_back",
)  # fmt: skip
PART, POOL, SHORTLIST, HOPELESS = 8, 12, 3, 2.0
Blocks = tuple[tuple[int, ...], tuple[int, ...]]
COLLATE = Collator(pad_id=0)
Scores = Mapping[int, Sequence[Energy]]
"""Candidate block -> its energies on the parts."""


def _kl(parts: Sequence[Energy]) -> float:
    return mean(part.kl for part in parts)


def _nll(parts: Sequence[Energy]) -> float:
    return mean(part.nll for part in parts)


def _with_error(parts: Sequence[Energy]) -> float:
    return _kl(parts) + stdev([part.kl for part in parts]) / sqrt(len(parts))


def _worst(parts: Sequence[Energy]) -> float:
    return max(part.kl for part in parts)


def least(score: Callable[[Sequence[Energy]], float]) -> Callable[[Scores], int]:
    return lambda scores: min(scores, key=lambda block: (score(scores[block]), block))


def cross_fitted(scores: Scores) -> int:
    half = len(next(iter(scores.values()))) // 2
    halves = [{b: parts[:half] for b, parts in scores.items()}, {b: parts[half:] for b, parts in scores.items()}]
    winners = set()
    for proposes, decides in (halves, halves[::-1]):
        shortlist = sorted(proposes, key=lambda block: (_kl(proposes[block]), block))[:SHORTLIST]
        winners.add(min(shortlist, key=lambda block: (_kl(decides[block]), block)))
    return min(winners, key=lambda block: (_kl(scores[block]), block))


RULES: dict[str, Callable[[Scores], int]] = {
    "nll": least(_nll),
    "kl": least(_kl),
    "kl_pool": least(_kl),
    "kl_se": least(_with_error),
    "kl_worst": least(_worst),
    "kl_cross": cross_fitted,
}


@dataclass
class Walk:
    """One rule on a number of windows of a text, with the plan that it has reached so far."""

    rule: str
    windows: int
    plan: StagePlan
    by_count: dict[int, tuple[StagePlan, float]] = field(default_factory=dict)


class Bench:
    """A model, and the parts of one calibration text."""

    def __init__(
        self, student: StagedCausalLM, teacher: StagedCausalLM, batches: Sequence[Batch], target: Target
    ) -> None:
        self.student, self.teacher, self.batches, self.target = student, teacher, batches, target
        self.evaluators = [Evaluator(student, teacher, [batch]) for batch in batches]
        self.known: dict[tuple[Blocks, int], Energy] = {}
        self.full = full_plan(student, target)

    def scores(self, plan: StagePlan, blocks: Sequence[int], parts: int) -> dict[int, list[Energy]]:
        """Energies of the candidate blocks on the first `parts` parts, without hopeless candidates."""
        first = self._on(0, plan, blocks)
        limit = HOPELESS * min(energy.kl for energy in first.values())
        promising = [block for block in blocks if first[block].kl <= limit]
        found = [self._on(part, plan, promising) for part in range(parts)]
        return {block: [energies[block] for energies in found] for block in promising}

    def _on(self, part: int, plan: StagePlan, blocks: Sequence[int]) -> dict[int, Energy]:
        trials = {block: plan.drop(self.target, block) for block in blocks}
        keys = {block: (left(trial), part) for block, trial in trials.items()}
        new = [block for block in blocks if keys[block] not in self.known]
        if new:
            self.evaluators[part].rebase(plan)
            self.known |= {keys[block]: self.evaluators[part].measure(trials[block]) for block in new}
        return {block: self.known[keys[block]] for block in blocks}

    def influence(self, parts: int) -> dict[int, float]:
        """1 - cosine of input and output of each block in the full model; lower means more redundant."""
        context = ScoringContext(self.student, self.teacher, self.batches[:parts])
        return CosineRedundancy().score(context, self.full, self.target, self.full.drop_candidates(self.target))


def full_plan(student: StagedCausalLM, target: Target) -> StagePlan:
    """The plan of the unpruned model. If only prefill loses blocks, decode handles the last prompt token (POP)."""
    if target == "both":
        return StagePlan.full(student.plan.model, "unified")
    return StagePlan.full(student.plan.model, "prefill_only", "decode")


def left(plan: StagePlan) -> Blocks:
    """Key of a plan: the blocks that are left. The order of the drops makes no difference."""
    return plan.prefill, plan.decode


@torch.no_grad()
def main() -> None:
    options = arguments()
    student, teacher = (StagedCausalLM(load_causal_lm(options.model, dtype=torch.bfloat16)).eval() for _ in range(2))
    judge = Judge(
        student, teacher, read(options, options.held_out, options.skip + options.judged)[options.skip // PART :]
    )
    rows: list[list[object]] = []
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}", file=sys.stderr)
    for facts, plan in chosen(options, student) if options.chosen else choices(options, student, teacher):
        rows.append([*facts, *(f"{value:.4f}" for value in judge(plan))])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    with open(options.output, "w", newline="") if options.output else nullcontext(sys.stdout) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def choices(
    options: argparse.Namespace, student: StagedCausalLM, teacher: StagedCausalLM
) -> Iterator[tuple[list[object], StagePlan]]:
    """The choice of every rule on every set: the first columns of its row, and the plan."""
    for name, batches, sizes in sources(options):
        bench = Bench(student, teacher, batches, options.target)
        for made in searched(bench, sizes, options):
            for count, (plan, energy) in sorted(made.by_count.items()):
                removed = " ".join(map(str, plan.removed("prefill")))
                yield [name, made.windows, made.rule, options.target, count, removed, f"{energy:.4f}"], plan


def chosen(options: argparse.Namespace, student: StagedCausalLM) -> Iterator[tuple[list[object], StagePlan]]:
    """The choices of an earlier run, from its CSV file; results as of `choices`."""
    with open(options.chosen, newline="") as file:
        for row in csv.DictReader(file):
            target: Target = "both" if row["target"] == "both" else "prefill"
            plan = full_plan(student, target)
            for block in map(int, row["blocks"].split()):
                plan = plan.drop(target, block)
            yield [row[name] for name in COLUMNS[:7]], plan


class Judge:
    """Measures KL, NLL and recall of plans on held-out text. Every plan is measured once."""

    def __init__(self, student: StagedCausalLM, teacher: StagedCausalLM, held_out: Sequence[Batch]) -> None:
        self.student, self.teacher, self.held_out = student, teacher, held_out
        self.again = repeated_requests(held_out, COLLATE, len(held_out) * PART // 3)
        self.known: dict[Blocks, tuple[float, float, float]] = {}

    def __call__(self, plan: StagePlan) -> tuple[float, float, float]:
        key = left(plan)
        if key not in self.known:
            before = self.student.plan
            self.student.apply_plan(plan)
            quality = measure_quality(self.student, self.teacher, self.held_out)
            self.known[key] = quality.kl, quality.nll, measure_recall(self.student, self.again)
            self.student.apply_plan(before)
        return self.known[key]


def sources(options: argparse.Namespace) -> Iterator[tuple[str, list[Batch], list[int]]]:
    """Name, parts and sizes (in windows) of every calibration set."""
    for index, given in enumerate(options.text):
        name, path = given.split("=", 1)
        sizes = options.sizes if index == 0 else [options.windows]
        parts = read(options, path, max(sizes))
        yield name, parts, sizes
        if options.again and index == 0:
            mixed = read(options, path, options.windows, options.again)[::-1]  # unchanged windows come first
            yield f"{name}, {options.again:g} said again", mixed, [options.windows]


def searched(bench: Bench, sizes: Sequence[int], options: argparse.Namespace) -> list[Walk]:
    """Run every rule on every size up to the highest count. The rules share their evaluations."""
    influence = {size: bench.influence(size // PART) for size in sizes}
    walks = [Walk(rule, size, bench.full) for size in sizes for rule in rules_on(size, options)]
    for count in range(1, max(options.counts) + 1):
        for walk in walks:
            blocks = list(walk.plan.drop_candidates(bench.target))
            if walk.rule == "kl_pool":
                blocks = sorted(blocks, key=influence[walk.windows].__getitem__)[:POOL]
            scores = bench.scores(walk.plan, blocks, walk.windows // PART)
            block = RULES[walk.rule](scores)
            walk.plan = walk.plan.drop(bench.target, block)
            if count in options.counts:
                walk.by_count[count] = walk.plan, _kl(scores[block])
    return [*walks, *(one_shot(bench, size, influence[size], options.counts) for size in sizes)]


def rules_on(size: int, options: argparse.Namespace) -> list[str]:
    """The rules to run on a size: all on `options.windows`; on other sizes only those that can use a single part."""
    return [rule for rule in options.rules if size == options.windows or rule in ("nll", "kl")]


def one_shot(bench: Bench, windows: int, influence: Mapping[int, float], counts: Sequence[int]) -> Walk:
    """Drop the most redundant blocks of the full model by cosine. This rule has no energy."""
    walk, order = Walk("cosine", windows, bench.full), sorted(influence, key=lambda block: (influence[block], block))
    for count in counts:
        plan = bench.full
        for block in order[:count]:
            plan = plan.drop(bench.target, block)
        walk.by_count[count] = plan, float("nan")
    return walk


def read(options: argparse.Namespace, path: str, windows: int, again: float = 0.0) -> list[Batch]:
    """The first windows of a text, in batches of one part. A share `again` of them has repeated prompts."""
    data = PromptResponseDataModule(
        options.model, TextSource(path), Lengths(options.prompt + options.response, options.prompt, options.prompt),
        Parts(validation=0, calibration=windows, repeated_prompts=again), eval_batch_size=PART,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return list(data.calibration_dataloader())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, directory or Hub id")
    parser.add_argument("--text", action="append", default=[], help="NAME=SOURCE; sizes vary on the first")
    parser.add_argument("--chosen", help="CSV file of an earlier run: evaluate its choices, make no new ones")
    parser.add_argument("--held_out", required=True, help="source of the held-out text")
    parser.add_argument("--judged", type=int, default=96, help="windows of the held-out text, a multiple of 8")
    parser.add_argument("--skip", type=int, default=0, help="first windows of it to leave out, a multiple of 8")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="windows, multiples of 8")
    parser.add_argument("--windows", type=int, default=32, help="the size on which all rules run; one of --sizes")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="cosine always runs too")
    parser.add_argument("--target", choices=["both", "prefill"], default="both", help="the stage that loses blocks")
    parser.add_argument("--again", type=float, default=0.0, help="share of repeated prompts in one more set")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of every prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of every response")
    parser.add_argument("--output", help="CSV file; standard output by default")
    options = parser.parse_args()
    if bool(options.text) == bool(options.chosen):
        parser.error("give --text, or --chosen")
    return options


if __name__ == "__main__":
    main()
