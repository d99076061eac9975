"""Quality against bytes on the wire: low-bit codecs, bits chosen block by block, and trimmed positions.

    python benchmarks/wire.py TUNE.raw TEST.raw [--json] [--prompt 448] [--response 64] [--tune 4] [--test 8]

Runs on the dense embedded model without training. Bits are chosen on the first file. All figures are measured on the
second file: KL in nats to the model that sends everything, and recall: the share of a text of 128 tokens that is
predicted when the text is repeated after 320 other tokens. The ratio of bytes is relative to bf16 and includes scales.
`--json` prints one object with `rows` (name, ratio, kl, recall) and `ahead_everywhere`: True if, at ratios of 3 and
more, no other row has both fewer bytes and less KL than one of ours.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pdtrim_pl.data import Collator, Example
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.evaluation.recall import measure_recall
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.plan import Codec, KVRetentionPolicy, KVShape, Retention
from pdtrim_pl.plan.codec import Form
from pdtrim_pl.selectors import BudgetSelector, Effort, selection_context
from pdtrim_pl.selectors.allocation import codec_of
from pdtrim_pl.staged import StagedCausalLM

MODEL = "smollm2-135m"
REDUCTIONS = (2.0, 3.0, 4.95, 6.0, 7.0)
REPEATED, BETWEEN = 128, 320
Rules = Mapping[int, Retention]


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
    options = parser.parse_args()
    bench = Bench(options)
    rows = [bench.row(name, rules) for name, rules in bench.policies(options)]
    ours = [row for row in rows if row["name"].startswith("ours")]
    others = [row for row in rows if not row["name"].startswith("ours")]
    ahead = not any(row["ratio"] >= own["ratio"] >= 3 and row["kl"] <= own["kl"] for own in ours for row in others)
    report = {
        "model": MODEL, "prompt": options.prompt, "response": options.response, "rows": rows,
        "ahead_everywhere": ahead, "threads": torch.get_num_threads(), "processor": platform.processor(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    if options.json:
        print(json.dumps(report))
        return 0
    for row in rows:
        print(f"{row['name']:40s} {row['ratio']:6.2f}x  KL {row['kl']:.4f}  recall {row['recall']:.3f}")
    print(f"ahead everywhere at 3x and beyond: {ahead}")
    return 0


class Bench:
    """The dense model and its texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = StagedCausalLM(load_causal_lm(MODEL, dtype=torch.float32)).eval()
        self.shape = KVShape(self.model.kv_shape.num_key_value_heads, self.model.kv_shape.head_dim, "bfloat16")
        self.options = options
        size = options.prompt + options.response
        self.tune = self._requests(_tokens(options.tune), size, options.tuned)
        test = _tokens(options.test)
        self.test = self._requests(test, size, options.tested)
        self.again = self._repeated(test)

    def policies(self, options: argparse.Namespace) -> list[tuple[str, Rules]]:
        """Name and rules of every row."""
        blocks = self.model.plan.decode
        rows: list[tuple[str, Rules]] = [("everything", {})]
        rows.append(("first 4 and last 20 %", dict.fromkeys(blocks, Retention("first_last", 4, 0.2))))
        pairs: list[tuple[Form, Form]] = [
            ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4"), ("int4", "int3"), ("int3", "int3"), ("int2", "int2"),
        ]  # fmt: skip
        for keys, values in pairs:
            plain, ours = Codec(keys, values), codec_of(keys, values)
            rows.append((f"{keys}/{values} everywhere", dict.fromkeys(blocks, Retention(codec=plain))))
            if ours != plain:
                rows.append((f"{keys}/{values} everywhere, rotated", dict.fromkeys(blocks, Retention(codec=ours))))
        context = selection_context(self.model, self.model, self.tune, self.shape, "cpu", 4, 0.2)
        for reduction in REDUCTIONS:
            selector = BudgetSelector(
                reduction, prompt_tokens=options.prompt, min_recall=0.0, effort=Effort(options.tuned, options.exchanges)
            )
            rows.append((f"ours, {reduction}x", selector.select(context)))
        return rows

    def row(self, name: str, rules: Rules) -> dict[str, Any]:
        """Figures of one policy."""
        plan, policy = self.model.plan, KVRetentionPolicy("prefill", self.shape, rules)
        sent, full = policy.sent_bytes(plan, self.options.prompt), policy.full_bytes(plan, self.options.prompt)
        quality = measure_quality(self.model, self.model, self.test, plan=plan, policy=policy)
        recall = measure_recall(self.model, self.again, plan=plan, policy=policy)
        return {"name": name, "ratio": full / sent, "kl": quality.kl, "nll": quality.nll, "recall": recall}

    def _requests(self, tokens: torch.Tensor, size: int, count: int) -> list[Batch]:
        rows = tokens[: count * size].view(count, size)
        prompt = self.options.prompt
        return [Collator(0)([Example(row[:prompt], row[prompt:])]) for row in rows]

    def _repeated(self, tokens: torch.Tensor) -> list[Batch]:
        """Requests that repeat a text. The first quarter of the repetition is part of the prompt, as a cue."""
        known = REPEATED // 4
        batches = []
        for start in range(0, 18_000, 3_000):
            text, between = tokens[start : start + REPEATED], tokens[start + 1000 : start + 1000 + BETWEEN]
            if len(between) == BETWEEN:
                prompt = torch.cat([text, between, text[:known]])
                batches.append(Collator(0)([Example(prompt, text[known:])]))
        return batches


def _tokens(path: Path) -> torch.Tensor:
    text = path.read_text(encoding="utf-8")[:600_000]
    return torch.tensor(load_tokenizer(MODEL)(text)["input_ids"])


if __name__ == "__main__":
    raise SystemExit(main())
