"""Checkpoints: what a run saves to be continued. They are written atomically and checked when they are read."""
