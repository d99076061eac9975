"""`pdtrim policy`: another KV policy for an export that exists, without training."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule, TextSource
from pdtrim_pl.errors import UserError
from pdtrim_pl.export.load import load_plan_and_policy, load_stage
from pdtrim_pl.plan import POLICY_FILE, KVRetentionPolicy, PairManifest
from pdtrim_pl.selectors import BudgetSelector, Effort
from pdtrim_pl.selectors.of_pair import PairMeasures

log = logging.getLogger(__name__)


def choose_policy(
    export: Path, *, reduction: float = 4.95, source: str = "pydoc", examples: int = 8, max_length: int = 256,
    min_recall: float = 0.97, exchanges: bool = False, prompt_tokens: int = 1024, device: str = "cpu",
    output: Path | None = None,
) -> Path:  # fmt: skip
    """Choose how the KV of an exported pair crosses, and write it as its `kv_policy.json` and into its `pair.json`.

    Args:
        export: the directory of the pair.
        reduction: full bytes over sent bytes; see `BudgetSelector`.
        source: text to measure on; a file, a glob, a Hub id, or the embedded `pydoc`.
        examples: requests to measure on.
        max_length: tokens of a request, prompt and response; three quarters of it at most are the prompt.
        min_recall: see `BudgetSelector`.
        exchanges: see `Effort`.
        prompt_tokens: length of the prompt at which bytes are counted.
        device: where both halves are put.
        output: the file to write; by default that of the export, which is replaced; `pair.json` then has a new id.

    Returns:
        The file that was written.

    Raises:
        UserError: an export that cannot be read, or a reduction that cannot be reached.
    """
    if examples < 1:
        raise UserError(f"`examples` is {examples}: give at least 1.")
    plan, policy = load_plan_and_policy(export)
    data = PromptResponseDataModule(
        str(export / "decode"), TextSource(source), Lengths(max_length, max_length // 4, 3 * max_length // 4),
        Parts(validation=0, calibration=examples, max_train=1), batch_size=4,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    loader: DataLoader[object] = data.calibration_dataloader()
    halves = [load_stage(export, stage, device=device, dtype=torch.float32) for stage in ("prefill", "decode")]
    measures = PairMeasures(halves[0], halves[1], list(loader))
    context = measures.context(policy.kv)
    effort = Effort(examples, exchanges)
    selector = BudgetSelector(reduction, prompt_tokens=prompt_tokens, min_recall=min_recall, effort=effort)
    rules = selector.select(context)
    chosen = KVRetentionPolicy(plan.boundary, policy.kv, rules)
    path = output or export / POLICY_FILE
    manifest = PairManifest.load(export)
    chosen.save(path, plan)
    if path.resolve() == (export / POLICY_FILE).resolve():
        manifest.with_policy(export).save(export)
    log.info(
        "%.2f times fewer bytes for a prompt of %d tokens, at a KL of %.4f nats to the pair sending everything and a "
        "recall of %.3f (everything sent: %.3f).", context.sent_ratio(rules, prompt_tokens), prompt_tokens,
        context.energy(rules, examples), context.recall(rules), context.recall({}),
    )  # fmt: skip
    return path
