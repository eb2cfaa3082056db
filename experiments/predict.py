"""Predict the risk of merging the user's own checkpoints, without forming or evaluating a merge.

    group = load_group(base, experts, data)
    report = predict(group, Options())

The secant needs N + 1 forward passes on each of the N data sets; the tangent at the base as many Jacobian products.
Every predicted number is of tier *estimated*: in nats, with a standard error that says how much it would change with
other calibration images (not how far the linearisation is off: that is what the bracket from secant to tangent shows).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from experiments.measure.backbone import Readout, smoothness
from experiments.measure.function_space import GroupStatistics, MergePoint, predicted_logits, project
from experiments.predict_group import Group, Progress, load_group
from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.merge import merge_flat
from merging.method import Method
from merging.registry import get
from merging.variances import clamped_share, stays_in_hull, zero_share
from theory.assumptions import Assumption
from theory.errors import MergeboundError
from theory.function_space import Array, LogitField, cross_entropy, minimise_risk, uniform_weights
from theory.risk import network_bound

Objective = Literal["secant", "tangent", "middle"]
OBJECTIVES: tuple[Objective, ...] = ("secant", "tangent", "middle")

TANGENT_LIMIT = 3e11
"""Tangents are collected by default up to this much work (:attr:`Group.work`): about a minute or two on one core."""
NARROW, WIDE = 1.25, 2.0
"""Largest over smallest of secant, tangent and middle: up to NARROW it is trusted, from WIDE on it warns."""
BATCH_VALUES = 2**22
SMOOTHNESS_IMAGES = 32
_KINDS: dict[Objective, str] = {"secant": "secant", "tangent": "tangent_base", "middle": "secant_tangent"}


@dataclass(frozen=True)
class Options:
    """What to predict.

    Attributes:
        methods: merging methods; ``None``: average, task_arithmetic, risk_optimal; with tangents also ties, dare.
        settings: settings by method.
        coefficients: scales lambda of task arithmetic.
        alphas: coefficient vectors of the user's own, (N,) each.
        bounds: of every coefficient of risk_optimal, and of lambda.
        simplex: risk_optimal with nonnegative coefficients that sum to one.
        hull: risk_optimal and the best scale with nonnegative coefficients of sum at most one.  ``None``: where the
            network has BatchNorm and ``bounds`` is as it comes, for there larger sums make running variances negative.
        objective: which prediction is minimised; ``None``: the middle of the bracket, or the secant without tangents.
        tangent, bound: collect tangents; compute the master bound (both need derivatives).  ``None``: if
            ``Group.work`` is at most :data:`TANGENT_LIMIT`.
        seed: for methods that draw random numbers, and for the measured smoothness.
    """

    methods: tuple[str, ...] | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    coefficients: tuple[float, ...] = (0.3,)
    alphas: tuple[tuple[float, ...], ...] = ()
    bounds: tuple[float, float] = (0.0, 1.0)
    simplex: bool = False
    hull: bool | None = None
    objective: Objective | None = None
    tangent: bool | None = None
    bound: bool | None = None
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty: ``standard_error`` from the calibration images, ``tier`` as everywhere."""

    value: float
    standard_error: float
    tier: str = "estimated"


@dataclass(frozen=True)
class TaskRisk:
    """Predicted risk of a merge on one task, in nats."""

    expert: str
    secant: Estimate | None
    tangent: Estimate | None
    middle: Estimate | None


