"""The picture of a sweep for recall: prompt length by depth, one panel for each model."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure

PANELS: Mapping[str, str] = {"dense": "dense", "everything_sent": "pair, everything sent", "pair": "pair"}


def recall_sweep(recall: Mapping[str, Any]) -> bytes:
    """Draw recall by depth (downwards) over prompt length, as PNG bytes.

    Args:
        recall: `prompts`, `depths`, and for each of `PANELS` its recall, [prompts][depths], or None.
    """
    prompts, depths = recall["prompts"], recall["depths"]
    shown = [(name, title) for name, title in PANELS.items() if recall[name] is not None]
    figure = Figure(figsize=(1.6 + len(shown) * max(0.75 * len(prompts), 2.2), 3.2), layout="constrained")
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    image = None
    for axes, (name, title) in zip(grid, shown, strict=True):
        cells = [list(column) for column in zip(*recall[name], strict=True)]  # [depths][prompts]
        image = axes.imshow(cells, vmin=0.0, vmax=1.0, cmap="cividis", aspect="auto")
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                ink = "white" if value < 0.55 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        axes.set(title=title, xlabel="prompt tokens", xticks=range(len(prompts)), xticklabels=prompts)
        axes.set(yticks=range(len(depths)), yticklabels=[f"{100 * depth:g} %" for depth in depths])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    grid[0].set_ylabel("depth of the passage")
    assert image is not None
    figure.colorbar(image, ax=list(grid), label="recall")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
