"""Curvature at points in the coordinates that were trained: spectra, traces, densities and smoothness as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.measure.curvature.coordinates import coordinates
from experiments.measure.curvature.density import SpectralDensity, spectral_density
from experiments.measure.curvature.global_smoothness import global_smoothness
from experiments.measure.curvature.lanczos import both_ends, extreme_eigenvalues
from experiments.measure.curvature.operators import curvature_operator
from experiments.measure.curvature.risk import Part, full_point, task_risk
from experiments.measure.curvature.smoothness import batch_smoothness, segment_smoothness
from experiments.measure.curvature.traces import stochastic_trace
from experiments.measure.subject import Subject

if TYPE_CHECKING:
    import pandas as pd

    from experiments.measure.curvature.report import Options

Progress = Callable[[str, int, int], None]


def point_tables(
    subject: Subject, o: Options, tables: dict[str, pd.DataFrame], tell: Progress
) -> tuple[SpectralDensity, ...]:
    """At each expert: ``eigenvalues``, ``traces`` and ``density``, into ``tables``.

    Raises:
        MergeboundError: what the measurements raise.
    """
    import pandas as pd

    rows, traces, curves, densities = [], [], [], []
    for j, name in enumerate(subject.names):
        tell("curvature at the experts", j, subject.size)
        risk = task_risk(subject, j, part=o.part, images=o.images, seed=o.seed, head=o.head, batch=o.batch)
        point = full_point(subject, j, subject.vectors[j]) if o.head else subject.vectors[j]
        columns = coordinates(subject, o.coordinates, risk.size)
        operator = curvature_operator(risk, point, o.kind, columns=columns, seed=o.seed)
        if "spectrum" in o.wanted:
            low, high = both_ends(operator, steps=o.steps, seed=o.seed)
            if o.eigenvalues > 1:
                high = extreme_eigenvalues(operator, o.eigenvalues, steps=o.steps, seed=o.seed)
            rows += [
                e.to_frame().assign(task=name, end=e.which, kind=o.kind, coordinates=o.coordinates) for e in (high, low)
            ]
        if "trace" in o.wanted:
            parts = _layers(subject, columns) if o.trace_method == "hutchinson" else None
            found = stochastic_trace(operator, o.products, method=o.trace_method, parts=parts, seed=o.seed)
            traces.append(
                found.to_frame().assign(task=name, kind=o.kind, coordinates=o.coordinates, method=o.trace_method)
            )
        if "density" in o.wanted:
            density = spectral_density(operator, steps=o.steps, probes=o.probes, seed=o.seed)
            densities.append(density)
            curves.append(
                density.curve().assign(
                    task=name, kind=o.kind, coordinates=o.coordinates, tier=density.tier, seed=o.seed
                )
            )
    for key, frames in (("eigenvalues", rows), ("traces", traces), ("density", curves)):
        if frames:
            table = pd.concat(frames, ignore_index=True)
            tables[key] = table[["task", *(c for c in table.columns if c != "task")]]
    return tuple(densities)


def _layers(subject: Subject, columns: Tensor | None) -> dict[str, npt.NDArray[np.int64]]:
    """Places of every layer's coordinates among the operator's (those of merged coordinates come first)."""
    found = {group.name: subject.columns(group) for group in subject.layers("layer")}
    if columns is not None:
        found = {name: place[torch.isin(place, columns)] for name, place in found.items()}
        found = {name: torch.searchsorted(columns, place) for name, place in found.items()}
    return {name: place.numpy() for name, place in found.items() if len(place)}


def smoothness_tables(subject: Subject, o: Options, tables: dict[str, pd.DataFrame], tell: Progress) -> None:
    """L on the sampled points of x_0 to x_j, of mini-batches of S_j, and the head's global bound, into ``tables``.

    Raises:
        MergeboundError: what the measurements raise.
    """
    import pandas as pd

    frames, bounds = [], []
    for j, name in enumerate(subject.names):
        tell("smoothness", j, subject.size)
        risk = task_risk(subject, j, part=o.part, images=o.images, seed=o.seed, batch=o.batch)
        columns = coordinates(subject, o.coordinates, risk.size)
        found = [
            segment_smoothness(
                risk, subject.base, subject.vectors[j], points=min(o.points, 3), kind=o.kind, columns=columns,
                steps=o.steps, seed=o.seed,
            )
        ]  # fmt: skip
        if o.batches:
            part: Part = o.part if subject.train[j] is None else "train"
            sample = task_risk(subject, j, part=part, images=o.images, seed=o.seed, batch=o.batch)
            size = min(o.batch_size, len(sample))
            found.append(
                batch_smoothness(
                    sample, subject.vectors[j], size, batches=o.batches, kind=o.kind, columns=columns, steps=o.steps,
                    seed=o.seed,
                )
            )  # fmt: skip
        frames += [f.to_frame().assign(coordinates=o.coordinates) for f in found]
        for bound in global_smoothness(subject, j, subject.vectors[j]):
            value = None if bound.bound is None else bound.bound
            bounds.append(
                {
                    "task": name,
                    "coordinates": bound.what,
                    "L": np.inf if value is None else value.risk,
                    "L_of_one_image": np.inf if value is None else value.sample,
                    "tier": bound.tier,
                    "reason": bound.reason,
                }
            )
    tables["smoothness"] = pd.concat(frames, ignore_index=True)
    tables["global_smoothness"] = pd.DataFrame(bounds)
