"""Frozen descriptions of what was run: they document the mathematics completely and compute nothing.

Conventions
-----------
* Every numeric field of :class:`Expert` may be a number or a numpy array; arrays broadcast against each other over
  *configurations* (shape ``(...)``).  A plain array is never a schedule.
* What changes from step to step is wrapped in :class:`Schedule`, whose **last** axis is the step (shape ``(..., K)``).
* Per-expert fields of :class:`Merge` (``weights``, ``coefficients``, ``sensitivity``) have the experts on the **first**
  axis (shape ``(N, ...)``).
* A field that was measured and not known is listed in ``measured`` and lowers the tier of whatever uses it to
  *estimated*; ``kappa``, ``drift``, ``epsilon``, ``batch_gradient_norms``, ``batch_losses``, ``held_out_losses``
  always count as measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from theory.errors import RecipeError, nearest
from theory.ties import ROUNDING, refuse_contradicting_merge, refuse_contradictions

FloatArray = NDArray[np.float64]
Values = float | int | FloatArray | NDArray[np.int64]
Sampling = Literal["without_replacement", "with_replacement", "reshuffle"]
Curvature = Literal["convex", "strongly_convex", "smooth"]
Head = Literal["none", "frozen", "trained"]
Method = Literal[
    "average",
    "weighted",
    "task_arithmetic",
    "ties",
    "dare",
    "uniform_soup",
    "wise_ft",
    "risk_optimal",
    "curvature_optimal",
    "adamerging",
    "lines",
    "greedy_soup",
    "fisher",
    "regmean",
    "dare_ties",
    "della",
    "breadcrumbs",
    "sce",
    "consensus_ta",
    "consensus_ties",
    "magmax",
    "emr",
    "pcb",
    "adamerging_pp",
    "model_stock",
    "slerp",
    "multi_slerp",
    "karcher",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "knots",
    "wudi",
]
COEFFICIENT_METHODS = ("task_arithmetic", "dare", "wise_ft", "risk_optimal", "curvature_optimal", "adamerging")

ALWAYS_MEASURED = (
    *("kappa", "drift", "private_drift", "epsilon"),
    *("batch_gradient_norms", "batch_losses", "held_out_losses"),
)
LOGS = ("batch_gradient_norms", "batch_losses", "held_out_losses")


@dataclass(frozen=True, eq=False)
class Schedule:
    """A quantity that changes from step to step: ``values`` has shape ``(..., K)``, the last axis is the step."""

    values: FloatArray

    def __post_init__(self) -> None:
        array = _numbers("schedule", "values", self.values)
        if array.ndim == 0 or array.shape[-1] == 0:
            raise RecipeError(
                "schedule: needs one value per step on its last axis; give a list with at least one value"
            )
        object.__setattr__(self, "values", array)

    @property
    def steps(self) -> int:
        """Number of steps K."""
        return int(self.values.shape[-1])


@dataclass(frozen=True, eq=False)
class Expert:
    """How one expert was fine-tuned, and the constants of its loss (theory section 1).

    What was run: ``n`` samples, ``batch_size`` b, ``steps`` K (taken from a schedule if one is given),
    ``learning_rate`` eta, heavy-ball ``momentum`` beta (learning rate outside the buffer), coupled ``weight_decay``
    omega, ``sampling`` (``reshuffle`` keeps the short last batch unless ``drop_last``), ``optimizer``,
    ``gradient_clipping``, and ``head``: ``none`` (everything is merged), ``frozen`` or ``trained`` (private).
    ``nesterov``: the step uses ``g + beta v`` instead of ``v`` (timm's ``sgd`` and torch's ``nesterov=True``).
    ``decoupled_decay``: the decay shrinks the weights directly (SGDW) instead of entering the momentum buffer; without
    momentum the two are the same.

    What is known of the loss: ``curvature`` class with per-sample smoothness ``L`` and convexity ``mu``, or a measured
    ``kappa``; ``pl_constant`` of the training objective; ``initial_gradient_norm`` g (of the objective with decay, rms
    over S); ``sigma``, ``sigma0`` (single-sample gradient noise within S, divisor n, on the path / at the base);
    ``D_inf``, ``D_2``, ``D_envelope`` (gradient gaps of two samples: largest, rms for every step, rms of an
    x-independent bound); ``G`` (Lipschitz constant of every per-sample loss on the visited region; gives the gap 2G
    where no other is given); ``B`` (largest value of a loss); for trained heads by the 2x2 recursion ``D_inf_shared``,
    ``D_inf_private`` (gaps of the two blocks of the gradient) and ``cross_smoothness`` (norm of the off-diagonal block
    of a per-sample Hessian, default ``(L - m)/2``);
    ``initial_risk`` F_S(x_0), ``training_risk`` E F_S(x_K) (the expectation itself and no upper bound of it, because
    drift by 6(c) subtracts it), ``minimal_risk`` (smallest value of the training
    objective), ``minimizer_distance`` (rms distance of x_0 from a minimiser of it), ``base_norm`` (norm of x_0, needed
    by energy arguments with decay).

    What was measured: ``drift`` (rms norm of the task vector; of its shared part if ``private_drift`` is given),
    ``private_drift``, ``epsilon`` (stability), ``batch_gradient_norms`` (per step, rms over runs, of the batch gradient
    with decay), ``batch_losses`` (per step, the batch loss before the step), ``held_out_losses`` (per step, the loss on
    fresh samples before the step: E F(x_k), which gaps from the loss need where steps contract).

    Raises :class:`RecipeError` that names expert, field and remedy.
    """

    name: str
    n: Values
    batch_size: Values | Schedule
    learning_rate: Values | Schedule
    steps: Values | None = None
    momentum: Values = 0.0
    weight_decay: Values = 0.0
    sampling: Sampling = "without_replacement"
    drop_last: bool = False
    curvature: Curvature = "smooth"
    L: Values | None = None
    mu: Values | None = None
    kappa: Values | None = None
    pl_constant: Values | None = None
    initial_gradient_norm: Values | None = None
    sigma: Values | None = None
    sigma0: Values | None = None
    D_inf: Values | None = None
    D_2: Values | None = None
    D_envelope: Values | None = None
    initial_risk: Values | None = None
    training_risk: Values | None = None
    minimal_risk: Values | None = None
    base_norm: Values | None = None
    drift: Values | None = None
    private_drift: Values | None = None
    epsilon: Values | None = None
    batch_gradient_norms: Schedule | None = None
    batch_losses: Schedule | None = None
    head: Head = "none"
    optimizer: str = "sgd"
    gradient_clipping: bool = False
    measured: frozenset[str] = frozenset()
    nesterov: bool = False
    decoupled_decay: bool = False
    G: Values | None = None
    B: Values | None = None
    D_inf_shared: Values | None = None
    D_inf_private: Values | None = None
    cross_smoothness: Values | None = None
    minimizer_distance: Values | None = None
    held_out_losses: Schedule | None = None

    def __post_init__(self) -> None:
        _validate_expert(self)

    def is_measured(self, *names: str) -> tuple[str, ...]:
        """Those of ``names`` whose values were measured and not known."""
        return tuple(name for name in names if name in self.measured or name in ALWAYS_MEASURED)


@dataclass(frozen=True, eq=False)
class Merge:
    """How experts were merged, and what is claimed about their data (theory sections 1, 7, 10).

    ``weights`` p (shape ``(N, ...)``, default 1/N) weigh the tasks in the joint risk.  ``coefficients`` alpha: a number
    (common) or shape ``(N, ...)``; ``average`` always uses 1/N; ``weighted`` defaults to ``weights`` and takes given
    ones as they are (the shipped method divides them by their sum by default, as :func:`theory.merge_with` does);
    ``task_arithmetic`` and ``dare`` need them.  ``drop_rate``, ``rescale`` and ``independent_masks`` describe DARE.

    Claims, ``None`` meaning "not stated": ``shared_samples`` (A1 is broken: tasks share samples),
    ``data_independent_choices`` (A2), ``per_sample_loss`` (A3), ``orthogonal_task_vectors`` (in expectation).

    ``dispersion`` (V measured on the checkpoints) and ``sensitivity`` (c, a number or shape ``(N, ...)``) replace what
    the operator's theory would give.  Methods that are no linear combination with one coefficient per expert need both:
    take c from ``operator(method).effect(...)`` or let :func:`theory.merge_with` fill it in.  ``wise_ft``,
    ``risk_optimal``, ``curvature_optimal`` and ``adamerging`` take their effective alpha as ``coefficients``.  Raises
    :class:`RecipeError`.
    """

    experts: tuple[Expert, ...]
    method: Method = "average"
    weights: Values | Sequence[Values] | None = None
    coefficients: Values | Sequence[Values] | None = None
    drop_rate: Values = 0.0
    rescale: bool = True
    independent_masks: bool = True
    shared_samples: bool | None = None
    data_independent_choices: bool | None = None
    per_sample_loss: bool | None = None
    orthogonal_task_vectors: bool | None = None
    dispersion: Values | None = None
    sensitivity: Values | Sequence[Values] | None = None
    measured: frozenset[str] = frozenset({"dispersion", "sensitivity"})

    def __post_init__(self) -> None:
        _validate_merge(self)

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.experts)


# --- validation -------------------------------------------------------------------------------------------------------


def _numbers(owner: str, field: str, value: Any) -> FloatArray:
    if value is None or isinstance(value, (bool, np.bool_)):
        raise RecipeError(f"{owner}: {field} is {value!r}, not a number; give a number")
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and all(isinstance(item, (int, float)) for item in array.flat):
            array = array.astype(np.float64)  # whole numbers beyond 64 bits
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(
            f"{owner}: {field} is not a number or an array of numbers ({str(value)[:80]}); give numbers"
        ) from error
    if array.dtype.kind not in "biuf":
        raise RecipeError(
            f"{owner}: {field} is not a number or an array of real numbers ({str(value)[:80]}); give numbers"
        )
    if array.size == 0:
        raise RecipeError(f"{owner}: {field} is empty; give at least one number")
    return np.asarray(array, dtype=np.float64)


def _require(owner: str, field: str, value: Any, good: Any, remedy: str) -> None:
    mask = np.asarray(good, dtype=bool)
    if not mask.all():
        array = np.broadcast_to(np.asarray(value, dtype=np.float64), mask.shape)
        raise RecipeError(f"{owner}: {field} is {float(array[~mask].flat[0]):g}; {remedy}")


def _positive_integer(owner: str, field: str, array: FloatArray) -> None:
    with np.errstate(invalid="ignore"):
        good = np.isfinite(array) & (array >= 1) & (array == np.floor(array))
    _require(owner, field, array, good, "give a whole number of at least 1")


def _validate_expert(expert: Expert) -> None:
    if not isinstance(expert.name, str) or not expert.name:
        raise RecipeError("expert: name is empty; give every expert a name")
    owner = f"expert {expert.name!r}"
    for field, value, allowed in (
        ("sampling", expert.sampling, get_args(Sampling)),
        ("curvature", expert.curvature, get_args(Curvature)),
        ("head", expert.head, get_args(Head)),
    ):
        if not isinstance(value, str) or value not in allowed:
            raise RecipeError(f"{owner}: {field} is {value!r}; {nearest(value, allowed)}")
    if not isinstance(expert.optimizer, str) or not expert.optimizer:
        raise RecipeError(f"{owner}: optimizer is {expert.optimizer!r}; give its name, for example 'sgd'")
    for field in ("drop_last", "gradient_clipping", "nesterov", "decoupled_decay"):
        if not isinstance(getattr(expert, field), (bool, np.bool_)):
            raise RecipeError(f"{owner}: {field} is {getattr(expert, field)!r}; give True or False")
    _names(owner, expert.measured)
    unknown = sorted(expert.measured - {field.name for field in fields(expert)})
    if unknown:
        raise RecipeError(
            f"{owner}: measured names {unknown[0]!r}, which is not a field; list field names of the expert"
        )

    n = _numbers(owner, "n", expert.n)
    _positive_integer(owner, "n", n)
    batch = expert.batch_size
    sizes = batch.values if isinstance(batch, Schedule) else _numbers(owner, "batch_size", batch)
    _positive_integer(owner, "batch_size", sizes)
    limit = n[..., None] if isinstance(batch, Schedule) else n
    _broadcastable(owner, {"n": limit, "batch_size": sizes})
    if expert.sampling != "with_replacement":
        _require(
            owner, "batch_size", sizes, sizes <= limit, "a batch cannot be larger than the data set: reduce it to n"
        )

    rate = expert.learning_rate
    rates = rate.values if isinstance(rate, Schedule) else _numbers(owner, "learning_rate", rate)
    good_rate = np.isfinite(rates) & (rates >= 0 if isinstance(rate, Schedule) else rates > 0)
    _require(owner, "learning_rate", rates, good_rate, "give a positive learning rate")
    _validate_steps(owner, expert)

    momentum = _numbers(owner, "momentum", expert.momentum)
    _require(owner, "momentum", momentum, (momentum >= 0) & (momentum < 1), "give a momentum in [0, 1)")
    for field in (
        *("weight_decay", "L", "initial_gradient_norm", "sigma", "sigma0", "D_inf", "D_2", "D_envelope"),
        *("initial_risk", "training_risk", "minimal_risk", "base_norm", "drift", "private_drift", "epsilon"),
        *("G", "B", "D_inf_shared", "D_inf_private", "cross_smoothness", "minimizer_distance"),
    ):
        value = getattr(expert, field)
        if value is not None or field == "weight_decay":
            array = _numbers(owner, field, value)
            _require(owner, field, array, np.isfinite(array) & (array >= 0), "give a finite number of at least 0")
    for field in LOGS:
        logged = getattr(expert, field)
        if logged is not None:
            if not isinstance(logged, Schedule):
                raise RecipeError(f"{owner}: {field} must have one value per step; wrap the values in Schedule")
            _require(owner, field, logged.values, np.isfinite(logged.values) & (logged.values >= 0), "must be >= 0")
    _validate_curvature(owner, expert)
    if expert.private_drift is not None and expert.drift is None:
        raise RecipeError(f"{owner}: private_drift is given without drift; give drift, the shared part, as well")
    _broadcastable(owner, {f.name: _config_shape_of(getattr(expert, f.name)) for f in fields(expert)})
    refuse_contradictions(expert)


def _validate_steps(owner: str, expert: Expert) -> None:
    lengths = {
        field: getattr(expert, field).steps
        for field in ("learning_rate", "batch_size", *LOGS)
        if isinstance(getattr(expert, field), Schedule)
    }
    if expert.steps is not None:
        steps = _numbers(owner, "steps", expert.steps)
        _positive_integer(owner, "steps", steps)
        for field, length in lengths.items():
            _require(
                owner, "steps", steps, steps == length, f"the schedule in {field} has {length} steps: make them agree"
            )
    elif not lengths:
        raise RecipeError(f"{owner}: steps is missing; give the number of optimisation steps")
    if len(set(lengths.values())) > 1:
        raise RecipeError(f"{owner}: schedules of different lengths ({lengths}); give one value per step in each")


def _validate_curvature(owner: str, expert: Expert) -> None:
    if expert.kappa is not None:
        kappa = _numbers(owner, "kappa", expert.kappa)
        _require(owner, "kappa", kappa, np.isfinite(kappa), "give a finite measured rate")
        if isinstance(expert.learning_rate, Schedule):
            factor = 1 + kappa[..., None] * expert.learning_rate.values
        else:
            factor = 1 + kappa * np.asarray(expert.learning_rate, dtype=np.float64)
        _require(
            owner, "kappa", np.zeros_like(factor) + factor, factor >= 0, "1 + learning_rate*kappa cannot be negative"
        )
    if expert.curvature == "strongly_convex" and expert.mu is None:
        raise RecipeError(f"{owner}: mu is missing; a strongly convex loss needs mu > 0 (or choose curvature 'convex')")
    if expert.mu is not None:
        mu = _numbers(owner, "mu", expert.mu)
        if expert.curvature != "strongly_convex":
            raise RecipeError(
                f"{owner}: mu is given but curvature is {expert.curvature!r}; choose 'strongly_convex' or remove mu "
                "(a PL constant goes into pl_constant)"
            )
        _require(owner, "mu", mu, np.isfinite(mu) & (mu > 0), "give mu > 0, or choose curvature 'convex'")
        if expert.L is not None:
            limit = np.asarray(expert.L, dtype=np.float64)
            _below(owner, "mu", mu, "L", limit, "strong convexity cannot exceed the smoothness")
    if expert.pl_constant is not None:
        pl = _numbers(owner, "pl_constant", expert.pl_constant)
        _require(owner, "pl_constant", pl, np.isfinite(pl) & (pl > 0), "give a positive constant, or leave it out")
        if expert.L is not None:
            limit = np.asarray(expert.L, dtype=np.float64) + np.asarray(expert.weight_decay, dtype=np.float64)
            _below(owner, "pl_constant", pl, "L + weight_decay", limit, "a PL constant cannot exceed the smoothness")


def _below(owner: str, field: str, value: FloatArray, name: str, limit: FloatArray, why: str) -> None:
    """Refuse a constant above another one, naming both values (rounding is forgiven)."""
    wrong = np.asarray(value > limit * (1 + ROUNDING))
    if wrong.any():
        large, small = (float(np.broadcast_to(item, wrong.shape)[wrong].flat[0]) for item in (value, limit))
        raise RecipeError(f"{owner}: {field} {large:g} exceeds {name} {small:g}: {why}; lower {field} or raise L")


def _config_shape_of(value: Any) -> FloatArray | None:
    if isinstance(value, Schedule):
        return value.values[..., 0]
    if value is None or isinstance(value, (str, bool, frozenset)):
        return None
    return np.asarray(value, dtype=np.float64)


def _broadcastable(owner: str, arrays: dict[str, FloatArray | None]) -> None:
    shapes = {name: array.shape for name, array in arrays.items() if array is not None and array.shape}
    try:
        np.broadcast_shapes(*shapes.values())
    except ValueError as error:
        raise RecipeError(
            f"{owner}: fields of shapes {shapes} do not broadcast; give arrays over the same configurations "
            "(a quantity that changes per step goes into Schedule)"
        ) from error


def _names(owner: str, measured: Any) -> None:
    if not isinstance(measured, frozenset) or not all(isinstance(name, str) for name in measured):
        raise RecipeError(f"{owner}: measured is not a frozenset of field names; give frozenset({{'L'}}), for example")


def _validate_merge(merge: Merge) -> None:
    experts: Any = merge.experts
    if not isinstance(experts, (tuple, list)) or not experts or not all(isinstance(item, Expert) for item in experts):
        raise RecipeError("merge: experts is empty or holds something else than experts; give at least one Expert")
    for field in ("shared_samples", "data_independent_choices", "per_sample_loss", "orthogonal_task_vectors"):
        claim = getattr(merge, field)
        if claim is not None and not isinstance(claim, (bool, np.bool_)):
            raise RecipeError(f"merge: {field} is {claim!r}; give True, False, or None for not stated")
    for field in ("rescale", "independent_masks"):
        if not isinstance(getattr(merge, field), (bool, np.bool_)):
            raise RecipeError(f"merge: {field} is {getattr(merge, field)!r}; give True or False")
    _names("merge", merge.measured)
    unknown = sorted(merge.measured - {field.name for field in fields(merge)})
    if unknown:
        raise RecipeError(f"merge: measured names {unknown[0]!r}, which is not a field; list field names of the merge")
    object.__setattr__(merge, "experts", tuple(merge.experts))
    names = [expert.name for expert in merge.experts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"merge: experts holds the name {twice[0]!r} twice; give every expert its own name")
    if not isinstance(merge.method, str) or merge.method not in get_args(Method):
        raise RecipeError(f"merge: method is {merge.method!r}; {nearest(merge.method, get_args(Method))}")
    if merge.weights is not None:
        weights = _per_expert("weights", merge.weights, len(names), common=False)
        _require(
            "merge", "weights", weights, np.isfinite(weights) & (weights >= 0), "give finite weights of at least 0"
        )
        total = weights.sum(axis=0)
        _require("merge", "the sum of weights", total, np.abs(total - 1) <= 1e-9, "divide the weights by their sum")
    if merge.coefficients is not None:
        if merge.method in ("average", "uniform_soup"):
            raise RecipeError(
                f"merge: coefficients are given but method is {merge.method!r}; choose 'weighted' or remove them"
            )
        coefficients = _per_expert("coefficients", merge.coefficients, len(names), common=True)
        _require("merge", "coefficients", coefficients, np.isfinite(coefficients), "give finite coefficients")
    elif merge.method in COEFFICIENT_METHODS:
        raise RecipeError(f"merge: coefficients is missing; {merge.method} needs its coefficient (for example 0.3)")
    drop = _numbers("merge", "drop_rate", merge.drop_rate)
    _require("merge", "drop_rate", drop, (drop >= 0) & (drop < 1), "give a rate in [0, 1)")
    if merge.method != "dare" and np.any(drop != 0):
        raise RecipeError(f"merge: drop_rate is given but method is {merge.method!r}; choose 'dare' or remove it")
    if merge.dispersion is not None:
        dispersion = _numbers("merge", "dispersion", merge.dispersion)
        _require("merge", "dispersion", dispersion, np.isfinite(dispersion) & (dispersion >= 0), "give V >= 0")
    if merge.sensitivity is not None:
        sensitivity = _per_expert("sensitivity", merge.sensitivity, len(names), common=True)
        _require("merge", "sensitivity", sensitivity, np.isfinite(sensitivity) & (sensitivity >= 0), "give c >= 0")
    try:
        refuse_contradicting_merge(merge)
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        return  # shapes that do not fit together are refused, with all of them, where they meet


def _per_expert(field: str, value: Any, size: int, *, common: bool) -> FloatArray:
    array = _numbers("merge", field, value)
    if array.ndim == 0 and common:
        return np.broadcast_to(array, (size,))
    if array.ndim == 0 or array.shape[0] != size:
        raise RecipeError(
            f"merge: {field} has shape {array.shape} but there are {size} experts; give one value per expert on axis 0"
        )
    return array


def per_expert(merge: Merge, field: str) -> FloatArray:
    """A validated per-expert field of a merge as an array of shape ``(N, ...)``; 1/N where ``weights`` is not given."""
    value = getattr(merge, field)
    if value is None:
        if field == "weights":
            return np.full(merge.size, 1.0 / merge.size)
        raise RecipeError(f"merge: {field} is missing; give one value per expert")
    return _per_expert(field, value, merge.size, common=field != "weights")
