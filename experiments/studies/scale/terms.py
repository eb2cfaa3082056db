"""The theory's terms of a cell: drift, dispersion, noise, curvature, training risk and the gap of linearisation.

==================  ===================================================================================  =========
``drift``           ``|Delta_j|``, theory.md section 6                                                   measured
``relative_drift``  ``|Delta_j| / |x_0|`` over the shared parameters                                     measured
``cosine``          mean cosine of Delta_j with the other task vectors                                   measured
``dispersion``      ``V = mean_j |M - x_j|^2`` of the average of N experts, section 7                    measured
``expert_risk``     ``F_j(x_j)`` on validation images: what the master bound starts from                 estimated
``noise``           ``sigma_0``: rms noise of single-sample gradients at the base, section 6             estimated
``signal``          ``g_0``: norm of the gradient there                                                  estimated
``curvature``       ``Delta_j' H_j Delta_j / |Delta_j|^2`` at x_j (Gauss-Newton)                         estimated
``cross_to_own``    mean over i of ``Delta_i' H_j Delta_i / Delta_j' H_j Delta_j``: rho of the lambda-law  estimated
``curved``          ``mean_j (1/2) u_j' H_j u_j``, ``u_j = M - x_j``: dispersion in the loss's own units  estimated
``secant_risk``     predicted joint risk of the average, section 8                                       estimated
``tangent_risk``    the same by the tangent at the base                                                  estimated
``average_risk``    its measured loss on the same images                                                 measured
``gap``             ``|log(tangent_risk / secant_risk)|``: how far the network is from linear            estimated
==================  ===================================================================================  =========

Terms of single experts have one row per task (N = 1), those of merges one row per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional

from experiments.measure.curvature.gram import CurvatureGram, curvature_gram
from experiments.measure.landscape.lines import shared_size
from experiments.measure.noise.at_point import noise_at
from experiments.measure.noise.constants import training_sample
from experiments.measure.noise.objective import Point, objective_of
from experiments.measure.predictors.collect import collect_fields
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.subject import Subject
from experiments.studies.scale.cells import Chosen
from experiments.studies.scale.points import Tell
from experiments.studies.scale.spec import ScaleSpec

Floats = NDArray[np.float64]
MEASURED = frozenset({"drift", "relative_drift", "cosine", "dispersion", "average_risk"})

MEMORY = 2**30
"""Bytes of per-sample gradients that are kept."""


def measure_terms(subject: Subject, groups: Sequence[Chosen], spec: ScaleSpec, tell: Tell) -> pd.DataFrame:
    """One row per term and task, or per term and group.

    Args:
        subject: base and all experts of one seed, with calibration images.
        groups: of this seed.
        spec: the study.
        tell: told (stage, done, total).

    Returns:
        Columns ``term``, ``experts`` (N), ``chain``, ``members``, ``value``, ``tier``, ``seed``, ``images``.
    """
    assert spec.terms is not None
    tell("terms: geometry", 0, 4)
    rows = _geometry(subject, groups)
    tell("terms: noise", 1, 4)
    rows += _noise(subject, spec.terms.noise_images, spec.seed)
    tell("terms: curvature", 2, 4)
    gram = curvature_gram(subject, anchors=("own",), images=spec.terms.images, seed=spec.seed)
    rows += _curvature(subject, gram, groups)
    tell("terms: linearisation", 3, 4)
    fields = collect_fields(subject, images=spec.terms.images, kinds=("secant", "tangent_base"), seed=spec.seed)
    rows += _linearisation(subject, fields, groups, spec.terms.images)
    tell("terms", 4, 4)
    frame = pd.DataFrame(rows)
    frame["tier"] = ["measured" if term in MEASURED else "estimated" for term in frame["term"]]
    return frame.assign(seed=spec.seed, images=spec.terms.images)


def _row(term: str, value: float, members: Sequence[str], chain: int = -1) -> dict[str, Any]:
    return {"term": term, "experts": len(members), "chain": chain, "members": ";".join(members), "value": float(value)}


def _geometry(subject: Subject, groups: Sequence[Chosen]) -> list[dict[str, Any]]:
    cut = shared_size(subject)
    deltas = subject.deltas[:, :cut].double()
    gram = (deltas @ deltas.T).numpy()
    lengths = np.sqrt(np.diag(gram))
    scale = float(subject.base[:cut].double().norm())
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = gram / np.outer(lengths, lengths)
    rows = []
    for j, name in enumerate(subject.tasks):
        rows.append(_row("drift", lengths[j], [name]))
        rows.append(_row("relative_drift", lengths[j] / scale if scale > 0 else np.nan, [name]))
        if subject.size > 1:
            rows.append(_row("cosine", float(np.delete(cosines[j], j).mean()), [name]))
    for group in groups:
        inner = gram[np.ix_(group.members, group.members)]
        value = float(np.trace(inner) / group.size - inner.sum() / group.size**2)
        rows.append(_row("dispersion", value, [subject.tasks[i] for i in group.members], group.chain))
    return rows


def _noise(subject: Subject, images: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for j, name in enumerate(subject.tasks):
        head = subject.start_heads[j]
        sample, population = training_sample(subject, j, images, seed)
        at = Point("base", 0, subject.base, subject.heads[j] if head is None else head)
        found = noise_at(
            objective_of(subject, j, at), sample, None, population=population, pairs=2, seed=seed, memory=MEMORY
        )["all"]  # gaps of pairs are not used; gradients that are kept are not computed again
        rows.append(_row("noise", found.sigma.value, [name]))
        rows.append(_row("signal", found.gradient.value, [name]))
    return rows


def _curvature(subject: Subject, gram: CurvatureGram, groups: Sequence[Chosen]) -> list[dict[str, Any]]:
    squares = subject.deltas.double().square().sum(1).numpy()  # over what is merged, as in the forms
    forms = [gram.forms(j)[0] for j in range(subject.size)]
    rows = []
    for j, name in enumerate(subject.tasks):
        own = float(forms[j][j, j])
        rows.append(_row("expert_risk", gram.own_risk(j).value, [name]))
        rows.append(_row("curvature", own / squares[j] if squares[j] > 0 else np.nan, [name]))
        others = np.delete(np.diag(forms[j]), j)
        if len(others):
            rows.append(_row("cross_to_own", float(others.mean() / own) if own > 0 else np.nan, [name]))
    for group in groups:
        weights = np.zeros(subject.size)
        weights[list(group.members)] = 1.0 / group.size
        bends = []
        for j in group.members:
            u = weights - np.eye(subject.size)[j]
            bends.append(0.5 * float(u @ forms[j] @ u))
        rows.append(_row("curved", float(np.mean(bends)), [subject.tasks[i] for i in group.members], group.chain))
    return rows


@torch.no_grad()
def _linearisation(
    subject: Subject, fields: FieldStatistics, groups: Sequence[Chosen], images: int
) -> list[dict[str, Any]]:
    rows = []
    for group in groups:
        members = list(group.members)
        names = [subject.tasks[i] for i in members]
        average = subject.vectors[members].mean(dim=0)
        secants, tangents, measured = [], [], []
        for j in members:
            labels = fields.labels[j]
            values, slopes = fields.of("secant", j), fields.of("tangent_base", j)
            start = values[0]
            secants.append(_loss(start + (values[1:][members] - start).mean(axis=0), labels))
            tangents.append(_loss(start + slopes[members].mean(axis=0), labels))
            logits = subject.networks[j].call(average, subject.calibration[j].images[:images]).double()
            measured.append(_loss(logits.numpy(), labels))
        secant, tangent = float(np.mean(secants)), float(np.mean(tangents))
        rows.append(_row("secant_risk", secant, names, group.chain))
        rows.append(_row("tangent_risk", tangent, names, group.chain))
        rows.append(_row("average_risk", float(np.mean(measured)), names, group.chain))
        rows.append(_row("gap", abs(np.log(tangent / secant)), names, group.chain))
    return rows


def _loss(logits: Floats, labels: NDArray[np.int64]) -> float:
    return float(functional.cross_entropy(torch.from_numpy(np.asarray(logits)), torch.from_numpy(np.asarray(labels))))
