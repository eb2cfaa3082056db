"""Measured stability against Theorem 2 over the committed recipes: CSV files for docs/results/stability.

``python benchmarks/stability.py digits8-resnet_bn digits8-vit --out docs/results/stability``; networks of ``npz8`` need
``--root`` (or ``MERGEBOUND_DATA``).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def main() -> int:
    """Measure setups and write their tables."""
    root, here = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    import torch

    from experiments.measure.twins.recipes import recipes, setups
    from experiments.measure.twins.table import compare, comparison_frame, opener, stability_table

    parser = argparse.ArgumentParser(description="Measured stability against Theorem 2.")
    parser.add_argument("setups", nargs="+", choices=list(setups()))
    parser.add_argument("--root", type=Path, help="folder of the data sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="first recipes only, for a trial")
    parser.add_argument("--twins", type=int, help="default: the setup's")
    parser.add_argument("--cache", type=Path, help="folder of bases")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in given.setups:
        table = stability_table(
            recipes(name)[: given.only],
            opener(given.root, cache_folder=given.cache),
            twins=given.twins or setups()[name].twins,
            seed=given.seed,
        )
        found = comparison_frame(compare(table, seed=given.seed))
        print(name)
        print(found.to_string(index=False))
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            table.to_csv(given.out / f"{name}.csv", index=False)
            found.to_csv(given.out / f"{name}-comparison.csv", index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
