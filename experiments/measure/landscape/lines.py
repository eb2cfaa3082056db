"""Loss and error along straight lines, error barriers, and whether the ends are linearly mode connected.

Sources: Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020 (arXiv:1912.05671),
section 2; Entezari et al., "The role of permutation invariance in linear mode connectivity of neural networks", ICLR
2022 (arXiv:2110.06296), section 2, for ends of different height.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from experiments.measure.landscape.intervals import Curve, Height, curves, height
from experiments.measure.landscape.scores import Evaluator, Floats, Progress
from experiments.measure.subject import Subject
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.02
"""Rise in error up to which networks count as connected: Frankle et al. call less than 2 % stable."""
JOINT = "joint"
Verdict = Literal["connected", "barrier", "unclear"]


@dataclass(frozen=True, eq=False)
class Profile:
    """Loss and error of one task (or their mean over tasks, ``joint``) along a line.

    Attributes:
        task: its name.
        loss, error: (K,) with pointwise bands.
        loss_barrier, error_barrier: largest rise over the straight line between the ends' values.
        instability: largest error minus the mean of the ends' errors, as Frankle et al. define it (the same where both
            ends are equally good; where they are not, an end itself lies above that mean).
        verdict: ``connected`` if the error barrier's interval ends at or below the tolerance, ``barrier`` if it begins
            above it, else ``unclear``.
    """

    task: str
    loss: Curve
    error: Curve
    loss_barrier: Height
    error_barrier: Height
    instability: Height
    verdict: Verdict


@dataclass(frozen=True, eq=False)
class Line:
    """What was measured on the points (1 - t) start + t end.

    Attributes:
        start, end: names of the ends.
        t: (K,) positions, ends included; the barrier is the largest over these, so it is a lower estimate.
        length: distance of the ends in the shared parameters.
        profiles: one per task, then ``joint`` (equal weights) where there are several.
        part, images, seed, batchnorm, path, tolerance: how.
        tier: of every number.
    """

    start: str
    end: str
    t: Floats
    length: float
    profiles: tuple[Profile, ...]
    part: str
    images: int
    seed: int
    batchnorm: str
    path: str
    tolerance: float
    tier: Literal["measured"] = field(default="measured")

    @property
    def name(self) -> str:
        """Both ends."""
        return f"{self.start} to {self.end}"

    def __getitem__(self, task: str) -> Profile:
        for profile in self.profiles:
            if profile.task == task:
                return profile
        raise MergeboundError(f"line {self.name} has no task {task!r}")

    @property
    def joint(self) -> Profile:
        """The mean over the tasks (the only one, where there is one)."""
        return self.profiles[-1]

    def to_frame(self) -> pd.DataFrame:
        """One row per task and point."""
        import pandas as pd

        rows = []
        for profile in self.profiles:
            for k, t in enumerate(self.t):
                row: dict[str, object] = {"line": self.name, "task": profile.task, "t": float(t)}
                for quantity, curve in (("loss", profile.loss), ("error", profile.error)):
                    row[quantity] = curve.value[k]
                    row |= {f"{quantity}_low": curve.low[k], f"{quantity}_high": curve.high[k]}
                rows.append(row | {"accuracy": 1.0 - profile.error.value[k], "tier": self.tier, "seed": self.seed})
        return pd.DataFrame(rows)


def barriers(lines: Iterable[Line]) -> pd.DataFrame:
    """One row per line and task: barriers of loss and error with intervals, and the verdict."""
    import pandas as pd

    rows = []
    for line in lines:
        for profile in line.profiles:
            row: dict[str, object] = {"line": line.name, "task": profile.task, "length": line.length}
            kinds = (("loss_barrier", profile.loss_barrier), ("error_barrier", profile.error_barrier))
            for name, found in (*kinds, ("instability", profile.instability)):
                row |= {name: found.value, f"{name}_se": found.standard_error}
                row |= {f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_at": found.at}
            row |= {"verdict": profile.verdict, "tolerance": line.tolerance, "points": len(line.t)}
            how = {"images": line.images, "part": line.part, "batchnorm": line.batchnorm, "path": line.path}
            rows.append(row | how | {"tier": line.tier, "seed": line.seed})
    return pd.DataFrame(rows)


def line(
    judge: Evaluator,
    start: tuple[str, Tensor],
    end: tuple[str, Tensor],
    tasks: Sequence[int] | None = None,
    *,
    points: int = 21,
    resamples: int = 1000,
    level: float = 0.95,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Line:
    """Measure the line between two points.

    Args:
        judge: scores points.
        start, end: name and vector (P,).
        tasks: numbers of the tasks that are scored; default all.
        points: evenly spaced positions, ends included.
        resamples: of the images, shared by all points.
        level: of bands and intervals.
        tolerance: error up to which the ends count as connected.

    Raises:
        MergeboundError: fewer than three points, or vectors of another size.
    """
    if points < 3:
        raise MergeboundError(f"points = {points}: a line needs 3 or more")
    if resamples < 2 or not 0.0 < level < 1.0:
        raise MergeboundError(f"resamples = {resamples}, level = {level}: give 2 or more, and a level in (0, 1)")
    subject = judge.subject
    for name, vector in (start, end):
        if vector.shape != subject.base.shape:
            raise MergeboundError(f"point {name} has shape {tuple(vector.shape)}, expected {tuple(subject.base.shape)}")
    chosen = tuple(range(subject.size)) if tasks is None else tuple(tasks)
    t = np.linspace(0.0, 1.0, points)
    vectors = (torch.lerp(start[1], end[1], float(s)) for s in t)
    stage = f"{start[0]} to {end[0]}"
    scores = list(judge.many(vectors, chosen, progress=progress, stage=stage, total=points))
    found = {
        quantity: curves(scores, judge.panel, chosen, quantity, resamples=resamples, level=level)
        for quantity in ("loss", "error")
    }
    keys: list[int | None] = [*chosen, None] if len(chosen) > 1 else [*chosen]
    profiles = tuple(
        _profile(JOINT if key is None else subject.names[key], found["loss"][key], found["error"][key], t, level,
                 tolerance)
        for key in keys
    )  # fmt: skip
    size = shared_size(subject)
    length = float((end[1] - start[1])[:size].double().norm())
    images = sum(judge.panel.sizes[j] for j in chosen)
    return Line(start[0], end[0], t, length, profiles, judge.panel.part, images, judge.panel.seed, judge.batchnorm,
                judge.path, tolerance)  # fmt: skip


def _profile(task: str, loss: Curve, error: Curve, t: Floats, level: float, tolerance: float) -> Profile:
    rise = height(error, t, level=level)
    verdict: Verdict = "unclear"
    if rise.high <= tolerance:
        verdict = "connected"
    elif rise.low > tolerance:
        verdict = "barrier"
    return Profile(
        task, loss, error, height(loss, t, level=level), rise, height(error, t, reference="mean", level=level), verdict
    )


def shared_size(subject: Subject) -> int:
    """How many coordinates are parameters: they come first, running statistics after them."""
    network = subject.networks[0]
    return network.space.take(0, len(network.partition.shared)).size


def usual_lines(
    subject: Subject, merges: Mapping[str, Tensor]
) -> list[tuple[tuple[str, Tensor], tuple[str, Tensor], tuple[int, ...]]]:
    """Lines that tell most: base to expert (its task), expert to expert (both), expert to merge (the expert's task),
    base to merge (all); each with the tasks that it is scored on."""
    base = ("base", subject.base)
    experts = [(name, subject.vectors[i]) for i, name in enumerate(subject.names)]
    count = subject.size
    Entry = tuple[tuple[str, Tensor], tuple[str, Tensor], tuple[int, ...]]
    found: list[Entry] = [(base, experts[i], (i,)) for i in range(count)]
    for i in range(count):
        found.extend((experts[i], experts[k], (i, k)) for k in range(i + 1, count))
    for name, vector in merges.items():
        found.extend((experts[i], (name, vector), (i,)) for i in range(count))
        found.append((base, (name, vector), tuple(range(count))))
    return found
