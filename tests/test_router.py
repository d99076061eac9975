"""The router in front of two vLLM engines, with OpenAI's client before it and servers that speak as vLLM behind it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import listening, until
from transformers import AutoTokenizer

from pdtrim_pl.cli.main import main
from pdtrim_pl.errors import UserError
from pdtrim_pl.export import export_pair
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import Codec, KVRetentionPolicy, PairManifest, Retention, StagePlan
from pdtrim_pl.serving.engine.requests import Ask
from pdtrim_pl.serving.generate import decoded
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

pytest.importorskip("starlette", reason="needs the extra `serve`")
httpx2 = pytest.importorskip("httpx2", reason="needs the extra `serve`")
openai = pytest.importorskip("openai", reason="needs the package openai")

from fake_vllm import FakeVllm, says  # noqa: E402

from pdtrim_pl.serving.router.engines import free_ports  # noqa: E402
from pdtrim_pl.serving.router.router import Router  # noqa: E402
from pdtrim_pl.serving.router.upstream import Upstream  # noqa: E402
from pdtrim_pl.serving.web.app import Served, application  # noqa: E402

EOS = 2
ANSWER = "éine Antwort: "
"""Begins with a character of two tokens, so that the text of the join is that of neither engine alone."""
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


def exported(folder: Path, model_dir: Path, boundary: Any) -> Path:
    model = load_causal_lm(str(model_dir))
    plan = StagePlan(reference_to(model, str(model_dir)), (0, 1, 2, 3), (0, 1, 3), boundary=boundary)
    policy = KVRetentionPolicy(boundary, kv_shape_of(model), {3: Retention("first_last", 2, 3, Codec("int4", "int4"))})
    student = StagedCausalLM(model, plan, policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return export_pair(student, folder / "pair", tokenizer=tokenizer, dtype=torch.float32)


@pytest.fixture(scope="module", params=["prefill", "decode"])
def export(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("router"), tiny_llama_dir, request.param)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdtrim_pl.serving.router.router.LOOK", 0.1)


@dataclass
class Stack:
    """Two engines, the router and the server."""

    prefill: FakeVllm
    decode: FakeVllm
    router: Router
    tokenizer: Any
    urls: list[str]
    port: int

    @property
    def caller(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    def ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])

    def tokens(self, prompt: str) -> list[int]:
        return says(self.ids(prompt), self.prefill.answer)

    def text(self, prompt: str, count: int) -> str:
        """What the pair says."""
        return decoded(self.tokenizer, self.tokens(prompt)[:count])

    def metric(self, name: str) -> float:
        lines = self.router.watch.metrics().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    @property
    def quiet(self) -> bool:
        """Whether no engine works and nothing is under way."""
        return not self.prefill.active and not self.decode.active and not list(self.prefill.wire.iterdir())


@contextmanager
def stack(export: Path, wire: Path, *, stops: tuple[int, ...] = (EOS,), **settings: Any) -> Iterator[Stack]:
    tokenizer = AutoTokenizer.from_pretrained(export / "prefill")
    boundary = json.loads((export / "stage_plan.json").read_text())["boundary"]
    answer = list(tokenizer(ANSWER)["input_ids"])
    wire.mkdir(exist_ok=True)
    prefill, decode = (
        FakeVllm(stage, boundary, PairManifest.load(export).id, wire, answer) for stage in ("prefill", "decode")
    )
    deadline = settings.pop("deadline", None)
    with ExitStack() as held:
        ports = [held.enter_context(listening(each.application(), "critical")) for each in (prefill, decode)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        engines = Upstream("prefill", urls[0]), Upstream("decode", urls[1])
        router = held.enter_context(Router(export, engines, start_timeout=10, **settings))
        served = Served(router, tokenizer, "tiny", stops, deadline)
        port = held.enter_context(listening(application(served)))
        yield Stack(prefill, decode, router, tokenizer, urls, port)


@pytest.fixture
def running(export: Path, tmp_path: Path) -> Iterator[Stack]:
    with stack(export, tmp_path / "wire") as found:
        yield found


# The text


def test_eight_callers_at_once_get_the_joined_text_streamed_or_not(running: Stack) -> None:
    prompts = [f"Caller {number} says" for number in range(7)] + ["x"]

    def ask(prompt: str) -> tuple[str, str, int]:
        body = {**GREEDY, "prompt": prompt, "max_tokens": 30}
        whole = running.caller.completions.create(**body)
        chunks = list(running.caller.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        streamed = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage == chunks[-1].usage
        return whole.choices[0].text, streamed, whole.usage.completion_tokens

    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(ask, prompts))
    assert found == [(text := running.text(prompt, 30), text, 30) for prompt in prompts]
    assert running.quiet


def test_a_chat_is_answered_through_the_template(running: Stack) -> None:
    said = [{"role": "user", "content": "Hi"}]
    prompt = running.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    whole = running.caller.chat.completions.create(**GREEDY, messages=said, max_tokens=20)
    assert whole.choices[0].message.content == running.text(prompt, 20)
    assert [model.id for model in running.caller.models.list()] == ["tiny"]


def test_each_engine_is_asked_for_its_part_and_for_nothing_that_a_checkpoint_would_change(running: Stack) -> None:
    prompt = running.ids("The sky")
    running.caller.completions.create(**GREEDY, prompt=prompt, max_tokens=5)
    (first,), (rest,) = running.prefill.bodies, running.decode.bodies
    begun = running.tokens("The sky")[: running.prefill.boundary == "prefill"]
    assert (first["prompt"], first["max_tokens"]) == (prompt, 1)
    assert (rest["prompt"], rest["max_tokens"]) == ([*prompt, *begun], 5 - len(begun))
    assert first["kv_transfer_params"]["transfer_id"] == rest["kv_transfer_params"]["transfer_id"]
    for body in (first, rest):
        assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} == {
            "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1,
        }  # fmt: skip
        assert "seed" not in body


def test_the_engines_sample_with_seeds_of_their_own(running: Stack) -> None:
    for seed in (7, 7, 8):
        running.caller.completions.create(model="tiny", prompt="a sky", max_tokens=4, seed=seed, top_p=0.5)
    seeds = [
        (first["seed"], rest["seed"]) for first, rest in zip(running.prefill.bodies, running.decode.bodies, strict=True)
    ]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4
    assert {(body["temperature"], body["top_p"]) for body in running.prefill.bodies} == {(1.0, 0.5)}


def test_one_token_needs_no_transfer_that_nobody_would_fetch(running: Stack) -> None:
    whole = running.caller.completions.create(**GREEDY, prompt="The sky", max_tokens=1)
    assert whole.choices[0].text == running.text("The sky", 1)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 1)
    assert len(running.decode.bodies) == (running.prefill.boundary == "decode")
    assert running.quiet


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_string_across_the_join_ends_the_text_before_it(running: Stack, size: int) -> None:
    body = {**GREEDY, "prompt": "The sky", "max_tokens": 300, "stop": ANSWER[:size]}
    running.decode.pause = 0.01
    found = running.caller.completions.create(**body)
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "stop")
    later = running.caller.completions.create(**{**body, "stop": ANSWER[5:8]}, stream=True)
    assert "".join(chunk.choices[0].text for chunk in later) == ANSWER[:5]
    until(lambda: running.quiet)
    assert running.decode.aborted == 2


@pytest.mark.parametrize("at", [0, 1, 9])
def test_a_stop_token_of_either_engine_ends_the_response(export: Path, tmp_path: Path, at: int) -> None:
    with stack(export, tmp_path / "wire") as probe:
        stop = probe.tokens("The sky")[at]
    with stack(export, tmp_path / "wire", stops=(EOS, stop)) as running:
        found = running.caller.completions.create(**GREEDY, prompt="The sky", max_tokens=30)
        ended = running.tokens("The sky").index(stop) + 1
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens == ended
        assert found.choices[0].text == running.text("The sky", ended)


# Faults


def test_a_lost_transfer_is_sent_once_more(running: Stack) -> None:
    running.prefill.lose = 1
    body = {"model": "tiny", "prompt": "The sky", "max_tokens": 12, "seed": 3}
    found = "".join(chunk.choices[0].text for chunk in running.caller.completions.create(**body, stream=True))
    assert found == running.text("The sky", 12)
    assert running.metric("pdtrim_lost_total") == 1
    transfers = [each["kv_transfer_params"]["transfer_id"] for each in running.prefill.bodies]
    assert len(set(transfers)) == 2
    running.prefill.lose = 2
    with pytest.raises(openai.InternalServerError, match=r"The decode engine at .* failed: Internal server error"):
        running.caller.completions.create(**body)
    assert running.quiet


def test_a_refusal_of_an_engine_is_told_and_not_tried_again(running: Stack) -> None:
    running.decode.refuses = {"message": "not that", "code": 400}
    with pytest.raises(openai.InternalServerError, match=r"The decode engine at .* failed: not that"):
        running.caller.completions.create(**GREEDY, prompt="The sky", max_tokens=12)
    assert len(running.decode.bodies) == 1


def test_a_dead_engine_is_status_503_with_its_name(export: Path, tmp_path: Path) -> None:
    (dead,) = free_ports(1)
    with stack(export, tmp_path / "wire") as running:
        for stage in ("prefill", "decode"):
            engine = running.router._engines[stage == "decode"]
            assert engine._client is not None
            alive, engine._client.base_url = engine._client.base_url, f"http://127.0.0.1:{dead}"
            with pytest.raises(openai.APIStatusError, match=f"The {stage} engine at .* cannot be reached") as refused:
                running.caller.completions.create(**GREEDY, prompt="The sky", max_tokens=4)
            assert refused.value.status_code == 503
            until(lambda: running.router.trouble)
            ill = httpx2.get(f"http://127.0.0.1:{running.port}/health")
            assert (ill.status_code, ill.json()["status"]) == (503, running.router.trouble)
            assert f"The {stage} engine at" in running.router.trouble
            engine._client.base_url = alive
            until(lambda: not running.router.trouble)
        running.decode.healthy = False
        until(lambda: running.router.trouble)
        assert running.router.trouble == f"The decode engine at {running.urls[1]} is not healthy: status 503"


def test_an_answer_that_breaks_off_is_an_error_and_no_end(running: Stack) -> None:
    running.decode.broken_after = 4
    body = {**GREEDY, "prompt": "The sky", "max_tokens": 12}
    with pytest.raises(openai.APIStatusError, match="The decode engine at") as broken:
        running.caller.completions.create(**body)
    assert broken.value.status_code == 503
    with pytest.raises(openai.APIError, match="The decode engine at"):
        list(running.caller.completions.create(**body, stream=True))
    assert running.metric('pdtrim_requests_total{reason="unavailable"}') == 2


def test_a_caller_who_leaves_frees_both_engines(running: Stack) -> None:
    body = {**GREEDY, "prompt": "The sky", "max_tokens": 300}
    running.decode.pause = 0.05
    stream = running.caller.completions.create(**body, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: running.decode.aborted == 1)
    running.prefill.pause = 60
    with suppress(openai.APITimeoutError):
        running.caller.with_options(timeout=0.5).completions.create(**body)
    until(lambda: running.prefill.aborted == 1)
    assert running.quiet


def test_engines_of_another_pair_or_without_the_connector_are_refused(running: Stack) -> None:
    running.prefill.pair = "f" * 64
    with pytest.raises(openai.InternalServerError, match="serves pair ffffffffffff, and the router"):
        running.caller.completions.create(**GREEDY, prompt="The sky", max_tokens=4)
    assert running.decode.bodies == []
    running.prefill.connector = False
    with pytest.raises(openai.InternalServerError, match=r"The prefill engine at .* hands nothing over"):
        running.caller.completions.create(**GREEDY, prompt="The sky", max_tokens=4)


# Limits


def test_a_full_queue_is_status_503_and_a_late_answer_504(export: Path, tmp_path: Path) -> None:
    with stack(export, tmp_path / "wire", max_batch=1, max_waiting=1, deadline=5.0) as running:
        running.decode.pause = 60

        def ask(_: int) -> int:
            try:
                running.caller.completions.create(**GREEDY, prompt="The sky", max_tokens=4)
            except openai.APIStatusError as error:
                return int(error.status_code)
            return 200

        with ThreadPoolExecutor(4) as callers:
            first = callers.submit(ask, 0)
            until(lambda: running.decode.active)  # so the queue is empty
            assert sorted([*callers.map(ask, range(1, 4)), first.result()]) == [503, 503, 504, 504]
        assert running.metric("pdtrim_refused_total") == 2
        until(lambda: not running.decode.active)


def test_the_shorter_context_of_an_engine_is_the_limit(running: Stack, export: Path) -> None:
    running.decode.context = 100
    engines = Upstream("prefill", running.urls[0]), Upstream("decode", running.urls[1])
    with Router(export, engines) as router:
        assert router.pair.context == 100
    for body, message in ({"n": 2}, "does not know `n`"), ({"max_tokens": 600}, "the model's context is"):
        with pytest.raises(openai.BadRequestError, match=message):
            running.caller.completions.create(**GREEDY, prompt="The sky", **body)


def test_a_known_response_is_refused(running: Stack) -> None:
    with pytest.raises(UserError, match="cannot tell the logits of a known response"):
        running.router.submit(Ask.scoring([5, 6], [7]), lambda _: None)


def test_metrics_count_times_and_the_policys_bytes(running: Stack) -> None:
    prompts = ["The sky", "A much longer prompt than the first"]
    for prompt in prompts:
        running.caller.completions.create(**GREEDY, prompt=prompt, max_tokens=6)
    pair = running.router.pair
    sent = sum(pair.policy.sent_bytes(pair.plan, len(running.ids(prompt))) for prompt in prompts)
    assert sent == running.metric("pdtrim_kv_bytes_total") > 0
    for name in ("ttft", "tpot", "prefill"):
        assert running.metric(f"pdtrim_{name}_seconds_count") == 2
    assert running.metric("pdtrim_tokens_total") == 12
    assert "header_bytes" not in running.router.watch.metrics()


def test_an_engine_with_a_key_needs_it(running: Stack, export: Path) -> None:
    running.prefill.key = "s3cret"
    decode = Upstream("decode", running.urls[1])
    with pytest.raises(UserError, match=r"asks for a key: .* VLLM_API_KEY"):
        Router(export, (Upstream("prefill", running.urls[0]), decode)).__enter__()
    with Router(export, (Upstream("prefill", running.urls[0], "s3cret"), decode)) as router:
        assert not router.trouble


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:{dead}", "did not answer within 0.2 s"),
        ("127.0.0.1", "is no address of a prefill engine"),
        ("http://127.0.0.1:port", "is no address of a prefill engine"),
    ],
)
def test_an_engine_that_is_not_there_is_named(url: str, message: str, export: Path) -> None:
    engine = Upstream("prefill", url.format(dead=free_ports(1)[0]))
    with pytest.raises(UserError, match=message):
        Router(export, (engine, engine), start_timeout=0.2).__enter__()


# The command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill", "http://x"], "`prefill` is a setting of `--engine vllm`"),
        (["--engine", "vllm", "--prefill", "http://x"], "Give both `--prefill` and `--decode`"),
        (["--engine", "vllm", "--device", "cpu"], "`device` is a setting of `--engine builtin`"),
        (
            ["--engine", "vllm", "--prefill", "x", "--decode", "y", "--vllm_python", "z"],
            "`prefill` and `decode` name running ones",
        ),
        (["--engine", "vllm", "--vllm_python", "/no/python"], "`vllm_python` cannot be run"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    options: list[str], message: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--export", str(export), "--port", "0", *options]) == 1
    assert message in capsys.readouterr().err


def test_an_engine_that_does_not_start_ends_the_command(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    before = signal.getsignal(signal.SIGTERM)
    options = ["--engine", "vllm", "--vllm_python", str(python), "--port", "0"]
    assert main(["serve", "--export", str(export), *options]) == 1
    assert "engine ended with status 3; its own output above tells why" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ["--engine", "vllm", "--vllm_python", "/no/python", "--port", port]
        assert main(["serve", "--export", str(export), *options]) == 1
    assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err


@dataclass
class Command:
    """`pdtrim serve` in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ask(self, prompt: str) -> str:
        caller = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)
        found = caller.completions.create(model="pair", prompt=prompt, max_tokens=20, temperature=0)
        return str(found.choices[0].text)

    @property
    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def command(
    export: Path, log: Path, *options: str, ready: Callable[[Command], object] = lambda found: found.is_up,
    **environment: str,
) -> Iterator[Command]:  # fmt: skip
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "pdtrim_pl", "serve", "--export", str(export), "--engine", "vllm", "--name", "pair"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*words, "--port", str(port), *options], stdout=out, stderr=out, env={**os.environ, **environment}
        )
    try:
        found = Command(process, port, log)
        until(lambda: ready(found), 120)
        yield found
    finally:
        process.kill()
        process.wait()


