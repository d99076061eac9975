"""Text and chats to tokens: prompt and response join to the whole text, and serving reads prompts as training does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_pieces import text_pieces
from transformers import PreTrainedTokenizerBase
from wild_tokenizers import TOKENIZERS, byte_level, llama2, word_piece

from pdtrim_pl.data import Example, Lengths, TextSource
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.prompts import chat_text, leading_ids, plain_ids, split_ids
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.serving.generate import decoded, encode_prompt

LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
BARE_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
PARTS_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endfor %}"
)

every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def examples_of(tokenizer: PreTrainedTokenizerBase, directory: Path, rows: Sequence[dict[str, Any]]) -> list[Example]:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples = encode(load_rows(TextSource(str(path))), tokenizer, Lengths(512, 1, 256), 0)
    return [examples[index] for index in range(len(examples))]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@every_tokenizer
@pytest.mark.parametrize("template", [LLAMA2_TEMPLATE, CHATML_TEMPLATE, BARE_TEMPLATE])
def test_a_chat_is_the_rendered_chat_and_its_prompt_the_served_one(name: str, template: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = template
    turns = [("What is it?", "The thing is Paris"), ("Say ", "Paris"), ("Lines:\n", "\n\nis it")]
    chats = [[{"role": "user", "content": ask}, {"role": "assistant", "content": say}] for ask, say in turns]
    examples = examples_of(tokenizer, tmp_path, [{"messages": chat} for chat in chats])
    for chat, example in zip(chats, examples, strict=True):
        rendered = chat_text(tokenizer, chat, add_generation_prompt=False).rstrip()
        whole = plain_ids(tokenizer, [rendered])[0]
        ended = whole if whole[-1] == tokenizer.eos_token_id else [*whole, tokenizer.eos_token_id]
        assert text_of(tokenizer, torch.cat(example).tolist()) == text_of(tokenizer, ended)
        assert example.prompt.tolist() == encode_prompt(tokenizer, chat[0]["content"], chat=True)


def test_a_response_of_llama_2_starts_with_one_space(tmp_path: Path) -> None:
    tokenizer = llama2()
    tokenizer.chat_template = LLAMA2_TEMPLATE
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "The thing"}]
    (example,) = examples_of(tokenizer, tmp_path, [{"messages": chat}])
    tokens = tokenizer.convert_ids_to_tokens(example.response.tolist())
    assert tokens == ["▁The", "▁", "t", "h", "ing", "▁", "</s>"]


PAIRS = [
    ("The thing is", " Paris"),
    ("The thing is ", "Paris"),
    ("The thing is", "\n\nParis"),
    ("The thing is\n\n", "\nParis"),
    ("It is[", "is]"),
    ("Bytes é", "ü 🎉"),
]


@every_tokenizer
def test_a_pair_is_the_joined_text_and_its_prompt_the_served_one(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    rows = [{"prompt": prompt, "response": response} for prompt, response in PAIRS]
    for (prompt, response), example in zip(PAIRS, examples_of(tokenizer, tmp_path, rows), strict=True):
        whole = leading_ids(tokenizer) + plain_ids(tokenizer, [prompt + response])[0]
        joined = torch.cat(example).tolist()
        assert text_of(tokenizer, joined) == text_of(tokenizer, [*whole, tokenizer.eos_token_id])
        assert example.prompt.tolist() == encode_prompt(tokenizer, prompt, chat=False)


@every_tokenizer
def test_any_two_texts_decode_to_the_joined_one(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = st.text(alphabet="The is\nParing.</s>", max_size=12)

    @given(texts, texts)
    def check(prompt: str, response: str) -> None:
        ((first, second),) = split_ids(tokenizer, [(prompt, response)])
        assert text_of(tokenizer, first + second) == text_of(tokenizer, plain_ids(tokenizer, [prompt + response])[0])

    check()


def test_a_prompt_is_served_with_the_tokens_of_training_where_a_tokenizer_ends_texts_by_itself() -> None:
    tokenizer = llama2()
    assert tokenizer("is")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "is", chat=False) == [1, *plain_ids(tokenizer, ["is"])[0]]


def test_a_token_over_the_boundary_is_cut_where_the_tokenizer_has_the_pieces() -> None:
    tokenizer = byte_level(False)
    assert tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, ["is Paris"])[0]) == ["i", "s", "ĠParis"]
    ((prompt, response),) = split_ids(tokenizer, [("is ", "Paris")])
    assert tokenizer.convert_ids_to_tokens(prompt + response) == ["i", "s", "Ġ", "Paris"]


def test_a_token_over_the_boundary_that_cannot_be_cut_belongs_to_the_response() -> None:
    tokenizer = word_piece()
    ((prompt, response),) = split_ids(tokenizer, [("the go", "ing")])
    assert tokenizer.convert_ids_to_tokens(prompt) == ["the"]
    assert tokenizer.convert_ids_to_tokens(response) == ["going"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for key in messages[0]['content'] | items %}{% endfor %}",
            "TypeError: Can only get item pairs from a mapping",
        ),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].name.first }}", "UndefinedError"),
        ("{{ raise_exception('roles\n must alternate') }}", "TemplateError: roles must alternate"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ [].pop() }}", "IndexError|SecurityError"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template: str, problem: str, tmp_path: Path) -> None:
    tokenizer = byte_level(False)
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "it"}]
    place = r"rows\.jsonl, line 1: column `messages` does not fit the chat template \("
    with pytest.raises(ValueError, match=f"{place}({problem})") as training:
        examples_of(tokenizer, tmp_path, [{"messages": chat}])
    with pytest.raises(
        ValueError, match=rf"`chat`: the prompt does not fit the chat template \(({problem})"
    ) as serving:
        encode_prompt(tokenizer, "Hi", chat=True)
    assert "\n" not in f"{training.value}{serving.value}"


def test_tool_arguments_in_a_json_string_do_not_fit_a_template_that_wants_an_object(tmp_path: Path) -> None:
    tokenizer = byte_level(False)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}{% for key, value in call.arguments | items %}"
        "{{ key }}={{ value }}{% endfor %}{% endfor %}{{ m.content or '' }}{% endfor %}"
    )

    def chat(arguments: Any) -> dict[str, Any]:
        call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
        return {"messages": [{"role": "user", "content": "go"}, call, {"role": "assistant", "content": "it is"}]}

    examples = examples_of(tokenizer, tmp_path, [chat({"a": 1}), chat({"b": "x"})])
    found = [text_of(tokenizer, example.prompt.tolist()) for example in examples]
    assert found == ["goa=1", "gob=x"], "no message has the keys of another"
    with pytest.raises(ValueError, match=r"line 2: column `messages` does not fit the chat template \(TypeError"):
        examples_of(tokenizer, tmp_path, [chat({"a": 1}), chat('{"a": 1}')])


def test_a_template_that_leaves_string_content_out_is_named(tmp_path: Path) -> None:
    tokenizer = byte_level(False)
    tokenizer.chat_template = PARTS_TEMPLATE
    chat = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "it"}]
    with pytest.raises(ValueError, match=r"line 1: column `messages` does not fit .* does not render string content"):
        examples_of(tokenizer, tmp_path, [{"messages": chat}])
    with pytest.raises(ValueError, match=r"`chat`: .* does not render string content \(of `user`\)"):
        encode_prompt(tokenizer, "Hi", chat=True)


def test_a_template_may_change_the_content() -> None:
    tokenizer = byte_level(False)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    assert chat_text(tokenizer, [{"role": "user", "content": "is"}], add_generation_prompt=True) == "IS"


def test_an_answer_that_a_template_opens_otherwise_follows_the_served_prompt(tmp_path: Path) -> None:
    tokenizer = byte_level(False)
    tokenizer.chat_template = CHATML_TEMPLATE.replace("<s>assistant\n' }}", "<s>assistant\n<think>\n' }}")
    chat = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "Paris "}]
    (example,) = examples_of(tokenizer, tmp_path, [{"messages": chat}])
    assert example.prompt.tolist() == encode_prompt(tokenizer, "is it", chat=True)
    assert text_of(tokenizer, torch.cat(example).tolist()).endswith("<s>assistant\n<think>\nParis</s>")


@every_tokenizer
def test_text_that_is_streamed_is_the_text_of_all_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = plain_ids(tokenizer, ["The sky is blue, and so is the sea. Nobody knows why it went on going. " * 6])[0]
    assert "".join(text_pieces(ids, lambda ids: decoded(tokenizer, ids))) == decoded(tokenizer, ids)
