"""Every curvature of a subject at once, as tables: what ``mergebound measure curvature`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from experiments.measure.curvature.at_points import Progress, point_tables, smoothness_tables
from experiments.measure.curvature.coordinates import Coordinates, about_coordinates, check_coordinates
from experiments.measure.curvature.density import SpectralDensity
from experiments.measure.curvature.directional import SegmentCurvature, predict_from_segments, segment_curvature
from experiments.measure.curvature.gram import CurvatureGram, curvature_gram
from experiments.measure.curvature.gram_forms import Anchor
from experiments.measure.curvature.number import Number
from experiments.measure.curvature.operators import Kind, check_kind, check_precision
from experiments.measure.curvature.risk import BATCH, Part, task_risk
from experiments.measure.curvature.traces import Method
from experiments.measure.subject import Subject
from merging.statistics import Coefficients
from theory.errors import MergeboundError, nearest

if TYPE_CHECKING:
    import pandas as pd

Wanted = Literal["spectrum", "trace", "density", "segments", "gram", "smoothness", "precision"]
WANTED: tuple[Wanted, ...] = get_args(Wanted)
USUAL: tuple[Wanted, ...] = ("spectrum", "trace", "segments", "gram", "smoothness")


@dataclass(frozen=True)
class Options:
    """What to measure, and with how much work.

    Attributes:
        wanted: parts of the report.
        kind: curvature of spectrum, trace, density and smoothness: ``hessian`` or another of ``operators.KINDS``.
        coordinates: of these four: ``trained`` (parameters; running statistics stay at the point's values, as no
            gradient moves them) or ``merged`` (running statistics are differentiated, too).  Segments, Gram matrices
            and precision are over all merged coordinates: there running statistics do move.
        gram_kind: curvature of the Gram matrices.
        by: coefficients of the Gram matrices: ``all``, ``layer`` or ``tensor``.
        anchors: of the Gram matrices.
        eigenvalues: how many at the top.
        steps: Lanczos products.
        probes: of the density.
        products: of a trace.
        trace_method: its estimator; layers get theirs with ``hutchinson``.
        points: sampled on each segment.
        batches, batch_size: mini-batches for smoothness; 0 batches leaves them out.
        head: spectrum, trace and density in (merged coordinates, head j).
        part, images: which images, how many at most.
        batch: images at a time.
        seed: names every draw.
    """

    wanted: tuple[str, ...] = USUAL
    kind: Kind = "hessian"
    coordinates: Coordinates = "trained"
    gram_kind: Kind = "gauss_newton"
    by: str = "all"
    anchors: tuple[Anchor, ...] = ("own", "average")
    eigenvalues: int = 1
    steps: int = 30
    probes: int = 2
    products: int = 24
    trace_method: Method = "hutchinson"
    points: int = 5
    batches: int = 0
    batch_size: int = 16
    head: bool = False
    part: Part = "calibration"
    images: int | None = None
    batch: int = BATCH
    seed: int = 0


@dataclass(frozen=True, eq=False)
class CurvatureReport:
    """Tables by name, and what they were made from; parts that were not asked for are empty or ``None``.

    ``coefficients`` minimise the curvature prediction: the merging method ``curvature_optimal`` takes them.
    """

    tables: dict[str, pd.DataFrame]
    gram: CurvatureGram | None
    coefficients: Coefficients | None
    segments: tuple[SegmentCurvature, ...]
    densities: tuple[SpectralDensity, ...]
    notes: tuple[str, ...]
    seed: int
    tier: str = "estimated"


def measure_curvature(
    subject: Subject, options: Options | None = None, *, progress: Progress | None = None
) -> CurvatureReport:
    """Measure what was asked for at each expert, on the segments to the average, and for the group.

    Raises:
        MergeboundError: unknown parts, or what the measurements raise.
    """
    o = options or Options()
    for name in o.wanted:
        if name not in WANTED:
            raise MergeboundError(f"part {name!r}: {nearest(name, WANTED)}")
    check_kind(o.kind)
    check_kind(o.gram_kind)
    check_coordinates(o.coordinates)
    tell = progress or (lambda stage, done, total: None)
    tables: dict[str, pd.DataFrame] = {}
    notes: list[str] = []
    densities: tuple[SpectralDensity, ...] = ()
    segments: tuple[SegmentCurvature, ...] = ()
    gram, found = None, None
    if {"spectrum", "trace", "density", "smoothness"} & set(o.wanted):
        notes += about_coordinates(subject, o.coordinates)
    if {"spectrum", "trace", "density"} & set(o.wanted):
        densities = point_tables(subject, o, tables, tell)
    if "segments" in o.wanted:
        segments = _segments(subject, o, tables, tell)
        notes.append("maxima over sampled points of a segment err low: curvature between the points is not known")
    if "gram" in o.wanted:
        gram = curvature_gram(
            subject, anchors=o.anchors, kind=o.gram_kind, by=o.by, part=o.part, images=o.images, batch=o.batch,
            seed=o.seed, progress=tell,
        )  # fmt: skip
        found = _group(gram, tables)
        notes.append("intervals cover other images, not the quadratic model's own error (see the segments)")
    if "smoothness" in o.wanted:
        smoothness_tables(subject, o, tables, tell)
        notes.append("a network has no global L: only the head's bound, with the other layers fixed, is certified")
    if "precision" in o.wanted:
        _precision(subject, o, tables)
    notes += _without_limit(tables, o.steps)
    return CurvatureReport(tables, gram, found, segments, densities, tuple(notes), o.seed)


def _without_limit(tables: Mapping[str, pd.DataFrame], steps: int) -> list[str]:
    """Says so where Lanczos was too short for a probable limit, which is infinite then (null in JSON)."""
    columns = [
        tables[name].loc[:, [c for c in tables[name].columns if c.endswith("limit")]].to_numpy(dtype=float)
        for name in ("eigenvalues", "smoothness")
        if name in tables
    ]
    if not any(np.isinf(values).any() for values in columns):
        return []
    return [
        f"some limits are missing (inf; null with --json): {steps} Lanczos steps are too few for one; raise --steps"
    ]


def _segments(
    subject: Subject, o: Options, tables: dict[str, pd.DataFrame], tell: Progress
) -> tuple[SegmentCurvature, ...]:
    """x_0 to x_j, and x_j to the average, with the predictions for the average."""
    import pandas as pd

    average = subject.vectors.mean(dim=0)
    rows, points, toward = [], [], []
    for j, name in enumerate(subject.names):
        tell("segments", j, subject.size)
        risk = task_risk(subject, j, part=o.part, images=o.images, seed=o.seed, batch=o.batch)
        ends = {
            "base to expert": (subject.base, subject.vectors[j]),
            "expert to average": (subject.vectors[j], average),
        }
        for label, (start, end) in ends.items():
            found = segment_curvature(risk, start, end, points=o.points)
            rows.append(
                {
                    "task": name,
                    "segment": label,
                    "length": found.length,
                    **found.largest().row("largest_curvature"),
                    **found.largest(gauss_newton=True).row("largest_gauss_newton"),
                    **found.upper().row("A"),
                    **found.from_slopes().row("Lambda"),
                    "tier": found.tier,
                    "seed": o.seed,
                }
            )
            points.append(found.to_frame().assign(segment=label))
        toward.append(found)
    tables["segments"] = pd.DataFrame(rows)
    tables["segment_points"] = pd.concat(points, ignore_index=True)
    predicted = predict_from_segments(toward)
    measured = [s.losses[-1] for s in toward]
    error = float(np.sqrt(sum(v.var(ddof=1) / len(v) for v in measured)) / len(measured))
    truth = Number.normal(float(np.mean([v.mean() for v in measured])), error, "images", o.seed)
    named = {
        "curvature at the experts": predicted.endpoint,
        "curvature on the segment": predicted.segment,
        "slopes on the segment": predicted.slopes,
        "slope and curvature": predicted.taylor,
        "evaluated": truth,
    }
    tables["average"] = pd.DataFrame(
        [{"from": k, **n.row("risk"), "tier": n.tier, "seed": n.seed} for k, n in named.items()]
    )
    return tuple(toward)


def _group(gram: CurvatureGram, tables: dict[str, pd.DataFrame]) -> Coefficients:
    """The Gram matrices, and the coefficients that they lead to."""
    import pandas as pd

    tables["gram"] = gram.to_frame()
    coefficients, optimum = gram.optimal()
    n = gram.size
    scale = gram.best_scale()
    points = {
        "average": np.full(n, 1 / n),
        f"task arithmetic {scale.value:.3g}": np.full(n, scale.value),
        "curvature_optimal": optimum.alpha,
    }
    rows = []
    for label, alpha in points.items():
        risk = gram.predict(alpha).number()
        shown = alpha.reshape(n, -1).mean(axis=1)
        row = {"merge": label, **risk.row("predicted_risk"), "tier": gram.tier, "seed": gram.seed}
        rows.append(row | {f"alpha {name}": float(a) for name, a in zip(gram.experts, shown, strict=True)})
    tables["coefficients"] = pd.DataFrame(rows)
    clipped = [
        {"task": name, "anchor": anchor, "negative_share": float(share), "kind": gram.kind, "tier": gram.tier}
        for j, name in enumerate(gram.experts)
        for anchor, share in zip(gram.anchors, gram.negative_share(j), strict=True)
    ]
    tables["clipped"] = pd.DataFrame(clipped).assign(seed=gram.seed)
    return coefficients


def _precision(subject: Subject, o: Options, tables: dict[str, pd.DataFrame]) -> None:
    import pandas as pd

    rows = []
    for j, name in enumerate(subject.names):
        options = {"part": o.part, "images": o.images, "seed": o.seed, "batch": o.batch}
        pair = [task_risk(subject, j, dtype=t, **options) for t in (torch.float32, torch.float64)]  # type: ignore[arg-type]
        kinds: Sequence[Kind] = ("hessian", "gauss_newton")
        for kind in kinds:
            found = check_precision(pair[0], pair[1], subject.vectors[j], kind, seed=o.seed)
            rows.append({"task": name, **vars(found)})
    tables["precision"] = pd.DataFrame(rows)
