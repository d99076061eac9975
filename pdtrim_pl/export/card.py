"""The model card of an export: README.md with the front matter that model hubs read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdtrim_pl.evaluation.summary import Summary
from pdtrim_pl.export.templates import rendered
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan


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
        summary: the measured table, if there is one.
        base_model: Hub id, path or name of the unpruned model.
        export: the export's directory, as the commands on the card should name it.
    """
    policy.check(plan)
    trimmed = [rule for rule in map(policy.rule, plan.decode) if rule.keep == "first_last"]
    card = rendered(
        "card.md", plan=plan, base_model=base_model, export=export, trimmed=len(trimmed),
        rules=sorted({(rule.first, rule.last) for rule in trimmed}), reduction=policy.reduction(plan),
        codecs=policy.codecs(plan),
        measured=None if summary is None else replace(summary, export=None).to_markdown(),  # a card leaves its machine
    )  # fmt: skip
    path.write_text(card, encoding="utf-8")
