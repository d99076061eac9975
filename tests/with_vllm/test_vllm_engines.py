"""A pair in two real vLLM engines: what they generate, what crosses, and what they refuse. See `make test-vllm`."""

from __future__ import annotations

import asyncio
import json
import time
from urllib.request import Request, urlopen

import pytest
from asking import SAME, generated_at_once

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

JSON = "application/json"


def test_eight_concurrent_requests_equal_our_runtime_and_send_the_policys_bytes(served) -> None:
    before = served.metric("pdtrim:kv_bytes_total")
    assert generated_at_once(served) == [each["tokens"] for each in served.expected]
    assert served.metric("pdtrim:kv_bytes_total") - before == sum(each["kv_bytes"] for each in served.expected)


def test_eight_callers_of_the_router_get_our_runtimes_greedy_answers_and_the_policys_bytes(served) -> None:
    async def answer(router, each: dict, *, stream: bool) -> tuple[str, int]:
        ask = {**SAME, "prompt": each["prompt"], "max_tokens": len(each["tokens"])}
        if not stream:
            whole = await router.completions.create(**ask)
            return whole.choices[0].text, whole.usage.completion_tokens
        told = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await router.completions.create(**ask, **told)]
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        return text, chunks[-1].usage.completion_tokens

    async def all_at_once(stream: bool) -> list[tuple[str, int]]:
        async with openai.AsyncOpenAI(base_url=f"{served.urls['router']}/v1", api_key="none", max_retries=0) as router:
            return await asyncio.gather(*(answer(router, each, stream=stream) for each in served.expected))

    expected = [(each["answer"], each["answer_tokens"]) for each in served.expected]
    sent = sum(each["kv_bytes"] for each in served.expected)
    for stream in (False, True):
        before = [served.metric("pdtrim:kv_bytes_total"), served.metric("pdtrim_kv_bytes_total", "router")]
        assert asyncio.run(all_at_once(stream)) == expected
        after = [served.metric("pdtrim:kv_bytes_total"), served.metric("pdtrim_kv_bytes_total", "router")]
        assert [now - then for now, then in zip(after, before, strict=True)] == [sent, sent]
    assert served.metric("pdtrim_lost_total", "router") == 0


def test_a_stop_string_ends_an_answer_of_the_router(served) -> None:
    each = next(each for each in served.expected if len(each["answer"]) > 12)
    stop = each["answer"][8:12]
    with openai.OpenAI(base_url=f"{served.urls['router']}/v1", api_key="none", max_retries=0) as router:
        found = router.completions.create(**SAME, prompt=each["prompt"], max_tokens=len(each["tokens"]), stop=stop)
    assert found.choices[0].text == each["answer"].partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"


def test_a_caller_who_leaves_the_router_ends_the_request_at_the_engine(served) -> None:
    def tokens_when_idle() -> float:
        """Tokens that the decode engine has generated, once it generates no more."""
        last, now = -1.0, 0.0
        while now != last:
            last, now = now, served.metric("vllm:generation_tokens_total")
            time.sleep(2)
        return now

    ask = {**SAME, "prompt": "Once upon a time", "max_tokens": 300}
    with openai.OpenAI(base_url=f"{served.urls['router']}/v1", api_key="none", max_retries=0) as router:
        assert router.completions.create(**ask).usage.completion_tokens == 300
        before = tokens_when_idle()
        stream = router.completions.create(**ask, stream=True)
        next(iter(stream))
        stream.close()
    assert tokens_when_idle() - before < 200


def test_a_failed_load_is_an_error_in_the_stream_before_any_token(served) -> None:
    """The router knows it by this, see `tests/fake_vllm.py`."""
    body = {**SAME, "prompt": "The capital of France is", "max_tokens": 4, "stream": True, "return_token_ids": True}
    asked = Request(f"{served.urls['decode']}/v1/completions", json.dumps(body).encode(), {"Content-Type": JSON})
    with urlopen(asked) as answer:
        first, last = [line for line in answer.read().decode().split("\n\n") if line]
    assert json.loads(first.removeprefix("data: "))["error"]["code"] == 500
    assert last == "data: [DONE]"


def test_a_request_without_a_transfer_fails_and_the_engine_goes_on(served) -> None:
    with openai.OpenAI(base_url=f"{served.urls['decode']}/v1", api_key="none", max_retries=0) as decode:
        with pytest.raises(openai.APIStatusError):
            decode.completions.create(**SAME, prompt="The capital of France is", max_tokens=4)
        assert [model.id for model in decode.models.list()] == ["pair"]
