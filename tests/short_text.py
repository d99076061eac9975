"""A text of 400 short lines: of the embedded one, tokens and windows take longer than a whole run of a tiny model."""

from __future__ import annotations

from pathlib import Path

from pdtrim_pl.data import TextSource

SHORT = TextSource(str(Path(__file__).with_name("short_text.txt")))
