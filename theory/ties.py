"""Constants that cannot belong to one loss: every inequality that ties fields of a recipe together.

A recipe states what is known of a loss.  Some fields are tied by the mathematics: a smooth loss that is at least 0 has
no large gradient where it is small, a strongly convex one no small gradient far from its minimum, a noise no more than
half the square of the gap of two samples.  A recipe that breaks such a tie describes no loss at all, and a number
computed from it would be *certified* for nothing; :class:`theory.Expert` and :class:`theory.Merge` refuse it, naming
the fields, their values and the remedy.

What is read how.  ``initial_gradient_norm``, ``sigma``, ``sigma0``, ``initial_risk``, ``training_risk``,
``minimal_risk``, ``minimizer_distance`` and ``base_norm`` are amounts.  ``L``, ``G``, ``B`` and the gaps ``D`` bound
from above, ``mu`` and ``pl_constant`` from below: a loose bound beside a sharp one (``D_inf`` above ``2 G``) is no
contradiction.  Numbers listed in ``measured`` (and those that always are) carry errors and are not judged; they lower
the tier instead.  Rounding is forgiven up to a relative error of 1e-9 in every number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from theory.errors import AssumptionError

if TYPE_CHECKING:
    from theory.recipe import Expert, Merge

FloatArray = NDArray[np.float64]
ROUNDING = 1e-9
SMALLEST = 1e-300
AMOUNTS = ("initial_gradient_norm", "sigma", "sigma0", "initial_risk", "training_risk", "minimal_risk", "base_norm")
CONSTANTS = (*AMOUNTS, "minimizer_distance", "L", "mu", "pl_constant", "D_inf", "D_2", "D_envelope", "G", "B")


@dataclass(frozen=True)
class Tie:
    """One inequality between fields, ``sides(known)[0] <= sides(known)[1]``, NaN where it says nothing.

    ``fields`` must all be stated for it to apply; ``also`` are named where they are stated; ``statement`` says it in
    words and ``remedy`` what to change.
    """

    name: str
    fields: tuple[str, ...]
    statement: str
    remedy: str
    sides: Callable[[Known], tuple[FloatArray, FloatArray]]
    also: tuple[str, ...] = ()


class Known:
    """The stated constants of an expert as arrays, and the quantities that the ties compare."""

    def __init__(self, numbers: Mapping[str, FloatArray], curvature: str, decay: FloatArray) -> None:
        self.numbers, self.curvature, self.decay = numbers, curvature, decay
        self.plain = decay == 0
        self.decays = not bool(np.all(self.plain))

    def __getitem__(self, name: str) -> FloatArray:
        return self.numbers[name]

    def get(self, name: str, otherwise: float) -> FloatArray:
        """A stated constant, or ``otherwise``."""
        return self.numbers.get(name, np.asarray(otherwise))

    @property
    def stiffness(self) -> FloatArray:
        """Smoothness of the objective with decay."""
        return self["L"] + self.decay

    def only_plain(self, value: FloatArray) -> FloatArray:
        """The value where there is no decay, NaN elsewhere."""
        return np.where(self.plain, value, np.nan) if self.decays else value

    @property
    def pull(self) -> FloatArray:
        """Gradient norm of the decay at the base; NaN where it is not known."""
        return np.where(self.plain, 0.0, self.decay * self.get("base_norm", np.nan)) if self.decays else self.decay

    @property
    def loss_gradient(self) -> FloatArray:
        """Smallest rms gradient of the loss alone at the base (the decay's share removed); 0 where nothing is known."""
        if "initial_gradient_norm" not in self.numbers:
            return np.asarray(0.0)
        gradient = self["initial_gradient_norm"]
        if not self.decays:
            return gradient
        pull = self.pull
        return np.fmax(np.abs(gradient - pull) - ROUNDING * (gradient + pull), 0.0)

    @property
    def start(self) -> FloatArray:
        """Objective at the base, with decay; NaN where the norm of the base is not known."""
        risk = self["initial_risk"]
        return risk + 0.5 * self.pull * self.get("base_norm", 0.0) if self.decays else risk

    @property
    def highest_gap(self) -> FloatArray:
        """Largest ``objective(x_0) - minimum`` that the stated risks allow."""
        start, least = self.start, self.get("minimal_risk", 0.0)
        return np.maximum(start - least, 0.0) + ROUNDING * (start + least)

    @property
    def lowest_gap(self) -> FloatArray:
        """Smallest ``objective(x_0) - minimum``: the end of training is not below the minimum."""
        start = self.start
        least = self.numbers.get("minimal_risk")
        if least is None:
            end = self.numbers.get("training_risk")
            least = np.asarray(np.nan) if end is None else self.only_plain(end)
        return np.maximum(start - least - ROUNDING * (start + least), 0.0)

    @property
    def growth(self) -> FloatArray:
        """Strong convexity of the objective with decay; NaN where it has none."""
        if self.curvature == "smooth":
            return np.asarray(np.nan)
        total = self.get("mu", 0.0) + self.decay
        return np.where(total > 0, total, np.nan)

    @property
    def domination(self) -> FloatArray:
        """The largest stated PL constant of the objective; NaN where there is none."""
        return np.fmax(self.get("pl_constant", np.nan), self.growth)


def _root(product: FloatArray, *factors: FloatArray) -> FloatArray:
    """``sqrt(product of the arguments)`` without overflow on the way."""
    found = np.sqrt(product)
    for factor in factors:
        found = found * np.sqrt(factor)
    return np.asarray(found)


_HALF = 0.5
_RISKS = ("minimal_risk", "weight_decay", "base_norm")


def _gap_ties() -> Iterator[Tie]:
    """The noise of single-sample gradients against the gap of two of them."""
    why = "half the mean square gap of two samples is the variance"
    for gap in ("D_inf", "D_envelope", "D_2"):
        yield Tie(
            f"sigma0 and {gap}",
            ("sigma0", gap),
            f"sigma0 cannot exceed {gap}/sqrt(2): {why}",
            f"lower sigma0 or raise {gap}",
            lambda known, gap=gap: (known["sigma0"], known[gap] * np.sqrt(_HALF)),  # type: ignore[misc]
        )
    for gap in ("D_inf", "D_envelope"):
        yield Tie(
            f"sigma and {gap}",
            ("sigma", gap),
            f"sigma cannot exceed {gap}/sqrt(2): {why}",
            f"lower sigma to that or raise {gap}",
            lambda known, gap=gap: (known["sigma"], known[gap] * np.sqrt(_HALF)),  # type: ignore[misc]
        )
    yield Tie(
        "sigma and D_2",
        ("sigma", "D_2"),
        "sigma cannot exceed D_2: the mean of the training gradients is nearer to them than a fresh sample's gradient",
        "lower sigma to D_2 or raise D_2",
        lambda known: (known["sigma"], known["D_2"]),
    )
    yield Tie(
        "sigma0 and sigma",
        ("sigma0", "sigma"),
        "sigma holds on the whole path, and x_0 is on it",
        "raise sigma to sigma0 or lower sigma0",
        lambda known: (known["sigma0"], known["sigma"]),
    )


def _size_ties() -> Iterator[Tie]:
    """Largest loss and largest gradient against the values on the path."""
    for risk in ("initial_risk", "training_risk"):
        yield Tie(
            f"{risk} and B",
            (risk, "B"),
            "B is the largest value of a loss",
            f"raise B to {risk} or lower {risk}",
            lambda known, risk=risk: (known[risk], known["B"]),  # type: ignore[misc]
        )
    yield Tie(
        "minimal_risk and B",
        ("minimal_risk", "B"),
        "B is the largest value of a loss",
        "raise B or lower minimal_risk",
        lambda known: (known.only_plain(known["minimal_risk"]), known["B"]),
    )
    yield Tie(
        "initial_gradient_norm and G",
        ("initial_gradient_norm", "G"),
        "the mean square gradient of single samples at x_0, gradient norm and sigma0 together, is at most G^2",
        "raise G, or lower initial_gradient_norm",
        lambda known: (np.hypot(known.loss_gradient, known.get("sigma0", 0.0)), known["G"]),
        ("sigma0", "weight_decay", "base_norm"),
    )
    for noise in ("sigma0", "sigma"):
        yield Tie(
            f"{noise} and G",
            (noise, "G"),
            "no gradient of a single sample exceeds G, so neither does their spread",
            f"raise G or lower {noise}",
            lambda known, noise=noise: (known[noise], known["G"]),  # type: ignore[misc]
        )


def _risk_ties() -> Iterator[Tie]:
    """Risks against the minimum."""
    yield Tie(
        "minimal_risk and initial_risk",
        ("minimal_risk", "initial_risk"),
        "the minimum of the objective cannot exceed its value at x_0",
        "lower minimal_risk",
        lambda known: (known["minimal_risk"], known.start),
        ("weight_decay", "base_norm"),
    )
    yield Tie(
        "minimal_risk and training_risk",
        ("minimal_risk", "training_risk"),
        "the minimum of the training risk cannot exceed its value at the end of training",
        "lower minimal_risk or raise training_risk",
        lambda known: (known.only_plain(known["minimal_risk"]), known["training_risk"]),
    )


def _gradient_ties() -> Iterator[Tie]:
    """Gradients against risks: smoothness from above, PL and strong convexity from below."""
    yield Tie(
        "initial_gradient_norm and initial_risk",
        ("initial_gradient_norm", "initial_risk", "L"),
        "an L-smooth objective has a gradient norm of at most sqrt(2 (L + weight_decay) (initial risk - minimum))",
        "raise L or initial_risk, or lower initial_gradient_norm (or minimal_risk)",
        lambda known: (
            known["initial_gradient_norm"],
            _root(np.asarray(2.0), known.stiffness, known.highest_gap),
        ),
        _RISKS,
    )
    yield Tie(
        "sigma0 and initial_risk",
        ("sigma0", "initial_risk", "L"),
        "L-smooth losses of at least 0 have a mean square gradient of single samples, gradient norm and sigma0 "
        "together, of at most 2 L initial_risk",
        "raise L or initial_risk, or lower sigma0",
        lambda known: (
            np.hypot(known.loss_gradient, known["sigma0"]),
            _root(np.asarray(2.0), known["L"], known["initial_risk"]),
        ),
        ("initial_gradient_norm", "weight_decay", "base_norm"),
    )
    yield Tie(
        "initial_gradient_norm and weight_decay",
        ("initial_gradient_norm", "initial_risk", "L", "base_norm"),
        "the gradient of the objective is that of the loss, at most sqrt(2 L initial_risk), and weight_decay times x_0",
        "correct base_norm, weight_decay or initial_gradient_norm",
        lambda known: (known.loss_gradient, _root(np.asarray(2.0), known["L"], known["initial_risk"])),
        ("weight_decay",),
    )
    yield Tie(
        "pl_constant and initial_gradient_norm",
        ("initial_gradient_norm", "initial_risk"),
        "strong convexity (mu, or the decay of a convex loss) or a PL constant makes the gradient norm at least "
        "sqrt(2 mu (initial risk - minimum))",
        "lower mu or pl_constant, raise initial_gradient_norm, or correct the risks",
        lambda known: (
            _root(np.asarray(2.0), known.domination, known.lowest_gap),
            known["initial_gradient_norm"],
        ),
        ("pl_constant", "mu", "training_risk", *_RISKS),
    )


def _distance_ties() -> Iterator[Tie]:
    """The distance of the base from a minimiser against gradient and risk."""
    yield Tie(
        "minimizer_distance and L",
        ("minimizer_distance", "initial_gradient_norm", "L"),
        "the gradient is 0 at the minimiser and (L + weight_decay)-Lipschitz",
        "raise minimizer_distance or L, or lower initial_gradient_norm",
        lambda known: (known["initial_gradient_norm"], known.stiffness * known["minimizer_distance"]),
        ("weight_decay",),
    )
    yield Tie(
        "minimizer_distance and initial_risk",
        ("minimizer_distance", "initial_risk", "L"),
        "a smooth objective exceeds its minimum by at most (L + weight_decay)/2 times the square of the distance",
        "raise minimizer_distance or L, or correct the risks",
        lambda known: (
            _root(np.asarray(2.0), known.lowest_gap),
            np.sqrt(known.stiffness) * known["minimizer_distance"],
        ),
        ("training_risk", *_RISKS),
    )
    yield Tie(
        "minimizer_distance and mu",
        ("minimizer_distance", "initial_risk"),
        "a strongly convex objective exceeds its minimum by at least mu/2 times the square of the distance",
        "lower minimizer_distance or mu, or raise initial_risk",
        lambda known: (
            np.sqrt(known.growth) * known["minimizer_distance"],
            _root(np.asarray(2.0), known.highest_gap),
        ),
        ("mu", *_RISKS),
    )
    yield Tie(
        "minimizer_distance and the gradient, strongly convex",
        ("minimizer_distance", "initial_gradient_norm"),
        "the gradient of a strongly convex objective is at least mu times the distance from its minimiser",
        "lower minimizer_distance or mu, or raise initial_gradient_norm",
        lambda known: (known.growth * known["minimizer_distance"], known["initial_gradient_norm"]),
        ("mu", "weight_decay"),
    )
    yield Tie(
        "minimizer_distance and the gradient, convex",
        ("minimizer_distance", "initial_gradient_norm", "initial_risk"),
        "a convex objective exceeds its minimum by at most gradient norm times distance (less g^2/(2 (L + "
        "weight_decay)) where it is smooth)",
        "raise minimizer_distance or initial_gradient_norm, or correct the risks",
        _convex_gap,
        ("L", "training_risk", *_RISKS),
    )


def _convex_gap(known: Known) -> tuple[FloatArray, FloatArray]:
    if known.curvature == "smooth":
        return np.asarray(np.nan), np.asarray(np.nan)
    gradient, distance = known["initial_gradient_norm"], known["minimizer_distance"]
    saved: FloatArray = np.asarray(0.0)
    if "L" in known.numbers:
        stiffness = known.stiffness
        saved = np.where(stiffness > 0, gradient / np.where(stiffness > 0, stiffness, 1.0) / 2, 0.0)
    allowed = gradient * np.maximum(distance - saved, 0.0)
    return known.lowest_gap, np.asarray(allowed + ROUNDING * gradient * distance)


TIES: tuple[Tie, ...] = (
    *_risk_ties(),
    *_gradient_ties(),
    *_distance_ties(),
    *_gap_ties(),
    *_size_ties(),
)
"""Every inequality that ties constants of one expert, in the order in which they are looked at."""


@np.errstate(all="ignore")
def refuse_contradictions(expert: Expert) -> None:
    """Refuse constants that no loss has (:class:`AssumptionError` naming fields, values, statement and remedy).

    Over many configurations the message says how many are impossible and which is the first.

    >>> from theory import Expert
    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=10, L=1.0, initial_risk=0.02)
    >>> Expert("a", initial_gradient_norm=0.2, **run).L  # 0.2^2 = 2 L 0.02: a quadratic attains it
    1.0
    >>> Expert("a", initial_gradient_norm=0.3, **run)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    theory.errors.AssumptionError: expert 'a': initial_gradient_norm 0.3, initial_risk 0.02 and L 1 contradict each...
    """
    for tie, values, wrong in _broken(expert):
        raise AssumptionError(f"expert {expert.name!r}: {_message(tie, values, wrong)}")


@np.errstate(all="ignore")
def impossible(expert: Expert) -> NDArray[np.bool_]:
    """Which configurations of an expert (not yet checked) have constants that no loss has; shape ``(...)``.

    >>> from theory import Expert
    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=10, L=1.0, initial_risk=0.02)
    >>> impossible(Expert("a", initial_gradient_norm=np.array([0.1, 0.2]), **run)).tolist()
    False
    """
    found = np.zeros((), dtype=bool)
    for _, _, wrong in _broken(expert):
        found = np.logical_or(found, wrong)
    return np.asarray(found)


def _broken(expert: Expert) -> Iterator[tuple[Tie, Mapping[str, FloatArray], NDArray[np.bool_]]]:
    """The ties that some configuration breaks, with the stated numbers and where."""
    stated = {name: getattr(expert, name) for name in CONSTANTS}
    numbers = {
        name: np.asarray(value, dtype=np.float64)
        for name, value in stated.items()
        if value is not None and name not in expert.measured
    }
    if len(numbers) < 2:
        return
    decay = np.asarray(expert.weight_decay, dtype=np.float64)
    if "weight_decay" in expert.measured:
        decay = np.where(decay > 0, np.nan, 0.0)
    known = Known(numbers, expert.curvature, decay)
    values = {**numbers, "weight_decay": decay} if known.decays else numbers
    for tie in TIES:
        if all(name in numbers for name in tie.fields):
            small, large = tie.sides(known)
            wrong = np.asarray(small > large * (1 + ROUNDING) + SMALLEST)
            if wrong.any():
                yield tie, values, wrong


def _message(tie: Tie, values: Mapping[str, FloatArray], wrong: NDArray[np.bool_]) -> str:
    place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    named = [*tie.fields, *(name for name in tie.also if name in values and name not in tie.fields)]
    shown = [f"{name} {_at(values[name], wrong.shape, place):.6g}" for name in named]
    text = f"{', '.join(shown[:-1])} and {shown[-1]} contradict each other: {tie.statement}"
    if wrong.ndim:
        first = ", ".join(str(int(index)) for index in place)
        text += f" (impossible in {int(wrong.sum())} of {wrong.size} configurations, the first at index {first})"
    return f"{text}; {tie.remedy}, or list in measured what was measured with errors"


def _at(value: FloatArray, shape: tuple[int, ...], place: tuple[np.intp, ...]) -> float:
    """The number of one configuration; the field may have fewer axes, or other ones of length one."""
    full = np.broadcast_shapes(value.shape, shape)
    position = (*(0,) * (len(full) - len(place)), *(int(index) for index in place))
    return float(np.broadcast_to(value, full)[position])


@np.errstate(all="ignore")
def refuse_contradicting_merge(merge: Merge) -> None:
    """Refuse what no merge has: a sensitivity below that of its linear combination, two norms of one base.

    ``M = x_0 + sum alpha_i Delta_i`` moves by exactly ``|alpha_i|`` times the change of expert i (DARE, in mean square:
    ``|alpha_i|/sqrt(1 - drop)`` rescaled, ``|alpha_i| sqrt(1 - drop)`` not), so a smaller sensitivity that is stated as
    known is false; a larger one is loose.  Experts that share all parameters start from one base, so their
    ``base_norm`` agree.  Measured numbers are not judged.  Raises :class:`AssumptionError`.

    >>> from theory import Expert, Merge
    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=10, L=1.0)
    >>> Merge((Expert("a", **run), Expert("b", **run)), sensitivity=0.4, measured=frozenset())
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    theory.errors.AssumptionError: merge: sensitivity 0.4 is below 0.5, which method 'average' has...
    """
    moved = _linear_sensitivity(merge)
    if moved is not None and merge.sensitivity is not None and "sensitivity" not in merge.measured:
        given, least = _over_experts(np.asarray(merge.sensitivity, dtype=np.float64), moved)
        wrong = np.asarray(given < least * (1 - ROUNDING))
        if wrong.any():
            place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
            raise AssumptionError(
                f"merge: sensitivity {given[place]:.6g} is below {least[place]:.6g}, which method {merge.method!r} has "
                f"with these coefficients (for expert {merge.experts[int(place[0])].name!r}); leave sensitivity out, "
                "or list it in measured"
            )
    norms = [
        (expert.name, np.asarray(expert.base_norm, dtype=np.float64))
        for expert in merge.experts
        if expert.head == "none" and expert.base_norm is not None and "base_norm" not in expert.measured
    ]
    for name, norm in norms[1:]:
        first, other = norms[0][1], norm
        if np.any(np.abs(first - other) > ROUNDING * (first + other)):
            raise AssumptionError(
                f"merge: base_norm of {norms[0][0]!r} ({_first(first)}) and of {name!r} ({_first(other)}) differ, but "
                "all experts start from one base; give the norm of that base to all (or head 'frozen' or 'trained' "
                "where a part is private)"
            )


def _first(values: FloatArray) -> str:
    return f"{float(values.flat[0]):.6g}" + (", ..." if values.size > 1 else "")


def _linear_sensitivity(merge: Merge) -> FloatArray | None:
    """``|alpha_i|`` of shape ``(N, ...)`` for linear methods with known coefficients (DARE: in mean square)."""
    if merge.measured & {"coefficients", "weights", "drop_rate"}:
        return None
    count = len(merge.experts)
    if merge.method in ("average", "uniform_soup"):
        return np.full(count, 1.0 / count)
    given = merge.coefficients if merge.coefficients is not None else merge.weights
    if merge.method == "weighted" and given is None:
        return np.full(count, 1.0 / count)
    if given is None or merge.method not in ("weighted", "task_arithmetic", "dare", "wise_ft"):
        return None
    alpha = np.abs(np.asarray(given, dtype=np.float64))
    alpha = np.broadcast_to(alpha, (count,)) if alpha.ndim == 0 else alpha
    if merge.method != "dare":
        return alpha
    keep = 1 - np.asarray(merge.drop_rate, dtype=np.float64)
    alpha, keep = _over_experts(alpha, keep[None])
    return np.asarray(alpha / np.sqrt(keep) if merge.rescale else alpha * np.sqrt(keep))


def _over_experts(*arrays: FloatArray) -> list[FloatArray]:
    """Experts on axis 0, the axes of configurations aligned at the end, broadcast."""
    depth = max(array.ndim for array in arrays)
    lifted = [
        array.reshape(array.shape[:1] + (1,) * (depth - array.ndim) + array.shape[1:]) if array.ndim else array
        for array in arrays
    ]
    return list(np.broadcast_arrays(*lifted))
