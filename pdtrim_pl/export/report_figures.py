"""The pictures of the report, as PNG bytes. Uses matplotlib's Figure directly: no display, no global state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from math import inf
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Stage, StagePlan, handled_positions

# Okabe and Ito's palette: its colours differ under the common kinds of colour blindness. Shapes and hatches repeat what
# a colour says.
BLUE, ORANGE, GREEN, PURPLE, INK, PALE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#333333", "#EDEDED"
Dash = tuple[float, tuple[float, float]]
# The dashes of one stage fill the gaps of the other, so that two lines at one step are both visible.
STAGE_STYLE: Mapping[Stage, tuple[str, str, Dash]] = {
    "prefill": (BLUE, "o", (0.0, (4.0, 4.0))),
    "decode": (ORANGE, "s", (6.0, (4.0, 4.0))),
}
FATES: Mapping[str, tuple[str, str]] = {
    "kept": (BLUE, ""),
    "merged: stands for its neighbours": (GREEN, "xx"),
    "merged away": ("#BFE3D6", "//"),
    "KV only": (PURPLE, ".."),
    "dropped": (PALE, ""),
}
KEEP_STYLE: Mapping[str, tuple[str, str]] = {"all": (BLUE, ""), "first_last": (ORANGE, "//")}
METRICS: Mapping[str, str] = {
    "kl": "validation KL\n(nats)",
    "ppl": "validation\nperplexity",
    "agreement": "validation\ntop-1 agreement",
}
MAX_LABELLED_DROPS = 14
SMALLEST_CHANGE = 1e-6


def fates(plan: StagePlan, stage: Stage) -> list[str]:
    """What became of each original block in one stage: a key of `FATES` per block."""
    absorbed = {block for into, run in plan.merged[stage].items() for block in run if block != into}
    out = []
    for block in range(plan.model.num_blocks):
        if block in plan.blocks(stage):
            out.append("merged: stands for its neighbours" if block in plan.merged[stage] else "kept")
        elif stage == "prefill" and block in plan.kv_only:
            out.append("KV only")
        else:
            out.append("merged away" if block in absorbed else "dropped")
    return out


def stage_map(plan: StagePlan) -> bytes:
    """One row per stage, one cell per block."""
    figure = Figure(figsize=(10, 2.1), layout="constrained")
    axes = figure.add_subplot()
    used: set[str] = set()
    for row, stage in enumerate(STAGES):
        for block, fate in enumerate(fates(plan, stage)):
            colour, hatch = FATES[fate]
            edge = "#B8B8B8" if fate == "dropped" else "white"
            axes.add_patch(Rectangle((block - 0.44, row - 0.4), 0.88, 0.8, fc=colour, ec=edge, hatch=hatch, lw=0.8))
            used.add(fate)
    axes.set(ylim=(len(STAGES) - 0.5, -0.5), yticks=range(len(STAGES)), yticklabels=STAGES, xlabel="original block")
    _block_axis(axes, plan.model.num_blocks)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    patches = [
        Patch(fc=c, ec="#B8B8B8" if fate == "dropped" else "white", hatch=h, label=fate)
        for fate, (c, h) in FATES.items()
        if fate in used
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False)
    return _png(figure)


def redundancy(plan: StagePlan, values: Mapping[Stage, Mapping[int, float]]) -> bytes:
    """One minus the mean cosine of each block, in both stages; the marker is hollow if the stage lost the block.

    The scale is logarithmic: the first and last blocks change the hidden state far more than those between them.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.add_subplot(yscale="log")
    changes = [max(1.0 - cosine, SMALLEST_CHANGE) for stage in STAGES for cosine in values[stage].values()]
    axes.set_ylim(min(changes) / 1.3, max(changes) * 1.3)
    for stage in STAGES:
        colour, marker, _ = STAGE_STYLE[stage]
        points = [(block, max(1.0 - cosine, SMALLEST_CHANGE)) for block, cosine in sorted(values[stage].items())]
        axes.plot(*_columns(points), color=colour, lw=1, alpha=0.5, zorder=1)
        for fill, kept in ((colour, True), ("white", False)):
            some = [(block, value) for block, value in points if (block in plan.blocks(stage)) == kept]
            axes.scatter(*_columns(some), s=26, marker=marker, fc=fill, ec=colour, lw=1.2, zorder=2)
    handles = [Line2D([], [], color=STAGE_STYLE[s][0], marker=STAGE_STYLE[s][1], ms=5, label=s) for s in STAGES]
    hollow = Line2D([], [], color="none", marker="o", mec=INK, mfc="white", ms=5, label="hollow: left that stage")
    figure.legend(handles=[*handles, hollow], loc="outside upper center", ncols=3, frameon=False)
    axes.set(xlabel="original block", ylabel="1 - mean cosine of\nblock input and output")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    _block_axis(axes, plan.model.num_blocks)
    _open(axes)
    return _png(figure)


def loss_panels(record: RunRecord) -> list[tuple[str, str]]:
    """Name and axis label of every curve that has data."""
    shown = [name for name in METRICS if any(name in values for _, values in record.validations)]
    return ([("loss", "training loss")] if record.losses else []) + [(name, METRICS[name]) for name in shown]


