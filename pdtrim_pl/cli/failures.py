"""How a command ends that fails: in one line where a user can help it, with a traceback where not. Imports no torch."""

from __future__ import annotations

import io
import os
import select
import sys
import traceback

from pdtrim_pl.errors import RankLost, UserError, is_out_of_memory

INTERRUPTED = 130
"""Status after Ctrl-C: 128 and the number of SIGINT."""
OUTPUT_CLOSED = 141
"""Status where nobody reads the output any more: 128 and the number of SIGPIPE."""
OUT_OF_MEMORY = (
    "Lower `data.batch_size`, `data.lengths.max_length` or `model.chunk_tokens`, or set "
    "`model.loading.gradient_checkpointing: true`; `pdtrim fit --dry_run` counts what a run needs before it starts."
)


def open_streams() -> None:
    """Make sure that there are standard streams, and that they can say everything.

    Where the caller has closed one, the next file that is opened would take its number. An ASCII locale gets UTF-8, as
    Python does by itself in most such cases; in other encodings `?` stands for what they lack.
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
    """Write what is left of the output; False where its reader has left, as in `| head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return not output_is_closed()
    return True


def output_is_closed() -> bool:
    """Whether a broken pipe is that of the output; what is still to be written is dropped then."""
    pipe = select.poll()
    pipe.register(1, select.POLLERR)
    if not pipe.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def expected_errors() -> tuple[type[Exception], ...]:
    """Classes that `tell` has something to say of. Lightning's own is known only once Lightning is imported."""
    kinds: list[type[Exception]] = [ValueError, OSError, RuntimeError]
    if "lightning" in sys.modules:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        kinds.append(MisconfigurationException)
    return tuple(kinds)


def is_users(error: Exception) -> bool:
    """Whether the error tells a user what to change.

    A UserError does, and what jsonargparse says of a configuration. Any other ValueError is a fault whose place
    somebody must see.
    """
    if isinstance(error, ValueError):
        return isinstance(error, UserError) or _is_jsonargparse(error)
    return not isinstance(error, RuntimeError)


def tell(error: Exception) -> int:
    """Print one line of an error, after the traceback where a user cannot help it; returns the exit status."""
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
    """Whether it says that another process of the run has died: ours, or that of gloo or NCCL, which has no class."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "NCCL communicator")
    return isinstance(error, RankLost) or any(sign in str(error) for sign in signs)


def _is_jsonargparse(error: Exception) -> bool:
    """Whether jsonargparse found something wrong with a configuration; it has no class of its own for it."""
    frames = traceback.walk_tb(error.__traceback__)
    *_, (last, _) = frames
    return str(last.f_globals.get("__name__", "")).partition(".")[0] == "jsonargparse"
