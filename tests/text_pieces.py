"""The text of a whole response, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pdtrim_pl.serving.text import Decode, TextStream


def text_pieces(ids: Iterable[int], decode: Decode, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of token ids, piece by piece, see `TextStream`. Reads no more ids after a stop string."""
    stream = TextStream(decode, stop)
    for token in ids:
        if piece := stream.add(token):
            yield piece
        if stream.stopped:
            return
    if piece := stream.end():
        yield piece
