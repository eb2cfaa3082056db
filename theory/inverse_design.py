"""Inverse design: the training that minimises the master bound under a budget, or the cheapest that meets a target.

Say which fields are *free* and between which limits; everything else is fixed::

    design(merge, {"learning_rate": (1e-3, 0.5), "*.steps": (10, 5000)}, budgets=[Budget("samples", 1e6)])

``"steps"`` is one common value for all experts, ``"*.steps"`` one value per expert, ``"photos.steps"`` that expert
alone.  Free fields: ``learning_rate`` (the peak, where the recipe has a schedule), ``steps``, ``batch_size``, ``n``
(share of a data budget), and ``coefficients`` of the merge.

How it is solved: a random sample of the box in logarithms, repaired to the budget; a pattern search from the best
points, on whole steps, batches and samples; then branch and bound on boxes, whose guaranteed lower ends come from
:mod:`theory.enclosure`.  The result says how far the best point found is, at most, above the true minimum (``gap``);
where the lower ends are not proven (momentum, schedules, reshuffling, a risk model) there is no gap and it says so.

Constants of the loss (L, g, sigma, D, ...) are taken to hold on the whole design range: choose them accordingly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from theory.bound import Bound, _table
from theory.enclosure import enclose, unchecked
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert, Merge, Schedule
from theory.risk import master_bound
from theory.symbolic import FloatArray

CostKind = Literal["samples", "steps", "flops", "data"]
RiskModel = Callable[[Expert], ArrayLike]
EXPERT_FIELDS = ("learning_rate", "steps", "batch_size", "n")
WHOLE = ("steps", "batch_size", "n")
BOUND_TO_A_RUN = ("training_risk", "drift", "private_drift", "epsilon", "batch_gradient_norms", "batch_losses")
SENSITIVE = (
    *("learning_rate", "steps", "batch_size", "n", "weight_decay", "L", "mu", "kappa", "pl_constant"),
    *("initial_gradient_norm", "sigma", "sigma0", "G", "D_inf", "D_2", "D_envelope", "initial_risk", "minimal_risk"),
    "training_risk",
)


@dataclass(frozen=True)
class Budget:
    """A limit on what all experts together may use.

    ``samples``: gradients of single samples, ``sum K_i b_i``; ``steps``: ``sum K_i``; ``flops``: ``sum c_i K_i b_i``
    with ``per_sample`` c (FLOPs per sample and step, one number or one per expert name); ``data``: ``sum n_i``.
    """

    kind: CostKind
    limit: float
    per_sample: float | Mapping[str, float] = 1.0


@dataclass(frozen=True)
class ShadowPrice:
    """What one more unit is worth at the optimum: ``d objective / d limit``, and the elasticity of the two.

    ``step`` is the relative change of the limit over which the problem was solved again (relaxed to real numbers).
    """

    name: str
    price: float
    elasticity: float
    step: float


@dataclass(frozen=True)
class Sensitivity:
    """``d log(bound) / d log(field)`` of one expert at the design, everything else fixed; ``role`` free or fixed.

    For a fixed field this is also the sensitivity of the *optimal* bound (envelope theorem).
    """

    expert: str
    field: str
    elasticity: float
    role: str


@dataclass(frozen=True, eq=False)
class Design:
    """A recipe chosen by :func:`design`, with the evidence that it is (nearly) the best.

    ``merge`` is the recipe with every field set, ``bound`` its master bound; ``objective`` the minimised number (the
    bound without the step-by-step recursions, or the cost); ``choices`` the value of every free variable; ``cost`` all
    kinds of cost; ``active_term`` the largest term; ``limits`` which limits and budgets are reached.  ``lower_bound``:
    no recipe of the design range has a smaller objective (None where not proven); ``gap`` the relative difference.
    """

    merge: Merge
    bound: Bound
    objective: float
    choices: Mapping[str, float]
    cost: Mapping[str, float]
    active_term: str
    limits: tuple[str, ...]
    shadow_prices: tuple[ShadowPrice, ...]
    sensitivities: tuple[Sensitivity, ...]
    lower_bound: float | None
    gap: float | None
    evidence: str

    def explain(self) -> str:
        """Readable report: choices, costs, active term and limits, shadow prices, sensitivities, evidence."""
        lines = [f"E F(M) <= {float(self.bound.value):.4g}   (tier: {self.bound.tier})", ""]
        lines += _table([("free", "value"), *((name, f"{value:.6g}") for name, value in self.choices.items())])
        lines += ["", *_table([("cost", "used"), *((name, f"{value:.6g}") for name, value in self.cost.items())])]
        lines += ["", f"active term: {self.active_term}", "limits reached: " + (", ".join(self.limits) or "none")]
        if self.shadow_prices:
            rows = [(item.name, f"{item.price:.4g}", f"{item.elasticity:.3f}") for item in self.shadow_prices]
            lines += ["", *_table([("limit", "price per unit", "elasticity"), *rows])]
        table = [(item.expert, item.field, f"{item.elasticity:+.3f}", item.role) for item in self.sensitivities]
        lines += ["", *_table([("expert", "field", "elasticity of the bound", "role"), *table])]
        lines += ["", self.evidence]
        lines.append("constants of the loss are taken to hold on the whole design range")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Variable:
    name: str
    field: str
    experts: tuple[int, ...]
    lower: float
    upper: float

    @property
    def whole(self) -> bool:
        return self.field in WHOLE


# --- what is asked ----------------------------------------------------------------------------------------------------


def _variables(merge: Merge, free: Mapping[str, tuple[float, float]]) -> tuple[_Variable, ...]:
    names = [expert.name for expert in merge.experts]
    made: list[_Variable] = []
    for key, limits in free.items():
        owner, dot, field = key.rpartition(".")
        if field not in (*EXPERT_FIELDS, "coefficients"):
            raise RecipeError(
                f"design: {key!r} cannot be free; choose {', '.join(EXPERT_FIELDS)} or coefficients, with '*.' or an "
                "expert's name in front"
            )
        if dot and owner != "*" and owner not in names:
            raise RecipeError(f"design: {key!r} names no expert; the experts are {', '.join(names)}")
        try:
            low, high = (float(limit) for limit in limits)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"design: {key!r} needs two limits (lower, upper); give two numbers") from error
        if not (0 < low <= high < np.inf):
            raise RecipeError(f"design: the limits of {key!r} are {limits}; give 0 < lower <= upper")
        if field in WHOLE:
            low, high = float(np.ceil(low)), float(np.floor(high))
            if low > high:
                raise RecipeError(f"design: there is no whole number between the limits of {key!r}; widen them")
        everyone = tuple(range(len(names)))
        if owner == "*":
            made += [_Variable(f"{names[i]}.{field}", field, (i,), low, high) for i in everyone]
        else:
            made.append(_Variable(key, field, (names.index(owner),) if dot else everyone, low, high))
    if not made:
        raise RecipeError("design: nothing is free; name at least one field with its limits")
    taken = [(item.field, index) for item in made for index in item.experts]
    twice = sorted({pair for pair in taken if taken.count(pair) > 1})
    if twice:
        raise RecipeError(f"design: {twice[0][0]} of expert {names[twice[0][1]]!r} is free twice; name it once")
    return tuple(made)


def _refuse(merge: Merge, variables: Sequence[_Variable], models: Mapping[str, RiskModel]) -> None:
    moved = {index for item in variables if item.field in EXPERT_FIELDS for index in item.experts}
    for index in sorted(moved):
        expert = merge.experts[index]
        for field in BOUND_TO_A_RUN:
            if getattr(expert, field) is None or (field == "training_risk" and expert.name in models):
                continue
            remedy = (
                "leave it out and give initial_risk, sigma, minimal_risk and one of pl_constant, mu and "
                "minimizer_distance, or a model in risk_models"
                if field == "training_risk"
                else "leave it out and give the constants that the theorems need"
            )
            raise RecipeError(
                f"expert {expert.name!r}: {field} belongs to one run and would not follow the free fields; {remedy}"
            )
        scheduled = isinstance(expert.learning_rate, Schedule) or isinstance(expert.batch_size, Schedule)
        fields_free = {item.field for item in variables if index in item.experts}
        if scheduled and "steps" in fields_free:
            raise RecipeError(
                f"expert {expert.name!r}: steps cannot be free with a schedule; design every length by itself, or use "
                "a constant learning rate and batch size"
            )
        if isinstance(expert.batch_size, Schedule) and "batch_size" in fields_free:
            raise RecipeError(f"expert {expert.name!r}: batch_size is a schedule; give one number to make it free")
    if merge.dispersion is not None:
        raise RecipeError("merge: dispersion was measured at one recipe and would not follow; leave it out")
    if any(item.field == "coefficients" for item in variables):
        if merge.method not in ("weighted", "task_arithmetic"):
            raise RecipeError(
                f"merge: method {merge.method!r} has no free coefficients; choose 'weighted' or 'task_arithmetic'"
            )
        if merge.sensitivity is not None:
            raise RecipeError("merge: sensitivity was given for fixed coefficients; leave it out")
    for item in merge.experts:
        for entry in fields(Expert):
            value = getattr(item, entry.name)
            if not isinstance(value, (Schedule, str, frozenset, bool)) and np.ndim(value) != 0:
                raise RecipeError(f"expert {item.name!r}: {entry.name} is an array; design takes one recipe")


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is minimised, over columns of variables: arrays ``x`` have shape ``(variables, candidates)``."""

    merge: Merge
    variables: tuple[_Variable, ...]
    budgets: tuple[Budget, ...]
    target: float | None
    cost: Budget
    models: Mapping[str, RiskModel]

    @property
    def lower(self) -> FloatArray:
        return np.array([item.lower for item in self.variables])

    @property
    def upper(self) -> FloatArray:
        return np.array([item.upper for item in self.variables])

    def snapped(self, x: FloatArray) -> FloatArray:
        whole = np.array([item.whole for item in self.variables])[:, None]
        return np.where(whole, np.round(x), x)

    def column(self, x: FloatArray, field: str, index: int) -> FloatArray:
        """A field of an expert at every candidate; coefficients of the merge with field ``coefficients``."""
        for row, item in enumerate(self.variables):
            if item.field == field and index in item.experts:
                return np.asarray(x[row])
        if field == "coefficients":
            given = self.merge.coefficients if self.merge.coefficients is not None else self.merge.weights
            alpha = np.full(self.merge.size, 1 / self.merge.size) if given is None else np.asarray(given)
            return np.broadcast_to(np.broadcast_to(alpha, (self.merge.size,))[index], x.shape[1:]).astype(np.float64)
        expert = self.merge.experts[index]
        value: Any = getattr(expert, field)
        if field == "steps" and value is None:
            lengths = [item.steps for item in (expert.learning_rate, expert.batch_size) if isinstance(item, Schedule)]
            value = lengths[0]
        if isinstance(value, Schedule):
            value = value.values.mean() if field == "batch_size" else value.values.max()
        return np.broadcast_to(np.asarray(value, dtype=np.float64), x.shape[1:])

    def spent(self, x: FloatArray, budget: Budget) -> FloatArray:
        total = np.zeros(x.shape[1:])
        for index, expert in enumerate(self.merge.experts):
            steps, batch = self.column(x, "steps", index), self.column(x, "batch_size", index)
            if budget.kind == "steps":
                total = total + steps
            elif budget.kind == "data":
                total = total + self.column(x, "n", index)
            else:
                price = budget.per_sample if budget.kind == "flops" else 1.0
                each = price[expert.name] if isinstance(price, Mapping) else price
                total = total + each * steps * batch
        return total

    def allowed(self, x: FloatArray) -> np.ndarray:
        """Candidates inside limits, budgets and the domain of the bound."""
        slack = 1 + 1e-12
        good = np.all((x >= self.lower[:, None] / slack) & (x <= self.upper[:, None] * slack), axis=0)
        for budget in self.budgets:
            good &= self.spent(x, budget) <= budget.limit * slack
        for index, expert in enumerate(self.merge.experts):
            if expert.sampling != "with_replacement":
                good &= self.column(x, "batch_size", index) <= self.column(x, "n", index)
            if expert.kappa is not None:
                rate = self.column(x, "learning_rate", index)
                good &= 1 + rate * np.asarray(expert.kappa, dtype=np.float64) >= 0
        return np.asarray(good)

    def candidate(self, x: FloatArray) -> Merge:
        """The merge with every free field set; fields have the shape of the candidates, and are not checked again."""
        made: list[Expert] = []
        for index, expert in enumerate(self.merge.experts):
            changes: dict[str, Any] = {}
            for row, item in enumerate(self.variables):
                if index not in item.experts or item.field == "coefficients":
                    continue
                value: Any = x[row]
                if item.field == "learning_rate" and isinstance(expert.learning_rate, Schedule):
                    shape = expert.learning_rate.values
                    value = Schedule(np.asarray(value)[..., None] * (shape / shape.max()))
                changes[item.field] = value
            new = unchecked(expert, **changes)
            if expert.name in self.models:
                new = unchecked(new, training_risk=np.asarray(self.models[expert.name](new), dtype=np.float64))
                new = unchecked(new, measured=new.measured | {"training_risk"})
            made.append(new)
        extra: dict[str, Any] = {}
        if any(item.field == "coefficients" for item in self.variables):
            extra["coefficients"] = np.stack([self.column(x, "coefficients", i) for i in range(self.merge.size)])
        return replace(self.merge, experts=tuple(made), **extra)

    def bounds(self, x: FloatArray) -> FloatArray:
        """Master bound of every candidate, without the recursions; ``inf`` outside the domain."""
        value = np.full(x.shape[1], np.inf)
        good = self.allowed(x)
        if not good.any():
            return value
        with contextlib.suppress(AssumptionError):  # no candidate is in the domain of any form
            value[good] = master_bound(self.candidate(x[:, good]), recursion=False).value
        return np.where(np.isnan(value), np.inf, value)

    def objective(self, x: FloatArray) -> FloatArray:
        value = self.bounds(x)
        if self.target is None:
            return value
        return np.where(value <= self.target, self.spent(x, self.cost), np.inf)


