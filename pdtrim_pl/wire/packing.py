"""Pack encoded keys and values into bytes, row after row, and unpack them. docs/formats.md describes every byte.

Shapes: B batch, K key/value heads, N entries of the longest row, D head dimension, G groups of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from pdtrim_pl.plan.codec import CODE_BITS, Codec, Form
from pdtrim_pl.wire.codecs import FP8, Stream


class DamagedBlock(RuntimeError):
    """The bytes received are not a packed block."""


def packed(keys: Stream, values: Stream, counts: Sequence[int]) -> Tensor:
    """Pack one block into bytes, uint8: the keys of the first row, its values, the keys of the next row, and so on.

    Args:
        keys: encoded keys.
        values: encoded values.
        counts: number of valid entries of each row.
    """
    parts: list[Tensor] = []
    for row, count in enumerate(counts):
        if count:
            for stream in (keys, values):
                parts += _row(stream, row, count)
    device = keys.raw.device
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def unpacked(
    data: Tensor, counts: Sequence[int], codec: Codec, heads: int, width: int, dtype: torch.dtype
) -> tuple[Stream, Stream]:
    """Unpack the keys and values of one block; rows are left-justified.

    Args:
        data: the bytes, uint8.
        counts: number of entries of each row.
        codec: the codec that they were encoded with.
        heads: key/value heads, K.
        width: head dimension, D.
        dtype: element type of the cache.

    Raises:
        DamagedBlock: the number of bytes is wrong, or a scale or mean is not finite.
    """
    expected = sum(codec.row_bytes(count, heads, width, dtype.itemsize) for count in counts)
    if data.dtype != torch.uint8 or data.dim() != 1 or len(data) != expected:
        raise DamagedBlock(
            f"A packed block of {sum(counts)} positions under {codec} has {expected} bytes, but this one has "
            f"{tuple(data.shape)} of {data.dtype}. The sender has another plan or policy, or the message is cut short."
        )
    if not expected:
        nothing = torch.empty(len(counts), heads, 0, width, dtype=dtype, device=data.device)
        return Stream("none", False, nothing), Stream("none", False, nothing)
    reader = _Reader(data)
    shape = (len(counts), heads, max(counts), width)
    keys = _Rows(codec.keys, codec.rotate_keys, codec.group, codec.exact, shape, dtype, data.device, means=True)
    values = _Rows(codec.values, codec.rotate_values, 1, codec.exact, shape, dtype, data.device, means=False)
    for row, count in enumerate(counts):
        if count:
            keys.read(reader, row, count)
            values.read(reader, row, count)
    return keys.stream(), values.stream()


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [n] of `bits` bits into bytes without gaps, least significant bit first; zeros fill the last byte."""
    if bits == 8:
        return codes
    places = torch.arange(8, device=codes.device, dtype=torch.int32)
    filled = torch.nn.functional.pad(codes, (0, -len(codes) % 8)).view(-1, 8).int()
    words = (filled << (places * bits)).sum(dim=1, dtype=torch.int32)  # 8 codes of at most 4 bits
    out = (words[:, None] >> (places[:bits] * 8)) & 255
    return out.to(torch.uint8).flatten()[: ceil(len(codes) * bits / 8)]


