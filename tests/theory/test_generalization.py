"""Theorem 1 and its l1 and high-probability forms against the enumeration of every sample set and every batch order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product

import mpmath
import numpy as np
import pytest

from theory import AssumptionError, Expert, Merge, RecipeError, Schedule, clock, expert_epsilon, task_stability
from theory.clocks import write_out
from theory.generalization import (
    deviation_formula,
    high_probability,
    joint_reach,
    l1_formula,
    l1_gap,
    mean_displacement,
    theorem_1,
    theorem_1_formula,
    twin_reach,
)
from theory.symbolic import evaluate
from theory.symbols import symbol

STATED = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
SAMPLINGS = ("without_replacement", "with_replacement", "reshuffle")


def softplus(x: np.ndarray | float) -> np.ndarray | float:
    return np.logaddexp(0.0, x)


def orders(expert: Expert) -> Iterator[tuple[list[tuple[int, ...]], float]]:
    """Every batch sequence of an expert with its probability."""
    grid, n = write_out(expert), int(expert.n)
    sizes = [int(size) for size in grid.batch_size]
    if expert.sampling == "with_replacement":
        choices = [list(product(range(n), repeat=b)) for b in sizes]
    elif expert.sampling == "without_replacement":
        choices = [list(combinations(range(n), b)) for b in sizes]
    else:
        starts = [k for k in range(len(sizes)) if grid.position[k] == 0]
        epochs = [sizes[a:e] for a, e in zip(starts, [*starts[1:], len(sizes)], strict=True)]
        every = list(product(list(permutations(range(n))), repeat=len(epochs)))
        for passes in every:
            batches = []
            for order, parts in zip(passes, epochs, strict=True):
                used = 0
                for b in parts:
                    batches.append(tuple(order[used : used + b]))
                    used += b
            yield batches, 1 / len(every)
        return
    total = float(np.prod([len(choice) for choice in choices]))
    for batches in product(*choices):
        yield list(batches), 1 / total


def train(expert: Expert, data: tuple[int, ...], batches: list[tuple[int, ...]]) -> float:
    """SGD on the logistic losses ``softplus(-z x)`` with labels z in {-1, 1}, from x = 0."""
    x, z, eta = 0.0, np.array(data, dtype=float), float(expert.learning_rate)  # type: ignore[arg-type]
    for batch in batches:
        labels = z[list(batch)]
        x -= eta * float(np.mean(-labels / (1 + np.exp(labels * x))))
    return x


def logistic(name: str, sampling: str, n: int, b: int, steps: int, eta: float, **more: object) -> Expert:
    reach = eta * steps  # |gradient| <= 1
    return Expert(
        name,
        n=n,
        batch_size=b,
        learning_rate=eta,
        steps=steps,
        sampling=sampling,  # type: ignore[arg-type]
        curvature="convex",
        L=0.25,
        G=1.0,
        D_inf=1.0,  # the gradients of the two labels differ by exactly one, everywhere
        B=float(softplus(reach)),
        **more,  # type: ignore[arg-type]
    )


CASES = [
    ("reshuffle", 3, 2, 3, 1.5),
    ("reshuffle", 3, 1, 4, 0.7),
    ("reshuffle", 4, 3, 2, 2.0),
    ("without_replacement", 3, 2, 3, 1.5),
    ("with_replacement", 2, 2, 2, 3.0),
]
CHANCE = (0.8, 0.3)  # of the label 1 in the two tasks


def outcomes(expert: Expert, chance: float) -> list[tuple[float, float, tuple[int, ...], float]]:
    """(probability, x_K, data, given seeds) over every data set and batch sequence; the seed is its index."""
    found = []
    for seed, (batches, weight) in enumerate(orders(expert)):
        for data in product((-1, 1), repeat=int(expert.n)):
            likely = float(np.prod([chance if z == 1 else 1 - chance for z in data]))
            found.append((weight * likely, train(expert, data, batches), data, float(seed)))
    return found


def risks(x: np.ndarray, chance: float) -> np.ndarray:
    return np.asarray(chance * softplus(-x) + (1 - chance) * softplus(x))


def empirical(x: np.ndarray, data: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.mean([softplus(-z * x) for z in data], axis=0))


@pytest.mark.parametrize("case", CASES)
def test_average_of_two_experts_by_enumeration(case: tuple[str, int, int, int, float]) -> None:
    """Exact E[F(M) - F_S(M)] and the exact tail of F(M) - F_S(M) never exceed the bounds."""
    sampling, n, b, steps, eta = case
    pair = (logistic("a", sampling, n, b, steps, eta), logistic("b", sampling, n, b, steps, eta / 2))
    merge = Merge(pair, **STATED)  # type: ignore[arg-type]
    sides = [outcomes(expert, chance) for expert, chance in zip(pair, CHANCE, strict=True)]
    other = np.array([x for _, x, _, _ in sides[1]])
    likely = np.array([p for p, _, _, _ in sides[1]])
    data = [z for _, _, z, _ in sides[1]]
    distinct = {z: np.array([w == z for w in data]) for z in set(data)}
    gaps, weights, averages = [], [], np.zeros(2)
    for probability, x, own, _ in sides[0]:
        merged = (x + other) / 2
        true = (risks(merged, CHANCE[0]) + risks(merged, CHANCE[1])) / 2
        seen = empirical(merged, own) / 2
        for z, where in distinct.items():
            seen[where] += empirical(merged[where], z) / 2
        gaps.append(true - seen)
        weights.append(probability * likely)
        averages += [probability * float(likely @ true), probability * float(likely @ seen)]
    gap, mass = np.concatenate(gaps), np.concatenate(weights)
    assert mass.sum() == pytest.approx(1.0)
    bound = l1_gap(merge)
    assert bound.tier == "certified"
    assert 0 < float(mass @ gap) <= float(bound.value)
    eps = np.array([float(expert_epsilon(expert)[0]) for expert in pair])
    theorem = float(theorem_1(averages[1], [0.5, 0.5], [0.25, 0.25], task_stability([0.5, 0.5], eps)))
    assert averages[0] <= theorem
    for delta in (0.5, 0.2, 0.05, 0.01):
        confident = high_probability(merge, 0.0, delta)
        assert float(mass[gap > float(confident.value)].sum()) <= delta
    # and the ingredient: one sample moves the gap by at most its influence
    for expert, rows in zip(pair, sides, strict=True):
        table = {(seed, z): x for _, x, z, seed in rows}
        furthest = max(
            abs(x - table[(seed, (*z[:j], -z[j], *z[j + 1 :]))]) for (seed, z), x in table.items() for j in range(n)
        )
        assert furthest <= float(twin_reach(expert)) * (1 + 1e-12)
        assert furthest >= 0.3 * float(twin_reach(expert))
        jointly = 0.0
        for seed in {seed for seed, _ in table}:
            moved = [
                max(
                    abs(x - table[(seed, (*z[:j], -z[j], *z[j + 1 :]))])
                    for (other, z), x in table.items()
                    if other == seed
                )
                for j in range(n)
            ]
            jointly = max(jointly, float(np.linalg.norm(moved)))
        assert 0.3 * float(joint_reach(expert)) <= jointly <= float(joint_reach(expert)) * (1 + 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_mean_displacement_by_enumeration(case: tuple[str, int, int, int, float]) -> None:
    sampling, n, b, steps, eta = case
    expert = logistic("a", sampling, n, b, steps, eta)
    rows = outcomes(expert, 0.8)
    table = {(seed, z): x for _, x, z, seed in rows}
    exact = 0.0
    for probability, x, z, seed in rows:
        for j in range(n):
            for label, chance in ((1, 0.8), (-1, 0.2)):
                exact += probability * chance * abs(x - table[(seed, (*z[:j], label, *z[j + 1 :]))]) / n
    value, form = mean_displacement(expert)
    assert exact <= float(value)
    assert "tau/n" in form


def test_l1_by_hand_heads_and_shared_samples() -> None:
    run = dict(batch_size=10, learning_rate=0.1, steps=50, curvature="convex", L=1.0)
    a, b = Expert("a", n=100, G=1.0, **run), Expert("b", n=400, G=2.0, **run)  # type: ignore[arg-type]
    p, c = np.array([0.3, 0.7]), np.array([0.5, 0.9])
    merge = Merge((a, b), method="weighted", weights=p, coefficients=c)
    moved = np.array([2 * 5 / 100, 4 * 5 / 400])
    assert float(l1_gap(merge).value) == pytest.approx(float(np.sum(p * c * np.array([1, 2]) * moved)))
    heads = replace(merge, experts=(replace(a, head="trained"), b))
    expected = np.sum(p * np.array([1.0, 0.9]) * np.array([1, 2]) * moved)
    assert float(l1_gap(heads).value) == pytest.approx(float(expected))
    together = replace(merge, shared_samples=True)
    own = c * moved
    expected = p[0] * 1 * (own[0] + own[1] * 4) + p[1] * 2 * (own[1] + own[0] / 4)
    assert float(l1_gap(together).value) == pytest.approx(float(expected))


def test_trap_shared_samples_in_the_l1_form() -> None:
    """Two experts with the same samples and seeds: M moves as far as one expert, not half as far."""
    expert = logistic("a", "reshuffle", 3, 1, 3, 0.5)
    rows = outcomes(expert, 0.5)
    exact = sum(p * (float(risks(np.array(x), 0.5)) - float(empirical(np.array(x), z))) for p, x, z, _ in rows)
    pair = Merge((expert, replace(expert, name="b")))
    assert exact <= float(l1_gap(replace(pair, shared_samples=True)).value)
    alone = float(l1_gap(Merge((expert,))).value)
    assert float(l1_gap(replace(pair, shared_samples=True)).value) == pytest.approx(alone)
    assert float(l1_gap(pair).value) == pytest.approx(alone / 2)  # what independent tasks would allow


def test_trap_reach_with_actual_batch_sizes() -> None:
    """n = 3, b = 2 ends an epoch with a batch of one, which pushes its sample twice as hard."""
    expert = logistic("a", "reshuffle", 3, 2, 2, 0.5)
    timing = clock(expert)
    assert float(twin_reach(expert)) == pytest.approx(0.5)
    naive = 0.5 / 2  # every batch of two
    batches, moved = [(0, 1), (2,)], []
    for z in product((-1, 1), repeat=2):
        moved.append(abs(train(expert, (*z, 1), batches) - train(expert, (*z, -1), batches)))
    assert naive < max(moved) <= float(twin_reach(expert, timing))


@pytest.mark.parametrize("formula", [theorem_1_formula, l1_formula, deviation_formula])
def test_compiled_formulas_against_fifty_digits(formula) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    made = formula()
    for _ in range(20):
        numbers = rng.uniform(0.05, 0.9, len(made.keys))
        with mpmath.workdps(50):
            exact = made.expression.evalf(50, subs=dict(zip((symbol(key) for key in made.keys), numbers, strict=True)))
        assert float(evaluate(formula, *numbers)) == pytest.approx(float(exact), rel=1e-12)


def test_every_seed_sensitivity_of_dare() -> None:
    run = logistic("a", "reshuffle", 4, 1, 4, 0.1)
    merge = Merge((run, replace(run, name="b")), method="dare", coefficients=0.5, drop_rate=0.75)
    plain = Merge(merge.experts, method="task_arithmetic", coefficients=0.5)
    ratio = high_probability(merge, 0.0, 0.1).shift / high_probability(plain, 0.0, 0.1).shift
    assert float(ratio) == pytest.approx(4.0)  # 1/(1-drop), where the root mean square would be 2


def test_broadcasts_and_tiers() -> None:
    run = logistic("a", "reshuffle", 4, 1, 4, 0.1)
    merge = Merge((run, replace(run, name="b", learning_rate=np.array([0.1, 0.2, 0.4]))), **STATED)  # type: ignore[arg-type]
    assert l1_gap(merge).value.shape == (3,)
    assert high_probability(merge, 0.1, np.array([0.1, 0.01, 0.5])).value.shape == (3,)
    measured = Merge((replace(run, measured=frozenset({"G"})),), **STATED)  # type: ignore[arg-type]
    assert l1_gap(measured).tier == "estimated"
    assert "a: G" in l1_gap(measured).measured
    adam = Merge((replace(run, optimizer="adamw", epsilon=0.2),), **STATED)  # type: ignore[arg-type]
    assert l1_gap(adam).tier == "estimated"
    assert float(l1_gap(adam).value) == pytest.approx(0.2)


def test_trap_a_mean_square_sensitivity_given_by_hand_does_not_hold_for_every_seed() -> None:
    """A rescaled mask of rate 3/4 multiplies by 4 when it keeps; its root mean square is 2, for DELLA too."""
    from theory import merge_with, operator

    run = logistic("a", "reshuffle", 4, 1, 4, 0.1)
    pair = (run, replace(run, name="b"))
    sure = high_probability(Merge(pair, method="dare", coefficients=0.5, drop_rate=0.75), 0.0, 0.1)
    by_hand = Merge(pair, method="dare", coefficients=0.5, drop_rate=0.75, sensitivity=1.0, dispersion=0.1)
    assert float(high_probability(by_hand, 0.0, 0.1).value) == pytest.approx(float(sure.value))
    settings = dict(drop=0.75, window=0.0, election="none", aggregation="sum", coefficient=0.5, rescaling="probability")
    della = merge_with(pair, "della", settings, dispersion=0.1)
    np.testing.assert_allclose(della.sensitivity, 1.0)  # type: ignore[arg-type]  # mean square, not 2
    with pytest.raises(AssumptionError, match="surely"):
        high_probability(della, 0.0, 0.1)
    every = operator("della").effect(2, **settings).surely
    assert every is not None
    found = high_probability(della, 0.0, 0.1, surely=every)
    assert float(found.value) == pytest.approx(float(sure.value))
    for wrong in (2.0, [2.0], [2.0, -1.0], [2.0, np.nan]):
        with pytest.raises(RecipeError, match="surely"):
            high_probability(della, 0.0, 0.1, surely=wrong)


def test_refusals_name_the_field() -> None:
    run = logistic("a", "reshuffle", 4, 1, 4, 0.1)

    def merged(**changes: object) -> Merge:
        return Merge((replace(run, **changes),))  # type: ignore[arg-type]

    for changes, words in (
        (dict(G=None), "G is missing"),
        (dict(B=None), "B is missing"),
        (dict(momentum=0.5), "momentum"),
        (dict(kappa=0.1), "kappa"),
        (dict(head="trained"), "head"),
    ):
        with pytest.raises(RecipeError, match=words):
            high_probability(merged(**changes), 0.1, 0.1)
    with pytest.raises(RecipeError, match="delta"):
        high_probability(merged(), 0.1, 0.0)
    with pytest.raises(RecipeError, match="empirical_risk"):
        high_probability(merged(), float("nan"), 0.1)
    with pytest.raises(AssumptionError, match="shared_samples"):
        high_probability(Merge((run,), shared_samples=True), 0.1, 0.1)
    with pytest.raises(AssumptionError, match="per_sample_loss"):
        l1_gap(Merge((run,), per_sample_loss=False))
    with pytest.raises(AssumptionError, match="adamw"):
        l1_gap(merged(optimizer="adamw"))
    assert np.isinf(l1_gap(merged(curvature="smooth", steps=100_000)).value)


@pytest.mark.parametrize(
    ("sampling", "gain"), [("reshuffle", 1.0), ("without_replacement", 0.1**0.5), ("with_replacement", 0.01**0.5)]
)
def test_joint_reach_against_the_largest_reach(sampling: str, gain: float) -> None:
    """Never above sqrt(n) twin_reach; below it by sqrt(b/n), 1/sqrt(n), or by a decaying schedule or a short batch."""
    run = logistic("a", sampling, 100, 10, 20, 0.1)
    assert float(joint_reach(run)) == pytest.approx(gain * 10 * float(twin_reach(run)))
    decaying = replace(run, learning_rate=Schedule(np.linspace(0.1, 0.0, 20)), steps=None)
    ragged = replace(run, n=91, steps=10)  # 9 batches of 10 and one of 1 in an epoch
    for case in (decaying, ragged):
        ratio = float(joint_reach(case)) / (np.sqrt(int(case.n)) * float(twin_reach(case)))
        assert ratio < gain * 1.01 + 0.06 if sampling != "reshuffle" else ratio < 0.85
    wild = replace(run, curvature="smooth", L=1e6, learning_rate=np.array([0.1, 1e-9]), steps=1000)
    assert np.isinf(joint_reach(wild)[0])
    assert np.isfinite(joint_reach(wild)[1])


def test_joint_reach_is_the_worst_seed_of_constant_gradients() -> None:
    """Linear losses: sqrt(sum s_j^2) is D |sum_k (w_k/b_k) I_k|; the worst draw of every sampling is enumerated."""
    eta = Schedule(np.array([0.9, 0.4, 0.7, 0.2]))
    for sampling, n, b, tight in (
        ("reshuffle", 4, 2, 0.99),
        ("reshuffle", 3, 2, 0.8),
        ("without_replacement", 4, 2, 1.0),
        ("with_replacement", 3, 2, 1.0),
    ):
        expert = Expert("a", n, b, eta, sampling=sampling, curvature="convex", L=0.0, D_inf=2.0)  # type: ignore[arg-type]
        worst = 0.0
        for batches, _ in orders(expert):
            pushes = np.zeros(n)
            for rate, batch in zip(eta.values, batches, strict=True):
                np.add.at(pushes, list(batch), 2.0 * rate / len(batch))
            worst = max(worst, float(np.linalg.norm(pushes)))
        assert tight * float(joint_reach(expert)) <= worst * (1 + 1e-12)
        assert worst <= float(joint_reach(expert)) * (1 + 1e-12)