# --- search -----------------------------------------------------------------------------------------------------------


def _repaired(problem: _Problem, x: FloatArray) -> FloatArray:
    """Candidates moved back into the budgets by fewer steps, smaller batches, fewer samples (in this order)."""
    x = x.copy()
    for budget in problem.budgets:
        order = ("n",) if budget.kind == "data" else ("steps", "batch_size")
        for field in order:
            rows = [row for row, item in enumerate(problem.variables) if item.field == field]
            for _ in range(3):
                over = np.maximum(problem.spent(x, budget) / budget.limit, 1.0)
                for row in rows:
                    moved = np.floor(x[row] / over) if problem.variables[row].whole else x[row] / over
                    x[row] = np.where(over > 1, np.maximum(moved, problem.variables[row].lower), x[row])
    return x


def _starts(problem: _Problem, rng: np.random.Generator, count: int) -> FloatArray:
    low, high = np.log(problem.lower)[:, None], np.log(problem.upper)[:, None]
    shares = rng.random((len(problem.variables), count))
    shares[:, 0], shares[:, 1], shares[:, 2] = 0.0, 1.0, 0.5
    x = problem.snapped(np.exp(low + (high - low) * shares))
    for index, expert in enumerate(problem.merge.experts):
        if expert.sampling == "with_replacement":
            continue
        for row, item in enumerate(problem.variables):
            if item.field == "batch_size" and index in item.experts:
                x[row] = np.minimum(x[row], problem.column(x, "n", index))
    return _repaired(problem, x)


