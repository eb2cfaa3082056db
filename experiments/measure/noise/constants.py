"""Every constant that stability and drift need, of every expert of a subject (theory.md sections 1, 4 to 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from experiments.finetune.schedules import schedule
from experiments.measure.noise.at_point import noise_at
from experiments.measure.noise.constant import Constant, exactly, largest, largest_of, smallest_of
from experiments.measure.noise.expert_constants import Constants, ExpertConstants
from experiments.measure.noise.objective import Point, objective_of, path_of
from experiments.measure.noise.one_step import one_step
from experiments.measure.noise.per_sample import MEMORY
from experiments.measure.noise.smoothness import ends, sample_smoothness
from experiments.measure.subject import Subject
from experiments.tasks.types import Split
from theory.drift import finite_batch_factor
from theory.errors import MergeboundError

_SAMPLES = 0x6A3D
Progress = Callable[[str, int, int], None]


def constants_of(
    subject: Subject,
    *,
    samples: int = 256,
    pairs: int = 64,
    checkpoints: Sequence[Sequence[Point]] = (),
    between: int = 0,
    curvature_samples: int = 16,
    curvature_iterations: int = 12,
    lanczos: int = 24,
    batches: int = 4,
    distances: Sequence[float] = (0.01, 0.3),
    learning_rate: float | None = None,
    batch_size: int = 32,
    least: float = 0.0,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Constants:
    """Measure the constants of every expert.

    Args:
        subject: its ``train`` gives S_i and its ``calibration`` fresh samples, which must not have been trained on.
        samples: of S_i, drawn without replacement (all of S_i where it has no more).
        pairs: training and fresh samples for the largest gap.
        checkpoints: visited points of every expert (:func:`experiments.measure.noise.objective.checkpoint_points`).
        between: points of the chord to add.
        curvature_samples: samples of each point whose Hessians are looked at.
        curvature_iterations: of the power iteration for L.
        lanczos: steps for the ends of the spectrum of F_S and of batches.
        batches, distances: of the one-step factor, measured at base and expert.
        learning_rate, batch_size: of the one-step factor where the runs are not known.
        least: F*, smallest value of the objective; 0 is below every cross-entropy and makes the PL ratio cautious.
        seed: names every draw.
        memory: bytes for per-sample gradients.
        progress: called with (what, done, total).

    Raises:
        MergeboundError: fewer than two samples, or as the parts raise.
    """
    if samples < 2 or curvature_samples < 1 or pairs < 1:
        raise MergeboundError("samples: give at least 2, and at least 1 pair and 1 sample for curvature")
    if checkpoints and len(checkpoints) != subject.size:
        raise MergeboundError(f"checkpoints: {len(checkpoints)} paths for {subject.size} experts; give one each")
    tell = progress or (lambda stage, done, total: None)
    found = []
    for j in range(subject.size):
        tell(subject.names[j], j, subject.size)
        path = path_of(subject, j, checkpoints=checkpoints[j] if checkpoints else (), between=between)
        found.append(
            _one(
                subject, j, path, samples, pairs, curvature_samples, curvature_iterations, lanczos, batches, distances,
                learning_rate, batch_size, least, seed, memory,
            )
        )  # fmt: skip
    tell("constants", subject.size, subject.size)
    per_sample = not _batch_statistics(subject)
    augmented = tuple(
        name for name, run in zip(subject.names, subject.runs, strict=True) if run and run.augment != "none"
    )
    return Constants(tuple(found), seed, per_sample, augmented, tuple(_notes(subject, per_sample, augmented, path)))


def training_sample(subject: Subject, j: int, samples: int, seed: int) -> tuple[Split, int | None]:
    """At most ``samples`` of S_j, drawn without replacement for this expert alone, and n; calibration images and
    ``None`` where S_j is not known."""
    data = subject.train[j]
    if data is None:
        return subject.calibration[j], None
    rows = np.random.default_rng([seed, _SAMPLES, j]).permutation(len(data))[:samples].astype(np.int64)
    pixels, labels = data.batch(rows, 0)
    return Split(pixels, labels, rows), len(data)


def peak_rate(subject: Subject, j: int, otherwise: float | None) -> float | None:
    """Largest length of a step: eta, times 1 + beta with Nesterov's form; ``otherwise`` where the run is not known."""
    run = subject.runs[j]
    if run is None:
        return otherwise
    factor = schedule(run.schedule, run.steps, warm_up=run.warm_up)
    largest_factor = max(factor(k) for k in range(run.steps))
    return run.learning_rate * largest_factor * (1.0 + run.momentum if run.nesterov else 1.0)


