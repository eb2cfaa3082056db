"""What ``benchmarks/inputs.py`` consists of."""
