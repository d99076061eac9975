"""Writes the prefill/decode pair into a temporary directory, reloads it, compares it, and renames it into place."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from pdtrim_pl.errors import UserError
from pdtrim_pl.export.checkpoints import write_checkpoint
from pdtrim_pl.export.kv_only import write_kv_only
from pdtrim_pl.export.origin import Origin
from pdtrim_pl.export.verify import verify_pair
from pdtrim_pl.plan import PLAN_FILE, POLICY_FILE, STAGES, ExportWidths, KVRetentionPolicy, Layout, write_manifest
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of

log = logging.getLogger(__name__)


def export_pair(
    staged: StagedCausalLM, target: Path, *, tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None = None, overwrite: bool = False, extras: Callable[[Path], None] | None = None,
    origin: Origin | None = None, layout: Layout = "compact", widths: ExportWidths = "uniform",
) -> Path:  # fmt: skip
    """Write `prefill/`, `decode/`, `stage_plan.json`, `kv_policy.json` and `pair.json`: all of them or none.

    The pair appears at `target` only when the reloaded pair has the student's tensors and logits. After any failure an
    earlier export is unchanged.

    Args:
        staged: the student with its plan and policy; it is not changed.
        target: the directory to create.
        tokenizer: saved with both checkpoints.
        dtype: element type of the weights and of the KV on the wire; None means the student's own.
        overwrite: replace an earlier export at `target`.
        extras: writes further files (report, model card) into the directory it gets, before the pair is compared.
        origin: the run that exports; it is written into the export. An export that this run wrote before it was killed
            is replaced, and the remains of an unfinished one are deleted.
        layout: how the checkpoints hold the blocks, see `StagePlan.held`.
        widths: how wide the blocks of a checkpoint are, see `StagePlan.exported_widths`.

    Returns:
        The absolute path of the export.

    Raises:
        UserError: the target is taken, the student lacks blocks of its plan, its classes do not build the `widths`, or
            the reloaded pair differs.
        OSError: it cannot be written.
    """
    target = target.resolve()
    check_target(target, overwrite, origin)
    dtype = dtype or staged.model.dtype
    policy, plan = _complete_policy(staged, dtype), replace(staged.plan, layout=layout, export_widths=widths)
    if layout == "padded" and not policy.sends_everything:
        log.warning("The connectors for which `layout: padded` is made know no KV policy: they send every position.")
    _check_blocks(staged)
    prefix = f".{target.name}.{'' if origin is None else f'{origin.run}.'}"
    if origin is not None:
        for left in target.parent.glob(f"{escape(prefix)}*"):
            shutil.rmtree(left)
    with _writing(target), tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        fresh.mkdir()
        for stage in STAGES:
            write_checkpoint(staged, stage, fresh / stage, tokenizer=tokenizer, dtype=dtype, plan=plan)
        if layout == "compact":
            write_kv_only(staged, fresh / "prefill", dtype)
        plan.save(fresh / PLAN_FILE)
        policy.save(fresh / POLICY_FILE, plan)
        if origin is not None:
            origin.save(fresh)
        if extras is not None:
            extras(fresh)
        write_manifest(fresh)
        difference = verify_pair(fresh, staged, dtype=dtype)
        check_target(target, overwrite, origin)  # again: writing a large model takes minutes
        _make_readable(fresh)
        _put_in_place(fresh, target, aside=Path(scratch) / "replaced")
    log.info("Exported to %s; the reloaded pair's logits differ from the student's by %.2g", target, difference)
    return target


def check_target(target: Path, overwrite: bool, origin: Origin | None = None) -> None:
    """Refuse a target that is taken. A run that exports at its end calls this before its first step.

    Args:
        target: where the export will lie.
        overwrite: whether an export there may be replaced.
        origin: this run, whose own earlier export may always be replaced.

    Raises:
        UserError: the target exists and may not be replaced. What is not an export is never deleted.
    """
    if not target.exists():
        return
    if not overwrite and (origin is None or Origin.of(target) != origin):
        raise UserError(
            f"The export target {target} exists. Name another one, or set `overwrite: true` (`--overwrite`) to "
            "replace it."
        )
    if not all((target / name).exists() for name in (PLAN_FILE, *STAGES)):
        raise UserError(
            f"The export target {target} is not an export (it lacks {PLAN_FILE}, prefill/ or decode/), so `overwrite` "
            "(`--overwrite`) does not delete it. Name another target, or remove it yourself."
        )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn every failure to write into an OSError: safetensors has its own kind for a full disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The export {target} cannot be written ({error}); nothing of it is left, and an earlier one is untouched. "
            "Free some space, then run `pdtrim export` on the last checkpoint, or name another `output`."
        ) from error


def _complete_policy(staged: StagedCausalLM, dtype: torch.dtype) -> KVRetentionPolicy:
    """The student's policy with KV in `dtype`; a student without a policy sends everything."""
    shape = kv_shape_of(staged.model, dtype)
    if staged.policy is None:
        return KVRetentionPolicy(staged.plan.boundary, shape)
    return replace(staged.policy, kv=shape)


def _check_blocks(staged: StagedCausalLM) -> None:
    missing = sorted({*staged.plan.prefill, *staged.plan.decode} - set(staged.originals))
    if missing:
        raise UserError(
            f"The student holds only blocks {list(staged.originals)}, and its plan runs {missing} too. Export the "
            "student that was trained, not one stage of an earlier export."
        )


def _make_readable(export: Path) -> None:
    """Give weights the mode of the other files. safetensors lets only the owner read, but nodes may run as others."""
    for file in export.rglob("*.safetensors"):
        file.chmod((export / PLAN_FILE).stat().st_mode)


def _put_in_place(fresh: Path, target: Path, aside: Path) -> None:
    """Rename the new export into place. An earlier one is moved aside first, and back if renaming fails."""
    if target.exists():
        target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:  # Ctrl-C too: the old export must not go with the temporary directory
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
