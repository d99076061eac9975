"""A worker process of the engine: loads one stage's checkpoint and serves until the engine closes its pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection

import torch

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.decode import DecodeWorker
from pdtrim_pl.serving.engine.handover import wire_dtype
from pdtrim_pl.serving.engine.prefill import PrefillWorker
from pdtrim_pl.serving.engine.worker import Worker, told
from pdtrim_pl.staged.model import StagedCausalLM


def run_worker(spec: say.WorkerSpec, parent: Connection) -> None:
    """The main function of a worker process.

    Args:
        spec: which stage to serve, and where.
        parent: gives commands and takes reports.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine handles Ctrl-C and stops its workers
    os.dup2(sys.stderr.fileno(), 1)  # standard output is for results
    try:
        manifest = PairManifest.load(spec.export)
        staged = _load(spec)
        worker: type[Worker] = PrefillWorker if spec.stage == "prefill" else DecodeWorker
        with torch.inference_mode():
            worker(spec, staged, manifest, parent).serve()
    except (EOFError, BrokenPipeError):
        return  # the engine is gone
    except Exception as error:  # the process ends here: the engine must hear of every error
        with contextlib.suppress(ConnectionError):
            parent.send(say.Failed(told(error), isinstance(error, UserError)))
        sys.exit(1)


def _load(spec: say.WorkerSpec) -> StagedCausalLM:
    # Imported here, after the process has set up its output and signals.
    from transformers.utils.logging import disable_progress_bar

    from pdtrim_pl.export.load import load_stage

    disable_progress_bar()
    staged = load_stage(spec.export, spec.stage, device=spec.device).eval()
    policy = staged.policy
    assert policy is not None
    if staged.model.dtype != wire_dtype(policy):
        raise UserError(
            f"`kv.dtype` of {spec.export / 'kv_policy.json'} is {policy.kv.dtype!r}, and the {spec.stage} checkpoint "
            f"is in {staged.model.dtype}. Export the pair again."
        )
    return staged
