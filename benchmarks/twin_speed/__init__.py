"""The pieces of ``benchmarks/twins.py``."""
