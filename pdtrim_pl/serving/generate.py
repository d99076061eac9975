"""`pdtrim generate`: prints text from an exported pair while it is generated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pdtrim_pl.data.prompts import chat_text, joined_stop_ids, plain_ids, prompt_ids
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.json_files import read_json
from pdtrim_pl.serving.exported import ExportedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pdtrim_pl.serving.engine.requests import RequestStats


def generate_text(
    export: Path, prompt: str, *, max_new_tokens: int = 128, chat: bool = False, temperature: float = 0.0,
    top_k: int | None = None, top_p: float = 1.0, seed: int = 0, stop: Sequence[str] = (), device: str = "auto",
    verify: bool = False, out: TextIO, err: TextIO,
) -> None:  # fmt: skip
    """Generate from an exported pair in two processes. Writes the text to `out` and figures to `err`.

    Args:
        export: the exported pair's directory.
        prompt: raw text, or a user's message with `chat`.
        max_new_tokens: most tokens to generate; an end-of-sequence token ends the text earlier.
        chat: put the prompt into the tokenizer's chat template.
        temperature: 0 for greedy.
        top_k: sample among this many most likely tokens; None for all.
        top_p: sample among the most likely tokens that together reach this probability.
        seed: of the sampling.
        stop: texts that end the response; they are not written.
        device: see `pdtrim_pl.serving.devices.devices_of`.
        verify: compare the hashes of the weights with `pair.json` first; reads all of them once more.
        out: receives the text and a final newline.
        err: receives the figures.

    Raises:
        UserError: a setting cannot be served; the message names it.
        RuntimeError: a worker failed.
    """
    pair = ExportedPair.read(Path(export), verify=verify)
    if not prompt:
        raise UserError("`prompt` is empty: give some text.")
    if pair.plan.model.architecture is not None:
        from pdtrim_pl.models.adapters import adapter_at

        adapter_at(pair.plan.model.architecture)  # importing it may make its family known to transformers
    prompt = _as_typed(prompt)
    tokenizer = load_export_tokenizer(pair.path)
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    pair.check_prompt(len(ids), max_new_tokens)

    from pdtrim_pl.models.loading import warn_of_slow_bf16
    from pdtrim_pl.serving.devices import devices_of
    from pdtrim_pl.serving.engine.engine import Engine
    from pdtrim_pl.serving.engine.requests import Ask
    from pdtrim_pl.serving.engine.response import Ended, Heard, Response
    from pdtrim_pl.serving.sampling import Sampling

    sampling = Sampling(temperature, top_k, seed, top_p)  # refuses a wrong setting before the workers start
    ask = Ask(ids, max_new_tokens, stop_ids_of(pair.path, tokenizer), sampling)
    devices = devices_of(device)
    for each in devices:
        warn_of_slow_bf16(each, pair.policy.kv.dtype)  # that of both checkpoints
    with Engine(pair.path, devices=devices, max_batch=1) as engine:
        heard = Heard()
        Response(engine, ask, lambda ids: decoded(tokenizer, ids), stop, heard.put)
        for event in heard:
            if isinstance(event, Ended):
                event.raise_fault()
                out.write("\n")
                out.flush()
                if event.stats is not None:  # else prefill has died after it had sent the prompt
                    err.write(figures(event.stats))
            else:
                out.write(event)
                out.flush()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> list[int]:
    """The prompt's token ids, as in training: of raw text, or of a chat with one user message.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the prompt.
    """
    if not chat:
        return prompt_ids(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise UserError("`chat` needs a chat template, and this export's tokenizer has none: leave out `--chat`.")
    try:
        text = chat_text(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    except ValueError as error:
        raise UserError(f"`chat`: the prompt {error}. Leave out `--chat`, or correct the template.") from error
    return plain_ids(tokenizer, [text])[0]


def stop_ids_of(export: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End-of-sequence ids of the export: from its generation config (else its `config.json`) and its tokenizer."""
    files = [export / "decode" / name for name in ("generation_config.json", "config.json")]
    path = next((file for file in files if file.is_file()), None)
    told = None if path is None else read_json(path, "generation config").get("eos_token_id")
    return joined_stop_ids(told, tokenizer.eos_token_id)


def figures(stats: RequestStats) -> str:
    """A request's figures, one per line."""
    sent = f"{stats.kv_bytes:,} of {stats.full_bytes:,} bytes unpruned"
    ratio = "" if stats.ratio is None else f" ({stats.ratio:.2f}x less)"
    step = stats.decode_seconds_per_token
    decode = "nothing to run" if step is None else f"{step * 1e3:.2f} ms a token"
    return (
        f"prompt   {stats.prompt_tokens} tokens\n"
        f"new      {stats.new_tokens} tokens\n"
        f"KV sent  {sent}{ratio}, the last byte {stats.transfer_seconds * 1e3:.2f} ms after prefill\n"
        f"prefill  {stats.prefill_seconds_per_token * 1e3:.2f} ms a token\n"
        f"decode   {decode}\n"
    )


def _as_typed(prompt: str) -> str:
    """The prompt as text. Bytes of the command line that the locale could not read are taken as UTF-8.

    Raises:
        UserError: they are not UTF-8.
    """
    if prompt.isascii() or not any("\ud800" <= character <= "\udfff" for character in prompt):
        return prompt
    try:
        return os.fsencode(prompt).decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"`prompt` is not UTF-8 ({error}): convert it first, for instance with `iconv`.") from error


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of token ids, without special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def load_export_tokenizer(export: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an export.

    Raises:
        UserError: it has none.
    """
    folder = export / "prefill"
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"`export` has no tokenizer: {folder / 'tokenizer_config.json'} is missing. Export again with the model's "
            "tokenizer, or copy its files there."
        )
    from pdtrim_pl.models.pretrained import load_tokenizer

    return load_tokenizer(str(folder))