def _pattern(count: int) -> FloatArray:
    """Directions of the pattern search: one variable, and two together or against each other; ``(variables, m)``."""
    single = np.eye(count)
    pairs = [single[i] + sign * single[j] for i in range(count) for j in range(i) for sign in (1.0, -1.0)]
    ways = np.array([*single, *pairs]).T
    return np.concatenate([ways, -ways], axis=1)


def _descend(problem: _Problem, start: FloatArray, *, relaxed: bool) -> tuple[FloatArray, float]:
    """Pattern search in logarithms from one point, then by single steps, batches and samples."""
    ways = _pattern(len(problem.variables))
    whole = np.array([item.whole for item in problem.variables])[:, None]
    best = start.copy()
    value = float(problem.objective(best[:, None])[0])

    def improve(trial: FloatArray) -> bool:
        nonlocal best, value
        if not relaxed:
            trial = problem.snapped(trial)
        trial = np.clip(trial, problem.lower[:, None], problem.upper[:, None])
        found = problem.objective(trial)
        winner = int(np.argmin(found))
        if not found[winner] < value * (1 - 1e-12):
            return False
        best, value = trial[:, winner], float(found[winner])
        return True

    size, finest = 0.5, 1e-6 if relaxed else 1e-5
    while size > finest:
        if not improve(best[:, None] * np.exp(size * ways)):
            size /= 2
    if not relaxed:
        for _ in range(200):
            near = best[:, None] + np.where(whole, 1, 0) * np.concatenate([ways, 2 * ways, 5 * ways], axis=1)
            fine = near * np.exp(np.where(whole, 0, 1e-3) * np.tile(ways, 3))
            if not (improve(np.concatenate([near, fine], axis=1)) or improve(best[:, None] * np.exp(1e-4 * ways))):
                break
    return best, value


