"""Devices of the two workers."""

from __future__ import annotations

import torch

from pdtrim_pl.errors import UserError


def devices_of(device: str) -> tuple[str, str]:
    """Devices of the prefill and the decode worker for one setting.

    Args:
        device: `auto` (GPUs if there are any), `cuda` (one GPU each if there are two), or one device for both.

    Raises:
        UserError: this machine has no such device.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"`device` is {device!r}: give auto, cpu, cuda or cuda:0.") from error
    if kind.type not in ("cpu", "cuda") or (kind.type == "cuda" and (kind.index or 0) >= gpus):
        raise UserError(
            f"`device` is {device!r}, and this machine has {gpus} GPUs for torch: give auto, cpu or another."
        )
    if device == "cuda":
        return "cuda:0", f"cuda:{min(gpus, 2) - 1}"
    return device, device
