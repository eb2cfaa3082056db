"""Cohorts of experts against a plain PyTorch loop over the experts: the same work, in turns, medians.

``python benchmarks/cohort.py`` prints the table; ``--out docs/results/cohort`` writes it too, ``--quick`` is a check of
seconds, ``--cases mlp resnet8-bn`` runs some of it (with ``--out``, the other rows of the folder stay).  The plain loop
is what a good engineer would write (:mod:`benchmarks.cohort_speed.plain`); the cohort is trained in the way that the
planner's probe chooses.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run the benchmark with the repository's root, not this folder, on the path: ``merging.py`` lies in it."""
    root, here = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    from benchmarks.cohort_speed.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