@dataclass(frozen=True)
class _Proof:
    lower: float
    boxes: int
    closed: bool
    better: FloatArray | None


def _box_lower(problem: _Problem, low: FloatArray, high: FloatArray) -> FloatArray:
    """Guaranteed lower end of the bound in every box, shape ``(boxes,)``."""
    ranges: dict[str, dict[str, tuple[FloatArray, FloatArray]]] = {}
    names = [expert.name for expert in problem.merge.experts]
    for row, item in enumerate(problem.variables):
        if item.field != "coefficients":
            for index in item.experts:
                if isinstance(problem.merge.experts[index].learning_rate, Schedule):
                    raise AssumptionError(f"expert {names[index]!r} has a schedule, whose peak is free")
                ranges.setdefault(names[index], {})[item.field] = (low[row], high[row])
    span = None
    if any(item.field == "coefficients" for item in problem.variables):
        size = range(problem.merge.size)
        ends = [np.stack([problem.column(end, "coefficients", i) for i in size]) for end in (low, high)]
        span = (ends[0], ends[1])
    return np.broadcast_to(enclose(problem.merge, ranges, coefficient_range=span, recursion=False).lower, low.shape[1:])


def _branch(problem: _Problem, incumbent: float, tolerance: float, most: int) -> _Proof:
    """Branch and bound: the smallest objective that any point of the design range can have."""
    low, high = problem.lower[:, None].copy(), problem.upper[:, None].copy()
    whole = np.array([item.whole for item in problem.variables])[:, None]
    ends, better, done = np.array([-np.inf]), None, 0
    width = np.maximum(np.log(high / low)[:, 0], 1e-300)
    while True:
        cut = incumbent * (1 - tolerance)
        alive = ends < cut
        low, high, ends = low[:, alive], high[:, alive], ends[alive]
        if not len(ends):
            return _Proof(cut, done, True, better)
        if done >= most:
            return _Proof(float(min(cut, ends.min())), done, False, better)
        order = np.argsort(ends)
        take, keep = order[:1024], order[1024:]
        a, b = low[:, take], high[:, take]
        spread = np.log(b / a) / width[:, None] * np.where(np.log(b / a) > 1e-9, 1, 0)
        longest = np.argmax(spread, axis=0)
        columns = np.arange(a.shape[1])
        middle = np.sqrt(a[longest, columns] * b[longest, columns])
        is_whole = whole[longest, 0]
        left_end = np.where(is_whole, np.floor(middle), middle)
        right_end = np.where(is_whole, np.floor(middle) + 1, middle)
        point = np.max(spread, axis=0) <= 0
        b_left, a_right = b.copy(), a.copy()
        b_left[longest, columns], a_right[longest, columns] = left_end, right_end
        b_left = np.where(point, b, b_left)
        new_low = np.concatenate([a, a_right[:, ~point]], axis=1)
        new_high = np.concatenate([b_left, b[:, ~point]], axis=1)
        done += new_low.shape[1]
        fits = _feasible(problem, new_low, new_high)
        new_low, new_high = new_low[:, fits], new_high[:, fits]
        if new_low.shape[1]:
            bound = _box_lower(problem, new_low, new_high)
            if problem.target is None:
                new_ends = bound
            else:
                new_ends = np.where(bound <= problem.target, problem.spent(new_low, problem.cost), np.inf)
            middles = _repaired(problem, problem.snapped(np.sqrt(new_low * new_high)))
            found = problem.objective(middles)
            winner = int(np.argmin(found))
            if found[winner] < incumbent:
                incumbent, better = float(found[winner]), middles[:, winner]
            # a box that is one point is settled by its value
            single = np.all(np.log(new_high / new_low) <= 1e-9, axis=0)
            new_ends = np.where(single, np.maximum(new_ends, cut), new_ends)
        else:
            new_ends = np.zeros(0)
        low = np.concatenate([low[:, keep], new_low], axis=1)
        high = np.concatenate([high[:, keep], new_high], axis=1)
        ends = np.concatenate([ends[keep], new_ends])


