"""The shape of the loss of a cell: barriers between experts, and flatness around the base and the average."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from experiments.measure.landscape.flatness import FlatnessOptions, flatness
from experiments.measure.landscape.lines import barriers, line
from experiments.measure.landscape.scores import evaluator, panel
from experiments.measure.subject import Subject
from experiments.studies.scale.points import Tell
from experiments.studies.scale.spec import ScaleSpec

PAIRS = 0x9A1E
"""Names the draw of pairs of experts."""
MEASURES = ("average_filters", "sam")
"""Rise of the loss under noise in units of filter norms (comparable between sizes), and one step of ascent."""


def measure_shape(subject: Subject, spec: ScaleSpec, tell: Tell) -> pd.DataFrame:
    """Barriers of loss and error along lines between experts, and flatness.

    Returns:
        One row per quantity and place: ``quantity`` (``loss_barrier``, ``error_barrier``, ``length``,
        ``average_filters``, ``sam``), ``place`` (pair, ``base`` or ``average``), ``members``, ``value``,
        ``value_low``, ``value_high`` (95 %, over test images; for flatness as
        :mod:`experiments.measure.landscape.sharpness` says), ``loss`` (at the point), ``tier``, ``seed``, ``images``.
    """
    assert spec.landscape is not None
    chosen = spec.landscape
    on = panel(subject, "test", chosen.images, spec.seed)
    judge = evaluator(subject, on, path="plain")
    every = list(itertools.combinations(range(subject.size), 2))
    rng = np.random.default_rng([spec.seed, PAIRS])
    pairs = [every[int(k)] for k in np.sort(rng.permutation(len(every))[: chosen.pairs])]
    rows = []
    for done, (i, k) in enumerate(pairs):
        tell("barriers", done, len(pairs))
        ends = [(subject.names[e], subject.vectors[e]) for e in (i, k)]
        found = barriers([line(judge, ends[0], ends[1], (i, k), points=chosen.points, resamples=200)])
        joint = found[found["task"] == "joint"].iloc[0]
        members = f"{subject.tasks[i]};{subject.tasks[k]}"
        about = {"place": str(joint["line"]), "members": members, "loss": np.nan, "tier": "measured"}
        rows += [
            {
                "quantity": name,
                **about,
                "value": joint[name],
                "value_low": joint[f"{name}_low"],
                "value_high": joint[f"{name}_high"],
            }
            for name in ("loss_barrier", "error_barrier")
        ]
        rows.append(
            {"quantity": "length", **about, "value": joint["length"], "value_low": np.nan, "value_high": np.nan}
        )
    options = FlatnessOptions(
        measures=MEASURES, radius=chosen.sam_radius, filter_noise=chosen.filter_noise, draws=chosen.draws, directions=0
    )
    points = {"base": subject.base, "average": subject.vectors.mean(dim=0)}
    table = flatness(subject, on, points, options=options, seed=spec.seed, progress=tell).to_frame()
    for row in table.to_dict("records"):
        rows.append(
            {
                "quantity": row["measure"],
                "place": row["point"],
                "members": ";".join(subject.tasks),
                "loss": row["loss"],
                "value": row["value"],
                "value_low": row["low"],
                "value_high": row["high"],
                "tier": row["tier"],
            }
        )
    return pd.DataFrame(rows).assign(seed=spec.seed, images=chosen.images)
