"""Which statements are tight: an instance that attains each of them, or the worst ratio that was found.

``tight`` means that an instance with exactly known value attains the bound, ``limit`` that instances come as close as
one likes, ``upper`` that none is known: then ``ratio`` is the largest exact/upper known, from the instance, from
random recipes (:mod:`theory.tightness`), or from the semidefinite programs of performance estimation for few steps.
The instance of every entry recomputes its ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, log, sqrt
from typing import Any, Literal

import numpy as np

from theory import statement_instances as instances
from theory.clocks import clock, convex_momentum_log_response, heavy_ball_convex_response, sgd_times
from theory.dispersion import centred_bound, orthogonal_bound, triangle_bound
from theory.drift import drift_base, drift_energy, drift_log, drift_losses, drift_noise
from theory.generalization import high_probability, l1_gap, theorem_1
from theory.lemma import directional_risk, layered_risk, matrix_risk, moved_risk
from theory.quadratic import (
    ExpertMoments,
    QuadraticTask,
    expert_moments,
    merge_moments,
    with_true_constants,
)
from theory.recipe import Expert, Merge, Schedule
from theory.risk import master_bound
from theory.stability import epsilon_cap, epsilon_floor, epsilon_recursion, epsilon_rms, epsilon_sup, gamma
from theory.training import convex_training_risk, pl_training_risk

Label = Literal["tight", "limit", "upper"]
Instance = Callable[[], tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Statement:
    """One statement: ``label``, the ``ratio`` exact/upper of its ``instance`` (which recomputes both), and where.

    ``instance()`` returns ``(exact, upper)``; for floors ``(floor, exact)``.  ``where`` describes it; ``search`` says
    how a larger ratio was looked for.
    """

    name: str
    theorem: str
    label: Label
    ratio: float
    where: str
    instance: Instance
    search: str = "attained"


def _one(
    *, h: float = 1.0, noise: float = 1.0, theta: float = 0.0, base: float = 0.0, **run: Any
) -> tuple[QuadraticTask, Expert, ExpertMoments]:
    """One expert on a line, with its true constants and exact moments."""
    task = QuadraticTask(np.array([[h]]), np.array([theta]), np.array([[noise**2]]))
    recipe: dict[str, Any] = {
        "n": 5,
        "batch_size": 5,
        "learning_rate": 0.5,
        "steps": 4,
        "curvature": "strongly_convex",
        "mu": h,
    }
    expert = with_true_constants(task, [base], Expert("a", L=h, **(recipe | run)))
    return task, expert, expert_moments(task, [base], expert)


def _pair(exact: Any, upper: Any) -> tuple[float, float]:
    return float(np.asarray(exact)), float(np.asarray(upper))


def _lemma() -> tuple[float, float]:
    return _pair(0.5 * 3.0 * 5.0**2, moved_risk(0.5 * 3.0 * 2.0**2, 3.0, 3.0))


def _lemma_directional() -> tuple[float, float]:
    return _pair(0.5 * 3.0 * 5.0**2, directional_risk(0.5 * 3.0 * 2.0**2, 3.0 * 3.0**2))


def _lemma_matrix() -> tuple[float, float]:
    P, x, u = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([1.0, 2.0]), np.array([0.5, 1.0])
    return _pair(0.5 * (x + u) @ P @ (x + u), matrix_risk(0.5 * x @ P @ x, P, u))


def _lemma_layers() -> tuple[float, float]:
    root = np.array([1.0, 2.0])  # f = (x_1 + 2 x_2)^2/2: one squared linear form over both layers
    x, u = np.array([1.0, 1.0]), np.array([3.0, 2.0])
    return _pair(0.5 * (root @ (x + u)) ** 2, layered_risk(0.5 * (root @ x) ** 2, root**2, np.abs(u)))


def _theorem_1() -> tuple[float, float]:
    task, expert, _ = _one(n=1, batch_size=1, learning_rate=1.0, steps=1)
    exact = merge_moments([task], [0.0], [expert], [1.0], [1.0])
    empirical = max(float(exact.training_risk), 0.0)
    return _pair(exact.risk, theorem_1(empirical, [1.0], [1.0], [exact.stability]))


def _linear(n: int, **known: Any) -> Merge:
    """Linear losses ``f = z x + const`` with z = +-1 on n samples, full batch, unit training time: x = -mean z."""
    run: dict[str, Any] = {"n": n, "batch_size": n, "learning_rate": 1.0, "steps": 1, "curvature": "convex", "L": 0.0}
    return Merge((Expert("a", **run, **known),))


def _l1() -> tuple[float, float]:
    n = 7  # the exact gap is E (mean z)^2 = 1/n
    return _pair(1 / n, l1_gap(_linear(n, G=1.0, D_envelope=sqrt(2.0))).value)


def _high_probability() -> tuple[float, float]:
    n, delta = 1, 0.99  # F(M) - F_S(M) = (mean z)^2, f = z x + 1 in [0, 2]
    gaps = sorted((2 * k / n - 1) ** 2 for k in range(n + 1) for _ in range(comb(n, k)))
    exact = gaps[int((1 - delta) * len(gaps))]
    return _pair(exact, high_probability(_linear(n, G=1.0, B=2.0, D_inf=2.0), 0.0, delta).value)


def _sup() -> tuple[float, float]:
    _, expert, exact = _one(n=11, batch_size=4, learning_rate=0.3, steps=17, sampling="reshuffle", h=0.5)
    timing = clock(expert)
    assert expert.D_envelope is not None
    return _pair(exact.epsilon, epsilon_sup(expert.D_envelope, timing.tau, expert.n, gamma(expert, timing)))


def _rms() -> tuple[float, float]:
    _, expert, exact = _one()
    timing = clock(expert)
    assert expert.D_2 is not None
    return _pair(exact.epsilon, epsilon_rms(expert.D_2, timing.tau, expert.n, gamma(expert, timing)))


def _recursion() -> tuple[float, float]:
    _, expert, exact = _one(n=9, batch_size=2, steps=1)
    assert expert.D_2 is not None
    return _pair(exact.epsilon, epsilon_recursion(expert, expert.D_2))


def _cap() -> tuple[float, float]:
    _, _, exact = _one(n=1, batch_size=1)
    return _pair(exact.epsilon, epsilon_cap(exact.drift))


def _floor() -> tuple[float, float]:
    _, expert, exact = _one(n=9, batch_size=2, sampling="reshuffle")
    return _pair(epsilon_floor(np.trace(exact.covariance), expert.n), exact.epsilon)


def _drift(form: Callable[..., Any], with_clock: bool, **run: Any) -> Instance:
    def instance() -> tuple[float, float]:
        _, expert, exact = _one(**run)
        return _pair(exact.drift, form(expert, clock(expert)) if with_clock else form(expert))

    return instance


def _drift_log() -> tuple[float, float]:
    steps, rate, beta, gradients = 6, 0.01, 0.5, []
    x = v = 0.0
    for _ in range(steps):  # full batch on (x-1)^2/2: gradients of one sign on the whole path
        gradients.append(x - 1.0)
        v = beta * v + gradients[-1]
        x -= rate * v
    logged = Schedule(np.abs(gradients))
    expert = Expert("a", 5, 5, rate, steps, momentum=beta, L=1.0, batch_gradient_norms=logged)
    return _pair(abs(x), drift_log(expert))


def _drift_losses() -> tuple[float, float]:
    expert = Expert("a", 5, 5, 0.5, 1, L=1.0, batch_losses=Schedule(np.array([0.5])))  # (x-1)^2/2 from 0, one step
    return _pair(0.5, drift_losses(expert))


def _theorem_4() -> tuple[float, float]:
    task, expert, own = _one(n=1, batch_size=1, theta=2.0, noise=0.0)
    exact = merge_moments([task], [0.0], [expert], [-1.0], [1.0])  # moved straight away from the minimiser
    root = sqrt(max(float(own.training_risk), 0.0)) + sqrt(0.5 * float(exact.V))
    return _pair(exact.training_risk, root**2)


def _triangle() -> tuple[float, float]:
    return _pair((1.0 + 2.0) ** 2, triangle_bound([1.0, 2.0], [0.0, -1.0], [1.0, 0.0]))  # opposite task vectors


def _centred() -> tuple[float, float]:
    return _pair(1.0, centred_bound([1.0, 1.0], [0.5, 0.5], [0.5, 0.5]))  # Delta_2 = -Delta_1, average in the middle


def _orthogonal() -> tuple[float, float]:
    return _pair(0.5 * (0.5**2 + 0.5**2) * 2, orthogonal_bound([1.0, 1.0], [0.5, 0.5], [0.5, 0.5]))


def _master() -> tuple[float, float]:
    task, expert, _ = _one(n=1, batch_size=1, learning_rate=1.0, steps=1)
    bound = master_bound(Merge((expert,), shared_samples=False))
    return _pair(merge_moments([task], [0.0], [expert], [1.0], [1.0]).risk, bound.value)


def _balanced() -> tuple[float, float]:
    tasks, experts = [], []
    for index in range(2):
        task, expert, _ = _one(n=1, batch_size=1, learning_rate=1.0, steps=1)
        tasks.append(task)
        experts.append(Expert(**(vars(expert) | {"name": f"e{index}"})))
    merge = Merge(tuple(experts), shared_samples=False, orthogonal_task_vectors=True)
    exact = merge_moments(tasks, [0.0], experts, [0.5, 0.5], [0.5, 0.5])
    return _pair(exact.risk, master_bound(merge).value)


def _pl() -> tuple[float, float]:
    _, expert, exact = _one(n=6, batch_size=2, learning_rate=1.0, sampling="with_replacement", theta=3.0)
    return _pair(exact.training_risk, pl_training_risk(expert))


def _convex() -> tuple[float, float]:
    steps = 2000  # gradient descent with eta = 1/L on Huber's function whose linear part lasts the whole run
    corner, x = 1 / (2 * steps + 1), 1.0
    for _ in range(steps):
        x -= min(x, corner)
    exact = x**2 / 2 if x <= corner else corner * x - corner**2 / 2
    run: dict[str, Any] = {
        "n": 9,
        "batch_size": 9,
        "learning_rate": 1.0,
        "steps": steps,
        "curvature": "convex",
        "L": 1.0,
    }
    return _pair(exact, convex_training_risk(Expert("a", sigma=0.0, minimal_risk=0.0, minimizer_distance=1.0, **run)))


def _clock() -> tuple[float, float]:
    tau, _ = sgd_times(0.3, -0.5, 12)  # a kick per step along one eigenvector: the response adds up without loss
    return _pair(sum(0.3 * (1 - 0.15) ** k for k in range(12)), tau)


def _momentum_response() -> tuple[float, float]:
    eta, beta, steps = 0.1, 0.9, 30
    response = np.exp(convex_momentum_log_response(np.full(steps, eta), 0.0, beta, 1e-12))
    return _pair(eta * (1 - beta**steps) / (1 - beta), response[0])


def _momentum_constant() -> tuple[float, float]:
    beta = 0.5
    expert = Expert("a", 5, 5, 0.1, 60, momentum=beta, curvature="convex", L=1.0)
    return _pair(0.1 * (1 - beta**60) / (1 - beta), heavy_ball_convex_response(expert)[0])


_PEP = "performance estimation (semidefinite programs)"
_RANDOM = "random recipes"


def statements() -> tuple[Statement, ...]:
    """Every statement with its label, in the order of the theory.

    >>> row = statements()[0]
    >>> exact, upper = row.instance()
    >>> row.name, row.label, round(exact / upper, 9)
    ('Lemma 1', 'tight', 1.0)
    """
    away = "f = L/2 ||x - a||^2 moved away from a"
    ends = "one step: eta g and the noise of one batch"
    return (
        Statement("Lemma 1", "Lemma 1", "tight", 1.0, away, _lemma),
        Statement("Lemma 1, directional", "Lemma 1", "tight", 1.0, away, _lemma_directional),
        Statement("Lemma 1, matrix", "Lemma 1", "tight", 1.0, "f = x'Px/2 moved along x", _lemma_matrix),
        Statement("Lemma 1, layers", "Lemma 1", "tight", 1.0, "one squared linear form over layers", _lemma_layers),
        Statement("training clock, SGD", "section 4", "tight", 1.0, "every Hessian equal to kappa", _clock),
        Statement(
            "convex momentum, any schedule",
            "section 4",
            "limit",
            1.0,
            "gradients that hardly depend on x (eta L -> 0)",
            _momentum_response,
        ),
        Statement(
            "convex heavy ball, eta (1+beta)/(1-beta)",
            "section 4",
            "upper",
            2 / 3,
            "gradients that do not depend on x, long after the kick: 1/(1+beta), here beta = 1/2",
            _momentum_constant,
            f"{_PEP}, up to 10 steps, two step sizes: 0.667 at beta = 1/2",
        ),
        Statement("Theorem 1", "Theorem 1", "tight", 1.0, "one sample, fitted in one step", _theorem_1),
        Statement(
            "Theorem 1, l1",
            "Theorem 1",
            "upper",
            1 / sqrt(2),
            "linear losses with slopes +-1",
            _l1,
            "linear losses on simplices of any size give the same",
        ),
        Statement(
            "Theorem 1, high probability",
            "Theorem 1",
            "upper",
            1 / (2 + 6 * sqrt(log(1 / 0.99) / 2)),
            "linear losses, one sample, delta = 0.99; of order 1/sqrt(n) below for more samples",
            _high_probability,
            "that family only, all n and delta; 1/2 as delta -> 1",
        ),
        Statement(
            "Theorem 2, sup with an envelope",
            "Theorem 2",
            "tight",
            1.0,
            "additive-noise quadratic of one curvature, reshuffling with a short last batch",
            _sup,
        ),
        Statement("Theorem 2, rms", "Theorem 2", "tight", 1.0, "additive-noise quadratic, full batch", _rms),
        Statement("Theorem 2, recursion", "Theorem 2", "tight", 1.0, "additive-noise quadratic, one step", _recursion),
        Statement("stability cap", "section 5", "tight", 1.0, "one sample, base at the mean", _cap),
        Statement("stability floor", "section 5", "tight", 1.0, "every additive-noise quadratic", _floor),
        Statement(
            "Theorem 3 (a)",
            "Theorem 3",
            "tight",
            1.0,
            "one sample: noise-free descent on a quadratic",
            _drift(drift_noise, True, n=1, batch_size=1, theta=2.0, noise=0.0),
        ),
        Statement(
            "Theorem 3 (b)",
            "Theorem 3",
            "tight",
            1.0,
            ends,
            _drift(drift_base, True, n=9, batch_size=2, theta=2.0, steps=1),
        ),
        Statement(
            "Theorem 3 (c)",
            "Theorem 3",
            "tight",
            1.0,
            "one step of length 1/L; the square is (2K+1)/(3K) for K steps",
            _drift(drift_energy, False, n=1, batch_size=1, theta=2.0, noise=0.0, learning_rate=1.0, steps=1),
            f"{_PEP}, K up to 4, no noise: squares 1, 5/6, 7/9, 3/4",
        ),
        Statement("Theorem 3 (d), gradients", "Theorem 3", "tight", 1.0, "gradients of one direction", _drift_log),
        Statement("Theorem 3 (d), losses", "Theorem 3", "tight", 1.0, "one step on (x-1)^2/2", _drift_losses),
        Statement("Theorem 4", "Theorem 4", "tight", 1.0, "an expert moved straight away from its task", _theorem_4),
        Statement("V, triangle", "section 7", "tight", 1.0, "opposite task vectors", _triangle),
        Statement("V, centred", "section 7", "tight", 1.0, "opposite task vectors, p-average", _centred),
        Statement("V, orthogonal", "section 7", "tight", 1.0, "an identity", _orthogonal),
        Statement("training risk, PL", "section 8", "tight", 1.0, "one curvature mu = L, eta = 1/L, noise", _pl),
        Statement(
            "training risk, convex",
            "section 8",
            "upper",
            2000 / 4001,
            "gradient descent on Huber's function: K/(2K+1)",
            _convex,
            "known worst case of gradient descent with eta = 1/L (Drori and Teboulle 2014); with noise not searched",
        ),
        Statement("master bound, one expert", "section 8", "tight", 1.0, "one sample, fitted in one step", _master),
        Statement(
            "master bound, average of orthogonal experts",
            "section 8",
            "upper",
            0.75,
            "two experts, one sample each, fitted in one step; tight again where the training risk dominates",
            _balanced,
            f"{_RANDOM}: up to 0.9998 where Theorem 4 alone is active",
        ),
        *_further(),
    )


def _further() -> tuple[Statement, ...]:
    """Further forms: heads, gaps from losses, shared samples, other training risks, aggregation, logits, masks."""
    reflection = "one curvature, steps of 2/L"
    return (
        Statement("trained heads, 2x2 recursion", "section 1", "limit", 1.0, "one step, many corners", instances.heads),
        Statement(
            "stability, gap from the loss log",
            "section 5",
            "upper",
            sqrt(0.5),
            "one step on centred samples",
            instances.loss_log,
            "one step: every centred noise gives the same; more steps: random recipes of the tests",
        ),
        Statement(
            "stability, gap from held-out losses",
            "section 5",
            "tight",
            1.0,
            "one sample, fitted in one step",
            instances.held_out_log,
        ),
        Statement(
            "stability, shared samples", "section 1", "tight", 1.0, "one sample for all", instances.shared_samples
        ),
        Statement("training risk, distance", "section 8", "tight", 1.0, "one curvature", instances.distance),
        Statement("training risk, descent", "section 8", "tight", 1.0, reflection, instances.descent),
        Statement(
            "sharpest aggregation", "section 7", "tight", 1.0, "each task moved straight away", instances.aggregation
        ),
        Statement(
            "output certificate, rise of the root",
            "section 8",
            "upper",
            0.9025124681,
            "small change at a loss of 1.2564: sqrt(2) (1-exp(-l))/sqrt(l)",
            instances.output,
            "grid over losses and ranges: largest as the range vanishes",
        ),
        Statement(
            "output certificate, with labels",
            "section 8",
            "limit",
            1.0,
            "two equal logits, small change",
            instances.output_labelled,
        ),
        Statement("largest loss in a range", "section 8", "tight", 1.0, "all wrong classes", instances.output_sharp),
        Statement("sensitivity, DARE", "section 10", "tight", 1.0, "an identity", instances.dare),
    )