def _feasible(problem: _Problem, low: FloatArray, high: FloatArray) -> np.ndarray:
    """Boxes that can hold an allowed point."""
    good = np.all(low <= high * (1 + 1e-12), axis=0)
    for budget in problem.budgets:
        good &= problem.spent(low, budget) <= budget.limit * (1 + 1e-12)
    for index, expert in enumerate(problem.merge.experts):
        if expert.sampling != "with_replacement":
            good &= problem.column(low, "batch_size", index) <= problem.column(high, "n", index)
    return np.asarray(good)


# --- the answer -------------------------------------------------------------------------------------------------------


def design(
    merge: Merge,
    free: Mapping[str, tuple[float, float]],
    *,
    budgets: Sequence[Budget] = (),
    target: float | None = None,
    minimal_risk: float = 0.0,
    cost: Budget | CostKind = "samples",
    risk_models: Mapping[str, RiskModel] | None = None,
    tolerance: float = 0.01,
    boxes: int = 60_000,
    starts: int = 4096,
    seed: int = 0,
) -> Design:
    """Hyperparameters, coefficients or data shares that minimise the master bound, or the cheapest that meet a target.

    ``free`` maps a field to its limits (module docstring); ``budgets`` limit the total cost.  Without ``target`` the
    bound is minimised; with it, ``cost`` (a kind, or a :class:`Budget` whose limit is ignored) is minimised subject to
    ``bound - minimal_risk <= target``.  The training risk must follow the hyperparameters: by a bound of section 8
    (``initial_risk``, ``sigma``, ``minimal_risk`` with ``pl_constant``, ``mu`` or ``minimizer_distance``), or by
    ``risk_models``, a function of the expert (fields are arrays over candidates) per name; the tier is then estimated.
    ``boxes`` limits branch and bound, which stops at a relative gap of ``tolerance``; ``starts`` and ``seed`` fix the
    random sample.

    Raises :class:`RecipeError` for a malformed question, a fixed field that would not follow, or a target that cannot
    be met (saying whether that is proven).  Source: theory section 11.

    >>> from theory import Expert, Merge
    >>> known = dict(n=1000, batch_size=10, learning_rate=0.1, steps=100, curvature="convex", L=1.0, D_inf=1.0,
    ...              initial_gradient_norm=1.0, sigma=1.0, initial_risk=1.0, minimal_risk=0.0, pl_constant=0.1)
    >>> merge = Merge((Expert("a", **known), Expert("b", **known)))
    >>> best = design(merge, {"learning_rate": (1e-3, 1.0), "steps": (1, 1000)}, budgets=[Budget("samples", 4000)])
    >>> best.cost["samples"] <= 4000 and best.gap <= 0.02
    True
    """
    models = dict(risk_models or {})
    variables = _variables(merge, free)
    _refuse(merge, variables, models)
    limits = _checked_budgets(merge, budgets, target, minimal_risk)
    unit = cost if isinstance(cost, Budget) else Budget(cost, np.inf)
    if unit.kind not in get_args(CostKind):
        raise RecipeError(f"design: cost {unit.kind!r}; choose one of {', '.join(get_args(CostKind))}")
    aim = None if target is None else target + minimal_risk
    problem = _Problem(merge, variables, limits, aim, unit, models)
    rng = np.random.default_rng(seed)
    _first_answer(problem, _starts(problem, rng, 64))
    best, value, agree = _search(problem, rng, starts)
    proof: _Proof | None = None
    reason = ""
    try:
        if models:
            raise AssumptionError("a risk model is not known to be monotone")
        proof = _branch(problem, value, tolerance, boxes)
        if proof.better is not None:
            moved, other = _descend(problem, problem.snapped(proof.better[:, None])[:, 0], relaxed=False)
            if other < value:
                best, value = moved, other
    except AssumptionError as error:
        reason = str(error)
    if not np.isfinite(value):
        smallest = float(np.min(replace(problem, target=None).objective(_starts(problem, rng, starts))))
        proven = proof is not None and proof.closed
        raise RecipeError(
            f"design: no recipe within limits and budgets {'can meet' if proven else 'was found that meets'} the "
            f"question (smallest bound seen: {smallest:g}); raise target or budgets, or widen the limits"
        )
    return _report(problem, best, value, proof, reason, agree, starts)


