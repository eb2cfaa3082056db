"""From measured constants and the runs behind them to the theory's recipes (:class:`theory.Expert`, ``Merge``)."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np

from experiments.finetune.loop import TrainingLog
from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec
from experiments.measure.noise.constant import Constant
from experiments.measure.noise.constants import Constants, ExpertConstants
from experiments.measure.subject import Subject
from theory.errors import MergeboundError
from theory.recipe import Expert, Merge, Method, Schedule

Which = Literal["value", "low", "high"]


def learning_rates(run: RunSpec) -> np.ndarray:
    """eta_k of every step, (K,)."""
    factor = schedule(run.schedule, run.steps, warm_up=run.warm_up)
    return np.array([run.learning_rate * factor(k) for k in range(run.steps)])


def logged_norms(log: TrainingLog, part: str = "all") -> np.ndarray:
    """Norm of what entered the momentum buffer at every step, (K,): of the clipped gradient where it was clipped."""
    shared = log.gradient_norm_shared if log.used_norm_shared is None else log.used_norm_shared
    head = log.gradient_norm_head if log.used_norm_head is None else log.used_norm_head
    found = {"shared": shared, "head": head, "all": np.hypot(shared, head)}[part]
    return np.asarray(found, dtype=np.float64)


def expert_of(
    subject: Subject,
    j: int,
    constants: ExpertConstants,
    *,
    which: Which = "value",
    measured_kappa: bool = True,
    drift: Literal["theory", "measured"] = "theory",
) -> Expert:
    """One expert as the theory sees it.

    Args:
        subject: with ``runs`` (and ``logs`` where they are known).
        j: which expert.
        constants: of that expert.
        which: constants at their value or at an end of their intervals; bounds grow with each of them, except that
            drift by 6(c) falls with the training risk, which is taken from the other end for ``low`` and ``high``
            only where no merge is bounded (:func:`experiments.measure.noise.drift.drift_table`).
        measured_kappa: take the measured one-step rate; otherwise kappa = L of a smooth loss.
        drift: ``theory``: bounds by Theorem 3 (measured for optimizers that it does not cover); ``measured``: give the
            measured task vector too, of which the smaller is used.

    Every constant is listed in ``measured``, so that whatever uses it is *estimated*.

    Raises:
        MergeboundError: the run of the expert is not known.
    """
    run, log = subject.runs[j], subject.logs[j]
    if run is None or constants.n is None:
        raise MergeboundError(
            f"expert {constants.name!r}: how it was trained is not known (checkpoints alone); open it from the store "
            "of a grid, or give measured quantities to theory.network_bound"
        )

    def at(constant: Constant) -> float:
        return float(constant.at(which))

    fields: dict[str, Any] = {
        "initial_gradient_norm": at(constants.g),
        "sigma": max(at(constants.sigma), at(constants.sigma0)),
        "sigma0": at(constants.sigma0),
        "D_2": at(constants.D_2),
        "D_inf": at(constants.D_inf),
        "G": at(constants.G),
        "L": max(at(constants.L), at(constants.highest), -at(constants.lowest)),
        "initial_risk": at(constants.initial_risk),
        "training_risk": at(constants.training_risk),
        "base_norm": at(constants.base_norm),
    }
    head = "none" if not subject.heads[j] else "trained" if run.trained != "backbone" else "frozen"
    if head == "trained":
        fields |= {"D_inf_shared": at(constants.D_inf_shared), "D_inf_private": at(constants.D_inf_private)}
    if not all(constants.points[i].fresh for i in range(len(constants.points))):
        del fields["D_2"]
    if measured_kappa and constants.kappa is not None:
        fields["kappa"] = at(constants.kappa)
    covered = run.optimizer == "sgd" and run.clip_norm is None
    if covered and log is not None and run.trained != "low_rank" and len(log.batch_loss) == run.steps:
        fields["batch_gradient_norms"] = Schedule(logged_norms(log))
        fields["batch_losses"] = Schedule(np.asarray(log.batch_loss, dtype=np.float64))
    if drift == "measured" or not covered:
        fields |= {"drift": constants.drift.value}
        if head == "trained":
            fields["private_drift"] = constants.private_drift.value
    constant_rate = run.schedule == "constant" and run.warm_up == 0
    return Expert(
        constants.name,
        n=constants.n,
        batch_size=min(run.batch_size, constants.n) if run.sampling == "reshuffle" else run.batch_size,
        learning_rate=run.learning_rate if constant_rate else Schedule(learning_rates(run)),
        steps=run.steps,
        momentum=0.0 if run.optimizer == "adamw" else run.momentum,
        nesterov=run.nesterov,
        weight_decay=run.weight_decay,
        decoupled_decay=run.optimizer == "adamw",
        sampling=run.sampling,
        optimizer=run.optimizer,
        gradient_clipping=run.clip_norm is not None,
        head=cast(Any, head),
        curvature="smooth",
        measured=frozenset(fields),
        **fields,
    )


def recipe_of(
    subject: Subject,
    constants: Constants,
    *,
    method: Method = "average",
    which: Which = "value",
    measured_kappa: bool = True,
    drift: Literal["theory", "measured"] = "theory",
    shared_samples: bool | None = None,
    **merge: Any,
) -> Merge:
    """A merge of the subject's experts as the theory sees it, for :func:`theory.master_bound`.

    Args:
        subject, constants: of the same experts, in the same order.
        method: how they are merged; ``merge`` takes the other fields of :class:`theory.Merge` (``coefficients``, ...).
        which, measured_kappa, drift: as :func:`expert_of`.
        shared_samples: whether tasks share images (A1); ``None``: not stated.

    ``per_sample_loss`` (A3) is stated as the networks say: with BatchNorm trained on batch statistics it is False, and
    :func:`theory.master_bound` refuses; :func:`theory.network_bound` takes measured quantities instead.

    Raises:
        MergeboundError: runs that are not known, or constants of other experts.
    """
    if [expert.name for expert in constants.experts] != list(subject.names):
        raise MergeboundError("constants: they are of other experts than the subject's; measure them again")
    experts = tuple(
        expert_of(subject, j, found, which=which, measured_kappa=measured_kappa, drift=drift)
        for j, found in enumerate(constants.experts)
    )
    return Merge(
        experts, method=method, per_sample_loss=constants.per_sample_loss, shared_samples=shared_samples, **merge
    )