@dataclass(frozen=True)
class MasterBound:
    """The master bound of one merge: value in nats, terms as square roots (sqrt of nats) with their shares."""

    value: float
    tier: str
    terms: Mapping[str, float]
    shares: Mapping[str, float]
    vacuous: bool
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True)
class MethodPrediction:
    """Prediction for one merge.

    Attributes:
        label: method and what was set.
        method, settings: as ``mergebound merge`` takes them.
        coefficients: alpha; for non-linear methods the least-squares projection on the task vectors.
        linear: whether alpha is all there is.
        risk: the headline: the middle (logits of secant and tangent averaged; it may lie outside the two risks), or the
            secant without tangents.
        secant, tangent: the ends of the bracket.
        cost: merging cost, ``risk`` minus the experts' own (the standard error is that of the paired difference).
        accuracy: share of the images that the headline's logits classify rightly, mean over tasks.
        width: largest minus smallest of secant, tangent and middle.
        verdict: ``narrow``, ``medium``, ``wide`` or ``unknown``; ``advice`` says what to do about it.
        dispersion: V = mean_j |M - x_j|^2.
        optimality_gap: the prediction exceeds its minimum over the allowed coefficients by at most this.
        clamped: share of BatchNorm's running variances that this merge makes negative and merging clamps at zero
            (measured from the checkpoints); above 0 no prediction holds, and the numbers are NaN.
        command: makes this merge.
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    coefficients: tuple[float, ...]
    linear: bool
    risk: Estimate
    secant: Estimate
    tangent: Estimate | None
    cost: Estimate
    accuracy: Estimate
    width: float | None
    verdict: str
    advice: str
    tasks: tuple[TaskRisk, ...]
    dispersion: float
    optimality_gap: float | None
    clamped: float
    bound: MasterBound | None
    command: str


@dataclass(frozen=True)
class ExpertSummary:
    """One expert on its own calibration images: risks in nats, drift |x_i - x_0|, measured smoothness L."""

    name: str
    file: str
    data: str
    split: str
    images: int
    images_available: int
    classes: int
    risk: Estimate
    accuracy: float
    base_risk: Estimate
    drift: float
    smoothness: float | None


@dataclass(frozen=True)
class Report:
    """Everything that was predicted; plain data, see :func:`dataclasses.asdict`.

    ``best`` is the label of the method with the smallest predicted risk; ``risk_optimal`` the label of the row with
    the coefficients that minimise ``objective``.
    """

    tier: str
    seed: int
    architecture: str
    parameters: int
    base: str
    private: tuple[str, ...]
    tangents: bool
    tangents_rule: str
    objective: str
    verdict_rule: str
    experts: tuple[ExpertSummary, ...]
    expert_risk: Estimate
    base_risk: Estimate
    methods: tuple[MethodPrediction, ...]
    best: str
    risk_optimal: str | None
    assumptions: tuple[Assumption, ...]
    notes: tuple[str, ...]
    seconds: float


# --- collecting ------------------------------------------------------------------------------------------------------


def _batches(group: Group, j: int) -> Iterator[Tensor]:
    values = group.form.channels * group.form.height * group.form.width
    yield from torch.split(group.data[j].split.images, max(1, min(256, BATCH_VALUES // values)))


def logits_at(group: Group, vector: Tensor, j: int) -> Array:
    """h_j at the coordinates ``vector``, (n, C): one forward pass over task j's images, in batches."""
    with torch.no_grad():
        parts = [group.networks[j].call(vector, batch) for batch in _batches(group, j)]
    return _wide(torch.cat(parts))


def product_at(group: Group, anchor: Tensor, direction: Tensor, j: int) -> Array:
    """J_j(anchor) direction, (n, C), in batches.

    Raises:
        MergeboundError: a layer of the network has no forward-mode derivative.
    """
    network = group.networks[j]
    try:
        with torch.no_grad():
            parts = [
                jvp(lambda v, x=batch: network.call(v, x), (anchor,), (direction,))[1] for batch in _batches(group, j)
            ]
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise MergeboundError(
            f"--tangent: {group.architecture!r} has no forward-mode derivatives ({reason}); pass --no-tangent"
        ) from error
    return _wide(torch.cat(parts))


def _wide(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy())