def _first_answer(problem: _Problem, sample: FloatArray) -> None:
    """One bound, so that what is missing in the recipe is said before anything is searched."""
    good = sample[:, problem.allowed(sample)]
    if good.shape[1] and not np.isfinite(problem.bounds(good)).any():
        master_bound(problem.candidate(good[:, 0]), recursion=False)


def _checked_budgets(
    merge: Merge, budgets: Sequence[Budget], target: float | None, minimal_risk: float
) -> tuple[Budget, ...]:
    for budget in budgets:
        if budget.kind not in get_args(CostKind):
            raise RecipeError(f"design: budget {budget.kind!r}; choose one of {', '.join(get_args(CostKind))}")
        if not budget.limit > 0:
            raise RecipeError(f"design: the {budget.kind} budget is {budget.limit!r}; give a positive number")
        if isinstance(budget.per_sample, Mapping):
            missing = [item.name for item in merge.experts if item.name not in budget.per_sample]
            if missing:
                raise RecipeError(f"design: per_sample lacks expert {missing[0]!r}; give one number per expert")
    for name, value in (("target", target), ("minimal_risk", minimal_risk)):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise RecipeError(f"design: {name} is {value!r}; give a finite number of at least 0")
    return tuple(budget for budget in budgets if np.isfinite(budget.limit))


