"""Prune transformer blocks of a language model separately for the prefill and the decode stage.

Nothing heavy is imported here, so that the command line and tools that only read plans start at once.
"""

__version__ = "0.1.0"
