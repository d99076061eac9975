"""A worker process that serves one exported pair after another over the same link, for the acceptance test."""

from __future__ import annotations

from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from pdtrim_pl.export.load import load_stage
from pdtrim_pl.plan import Stage
from pdtrim_pl.serving.transport import open_link
from pdtrim_pl.serving.worker import DecodeWorker, PrefillWorker, StageWorker

CPU = torch.device("cpu")


def serve_many(stage: Stage, meeting_point: Path, parent: Connection) -> None:
    """For every path that comes, load that export's stage and obey one command; leave when the parent is gone."""
    torch.set_num_threads(1)
    link = open_link(stage, CPU, "gloo", meeting_point, timedelta(minutes=5))
    kind: type[StageWorker] = PrefillWorker if stage == "prefill" else DecodeWorker
    while True:
        try:
            export: Path = parent.recv()
        except EOFError:
            return
        staged = load_stage(export, stage).eval()
        assert staged.policy is not None
        with torch.no_grad():
            kind(staged, staged.policy, link, CPU, parent).obey(parent.recv())
