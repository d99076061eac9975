"""Measure the quality and the speed of a model under a plan and a policy."""
