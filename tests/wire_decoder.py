"""The keys and values of one packed block, decoded with numpy alone, as docs/formats.md describes the bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
TYPES = {"float32": np.float32, "float16": np.float16}
Array = np.ndarray[Any, Any]


def decode_block(
    data: bytes, counts: list[int], codec: dict[str, Any], heads: int, width: int, dtype: str
) -> list[tuple[Array, Array]]:
    """Of every row its keys and values, fp32 [positions, heads, width]."""
    reader, rows = Reader(data), []
    for count in counts:
        both = []
        for part in ("keys", "values"):
            rotate = part in codec.get("rotate", ())
            group = codec.get("group", 64) if part == "keys" else 0
            exact = min(codec.get("exact", 0), count)
            first = decode_part(reader, "none", False, 0, (exact, heads, width), dtype)
            rest = decode_part(reader, codec[part], rotate, group, (count - exact, heads, width), dtype)
            both.append(np.concatenate([first, rest]))
        rows.append((both[0], both[1]))
    assert reader.place == len(data)
    return rows


def decode_part(reader: Reader, form: str, rotate: bool, group: int, shape: tuple[int, int, int], dtype: str) -> Array:
    count, heads, width = shape
    if not count:
        return np.zeros(shape, np.float32)
    if form == "none":
        return reader.bf16(shape) if dtype == "bfloat16" else reader.take(shape, TYPES[dtype]).astype(np.float32)
    means = reader.bf16((heads, width)) if group and form in BITS else np.zeros((heads, width), np.float32)
    scales = reader.bf16((heads,))
    if form == "fp8":
        out = e4m3(reader.take(shape, np.uint8)) * scales[:, None]
    else:
        bits, places = BITS[form], -(-count // group) if group else count
        each = (places, heads, width) if group else (places, heads)
        steps, centres = reader.take(each, np.uint8), reader.take(each, np.int8).astype(np.float32)
        largest = scales[:, None] if group else scales
        step = largest * np.ldexp((16 + steps % 16).astype(np.float32), -4 - (steps // 16).astype(np.int32))
        offset = centres * np.float32(2**bits / 64) - np.float32((2**bits - 1) / 2)
        if group:
            step, offset = (np.repeat(each, group, axis=0)[:count] for each in (step, offset))
        else:
            step, offset = step[..., None], offset[..., None]
        codes = unpack(reader.take((-(-count * heads * width * bits // 8),), np.uint8), bits)
        out = (codes[: count * heads * width].reshape(shape).astype(np.float32) + offset) * step + means
    return hadamard(out) if rotate else out


def e4m3(codes: Array) -> Array:
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 7), (codes >> 3 & 15).astype(np.int32), codes & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    return (sign * np.where(exponent == 0, np.ldexp(mantissa * 1.0, -9), normal)).astype(np.float32)


def unpack(data: Array, bits: int) -> Array:
    stream = np.unpackbits(data, bitorder="little")
    whole = stream[: len(stream) // bits * bits].reshape(-1, bits)
    return (whole << np.arange(bits)).sum(axis=1)


def hadamard(x: Array) -> Array:
    size, half = x.shape[-1] & -x.shape[-1], 1
    for _ in range(size.bit_length() - 1):
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        x, half = np.stack([upper + lower, upper - lower], axis=-2).reshape(x.shape), half * 2
    return x * np.float32(1 / np.sqrt(size))


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, shape: tuple[int, ...], kind: Any) -> Array:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        self.place += size
        return np.frombuffer(self.data[self.place - size : self.place], kind).reshape(shape)

    def bf16(self, shape: tuple[int, ...]) -> Array:
        return (self.take(shape, np.uint16).astype(np.uint32) << 16).view(np.float32)
