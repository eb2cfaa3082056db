"""Smoothness: L on sampled points of a segment, of mini-batches, and upper bounds where a global one exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from experiments.measure.curvature.lanczos import Eigenvalues, both_ends
from experiments.measure.curvature.number import Number
from experiments.measure.curvature.operators import Kind, curvature_operator
from experiments.measure.curvature.risk import EmpiricalRisk
from experiments.measure.subject import Subject
from theory.errors import MergeboundError
from theory.smoothness import SoftmaxSmoothness, softmax_smoothness

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
BATCHES = 0xBA7C5
"""Names the stream of the mini-batches whose smoothness is measured."""


@dataclass(frozen=True, eq=False)
class Smoothness:
    """Ends of the curvature's spectrum at several points (or of several mini-batches at one point).

    Attributes:
        where: t of each point of a segment, or the number of each batch.
        largest, smallest: extreme eigenvalues found, (points,): Rayleigh quotients, so the truth lies outside.
        residuals: of both, (points, 2).
        limits: what the smallest and the largest eigenvalue do not lie beyond, with probability ``1 - chance`` each,
            (points, 2); infinite where the steps were too few.
        chance: see ``limits``; one value for all points together.
        kind: which curvature.
        what: ``segment`` or ``batches of b``.
        name: of the task.
        seed: of start vectors and batches.
        tier: of every number.
    """

    where: Array
    largest: Array
    smallest: Array
    residuals: Array
    limits: Array
    chance: float
    kind: str
    what: str
    name: str
    seed: int
    tier: str = "estimated"

    def high(self) -> Number:
        """L: the largest eigenvalue over the points; interval from the value to the probable limit.

        It errs low for what lies between the points, or for the batches that were not drawn.
        """
        top = int(self.largest.argmax())
        return Number(
            float(self.largest[top]), float(self.largest[top]), float(self.limits[:, 1].max()), float("nan"),
            f"these points: with chance {self.chance:g} of an error; between them ({self.what}) L may be larger",
            self.seed, self.tier,
        )  # fmt: skip

    def low(self) -> Number:
        """m: the smallest eigenvalue over the points; interval from the probable limit to the value."""
        least = int(self.smallest.argmin())
        return Number(
            float(self.smallest[least]), float(self.limits[:, 0].min()), float(self.smallest[least]), float("nan"),
            f"these points: with chance {self.chance:g} of an error; between them ({self.what}) m may be smaller",
            self.seed, self.tier,
        )  # fmt: skip

    def mean(self) -> Number:
        """Mean of the largest eigenvalues with a 95 % interval over batches (a summary, no bound)."""
        count = len(self.largest)
        error = float(self.largest.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
        return Number.normal(float(self.largest.mean()), error, f"{self.what} (95 %)", self.seed)

    def to_frame(self) -> pd.DataFrame:
        """One row per point or batch."""
        import pandas as pd

        return pd.DataFrame(
            {
                "task": self.name,
                "what": self.what,
                "where": self.where,
                "largest": self.largest,
                "largest_residual": self.residuals[:, 1],
                "largest_limit": self.limits[:, 1],
                "smallest": self.smallest,
                "smallest_residual": self.residuals[:, 0],
                "smallest_limit": self.limits[:, 0],
                "kind": self.kind,
                "tier": self.tier,
                "seed": self.seed,
            }
        )


def segment_smoothness(
    risk: EmpiricalRisk,
    start: Tensor,
    end: Tensor,
    *,
    points: int = 3,
    kind: Kind = "hessian",
    columns: Tensor | None = None,
    steps: int = 30,
    chance: float = 0.01,
    seed: int = 0,
) -> Smoothness:
    """Extreme curvature of a task's risk at equally spaced points of a segment, ends included.

    This is L (and m) *restricted to the sampled points*: lower estimates of L on the segment and, for a network, no
    statement about any other place.  Theorem 1 needs L everywhere; section 2's directional form needs less
    (:func:`experiments.measure.curvature.directional.segment_curvature`).

    Args:
        risk: of one task.
        start, end: (P,).
        points: 1 measures at ``start`` alone.
        kind: which curvature.
        columns: coordinates of one layer, for the block of Lemma 1's per-layer form.
        steps: Lanczos products per point (and end of the spectrum: both ends come from one run).
        chance: of any of the limits being wrong.
        seed: names start vectors.

    Raises:
        MergeboundError: counts below one, or products that are not finite.
    """
    if points < 1 or steps < 2:
        raise MergeboundError(f"points = {points}, steps = {steps}: give 1 or more points and 2 or more steps")
    at = np.linspace(0.0, 1.0, points) if points > 1 else np.zeros(1)
    found = []
    for number, t in enumerate(at):
        point = start + float(t) * (end - start)
        operator = curvature_operator(risk, point, kind, columns=columns, seed=seed)
        found.append(both_ends(operator, steps=steps, chance=chance / points, seed=seed + number))
    return _collected(at, found, chance, kind, "segment", risk.name, seed)


def batch_smoothness(
    risk: EmpiricalRisk,
    point: Tensor,
    batch_size: int,
    *,
    batches: int = 8,
    kind: Kind = "hessian",
    steps: int = 20,
    chance: float = 0.01,
    seed: int = 0,
) -> Smoothness:
    """Extreme curvature of mini-batch losses at one point: what the one-step factor q of theorem 2 sees.

    ``q(eta) = max(1 - eta (m + omega), eta (L + omega) - 1)`` with m, L over *all* batches that can be drawn; those
    that were drawn here give a lower estimate of L and an upper one of m.

    Args:
        risk: on the training sample (``task_risk`` with ``part="train"``, and ``head=True`` where the head is trained).
        point: (P,).
        batch_size: b.
        batches: how many, drawn without replacement each.
        kind, steps, chance, seed: as :func:`segment_smoothness`; the seed also names the batches.

    Raises:
        MergeboundError: a batch larger than the sample, or counts below one.
    """
    if not 1 <= batch_size <= len(risk) or batches < 1:
        raise MergeboundError(f"batch_size = {batch_size}, batches = {batches}: give 1 to {len(risk)}, and 1 or more")
    rng = np.random.default_rng([seed, BATCHES])
    found = []
    for number in range(batches):
        part = risk.take(np.sort(rng.permutation(len(risk))[:batch_size]))
        operator = curvature_operator(part, point, kind, seed=seed)
        found.append(both_ends(operator, steps=steps, chance=chance / batches, seed=seed + number))
    where = np.arange(batches, dtype=np.float64)
    return _collected(where, found, chance, kind, f"batches of {batch_size}", risk.name, seed)


def _collected(
    where: Array,
    found: Sequence[tuple[Eigenvalues, Eigenvalues]],
    chance: float,
    kind: str,
    what: str,
    name: str,
    seed: int,
) -> Smoothness:
    low, high = zip(*found, strict=True)
    return Smoothness(
        where,
        np.array([e.values[0] for e in high]),
        np.array([e.values[0] for e in low]),
        np.array([(a.residuals[0], b.residuals[0]) for a, b in found]),
        np.array([(a.limit, b.limit) for a, b in found]),
        chance,
        kind,
        what,
        name,
        seed,
    )


# --- where a global bound exists -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GlobalSmoothness:
    """An upper bound on L that holds at every point, or the reason why there is none.

    Attributes:
        name: of the task.
        what: of which coordinates.
        bound: of the risk, of one image, and of a batch; ``None`` where no bound exists.
        reason: why.
        tier: certified where there is a bound (given these images).
    """

    name: str
    what: str
    bound: SoftmaxSmoothness | None
    reason: str

    @property
    def tier(self) -> str:
        """Certified given the images, or ``none``."""
        return "none" if self.bound is None else self.bound.tier


def global_smoothness(
    subject: Subject,
    task: int,
    point: Tensor,
    *,
    images: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[GlobalSmoothness, GlobalSmoothness]:
    """Global smoothness of task j's risk: in the whole network, and in its linear head alone.

    The head's bound holds for every head, with the other layers fixed at ``point``: softmax regression on the features
    there.  The whole network has a bound only where it *is* a linear classifier of its inputs (no hidden layer), else
    the reason says that there is none.

    Args:
        subject: experts.
        task: j.
        point: merged coordinates at which features are taken, (P,).
        images: default the calibration images.
        batch_size: bound batches of this size too.

    Raises:
        MergeboundError: features that are not one row per image.
    """
    shown = subject.calibration[task].images if images is None else images
    name = subject.names[task]
    inputs = _head_inputs(subject, task, point, shown)
    if inputs is None:
        reason = "the network has no single linear classifier whose input could be read"
        head = GlobalSmoothness(name, "head", None, reason)
    else:
        head = GlobalSmoothness(
            name,
            "head, other layers fixed",
            softmax_smoothness(inputs.double().cpu().numpy(), bias=_has_bias(subject, task), batch_size=batch_size),
            "softmax regression on the features at this point (theory.smoothness)",
        )
    if inputs is not None and _is_linear(subject, task):
        raw = shown.flatten(1).double().cpu().numpy()
        bound = softmax_smoothness(raw, bias=_has_bias(subject, task), batch_size=batch_size)
        return GlobalSmoothness(name, "all", bound, "a linear classifier of its inputs: softmax regression"), head
    reason = "a network with hidden layers has no global L: nothing that needs it is certified (theory.md section 1)"
    return GlobalSmoothness(name, "all", None, reason), head


def _classifiers(model: nn.Module) -> list[nn.Linear]:
    from experiments.models.parts import head_units

    found = [model.get_submodule(unit) for unit in head_units(model)]
    return [unit for unit in found if isinstance(unit, nn.Linear)] if len(found) == 1 else []


def _head_inputs(subject: Subject, task: int, point: Tensor, images: Tensor) -> Tensor | None:
    """What the single linear classifier is applied to at the point, (n, d)."""
    from experiments.models.parts import head_units

    network = subject.networks[task]
    model = network.module.model
    assert isinstance(model, nn.Module)
    units = _classifiers(model)
    if not units:
        return None
    name = head_units(model)[0]
    rows: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].detach()))
    try:
        network.features(point, images)
    finally:
        hook.remove()
    found = torch.cat(rows)
    return found if found.ndim == 2 and len(found) == len(images) else None


def _has_bias(subject: Subject, task: int) -> bool:
    model = subject.networks[task].module.model
    assert isinstance(model, nn.Module)
    return all(unit.bias is not None for unit in _classifiers(model))


def _is_linear(subject: Subject, task: int) -> bool:
    """Whether every parameter belongs to the one classifier, which reads the flattened images."""
    model = subject.networks[task].module.model
    assert isinstance(model, nn.Module)
    units = _classifiers(model)
    own = {id(p) for unit in units for p in unit.parameters()}
    pixels = subject.calibration[task].images[0].numel()
    return bool(units) and all(id(p) in own for p in model.parameters()) and units[0].in_features == pixels
