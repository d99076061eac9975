"""The two plots: quality against prefill cost, and quality against decode cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from pdtrim_pl.compare.outcome import Outcome

AXES: Mapping[str, str] = {
    "prefill_flops": "prefill FLOPs, share of dense",
    "decode_bytes": "bytes read by a decode step, share of dense",
}
MARKERS = "osD^v<>PXph*"


def draw(outcomes: Sequence[Outcome], folder: Path, name: str) -> list[Path]:
    """Write `<name>_prefill_flops.png` and `<name>_decode_bytes.png`: one line for each method, dashed if it trains."""
    return [_draw(outcomes, cost, label, folder / f"{name}_{cost}.png") for cost, label in AXES.items()]


def _draw(outcomes: Sequence[Outcome], cost: str, label: str, path: Path) -> Path:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for index, method in enumerate(methods):
        rows = [outcome for outcome in outcomes if outcome.method == method]
        # Markers and dashes make the methods distinguishable without colour.
        axes.plot(
            [vars(row.judged)[cost] for row in rows],
            [row.judged.kl for row in rows],
            marker=MARKERS[index % len(MARKERS)],
            color=colours[index % len(colours)],
            linestyle="--" if any(row.trained_tokens for row in rows) else "-",
            label=method,
        )
    axes.set(xlabel=label, ylabel="KL to the dense model on held-out text, nats")
    if all(outcome.judged.kl > 0 for outcome in outcomes):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False, title="dashed: trains")
    unfinished = path.with_name(f"{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=150)
    unfinished.replace(path)
    return path
