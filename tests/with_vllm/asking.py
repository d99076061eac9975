"""Requests of the `openai` client to both engines, without a router."""

from __future__ import annotations

import asyncio
import uuid

import openai
from servers import Served

SAME = {"model": "pair", "temperature": 0}


def generated_at_once(served: Served) -> list[list[int]]:
    """The greedy tokens of every expected request; all are asked for at the same time."""

    async def all_at_once() -> list[list[int]]:
        async with (
            openai.AsyncOpenAI(base_url=f"{served.urls['prefill']}/v1", api_key="none", max_retries=0) as prefill,
            openai.AsyncOpenAI(base_url=f"{served.urls['decode']}/v1", api_key="none", max_retries=0) as decode,
        ):
            return await asyncio.gather(
                *(_generated(prefill, decode, served.boundary, each) for each in served.expected)
            )

    return asyncio.run(all_at_once())


async def _generated(prefill: openai.AsyncOpenAI, decode: openai.AsyncOpenAI, boundary: str, each: dict) -> list[int]:
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