def _search(problem: _Problem, rng: np.random.Generator, starts: int) -> tuple[FloatArray, float, str]:
    sample = _starts(problem, rng, max(starts, 8))
    found = problem.objective(sample)
    if problem.target is not None and not np.isfinite(found).any():
        # meet the target first: go down the bound
        easier = replace(problem, target=None)
        order = np.argsort(easier.objective(sample))[:4]
        points = [_descend(easier, sample[:, place], relaxed=False)[0] for place in order]
        sample = np.stack(points, axis=1)
        found = problem.objective(sample)
    order = np.argsort(found)
    chosen: list[int] = []
    for place in order:
        far = all(np.max(np.abs(np.log(sample[:, place] / sample[:, other]))) > 0.3 for other in chosen)
        if np.isfinite(found[place]) and far:
            chosen.append(int(place))
        if len(chosen) == 4:
            break
    if not chosen:
        return sample[:, 0], float("inf"), "no allowed recipe in the sample"
    ends = [_descend(problem, sample[:, place], relaxed=False) for place in chosen]
    best, value = min(ends, key=lambda item: item[1])
    close = sum(end <= value * 1.01 for _, end in ends)
    return best, value, f"{close} of {len(ends)} starts end within 1 % of the best"


def _report(
    problem: _Problem, best: FloatArray, value: float, proof: _Proof | None, reason: str, agree: str, starts: int
) -> Design:
    point = problem.snapped(best[:, None])[:, 0]
    merge = _final(problem, point)
    bound = master_bound(merge)
    kinds: dict[str, Budget] = {"samples": Budget("samples", 1), "steps": Budget("steps", 1), "data": Budget("data", 1)}
    kinds |= {budget.kind: budget for budget in (*problem.budgets, problem.cost)}
    cost = {kind: float(problem.spent(point[:, None], budget)[0]) for kind, budget in kinds.items()}
    lower = None if proof is None else min(proof.lower, value)
    gap = None if lower is None else (value - lower) / value if value > 0 else 0.0
    if proof is None:
        evidence = f"no proven gap ({reason}); {agree}, from {starts} random recipes"
    else:
        state = "closed" if proof.closed else "stopped at its limit of boxes"
        evidence = (
            f"branch and bound on {proof.boxes} boxes ({state}): no recipe of the design range is below {lower:.6g} "
            f"(gap {100 * (gap or 0):.2f} %); {agree}"
        )
    term = max(bound.terms, key=lambda item: float(item.share)).name
    return Design(
        merge=merge,
        bound=bound,
        objective=value,
        choices={item.name: float(point[row]) for row, item in enumerate(problem.variables)},
        cost=cost,
        active_term=term,
        limits=_reached(problem, point),
        shadow_prices=_prices(problem, point),
        sensitivities=_sensitivities(problem, point),
        lower_bound=lower,
        gap=gap,
        evidence=evidence,
    )


def _final(problem: _Problem, point: FloatArray) -> Merge:
    """The chosen merge with checked experts and plain numbers."""
    relaxed = problem.candidate(point)
    made = []
    for expert in relaxed.experts:
        values = {item.name: getattr(expert, item.name) for item in fields(Expert)}
        for name, value in values.items():
            if isinstance(value, (np.ndarray, np.floating)) and np.ndim(value) == 0:
                values[name] = int(value) if name in WHOLE else float(value)
        made.append(Expert(**values))
    return replace(relaxed, experts=tuple(made))


def _reached(problem: _Problem, point: FloatArray) -> tuple[str, ...]:
    found = []
    for row, item in enumerate(problem.variables):
        if point[row] <= item.lower * (1 + 1e-6):
            found.append(f"{item.name} at its lower limit")
        elif point[row] >= item.upper * (1 - 1e-6):
            found.append(f"{item.name} at its upper limit")
    for budget in problem.budgets:
        # whole steps rarely use a budget to the last unit: one more step of the largest kind would exceed it
        spent = problem.spent(point[:, None], budget)[0]
        units = [0.0]
        for row, item in enumerate(problem.variables):
            if item.whole and point[row] < item.upper:
                more = point.copy()
                more[row] += 1
                units.append(float(problem.spent(more[:, None], budget)[0] - spent))
        if spent + max(units) > budget.limit * (1 + 1e-12) or spent >= budget.limit * (1 - 1e-6):
            found.append(f"budget of {budget.kind}")
    for index, expert in enumerate(problem.merge.experts):
        if expert.sampling != "with_replacement" and any(
            item.field == "batch_size" and index in item.experts for item in problem.variables
        ):
            b, n = (float(problem.column(point[:, None], field, index)[0]) for field in ("batch_size", "n"))
            if b >= n:
                found.append(f"full batch of expert {expert.name!r}")
    if problem.target is not None:
        found.append("target")
    return tuple(dict.fromkeys(found))


