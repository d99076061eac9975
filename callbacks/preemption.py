"""Saves, requeues the job and exits when the cluster asks for the machine back."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from pdtrim_pl import compat
from pdtrim_pl.checkpoints.fast_dev_run import trial_batches
from pdtrim_pl.errors import UserError
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.slurm import RunningJob, SlurmError

log = logging.getLogger(__name__)

NOTICES = frozenset({signal.SIGUSR1, signal.SIGTERM})
EXIT_STATUS = 75  # EX_TEMPFAIL: not done, to be continued


class Preempted(SystemExit):
    """The run is saved and exits; this is not an error of the run."""


class Preemption(Checkpoint):
    """Saves `last.ckpt`, puts the SLURM job back into the queue and exits, on SIGUSR1 or SIGTERM.

    Nothing happens inside a signal handler. `setup` blocks both signals, so that a signal stays pending until a batch
    ends. The ranks agree at every optimizer step, in one all-reduce with `LossGuard`: saving is a collective, and every
    rank must do it after the same batch. Data-loading workers inherit the block; otherwise SIGTERM would kill them.

    When the run exits:
    - In the middle of accumulation, after the optimizer step.
    - In the last batch of an epoch, after the validation. A run continued from before it would skip the validation.
    - In a search, between two evaluations, without saving. The continued run starts at the last checkpoint, and the
      journal gives back the evaluations made with the same weights. So save a checkpoint at the end of every epoch.
    - After the last evaluation of a search, after the first batch under the new plan.

    Lightning treats it as a `Checkpoint`, so its hooks run after those of the other callbacks. List it last.

    Without SLURM the run saves and exits with status 75. Continue with `--ckpt_path last`.

    Args:
        max_requeues: after this many restarts the job saves and ends instead of going back into the queue.

    Raises:
        UserError: a negative count.
    """

    def __init__(self, max_requeues: int = 20) -> None:
        if max_requeues < 0:
            raise UserError(f"`max_requeues` is {max_requeues}: give a count >= 0.")
        self.max_requeues = max_requeues
        self._delivered = False
        self._leaves = False
        """Whether the ranks have agreed to leave at the end of this batch."""
        self._mask_before: set[int] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trial_batches(trainer) is not None:  # there is nothing to save of a trial
            return
        if first_saver(trainer) is None:
            raise MisconfigurationException(
                "Preemption saves into the folder of a ModelCheckpoint, and `trainer.callbacks` has none: add one with "
                "`save_last: true` and a `dirpath`."
            )
        compat.keep_sigterm_local(trainer)
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        self._leaves = False
        pl_module.flags.ask("preemption", lambda: self.noticed)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # For threads that were started before the block; also replaces Lightning's handler of SIGTERM, which
        # broadcasts wherever the process happens to be. Lightning puts the old handlers back when the run ends.
        for notice in NOTICES:
            signal.signal(notice, self._note)
        job = RunningJob.here()
        if job is not None and job.restarts and trainer.is_global_zero:
            source = trainer.ckpt_path or "the beginning: there was no checkpoint yet"
            log.info("Restart %d of job %s, continuing from %s.", job.restarts, job.id, source)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, PDTrimModule)
        answers = pl_module.flags.at_step(trainer)
        if answers is not None:
            self._leaves = answers["preemption"]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._leaves and not trainer.is_last_batch:
            self._save_and_leave(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._asked(trainer):
            self._save_and_leave(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @property
    def noticed(self) -> bool:
        """Whether this process got one of the signals."""
        return self._delivered or bool(signal.sigpending() & NOTICES)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._delivered = True

    def leave_search(self, trainer: Trainer) -> None:
        """Exit between two evaluations or groups of local fits, if asked to. Collective."""
        if self._asked(trainer):
            if trainer.is_global_zero:
                log.info(
                    "Asked to leave in a search: its evaluations are kept, its local fits begin again. %s",
                    self._requeue(),
                )
            self._leave(trainer)

    def _asked(self, trainer: Trainer) -> bool:
        return bool(trainer.strategy.reduce_boolean_decision(self.noticed, all=False))

    def _leave(self, trainer: Trainer) -> NoReturn:
        trainer.strategy.barrier("preemption")  # `srun` may end every task when the first one leaves
        raise Preempted(EXIT_STATUS)

    def _save_and_leave(self, trainer: Trainer) -> NoReturn:
        saver = first_saver(trainer)
        assert saver is not None
        path = Path(saver.dirpath or trainer.default_root_dir) / f"{saver.CHECKPOINT_NAME_LAST}{saver.FILE_EXTENSION}"
        saver.last_model_path = str(path)  # else the continued run would write `last-v1.ckpt` beside it
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            log.info("Asked to leave: saved step %d to %s. %s", trainer.global_step, path, self._requeue())
        self._leave(trainer)

    def _requeue(self) -> str:
        """Put the job back into the queue, if there is a job and restarts are left. Returns a line for the log."""
        by_hand = "Continue with the same command and `--ckpt_path last`."
        job = RunningJob.here()
        if job is None:
            return by_hand
        if job.restarts >= self.max_requeues:
            return f"Not requeued: restarted {job.restarts} times, and `max_requeues` is {self.max_requeues}. {by_hand}"
        try:
            job.requeue()
        except SlurmError as error:
            return f"Not requeued: {error} {by_hand}"
        return f"Job {job.id} is back in the queue, restart {job.restarts + 1} of at most {self.max_requeues}."

    def _release(self) -> None:
        """Drop signals that came too late, and unblock both signals."""
        if self._mask_before is None:
            return
        while signal.sigpending() & NOTICES:
            signal.sigwait(signal.sigpending() & NOTICES)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        self._mask_before = None


def leave_search(trainer: Trainer) -> None:
    """A search calls this on every rank before every evaluation and group of local fits."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, Preemption):
            callback.leave_search(trainer)


def first_saver(trainer: Trainer) -> ModelCheckpoint | None:
    """The ModelCheckpoint in whose folder the run keeps its files."""
    return next((saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)), None)