def _one(
    subject: Subject,
    j: int,
    path: Sequence[Point],
    samples: int,
    pairs: int,
    curvature_samples: int,
    curvature_iterations: int,
    lanczos: int,
    batches: int,
    distances: Sequence[float],
    learning_rate: float | None,
    batch_size: int,
    least: float,
    seed: int,
    memory: int,
) -> ExpertConstants:
    run = subject.runs[j]
    size = batch_size if run is None else run.batch_size
    wide, n = training_sample(subject, j, max(samples, size), seed)
    train = wide.take(np.arange(min(samples, len(wide))))
    fresh = None if subject.train[j] is None else subject.calibration[j]
    objectives = [objective_of(subject, j, point) for point in path]
    measured = [
        noise_at(
            o, train, fresh, population=n, point=p.name, step=p.step, pairs=pairs, least=least, seed=seed, memory=memory
        )
        for o, p in zip(objectives, path, strict=True)
    ]
    few = train.take(np.arange(min(curvature_samples, len(train))))
    tops = [
        sample_smoothness(o, few.images, few.labels, iterations=curvature_iterations, seed=seed) for o in objectives
    ]
    edges = [ends(o, train.images, train.labels, seed=seed, iterations=lanczos) for o in objectives]
    first, last = objectives[0], objectives[-1]
    delta = (last.theta - first.theta).double()
    rate = peak_rate(subject, j, learning_rate)
    steps = None
    if rate is not None and batches > 0:
        steps = one_step(
            [(path[0].name, first), (path[-1].name, last)],
            wide.images,
            wide.labels,
            learning_rate=rate,
            batch_size=min(size, len(wide)),
            batches=batches,
            distances=distances,
            drift=last.theta - first.theta,
            iterations=lanczos,
            replace=run is not None and run.sampling == "with_replacement",
            seed=seed,
        )
    highs = [edge[2] for edge in edges] + ([] if steps is None else [pair.highest for pair in steps.pairs])
    lows = [edge[0] for edge in edges] + ([] if steps is None else [pair.lowest for pair in steps.pairs])
    visited = [p for p in measured if not p.point.startswith("between")]
    whole = [p["all"] for p in visited]
    sigma = largest_of([p.sigma for p in whole])
    return ExpertConstants(
        name=subject.names[j],
        task=subject.tasks[j],
        n=n,
        points=tuple(measured),
        g=whole[0].objective_gradient,
        sigma0=whole[0].sigma,
        sigma=sigma,
        sigma_batch=None if run is None or n is None else batch_noise(sigma, n, min(size, n), run.sampling),
        D_2=largest_of([p.gap for p in whole]),
        D_inf=largest_of([p.largest_gap for p in whole]),
        D_inf_shared=largest_of([p["shared"].largest_gap for p in visited]),
        D_inf_private=largest_of([p["head"].largest_gap for p in visited]),
        G=largest_of([p.largest_norm for p in whole]),
        L=largest(np.concatenate(tops), seed, samples=len(few)),
        lowest=Constant(min(lows), -np.inf, min(lows), len(train), "smallest seen, Lanczos from inside", seed),
        highest=Constant(max(highs), max(highs), np.inf, len(train), "largest seen, Lanczos from inside", seed),
        pl=smallest_of([p.pl_ratio for p in visited]),
        initial_risk=measured[0].loss,
        training_risk=measured[-1].loss,
        base_norm=exactly(float(first.theta.double().norm()), 1, seed, "checkpoint"),
        drift=exactly(float(delta[: first.shared].norm()), 1, seed, "checkpoint"),
        private_drift=exactly(float(delta[first.shared :].norm()), 1, seed, "checkpoint"),
        steps=steps,
    )


def batch_noise(sigma: Constant, n: int, size: int, sampling: str) -> Constant:
    """rms noise of the mean gradient of a batch of ``size`` samples of S (theory.md section 6, factor for distinct
    samples); ``sigma`` within S with divisor n."""
    return sigma.scaled(float(np.sqrt(finite_batch_factor(n, size, sampling) / size)))


def _batch_statistics(subject: Subject) -> bool:
    """Whether some run normalised by batch statistics while it trained."""
    from torch import nn

    from experiments.measure.backbone import EvaluationBatchNorm

    kinds = (nn.modules.batchnorm._BatchNorm, EvaluationBatchNorm)
    if not any(isinstance(module, kinds) for module in subject.model.modules()):
        return False
    return any(run is None or run.trained in ("full", "backbone") for run in subject.runs)


def _notes(subject: Subject, per_sample: bool, augmented: tuple[str, ...], path: Sequence[Point]) -> list[str]:
    notes = [
        "suprema are over the points and samples that were looked at: lower estimates of the true ones; D_inf, G, L "
        "and kappa have no upper limit, nor has any bound made of them"
    ]
    if not per_sample:
        notes.append(
            "BatchNorm trained on batch statistics (A3 is violated): constants are of the evaluation loss, and only "
            "drift by 6(d) from the training log describes the training that was run"
        )
    if augmented:
        notes.append(f"training images of {', '.join(augmented)} were augmented; constants are of plain images")
    if any(data is None for data in subject.train):
        notes.append("S is not known: the gradient gap compares samples of one set, which is not enough for D_2")
    if path[0].name != "base":
        notes.append("the head before training is not known: 'base' has the final head, where training did not begin")
    return notes


__all__ = ["Constants", "ExpertConstants", "batch_noise", "constants_of", "peak_rate", "training_sample"]
