"""Symbolic and numeric bounds on the risk of merged models."""
