"""`pdtrim` in a terminal: other encodings, readers that leave, Ctrl-C. One line, the usual status, no process left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.serving.generate import generate_text
from pdtrim_pl.staged import StagedCausalLM

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}
HINT = "(PDTRIM_DEBUG=1 shows the traceback.)"


@pytest.fixture(scope="module")
def export(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that always says é, in two tokens, as a byte-level tokenizer has it."""
    staged = StagedCausalLM(load_causal_lm(str(tiny_llama_dir)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    path = export_pair(staged, tmp_path_factory.mktemp("terminal") / "export", tokenizer=tokenizer)
    first, second = tokenizer("é").input_ids
    for stage in ("prefill", "decode"):
        weights = load_file(path / stage / "model.safetensors")
        for name, weight in weights.items():  # no block adds anything, so the next token depends on this one alone
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = torch.zeros_like(weight)
        embedding = torch.zeros_like(weights["model.embed_tokens.weight"])
        embedding[:, 0], embedding[first, 0], embedding[first, 1] = 1.0, 0.0, 1.0
        head = torch.zeros_like(weights["lm_head.weight"])
        head[first, 0], head[second, 1] = 1.0, 1.0
        weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
        save_file(weights, path / stage / "model.safetensors", metadata={"format": "pt"})
    return path


def command(export: Path, prompt: str | bytes, tokens: int = 4) -> list[str | bytes]:
    return [
        sys.executable, "-m", "pdtrim_pl", "generate", "--export", str(export), "--prompt", prompt, "--max_new_tokens",
        str(tokens), "--device", "cpu",
    ]  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHONUTF8", "PYTHONIO"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def lines_of(stderr: bytes) -> list[str]:
    return stderr.decode("utf-8", "replace").splitlines()


def test_a_prompt_that_is_not_utf_8_is_refused_in_one_line(export: Path) -> None:
    done = subprocess.run(command(export, b"caf\xe9"), env=environment(), capture_output=True, check=False)
    assert done.returncode == 1
    said, hint = lines_of(done.stderr)
    assert said.startswith("pdtrim: error: `prompt` is not UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 3")
    assert hint == HINT


def test_in_an_ascii_locale_text_goes_in_and_out_as_utf_8(export: Path) -> None:
    done = subprocess.run(command(export, "Grüße".encode()), env=environment(**ASCII), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "éé\n".encode()
    assert lines_of(done.stderr)[0] == "prompt   7 tokens", "ü and ß are two bytes each"


def test_in_a_latin_1_terminal_what_it_cannot_show_is_a_question_mark() -> None:
    code = "from pdtrim_pl.cli.failures import open_streams; open_streams(); print('é\\u4f60')"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONIOENCODING="latin-1"), capture_output=True, check=True
    )
    assert shown.stdout == b"\xe9?\n"


def test_a_reader_that_has_had_enough_ends_a_response_quietly(export: Path) -> None:
    run = subprocess.Popen(
        command(export, "Hi", 300), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stdout is not None
    assert run.stderr is not None
    assert run.stdout.read(2) == "é".encode()
    run.stdout.close()
    assert run.wait(60) == 0
    assert run.stderr.read() == b""


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&-"])
def test_streams_that_the_caller_has_closed_do_no_harm(redirection: str, export: Path) -> None:
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command(export, "Hi")]
    done = subprocess.run(shell, env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("éé\n".encode() if redirection == "<&-" else b"")


def test_help_whose_reader_has_left_says_one_line() -> None:
    code = "import sys; from pdtrim_pl.cli.main import main; sys.stdin.read(); sys.exit(main(['--help']))"
    run = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None
    run.stdout.close()
    assert run.stdin is not None
    run.stdin.close()
    assert run.wait(60) == 141
    assert run.stderr is not None
    assert lines_of(run.stderr.read()) == ["pdtrim: error: standard output was closed before all was written."]


def heed_interrupts() -> None:
    """A shell without job control lets what it starts in the background ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("moment", ["loading", "writing"])
def test_ctrl_c_ends_every_process_in_one_line(moment: str, export: Path) -> None:
    """The signal goes to the whole group, as a terminal sends it, so the workers get it too."""
    run = subprocess.Popen(
        command(export, "Hi", 500), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stderr is not None
    if moment == "writing":
        run.stdout.read(2)
    else:
        while len(members(run.pid)) < 3:  # itself and the first worker, or Python's tracker of resources
            time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 130
    assert lines_of(run.stderr.read()) == ["pdtrim: interrupted."]
    deadline = time.monotonic() + 10
    while members(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(run.pid)


def members(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            match = re.match(r"(\d+) \(.*\) (\w) \d+ (\d+)", stat.read_text())
        except OSError:  # it has just gone
            continue
        if match is not None and int(match[3]) == group and match[2] != "Z":
            found.append(int(match[1]))
    return found


def test_a_cluster_s_network_interface_is_not_that_of_the_workers(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    out: Any = sys.stdout
    generate_text(export, "Hi", max_new_tokens=2, device="cpu", out=out, err=sys.stderr)
    assert capsys.readouterr().out == "é\n"
