"""fit, validate, test and predict through LightningCLI: YAML, overrides, interpolation, saved configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from pdtrim_pl.checkpoints.continuation import Continuation, latest_valid_checkpoint
from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.cli.parsing import OneLineErrors
from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.strategies import directory_stage


class OneLineParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors in one line."""


class SaveResolvedConfig(SaveConfigCallback):
    """Saves the resolved YAML with the logs, and hands it to the module for every checkpoint."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PDTrimModule)
        pl_module.run_config = self.parser.dump(self.config, skip_none=False)  # 4.49 knows no `skip_unset`
        super().setup(trainer, pl_module, stage)


class PDTrimCLI(LightningCLI):
    """LightningCLI over the module and the data module of this package."""

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True) -> None:
        super().__init__(
            PDTrimModule,
            PromptResponseDataModule,
            save_config_callback=SaveResolvedConfig,
            # Not `config.yaml`: without a logger it lands in `default_root_dir`, where a user may keep one.
            save_config_kwargs={"overwrite": True, "config_filename": "resolved_config.yaml"},
            parser_class=OneLineParser,
            parser_kwargs={"parser_mode": "omegaconf", "prog": "pdtrim"},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=list(args) if args is not None else None,
            run=run,
        )

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing. The base class would read the whole checkpoint for hyperparameters, which ours do not have."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        assert isinstance(self.model, PDTrimModule)
        self.model.check_models()  # before the trainer lets the data module tokenise
        super()._run_subcommand(subcommand)

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and kwargs.get("ckpt_path") == "last":
            settings = self._parser(subcommand).dump(self.config[subcommand], skip_none=False)
            kwargs["ckpt_path"] = self.model.found_checkpoint = _furthest_checkpoint(self.trainer, self.model, settings)
        return kwargs

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer_config = self._get(self.config_init, "trainer")
        plugins = trainer_config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if _uses_checkpoint_io(str(trainer_config.get("strategy"))) and not _has_checkpoint_io(plugins):
            plugins.append(PlanCheckpointIO())
        if _is_srun_task() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            # Lightning's own handler of SIGUSR1 saves wherever each rank is, and hangs; callbacks.Preemption does not.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        kwargs["plugins"] = plugins
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:
            if "state_key" not in str(error):
                raise
            raise MisconfigurationException(
                "`trainer.callbacks` holds two callbacks that would keep their state under one name, such as two "
                f"BlockDrop with one `stage`; keep one of them. ({error})"
            ) from error


def run_cli(args: Sequence[str]) -> int:
    """Run one of LightningCLI's commands."""
    PDTrimCLI(None if list(args) == sys.argv[1:] else args)
    return 0


def _furthest_checkpoint(trainer: Trainer, module: PDTrimModule, config: str) -> str | Path | None:
    """What `--ckpt_path last` continues from: the furthest checkpoint that is whole. None starts a new run.

    Lightning would look at `last*.ckpt` alone and take the newest, damaged or not.
    """
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    folders = sorted({str(saver.dirpath) for saver in savers if saver.dirpath})
    if not folders or any("://" in folder for folder in folders):
        return "last"
    run = Continuation(
        module.model_name, trainer.world_size, directory_stage(trainer.strategy), architecture=module.architecture,
        config=config,
    )  # fmt: skip
    return latest_valid_checkpoint(*folders, run=run)


def _has_checkpoint_io(plugins: Sequence[Any]) -> bool:
    return any(isinstance(plugin, CheckpointIO) for plugin in plugins)


def _is_srun_task() -> bool:
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def _uses_checkpoint_io(strategy: str) -> bool:
    """False for DeepSpeed and Lightning's own FSDP, which write their own checkpoint directories."""
    name = strategy.lower()
    return "pdtrimfsdp" in name or not any(sharded in name for sharded in ("deepspeed", "fsdp"))
