"""The most memory that each stage of a request takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pdtrim_pl.plan import KVRetentionPolicy, Stage, StagePlan
from pdtrim_pl.staged import KVCache, StagedCausalLM
from pdtrim_pl.staged.decoding import DecodeLoop

PROCESS = Path("/proc/self")


def stage_peaks(
    models: Mapping[Stage, StagedCausalLM], plan: StagePlan, policy: KVRetentionPolicy | None, prompt_ids: Tensor,
    new_tokens: int,
) -> dict[Stage, int | None]:  # fmt: skip
    """Bytes of weights, keys and values, and activations at their highest, for each stage on a node of its own.

    Args:
        models: what runs each stage.
        plan: what it runs.
        policy: what decode is sent; None for everything.
        prompt_ids: [B, P].
        new_tokens: tokens of a response.

    Returns:
        None for both on a CPU whose system tells no peaks.
    """
    device, caches = prompt_ids.device, list[KVCache]()

    def prefill() -> None:
        out = models["prefill"].prefill(prompt_ids, plan=plan)
        models["prefill"].logits(out.hidden[:, -1])
        caches.append(out.cache)

    def decode() -> None:
        for _ in DecodeLoop(
            models["decode"], sent, room=new_tokens, first=None, last_prompt=prompt_ids[:, -1], plan=plan
        ):
            pass

    with torch.inference_mode():
        grown: dict[Stage, int | None] = {"prefill": growth(prefill, device)}
        sent = caches.pop().retained(policy)
        held = sum(block.keys.nbytes + block.values.nbytes for block in sent.blocks.values())
        decoded = growth(decode, device)
    grown["decode"] = None if decoded is None else decoded + held
    return {stage: None if more is None else more + parameter_bytes(models[stage]) for stage, more in grown.items()}


def growth(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes by which memory grows at most while `run` runs; None if the system does not tell."""
    try:
        before = start_of_peak(device)
    except OSError:
        run()
        return None
    run()
    return max(peak_since(device, before), 0)


def start_of_peak(device: torch.device) -> int:
    """Begin to record the peak anew; bytes in use now: allocated ones on a GPU, else the resident set.

    Raises:
        OSError: the system tells no peaks.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that is used again would not count
    (PROCESS / "clear_refs").write_text("5")
    return _status("VmRSS")


def peak_since(device: torch.device, before: int) -> int:
    """Bytes of the peak since `start_of_peak`, which returned `before`, beyond that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _status("VmHWM") - before


def parameter_bytes(model: StagedCausalLM) -> int:
    """Bytes of all weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _status(name: str) -> int:
    """A number of bytes in the status of this process."""
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
