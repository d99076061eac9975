"""Memory that `pdtrim fit --dry_run` counts, against the peak of the same run.

    python benchmarks/dry_run.py [--json] [--only NAME]

Each run is a `pdtrim fit` of a few steps on a CPU, in a process of its own: SmolLM2-135M on the Python Language
Reference. The peak is that of the resident set beyond what the process held when it had imported everything. `ratio` is
the estimate over the peak, `largest_error` the largest distance of a ratio from 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from pdtrim_pl.cli.dry_run import counted
from pdtrim_pl.cli.main import main as pdtrim
from pdtrim_pl.serving.peaks import peak_since, start_of_peak

MIB = 2**20
BASE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "model": "smollm2-135m",
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-4, "fused": True}},
        "schedule": {"warmup": 0.1},
    },
    "data": {
        "tokenizer": "${model.model}",
        "source": {"path": "pydoc"},
        "lengths": {"max_length": 256, "min_prompt": 64, "max_prompt": 192},
        "parts": {"validation": 2, "calibration": 2, "test": 0, "max_train": 16},
        "batch_size": 4,
    },
    "trainer": {
        "accelerator": "cpu", "devices": 1, "precision": "32-true", "max_epochs": 1, "gradient_clip_val": 1.0,
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    },
}  # fmt: skip
LONG = {"max_length": 2048, "min_prompt": 64, "max_prompt": 1536}
SEARCH = {
    "class_path": "callbacks.BlockDrop",
    "init_args": {
        "stage": "decode",
        "criterion": {"class_path": "pdtrim_pl.criteria.GreedyKL", "init_args": {"pool": 4}},
        "schedule": {0: 1},
    },
}
WIDTH = {
    "class_path": "callbacks.WidthDrop",
    "init_args": {"stage": "decode", "schedule": {0: 128}, "repair": {"examples": 8}},
}
PREFILL = {
    "class_path": "callbacks.BlockDrop",
    "init_args": {
        "stage": "prefill", "criterion": {"class_path": "pdtrim_pl.criteria.LastN"}, "schedule": {0: 10},
        "refit_examples": 8,
    },
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "256 x 4": {},
    "2048 x 1": {"data": {"lengths": LONG, "batch_size": 1, "parts": {"max_train": 2}}},
    "256 x 4, bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "256 x 4, recomputed": {"model": {"loading": {"gradient_checkpointing": True}}},
    "256 x 4, lora": {"model": {"trainable": "lora"}},
    "256 x 4, search": {"trainer": {"callbacks": [SEARCH]}},
    "256 x 4, width": {"trainer": {"callbacks": [WIDTH]}},
    "256 x 4, prefill": {"model": {"structure": {"relation": "prefill_only"}}, "trainer": {"callbacks": [PREFILL]}},
}
"""Name of a run -> what it changes of `BASE`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="names of runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fit", metavar="CONFIG", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        return fit(options.fit)
    rows = [row_of(name) for name in options.only]
    found = {
        "largest_error": max(abs(row["ratio"] - 1) for row in rows), "rows": rows, "machine": platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if options.json:
        print(json.dumps(found))
    else:
        for row in rows:
            print(f"{row['name']:<22} estimate {row['estimate_mib']:7.0f} MiB  peak {row['peak_mib']:7.0f} MiB  "
                  f"ratio {row['ratio']:.2f}")  # fmt: skip
    return 0


def row_of(name: str) -> dict[str, Any]:
    """Estimate and peak of one run."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        trainer = {"default_root_dir": folder}
        config.write_text(yaml.safe_dump(merged(merged(BASE, RUNS[name]), {"trainer": trainer})), encoding="utf-8")
        estimate = counted(["fit", "--config", str(config)]).memory.total
        command = [sys.executable, __file__, "--fit", str(config)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak = json.loads(out.splitlines()[-1])
    return {"name": name, "estimate_mib": estimate / MIB, "peak_mib": peak / MIB, "ratio": estimate / peak}


def fit(config: str) -> int:
    """Run it here, and print the peak in bytes."""
    import pdtrim_pl.cli.lightning_cli  # noqa: F401

    device = torch.device("cpu")
    before = start_of_peak(device)
    status = pdtrim(["fit", "--config", config])
    print(json.dumps(peak_since(device, before)))
    return status


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with changes."""
    found = copy.deepcopy(settings)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found


if __name__ == "__main__":
    raise SystemExit(main())
