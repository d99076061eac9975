"""The text of the measures: prompts, and a long stream of tokens from which passages and other tokens are cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule, TextSource
from pdtrim_pl.data.prompts import leading_ids
from pdtrim_pl.errors import UserError


@dataclass(frozen=True, eq=False)
class Material:
    """Prompts and a stream of tokens of one source."""

    prompts: list[list[int]]
    stream: Tensor
    """Token ids of many examples one after the other, without special tokens, [N]."""

    @classmethod
    def read(cls, tokenizer: str, source: str, examples: int, prompt_tokens: int, stream: int) -> Material:
        """Read a source.

        Args:
            tokenizer: name of the tokenizer.
            source: see `TextSource.path`.
            examples: number of prompts.
            prompt_tokens: most tokens of a prompt; text is cut into prompts of this length.
            stream: least number of tokens of the stream.

        Raises:
            UserError: the source has too little text.
        """
        lengths = Lengths(prompt_tokens + 1, prompt_tokens, prompt_tokens)
        data = PromptResponseDataModule(tokenizer, TextSource(source), lengths, Parts(validation=0, calibration=0))
        data.prepare_data()
        data.setup("fit")
        part, leading = data.part("train"), leading_ids(data.tokenizer)
        prompts: list[list[int]] = []
        pieces: list[Tensor] = []
        tokens = 0
        for at in range(len(part)):
            example = part[at]
            if len(prompts) < examples:
                prompts.append(example.prompt.tolist())
            whole = torch.cat([example.prompt, example.response])
            pieces.append(whole[len(leading) :] if leading and whole[: len(leading)].tolist() == leading else whole)
            tokens += len(pieces[-1])
            if len(prompts) == examples and tokens >= stream:
                return cls(prompts, torch.cat(pieces))
        raise UserError(
            f"`source` {source} has {len(part)} examples and {tokens} tokens, and the measures need {examples} and "
            f"{stream}. Give more text, or lower `examples` or `prompts`."
        )

    def passage(self, at: int, size: int) -> Tensor:
        """Passage number `at`, from the start of the stream, [size]."""
        return self.stream[at * size : (at + 1) * size]

    def others(self, at: int, size: int, after: int) -> Tensor:
        """Tokens from behind place `after` of the stream, [size]; other ones for each `at` where there are more."""
        rest = len(self.stream) - after - size
        start = after + (at * size) % (rest + 1)
        return self.stream[start : start + size]
