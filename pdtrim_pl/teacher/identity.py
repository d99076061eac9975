"""What a cache of a teacher is of: the models, the tokenizer, the lengths and the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

KEY_BYTES = 16
"""Length of an example's key."""


@dataclass(frozen=True)
class CacheIdentity:
    """What the rows of a cache depend on. A run that reads them must agree in all of it but the text, of which it may
    use a part."""

    teacher: str
    """Hash of the teacher's files."""
    dtype: str
    """Element type in which the teacher computed."""
    tokenizer: str
    """Hash of the tokens and their ids."""
    vocabulary: int
    """Number of token ids, from 0, that the distributions are over."""
    temperature: float
    """The teacher's logits are divided by it."""
    max_length: int
    """Maximum number of tokens of prompt and response together."""
    min_prompt: int
    max_prompt: int
    data: str = ""
    """Hash of the examples, in no order; empty if it is not known yet."""

    def differences(self, other: CacheIdentity, *, same_text: bool) -> list[str]:
        """What differs, in words: this is the cache's side, `other` the run's.

        Args:
            other: what the run has.
            same_text: whether the text must be the same.
        """
        names = [field.name for field in fields(self) if same_text or field.name != "data"]
        ours, theirs = asdict(self), asdict(other)
        return [_said(name, ours[name], theirs[name]) for name in names if ours[name] != theirs[name]]

    def to_json(self) -> dict[str, Any]:
        """The identity as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheIdentity:
        """Read what `to_json` wrote."""
        return cls(**data)


_SETTINGS: Mapping[str, str] = {
    "teacher": "the weights of the teacher (`model.model`, `model.loading.teacher`)",
    "dtype": "the teacher's element type (`teacher_bits`, `model.loading.teacher_dtype`)",
    "tokenizer": "the tokenizer (`data.tokenizer`)", "vocabulary": "the number of token ids that both models share",
    "temperature": "the `temperature` of the losses", "max_length": "`data.lengths.max_length`",
    "min_prompt": "`data.lengths.min_prompt`", "max_prompt": "`data.lengths.max_prompt`",
    "data": "the training text (`data.source`, `data.parts`, `data.seed`)",
}  # fmt: skip


def example_key(prompt: Tensor, response: Tensor) -> bytes:
    """Name of an example that depends on nothing but its tokens: int64 ids of shape [P] and [R], without padding."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for ids in (prompt, response):
        digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    return digest.digest()


def data_fingerprint(keys: Iterable[bytes]) -> str:
    """Hash of examples by their keys; their order does not count."""
    return hashlib.sha256(b"".join(sorted(keys))).hexdigest()


def _said(name: str, cached: Any, wanted: Any) -> str:
    if isinstance(cached, str) and len(cached) == 64:  # a hash, of which a few digits tell enough
        cached, wanted = cached[:12], str(wanted)[:12]
    return f"{_SETTINGS[name]}: {cached} in the cache, {wanted} here"
