"""One training run of `test_left_weights.py` on any number of CPU processes: weights that have left are spoilt.

python tests/left_run.py STRATEGY PROCESSES MODEL FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import rates_run
import torch
from torch import nn

from pdtrim_pl.strategies import data_parallel


def spoil(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """In place of a move to another device: whatever reads such a weight computes NaN."""
    assert device.type == "meta"
    for parameter in parameters:
        parameter.data.fill_(torch.nan)


def main(name: str, processes: int, model: Path, folder: Path) -> None:
    data_parallel.DataParallel.store = torch.device("meta")
    data_parallel.move = spoil  # type: ignore[assignment]
    module = rates_run.fit(name, processes, model, folder)
    gates = module.student.gates.items()
    told = {
        "losses": module.record.losses,
        "spoilt": [index for index, gate in gates if all(p.isnan().all() for p in gate.parameters())],
    }
    (folder / f"told-{module.global_rank}.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
