"""Quality against bytes on the wire: what a pair loses when keys and values cross in few bits or at few positions.

    python benchmarks/wire.py TUNE.raw TEST.raw [--json] [--prompt 448] [--export DIR] [--picture wire.png]

Runs the dense embedded model, untrained, or a pair that was exported from it. Policies are chosen on the first file,
which no row reports. The second file gives the figures: KL to the same pair when it sends everything, in nats, and
recall, the share of a text of 128 tokens that the model finds when it is repeated at the end of the prompt. For
`recall` the text is at the start of the prompt; `recall_by_depth` has it at 10, 50 and 90 % of it. Bytes are relative
to bf16 and include all scales. `--json` prints one object: rows (name, ratio, kl, nll, recall, recall_by_depth) and
`ahead_everywhere`: no other row has fewer bytes and less KL than one of ours at 3x and beyond.

The rule of StreamingLLM (arXiv 2309.17453) keeps the first 4 and the last positions of every block. The rule of
SimLayerKV (arXiv 2410.13846) keeps these of the blocks that look at them most, and everything of the others; here
"most" is measured with the response, which SimLayerKV cannot see.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pdtrim_pl.data import Collator, Example
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.attention import attention_mass
from pdtrim_pl.evaluation.recall import repetition
from pdtrim_pl.export.load import load_stage
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.plan import STAGES, Codec, KVRetentionPolicy, KVShape, Retention
from pdtrim_pl.plan.codec import Form
from pdtrim_pl.selectors import BudgetSelector, Effort
from pdtrim_pl.selectors.allocation import codec_of
from pdtrim_pl.selectors.budget import Order
from pdtrim_pl.selectors.of_pair import PairMeasures, PairRequests
from pdtrim_pl.staged import StagedCausalLM

Rules = Mapping[int, Retention]
MODEL = "smollm2-135m"
REDUCTIONS = (2.0, 3.0, 4.95, 6.0, 8.0, 10.0)
REPEATED = 128
DEPTHS = (0.1, 0.5, 0.9)
FIRST = 4
"""Positions at the start that trimmed blocks send."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tune", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--tune", dest="tuned", type=int, default=4, help="examples that bits are chosen on")
    parser.add_argument("--test", dest="tested", type=int, default=8, help="examples of the figures")
    parser.add_argument("--exchanges", action="store_true", help="exchange bits on the joint measure")
    parser.add_argument("--export", type=Path, help="an exported pair of the embedded model, instead of the dense one")
    parser.add_argument("--only_ours", action="store_true", help="no other rows")
    parser.add_argument("--picture", type=Path, help="draw KL and recall against bytes")
    options = parser.parse_args()
    bench = Bench(options)
    rows = [bench.row(name, rules) for name, rules in bench.policies(options)]
    ours = [row for row in rows if row["name"].startswith("ours")]
    others = [row for row in rows if not row["name"].startswith("ours")]
    ahead = not any(row["ratio"] >= own["ratio"] >= 3 and row["kl"] <= own["kl"] for own in ours for row in others)
    report = {
        "model": MODEL, "export": options.export and options.export.name,
        "prompt": options.prompt, "response": options.response, "rows": rows,
        "ahead_everywhere": ahead, "threads": torch.get_num_threads(), "processor": platform.processor(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    if options.picture:
        draw(rows, options.picture)
    if options.json:
        print(json.dumps(report))
        return 0
    for row in rows:
        depths = "  ".join(f"{recall:.3f}" for recall in row["recall_by_depth"].values())
        print(f"{row['name']:40s} {row['ratio']:6.2f}x  KL {row['kl']:.4f}  recall {row['recall']:.3f}  {depths}")
    print(f"ahead everywhere at 3x and beyond: {ahead}")
    return 0


class Bench:
    """The pair, which may be one dense model, and its texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.export:
            self.prefill, self.decode = (load_stage(options.export, stage).eval() for stage in STAGES)
        else:
            self.prefill = self.decode = StagedCausalLM(load_causal_lm(MODEL, dtype=torch.float32)).eval()
        shape = self.decode.kv_shape
        self.shape = KVShape(shape.num_key_value_heads, shape.head_dim, "bfloat16")
        self.options = options
        tune, test = _tokens(options.tune), _tokens(options.test)
        self.tune = self._requests(tune, options.tuned)
        self.test = self._after_prefill(self._requests(test, options.tested))
        self.again = {depth: self._after_prefill(self._repeated(test, depth)) for depth in (0.0, *DEPTHS)}

    def policies(self, options: argparse.Namespace) -> list[tuple[str, Rules]]:
        """Name and rules of every row."""
        blocks, prompt = self.decode.plan.decode, options.prompt
        context = PairMeasures(self.prefill, self.decode, self.tune).context(self.shape)
        if self.prefill is self.decode:
            context = replace(context, measure_mass=self._mass)
        rows: list[tuple[str, Rules]] = [("everything", {})]
        for reduction in REDUCTIONS:
            selector = BudgetSelector(
                reduction, prompt_tokens=prompt, min_recall=0.0, effort=Effort(options.tuned, options.exchanges)
            )
            rows.append((f"ours, {reduction}x", selector.select(context)))
        if options.only_ours:
            return rows
        pairs: list[tuple[Form, Form]] = [
            ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4"), ("int4", "int3"), ("int3", "int3"), ("int2", "int2"),
        ]  # fmt: skip
        for keys, values in pairs:
            plain, ours = Codec(keys, values), codec_of(keys, values)
            rows.append((f"{keys}/{values} everywhere", dict.fromkeys(blocks, Retention(codec=plain))))
            if keys.startswith("int"):
                name = f"{keys}/{values} everywhere, rotated, sink exact"
                rows.append((name, dict.fromkeys(blocks, Retention(codec=ours))))
        for reduction in REDUCTIONS:
            kept = int(prompt / reduction)
            rule = Retention("first_last", FIRST, kept - FIRST)
            rows.append((f"StreamingLLM's rule, {reduction}x", dict.fromkeys(blocks, rule)))
        orders: list[tuple[str, Order]] = [("trimmed by damage", "damage")]
        if self.prefill is self.decode:
            orders.append(("SimLayerKV's rule", "mass"))
        for name, order in orders:
            for reduction in REDUCTIONS:
                trimmed = BudgetSelector(
                    reduction, FIRST, prompt // 11 - FIRST, order=order, prompt_tokens=prompt, codecs=["none"]
                )
                rows.append((f"{name}, {reduction}x", trimmed.select(context)))
        return rows

    def row(self, name: str, rules: Rules) -> dict[str, Any]:
        """Figures of one policy."""
        plan, policy = self.decode.plan, KVRetentionPolicy(self.decode.plan.boundary, self.shape, rules)
        sent, full = policy.sent_bytes(plan, self.options.prompt), policy.full_bytes(plan, self.options.prompt)
        kl, nll = (total / self.test.tokens for total in self.test.losses(policy))
        found = {depth: requests.recall(policy) for depth, requests in self.again.items()}
        return {
            "name": name, "ratio": full / sent, "kl": kl, "nll": nll, "recall": found.pop(0.0),
            "recall_by_depth": found,
        }  # fmt: skip

    def _after_prefill(self, batches: list[Batch]) -> PairRequests:
        return PairRequests(self.prefill, self.decode, batches)

    def _mass(self) -> Mapping[int, float]:
        last = self.options.prompt // 11 - FIRST
        return attention_mass(self.decode, self.tune, first=FIRST, last=last, device="cpu")

    def _requests(self, tokens: torch.Tensor, count: int) -> list[Batch]:
        prompt, size = self.options.prompt, self.options.prompt + self.options.response
        rows = tokens[: count * size].view(count, size)
        return [Collator(0)([Example(row[:prompt], row[prompt:])]) for row in rows]

    def _repeated(self, tokens: torch.Tensor, depth: float) -> list[Batch]:
        """Requests whose response repeats a text at some depth of the prompt."""
        between = self.options.prompt - REPEATED
        batches = []
        for start in range(0, 18_000, 3_000):
            text, others = tokens[start : start + REPEATED], tokens[start + 1000 : start + 1000 + between]
            if len(others) == between:
                batches.append(Collator(0)([repetition(text, others, round(depth * between))]))
        return batches


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL and recall against the reduction of bytes, one line for each method."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        same = "the same bits everywhere" + ", rotated, sink exact" * ("sink" in row["name"])
        name = same if "everywhere" in row["name"] else row["name"].split(",")[0]
        methods.setdefault(name, []).append(row)
    for axis, key, label in zip(axes, ("kl", "recall"), ("KL to everything sent, nats", "recall"), strict=True):
        for marker, (method, found) in zip("osD^v<>", methods.items(), strict=False):
            found = sorted(found, key=lambda row: row["ratio"])
            figures = [max(row[key], 1e-5) for row in found]
            axis.plot([row["ratio"] for row in found], figures, marker=marker, label=method)
        axis.set(xlabel="times fewer bytes", ylabel=label, xscale="log", yscale="log" if key == "kl" else "linear")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _tokens(path: Path) -> torch.Tensor:
    text = path.read_text(encoding="utf-8")[:600_000]
    return torch.tensor(load_tokenizer(MODEL)(text)["input_ids"])


if __name__ == "__main__":
    raise SystemExit(main())