def collect_group(group: Group, tangent: bool, progress: Progress) -> GroupStatistics:
    """Logits of the base and of every expert on every task, and with ``tangent`` the products J_j(x_0) Delta_i."""
    n = group.size
    total, done = n * (n + 1) + (n * n if tangent else 0), 0
    base_logits, expert_logits, products = [], [], []
    for j in range(n):
        base_logits.append(logits_at(group, group.base, j))
        rows = []
        for vector in group.vectors:
            rows.append(logits_at(group, vector, j))
            done += 1
            progress(f"forward passes on {group.data_paths[j].name}", done, total)
        expert_logits.append(np.stack(rows))
        done += 1
        columns = []
        for vector in group.vectors if tangent else ():
            columns.append(product_at(group, group.base, vector - group.base, j))
            done += 1
            progress(f"Jacobian products on {group.data_paths[j].name}", done, total)
        if tangent:
            products.append(np.stack(columns))
        for what, values in (("the base", base_logits[-1]), *zip(group.names, expert_logits[-1], strict=True)):
            if not np.isfinite(values).all():
                raise MergeboundError(
                    f"{group.data_paths[j]}: the logits of {what} are not finite on these images; check --mean, --std "
                    "and the checkpoint"
                )
    gram = np.array([[_inner(group, i, k) for k in range(n)] for i in range(n)])
    labels = tuple(item.split.labels.numpy() for item in group.data)
    return GroupStatistics(labels, tuple(base_logits), tuple(expert_logits), tuple(products), (), gram)


def _inner(group: Group, i: int, k: int) -> float:
    a, b = group.vectors[i] - group.base, group.vectors[k] - group.base
    return float(torch.dot(a.double(), b.double()))


def measured_smoothness(group: Group, j: int, seed: int) -> float:
    """Largest Gauss-Newton eigenvalue of task j's loss in (coordinates, private tensors), at the base and at x_j."""
    network, own = group.networks[j], group.private[j]
    floating = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
    heads = FlatSpace.of(floating)
    space = FlatSpace(
        network.space.names + heads.names,
        network.space.shapes + heads.shapes,
        network.space.offsets + tuple(offset + network.space.size for offset in heads.offsets[1:]),
        torch.float32,
    )
    constants = {name: v for name, v in network.constants.items() if name.removeprefix("model.") not in floating}
    joint = replace(network, space=space, constants=constants)
    tail = heads.flatten(floating) if floating else torch.zeros(0)
    some = group.data[j].split.images[: min(SMOOTHNESS_IMAGES, next(_batches(group, j)).shape[0])]
    points = (group.base, group.vectors[j])
    return max(
        smoothness(joint, torch.cat((point, tail)), Readout(), some, iterations=4, seed=seed) for point in points
    )


# --- predicting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """One merge to price: ``point`` has everything for predictions, ``bound`` the theory's name of the method."""

    label: str
    method: str
    settings: Mapping[str, Any]
    point: MergePoint
    linear: bool
    gap: float | None = None
    alpha: tuple[float, ...] | None = None
    clamped: float = 0.0


