"""The configuration of a run, parsed without a trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from typing_extensions import override

from pdtrim_pl.cli.lightning_cli import PDTrimCLI
from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.module import PDTrimModule


class ParsedRun(PDTrimCLI):
    """The command line up to the trainer, which may need GPUs that this machine does not have.

    Args:
        args: those of `pdtrim fit`.
    """

    model: PDTrimModule
    datamodule: PromptResponseDataModule

    def __init__(self, args: Sequence[str]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the rest is not its to parse
            super().__init__(args)

    @override
    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer_settings: Namespace = self._get(self.config_init, "trainer")
        self.config_files: list[Any] = self._get(self.config, "config") or []

    @property
    def shape_folders(self) -> list[Path]:
        """Folders of published shapes beside the configuration files."""
        return [Path(str(file)).parent / "shapes" for file in self.config_files]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""
