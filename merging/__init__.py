"""Merging of checkpoints in parameter space."""
