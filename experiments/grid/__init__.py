"""Grids of fine-tuning runs: what is stated in YAML, what it expands to, what it costs, and how it is run."""
