"""Images per second into the network, next to the images per second that training consumes.

``python benchmarks/inputs.py`` prints the tables; ``--out docs/results/inputs`` writes them too, ``--quick`` is a check
of seconds.  Photographs are made on the fly (JPEG, 256 to 500 pixels a side).  Training runs on one thread; "attached"
is the time of training steps fed by the loader over the time of the same steps on one repeated batch, the two taking
turns, medians of the ratios of neighbouring turns.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Run the benchmark with the repository's root on the path."""
    root = str(Path(__file__).resolve().parents[1])
    sys.path[:] = [root, *(entry for entry in sys.path if entry != root)]
    from benchmarks.input_speed.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
