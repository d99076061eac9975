"""`pdtrim bench`: what an exported pair gains in time and on the wire, beside the bound that its plan gives.

The dense model and the pair take turns in one process, so that changes in the speed of the machine affect both. A
whole request then runs over two processes. Every figure is a median; its spread are the quartiles.

Shapes: B batch, P prompt tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.step_times import compare_steps
from pdtrim_pl.evaluation.timing import StageTimes, Timing, measure_timing
from pdtrim_pl.export.load import load_plan_and_policy, load_stage
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, PairManifest, Stage, StagePlan, handled_positions
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.requests import Ask, Done, Token
from pdtrim_pl.serving.peaks import parameter_bytes, stage_peaks
from pdtrim_pl.serving.wire_times import Cargo, wire_times
from pdtrim_pl.sizing.cost import CostModel
from pdtrim_pl.staged import StagedCausalLM


@dataclass(frozen=True)
class Load:
    """The requests of a measurement."""

    prompts: Sequence[int] = (256, 1024)
    """Tokens of a prompt."""
    batch_sizes: Sequence[int] = (1, 8)
    new_tokens: int = 32
    """Tokens of a response."""
    repeats: int = 5
    """Timed repeats of both variants."""
    links: Sequence[float] = (1.0, 10.0, 100.0)
    """Rates of the link between prefill and decode, Gbit/s."""

    def __post_init__(self) -> None:
        counts = {"prompts": min(self.prompts, default=0), "batch_sizes": min(self.batch_sizes, default=0),
                  "new_tokens": self.new_tokens - 1, "repeats": self.repeats}  # fmt: skip
        low = [name for name, least in counts.items() if least < 1]
        if low or min(self.links, default=1.0) <= 0:
            raise UserError(
                f"{', '.join(f'`{name}`' for name in low or ['links'])}: give positive numbers, and at least 2 "
                "`new_tokens`."
            )


def bench(export: Path, *, model: str | None = None, device: str = "cpu", load: Load = Load()) -> dict[str, Any]:
    """Measure an exported pair against its dense model.

    Args:
        export: the directory of the pair.
        model: the dense model; by default the one that the plan names.
        device: where all models are put, `cpu` or `cuda`.
        load: the requests.

    Returns:
        What `--json` prints. Every figure is `{value, low, high}`, with the quartiles of its repeats. `prefill_speedup`
        and `decode_speedup` are of the first prompt length and batch size; `cells` has all of them. `runtime_overhead`
        is the time of our decode step over that of Hugging Face's `generate` on the decode checkpoint, the worst cell.
        `wire` has the milliseconds that the bytes take at a link's rate (`ms`), and those of a handover over a socket
        that is as slow (`measured_ms`), unpruned and as the policy says.

    Raises:
        UserError: the export or the dense model cannot be loaded, or a request does not fit.
    """
    plan, policy = load_plan_and_policy(export)
    halves = {stage: load_stage(export, stage, device=device).eval() for stage in STAGES}
    dtype = halves["decode"].model.dtype
    dense = StagedCausalLM(load_causal_lm(model or plan.model.name_or_path, dtype=dtype)).to(device).eval()
    stock = _stock(export, dtype, device)
    again = StagedCausalLM(_stock(export, dtype, device)).eval()
    longest = torch.randint(3, dense.model.config.vocab_size, (max(load.batch_sizes), max(load.prompts)), device=device)
    cells = []
    for batch in load.batch_sizes:
        for prompt in load.prompts:
            timing = measure_timing(
                dense, plan=plan, policy=policy, prompt_tokens=prompt, new_tokens=load.new_tokens, batch_size=batch,
                repeats=load.repeats, sliced=halves,
            )  # fmt: skip
            steps = compare_steps(again, stock, longest[:batch, :prompt], steps=load.new_tokens)
            overhead = spread([step.ours.wall / step.theirs.wall for step in steps])
            cells.append(_cell(timing, overhead, _bounds(dense, plan, policy, prompt, load.new_tokens)))
    full_plan = StagePlan.full(plan.model, plan.relation, plan.boundary)
    cell_plan = replace(plan, widths={})  # the halves are as narrow as they are
    peaks = {
        "dense": stage_peaks(dict.fromkeys(STAGES, dense), full_plan, None, longest, load.new_tokens),
        "trimmed": stage_peaks(halves, cell_plan, policy, longest, load.new_tokens),
    }
    first, prompt = cells[0], load.prompts[0]
    (reduction,) = policy.reduction(plan, [prompt])
    full, sent = reduction["full_bytes"], reduction["sent_bytes"]
    return {
        "pair": PairManifest.load(export).id,
        **{name: first[name] for name in ("prefill_speedup", "prefill_bound", "decode_speedup", "decode_bound")},
        "wire_reduction": reduction["ratio"],
        "runtime_overhead": max((cell["runtime_overhead"] for cell in cells), key=lambda figure: figure["value"]),
        "cells": cells,
        "wire": {
            "prompt_tokens": prompt, "full_bytes": full, "sent_bytes": sent,
            "ms": {f"{rate:g} Gbit/s": [size * 8 / rate / 1e6 for size in (full, sent)] for rate in load.links},
            "measured_ms": _measured_wire(dense, halves["prefill"], policy, longest[:1, :prompt], load),
        },
        "memory": {"dense": parameter_bytes(dense), **{stage: parameter_bytes(halves[stage]) for stage in STAGES}},
        "peak_memory": {"batch_size": longest.shape[0], "prompt_tokens": longest.shape[1], **peaks},
        "two_processes": _two_processes(export, device, longest[0, :prompt].tolist(), load),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"value": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"value": middle, "low": low, "high": high}


def lines(told: Mapping[str, Any]) -> str:
    """The figures as text, one line for each prompt length and batch size."""
    out = []
    for cell in told["cells"]:
        figures = (
            f"{stage} {cell[f'{stage}_speedup']['value']:.2f}x of {cell[f'{stage}_bound']:.2f}x" for stage in STAGES
        )
        out.append(
            f"batch {cell['batch_size']}, prompt {cell['prompt_tokens']}: {', '.join(figures)}; first token "
            f"{cell['ttft_ms']['value']:.0f} ms, then {cell['tpot_ms']['value']:.1f} ms each; runtime "
            f"{cell['runtime_overhead']['value']:.2f} of Hugging Face's"
        )
    wire, both = told["wire"], told["two_processes"]
    parts = [("prefill_ms", "prefill"), ("transfer_ms", "until the last byte"), ("decode_ms", "decode")]
    spans = ", ".join(f"{both[key]['value']:.1f} ms {name}" for key, name in parts)
    rates = ", ".join(
        f"{full['value']:.2f} -> {sent['value']:.2f} ms at {rate}" for rate, (full, sent) in wire["measured_ms"].items()
    )
    out += [
        f"wire, prompt {wire['prompt_tokens']}: {told['wire_reduction']:.2f}x fewer bytes; over a socket {rates}",
        f"two processes, prompt {both['prompt_tokens']}, {both['new_tokens']} tokens: {spans}; first token after "
        f"{both['ttft_ms']['value']:.1f} ms, the last after {both['request_ms']['value']:.1f} ms",
    ]
    peak = told["peak_memory"]
    if None not in peak["dense"].values():
        stages = ", ".join(
            f"{stage} {peak['dense'][stage] >> 20} -> {peak['trimmed'][stage] >> 20} MiB" for stage in STAGES
        )
        out.append(f"peak memory, batch {peak['batch_size']}, prompt {peak['prompt_tokens']}: {stages}")
    return "\n".join(out)


def _stock(export: Path, dtype: torch.dtype, device: str) -> Any:
    """The decode checkpoint as an engine loads it."""
    directory = export / "decode"
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype, local_files_only=True)
    return model.to(device)


def _cell(timing: Timing, overhead: dict[str, float], bounds: dict[str, float]) -> dict[str, Any]:
    speedups: dict[Stage, list[float]] = {
        "prefill": [dense.prefill_ms / trimmed.prefill_ms for dense, trimmed in timing.turns],
        "decode": [dense.decode_ms / trimmed.decode_ms for dense, trimmed in timing.turns],
    }
    return {
        "prompt_tokens": timing.prompt_tokens, "batch_size": timing.batch_size,
        **{f"{stage}_speedup": spread(found) for stage, found in speedups.items()},
        **{f"{stage}_bound": bound for stage, bound in bounds.items()},
        **_rates([trimmed for _, trimmed in timing.turns], timing),
        "dense": _rates([dense for dense, _ in timing.turns], timing),
        "runtime_overhead": overhead,
    }  # fmt: skip


def _rates(turns: Sequence[StageTimes], timing: Timing) -> dict[str, dict[str, float]]:
    """Times of one variant, and tokens a second."""
    ttft = [times.prefill_ms * timing.prompt_tokens for times in turns]
    tpot = [times.decode_ms for times in turns]
    return {
        "ttft_ms": spread(ttft), "tpot_ms": spread(tpot),
        "prefill_tokens_per_s": spread([1e3 * timing.batch_size * timing.prompt_tokens / ms for ms in ttft]),
        "decode_tokens_per_s": spread([1e3 * timing.batch_size / ms for ms in tpot]),
    }  # fmt: skip


def _bounds(
    dense: StagedCausalLM, plan: StagePlan, policy: KVRetentionPolicy, prompt: int, new_tokens: int
) -> dict[str, float]:
    """Speed-ups that the FLOPs of prefill and the bytes of decode allow."""
    shares = CostModel.of(dense, prompt, new_tokens).shares(plan, policy)
    return {"prefill": 1 / shares.prefill_flops, "decode": 1 / shares.decode_bytes}


def _measured_wire(
    dense: StagedCausalLM, prefill: StagedCausalLM, policy: KVRetentionPolicy, prompt_ids: Tensor, load: Load
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds of a handover over a socket that is as slow as each link: unpruned, and as the policy says."""
    whole = KVRetentionPolicy(policy.boundary, policy.kv)
    prompt_ids = prompt_ids[:, : handled_positions(prompt_ids.shape[1], policy.boundary)]
    with torch.inference_mode():
        cargoes = {
            "full": Cargo(dense.prefill(prompt_ids).cache, dense.plan, whole),
            "sent": Cargo(prefill.prefill(prompt_ids).cache, prefill.plan, policy),
        }
    times = wire_times(cargoes, load.links, load.repeats)
    return {f"{rate:g} Gbit/s": [spread(found[name]) for name in cargoes] for rate, found in times.items()}


