"""Command lines over a model in a folder, for tests of what each command does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from short_text import SHORT

from pdtrim_pl.cli.main import main


def settings_of(model: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    """What a run of `fit` or `validate` on a model of 512 tokens needs; `overrides` are those of `model`."""
    return {
        "seed_everything": 1,
        "model": {"model": str(model), **overrides},
        "data": {
            "tokenizer": "${model.model}",
            "source": {"path": SHORT.path},
            "lengths": {"max_length": 24, "min_prompt": 8, "max_prompt": 16},
            "parts": {"validation": 4, "calibration": 4, "test": 3, "max_train": 4},
            "batch_size": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(folder),
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "callbacks.BlockDrop",
                    "init_args": {
                        "stage": "decode",
                        "criterion": {"class_path": "pdtrim_pl.criteria.LastN"},
                        "schedule": {0: 1},
                    },
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder / "ckpt"), "save_last": True},
                },
                {
                    "class_path": "callbacks.ExportPair",
                    "init_args": {"output": str(folder / "pair"), "prompt_tokens": 8, "new_tokens": 2},
                },
            ],
        },
    }


def run(command: str, model: Path, folder: Path, **overrides: Any) -> int:
    """The exit status of `pdtrim COMMAND` on a model; `overrides` are those of `model` in its YAML."""
    folder.mkdir(exist_ok=True)
    settings = settings_of(model, folder, **overrides)
    if command == "compare":
        last = {"class_path": "pdtrim_pl.criteria.LastN"}
        settings = {
            "model": {"name": str(model), "dtype": "float32", "accelerator": "cpu", **overrides},
            "data": {**settings["data"], "tokenizer": str(model)},
            "methods": {
                "last": {"class_path": "pdtrim_pl.compare.methods.Drop", "init_args": {"criterion": last}},
            },
            "rows": {"counts": [1]},
            "output": {"folder": str(folder / "compared")},
        }
    file = folder / f"{command}.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    if command == "dry_run":
        return main(["fit", "--dry_run", "--config", str(file)])
    return main([command, "--config", str(file)])