def _prices(problem: _Problem, point: FloatArray, step: float = 0.02) -> tuple[ShadowPrice, ...]:
    """Every limit moved by a few per cent both ways and the relaxed problem solved again from the design."""

    def solved(changed: _Problem) -> float:
        start = _repaired(changed, point[:, None])[:, 0]
        if not np.isfinite(changed.objective(start[:, None])[0]) and changed.target is not None:
            start, _ = _descend(replace(changed, target=None), start, relaxed=True)
        return _descend(changed, start, relaxed=True)[1]

    made = []
    for place, budget in enumerate(problem.budgets):
        ends = []
        for sign in (1, -1):
            moved = list(problem.budgets)
            moved[place] = replace(budget, limit=budget.limit * (1 + sign * step))
            ends.append(solved(replace(problem, budgets=tuple(moved))))
        made.append(_price(f"budget of {budget.kind}", ends, budget.limit, step))
    if problem.target is not None:
        ends = [solved(replace(problem, target=problem.target * (1 + sign * step))) for sign in (1, -1)]
        made.append(_price("target", ends, problem.target, step))
    return tuple(made)


def _price(name: str, ends: list[float], limit: float, step: float) -> ShadowPrice:
    more, less = ends
    if not (np.isfinite(more) and np.isfinite(less)):
        return ShadowPrice(name, -np.inf, -np.inf, step)
    price = (more - less) / (2 * step * limit)
    ratio = np.log(more / less) / np.log((1 + step) / (1 - step)) if more > 0 and less > 0 else 0.0
    return ShadowPrice(name, float(price), float(ratio), step)


def _sensitivities(problem: _Problem, point: FloatArray, step: float = 1e-4) -> tuple[Sensitivity, ...]:
    base = problem.candidate(point)
    here = {(item.field, index) for item in problem.variables for index in item.experts}
    made = []
    for index, expert in enumerate(base.experts):
        for field in SENSITIVE:
            value = getattr(expert, field)
            if value is None or isinstance(value, Schedule) or np.ndim(value) != 0 or float(value) == 0:
                continue
            ends = []
            for sign in (1, -1):
                changed = unchecked(expert, **{field: np.asarray(float(value) * (1 + sign * step))})
                experts = (*base.experts[:index], changed, *base.experts[index + 1 :])
                try:
                    ends.append(float(master_bound(replace(base, experts=experts), recursion=False).value))
                except RecipeError:  # the end of the domain, for example a learning rate of 1/L
                    ends.append(float(master_bound(base, recursion=False).value))
            if not (np.isfinite(ends).all() and min(ends) > 0):
                continue
            both = 2 if ends[0] != ends[1] else 1
            slope = float(np.log(ends[0] / ends[1]) / np.log((1 + step) / (1 - step))) if both == 2 else 0.0
            role = "free" if (field, index) in here else "fixed"
            made.append(Sensitivity(expert.name, field, slope, role))
    return tuple(made)


def design_number(
    expert: Expert,
    numbers: Sequence[int],
    free: Mapping[str, tuple[float, float]],
    **options: Any,
) -> dict[int, Design]:
    """How many experts to train: for every N, N copies of a recipe share the budgets and are averaged.

    ``options`` are those of :func:`design`; budgets are for all copies together, so more experts means less training
    (or data) for each, while the instability of the average falls with N.  The key of the smallest ``objective`` is
    the answer.  The copies have independent samples of the *same* size and constants.  Raises :class:`RecipeError`.

    >>> known = dict(n=1000, batch_size=10, learning_rate=0.1, steps=100, curvature="convex", L=1.0, D_inf=1.0)
    >>> known |= dict(initial_gradient_norm=1.0, sigma=1.0, initial_risk=1.0, minimal_risk=0.0, pl_constant=0.1)
    >>> found = design_number(Expert("a", **known), [1, 2], {"steps": (1, 100)}, budgets=[Budget("steps", 100)])
    >>> sorted(found), found[2].merge.size
    ([1, 2], 2)
    """
    if not numbers or any(isinstance(number, bool) or int(number) != number or number < 1 for number in numbers):
        raise RecipeError("design: numbers of experts must be whole and at least 1; give for example range(1, 9)")
    found = {}
    for number in numbers:
        copies = tuple(replace(expert, name=f"{expert.name} {index + 1}") for index in range(int(number)))
        found[int(number)] = design(Merge(copies), free, **options)
    return found
