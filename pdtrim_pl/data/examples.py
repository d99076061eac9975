"""All examples of a source in one flat array of token ids: small, and cheap to share with loader workers."""

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset


class _Pair(NamedTuple):
    prompt: Tensor
    response: Tensor


class Example(_Pair):
    """One prompt and its response: int64 token ids of shape [P] and [R]. Neither is empty."""

    weight: float = 1.0
    """What the response counts in the training loss, relative to others."""

    def __new__(cls, prompt: Tensor, response: Tensor, weight: float = 1.0) -> "Example":
        example = super().__new__(cls, prompt, response)
        example.weight = weight
        return example


class TokenExamples(Dataset[Example]):
    """Prompts and responses, by index."""

    def __init__(
        self, ids: NDArray[np.int32], bounds: NDArray[np.int64], weights: NDArray[np.float64] | None = None
    ) -> None:
        """Store the arrays without copying them.

        Args:
            ids: token ids of all examples, one after the other.
            bounds: [examples, 3]: indices into `ids` of the start of the prompt, the start of the response and the end
                of the response.
            weights: what each example counts in the training loss, [examples]; ones by default.
        """
        self._ids = ids
        self._bounds = bounds
        self.weights = np.ones(len(bounds)) if weights is None else weights

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], weights: NDArray[np.float64] | None = None
    ) -> "TokenExamples":
        """Build the arrays from (prompt ids, response ids) pairs, and the weight of each."""
        chunks: list[NDArray[np.int32]] = []
        lengths: list[tuple[int, int]] = []
        for prompt, response in pairs:
            chunks.append(np.asarray([*prompt, *response], dtype=np.int32))
            lengths.append((len(prompt), len(response)))
        sizes = np.asarray(lengths, dtype=np.int64).reshape(-1, 2)
        ends = np.cumsum(sizes.sum(axis=1))
        starts = ends - sizes.sum(axis=1)
        ids = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int32)
        return cls(ids, np.stack([starts, starts + sizes[:, 0], ends], axis=1), weights)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Example:
        start, split, end = self._bounds[index]
        ids = torch.from_numpy(self._ids[start:end].astype(np.int64))
        return Example(ids[: split - start], ids[split - start :], float(self.weights[index]))

    @classmethod
    def joined(cls, parts: "Sequence[TokenExamples]") -> "TokenExamples":
        """The examples of several sets, one set after the other."""
        firsts = np.cumsum([0, *(len(part._ids) for part in parts)])[:-1]
        bounds = [part._bounds + first for part, first in zip(parts, firsts, strict=True)]
        weights = np.concatenate([part.weights for part in parts])
        return cls(np.concatenate([part._ids for part in parts]), np.concatenate(bounds), weights)

    def selected(self, rows: NDArray[np.int64]) -> "TokenExamples":
        """Some of the examples, by index."""
        return TokenExamples(self._ids, self._bounds[rows], self.weights[rows])

    def span(self, first: int, end: int) -> "TokenExamples":
        """Examples in a row, at least one, with none of the tokens of others before or behind them."""
        bounds = self._bounds[first:end]
        start = bounds[0, 0]
        return TokenExamples(self._ids[start : bounds[-1, 2]], bounds - start, self.weights[first:end])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in the prompt and in the response of every example, [examples, 2]."""
        return np.diff(self._bounds, axis=1)

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return int(self._ids.max())

    def distinct(self, known: Container[bytes] = ()) -> list[int]:
        """Indices of the examples without duplicates, each the first of its kind, and without `known` texts.

        Duplicates have the same tokens; their prompts may end at different places.
        """
        seen: dict[bytes, int] = {}
        for index, text in enumerate(self.texts()):
            seen.setdefault(text, index)
        return [index for text, index in seen.items() if text not in known]

    def texts(self) -> Iterator[bytes]:
        """The tokens of each example, prompt and response together."""
        return (self._ids[start:end].tobytes() for start, _, end in self._bounds)


class RepeatedPrompts(Dataset[Example]):
    """A data part in which some examples have their own prompt as the response.

    Args:
        part: the examples.
        share: share of the examples that are changed, rounded; at least one example is changed.
        max_length: maximum number of tokens, prompt and response together; a longer response is cut.
        spread: change examples at equal distances, instead of the first ones.
    """

    def __init__(self, part: Subset[Example], share: float, max_length: int, *, spread: bool = False) -> None:
        self.part, self.max_length = part, max_length
        changed, length = max(1, round(share * len(part))), len(part)
        self.changed = frozenset(index * length // changed for index in range(changed)) if spread else range(changed)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in the prompt and in the response of every example, [examples, 2]."""
        lengths = lengths_of(self.part).copy()
        changed = sorted(self.changed)
        prompts = lengths[changed, 0]
        lengths[changed, 1] = np.minimum(prompts, self.max_length - prompts)
        return lengths

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weight of every example, [examples]. A changed example keeps its own."""
        return weights_of(self.part)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Example:
        example = self.part[index]
        if index not in self.changed:
            return example
        return Example(example.prompt, example.prompt[: self.max_length - len(example.prompt)], example.weight)


def lengths_of(data: Dataset[Example]) -> NDArray[np.int64]:
    """Tokens in the prompt and in the response of every example of a data part, [examples, 2]. Reads no tokens."""
    if isinstance(data, Subset):
        return lengths_of(data.dataset)[np.asarray(data.indices, dtype=np.int64)]
    assert isinstance(data, TokenExamples | RepeatedPrompts)
    return data.lengths


def weights_of(data: Dataset[Example]) -> NDArray[np.float64]:
    """The weight of every example of a data part, [examples]."""
    if isinstance(data, Subset):
        return weights_of(data.dataset)[np.asarray(data.indices, dtype=np.int64)]
    assert isinstance(data, TokenExamples | RepeatedPrompts)
    return data.weights
