"""Measured performance: metrics, held-out transfer, normalised performance, and fast paths that are proven close."""
