"""Evaluation: the path that is chosen on this machine against a plain float32 loop, with the accuracy of both.

``python benchmarks/evaluation.py --quick`` is a check of seconds.  The work is in ``benchmarks/evaluation_speed/``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run the benchmark with the repository's root, not this folder, on the path: ``merging.py`` lies in it."""
    root, here = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    from benchmarks.evaluation_speed.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
