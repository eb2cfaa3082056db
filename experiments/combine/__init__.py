"""Merges of the experts of a finished grid: groups, thousands of merges without merged checkpoints, and effects."""
