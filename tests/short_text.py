"""A text of 220 lines of random words: of the embedded one, tokens and windows take longer than a tiny run."""

from __future__ import annotations

from pathlib import Path

from pdtrim_pl.data import TextSource

SHORT = TextSource(str(Path(__file__).with_name("short_text.txt")))
