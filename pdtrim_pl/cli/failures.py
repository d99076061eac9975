"""How a failing command ends: in one line if the user can put it right, else with a traceback. Imports no torch."""

from __future__ import annotations

import io
import os
import select
import sys
import traceback

from pdtrim_pl.errors import RankLost, UserError, is_out_of_memory

INTERRUPTED = 130
"""Status after Ctrl-C: 128 plus the number of SIGINT."""
OUTPUT_CLOSED = 141
"""Status if nobody reads the output any more: 128 plus the number of SIGPIPE."""
OUT_OF_MEMORY = (
    "Lower `data.batch_size`, `data.lengths.max_length` or `model.chunk_tokens`, or set "
    "`model.loading.gradient_checkpointing: true`; `pdtrim fit --dry_run` counts what a run needs before it starts."
)


def open_streams() -> None:
    """Make sure that the standard streams exist and can write every character.

    If the caller has closed one, the next opened file would take its number. An ASCII locale gets UTF-8, as Python
    itself chooses in most such cases. Other encodings write `?` for characters that they lack.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and not out.encoding.lower().startswith("utf"):
        ascii_only = "é".encode(out.encoding, "ignore") == b""
        out.reconfigure(encoding="utf-8" if ascii_only else None, errors="replace")


def flush_output() -> bool:
    """Write the rest of the output; False if its reader has left, as in `| head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return not output_is_closed()
    return True


def output_is_closed() -> bool:
    """Whether the broken pipe is that of the output. If so, the rest of the output is dropped."""
    pipe = select.poll()
    pipe.register(1, select.POLLERR)
    if not pipe.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def expected_errors() -> tuple[type[Exception], ...]:
    """Classes of errors that `tell` can explain. Lightning's own is included if Lightning has been imported."""
    kinds: list[type[Exception]] = [ValueError, OSError, RuntimeError]
    if "lightning" in sys.modules:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        kinds.append(MisconfigurationException)
    return tuple(kinds)


def is_users(error: Exception) -> bool:
    """Whether the error tells a user what to change.

    A UserError does, and so does an error of jsonargparse. Any other ValueError is a fault of the code and needs its
    traceback.
    """
    if isinstance(error, ValueError):
        return isinstance(error, UserError) or _is_jsonargparse(error)
    return not isinstance(error, RuntimeError)


def tell(error: Exception) -> int:
    """Print an error in one line, after a traceback if the user cannot put it right. Returns the exit status."""
    text, users = str(error), True
    if is_out_of_memory(error):
        text = f"Memory ran out ({text.splitlines()[0]}). {OUT_OF_MEMORY}"
    elif isinstance(error, RuntimeError) and lost_process(error):
        text = (
            f"Another process of the run is gone ({error}). Its own output tells why; its host may be out of memory. "
            "Continue with the same command and `--ckpt_path last`."
        )
    elif isinstance(error, RuntimeError):
        raise error
    elif not is_users(error):
        text, users = f"{type(error).__name__}: {error}", False
    elif _is_jsonargparse(error):
        from pdtrim_pl.cli.parsing import told

        text = told(text)
    if not users or os.environ.get("PDTRIM_DEBUG"):
        traceback.print_exception(error)
    print(f"pdtrim: error: {text}", file=sys.stderr)
    if users:
        print("(PDTRIM_DEBUG=1 shows the traceback.)", file=sys.stderr)
    return 1


def lost_process(error: RuntimeError) -> bool:
    """Whether another process of the run has died. Errors of gloo and NCCL are recognised by their text."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "NCCL communicator")
    return isinstance(error, RankLost) or any(sign in str(error) for sign in signs)


def _is_jsonargparse(error: Exception) -> bool:
    """Whether jsonargparse raised the error; it has no class of its own for a wrong configuration."""
    frames = traceback.walk_tb(error.__traceback__)
    *_, (last, _) = frames
    return str(last.f_globals.get("__name__", "")).partition(".")[0] == "jsonargparse"
