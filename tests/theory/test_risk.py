"""The assembled bound: terms, forms, heads, shared samples, operators, tiers, verdicts, refusals, elasticities."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import (
    AssumptionError,
    Expert,
    Merge,
    MergeboundError,
    RecipeError,
    Schedule,
    assemble_master,
    master_bound,
    network_bound,
    task_stability,
)
from theory.dispersion import (
    dispersion,
    dispersion_from_gram,
    dispersion_split,
)
from theory.drift import drift_base, drift_energy_formula, drift_noise_formula
from theory.operators import added_dispersion, coefficients, sensitivity
from theory.risk import master_formula
from theory.stability import (
    epsilon_rms_formula,
    epsilon_sup_formula,
    gamma_with_replacement_formula,
    gamma_without_replacement_formula,
)
from theory.symbolic import evaluate
from theory.symbols import _rows, glossary, symbol
from theory.ties import CONSTANTS
from theory.training import pl_risk_formula

STATED = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)


def expert(name: str = "a", **changes: object) -> Expert:
    known: dict[str, object] = dict(
        n=200,
        batch_size=20,
        learning_rate=0.1,
        steps=50,
        curvature="convex",
        L=1.0,
        initial_gradient_norm=0.5,
        sigma=1.0,
        sigma0=1.0,
        D_inf=2.0,
        training_risk=0.05,
    )
    known.update(changes)
    return Expert(name, **known)  # type: ignore[arg-type]


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_master_bound_by_hand() -> None:
    bound = master_bound(Merge((expert("a"), expert("b", training_risk=0.15)), **STATED))
    tau, nu = 0.1 * 50, 0.01 * 50
    d = 0.5 * tau + np.sqrt(nu / 20 * 180 / 199)
    eps2 = 4 * ((tau / 200) ** 2 + nu * (1 / 4000 - 1 / 40000))
    own = np.sqrt((np.sqrt(0.05) + np.sqrt(0.5) * d) ** 2 / 2 + (np.sqrt(0.15) + np.sqrt(0.5) * d) ** 2 / 2)
    expected = own + np.sqrt(0.5 * eps2 / 4)
    assert own < np.sqrt(0.1) + np.sqrt(0.5 * d**2)  # task by task is the sharpest aggregation here
    assert bound.dispersion_form == "task by task"
    assert float(bound.value) == pytest.approx(expected**2)
    assert bound.tier == "certified"
    assert [term.name for term in bound.terms] == ["training", "dispersion", "instability"]
    assert sum(float(term.share) for term in bound.terms) == pytest.approx(1)


@pytest.mark.parametrize(
    "name", ["n", "batch_size", "learning_rate", "steps", "momentum", "weight_decay", "L", "sigma"]
)
def test_a_guessed_hyperparameter_is_not_certified(name: str) -> None:
    guessed = master_bound(Merge((expert("a", measured=frozenset({name})),), **STATED))
    assert (guessed.tier, guessed.measured) == ("estimated", (f"a: {name}",))


def test_what_is_measured_of_a_merge() -> None:
    def merge(field: str, **given: object) -> Merge:
        return Merge((expert("a"), expert("b")), measured=frozenset({field}), **STATED, **given)

    assert master_bound(merge("coefficients", method="weighted", coefficients=[0.3, 0.4])).tier == "estimated"
    assert master_bound(merge("drop_rate", method="dare", coefficients=0.3, drop_rate=0.5)).tier == "estimated"
    assert master_bound(merge("dispersion")).tier == "certified"  # none is given
    with pytest.raises(RecipeError, match="dispersoin"):
        merge("dispersoin", dispersion=0.1)


def test_assemble_broadcasts_over_configurations() -> None:
    rng = np.random.default_rng(0)
    risks, eps, V = rng.random((3, 5, 4)), rng.random((3, 1, 4)), rng.random((5, 1))
    L, p, c = np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.1, 0.9])
    together = assemble_master(risks, p, L, V, c, eps)
    assert together.value.shape == (5, 4)
    for i, j in product(range(5), range(4)):
        alone = assemble_master(risks[:, i, j], p, L, V[i, 0], c, eps[:, 0, j])
        assert together.value[i, j] == pytest.approx(float(alone.value))
        by_hand = (
            np.sqrt(p @ risks[:, i, j]) + np.sqrt(1.5 * V[i, 0]) + np.sqrt(np.sum(p * L / 2 * (c * eps[:, 0, j]) ** 2))
        )
        assert float(alone.value) == pytest.approx(by_hand**2)


def test_recipes_broadcast_like_single_recipes() -> None:
    rates = np.array([0.05, 0.3, 1.9])
    many = master_bound(Merge((expert("a", learning_rate=rates), expert("b")), **STATED))
    for index, rate in enumerate(rates):
        one = master_bound(Merge((expert("a", learning_rate=rate), expert("b")), **STATED))
        assert many.value[index] == pytest.approx(float(one.value))


def test_permuting_experts_changes_nothing() -> None:
    experts = (expert("a"), expert("b", L=3.0, steps=20), expert("c", n=50))
    first = master_bound(Merge(experts, method="weighted", coefficients=[0.1, 0.5, 0.4], weights=[0.2, 0.5, 0.3]))
    order = (experts[2], experts[0], experts[1])
    second = master_bound(Merge(order, method="weighted", coefficients=[0.4, 0.1, 0.5], weights=[0.3, 0.2, 0.5]))
    assert float(first.value) == pytest.approx(float(second.value))


FORMULAS = (
    gamma_without_replacement_formula,
    gamma_with_replacement_formula,
    epsilon_sup_formula,
    epsilon_rms_formula,
    drift_noise_formula,
    drift_energy_formula,
    pl_risk_formula,
    master_formula,
)


@pytest.mark.parametrize("formula", FORMULAS)
def test_compiled_formulas_against_fifty_digits(formula) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(7)
    made = formula()
    low = {"n": (20, 90), "b": (1, 19), "K": (1, 60), "F0": (2.0, 5.0), "FK": (0.0, 1.0), "F_star": (0.0, 0.5)}
    for _ in range(20):
        numbers = [rng.uniform(*low.get(key, (0.05, 0.9))) for key in made.keys]
        with mpmath.workdps(50):
            exact = made.expression.evalf(50, subs=dict(zip((symbol(key) for key in made.keys), numbers, strict=True)))
        assert float(evaluate(formula, *numbers)) == pytest.approx(float(exact), rel=1e-11)
        assert made.latex()


def test_base_drift_needs_equal_batches_for_the_short_form() -> None:
    """Trap of 6(b): tau sqrt(g^2 + sigma_0^2/b) is too small when an epoch ends with a short batch."""
    from theory import clock

    run = expert(n=10, batch_size=9, sampling="reshuffle", steps=20, initial_gradient_norm=0.01)
    timing = clock(run)
    naive = float(timing.tau) * np.sqrt(0.01**2 + 1 / 9 * (10 - 9) / 9)
    assert naive < float(drift_base(run, timing))


# --- dispersion and operators -----------------------------------------------------------------------------------------


def test_dispersion_identities() -> None:
    rng = np.random.default_rng(2)
    x0, deltas = rng.standard_normal(6), rng.standard_normal((4, 6))
    p, alpha = rng.dirichlet(np.ones(4)), rng.standard_normal(4)
    merged = x0 + alpha @ deltas
    V = float(dispersion(merged, x0 + deltas, p))
    assert pytest.approx(sum(p[j] * np.sum((merged - x0 - deltas[j]) ** 2) for j in range(4))) == V
    away, least = dispersion_split(merged, x0 + deltas, p)
    assert pytest.approx(float(away + least)) == V
    assert float(least) <= V
    assert float(dispersion_from_gram(deltas @ deltas.T, alpha, p)) == pytest.approx(V)
    assert dispersion_from_gram(deltas @ deltas.T, rng.standard_normal((7, 4)), p).shape == (7,)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("independent", [True, False])
def test_dare_over_every_mask(rescale: bool, independent: bool) -> None:
    """Sensitivity and E V of DARE by enumerating every mask of two experts in two coordinates."""
    rng = np.random.default_rng(3)
    deltas, lam, drop, p = rng.standard_normal((2, 2)), 0.7, 0.4, np.array([0.3, 0.7])
    drifts = np.linalg.norm(deltas, axis=1)
    merge = Merge(
        (expert("a"), expert("b")),
        method="dare",
        coefficients=lam,
        drop_rate=drop,
        rescale=rescale,
        independent_masks=independent,
    )
    total, moved = 0.0, 0.0
    change = rng.standard_normal(2)
    for bits in product([0, 1], repeat=4 if independent else 2):
        masks = np.array(bits).reshape(-1, 2) if independent else np.array([bits, bits])
        probability = np.prod([1 - drop if bit else drop for bit in bits])
        scaled = masks / (1 - drop) if rescale else masks
        merged = lam * (scaled * deltas).sum(axis=0)
        total += probability * float(dispersion(merged, deltas, p))
        moved += probability * np.sum((lam * scaled[0] * change) ** 2)
    assert np.sqrt(moved / np.sum(change**2)) == pytest.approx(float(sensitivity(merge)[0]))
    mean = coefficients(merge)
    smooth_part = float(dispersion_from_gram(deltas @ deltas.T, mean, p))
    added = float(added_dispersion(merge, drifts))
    if independent:
        assert total == pytest.approx(smooth_part + added)
    else:
        assert total <= smooth_part + added + 1e-12


def test_ties_is_refused_with_its_remedy() -> None:
    pair = (expert("a"), expert("b"))
    with pytest.raises(AssumptionError, match="sensitivity"):
        master_bound(Merge(pair, method="ties", coefficients=1.0))
    with pytest.raises(AssumptionError, match="dispersion"):
        master_bound(Merge(pair, method="ties", coefficients=1.0, sensitivity=0.5))
    bound = master_bound(Merge(pair, method="ties", coefficients=1.0, sensitivity=0.5, dispersion=0.1, **STATED))
    assert bound.tier == "estimated"
    assert any(item.name == "10" and item.verdict == "unknown" for item in bound.assumptions)


# --- heads and shared samples -----------------------------------------------------------------------------------------


def test_trap_trained_heads_lose_the_gain_of_averaging() -> None:
    frozen = master_bound(Merge(tuple(expert(name, head="frozen") for name in "abcd"), **STATED))
    trained = master_bound(Merge(tuple(expert(name, head="trained") for name in "abcd"), **STATED))
    assert float(trained.terms[2].value) == pytest.approx(4 * float(frozen.terms[2].value))
    # the stability of the merged model with its own head can be all private: c^2 eps^2 would then be too small
    assert float(task_stability([0.25], [1.0], trained=True)[0]) == 1.0


def test_separated_heads_are_used_where_they_help() -> None:
    value = task_stability([0.25], [1.0], trained=True, split=([0.6], [0.2]))
    assert float(value[0]) == pytest.approx((0.25 * 0.6) ** 2 + 0.2**2)
    separate = network_bound([0.1] * 4, 2.0, [1.0] * 4, trained_heads=True, private_drift=[0.1] * 4)
    assert float(separate.terms[2].value) == pytest.approx(np.sqrt(2 * (1 / 16 + 0.01)))
    with pytest.raises(RecipeError, match="private_drift"):
        network_bound([0.1] * 4, 2.0, [1.0] * 4, trained_heads=True)


def test_trap_shared_samples_add_the_sensitivities() -> None:
    """Two experts trained on the same samples with the same seeds: M moves by the sum, not by the root of squares."""
    rng = np.random.default_rng(4)
    data, twin = rng.standard_normal(8), rng.standard_normal(8)

    def train(samples: np.ndarray) -> float:
        return float(0.5 * samples.mean())  # one gradient step on (x - z)^2/2 from zero

    stability = np.mean([(train(np.r_[data[:j], twin[j], data[j + 1 :]]) - train(data)) ** 2 for j in range(8)])
    merged = stability  # average of two identical experts moves as far as one
    independent = task_stability([0.5, 0.5], [np.sqrt(stability)] * 2)
    together = task_stability([0.5, 0.5], [np.sqrt(stability)] * 2, shared_samples=True, samples=[8.0, 8.0])
    assert np.all(independent < merged)
    assert np.all(together >= merged - 1e-15)
    assert np.allclose(together, merged)


def test_shared_samples_of_different_size_weigh_by_their_share() -> None:
    value = task_stability([0.5, 0.5], [1.0, 2.0], shared_samples=True, samples=[100.0, 400.0])
    assert np.allclose(value, [(0.5 + 0.5 * 2 * 2) ** 2, (1.0 + 0.5 * 0.5) ** 2])


def test_shared_samples_are_reported_and_covered() -> None:
    pair = (expert("a"), expert("b"))
    bound = master_bound(Merge(pair, **{**STATED, "shared_samples": True}))
    verdict = next(item for item in bound.assumptions if item.name == "A1")
    assert verdict.verdict == "violated"
    assert verdict.covered
    assert float(bound.value) > float(master_bound(Merge(pair, **STATED)).value)


# --- tiers, verdicts, refusals ----------------------------------------------------------------------------------------


def test_tier_falls_with_every_measured_constant_that_is_used() -> None:
    assert master_bound(Merge((expert(),), **STATED)).tier == "certified"
    assert master_bound(Merge((expert(),))).tier == "estimated"
    for name in ("L", "sigma", "D_inf", "training_risk"):
        bound = master_bound(Merge((expert(measured=frozenset({name})),), **STATED))
        assert bound.tier == "estimated"
        assert any(name in item for item in bound.measured)
    unused = master_bound(Merge((expert(sigma0=50.0, measured=frozenset({"sigma0"})),), **STATED))
    assert unused.tier == "certified"


def test_broken_assumptions_are_refused() -> None:
    with pytest.raises(AssumptionError, match="per_sample_loss"):
        master_bound(Merge((expert(),), per_sample_loss=False))
    with pytest.raises(AssumptionError, match="data_independent_choices"):
        master_bound(Merge((expert(),), data_independent_choices=False))


def test_adamw_is_refused_by_name_and_works_from_its_measured_drift() -> None:
    with pytest.raises(AssumptionError, match=r"'a'.*adamw.*measured drift"):
        master_bound(Merge((expert(optimizer="adamw"),), **STATED))
    with pytest.raises(AssumptionError, match="gradient_clipping"):
        master_bound(Merge((expert(gradient_clipping=True),), **STATED))
    bound = master_bound(Merge((expert(optimizer="adamw", drift=0.3),), **STATED))
    assert bound.tier == "estimated"
    assert bound.experts[0].epsilon_form == "cap sqrt(2) d"
    assert float(bound.experts[0].epsilon) == pytest.approx(0.3 * np.sqrt(2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(learning_rate=-0.1), "learning_rate"),
        (dict(learning_rate=float("nan")), "learning_rate"),
        (dict(batch_size=300), "batch_size"),
        (dict(batch_size=2.5), "batch_size"),
        (dict(n=0), "n is 0"),
        (dict(steps=None), "steps"),
        (dict(steps=0), "steps"),
        (dict(momentum=1.0), "momentum"),
        (dict(weight_decay=-1.0), "weight_decay"),
        (dict(sampling="random"), "sampling"),
        (dict(curvature="concave"), "curvature"),
        (dict(curvature="strongly_convex"), "mu"),
        (dict(curvature="strongly_convex", mu=2.0), "mu"),
        (dict(mu=0.5), "mu"),
        (dict(L=float("inf")), "L"),
        (dict(kappa=-11.0), "kappa"),
        (dict(learning_rate="fast"), "learning_rate"),
        (dict(learning_rate=True), "learning_rate"),
        (dict(steps=50, learning_rate=Schedule(np.ones(4))), "steps"),
        (dict(measured=frozenset({"Lipschitz"})), "Lipschitz"),
        (dict(n=np.array([200, 300]), L=np.ones(3)), "broadcast"),
        (dict(batch_gradient_norms=[1.0]), "Schedule"),
        (dict(head="shared"), "head"),
        (dict(pl_constant=5.0), "pl_constant"),
    ],
)
def test_bad_experts_name_expert_field_and_remedy(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        expert("worst", **changes)
    message = str(caught.value)
    assert "worst" in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(method="sum_of_logits"), "method"),
        (dict(weights=[0.5, 0.6]), "weights"),
        (dict(weights=[0.5, float("nan")]), "weights"),
        (dict(weights=[1.0]), "weights"),
        (dict(coefficients=[0.5, 0.5]), "coefficients"),
        (dict(method="task_arithmetic"), "coefficients"),
        (dict(method="weighted", coefficients=[0.1, 0.2, 0.3]), "coefficients"),
        (dict(method="dare", coefficients=1.0, drop_rate=1.0), "drop_rate"),
        (dict(drop_rate=0.5), "drop_rate"),
        (dict(dispersion=-1.0), "dispersion"),
    ],
)
def test_bad_merges_name_field_and_remedy(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Merge((expert("a"), expert("b")), **changes)  # type: ignore[arg-type]


def test_missing_constants_name_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r"'a'.*drift.*sigma0"):
        master_bound(Merge((expert(initial_gradient_norm=None),)))
    with pytest.raises(RecipeError, match=r"'a'.*training_risk|minimal_risk"):
        master_bound(Merge((expert(training_risk=None, initial_risk=1.0, sigma=None),)))
    with pytest.raises(RecipeError, match="L is missing"):
        master_bound(Merge((expert(L=None, drift=1.0),)))
    with pytest.raises(RecipeError, match="twice"):
        Merge((expert("a"), expert("a")))


# --- networks ---------------------------------------------------------------------------------------------------------


def test_network_bound_by_hand() -> None:
    bound = network_bound([0.1, 0.3], 2.0, [1.0, 2.0], dispersion=0.8)
    expected = np.sqrt(0.2) + np.sqrt(0.8) + np.sqrt(0.5 * (0.25 * 2 + 0.25 * 8))
    assert float(bound.value) == pytest.approx(expected**2)
    assert bound.tier == "estimated"
    held_out = network_bound(
        [0.1, 0.3], 2.0, [1.0, 2.0], dispersion=0.8, held_out=True, method="ties", coefficients=1.0
    )
    assert float(held_out.value) == pytest.approx((np.sqrt(0.2) + np.sqrt(0.8)) ** 2)
    with pytest.raises(RecipeError, match="drift"):
        network_bound([0.1, 0.3], 2.0, [1.0, float("nan")])
    with pytest.raises(RecipeError, match="drift has shape"):
        network_bound([0.1, 0.3], 2.0, [1.0])
    reported = network_bound([0.1], 2.0, [1.0], per_sample_loss=False)
    assert any(item.name == "A3" and item.verdict == "violated" for item in reported.assumptions)
    many = network_bound(np.ones((2, 5)), 2.0, np.linspace(0, 1, 10).reshape(2, 5))
    assert many.value.shape == (5,)


def test_energy_form_with_cap_has_no_exponential() -> None:
    runs = expert(
        curvature="smooth", steps=10**5, learning_rate=0.5, initial_gradient_norm=None, D_inf=None, initial_risk=2.0
    )
    bound = master_bound(Merge((runs, replace(runs, name="b")), **STATED))
    assert np.isfinite(bound.value)
    assert bound.experts[0].drift_form == "6(c)"


# --- text and symbols -------------------------------------------------------------------------------------------------


def test_explain_names_terms_values_forms_and_verdicts() -> None:
    text = master_bound(Merge((expert("left"), expert("right")), **STATED)).explain()
    for words in ("training", "dispersion", "instability", "left", "6(a)", "Theorem 2", "A1", "holds", "certified"):
        assert words in text
    vacuous = master_bound(Merge((expert(curvature="smooth", steps=10**5),), **STATED))
    assert np.isinf(vacuous.value)
    assert "vacuous" in vacuous.explain()
    assert "nan" not in vacuous.explain()
    assert r"\sqrt" in vacuous.latex()


def test_glossary_has_no_collisions() -> None:
    entries = glossary()
    assert len(_rows()) == len(entries)  # a key that is there twice would overwrite its first meaning
    for field in ("key", "latex", "meaning"):
        values = [getattr(entry, field) for entry in entries.values()]
        assert len(set(values)) == len(values), field
    assert len({symbol(key) for key in entries}) == len(entries)
    assert len({symbol(key, 1) for key in entries} | {symbol(key) for key in entries}) == 2 * len(entries)
    assert all(entry.unit and entry.domain for entry in entries.values())


@pytest.mark.parametrize("changes", [{}, dict(curvature="smooth", L=0.3), dict(weight_decay=0.05), dict(D_inf=None)])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "L", "sigma", "D_inf", "initial_gradient_norm"])
def test_elasticity_is_the_slope(changes: dict[str, object], name: str) -> None:
    if getattr(expert(**changes), name) is None:
        return

    def bound(scale: float) -> float:
        pair = []
        for label, L in (("a", 1.0), ("b", 1.7)):
            item = expert(label, **{"L": L, "sigma0": None, **changes})
            pair.append(replace(item, **{name: getattr(item, name) * scale}))
        return float(master_bound(Merge(tuple(pair), method="weighted", coefficients=[0.3, 0.9])).value)

    exact = master_bound(
        Merge(
            tuple(expert(label, **{"L": L, "sigma0": None, **changes}) for label, L in (("a", 1.0), ("b", 1.7))),
            method="weighted",
            coefficients=[0.3, 0.9],
        )
    )
    step = 1e-5
    slope = (np.log(bound(np.exp(step))) - np.log(bound(np.exp(-step)))) / (2 * step)
    assert exact.elasticity(name) == pytest.approx(slope, abs=2e-6)


def test_elasticity_is_refused_where_it_is_not_known() -> None:
    bound = master_bound(Merge((expert(momentum=0.5),)))
    with pytest.raises(MergeboundError, match="plain SGD"):
        bound.elasticity("steps")
    with pytest.raises(MergeboundError, match="not a field"):
        master_bound(Merge((expert(),))).elasticity("speed")
    with pytest.raises(MergeboundError, match="measured"):
        master_bound(Merge((expert(drift=1e-3),))).elasticity("learning_rate")


# --- nothing is ever NaN ----------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_no_nan_ever(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def extreme() -> float:
        return float(rng.choice([0.0, 1e-300, 1e-8, 1.0, 1e8, 1e150, 1e300, float(rng.lognormal())]))

    def wild(name: str) -> Expert:
        n = int(rng.choice([1, 2, 50, 10**6]))
        steps = int(rng.choice([1, 2, 30]))
        return Expert(
            name,
            n=n,
            batch_size=int(rng.integers(1, n + 1)),
            learning_rate=max(extreme(), 1e-300),
            steps=steps,
            momentum=float(rng.choice([0.0, 0.0, 0.99])),
            weight_decay=extreme(),
            sampling=str(rng.choice(["without_replacement", "with_replacement", "reshuffle"])),  # type: ignore[arg-type]
            drop_last=bool(rng.random() < 0.5),
            curvature=str(rng.choice(["convex", "smooth"])),  # type: ignore[arg-type]
            L=extreme(),
            initial_gradient_norm=extreme(),
            sigma=extreme(),
            sigma0=extreme(),
            D_inf=extreme(),
            D_2=extreme() if rng.random() < 0.5 else None,
            initial_risk=extreme(),
            training_risk=extreme(),
            base_norm=extreme(),
            head=str(rng.choice(["none", "trained"])),  # type: ignore[arg-type]
            drift=extreme() if rng.random() < 0.2 else None,
            measured=frozenset(CONSTANTS),  # no common loss
        )

    method = str(rng.choice(["average", "task_arithmetic", "dare"]))
    extra = {} if method == "average" else {"coefficients": float(rng.choice([0.0, 1.0, -1e200]))}
    if method == "dare":
        extra["drop_rate"] = 0.9
    merge = Merge(tuple(wild(name) for name in "ab"), method=method, shared_samples=bool(seed % 2), **extra)  # type: ignore[arg-type]
    bound = master_bound(merge)
    assert not np.any(np.isnan(bound.value))
    assert np.all(bound.value >= 0)
    for term in bound.terms:
        assert not np.any(np.isnan(term.value))
        assert not np.any(np.isnan(term.share))
    assert "nan" not in bound.explain()
