"""What a run wants of a teacher's cache: read from its settings and its text, without loading a model."""

from __future__ import annotations

import torch

from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from pdtrim_pl.models.loading import dtype_of
from pdtrim_pl.models.pretrained import usable_config
from pdtrim_pl.staged.pair import ModelPair
from pdtrim_pl.teacher.identity import CacheIdentity, data_fingerprint, example_key


def training_keys(data: PromptResponseDataModule) -> list[bytes]:
    """Keys of the examples of the training part, in its order."""
    part = data.part("train")
    return [example_key(*part[index]) for index in range(len(part))]


def identity_of(
    pair: ModelPair, data: PromptResponseDataModule, temperature: float, keys: list[bytes]
) -> CacheIdentity:  # fmt: skip
    """What a cache of this run is of.

    Args:
        pair: settings of the models.
        data: its training part is the text, and its tokenizer and lengths count.
        temperature: that of the losses.
        keys: see `training_keys`.
    """
    config = usable_config(pair.teacher_name, pair.adapter_of_teacher())
    dtype = dtype_of(pair.loading.teacher_dtype) or config.dtype or torch.float32
    lengths = data.lengths
    bits = "" if pair.loading.teacher_bits is None else " with layers in 8 bits"
    return CacheIdentity(
        teacher=model_fingerprint(pair.teacher_name), dtype=str(dtype).removeprefix("torch.") + bits,
        tokenizer=tokenizer_fingerprint(data.tokenizer),
        vocabulary=pair.compared_tokens() or config.vocab_size, temperature=temperature,
        max_length=lengths.max_length, min_prompt=lengths.min_prompt, max_prompt=lengths.max_prompt,
        data=data_fingerprint(keys),
    )  # fmt: skip