def _two_processes(export: Path, device: str, prompt_ids: list[int], load: Load) -> dict[str, Any]:
    """Whole requests over a prefill and a decode process, as `pdtrim generate` runs them."""
    names = ("prefill_ms", "transfer_ms", "decode_ms", "ttft_ms", "request_ms")
    found: dict[str, list[float]] = {name: [] for name in names}
    with Engine(export, devices=(device, device), max_batch=1) as engine:
        for turn in range(load.repeats + 1):
            started, heard = time.perf_counter(), []
            for event in engine.events(Ask(prompt_ids, load.new_tokens)):
                heard.append((event, time.perf_counter() - started))
            first, (done, whole) = next(at for event, at in heard if isinstance(event, Token | Done)), heard[-1]
            assert isinstance(done, Done)
            done.raise_fault()
            stats = done.stats
            if stats is None:
                raise RuntimeError("The prefill worker died before it had told its times.")
            if turn > 0:
                seconds = (stats.prefill_seconds, stats.transfer_seconds, stats.decode_seconds, first, whole)
                for name, value in zip(found, seconds, strict=True):
                    found[name].append(1e3 * value)
    figures = {name: spread(values) for name, values in found.items()}
    return {"prompt_tokens": len(prompt_ids), "new_tokens": load.new_tokens, **figures}