def predict(group: Group, options: Options | None = None, progress: Progress | None = None) -> Report:
    """Predict the joint risk of merging the group, for every method, without forming a merge that is linear.

    TIES and DARE are formed as vectors (not evaluated): their predictions need M - x_0.

    Raises:
        MergeboundError: options that do not fit, or a network without the derivatives asked for.
    """
    started = time.perf_counter()
    wanted = options or Options()
    tell = progress or (lambda stage, done, total: None)
    methods, tangent, with_bound, notes = _decide(group, wanted)
    try:
        stats = collect_group(group, tangent, tell)
    except MergeboundError as error:
        if wanted.tangent is not None or not str(error).startswith("--tangent"):
            raise
        notes.append(f"tangents were left out: {error}")
        methods = tuple(name for name in methods if get(name).linear)
        tangent = False
        with_bound = bool(wanted.bound)
        stats = collect_group(group, False, tell)
    objective: Objective = wanted.objective or ("middle" if tangent else "secant")
    if objective != "secant" and not tangent:
        raise MergeboundError(f"--objective {objective}: it needs tangents; pass --tangent, or --objective secant")
    stiffness = _smoothness(group, wanted.seed, tell) if with_bound else None
    plans = _plans(group, stats, methods, wanted, objective)
    own = [cross_entropy(stats.own_logits(j), stats.labels[j]) for j in range(group.size)]
    base = [cross_entropy(h, y) for h, y in zip(stats.base_logits, stats.labels, strict=True)]
    base_risk = _joint(group, base)
    rows = tuple(_price(group, stats, plan, own, base_risk.value, stiffness, wanted.seed) for plan in plans)
    notes.extend(_notes(group, stats))
    drift = np.sqrt(np.diag(stats.gram))
    experts = tuple(
        ExpertSummary(
            group.names[j],
            str(group.expert_paths[j]),
            str(group.data_paths[j]),
            group.data[j].name,
            len(group.data[j].split),
            group.data[j].total,
            group.classes[j],
            _single_task(own[j]),
            float((stats.own_logits(j).argmax(axis=1) == stats.labels[j]).mean()),
            _single_task(base[j]),
            float(drift[j]),
            None if stiffness is None else float(stiffness[j]),
        )
        for j in range(group.size)
    )
    images = max(len(item.split) for item in group.data)
    comparison = "at most" if group.work <= TANGENT_LIMIT else "above"
    return Report(
        tier="estimated",
        seed=wanted.seed,
        architecture=group.architecture,
        parameters=group.base.numel(),
        base=str(group.base_path),
        private=group.patterns,
        tangents=tangent,
        tangents_rule=(
            f"parameters x positions x images x experts^2 = {group.base.numel()} x {group.positions:g} x {images} x "
            f"{group.size}^2 = {group.work:.2g}, "
            f"{comparison} {TANGENT_LIMIT:.0e}" + ("" if wanted.tangent is None else "; the choice was given")
        ),
        objective=objective,
        verdict_rule=(
            f"wide: largest of secant, tangent and middle at least {WIDE} x the smallest and above the base's "
            f"risk, or all above it, or running variances clamped; narrow: largest at most {NARROW} x the smallest, or "
            "within a standard error; medium otherwise"
        ),
        experts=experts,
        expert_risk=_joint(group, own),
        base_risk=base_risk,
        methods=rows,
        best=min(rows, key=lambda row: (row.clamped > 0.0, row.risk.value)).label,
        risk_optimal=next(
            (plan.label for plan in plans if plan.gap is not None and plan.method == "risk_optimal"), None
        ),
        assumptions=_assumptions(group, tangent),
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _decide(group: Group, options: Options) -> tuple[tuple[str, ...], bool, bool, list[str]]:
    """Methods, whether tangents are collected, whether the bound is computed, and what to tell about it."""
    cheap = group.work <= TANGENT_LIMIT
    named = [get(name) for name in options.methods or ()]
    for method in named:
        if method.needs_data:
            raise MethodError(f"method '{method.name}' needs statistics of data, which cannot be priced; leave it out")
    curved = [method.name for method in named if not method.linear]
    if curved and options.tangent is False:
        raise MethodError(f"method '{curved[0]}' is not linear and needs Jacobian products; drop --no-tangent, or it")
    tangent = options.tangent if options.tangent is not None else cheap or bool(curved)
    usual = ("average", "task_arithmetic", "ties", "dare", "risk_optimal")
    methods = options.methods or tuple(name for name in usual if tangent or get(name).linear)
    for name in options.settings:
        if name not in methods:
            raise MethodError(
                f"--set: method '{name}' is not among --methods {','.join(methods)}; add it, or drop --set"
            )
    for alpha in options.alphas:
        if len(alpha) != group.size or not np.isfinite(alpha).all():
            raise MethodError(
                f"--alpha {','.join(map(str, alpha))}: give one finite number for each of the {group.size} experts"
            )
    if "weighted" in methods and not options.alphas:
        raise MethodError(
            f"method 'weighted' needs coefficients: add --alpha with {group.size} comma-separated numbers"
        )
    if not np.isfinite(options.coefficients).all():
        raise MethodError(f"--coefficients {options.coefficients}: give finite numbers")
    if not np.isfinite(options.bounds).all() or not options.bounds[0] < options.bounds[1]:
        raise MethodError(f"--bounds {options.bounds[0]},{options.bounds[1]}: give two finite numbers, the lower first")
    if options.hull and options.bounds != Options().bounds:
        raise MergeboundError("--hull keeps coefficients between 0 and 1 with a sum of at most 1; drop it, or --bounds")
    notes = []
    if not tangent:
        notes.append("secant only: an under-estimate where merging hurts; --tangent adds the other end of the bracket")
    if in_hull(group, options) and options.hull is None and not options.simplex:
        notes.append(
            "BatchNorm: risk_optimal and the best scale keep their coefficients' sum at most 1, above which running "
            "variances become negative; --no-hull allows all of --bounds"
        )
    return methods, tangent, cheap if options.bound is None else options.bound, notes


def _smoothness(group: Group, seed: int, progress: Progress) -> Array:
    values = []
    for j in range(group.size):
        try:
            values.append(measured_smoothness(group, j, seed))
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise MergeboundError(
                f"--bound: the smoothness of {group.architecture!r} cannot be measured ({reason}); pass --no-bound"
            ) from error
        progress("smoothness", j + 1, group.size)
    return np.array(values)


def _plans(
    group: Group, stats: GroupStatistics, methods: Sequence[str], options: Options, objective: Objective
) -> list[_Plan]:
    n, fields = group.size, stats.fields(_KINDS[objective])
    plans: list[_Plan] = []
    hull = in_hull(group, options)
    space, deltas = group.networks[0].space, group.vectors - group.base

    def linear(label: str, name: str, alpha: Array, settings: Mapping[str, Any], gap: float | None = None) -> None:
        point = MergePoint(alpha, None, None, _dispersion(alpha, stats.gram))
        given = tuple(float(v) for v in alpha) if name in ("risk_optimal", "weighted") else None
        clamped = clamped_share(space, group.base, deltas, alpha)
        plans.append(_Plan(label, name, settings, point, True, gap, given, clamped))

    for name in methods:
        method, settings = get(name), dict(options.settings.get(name, {}))
        if name == "task_arithmetic":
            scales = (settings["coefficient"],) if "coefficient" in settings else options.coefficients
            for scale in scales:
                linear(f"task_arithmetic({scale:g})", name, np.full(n, float(scale)), {"coefficient": float(scale)})
            summed = [LogitField(f.constant, f.slopes.sum(axis=0)[None], f.labels, f.kind) for f in fields]
            best = minimise_risk(summed, bounds=(0.0, 1.0 / n) if hull else options.bounds)
            scale = float(best.alpha[0])
            linear(f"task_arithmetic(best {scale:.3g})", name, np.full(n, scale), {"coefficient": scale}, best.gap)
        elif name == "risk_optimal":
            best = minimise_risk(fields, bounds=options.bounds, simplex=options.simplex, hull=hull)
            linear("risk_optimal", name, best.alpha, settings, best.gap)
        elif method.coefficients == "required":
            for alpha in options.alphas:
                shown = ", ".join(f"{value:g}" for value in alpha)
                filled = method.settings(settings)
                linear(f"{name}({shown})", name, _linear_alpha(method, n, {**filled, "coefficients": alpha}), settings)
                plans[-1] = replace(plans[-1], alpha=alpha)
        elif method.linear:
            linear(name, name, _linear_alpha(method, n, method.settings(settings)), settings)
        else:
            plans.append(_curved(group, name, settings, options.seed))
    if "weighted" not in methods:
        for alpha in options.alphas:
            linear(
                f"given({', '.join(f'{v:g}' for v in alpha)})", "risk_optimal", np.array(alpha, dtype=np.float64), {}
            )
    return plans


def in_hull(group: Group, options: Options) -> bool:
    """Whether chosen coefficients are kept nonnegative with a sum of at most one."""
    return stays_in_hull(group.networks[0].space.names, options.hull, options.bounds)


def _linear_alpha(method: Method, size: int, settings: Mapping[str, Any]) -> Array:
    """Coefficients of a linear method: what it does to N unit vectors."""
    rows = list(torch.eye(size, dtype=torch.float64))
    space = FlatSpace(("unit",), ((size,),), (0, size), torch.float64)
    return np.asarray(method.on_rows(rows, space, **settings).numpy())


def _dispersion(alpha: Array, gram: Array) -> float:
    """V = mean_j |M - x_j|^2 from the inner products of the task vectors."""
    apart = alpha[None] - np.eye(len(alpha))
    return float(max(np.einsum("ji,ik,jk->j", apart, gram, apart).mean(), 0.0))


def _curved(group: Group, name: str, settings: Mapping[str, Any], seed: int) -> _Plan:
    deltas = group.vectors - group.base
    network = group.networks[0]
    vector = merge_flat(
        name, group.base, deltas, network.space, network.partition, names=group.names, seed=seed, **settings
    )
    alpha, residual = project(vector - group.base, deltas)
    products = tuple(product_at(group, group.base, residual, j) for j in range(group.size))
    V = float((vector - group.vectors).double().square().sum(dim=1).mean())
    shown = ", ".join(f"{key}={value}" for key, value in settings.items())
    clamped = zero_share(network.space, group.base, vector, deltas)
    point = MergePoint(alpha, products, None, V)
    return _Plan(f"{name}({shown})" if shown else name, name, settings, point, False, clamped=clamped)


def _price(
    group: Group,
    stats: GroupStatistics,
    plan: _Plan,
    own: Sequence[Array],
    base_risk: float,
    stiffness: Array | None,
    seed: int,
) -> MethodPrediction:
    kinds = {name: kind for name, kind in _KINDS.items() if kind == "secant" or stats.base_products}
    logits = {name: predicted_logits(stats, plan.point, kind) for name, kind in kinds.items()}
    losses = {
        name: [cross_entropy(h, y) for h, y in zip(found, stats.labels, strict=True)] for name, found in logits.items()
    }
    if plan.clamped > 0.0:
        losses = {name: [np.full_like(values, np.nan) for values in found] for name, found in losses.items()}
    joint = {name: _joint(group, values) for name, values in losses.items()}
    headline: Objective = "middle" if "middle" in joint else "secant"
    cost = _joint(group, [a - b for a, b in zip(losses[headline], own, strict=True)])
    hits = [(h.argmax(axis=1) == y).astype(np.float64) for h, y in zip(logits[headline], stats.labels, strict=True)]
    accuracy = _joint(group, hits) if plan.clamped == 0.0 else Estimate(float("nan"), float("nan"))
    width, verdict, advice = _verdict(joint, base_risk, plan.clamped)
    return MethodPrediction(
        label=plan.label,
        method=plan.method,
        settings=plan.settings,
        coefficients=tuple(float(v) for v in plan.point.alpha),
        linear=plan.linear,
        risk=joint[headline],
        secant=joint["secant"],
        tangent=joint.get("tangent"),
        cost=cost,
        accuracy=accuracy,
        width=width,
        verdict=verdict,
        advice=advice,
        tasks=tuple(
            TaskRisk(name, *(_single_task(losses[kind][j]) if kind in losses else None for kind in OBJECTIVES))
            for j, name in enumerate(group.names)
        ),
        dispersion=plan.point.dispersion,
        optimality_gap=plan.gap,
        clamped=plan.clamped,
        bound=None if stiffness is None else _bound(group, plan, own, stiffness, stats.gram),
        command=_command(group, plan, seed),
    )


def _joint(group: Group, losses: Sequence[Array]) -> Estimate:
    """Mean over tasks of the mean loss; tasks on the same images are added image by image before the error is taken."""
    p = uniform_weights(group.size)
    by_source: dict[int, Array] = {}
    for j, source in enumerate(group.sources):
        by_source[source] = by_source.get(source, 0.0) + p[j] * losses[j]
    value = sum(float(values.mean()) for values in by_source.values())
    variance = sum(float(values.var()) / max(len(values) - 1, 1) for values in by_source.values())
    return Estimate(value, float(np.sqrt(variance)))


def _single_task(losses: Array) -> Estimate:
    return Estimate(float(losses.mean()), float(losses.std() / np.sqrt(max(len(losses) - 1, 1))))


def _verdict(joint: Mapping[Objective, Estimate], base_risk: float, clamped: float) -> tuple[float | None, str, str]:
    if clamped > 0.0:
        return (
            None,
            "wide",
            f"{clamped:.1%} of BatchNorm's running variances become negative and are clamped at 0, which no prediction "
            "sees: expect collapse; keep the coefficients' sum at most 1, or re-estimate the statistics",
        )
    if "tangent" not in joint:
        return None, "unknown", "secant only: no bracket; --tangent adds it"
    values = [joint[name].value for name in OBJECTIVES]
    low, high = min(values), max(values)
    error = max(joint["secant"].standard_error, joint["tangent"].standard_error)
    width = high - low
    if low > base_risk + 2.0 * error:
        return width, "wide", "worse than the base by every prediction: collapse; do not merge like this"
    if width <= max((NARROW - 1.0) * low, error):
        return width, "narrow", "trust the prediction"
    if high >= WIDE * low and high > base_risk:
        return width, "wide", "collapse is possible and the value uncertain: do not merge like this without evaluating"
    return width, "medium", "merging hurts: read it as a ranking and evaluate the merge before use"


def _bound(group: Group, plan: _Plan, own: Sequence[Array], stiffness: Array, gram: Array) -> MasterBound:
    """Three terms from measured V and L and held-out risks; the operator matters through V alone."""
    bound = network_bound(
        np.array([float(losses.mean()) for losses in own]),
        stiffness,
        np.sqrt(np.diag(gram)),
        names=group.names,
        dispersion=plan.point.dispersion,
        trained_heads=bool(group.patterns),
        held_out=True,
    )
    return MasterBound(
        float(bound.value),
        bound.tier,
        {term.name: float(term.value) for term in bound.terms},
        {term.name: float(term.share) for term in bound.terms},
        bool(float(bound.value) >= float(np.mean(np.log(group.classes)))),
        bound.assumptions,
    )


def _command(group: Group, plan: _Plan, seed: int) -> str:
    parts = ["mergebound", "merge", "--method", plan.method, "--base", str(group.base_path)]
    if plan.alpha is not None:
        parts.append("--alpha=" + ",".join(repr(value) for value in plan.alpha))
    for name, value in plan.settings.items():
        parts += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    if not get(plan.method).deterministic:
        parts += ["--seed", str(seed)]
    for pattern in group.patterns or ("",):
        parts += ["--private", pattern]
    return shlex.join([*parts, "--out", "merged.safetensors", *map(str, group.expert_paths)])


def _assumptions(group: Group, tangent: bool) -> tuple[Assumption, ...]:
    used = ", ".join(dict.fromkeys(item.name or "the only split" for item in group.data))
    return (
        Assumption(
            "A1", "samples of different tasks are independent", "unknown", "how the experts were trained is unknown"
        ),
        Assumption(
            "A2",
            "coefficients do not depend on the images they are judged on",
            "violated",
            "risk_optimal, the best scale and their predictions use the same calibration images; judge on others",
        ),
        Assumption(
            "A3",
            "the loss is a per-sample loss (no BatchNorm in train mode)",
            "violated" if group.batch_norm else "holds",
            "the network has BatchNorm" if group.batch_norm else "the network has no BatchNorm",
        ),
        Assumption("4-6", "experts were trained by SGD", "unknown", "how the experts were trained is unknown"),
        Assumption(
            "held out",
            "calibration images were not trained on",
            "violated" if any(item.name == "train" for item in group.data) else "unknown",
            f"split: {used}",
        ),
        Assumption(
            "8",
            "logits are close to linear in the coefficients",
            "unknown",
            "the bracket's width shows it" if tangent else "not checked: no tangents were collected",
        ),
    )


def _notes(group: Group, stats: GroupStatistics) -> list[str]:
    notes = []
    splits = {item.name for item in group.data}
    if "train" in splits:
        notes.append(
            "calibrated on images of the split 'train': if the experts were trained on them, risks come out too low"
        )
    if "test" in splits:
        notes.append("calibrated on images of the split 'test': judge the merge on other images")
    for j, risk in enumerate(stats.own_risks()):
        if risk >= np.log(group.classes[j]):
            notes.append(
                f"{group.names[j]} is no better than chance on {group.data_paths[j].name}: check the order of --data, "
                "the order of classes, --mean and --std"
            )
    if len(set(group.sources)) < group.size:
        notes.append("tasks share calibration images; standard errors account for it")
    return notes


__all__ = [
    "Estimate",
    "Group",
    "MasterBound",
    "MethodPrediction",
    "Options",
    "Report",
    "collect_group",
    "load_group",
    "predict",
]
