"""The pieces of ``benchmarks/cohort.py``."""
