"""Stability twins in batches against a plain PyTorch loop over twins: the same work, in turns, medians.

``python benchmarks/twins.py --out docs/results/twins`` writes the table, ``--cases logistic mlp`` runs some of it,
``--quick`` is a check of seconds.  The plain loop (:mod:`benchmarks.cohort_speed.plain`) keeps the data in memory,
swaps one row in place and trains each twin from x_0.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run the benchmark with the repository's root, not this folder, on the path."""
    root, here = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    from benchmarks.twin_speed.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
