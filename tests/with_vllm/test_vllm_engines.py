"""A pair in two real vLLM engines: what they generate, what crosses, and what they refuse. See `make test-vllm`."""

from __future__ import annotations

import asyncio
import uuid

import pytest

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

SAME = {"model": "pair", "temperature": 0}


async def generated(prefill, decode, boundary: str, each: dict) -> list[int]:
    """The tokens of one request: the prefill engine's answer leads to the decode engine."""
    ask = {"do_remote_decode": True, "transfer_id": uuid.uuid4().hex}
    extra = {"return_token_ids": True, "ignore_eos": True}
    first = await prefill.completions.create(
        **SAME, prompt=each["prompt"], max_tokens=1, extra_body={**extra, "kv_transfer_params": ask}
    )
    choice = first.choices[0].model_dump()
    tokens = choice["token_ids"] if boundary == "prefill" else []
    assert choice["prompt_token_ids"] == each["prompt_ids"]
    given = first.model_dump().get("kv_transfer_params") or {}
    rest = await decode.completions.create(
        **SAME, prompt=[*each["prompt_ids"], *tokens], max_tokens=len(each["tokens"]) - len(tokens),
        extra_body={**extra, "kv_transfer_params": given},
    )  # fmt: skip
    return [*tokens, *rest.choices[0].model_dump()["token_ids"]]


def test_eight_concurrent_requests_equal_our_runtime_and_send_the_policys_bytes(served) -> None:
    async def all_at_once() -> list[list[int]]:
        async with (
            openai.AsyncOpenAI(base_url=f"{served.urls['prefill']}/v1", api_key="none", max_retries=0) as prefill,
            openai.AsyncOpenAI(base_url=f"{served.urls['decode']}/v1", api_key="none", max_retries=0) as decode,
        ):
            return await asyncio.gather(
                *(generated(prefill, decode, served.boundary, each) for each in served.expected)
            )

    before = served.metric("pdtrim:kv_bytes_total")
    assert asyncio.run(all_at_once()) == [each["tokens"] for each in served.expected]
    assert served.metric("pdtrim:kv_bytes_total") - before == sum(each["kv_bytes"] for each in served.expected)


def test_a_request_without_a_transfer_fails_and_the_engine_goes_on(served) -> None:
    with openai.OpenAI(base_url=f"{served.urls['decode']}/v1", api_key="none", max_retries=0) as decode:
        with pytest.raises(openai.APIStatusError):
            decode.completions.create(**SAME, prompt="The capital of France is", max_tokens=4)
        assert [model.id for model in decode.models.list()] == ["pair"]
