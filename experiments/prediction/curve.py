"""How predictions change with the number of calibration images, and what pricing many coefficients costs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from experiments.measure.layerwise import whole_model
from experiments.measure.predictors.kinds import KINDS
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import predictors
from experiments.prediction.bank import Bank
from experiments.prediction.draws import Pool, StudyGroup, group_columns
from experiments.prediction.material import Material, features
from experiments.prediction.measuring import linear_coefficients
from experiments.prediction.spec import StudySpec, label
from experiments.tasks.types import Split
from theory.function_space import Array, predict_risk

Row = dict[str, Any]
SUBSETS = 0x5AB5
"""Names the stream of subsets: ``default_rng([seed, SUBSETS])``."""
PRICED = 1000
"""Coefficient vectors that the price list prices at once."""


def curve_rows(
    spec: StudySpec, pool: Pool, material: Material, many: dict[str, Split], group: StudyGroup, table: list[Row]
) -> list[Row]:
    """Predictions of one group's linear merges from few and from many calibration images.

    Args:
        material: experts.
        many: as many calibration images of each task as the longest entry asks for, or all that there are.
        table: this group's rows of the main table, for the measured test losses.
    """
    wanted = spec.curve
    assert wanted is not None
    members = list(group.members)
    stats = _collect(material, many, members)
    least = min(stats.images)
    rows: list[Row] = []
    merges = {row["settings"]: row for row in table}
    for count in wanted.images:
        repeats = min(wanted.repeats, max(1, least // count)) if count <= least else 1
        for draw in range(repeats):
            some = _subset(stats, count, draw, spec.seed)
            for method in spec.methods:
                alpha = linear_coefficients(method, len(members))
                if alpha is None or label(method) not in merges:
                    continue
                measured = merges[label(method)]
                for predictor in predictors(None, some):
                    rows.append(
                        {
                            **group_columns(pool, group, material.names, spec.seed),
                            "method": method.name,
                            "images": count,
                            "images_used": float(np.mean(some.images)),
                            "draw": draw,
                            "predictor": predictor.name,
                            "predicted": float(predict_risk(predictor.fields(some), alpha).risk),
                            "measured_loss": measured["measured_loss"],
                            "tier": "estimated",
                        }
                    )
    return rows


def _subset(stats: FieldStatistics, count: int, draw: int, seed: int) -> FieldStatistics:
    """The ``draw``-th of disjoint subsets of ``count`` images; a task with fewer gives all that it has.

    The order in which images are taken is drawn once by the seed, so that subsets do not depend on each other's number.
    """
    chosen = []
    for images in stats.images:
        order = np.random.default_rng([seed, SUBSETS]).permutation(images)
        chosen.append(order if count >= images else order[draw * count : (draw + 1) * count])
    data = tuple({kind: v[:, rows] for kind, v in one.items()} for one, rows in zip(stats.data, chosen, strict=True))
    return FieldStatistics(
        stats.names,
        stats.groups,
        tuple(y[rows] for y, rows in zip(stats.labels, chosen, strict=True)),
        data,
        stats.gram,
        tuple(s[rows] for s, rows in zip(stats.sources, chosen, strict=True)),
        stats.tasks,
    )


@torch.no_grad()
def _collect(material: Material, many: dict[str, Split], members: list[int]) -> FieldStatistics:
    """Secant, pairs, halves and tangents at the base of one group on many images."""
    deltas = material.deltas[members]
    size = len(members)
    first, second = np.triu_indices(size, 1)
    halves = [material.origin + 0.5 * d for d in deltas]
    pairs = [material.origin + 0.5 * (deltas[i] + deltas[k]) for i, k in zip(first, second, strict=True)]
    data: list[dict[str, Array]] = []
    for j in members:
        split, head = many[material.tasks[j]], material.readouts[j]

        def logits(points: Any, split: Split = split, head: Any = head) -> Array:
            rows = [head.logits(features(material, point, split.images)).double().numpy() for point in points]
            return np.stack(rows)

        slopes = [material.backbone.products(material.origin, deltas, part) for part in torch.split(split.images, 128)]
        found = {
            "secant": logits([material.origin, *material.vectors[members]]),
            "halves": logits(halves),
            "pairs": logits(pairs),
            "tangent_base": head.products(torch.cat(slopes, dim=1)).double().numpy(),
        }
        data.append({kind: found[kind] for kind in KINDS if kind in found})
    wide = deltas.double()
    return FieldStatistics(
        tuple(material.names[j] for j in members),
        whole_model(material.backbone.space.names),
        tuple(many[material.tasks[j]].labels.numpy() for j in members),
        tuple(data),
        (wide @ wide.T).numpy()[None],
        tuple(many[material.tasks[j]].source for j in members),
        tuple(material.tasks[j] for j in members),
    )


def price_rows(spec: StudySpec, pool: Pool, bank: Bank, group: StudyGroup) -> list[Row]:
    """What each predictor costs for one group: processor seconds to collect and, per coefficient vector, to price.

    ``seconds_measure`` evaluates one merge on as many calibration images (without forming it), ``break_even`` is the
    number of coefficient vectors from which on predicting is cheaper than evaluating each merge; infinite where
    pricing one takes longer than evaluating it.
    """
    members = list(group.members)
    stats = bank.fields(members)
    size = len(members)
    alphas = np.random.default_rng([spec.seed, SUBSETS]).uniform(0.0, 1.0, (PRICED, size))
    seconds = bank.group_seconds(size)
    evaluate = size * bank.seconds["secant"]
    rows = []
    for predictor in predictors(None, stats):
        fields = predictor.fields(stats)
        started = time.process_time()
        for part in np.split(alphas, 10):
            predict_risk(fields, part)
        each = (time.process_time() - started) / PRICED
        collect = sum(seconds[kind] for kind in predictor.needs)
        rows.append(
            {
                "regime": pool.key.regime,
                "architecture": pool.key.architecture,
                "N": size,
                "predictor": predictor.name,
                "images": int(np.mean(stats.images)),
                "seconds_collect": collect,
                "seconds_price": each,
                "seconds_measure": evaluate,
                "break_even": float(np.ceil(collect / (evaluate - each))) if evaluate > each else float("inf"),
                "tier": "measured",
                "seed": spec.seed,
            }
        )
    return rows
