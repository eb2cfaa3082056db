"""One row per merge: what every predictor said, and what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from experiments.measure.function_space import GroupStatistics, MergePoint, price, project, trivial
from experiments.measure.predictors.certificates import output_certificate, remainder_certificate
from experiments.measure.predictors.kinds import KINDS, PRODUCT
from experiments.measure.predictors.predictor import Predictor
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import predictors
from experiments.measured import Measured
from experiments.prediction.bank import Bank
from experiments.prediction.draws import Pool, StudyGroup, group_columns
from experiments.prediction.material import features
from experiments.prediction.measuring import Formed, form, measure_sets, own_measured, per_image, reestimated, summary
from experiments.prediction.spec import StudySpec, label
from theory.function_space import Array, cross_entropy, joint_standard_error, predict_from_logits

Row = dict[str, Any]
LOCAL = ("secant", "tangent_base", "secant_tangent")
"""Predictors whose logits are kept per task, for tables by task."""
CERTIFIED = ("secant_tangent", "pairs", "pairs_tangent", "pairs_halves")
"""Predictors around which certificates are made: how far the others are from them, and how far they are from x_j."""
SELF = ("anchored", "anchored_tangent", "pairs_average")
"""Predictors that evaluate the average of the group."""


def merge_rows(spec: StudySpec, pool: Pool, bank: Bank, group: StudyGroup, known: dict[int, Measured]) -> list[Row]:
    """Merge one group with every method, predict each merge from calibration images, measure it on test images.

    Test images number 0, 2, ... and 1, 3, ... are also reported apart, for what is fitted on some experts and some
    images and judged on other experts and other images.

    Args:
        known: measurements of single experts, filled as they are made.
    """
    material, members = bank.material, list(group.members)
    size = len(members)
    average = material.vectors[members].mean(dim=0)
    averages = {
        task: features(material, average, material.calibration[task].images)
        for task in dict.fromkeys(material.tasks[j] for j in members)
    }
    stats = bank.fields(members, averages)
    chosen = predictors(None, stats)
    plain = _plain(bank, stats)
    own = own_measured(material, members, known)
    base = measure_sets(material, material.origin, members, [material.test])[0]
    rows = []
    for method in spec.methods:
        if not method.merges(size):
            continue
        formed = form(material, members, method, spec.seed)
        point, products = merge_point(bank, members, formed)
        images, same_images = per_image(material, formed.vector, members, [material.test, material.calibration])
        measured, same = summary(images), summary(same_images)
        even, odd = summary(images, slice(0, None, 2)), summary(images, slice(1, None, 2))
        row: Row = {
            **group_columns(pool, group, material.names, spec.seed),
            "tasks": ";".join(material.tasks[j] for j in members),
            "method": method.name,
            "settings": label(method),
            "measured_loss": measured.loss,
            "measured_loss_calibration": same.loss,
            "measured_accuracy": measured.accuracy,
            "measured_se": measured.standard_error,
            "measured_loss_even": even.loss,
            "measured_loss_odd": odd.loss,
            "measured_accuracy_even": even.accuracy,
            "measured_accuracy_odd": odd.accuracy,
            "measured_by_task": ";".join(f"{v:.6g}" for v in measured.losses),
            "expert_loss": own.loss,
            "expert_accuracy": own.accuracy,
            "base_loss": base.loss,
            "base_accuracy": base.accuracy,
            "merging_cost": measured.loss - own.loss,
            "expert_loss_calibration": float(stats.own_risks().mean()),
            "base_loss_calibration": float(stats.base_risks().mean()),
            "tier": "estimated",
        }
        row |= certificates(plain, point) | trivial(plain, point) | zoo_columns(chosen, stats, point, products)
        row |= _seconds(bank, chosen, size, point.base_residual is None, formed)
        if method.name in spec.reestimate:
            again = reestimated(material, formed.vector, members)
            if again is not None:
                found = measure_sets(material, again, members, [material.test])[0]
                row |= {"reestimated_loss": found.loss, "reestimated_accuracy": found.accuracy}
        rows.append(row)
    return rows


def merge_point(bank: Bank, members: list[int], formed: Formed) -> tuple[MergePoint, list[Array] | None]:
    """A merge as predictions see it, with J_j(x_0) r on every task where it is not linear."""
    material = bank.material
    away = (formed.vector - material.vectors[members]).double()
    dispersion = float(away.square().sum(dim=1).mean())
    if formed.alpha is not None:
        return MergePoint(formed.alpha, None, None, dispersion), None
    alpha, rest = project(formed.vector - material.origin, material.deltas[members])
    products = [_product(bank, rest, j) for j in members]
    return MergePoint(alpha, tuple(products), None, dispersion), products


def _product(bank: Bank, direction: Tensor, j: int) -> Array:
    material = bank.material
    images = material.calibration[material.tasks[j]].images
    found = material.backbone.products(material.origin, direction[None], images)[0]
    return np.asarray(material.readouts[j].products(found).double().numpy())


def _plain(bank: Bank, stats: FieldStatistics) -> GroupStatistics:
    """The same statistics in the form that certificates and trivial predictors take."""
    rows = range(stats.size)
    own = tuple(stats.of("tangent_own", j) for j in rows) if "tangent_own" in stats.kinds else ()
    return GroupStatistics(
        stats.labels,
        tuple(stats.base_logits(j) for j in rows),
        tuple(stats.expert_logits(j) for j in rows),
        tuple(stats.of("tangent_base", j) for j in rows),
        own,
        stats.gram.sum(axis=0),
        stats.sources,
    )


def certificates(stats: GroupStatistics, point: MergePoint) -> Row:
    """Certificates and curvature predictions (those of the function space come from the zoo), and ``se_secant``."""
    kept = {}
    for name, value in price(stats, point).items():
        if name.startswith(("cert_", "se_")) or name.startswith("pred_curvature"):
            kept[name] = value
    return kept


def zoo_columns(
    chosen: list[Predictor], stats: FieldStatistics, point: MergePoint, products: list[Array] | None
) -> Row:
    """``pred_<name>`` of every predictor, with the standard error of the middle of the bracket.

    A merge that is not linear is taken at its projection, plus its residual's product for predictors that take it.
    """
    out: Row = {}
    known: dict[str, list[Array]] = {}
    for predictor in chosen:
        logits = [field.at(point.alpha) for field in predictor.fields(stats)]
        if products is not None and predictor.residual == "base":
            logits = [h + r for h, r in zip(logits, products, strict=True)]
        known[predictor.name] = [h[None] for h in logits]
        found = predict_from_logits(logits, stats.labels)
        out[f"pred_{predictor.name}"] = float(found.risk)
        if predictor.name in LOCAL:
            out[f"by_task_{predictor.name}"] = ";".join(f"{v:.6g}" for v in found.per_task)
            losses = [cross_entropy(h, y) for h, y in zip(logits, stats.labels, strict=True)]
            out[f"se_{predictor.name}"] = joint_standard_error(losses, stats.sources)
    for name in CERTIFIED:
        if name in known:
            others = [logits for other, logits in known.items() if other != name and other not in SELF]
            remainder = remainder_certificate(stats, known[name], others)
            out[f"cert_remainder_{name}"] = float(remainder.upper[0])
            out[f"cert_output_{name}"] = float(output_certificate(stats, known[name], labelled=True).upper[0])
    return out


def _seconds(bank: Bank, chosen: list[Predictor], size: int, linear: bool, formed: Formed) -> Row:
    """Processor seconds to price one merge with nothing known, from measured unit prices, against evaluating it on as
    many images; vector arithmetic on checkpoints counts as nothing."""
    by_kind = bank.group_seconds(size)
    once = bank.seconds["secant"]
    residual = 0.0 if linear else size * bank.seconds["tangent_base"]
    out: Row = {"seconds_measure": formed.seconds + size * once, "seconds_forward": once}
    out["seconds_product"] = bank.seconds["tangent_base"]
    for predictor in chosen:
        extra = residual if predictor.residual == "base" else 0.0
        out[f"seconds_{predictor.name}"] = sum(by_kind[kind] for kind in predictor.needs) + extra
    own = by_kind.get("tangent_own", size * size * PRODUCT * once) if "tangent_own" in KINDS else 0.0
    out["seconds_output"] = out["seconds_curvature_endpoint"] = size * once + own
    out["seconds_bracket"] = by_kind["secant"] + by_kind["tangent_base"]
    out["seconds_expert_risk"] = out["seconds_base_risk"] = size * once
    out["seconds_logit_mean"] = size * size * once
    return out | dict.fromkeys(("seconds_task_vector_norm", "seconds_V", "seconds_cosine", "seconds_N"), 0.0)
