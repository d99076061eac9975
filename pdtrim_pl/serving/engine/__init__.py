"""Serves many requests at once from a prefill and a decode process, with continuous batching on the decode side."""
