"""The numbers behind the verdicts, measured on a subject: constants, certified ones, smoothness between the points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.inputs.training_data import TrainingData
from experiments.measure.curvature.global_smoothness import GlobalSmoothness, global_smoothness
from experiments.measure.curvature.risk import task_risk
from experiments.measure.noise.constants import training_sample
from experiments.measure.noise.expert_constants import ExpertConstants
from experiments.measure.noise.objective import Point, objective_of, path_of
from experiments.measure.subject import Subject
from experiments.measure.verdicts.finding import Evidence
from experiments.measure.verdicts.loss import kinks
from experiments.measure.verdicts.smooth import secant_smoothness, steepest

Progress = Callable[[str, int, int], None]
_KINK_IMAGES = 2
_CHUNK = 512


@dataclass(frozen=True)
class Known:
    """What a theorem gives for one expert; every field is ``None`` where none does.

    Attributes:
        L: smoothness of every image's loss in what was trained, everywhere.
        G: bound on every per-sample gradient, everywhere (hence on sigma).
        convex: the loss is convex in what was trained.
        reason: why.
    """

    L: float | None = None
    G: float | None = None
    convex: bool = False
    reason: str = "a network with hidden layers has no global L"


def known_of(subject: Subject, j: int) -> Known:
    """Certified constants of expert j: softmax regression on fixed features is convex, smooth and Lipschitz.

    That is what is trained where only the head is (``trained = head``), or where the network is one linear layer.  The
    bounds hold for the images of S_j and the calibration images: ``L = max |a|^2/2``, ``G = sqrt(2) max |a|`` with a
    one beside the features where there are biases (``|p - y| <= sqrt 2``; label smoothing included).
    """
    run = subject.runs[j]
    only_head = run is not None and run.trained == "head"
    bounds: list[GlobalSmoothness] = []
    for images in _images_of(subject, j):
        whole, head = global_smoothness(subject, j, subject.base, images=images)
        chosen = head if only_head else whole
        if chosen.bound is None:
            return Known()
        bounds.append(chosen)
    L = max(b.bound.sample for b in bounds if b.bound is not None)
    return Known(L, 2.0 * float(np.sqrt(L)), True, f"{bounds[0].reason}; for every image given")


def _images_of(subject: Subject, j: int) -> list[torch.Tensor]:
    """Images of the calibration split and of S_j in pieces; the first piece says whether there is a bound at all."""
    found = [subject.calibration[j].images]
    data: TrainingData | None = subject.train[j]
    if data is None:
        return found
    run = subject.runs[j]
    whole, _ = global_smoothness(subject, j, subject.base, images=found[0][:1])
    if whole.bound is None and (run is None or run.trained != "head"):
        return found
    rows = np.arange(len(data), dtype=np.int64)
    return found + [data.batch(rows[k : k + _CHUNK], 0)[0].to(subject.base.dtype) for k in range(0, len(rows), _CHUNK)]


def largest_curvature(found: ExpertConstants) -> Evidence:
    """The largest absolute eigenvalue seen, of single images or batches: what expert_of takes for L."""
    value = max(found.L.value, found.highest.value, -found.lowest.value)
    covers = f"{found.L.samples} images' Hessians, batches and S at {len(found.points)} points: errs low"
    return Evidence("largest absolute curvature seen", value, value, float("inf"), covers, found.L.seed)


def batch_curvature(found: ExpertConstants) -> Evidence:
    """The largest eigenvalue of a batch or of S seen: what a step feels."""
    value = found.highest.value
    covers = "batches at base and expert, S at every point"
    return Evidence("largest curvature of a batch seen", value, value, float("inf"), covers, found.highest.seed)


@dataclass(frozen=True)
class Between:
    """Smoothness that only differences of gradients show, and operations that have none.

    Attributes:
        trained: of :func:`secant_smoothness` on the path, in what was trained.
        merged: in the merged coordinates, from the expert to the merge.
        kinks, kinks_merged: operations whose derivative jumps, by the recorded graph.
        largest_loss: of an image at the points of the path.
    """

    trained: Evidence
    merged: Evidence
    kinks: tuple[str, ...]
    kinks_merged: tuple[str, ...]
    largest_loss: Evidence


def between_points(
    subject: Subject,
    j: int,
    merged: torch.Tensor,
    *,
    checkpoints: Sequence[Point] = (),
    samples: int = 128,
    pieces: int = 4,
    seed: int = 0,
) -> Between:
    """What lies between the points of expert j's path, and on the way from the expert to a merge.

    Args:
        subject, j: which expert.
        merged: point of the merged coordinates, (P,).
        checkpoints: visited points.
        samples: of S_j (path) and calibration images (way to the merge).
        pieces: equal parts of every edge.
        seed: names the draw from S_j.
    """
    sample, _ = training_sample(subject, j, samples, seed)
    path = [objective_of(subject, j, point) for point in path_of(subject, j, checkpoints=checkpoints)]
    few = slice(0, _KINK_IMAGES)
    risk = task_risk(subject, j, images=samples)
    line = [torch.lerp(subject.vectors[j], merged, k / pieces) for k in range(pieces + 1)]
    slopes = [risk.gradient(x) for x in line]
    largest = steepest(line, slopes)
    with torch.no_grad():
        losses = [float(o.losses(o.theta, sample.images, sample.labels).max()) for o in path]
    covers = f"{len(risk)} images, {pieces} pieces from the expert to the merge: errs low"
    name = "largest change of the gradient per length, expert to merge"
    last = path[-1]
    return Between(
        secant_smoothness(path, sample.images, sample.labels, pieces=pieces),
        Evidence(name, largest, largest, float("inf"), covers, risk.images_seed),
        kinks(lambda theta: last.losses(theta, sample.images[few], sample.labels[few]).sum(), last.theta),
        kinks(lambda x: subject.networks[j].call(x, risk.images[few]).sum(), subject.vectors[j]),
        Evidence("largest loss of an image seen", max(losses), max(losses), float("inf"), "path", seed),
    )


def total_drift(subject: Subject, j: int) -> float | None:
    """``|Delta_j|`` of everything trained: shared parameters (no running statistics) and head; ``None`` if the head
    before training is not known."""
    net, run = subject.networks[j], subject.runs[j]
    first, last = subject.start_heads[j], subject.heads[j]
    if run is None or (first is None and last):
        return None
    cut = net.space.offsets[len(net.partition.shared)]
    square = float((subject.vectors[j][:cut] - subject.base[:cut]).double().square().sum())
    for name, tensor in last.items():
        if first is not None and tensor.is_floating_point() and not name.endswith(("running_mean", "running_var")):
            square += float((tensor - first[name]).double().square().sum())
    return float(np.sqrt(square))
