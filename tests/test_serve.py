"""`pdtrim serve` and the file of prompts: OpenAI's HTTP interface over the engine."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import listening
from transformers import AutoTokenizer

from pdtrim_pl.cli.main import main
from pdtrim_pl.errors import UserError
from pdtrim_pl.export import export_pair
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import Codec, KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.generate import stop_ids_of
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.serving.web import asks
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

pytestmark = pytest.mark.usefixtures("forked_workers")
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def export(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_causal_lm(str(tiny_llama_dir))
    plan = StagePlan.full(reference_to(model, str(tiny_llama_dir)), "nested").drop("decode", 2)
    policy = KVRetentionPolicy(plan.boundary, kv_shape_of(model), {3: Retention(codec=Codec("int4", "int4"))})
    folder = tmp_path_factory.mktemp("serve") / "pair"
    student = StagedCausalLM(model, plan, policy).eval()
    return export_pair(student, folder, tokenizer=AutoTokenizer.from_pretrained(tiny_llama_dir), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> Any:
    return AutoTokenizer.from_pretrained(export / "prefill")


@dataclass
class Expected:
    """What the pair says in one process."""

    pair: InProcessPair
    tokenizer: Any
    stop_ids: tuple[int, ...]

    def text(self, prompt: str, count: int, *, chat: bool = False) -> str:
        if chat:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        (tokens,) = self.pair.continuations([ids], room=count, stop_ids=self.stop_ids)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.fixture(scope="module")
def expected(export: Path, tokenizer: Any) -> Expected:
    return Expected(InProcessPair.load(export), tokenizer, stop_ids_of(export, tokenizer))


# Bodies, without a server


def test_a_body_asks_for_what_openai_documents(tokenizer: Any) -> None:
    body = asks.completion({"prompt": "Hi", "max_tokens": 3, "stop": "x", "top_p": 0.5, "seed": 2}, tokenizer)
    assert (body.prompts, body.max_tokens, body.stop) == ([tokenizer("Hi")["input_ids"]], 3, ("x",))
    assert body.sampling == Sampling(1.0, None, 2, 0.5)
    assert asks.completion({"prompt": [[5, 6], [7]]}, tokenizer).prompts == [[5, 6], [7]]
    assert asks.completion({"prompt": [5, 6]}, tokenizer).prompts == [[5, 6]]
    assert len(asks.completion({"prompt": ["a", "b"]}, tokenizer).prompts) == 2
    assert asks.completion({"prompt": "a"}, tokenizer).max_tokens == 16
    said = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )  # fmt: skip
    body = asks.chat({"messages": said, "max_completion_tokens": 4, "n": 1, "user": "me"}, tokenizer)
    assert body.prompts == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert body.max_tokens == 4


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "`prompt` must be"),
        ({"prompt": [1.5]}, "`prompt` must be"),
        ({"prompt": "a", "n": 2}, "does not know `n`"),
        ({"prompt": "a", "logprobs": 5, "echo": True}, "does not know `echo`, `logprobs`"),
        ({"prompt": "a", "stop": [""]}, "`stop` must be"),
        ({"prompt": "a", "max_tokens": "9"}, "`max_tokens` is '9'"),
        ({"prompt": "a", "temperature": True}, "`temperature` is True"),
        ({"prompt": "a", "top_p": 2.0}, "`top_p` is 2.0"),
    ],
)
def test_a_body_that_cannot_be_served_is_refused(body: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=message):
        asks.completion(body, tokenizer)


def test_messages_that_are_none_are_refused(tokenizer: Any) -> None:
    for messages in (None, [], "Hi"):
        with pytest.raises(UserError, match="`messages` must be a list"):
            asks.chat({"messages": messages}, tokenizer)
    with pytest.raises(UserError, match="`messages` holds a str where a message belongs"):
        asks.chat({"messages": ["Hi"]}, tokenizer)


# A file of prompts


def test_a_file_of_prompts_is_answered_in_order(
    export: Path, expected: Expected, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"Prompt number {number}" for number in range(7)]
    rows: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    rows.append({"messages": [{"role": "user", "content": "Hi"}]})
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["generate", "--export", str(export), "--device", "cpu", "--max_new_tokens", "9", "--max_batch", "2"]
    assert main([*asked, "--prompts", str(source), "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    wanted = [expected.text(text, 9) for text in texts] + [expected.text("Hi", 9, chat=True)]
    assert [row["text"] for row in found] == wanted
    assert {row["finish_reason"] for row in found} <= {"length", "stop"}
    stop = wanted[0][2:4]
    assert main([*asked, "--prompts", str(source), "--stop", json.dumps([stop])]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["text"] == wanted[0][: wanted[0].find(stop)]
    assert first["finish_reason"] == "stop"
    source.write_text('{"text": "no prompt"}\n')
    assert main([*asked, "--prompts", str(source)]) == 1
    assert "line 1: has neither a `prompt` nor `messages`" in capsys.readouterr().err
    assert main(asked) == 1
    assert "either `--prompt` or `--prompts`" in capsys.readouterr().err


def test_without_starlette_one_sentence_says_how_to_install_it(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--export", str(export)]) == 1
    assert "`pip install 'pdtrim_pl[serve]'`" in capsys.readouterr().err


# The server


@dataclass
class Client:
    port: int
    key: str | None = None

    def send(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection.getresponse()

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        response = self.send(path, body)
        return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def engine(export: Path) -> Iterator[Engine]:
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    with Engine(export, max_batch=4, max_waiting=8) as running:
        yield running


def serving(engine: Engine, tokenizer: Any, **settings: Any) -> Iterator[Client]:
    """A real server in a thread of its own."""
    from pdtrim_pl.serving.web.app import Served, application

    served = Served(engine, tokenizer, "tiny", stop_ids_of(engine.pair.path, tokenizer), **settings)
    with listening(application(served)) as port:
        yield Client(port)


@pytest.fixture(scope="module")
def client(engine: Engine, tokenizer: Any) -> Iterator[Client]:
    yield from serving(engine, tokenizer)


def events(response: http.client.HTTPResponse) -> list[Any]:
    """The server-sent events of a response, without the last one."""
    *lines, last = [line for line in response.read().decode().split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_models_health_and_metrics_are_told(client: Client) -> None:
    status, models = client.ask("/v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, ["tiny"])
    assert client.ask("/health") == (200, {"status": "ok"})
    response = client.send("/metrics")
    assert response.getheader("content-type", "").startswith("text/plain; version=0.0.4")
    assert b"# TYPE pdtrim_ttft_seconds histogram" in response.read()


def test_a_completion_is_what_the_pair_says(client: Client, expected: Expected, tokenizer: Any) -> None:
    status, found = client.ask("/v1/completions", {"model": "tiny", "prompt": "The sky", "max_tokens": 8, **GREEDY})
    assert status == 200
    (choice,) = found["choices"]
    assert choice["text"] == expected.text("The sky", 8)
    assert found["usage"]["prompt_tokens"] == len(tokenizer("The sky")["input_ids"])
    assert found["usage"]["total_tokens"] == sum(found["usage"].values()) // 2
    status, found = client.ask("/v1/completions", {"prompt": ["One", "Two"], "max_tokens": 5, **GREEDY})
    assert [each["text"] for each in found["choices"]] == [expected.text("One", 5), expected.text("Two", 5)]


def test_a_stream_has_the_same_text_and_ends_with_its_usage(client: Client, expected: Expected) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "stream": True, **GREEDY}
    found = events(client.send("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}))
    pieces = [each["choices"][0]["delta"].get("content", "") for each in found[:-1]]
    assert "".join(pieces) == expected.text("Hi", 12, chat=True)
    assert found[-2]["choices"][0]["finish_reason"] in ("length", "stop")
    assert found[-1]["choices"] == []
    assert 0 < found[-1]["usage"]["completion_tokens"] <= 12
    status, whole = client.ask("/v1/chat/completions", {**body, "stream": False})
    assert status == 200
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "".join(pieces)}


def test_a_stop_string_ends_the_text_before_it(client: Client, expected: Expected, engine: Engine) -> None:
    whole = expected.text("The sky", 200)
    stop = whole[6:8]
    status, found = client.ask("/v1/completions", {"prompt": "The sky", "max_tokens": 200, "stop": stop, **GREEDY})
    assert (status, found["choices"][0]["text"]) == (200, whole[: whole.find(stop)])
    assert found["choices"][0]["finish_reason"] == "stop"
    limit = time.monotonic() + 10
    while engine._running and time.monotonic() < limit:
        time.sleep(0.01)
    assert not engine._running


def test_many_callers_at_once_get_their_own_texts(client: Client, expected: Expected) -> None:
    prompts = [f"Caller {number} says" for number in range(8)]

    def ask(prompt: str) -> str:
        status, found = client.ask("/v1/completions", {"prompt": prompt, "max_tokens": 20, **GREEDY})
        assert status == 200
        return str(found["choices"][0]["text"])

    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(ask, prompts)) == [expected.text(prompt, 20) for prompt in prompts]


def test_faults_of_a_caller_are_told_as_openai_does(client: Client) -> None:
    for path, body, status, message in (
        ("/v1/completions", b"{", 400, "not JSON"),
        ("/v1/completions", [], 400, "not a JSON object"),
        ("/v1/completions", {"prompt": "a", "n": 3}, 400, "does not know `n`"),
        ("/v1/completions", {"prompt": "a" * 600}, 400, "the model's context is 512"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
        ("/v1/completions", b"[" + b" " * (17 * 2**20), 413, "more than"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ):
        found = client.ask(path, body)
        assert found[0] == status, path
        assert message in found[1]["error"]["message"]


def test_a_full_queue_is_status_503_and_a_late_answer_504(client: Client, engine: Engine, tokenizer: Any) -> None:
    long = {"prompt": ["a"] * 4, "max_tokens": 400, **GREEDY}
    with ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda _: client.ask("/v1/completions", long)[0], range(6)))
    assert set(found) == {200, 503}
    for late in serving(engine, tokenizer, deadline=0.02):
        status, told = late.ask("/v1/completions", {"prompt": "a", "max_tokens": 500, **GREEDY})
        assert (status, told["error"]["message"]) == (504, "The time of 0.02 s is over.")


def test_a_caller_who_leaves_frees_its_row(client: Client, engine: Engine) -> None:
    response = client.send("/v1/completions", {"prompt": "a", "max_tokens": 500, "stream": True, **GREEDY})
    assert response.read(20)
    response.close()
    limit = time.monotonic() + 20
    while engine._running and time.monotonic() < limit:
        time.sleep(0.01)
    assert not engine._running


def test_with_a_secret_callers_need_it(engine: Engine, tokenizer: Any) -> None:
    for client in serving(engine, tokenizer, secret="s3cret"):
        assert client.ask("/v1/models")[0] == 401
        assert client.ask("/v1/completions", {"prompt": "a"})[0] == 401
        assert client.ask("/health")[0] == 200
        client.key = "s3cret"
        assert client.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def test_the_client_of_openai_is_served(client: Client, expected: Expected) -> None:
    openai = pytest.importorskip("openai", reason="needs the package openai")
    caller = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in caller.models.list()] == ["tiny"]
    whole = caller.completions.create(model="tiny", prompt="The sky", max_tokens=8, temperature=0)
    assert whole.choices[0].text == expected.text("The sky", 8)
    said = [{"role": "user", "content": "Hi"}]
    stream = caller.chat.completions.create(
        model="tiny", messages=said, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected.text("Hi", 9, chat=True)
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="does not know `n`"):
        caller.completions.create(model="tiny", prompt="a", n=2)
