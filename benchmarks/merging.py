"""What merging files costs: this project, mergekit and FusionBench on the same files, and the floor.

``make bench-peers`` installs the two others into an environment of their own and runs everything;
``python benchmarks/merging.py --quick`` is a check of seconds.  The work is in ``benchmarks/merge_speed/``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run the benchmark with the repository's root, not this folder, on the path: this file is called ``merging``."""
    root, here = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    from benchmarks.merge_speed.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