def loss_curve(record: RunRecord) -> bytes:
    """Training loss and validation metrics, one panel each, with a line where blocks left a stage."""
    panels = loss_panels(record)
    heights = [1.6 if name == "loss" else 1.0 for name, _ in panels]
    figure = Figure(figsize=(10, 1.2 + 1.5 * sum(heights)), layout="constrained")
    grid = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, (name, label) in zip(grid, panels, strict=True):
        if name == "loss":
            _draw_losses(axes, record)
        else:
            points = [(step, values[name]) for step, values in record.validations if name in values]
            axes.plot(*_columns(points), color=GREEN, marker="D", ms=4, lw=1.2)
        axes.set_ylabel(label)
        _open(axes)
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    handles = _mark_drops(grid, record)
    if record.losses:
        handles = [Line2D([], [], color=INK, lw=1.6, label="training loss, running mean"), *handles]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1), frameon=False)
    return _png(figure)


def attention(
    plan: StagePlan, policy: KVRetentionPolicy, mass: Mapping[int, float], prompt_tokens: int = 1024
) -> bytes:
    """Above, attention mass of each block of D, if it was measured; below, the share of its bytes that it sends."""
    figure = Figure(figsize=(10, 4.4 if mass else 2.4), layout="constrained")
    grid = list(figure.subplots(2 if mass else 1, 1, sharex=True, squeeze=False)[:, 0])
    positions = handled_positions(prompt_tokens, plan.boundary)
    whole = policy.kv.bytes_per_position * positions
    sent = {block: policy.block_bytes(block, positions) / whole for block in plan.decode}
    drawn = ([(grid[0], mass)] if mass else []) + [(grid[-1], sent)]
    for axes, values in drawn:
        for keep, (colour, hatch) in KEEP_STYLE.items():
            some = [(b, v) for b, v in sorted(values.items()) if policy.rule(b).keep == keep and b in plan.decode]
            axes.bar(*_columns(some), width=0.78, color=colour, hatch=hatch, ec="white", lw=0)
        axes.set(ylim=(0, 1.04))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        _open(axes)
    for axes in grid:
        gone = [(block, 1.0) for block in plan.removed("decode")]
        axes.bar(*_columns(gone), width=0.78, color=PALE, lw=0, zorder=0)
    if mass:
        grid[0].set_ylabel("attention mass on first\nand last positions")
    grid[-1].set(xlabel="original block", ylabel=f"bytes sent of a\n{prompt_tokens}-token prompt")
    _block_axis(grid[-1], plan.model.num_blocks)
    labels = {"all": "sends every position", "first_last": "sends first and last positions"}
    handles = [Patch(fc=c, hatch=h, ec="white", lw=0, label=labels[keep]) for keep, (c, h) in KEEP_STYLE.items()]
    handles.append(Patch(fc=PALE, label="not in decode: sends nothing"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return _png(figure)


def _draw_losses(axes: Axes, record: RunRecord) -> None:
    """Every loss in grey, and a running mean that starts again where blocks left."""
    steps, values = _columns(record.losses)
    axes.plot(steps, values, color="#9A9A9A", lw=0.8, alpha=0.7)
    width = max(len(values) // 40, 1)
    breaks = sorted({step for step, _ in record.removals})
    for lower, upper in pairwise([-1.0, *breaks, inf]):
        part = [(step, value) for step, value in record.losses if lower < step <= upper]
        means = [
            (step, fmean(value for _, value in part[max(0, i - width + 1) : i + 1])) for i, (step, _) in enumerate(part)
        ]
        axes.plot(*_columns(means), color=INK, lw=1.6)
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")


def _mark_drops(grid: Sequence[Axes], record: RunRecord) -> list[Line2D]:
    """Draw a vertical line in every panel where blocks left a stage, with counts at the top; returns legend entries."""
    blocks = [(step, removal) for step, removal in record.removals if removal.action != "narrow"]
    counts = Counter((step, removal.stage) for step, removal in blocks)
    steps = sorted({step for step, _ in counts})
    for (step, stage), _ in counts.items():
        colour, _, line = STAGE_STYLE[stage]
        for axes in grid:
            axes.axvline(step, color=colour, ls=line, lw=1.5, alpha=0.8, zorder=0)
    if len(steps) <= MAX_LABELLED_DROPS:
        for step in steps:
            parts = [f"{stage} -{counts[step, stage]}" for stage in STAGES if counts[step, stage]]
            grid[0].annotate(
                "\n".join(parts), (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=8, color=INK,
            )  # fmt: skip
    stages = [stage for stage in STAGES if any(key[1] == stage for key in counts)]
    return [
        Line2D([], [], color=STAGE_STYLE[s][0], ls=STAGE_STYLE[s][2], lw=1.5, label=f"blocks leave {s}") for s in stages
    ]


def _block_axis(axes: Axes, blocks: int) -> None:
    """Label every block if there is room, else every fifth or tenth."""
    step = 1 if blocks <= 40 else 5 if blocks <= 100 else 10
    axes.set(xlim=(-0.7, blocks - 0.3), xticks=range(0, blocks, step))
    axes.tick_params(axis="x", labelsize=8)


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
