"""Sizing: memory of a process of a run, FLOPs and bytes of a request."""