def test_the_command_stands_in_front_of_engines_that_run(running: Stack, export: Path, tmp_path: Path) -> None:
    with command(export, tmp_path / "log", "--prefill", running.urls[0], "--decode", running.urls[1]) as served:
        assert served.ask("The sky") == running.text("The sky", 20)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 0, served.log.read_text()


@pytest.mark.parametrize("end", ["interrupt", "terminate", "engine dies"])
def test_the_command_starts_both_engines_and_ends_with_them(end: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    export = exported(tmp_path, tiny_llama_dir, "prefill")
    tokenizer, wire, python = AutoTokenizer.from_pretrained(export / "prefill"), tmp_path / "wire", tmp_path / "python"
    wire.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_vllm.py"} "$@"\n')
    python.chmod(0o755)
    answer = list(tokenizer(ANSWER)["input_ids"])
    options = ["--vllm_python", str(python), "--vllm_args", '["--max-model-len", "200"]']
    environment = {"FAKE_WIRE": str(wire), "FAKE_ANSWER": json.dumps(answer)}
    with command(export, tmp_path / "log", *options, **environment) as served:
        expected = decoded(tokenizer, says(list(tokenizer("The sky")["input_ids"]), answer)[:20])
        assert served.ask("The sky") == expected
        engines = [int((wire / f"{stage}.pid").read_text()) for stage in ("prefill", "decode")]
        if end == "engine dies":
            os.kill(engines[1], signal.SIGKILL)
        else:
            served.process.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGTERM)
        status = {"interrupt": 0, "terminate": 128 + signal.SIGTERM, "engine dies": 1}[end]
        assert served.process.wait(60) == status, served.log.read_text()
    for engine in engines:
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)
    if end == "engine dies":
        assert "The decode engine ended with status -9; its own output above tells why" in served.log.read_text()


def test_the_command_ends_its_engines_if_it_is_ended_before_they_serve(tiny_llama_dir: Path, tmp_path: Path) -> None:
    export, python = exported(tmp_path, tiny_llama_dir, "prefill"), tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/$3.pid\nexec sleep 300\n")
    python.chmod(0o755)
    files = [tmp_path / f"{stage}.pid" for stage in ("prefill", "decode")]

    def both_run(found: Command) -> bool:
        assert found.process.poll() is None, found.log.read_text()
        return all(file.is_file() and file.read_text().strip() for file in files)

    with command(export, tmp_path / "log", "--vllm_python", str(python), ready=both_run) as served:
        assert not served.is_up
        served.process.terminate()
        assert served.process.wait(60) == 128 + signal.SIGTERM, served.log.read_text()
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
