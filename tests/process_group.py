"""Run a script of the tests that starts processes of its own, and leave none of them behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(name: str, *args: str, folder: Path, timeout: float) -> None:
    """Run `tests/NAME` to its end; its output goes to `folder/log`, whose end is told where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / name), *args]
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status = run.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # the second process too
    assert status == 0, (folder / "log").read_text()[-5000:]