def unpacked_codes(data: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `packed_codes`: unpack `count` codes, one a byte, uint8."""
    if bits == 8:
        return data
    filled = torch.nn.functional.pad(data, (0, -len(data) % bits)).view(-1, bits).int()
    places = torch.arange(8, device=data.device, dtype=torch.int32)
    words = (filled << (places[:bits] * 8)).sum(dim=1, dtype=torch.int32)
    codes = (words[:, None] >> (places * bits)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten()[:count]


def _row(stream: Stream, row: int, count: int) -> list[Tensor]:
    """The parts of one packed row, in the order of the format."""
    exact = 0 if stream.exact is None else min(stream.exact.shape[2], count)
    first = [] if stream.exact is None else [_bytes(stream.exact[row, :, :exact].transpose(0, 1))]
    return first if exact == count else [*first, *_rounded_row(stream, row, count - exact)]


def _rounded_row(stream: Stream, row: int, count: int) -> list[Tensor]:
    """The parts of the positions after the exact ones."""
    elements = stream.raw[row, :, :count].transpose(0, 1).contiguous()  # [count, K, D]
    if stream.form == "none":
        return [_bytes(elements)]
    assert stream.scales is not None
    if stream.form == "fp8":
        return [_bytes(stream.scales[row]), _bytes(elements)]
    assert stream.steps is not None
    assert stream.centres is not None
    parts = [] if stream.means is None else [_bytes(stream.means[row])]
    places = ceil(count / stream.group)  # keys [K, G, D] -> [places, K, D], values [K, N] -> [places, K]
    parameters = [each[row, :, :places].transpose(0, 1) for each in (stream.steps, stream.centres)]
    codes = packed_codes(elements.flatten(), CODE_BITS[stream.form])
    return [*parts, *map(_bytes, (stream.scales[row], *parameters)), codes]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class _Reader:
    """Reads tensors from bytes, one after the other."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.place = data, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        part = self.data[self.place : self.place + size]
        self.place += size
        return part.clone().view(dtype).view(shape)  # a copy: a view needs the alignment of its type


class _Rows:
    """Builds a `Stream` [B, K, N, D] row by row. `means`: keys, which have a mean per channel in integer forms."""

    def __init__(
        self, form: Form, rotate: bool, group: int, exact: int, shape: tuple[int, int, int, int], dtype: torch.dtype,
        device: torch.device, *, means: bool,
    ) -> None:  # fmt: skip
        self.form, self.rotate, self.group = form, rotate, group
        rows, heads, entries, width = shape
        exact = min(exact, entries)
        self.exact = torch.zeros(rows, heads, exact, width, dtype=dtype, device=device)
        entries -= exact
        self.scales: Tensor | None = None
        self.means: Tensor | None = None
        self.steps: Tensor | None = None
        self.centres: Tensor | None = None
        kind = {"none": dtype, "fp8": FP8}.get(form, torch.uint8)
        self.raw = torch.zeros(
            (rows, heads, entries, width), dtype=torch.uint8 if kind == FP8 else kind, device=device
        ).view(kind)
        if form != "none":
            self.scales = torch.ones(rows, heads, dtype=torch.bfloat16, device=device)
        if form in CODE_BITS:
            if means:
                self.means = torch.zeros(rows, heads, width, dtype=torch.bfloat16, device=device)
            parameters = (rows, heads, ceil(entries / group), *([width] if means else []))
            self.steps = torch.zeros(parameters, dtype=torch.uint8, device=device)
            self.centres = torch.zeros(parameters, dtype=torch.int8, device=device)

    def read(self, reader: _Reader, row: int, count: int) -> None:
        _, heads, _, width = self.raw.shape
        exact = min(self.exact.shape[2], count)
        self.exact[row, :, :exact] = reader.take((exact, heads, width), self.exact.dtype).transpose(0, 1)
        count -= exact
        if not count:
            return
        if self.means is not None:
            self.means[row] = reader.take((heads, width), torch.bfloat16)
        if self.scales is not None:
            self.scales[row] = reader.take((heads,), torch.bfloat16)
        for parameter in (self.steps, self.centres):
            if parameter is not None:
                places = ceil(count / self.group)
                found = reader.take((places, heads, *parameter.shape[3:]), parameter.dtype)
                parameter[row, :, :places] = found.transpose(0, 1)
        if self.form in CODE_BITS:
            bits = CODE_BITS[self.form]
            data = reader.take((ceil(count * heads * width * bits / 8),), torch.uint8)
            elements = unpacked_codes(data, count * heads * width, bits).view(count, heads, width)
        else:
            elements = reader.take((count, heads, width), self.raw.dtype)
        self.raw.view(torch.uint8)[row, :, :count] = elements.transpose(0, 1).contiguous().view(torch.uint8)

    def stream(self) -> Stream:
        for name, numbers in (("scales", self.scales), ("means", self.means)):
            if numbers is not None and not bool(torch.isfinite(numbers).all()):
                raise DamagedBlock(f"The {name} of a packed block are not all finite: its bytes are damaged.")
        return Stream(
            self.form, self.rotate, self.raw, self.scales, self.means, self.steps, self.centres, self.group, self.exact
        )
