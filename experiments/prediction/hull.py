"""``risk_optimal`` between base and experts: coefficients that are nonnegative and sum to at most one.

There running variances cannot become negative.  Both entries were added to the comparison after its first results had
been looked at: one coefficient per expert first (stage ``hull``), one per expert and block of layers last (stage
``hull_layers``).  Neither has a choice that could be fitted to those results: images, blocks of layers, objective and
groups are those of the entries without the hull.
"""

from __future__ import annotations

import time
from typing import Any

from experiments.measure.layerwise import risk_optimal_coefficients
from experiments.measure.predictors.zoo import ZOO
from experiments.prediction.bank import Bank
from experiments.prediction.compare import LAYERED, Collected, bank_seconds, layer_statistics
from experiments.prediction.draws import Pool, StudyGroup, group_columns
from experiments.prediction.measuring import form, measure_sets
from experiments.prediction.spec import StudySpec
from experiments.spec import MethodSpec
from merging.statistics import Coefficients
from theory.function_space import Optimum, minimise_risk

Row = dict[str, Any]


def hull_rows(spec: StudySpec, pool: Pool, bank: Bank, group: StudyGroup) -> list[Row]:
    """``risk_optimal`` in the hull with one coefficient per expert: one row per objective of the comparison."""
    assert spec.comparison is not None
    stats = bank.fields(list(group.members))
    rows: list[Row] = []
    for name in spec.comparison.objectives:
        started = time.process_time()
        optimum = minimise_risk(ZOO[name].fields(stats), hull=True)
        spent = time.process_time() - started + bank_seconds(bank, name, len(group.members))
        weights = Coefficients(tuple(float(v) for v in optimum.alpha))
        rows.append(_measured(spec, pool, bank, group, f"risk_optimal_{name}_hull", weights, optimum, spent))
    return rows


def hull_layer_rows(spec: StudySpec, pool: Pool, bank: Bank, group: StudyGroup, collected: Collected) -> list[Row]:
    """``risk_optimal`` in the hull of every block of layers: the blocks, images and objective (the tangent at the base)
    of ``risk_optimal_layers``.

    ``seconds`` hold the Jacobian products where this group is the first of its pool to ask for them.
    """
    assert spec.comparison is not None
    if not spec.comparison.layer_groups:
        return []
    members = list(group.members)
    started = time.process_time()
    layered = layer_statistics(bank, members, bank.fields(members), collected, spec.comparison.layer_images)
    coefficients, optimum = risk_optimal_coefficients(layered, "tangent", hull=True)
    spent = time.process_time() - started
    return [_measured(spec, pool, bank, group, f"{LAYERED}_hull", coefficients, optimum, spent)]


def _measured(
    spec: StudySpec,
    pool: Pool,
    bank: Bank,
    group: StudyGroup,
    name: str,
    coefficients: Coefficients,
    optimum: Optimum,
    seconds: float,
) -> Row:
    """Merge with these coefficients, and measure on test images."""
    material, members = bank.material, list(group.members)
    formed = form(material, members, MethodSpec(name="risk_optimal"), spec.seed, **coefficients.settings())
    found = measure_sets(material, formed.vector, members, [material.test])[0]
    return {
        **group_columns(pool, group, material.names, spec.seed),
        "method": name,
        "measured_loss": found.loss,
        "measured_accuracy": found.accuracy,
        "predicted": optimum.risk,
        "alpha": ";".join(f"{v:.4f}" for v in optimum.alpha),
        "seconds": seconds + formed.seconds,
        "tier": "measured",
    }
