"""Every constant that stability and drift need, of every expert of a subject (theory.md sections 1, 4 to 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.finetune.schedules import schedule
from experiments.measure.noise.at_point import PARTS, PointNoise, noise_at
from experiments.measure.noise.constant import Constant, exactly, largest, largest_of, smallest_of
from experiments.measure.noise.objective import Objective, Point, objective_of, path_of
from experiments.measure.noise.one_step import OneStep, one_step
from experiments.measure.noise.per_sample import MEMORY
from experiments.measure.noise.smoothness import ends, sample_smoothness
from experiments.measure.subject import Subject
from experiments.tasks.types import Split
from theory.errors import MergeboundError

_SAMPLES = 0x6A3D
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExpertConstants:
    """Constants of one expert; suprema are over the points that were looked at.

    Attributes:
        name, task: of the expert.
        n: size of S_i; ``None`` where S_i is not known and the samples stand for the task itself.
        points: in the order of the path (base first, expert last), chord points among them.
        g: |grad F_S(x_0) + omega x_0| (theory.md's g_i).
        sigma0, sigma: gradient noise at x_0, and its largest value on the path.
        D_2, D_inf: gradient gap, rms per point and largest over points; largest pair seen.
        D_inf_shared, D_inf_private: of the two parts of the gradient.
        G: largest per-sample gradient norm seen.
        L: largest absolute eigenvalue of a single sample's Hessian seen (a lower estimate of the smoothness).
        lowest, highest: ends of the Hessian of F_S (over the samples) on the path, without decay.
        pl: smallest PL ratio on the path.
        initial_risk, training_risk: F_S at x_0 (with the starting head) and at the expert.
        base_norm: |x_0| of what was trained.
        drift, private_drift: |Delta_i| of the shared part and of the head, both of what was trained.
        steps: the one-step factor; ``None`` where no learning rate is known.
    """

    name: str
    task: str
    n: int | None
    points: tuple[PointNoise, ...]
    g: Constant
    sigma0: Constant
    sigma: Constant
    D_2: Constant
    D_inf: Constant
    D_inf_shared: Constant
    D_inf_private: Constant
    G: Constant
    L: Constant
    lowest: Constant
    highest: Constant
    pl: Constant
    initial_risk: Constant
    training_risk: Constant
    base_norm: Constant
    drift: Constant
    private_drift: Constant
    steps: OneStep | None

    @property
    def kappa(self) -> Constant | None:
        """Measured one-step rate."""
        return None if self.steps is None else self.steps.kappa

    @property
    def total_drift(self) -> float:
        """|Delta_i| of everything trained."""
        return float(np.hypot(self.drift.value, self.private_drift.value))

    def gaps_from_loss(self) -> tuple[tuple[str, Constant, Constant | None], ...]:
        """Gradient gaps from the loss at every point (theory.md section 5).

        Name of the point, ``2 sqrt(2 L F_S)`` (steps that do not contract) and ``sqrt(2 L F_S) + sqrt(2 L F)`` (fresh
        loss; any steps under independent batches).
        """
        found = []
        for point in self.points:
            trained = _root_product(self.L, point.loss)
            fresh = None if point.fresh_loss is None else _sum(trained, _root_product(self.L, point.fresh_loss))
            found.append((point.point, trained.scaled(2.0), fresh))
        return tuple(found)


@dataclass(frozen=True)
class Constants:
    """Constants of all experts of a subject, in its order.

    Attributes:
        experts: one each.
        seed: of all draws.
        per_sample_loss: whether training saw a per-sample loss (A3): False with BatchNorm on batch statistics.
        augmented: experts whose training images were augmented; the constants are of plain images.
        notes: what a reader must know.
    """

    experts: tuple[ExpertConstants, ...]
    seed: int
    per_sample_loss: bool
    augmented: tuple[str, ...]
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per expert and constant: value, interval, how."""
        names = (
            *("g", "sigma0", "sigma", "D_2", "D_inf", "D_inf_shared", "D_inf_private", "G", "L", "lowest", "highest"),
            *("kappa", "pl", "initial_risk", "training_risk", "base_norm", "drift", "private_drift"),
        )
        rows = []
        for expert in self.experts:
            for name in names:
                constant = getattr(expert, name)
                if constant is not None:
                    rows.append({"expert": expert.name, "constant": name, **vars(constant)})
        return pd.DataFrame(rows)

    def points_frame(self) -> pd.DataFrame:
        """One row per expert, point, part of the gradient and quantity."""
        rows = []
        for expert in self.experts:
            for point, (_, twice, both) in zip(expert.points, expert.gaps_from_loss(), strict=True):
                place = {"expert": expert.name, "point": point.point, "step": point.step}
                whole: dict[str, Constant | None] = {"loss": point.loss, "fresh_loss": point.fresh_loss}
                whole |= {"pl_ratio": point.pl_ratio, "gap_from_loss": twice, "gap_from_both_losses": both}
                rows += [place | {"part": "all", "constant": k} | vars(c) for k, c in whole.items() if c is not None]
                for part in PARTS:
                    found = point[part]
                    for name, value in vars(found).items():
                        listed = [(f"norm_q{share:g}", c) for share, c in value] if name == "norms" else [(name, value)]
                        rows += [place | {"part": part, "constant": k} | vars(c) for k, c in listed]
        return pd.DataFrame(rows)


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
    return ExpertConstants(
        name=subject.names[j],
        task=subject.tasks[j],
        n=n,
        points=tuple(measured),
        g=whole[0].objective_gradient,
        sigma0=whole[0].sigma,
        sigma=largest_of([p.sigma for p in whole]),
        D_2=largest_of([p.gap for p in whole]),
        D_inf=largest_of([p.largest_gap for p in whole]),
        D_inf_shared=largest_of([p["shared"].largest_gap for p in visited]),
        D_inf_private=largest_of([p["head"].largest_gap for p in visited]),
        G=largest_of([p.largest_norm for p in whole]),
        L=largest(np.concatenate(tops), seed, samples=len(few)),
        lowest=exactly(min(lows), len(train), seed, "smallest seen, Lanczos from inside"),
        highest=exactly(max(highs), len(train), seed, "largest seen, Lanczos from inside"),
        pl=smallest_of([p.pl_ratio for p in visited]),
        initial_risk=measured[0].loss,
        training_risk=measured[-1].loss,
        base_norm=exactly(float(first.theta.double().norm()), 1, seed, "checkpoint"),
        drift=exactly(float(delta[: first.shared].norm()), 1, seed, "checkpoint"),
        private_drift=exactly(float(delta[first.shared :].norm()), 1, seed, "checkpoint"),
        steps=steps,
    )


def _batch_statistics(subject: Subject) -> bool:
    """Whether some run normalised by batch statistics while it trained."""
    from torch import nn

    from experiments.measure.backbone import EvaluationBatchNorm

    kinds = (nn.modules.batchnorm._BatchNorm, EvaluationBatchNorm)
    if not any(isinstance(module, kinds) for module in subject.model.modules()):
        return False
    return any(run is None or run.trained in ("full", "backbone") for run in subject.runs)


def _notes(subject: Subject, per_sample: bool, augmented: tuple[str, ...], path: Sequence[Point]) -> list[str]:
    notes = ["suprema are over the points and samples that were looked at: lower estimates of the true ones"]
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


def _root_product(L: Constant, loss: Constant) -> Constant:
    values = [float(np.sqrt(2.0 * L.at(w) * max(loss.at(w), 0.0))) for w in ("value", "low", "high")]
    return Constant(values[0], values[1], values[2], loss.samples, f"L {L.how}, loss {loss.how}", loss.seed)


def _sum(first: Constant, second: Constant) -> Constant:
    return Constant(
        first.value + second.value,
        first.low + second.low,
        first.high + second.high,
        first.samples + second.samples,
        first.how,
        first.seed,
    )


__all__ = ["Constants", "ExpertConstants", "Objective", "constants_of", "peak_rate", "training_sample"]
