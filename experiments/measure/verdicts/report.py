"""All verdicts of a subject: every assumption and every statement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from experiments.measure.noise.constants import Constants, constants_of
from experiments.measure.noise.objective import Point
from experiments.measure.subject import Subject
from experiments.measure.verdicts import images as of_images
from experiments.measure.verdicts.finding import Evidence, Finding, finding
from experiments.measure.verdicts.loss import (
    Coupling,
    coupling,
    judge_bounded,
    judge_nonnegative,
    judge_per_sample,
    judge_trained_loss,
)
from experiments.measure.verdicts.measuring import (
    Progress,
    batch_curvature,
    between_points,
    known_of,
    largest_curvature,
    total_drift,
)
from experiments.measure.verdicts.noise import (
    judge_fresh_gap,
    judge_lipschitz,
    judge_noise,
    judge_pl,
    judge_risk,
    judge_suprema,
)
from experiments.measure.verdicts.result import CHOSEN, Options, Stated, Verdicts
from experiments.measure.verdicts.smooth import judge_convex, judge_smooth, judge_steps
from experiments.measure.verdicts.statements import judge_statements
from experiments.measure.verdicts.training import judge_recipe
from experiments.measure.verdicts.vectors import cosines, judge_orthogonal, units_of
from theory.errors import MergeboundError

_COUPLING_IMAGES = 16
_MEASURED = (
    *("smooth", "smooth_merged", "convex", "noise_on_path", "noise_at_base", "pl", "lipschitz", "fresh_gap"),
    *("suprema", "risk_below_start", "bounded"),
)


def verdicts_of(
    subject: Subject,
    *,
    options: Options | None = None,
    stated: Stated | None = None,
    checkpoints: Sequence[Sequence[Point]] = (),
    constants: Constants | None = None,
    progress: Progress | None = None,
) -> Verdicts:
    """Judge every assumption of every theorem for these experts and their merge.

    Args:
        subject: with ``runs``, ``logs``, ``train`` and ``test`` where they are known: what is not known is ``unknown``.
        options: how much is measured, and what the merge is.
        stated: claimed constants.
        checkpoints: visited points of every expert.
        constants: measured before on the same subject (with ``between`` and the right F*), to save time.
        progress: called with (what, done, total).

    Raises:
        MergeboundError: an option that does not fit, or what measuring raises.
    """
    o, claim = options or Options(), stated or Stated()
    if o.chosen_on not in CHOSEN:
        raise MergeboundError(f"chosen_on = {o.chosen_on!r}: choose from {', '.join(CHOSEN)}")
    alpha = np.full(subject.size, 1.0 / subject.size)
    if o.coefficients is not None:
        given = np.asarray(o.coefficients, dtype=np.float64)
        if given.shape not in ((), (subject.size,)) or not np.isfinite(given).all():
            raise MergeboundError(f"coefficients: shape {given.shape}; give one number, or one for each expert")
        alpha = np.broadcast_to(given, (subject.size,)).copy()
    tell = progress or (lambda stage, done, total: None)
    train, calibration, test = of_images.digests_of_subject(subject)
    if constants is None and o.measure:
        constants = constants_of(
            subject, samples=o.samples, pairs=o.pairs, checkpoints=checkpoints, between=o.between,
            curvature_samples=o.curvature_samples, lanczos=o.lanczos, batches=o.batches, distances=(0.01,),
            learning_rate=o.learning_rate, least=claim.least or 0.0, seed=o.seed, progress=tell,
        )  # fmt: skip
    found: list[Finding] = []
    modes: dict[str, Coupling] = {}
    for j, name in enumerate(subject.names):
        tell(f"judging {name}", j, subject.size)
        found += _recipe(subject, j, modes, o.seed)
        found += _measured(subject, j, constants, o, claim, alpha, checkpoints, calibration[j], train[j])
        on = "calibration" if test[j] is None else "test"
        found.append(of_images.judge_fresh(name, train[j], calibration[j], test[j], judged_on=on))
    known = [d for d in train if d is not None]
    whole = len(known) == subject.size
    found.append(of_images.judge_independence(subject.names, known if whole else calibration, training=whole))
    recipes = all(run is not None for run in subject.runs)
    found.append(of_images.judge_choices(o.chosen_on, recipes_known=recipes, last_checkpoint=o.last_checkpoint))
    found.append(of_images.judge_base(subject))
    pairs = cosines(subject.deltas, units_of(subject), subject.names) if subject.size > 1 else ()
    found.append(judge_orthogonal(subject.deltas, pairs, coefficients=alpha))
    judged = judge_statements(found, subject.names)
    notes = () if constants is None else constants.notes
    tell("verdicts", subject.size, subject.size)
    return Verdicts(subject.names, tuple(found), judged, pairs, o.seed, tuple(notes))


def _recipe(subject: Subject, j: int, modes: dict[str, Coupling], seed: int) -> list[Finding]:
    """What follows from recipe, log and architecture."""
    name, run, data = subject.names[j], subject.runs[j], subject.train[j]
    mode = "full" if run is None else run.trained
    if mode not in modes:
        shown = subject.calibration[j].images[:_COUPLING_IMAGES]
        modes[mode] = coupling(subject.model, shown, trained=mode, seed=seed)
    n = None if data is None else len(data)
    return [
        judge_per_sample(name, modes[mode]),
        judge_trained_loss(name, modes[mode], run),
        judge_nonnegative(name, by_form=True),
        *judge_recipe(name, run, subject.logs[j], n=n, drift=total_drift(subject, j)),
    ]


def _measured(
    subject: Subject,
    j: int,
    constants: Constants | None,
    o: Options,
    claim: Stated,
    alpha: np.ndarray,
    checkpoints: Sequence[Sequence[Point]],
    fresh: of_images.Digests,
    train: of_images.Digests | None,
) -> list[Finding]:
    """What follows from measured constants of expert j."""
    name, run = subject.names[j], subject.runs[j]
    if constants is None:
        why, remedy = "nothing was measured", "measure it (leave out --recipe-only)"
        steps = judge_steps(name, run, None, certified=claim.L, learning_rate=o.learning_rate)
        return [*steps, *(finding(key, name, "unknown", why, remedy=remedy) for key in _MEASURED)]
    c, known = constants.experts[j], known_of(subject, j)
    weights = torch.from_numpy(alpha).to(subject.base.dtype)
    merged = subject.base + weights @ subject.deltas
    path = checkpoints[j] if checkpoints else ()
    between = between_points(subject, j, merged, checkpoints=path, samples=o.samples, pieces=o.pieces, seed=o.seed)
    curvature = largest_curvature(c)
    L = claim.L if claim.L is not None else known.L
    whole_head = run is not None and run.trained == "head"
    sizes = None if train is None else max(1, int(np.ceil(len(train) / run.batch_size))) if run is not None else None
    steps = judge_steps(name, run, batch_curvature(c), certified=L, learning_rate=o.learning_rate)
    gradient_descent = (
        run is not None and train is not None and run.batch_size >= len(train) and run.optimizer == "sgd"
        and run.sampling != "with_replacement" and run.momentum == 0 and run.weight_decay == 0 and run.clip_norm is None
    )  # fmt: skip
    mu = run.weight_decay if run is not None and run.optimizer != "adamw" and known.convex else None
    counted = None if train is None else of_images.overlap(fresh, train).same
    return [
        judge_smooth(name, curvature=curvature, secant=between.trained, certified=known.L, reason=known.reason,
                     kinks=between.kinks, stated=claim.L),
        judge_smooth(name, key="smooth_merged", secant=between.merged, certified=None if whole_head else known.L,
                     reason=known.reason, kinks=between.kinks_merged, stated=claim.L),
        judge_convex(name, Evidence.of("smallest curvature of S seen", c.lowest),
                     Evidence.of("largest", c.highest), linear=known.convex, stated=claim.convex),
        *steps,
        *judge_noise(name, c.points, certified=known.G, stated=claim.sigma),
        judge_pl(name, c.points, certified=mu, stated=claim.mu, least_known=claim.least is not None),
        judge_lipschitz(name, c.G, certified=known.G, stated=claim.G),
        judge_fresh_gap(name, fresh=all(p.fresh for p in c.points), overlapping=counted),
        judge_suprema(name, c.points),
        judge_risk(name, c.points, subject.logs[j], epoch=sizes or 0,
                   descends=gradient_descent and steps[1].verdict == "holds"),
        judge_bounded(name, between.largest_loss, stated=claim.B),
    ]  # fmt: skip


__all__ = ["Options", "Stated", "Verdicts", "verdicts_of"]
