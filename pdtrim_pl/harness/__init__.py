"""Scores an exported pair with lm-evaluation-harness. `model` and `__main__` import it; the rest works without it."""
