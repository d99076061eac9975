"""The model card of an export: README.md with the front matter that model hubs read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pdtrim_pl.evaluation.summary import Summary, human_bytes
from pdtrim_pl.plan import KVRetentionPolicy, Retention, StagePlan

TAGS = ("pdtrim", "pruning", "distillation", "prefill-decode-disaggregation", "kv-cache")


def write_card(
    path: Path,
    *,
    plan: StagePlan,
    policy: KVRetentionPolicy,
    summary: Summary | None,
    base_model: str,
    export: Path | str = "DIR",
) -> None:
    """Write the card of a prefill/decode pair.

    Args:
        path: the file to write, `README.md` of the export.
        plan: what each stage runs.
        policy: what crosses between them.
        summary: the measured table, where there is one.
        base_model: Hub id, path or name of the unpruned model.
        export: the export's directory, as the commands on the card should name it.
    """
    policy.check(plan)
    parts = [
        _front_matter(base_model),
        _what(plan, base_model),
        _use(str(export)),
        _contract(plan, policy),
        _figures(plan, policy, summary),
        _limits(plan),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _front_matter(base_model: str) -> str:
    tags = "\n".join(f"- {tag}" for tag in TAGS)
    # A JSON string is a YAML string too, whatever the name holds.
    return (
        f"---\nbase_model: {json.dumps(base_model)}\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags:\n{tags}\n---\n"
    )


def _what(plan: StagePlan, base_model: str) -> str:
    total, prefill, decode = plan.model.num_blocks, len(plan.prefill), len(plan.decode)
    return f"""# A prefill/decode pair of `{base_model}`

Two checkpoints of one language model, for engines that prefill and decode on different nodes. The prefill half has
{prefill} and the decode half {decode} of the unpruned model's {total} blocks.

| path | what it is |
|---|---|
| `prefill/` | checkpoint of the node that reads the prompt |
| `decode/` | checkpoint of the node that writes the response |
| `stage_plan.json` | original index of every block in both halves, and the history of removals |
| `kv_policy.json` | which prompt positions' keys and values cross from prefill to decode, block by block |
| `report.html` | how the run went, with pictures |
"""


def _use(export: str) -> str:
    return f"""## Use

Both halves together, in two processes, the KV cache sent between them:

```
pdtrim generate --export {export} --prompt "The sky is" --max_new_tokens 64
```

Each half is an ordinary transformers checkpoint with stock classes:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

prefill = AutoModelForCausalLM.from_pretrained("{export}/prefill")
decode = AutoModelForCausalLM.from_pretrained("{export}/decode")
tokenizer = AutoTokenizer.from_pretrained("{export}/decode")
```
"""


def _contract(plan: StagePlan, policy: KVRetentionPolicy) -> str:
    if plan.boundary == "prefill":
        boundary = "The prefill half reads the whole prompt and predicts the first token of the response."
    else:
        boundary = "The prefill half reads the prompt without its last token, which is the decode half's first input."
    trimmed = {block: policy.rule(block) for block in plan.decode if policy.rule(block).keep == "first_last"}
    return f"""## The contract of one request

1. {boundary}
2. Block by block of the decode half, keys and values of the prompt come from the prefill half's block of the same
   original index: `blocks` in `kv_policy.json` pairs their positions in the two checkpoints.
3. {_retention(trimmed, len(plan.decode))}
4. Keys keep the RoPE positions they had in the prompt; nothing is renumbered when positions are left out.
5. Response tokens run at their true positions and attend to what was sent and to the response so far, whose own KV is
   never dropped.
"""


def _retention(trimmed: dict[int, Retention], decode_blocks: int) -> str:
    if not trimmed:
        return "Every block of the decode half is sent every prompt position."
    rules = sorted({(rule.first, rule.last) for rule in trimmed.values()})
    words = " or ".join(f"the first {_amount(first)} and the last {_amount(last)}" for first, last in rules)
    return f"{len(trimmed)} of {decode_blocks} blocks are sent only {words} of the prompt positions; the others all."


def _amount(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{100 * value:g}% (rounded up)"


def _figures(plan: StagePlan, policy: KVRetentionPolicy, summary: Summary | None) -> str:
    lines = ["## Figures", ""]
    measured = None if summary is None else replace(summary, export=None).to_markdown()  # a card leaves its machine
    lines.append(measured or "No quality or time was measured for this export.\n")
    lines += ["| prompt tokens | KV of the unpruned model | KV sent | reduction |", "|---:|---:|---:|---:|"]
    for row in policy.reduction(plan):
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        full, sent = human_bytes(row["full_bytes"]), human_bytes(row["sent_bytes"])
        lines.append(f"| {row['prompt_tokens']} | {full} | {sent} | {ratio} |")
    return "\n".join([*lines, ""])


def _limits(plan: StagePlan) -> str:
    lines = [
        "The halves are made for each other: one used alone as a whole model is a pruned model without its partner.",
        "Quality was measured on the run's own validation data; measure it on yours before you rely on it.",
        "The limits and the licence of the base model hold here too.",
    ]
    if plan.kv_only:
        blocks = ", ".join(map(str, plan.kv_only))
        lines.insert(
            0,
            f"Decode has block(s) {blocks} that prefill does not run (KV-only blocks). Their keys and values come from "
            "`prefill/kv_only.safetensors`, which stock transformers does not read: use this package's runtime "
            "(`pdtrim generate`), or an engine that projects them.",
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
