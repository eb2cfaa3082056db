"""Measured drift against every form of Theorem 3 on the experts of finished grids: docs/results/drift.

``python benchmarks/drift.py --store mild=FOLDER --store harsh=FOLDER --root DATA --out docs/results/drift``;
grids of embedded data need no ``--root``.  6(d) from the gradient log needs no constants and is taken of every
expert; the forms that need constants of ``--sampled`` experts for each network and regime, drawn by seed before
anything is measured.  ``--log-only`` leaves those out.  What ``drift.csv`` in the folder holds already is not measured
again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

SAMPLE = 0xD21F7
"""Names the draw of the experts whose constants are measured."""
SETTINGS = {
    "samples": 32, "pairs": 8, "curvature_samples": 2, "curvature_iterations": 5, "lanczos": 8, "batches": 1,
    "distances": (0.01,),
}  # fmt: skip
"""Of :func:`experiments.measure.noise.constants.constants_of`: fixed before any constant was seen."""
IMAGES = 32
FLOOR = 1e-3
"""Smallest ratio that the figure shows."""
RECIPE = ("learning_rate", "steps", "batch_size", "momentum", "weight_decay", "sampling")


def main() -> int:
    """Measure, and write the table, the summary and the figure."""
    root, here = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    import pandas as pd
    import torch

    parser = argparse.ArgumentParser(description="Measured drift against every form of Theorem 3.")
    parser.add_argument("--store", action="append", required=True, help="regime=FOLDER, once for each grid")
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: MERGEBOUND_DATA)")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--sampled", type=int, default=2, help="experts of each network and regime with constants")
    parser.add_argument("--log-only", action="store_true", help="6(d) from the log alone")
    parser.add_argument("--tables-only", action="store_true", help="figure and summary of the drift.csv that is there")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.tables_only:
        there = given.out / "drift.csv"
        frames: list[Any] = [pd.read_csv(there)] if there.exists() else []
        done = {(r, d) for f in frames for r, d in zip(f["regime"] + " " + f["form"].str[:12], f["run"], strict=True)}
        stores = [(text.split("=", 1)[0], Path(text.split("=", 1)[1])) for text in given.store]
        for turn in range(1 if given.log_only else given.sampled + 1):  # logs of all, then one expert of each at a time
            for regime, folder in stores:
                for frame in measure(regime, folder, given.root, given.seed, turn, given.sampled, done):
                    frames.append(frame)
                    pd.concat(frames, ignore_index=True).to_csv(there, index=False)
    table = pd.read_csv(given.out / "drift.csv")
    found = summary(table)
    found.to_csv(given.out / "summary.csv", index=False)
    print(found.to_string(index=False))
    figure(table, given.out / "drift.png")
    return 0


def measure(
    regime: str, folder: Path, root: Path | None, seed: int, turn: int, sampled: int, done: set[tuple[str, str]]
) -> Any:
    """Frames of rows that are not done: turn 0 gives 6(d) from the log of every expert, turn k all forms that need
    constants for the k-th of the experts that the seed draws of each network."""
    import numpy as np

    from experiments.engines.workplace import Workplace
    from experiments.measure.noise.constants import constants_of
    from experiments.measure.noise.drift import drift_table, log_table
    from experiments.measure.opening import from_store
    from experiments.store import Store

    log = logging.getLogger(__name__)
    with Store.open(folder, "r") as store:
        runs = store.query("", final=True)
        runs = runs[runs["outcome"] == "finished"].drop_duplicates("digest").set_index("digest").sort_index()
        place = Workplace(store.base, root)
        for architecture, part in runs.groupby("architecture"):
            drawn = part.index[np.random.default_rng([seed, SAMPLE]).choice(len(part), min(sampled, len(part)), False)]
            form = "6(d) gradient log" if turn == 0 else "6(b) noise at the base"
            wanted = list(part.index) if turn == 0 else list(drawn[turn - 1 : turn])
            wanted = [digest for digest in wanted if (f"{regime} {form[:12]}", digest[:8]) not in done]
            size = 8 if turn == 0 else 1
            for digests in (wanted[k : k + size] for k in range(0, len(wanted), size)):
                subject = from_store(store, digests, images=1 if turn == 0 else IMAGES, seed=seed, workplace=place)
                if turn == 0:
                    table = log_table(subject)
                else:
                    table = drift_table(subject, constants_of(subject, seed=seed, **SETTINGS))  # type: ignore[arg-type]
                    table = table[table["form"] != "6(d) gradient log"]
                log.info("%s %s: %s of %s", regime, architecture, form, ", ".join(d[:8] for d in digests))
                yield _named(table, subject, digests, runs, regime)


def _named(table: Any, subject: Any, digests: list[str], runs: Any, regime: str) -> Any:
    """Rows with what was run and the length of what was trained, |x_0|."""
    from experiments.measure.noise.objective import objective_of, path_of

    names = list(subject.names)
    where = [names.index(name) for name in table["expert"]]
    norms = [float(objective_of(subject, j, path_of(subject, j)[0]).theta.double().norm()) for j in range(len(names))]
    about: dict[str, Any] = {
        "regime": regime,
        "architecture": subject.architecture,
        "run": [digests[j][:8] for j in where],
        "task": [subject.tasks[j] for j in where],
        "base_norm": [norms[j] for j in where],
    }
    about |= {name: [runs.loc[digests[j], name] for j in where] for name in RECIPE}
    return table.drop(columns="expert").assign(**about)


def summary(table: Any) -> Any:
    """One row per network, regime, form and part: how many, ratios measured over bound, violations, vacuous bounds.

    Vacuous: the bound is longer than all the weights that were trained, |x_0|.
    """
    import pandas as pd

    rows = []
    for keys, part in table.groupby(["architecture", "regime", "form", "part"], sort=True):
        known = part[part["applies"]]
        ratio = known["ratio"]
        rows.append(
            dict(zip(("architecture", "regime", "form", "part"), keys, strict=True))
            | {
                "experts": len(part),
                "applies": len(known),
                "ratio_smallest": ratio.min(),
                "ratio_median": ratio.median(),
                "ratio_largest": ratio.max(),
                "violated": int(known["violated"].sum()),
                "vacuous": int((known["bound"] > known["base_norm"]).sum()),
                "why_not": "" if len(known) else part["why"].iloc[0],
            }
        )
    return pd.DataFrame(rows)


def figure(table: Any, path: Path) -> None:
    """Ratios measured over bound by form, one panel for each network, colours for regimes; smaller ones than FLOOR are
    triangles there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from experiments.plots import save_png

    forms = [f for f in sorted(table["form"].unique()) if table.loc[table["form"] == f, "applies"].any()]
    networks, regimes = sorted(table["architecture"].unique()), sorted(table["regime"].unique(), reverse=True)
    drawn, axes = plt.subplots(1, len(networks), figsize=(4.6 * len(networks), 3.6), sharey=True, squeeze=False)
    rng = np.random.default_rng([0, SAMPLE])
    for ax, network in zip(axes[0], networks, strict=True):
        for k, regime in enumerate(regimes):
            rows = table[(table["architecture"] == network) & (table["regime"] == regime) & table["applies"]]
            rows = rows[(rows["part"] == "all") & (rows["ratio"] > 0)]
            x = [forms.index(f) + 0.24 * (k - 0.5) + 0.06 * rng.standard_normal() for f in rows["form"]]
            colour = ("#0072b2", "#d55e00")[k % 2]
            shown = rows["ratio"].clip(lower=FLOOR).to_numpy()
            off = shown <= FLOOR
            ax.scatter(np.array(x)[~off], shown[~off], s=12, alpha=0.6, color=colour, label=regime)
            ax.scatter(np.array(x)[off], shown[off], s=20, alpha=0.6, color=colour, marker="v")
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set_yscale("log")
        ax.set_title(network)
        ax.set_xticks(range(len(forms)), [fill(f, 10) for f in forms], fontsize=8)
        ax.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("measured length over bound")
    axes[0][0].legend(frameon=False)
    drawn.tight_layout()
    save_png(drawn, path)
    plt.close(drawn)


if __name__ == "__main__":
    raise SystemExit(main())
