"""Time to encode and decode keys and values of one block, against the transfer that it saves.

    python benchmarks/encode.py [--json] [--prompt 1024] [--heads 8] [--width 128] [--repeats 5]

One row for each codec: milliseconds to encode (`packed`), to decode (`unpacked`) and to copy the same tensors, and the
link rate below which encoding, sending and decoding one after the other is faster than sending bf16. In the runtime,
encoding and sending run beside the computation of the next block, so this rate is a lower bound. Median of interleaved
repeats; `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from pdtrim_pl.plan import Codec
from pdtrim_pl.plan.codec import Form
from pdtrim_pl.selectors.allocation import codec_of
from pdtrim_pl.wire.codecs import encoded_keys, encoded_values
from pdtrim_pl.wire.packing import packed, unpacked

PARTS = ("encode", "decode")
FORMS: tuple[Form, ...] = ("fp8", "int8", "int4", "int3", "int2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompt", type=int, default=1024, help="positions")
    parser.add_argument("--heads", type=int, default=8, help="key/value heads")
    parser.add_argument("--width", type=int, default=128, help="head dimension")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = rows(options)
    told = {
        "prompt": options.prompt, "heads": options.heads, "width": options.width, "device": options.device,
        "threads": torch.get_num_threads(), "torch": version("torch"), "rows": found,
    }  # fmt: skip
    if options.json:
        print(json.dumps(told))
        return 0
    for row in found:
        encode, decode = (f"{part} {row[part]:8.2f} ms ({row[part] / row['copy']:6.1f} copies)" for part in PARTS)
        print(f"{row['codec']:6s} {row['ratio']:5.2f}x  {encode}  {decode}  pays < {row['pays_below_gbit']:.2f} Gbit/s")
    return 0


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each codec."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, options.heads, options.prompt, options.width)
    keys, values = (torch.randn(shape, generator=generator).to(options.device, torch.bfloat16) for _ in range(2))
    counts = [options.prompt]
    lengths = torch.tensor(counts, device=options.device)
    out = []
    for form in FORMS:
        codec = codec_of(form, form)

        def encode(codec: Codec = codec) -> torch.Tensor:
            return packed(encoded_keys(keys, lengths, codec), encoded_values(values, lengths, codec), counts)

        data = encode()

        def decode(codec: Codec = codec, data: torch.Tensor = data) -> None:
            streams = unpacked(data, counts, codec, options.heads, options.width, torch.bfloat16)
            for stream in streams:
                stream.decoded().to(torch.bfloat16)

        def copy() -> None:
            for part in (keys, values):
                part.clone()

        encoding, decoding, copying = interleaved([encode, decode, copy], options.repeats, options.device)
        full = keys.nbytes + values.nbytes
        out.append({
            "codec": form, "ratio": full / len(data), "encode": encoding * 1e3, "decode": decoding * 1e3,
            "copy": copying * 1e3,
            "pays_below_gbit": (full - len(data)) * 8 / (encoding + decoding) / 1e9,
        })  # fmt: skip
    return out


def interleaved(calls: list[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Median seconds of each call; the calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in times]


if __name__ == "__main__":
    raise SystemExit(main())
