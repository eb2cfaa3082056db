"""Every calculator over arrays of configurations against a loop over single ones: values, terms, forms, tiers.

The loop is the independent truth: it never sees an axis of configurations.  Lengths of axes collide on purpose with the
number of experts, of steps and of dimensions, and in many draws one or two fields only carry configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from configuration_kit import Drawer, alone, at, random_expert, random_merge

import theory
from theory import Expert, Merge, MergeboundError, QuadraticTask, RecipeError, RegressionTask, Schedule

DRAWS = 16


@dataclass(frozen=True)
class Numbers:
    """What a calculator returned: arrays of shape ``(...)``, ``(N, ...)``, ``(..., k)`` and ``(..., k, k)``, and words.

    ``forms`` are names joined by ``or``; ``measured`` None where the calculator has none.
    """

    plain: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    vectors: Mapping[str, Any] = field(default_factory=dict)
    matrices: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    tier: str | None = None
    measured: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Array:
    """An argument with ``lead`` axes before its axes of configurations and ``trail`` after them."""

    value: Any
    lead: int = 0
    trail: int = 0


Case = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Callable[[Any], Numbers]]


def _cfg(d: Drawer, low: float = 0.0, high: float = 2.0) -> Array:
    return Array(d.some(low, high))


def _row(d: Drawer, low: float = 0.0, high: float = 2.0) -> Array:
    return Array(d.rows(low, high), lead=1)


def _row_or_one(d: Drawer, low: float = 0.0, high: float = 2.0) -> Array:
    return _row(d, low, high) if d.maybe(0.8) else Array(float(d.rng.uniform(low, high)))


def _shares(d: Drawer) -> Array:
    return Array(d.shares(), lead=1)


def _vector(d: Drawer, size: int) -> Array:
    return Array(d.rng.normal(size=(*d.shape(), size)), trail=1)


def _matrix(d: Drawer, size: int, least: float) -> Array:
    root = d.rng.normal(size=(*d.shape(), size, size))
    return Array(root @ np.swapaxes(root, -1, -2) / size + least * np.eye(size), trail=2)


def _dimension(d: Drawer) -> int:
    return int(d.rng.choice([1, 2, 3, d.steps]))


# --- readers ----------------------------------------------------------------------------------------------------------


def _value(found: Any) -> Numbers:
    return Numbers({"value": found})


def _fields(*names: str) -> Callable[[Any], Numbers]:
    return lambda found: Numbers({name: getattr(found, name) for name in names})


def _named(found: Any) -> Numbers:
    return Numbers({"value": found[0]}, forms={"form": found[1]})


def _bound(found: theory.Bound) -> Numbers:
    plain: dict[str, Any] = {"value": found.value, "V": found.V, "effective V": found.effective_V}
    forms = {"V": found.dispersion_form}
    for term in found.terms:
        plain |= {f"{term.name}": term.value, f"{term.name}, share": term.share}
    for row in found.experts:
        plain |= {f"{row.name}: risk": row.risk, f"{row.name}: eps": row.epsilon, f"{row.name}: c": row.sensitivity}
        forms |= {f"{row.name}: risk": row.risk_form, f"{row.name}: eps": row.epsilon_form}
        if row.drift is not None:
            plain[f"{row.name}: d"] = row.drift
            forms[f"{row.name}: d"] = row.drift_form
    return Numbers(plain, forms=forms, tier=found.tier, measured=found.measured)


def _gap(found: theory.GapBound) -> Numbers:
    rows = {"contributions": found.contributions, "displacement": found.displacement}
    forms = {str(index): form for index, form in enumerate(found.forms)}
    return Numbers({"value": found.value}, rows, forms=forms, tier=found.tier, measured=found.measured)


def _confident(found: theory.ConfidentRisk) -> Numbers:
    plain = {"value": found.value, "shift": found.shift, "deviation": found.deviation}
    return Numbers(plain, {"reach": found.reach}, tier=found.tier, measured=found.measured)


def _published(found: theory.PublishedBound) -> Numbers:
    return Numbers({"value": found.value}, tier=found.tier, measured=found.measured)


def _compared(found: theory.Comparison) -> Numbers:
    return Numbers({f"{row.quantity} {row.name}": row.value for row in found.rows if row.value is not None})


def _effect(found: theory.Effect) -> Numbers:
    names = ("sensitivity", "surely", "mean", "reference", "noise")
    return Numbers(rows={name: getattr(found, name) for name in names if getattr(found, name) is not None})


_terms = _fields("value", "training", "dispersion", "instability")

# --- recipes ----------------------------------------------------------------------------------------------------------


def _of_recipe(
    function: Callable[..., Any], reader: Callable[[Any], Numbers], kind: str, **arguments: tuple[float, float]
) -> Callable[[Drawer], Case]:
    def draw(d: Drawer) -> Case:
        return (
            function,
            (random_merge(d, kind=kind),),
            {key: _cfg(d, *ends) for key, ends in arguments.items()},
            reader,
        )

    return draw


def _of_expert(function: Callable[..., Any], reader: Callable[[Any], Numbers], kind: str) -> Callable[[Drawer], Case]:
    return lambda d: (function, (random_expert(d, "a", kind=kind),), {}, reader)


def _published_recipe(function: Callable[..., Any], *, strongly_convex: bool = False) -> Callable[[Drawer], Case]:
    """What the papers analyse: Lipschitz and bounded losses, one sample per step, logged losses, no momentum or decay.

    Now and then another batch size in some configurations, which most of them refuse.
    """

    def draw(d: Drawer) -> Case:
        merge = replace(random_merge(d, kind="plain"), shared_samples=False)
        changed = []
        for expert in merge.experts:
            changes: dict[str, Any] = {"batch_size": 1 if d.maybe(0.95) else d.whole(1, 3), "curvature": "convex"}
            changes |= {"mu": None, "kappa": None, "pl_constant": None, "G": d.some(0.1, 2.0), "B": d.some(0.1, 2.0)}
            changes |= {"batch_losses": d.schedule(0.0, 1.0), "batch_gradient_norms": None, "steps": d.steps}
            if strongly_convex:
                smallest = float(np.min(np.asarray(expert.L)))
                changes |= {"curvature": "strongly_convex", "mu": smallest * d.some(0.1, 1.0)}
                changes |= {"learning_rate": d.some(0.01, 0.4)}
            changed.append(replace(expert, **changes))
        return function, (replace(merge, experts=tuple(changed)),), {}, _published

    return draw


def _one_round(d: Drawer) -> Case:
    merge = replace(random_merge(d, kind="plain"), shared_samples=False)
    experts = tuple(replace(expert, sigma=d.some(0.0, 2.0), initial_risk=d.some(0.5, 2.0)) for expert in merge.experts)
    return theory.fedavg_one_round, (replace(merge, experts=experts),), {"joint_gradient_norm": _cfg(d)}, _published


# --- ingredients ------------------------------------------------------------------------------------------------------


def _assemble(d: Drawer) -> Case:
    rows = [_row_or_one(d) for _ in range(5)]
    return theory.assemble_master, (rows[0], _shares(d), rows[1], _cfg(d), *rows[2:]), {}, _terms


def _sharpest(d: Drawer) -> Case:
    base = (_row_or_one(d), _cfg(d)) if d.maybe(0.7) else (None, None)
    return (
        theory.sharpest_side,
        (_row_or_one(d), _shares(d), _row_or_one(d), _row_or_one(d), *base),
        {},
        lambda found: Numbers({"bound": found[0], "anchors": found[1]}, {"base": np.asarray(found[2], dtype=float)}),
    )


def _task_stability(d: Drawer) -> Case:
    more: dict[str, Any] = {"shared_samples": d.maybe(0.5)}
    more["trained"] = Array(d.rng.random(d.experts) < 0.5, lead=1) if d.maybe(0.6) else d.maybe(0.5)
    if d.maybe(0.5):
        more["samples"] = _row(d, 1.0, 9.0)
    parts = (_row(d), _row(d)) if d.maybe(0.5) else ()

    def call(c: Any, epsilon: Any, *split: Any, **given: Any) -> Any:
        return theory.task_stability(c, epsilon, split=split or None, **given)

    return call, (_row(d), _row(d), *parts), more, lambda found: Numbers(rows={"moved": found})


def _network(d: Drawer) -> Case:
    method = str(d.rng.choice(["average", "weighted", "task_arithmetic", "dare", "dare"]))
    more: dict[str, Any] = {"method": method, "trained_heads": d.maybe(0.4), "held_out": d.maybe(0.2)}
    more |= {"shared_samples": d.maybe(0.4), "weights": _shares(d) if d.maybe(0.4) else None}
    if method != "average":
        more["coefficients"] = _row_or_one(d, 0.05, 1.2)
    if method == "dare":
        more |= {"drop_rate": _cfg(d, 0.0, 0.9), "rescale": d.maybe(0.5), "independent_masks": d.maybe(0.5)}
    for name in ("epsilon", "private_drift", "base_risks", "samples"):
        if d.maybe(0.4):
            more[name] = _row(d, 1.0, 9.0)
    if d.maybe(0.3):
        more["dispersion"] = _cfg(d)
    if d.maybe(0.2):
        more["sensitivity"] = _row_or_one(d)
    return theory.network_bound, (_row(d), _row_or_one(d), _row(d)), more, _bound


def _penalty(d: Drawer) -> Case:
    scales = (_cfg(d), _cfg(d, 0.1, 1.0), _cfg(d, 0.01, 0.9), _cfg(d, 0.1, 2.0))
    return theory.pac_bayes_penalty, (_row(d, 1.0, 99.0), _shares(d), *scales), {}, _value


def _best_lambda(d: Drawer) -> Case:
    energies = Array(d.rng.random((*d.shape(), d.experts, d.experts)), trail=2)
    return theory.best_lambda, (energies, d.rng.dirichlet(np.ones(d.experts))), {}, _value


def _number_law(d: Drawer) -> Case:
    more = {"orthogonal": d.maybe(0.5)}
    return theory.number_law, (Array(d.whole(1, 9)), _cfg(d), _cfg(d), _cfg(d), _cfg(d)), more, _terms


def _matrix_risk(d: Drawer) -> Case:
    size = _dimension(d)
    return theory.matrix_risk, (_cfg(d), _matrix(d, size, 0.0), _vector(d, size)), {}, _value


def _layered_risk(d: Drawer) -> Case:
    layers = [Array(d.rng.random((*d.shape(), d.steps)), trail=1) for _ in range(2)]
    return theory.layered_risk, (_cfg(d), *layers), {}, _value


# --- exact ground truth -----------------------------------------------------------------------------------------------


def _quadratic(d: Drawer, size: int) -> tuple[Array, Array, Array]:
    return _matrix(d, size, 0.1), _vector(d, size), _matrix(d, size, 0.0)


def _expert_moments(d: Drawer) -> Case:
    size = _dimension(d)

    def call(H: Any, theta: Any, Omega: Any, base: Any, expert: Expert) -> Any:
        return theory.expert_moments(QuadraticTask(H, theta, Omega), base, expert)

    def read(found: Any) -> Numbers:
        names = ("covariance", "data_covariance", "response")
        return Numbers(
            {name: getattr(found, name) for name in ("epsilon", "drift", "risk", "training_risk")},
            vectors={"mean": found.mean},
            matrices={name: getattr(found, name) for name in names},
        )

    return call, (*_quadratic(d, size), _vector(d, size), random_expert(d, "a")), {}, read


def _true_constants(d: Drawer) -> Case:
    """The constants of a quadratic task are known and fit together: the tier of its bound is *certified*."""
    size = _dimension(d)
    count = d.whole(12, 40)
    claims: dict[str, Any] = {"shared_samples": False, "data_independent_choices": True, "per_sample_loss": True}
    rate, decay = _cfg(d, 0.001, 0.01), Array(d.of(0.0, 0.1))
    weights = _shares(d)

    def call(p: Any, n: Any, eta: Any, omega: Any, *rest: Any) -> Any:
        experts = []
        for i in range(d.experts):
            run = Expert(f"e{i}", n=n, batch_size=5, learning_rate=eta, steps=7, curvature="convex", weight_decay=omega)
            experts.append(theory.with_true_constants(QuadraticTask(*rest[3 * i : 3 * i + 3]), rest[-1], run))
        return theory.master_bound(Merge(tuple(experts), weights=p, **claims))

    tasks = [part for _ in range(d.experts) for part in _quadratic(d, size)]
    return call, (weights, Array(count), rate, decay, *tasks, _vector(d, size)), {}, _bound


def _merge_moments(d: Drawer) -> Case:
    size, shared = _dimension(d), d.maybe(0.3)
    experts = [random_expert(d, f"e{i}") for i in range(d.experts)]
    if shared:
        count = d.whole(12, 40)
        experts = [replace(expert, n=count, sampling="with_replacement", drop_last=False) for expert in experts]
    parts = [part for _ in experts for part in _quadratic(d, size)]

    def call(base: Any, alpha: Any, p: Any, drop: Any, *rest: Any, **more: Any) -> Any:
        tasks = [QuadraticTask(*rest[3 * i : 3 * i + 3]) for i in range(d.experts)]
        return theory.merge_moments(tasks, base, rest[3 * d.experts :], alpha, p, drop_rate=drop, **more)

    more = {"shared_samples": shared, "rescale": d.maybe(0.5), "independent_masks": d.maybe(0.5)}
    read = _fields("risk", "training_risk", "gap", "V", "stability")
    return call, (_vector(d, size), _row(d), _shares(d), _cfg(d, 0.0, 0.9), *parts, *experts), more, read


def _regression(d: Drawer) -> Case:
    size = int(d.rng.choice([1, 2, 3]))
    experts = []
    for i in range(d.experts):
        expert = random_expert(d, f"e{i}")
        if not isinstance(expert.batch_size, Schedule):
            expert = replace(expert, n=d.whole(300, 500), sampling="reshuffle", drop_last=False)
        experts.append(expert)
    parts = [part for _ in experts for part in (_matrix(d, size, 0.1), _vector(d, size), _cfg(d, 0.1, 1.0))]

    def call(base: Any, alpha: Any, p: Any, *rest: Any) -> Any:
        tasks = [RegressionTask(*rest[3 * i : 3 * i + 3]) for i in range(d.experts)]
        moments = [
            theory.one_pass_moments(*pair) for pair in zip(tasks, [base] * d.experts, rest[-d.experts :], strict=True)
        ]
        return theory.regression_merge(tasks, base, moments, alpha, p), moments[0]

    def read(found: Any) -> Numbers:
        merged, first = found
        plain = {name: getattr(merged, name) for name in ("risk", "V", "stability")}
        return Numbers(plain, vectors={"mean": first.mean}, matrices={"covariance": first.covariance})

    return call, (_vector(d, size), _row(d), _shares(d), *parts, *experts), {}, read


def _least_squares(d: Drawer) -> Case:
    size = int(d.rng.choice([1, 2, 3]))
    parts = [part for _ in range(d.experts) for part in (_matrix(d, size, 0.1), _vector(d, size), _cfg(d, 0.1, 1.0))]
    counts = [Array(d.whole(9, 30)) for _ in range(d.experts)]

    def call(base: Any, alpha: Any, p: Any, *rest: Any) -> Any:
        tasks = [RegressionTask(*rest[3 * i : 3 * i + 3]) for i in range(d.experts)]
        return theory.least_squares_merge(tasks, base, rest[3 * d.experts :], alpha, p)

    read = _fields("risk", "training_risk", "gap")
    return call, (_vector(d, size), _row(d), _shares(d), *parts, *counts), {}, read


# --- coefficient space ------------------------------------------------------------------------------------------------


def _logit_fields(d: Drawer) -> list[theory.LogitField]:
    images, classes = max(2, int(d.rng.choice([2, d.experts, d.steps]))), int(d.rng.choice([2, 3]))
    return [
        theory.secant(
            d.rng.normal(size=(images, classes)),
            d.rng.normal(size=(d.experts, images, classes)),
            d.rng.integers(0, classes, images),
        )
        for _ in range(d.experts)
    ]


def _predict(d: Drawer) -> Case:
    known, p = _logit_fields(d), d.rng.dirichlet(np.ones(d.experts))

    def call(alpha: Any) -> Any:
        return theory.predict_risk(known, alpha, p), theory.prediction_interval(known, alpha, p, resamples=20, seed=3)

    def read(found: Any) -> Numbers:
        priced, sure = found
        plain = {"risk": priced.risk, "error": priced.standard_error, "low": sure.low, "high": sure.high}
        return Numbers(plain, {"replicates": sure.replicates}, {"tasks": priced.per_task})

    return call, (_vector(d, d.experts),), {}, read


def _account(d: Drawer) -> Case:
    (known, *_) = _logit_fields(d)
    images, classes = known.constant.shape
    mixed = d.rng.normal(size=(d.experts, d.experts, images, classes))
    bent = theory.LogitCurvature(
        d.rng.normal(size=(d.experts, images, classes)), mixed + mixed.swapaxes(0, 1) if d.maybe(0.7) else None
    )
    rest = Array(d.rng.random((*d.shape(), images)), trail=1)

    def call(alpha: Any, unexplained: Any) -> Any:
        missed = theory.tangent_error(bent, alpha)
        account = theory.error_account(known, alpha, missed, unexplained)
        return account, theory.loss_change(known.at(alpha), known.labels, missed), theory.secant_error(bent, alpha)

    def read(found: Any) -> Numbers:
        account, change, error = found
        names = ("predicted", "slope", "curvature", "corrected", "lower", "upper", "logit_error")
        return Numbers(
            {name: getattr(account, name) for name in names},
            vectors={name: getattr(change, name) for name in ("slope", "curvature", "lower", "upper")},
            matrices={"error": error},
        )

    return call, (_vector(d, d.experts), rest), {}, read


# --- operators, schedules, boxes --------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, tuple[float, float]]] = {
    "task_arithmetic": {"coefficient": (-1.0, 1.0)},
    "dare": {"coefficient": (-1.0, 1.0), "drop": (0.0, 0.9)},
    "wise_ft": {"alpha": (0.0, 1.0)},
    "lines": {"alpha": (0.0, 1.0), "beta": (-1.0, 1.0)},
    "weighted": {},
    "risk_optimal": {},
}


def _operator(d: Drawer) -> Case:
    name = str(d.rng.choice(list(SETTINGS)))
    more: dict[str, Any] = {key: _cfg(d, *ends) for key, ends in SETTINGS[name].items() if d.maybe(0.8)}
    known = theory.operator(name)
    if known.coefficients == "required" or (known.coefficients == "optional" and d.maybe(0.6)):
        more["coefficients"] = _row(d, 0.1, 1.0)
    return (lambda **given: known.effect(d.experts, **given)), (), more, _effect


def _merge_with(d: Drawer) -> Case:
    name = str(d.rng.choice([key for key in SETTINGS if key not in ("risk_optimal",)]))
    more: dict[str, Any] = {key: _cfg(d, *ends) for key, ends in SETTINGS[name].items()}
    if name in ("weighted", "dare"):
        more["coefficients"] = _row(d, 0.1, 1.0)
    merge = replace(random_merge(d, kind="small"), weights=None, method="average", coefficients=None, drop_rate=0.0)

    def call(run: Merge, V: Any, **given: Any) -> Any:
        return theory.master_bound(
            theory.merge_with(run.experts, name, given, dispersion=V if name == "lines" else None)
        )

    return call, (merge, _cfg(d)), more, _bound


def _schedule(d: Drawer) -> Case:
    made = theory.schedules
    steps = int(d.rng.integers(4, 9))
    choices: list[tuple[Callable[..., Schedule], tuple[Any, ...]]] = [
        (lambda rate: made.constant(rate, steps), (_cfg(d),)),
        (lambda rate, by: made.step(rate, steps, every=2, factor=by), (_cfg(d), _cfg(d, 0.1, 1.0))),
        (lambda rate, by: made.multi_step(rate, steps, milestones=[1, 3], factor=by), (_cfg(d), _cfg(d, 0.1, 1.0))),
        (lambda rate, end: made.cosine(rate, steps, final=end), (_cfg(d), _cfg(d))),
        (lambda rate, low, top: made.linear_warmup(made.linear(rate, steps), 2, start=low, peak=top), (_cfg(d),) * 3),
        (
            lambda top, up, down: made.one_cycle(top, steps, rise=0.5, start_factor=up, end_factor=down),
            (_cfg(d), _cfg(d, 1.5, 9.0), _cfg(d, 0.5, 9.0)),
        ),
    ]
    call, arguments = choices[int(d.rng.integers(len(choices)))]
    return call, arguments, {}, lambda found: Numbers(vectors={"values": found.values})


def _enclose(d: Drawer) -> Case:
    merge = random_merge(d, kind="small")
    experts = tuple(replace(expert, private_drift=None, D_inf_private=None) for expert in merge.experts)
    names = ["sigma", "initial_gradient_norm", "training_risk", "D_inf", "sigma0", "learning_rate", "L"]
    keys, ends = [], []
    for expert in experts:
        for name in names if d.maybe(0.5) else names[:5]:
            value = getattr(expert, name)
            if value is not None and not isinstance(value, Schedule) and d.maybe(0.5):
                keys.append((expert.name, name))
                ends += [Array(np.asarray(value) * d.some(0.6, 1.0)), Array(np.asarray(value) * d.some(1.0, 1.05))]

    def call(run: Merge, *limits: Any) -> Any:
        box: dict[str, dict[str, Any]] = {}
        for (owner, name), low, high in zip(keys, limits[::2], limits[1::2], strict=True):
            box.setdefault(owner, {})[name] = (low, high)
        return theory.enclose(run, box)

    def read(found: theory.Enclosure) -> Numbers:
        parts = {f"{name} {side}": ends[side] for name, ends in found.terms.items() for side in (0, 1)}
        return Numbers({"lower": found.lower, "upper": found.upper, **parts})

    return call, (replace(merge, experts=experts), *ends), {}, read


CASES: dict[str, Callable[[Drawer], Case]] = {
    "master_bound": _of_recipe(theory.master_bound, _bound, "any"),
    "master_bound, small steps": _of_recipe(theory.master_bound, _bound, "small"),
    "master_bound, certified": _true_constants,
    "l1_gap": _of_recipe(theory.l1_gap, _gap, "any"),
    "high_probability": _of_recipe(
        theory.high_probability, _confident, "plain", empirical_risk=(0.0, 1.0), delta=(0.01, 0.9)
    ),
    "hardt_convex": _published_recipe(theory.hardt_convex),
    "hardt_strongly_convex": _published_recipe(theory.hardt_strongly_convex, strongly_convex=True),
    "hardt_nonconvex": _published_recipe(theory.hardt_nonconvex),
    "lei_ying_l1": _published_recipe(theory.lei_ying_l1),
    "lei_ying_l2": _published_recipe(theory.lei_ying_l2),
    "fedavg_one_round": _one_round,
    "pac_bayes_expectation": _of_recipe(
        theory.pac_bayes_expectation, _published, "small", dimension=(1.0, 50.0), merge_distance=(0.0, 2.0)
    ),
    "pac_bayes_penalty": _penalty,
    "compare": _of_recipe(
        theory.compare,
        _compared,
        "plain",
        dimension=(1.0, 50.0),
        merge_distance=(0.0, 2.0),
        merged_training_risk=(0, 1),
    ),
    "expert_drift": _of_expert(theory.expert_drift, _named, "any"),
    "expert_epsilon": _of_expert(theory.expert_epsilon, _named, "any"),
    "training_risk": _of_expert(theory.training_risk, _named, "small"),
    "head_split": _of_expert(theory.head_split, lambda found: Numbers({"shared": found[0], "own": found[1]}), "any"),
    "clock": _of_expert(theory.clock, _fields("tau", "nu"), "any"),
    "assemble_master": _assemble,
    "sharpest_side": _sharpest,
    "task_stability": _task_stability,
    "theorem_1": lambda d: (theory.theorem_1, (_cfg(d), _shares(d), _row_or_one(d), _row(d)), {}, _value),
    "network_bound": _network,
    "number_law": _number_law,
    "lambda_law": lambda d: (theory.lambda_law, (Array(d.whole(1, 9)), _cfg(d)), {}, _value),
    "best_lambda": _best_lambda,
    "moved_risk": lambda d: (theory.moved_risk, (_cfg(d), _cfg(d), _cfg(d)), {}, _value),
    "directional_risk": lambda d: (theory.directional_risk, (_cfg(d), _cfg(d)), {}, _value),
    "matrix_risk": _matrix_risk,
    "layered_risk": _layered_risk,
    "expert_moments": _expert_moments,
    "merge_moments": _merge_moments,
    "regression": _regression,
    "least_squares_merge": _least_squares,
    "predictions": _predict,
    "error_account": _account,
    "loss_interval": lambda d: (
        theory.loss_interval,
        (_cfg(d), _cfg(d)),
        {},
        lambda found: Numbers({"low": found[0], "high": found[1]}),
    ),
    "operator": _operator,
    "merge_with": _merge_with,
    "schedules": _schedule,
    "enclose": _enclose,
}


def _whole(item: Any) -> Any:
    return item.value if isinstance(item, Array) else item


def _single(item: Any, full: tuple[int, ...], index: tuple[int, ...]) -> Any:
    if isinstance(item, Array):
        return at(item.value, full, index, lead=item.lead, trail=item.trail) if np.ndim(item.value) else item.value
    return alone(item, full, index) if isinstance(item, (Expert, Merge)) else item


def _same(found: Numbers, one: Numbers, full: tuple[int, ...], index: tuple[int, ...], refused: bool) -> int:
    compared = 0
    for part, lead, trail in (("plain", 0, 0), ("rows", 1, 0), ("vectors", 0, 1), ("matrices", 0, 2)):
        together = getattr(found, part)
        for name, value in getattr(one, part).items():
            if name not in together:  # a row of a comparison that another configuration does not allow
                assert refused, f"{name} is missing"
                continue
            here = at(together[name], full, index, lead=lead, trail=trail)
            assert np.shape(here) == np.shape(value), name
            np.testing.assert_allclose(here, value, rtol=1e-8, atol=1e-11, err_msg=name)
            assert not np.any(np.isnan(here)), name
            compared += 1
    for name, form in one.forms.items():
        known = found.forms[name].split(" or ")
        if form != "not needed" and not form.startswith("no bound"):  # inf here, another form elsewhere
            assert all(any(longer.startswith(item) for longer in known) for item in form.split(" or ")), name
    return compared


@pytest.mark.parametrize("name", list(CASES))
def test_arrays_give_what_each_configuration_gives_alone(name: str) -> None:
    compared = 0
    for seed in range(DRAWS):
        rng = np.random.default_rng([seed, list(CASES).index(name)])
        d = Drawer(rng, int(rng.integers(1, 4)), int(rng.integers(1, 5)))
        try:
            function, arguments, more, read = CASES[name](d)
        except RecipeError:
            continue  # the draw is no recipe
        singles: dict[tuple[int, ...], Numbers] = {}
        refused = False
        for index in np.ndindex(*d.full):
            given = [_single(item, d.full, index) for item in arguments]
            try:
                singles[index] = read(
                    function(*given, **{key: _single(item, d.full, index) for key, item in more.items()})
                )
            except MergeboundError:
                refused = True
        try:
            found = read(function(*map(_whole, arguments), **{key: _whole(item) for key, item in more.items()}))
        except MergeboundError:
            assert refused, "refused over arrays, although every configuration is accepted alone"
            continue
        missing = len({frozenset(one.plain) for one in singles.values()}) > 1
        for index, one in singles.items():
            compared += _same(found, one, d.full, index, refused or missing)
        if found.tier is not None and singles and not refused:
            every = {one.tier for one in singles.values()}
            assert found.tier == ("certified" if every == {"certified"} else "estimated")
            assert set(found.measured or ()) == {item for one in singles.values() for item in one.measured or ()}
    assert compared >= 5
