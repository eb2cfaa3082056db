"""Every proof is checked step by step, and the checker is checked: wrong steps and wrong claims are caught."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from theory.clocks import nu_formula, tau_formula
from theory.derivations import Step, derivations, derive, probes
from theory.derivations.core import Derivation, check_step
from theory.drift import drift_base_formula, drift_energy_formula, drift_noise_formula
from theory.errors import MergeboundError
from theory.generalization import deviation_formula, l1_formula, theorem_1_formula
from theory.laws import lambda_formula, number_formula
from theory.lemma import lemma_formula
from theory.master import master_formula
from theory.stability import (
    epsilon_rms_formula,
    epsilon_sup_formula,
    gamma_with_replacement_formula,
    gamma_without_replacement_formula,
)
from theory.symbols import symbol
from theory.training import convex_risk_formula, pl_risk_formula

COMPILED = (
    *(lemma_formula, theorem_1_formula, l1_formula, deviation_formula, tau_formula, nu_formula, master_formula),
    *(gamma_without_replacement_formula, gamma_with_replacement_formula, epsilon_sup_formula, epsilon_rms_formula),
    *(drift_noise_formula, drift_base_formula, drift_energy_formula, pl_risk_formula),
    *(convex_risk_formula, lambda_formula, number_formula),
)


@pytest.mark.parametrize("name", derivations())
def test_every_step_holds(name: str) -> None:
    proof = derive(name)
    for seed in (0, 1):
        for row in proof.check(seed):
            if row.step.kind in ("identity", "inequality"):
                assert row.method != "not checked", row.step.statement  # nothing that can be checked is left out
                assert row.count >= 1
            if row.method == "points":
                assert row.count >= 20
                assert row.closest <= 1 + 1e-9


def test_every_compiled_formula_is_the_end_of_a_proof() -> None:
    proven = {make for name in derivations() for make in derive(name).claims}
    assert set(COMPILED) <= proven


@pytest.mark.parametrize("name", derivations())
def test_latex_is_balanced(name: str) -> None:
    text = derive(name).latex()
    assert text.count("{") == text.count("}")
    assert text.count("$") % 2 == 0
    assert text.count(r"\[") == text.count(r"\]")
    assert text.count(r"\item") == len(derive(name).steps)
    assert not re.search(r"\bnan\b|\bzoo\b|tilde", text)


def test_explain_shows_the_evidence() -> None:
    text = derive("theorem 2").explain()
    assert "[instances, 20, worst" in text
    assert text.count("\n") == len(derive("theorem 2").steps)
    with pytest.raises(MergeboundError, match="choose one of lemma 1"):
        derive("theorem 17")


def _check(step: Step) -> bool:
    return check_step(step, np.random.default_rng(0), 400).holds


def test_wrong_steps_are_caught() -> None:
    """The checker refuses what is almost right: a lost factor, a dropped condition, a limit on the wrong side."""
    eta, kappa, K, L, beta, g, nu, tau = (symbol(key) for key in ("eta", "kappa", "K", "L", "beta", "g", "nu", "tau"))
    formula = nu_formula().expression
    wrong = Step("", "identity", "", lhs=formula.subs(K, K + 1), rhs=(1 + eta * kappa) * formula + eta**2)
    assert not _check(wrong)
    assert _check(replace(wrong, rhs=(1 + eta * kappa) ** 2 * formula + eta**2))
    descent = Step("", "inequality", "", lhs=eta / 2, rhs=eta * (1 - L * eta / 2))
    assert not _check(descent)  # false without eta <= 1/L
    assert _check(replace(descent, where=(L * eta <= 1,)))
    assert not _check(Step("", "inequality", "", lhs=tau**2, rhs=nu))
    assert not _check(Step("", "identity", "", lhs=g * beta, rhs=g * beta * (1 + 1e-13)))


def test_wrong_claims_are_caught() -> None:
    proof = derive("clock")
    with pytest.raises(MergeboundError, match="no step ends in the formula"):
        replace(proof, claims=(lemma_formula,)).check()
    broken = Derivation("x", "x", "x", (replace(proof.steps[2], rhs=tau_formula().expression),))
    with pytest.raises(MergeboundError, match="step 1 fails"):
        broken.check()


def test_traps_fail_the_probes() -> None:
    """Traps of the theory, as steps that must be refused: each naive formula breaks on an enumerated instance."""

    def fixed_batch_size(rng: np.random.Generator) -> tuple[float, float]:
        """Reshuffling with a short last batch, priced as if every batch had size b."""
        n, b, w = 3, 2, rng.uniform(0.5, 1, 2)
        exact = sum((w[k] / size) ** 2 * size / n for k, size in ((0, 2), (1, 1)))
        naive = (w.sum() / n) ** 2 + float(np.sum(w**2) / (b * n) - (w.sum() / n) ** 2)
        return float(exact), float(naive)

    def momentum_without_curvature(rng: np.random.Generator) -> tuple[float, float]:
        """Convex and kappa = 0 with momentum: the response without curvature is not a bound."""
        beta, eta, v, x, worst = 0.9, 1.0, 0.0, 0.0, 0.0
        for k in range(400):
            h = 1.0 if x * v > 0 or abs(v) < 0.2 * abs(x) else 0.0
            v = beta * v + h * x + (k == 0)
            x = x - eta * v
            worst = max(worst, abs(x))
        return worst, eta / (1 - beta)

    def head_without_maximum(rng: np.random.Generator) -> tuple[float, float]:
        """Trained heads: c^2 times the total stability forgets that the head is not merged."""
        shared, private, c = rng.random(), rng.random(), 0.25
        return float(c**2 * shared + private), float(c**2 * (shared + private))

    def orthogonal_by_independence(rng: np.random.Generator) -> tuple[float, float]:
        """Independent data do not make task vectors orthogonal: a common mean direction."""
        d, alpha = np.array([1.0, 1.0]), 1.0
        return float(0.5 * np.sum((2 * alpha * d - d) ** 2)), float(np.mean((1 - alpha) ** 2 * d**2 + alpha**2 * 0.9))

    traps = (fixed_batch_size, momentum_without_curvature, head_without_maximum, orthogonal_by_independence)
    for trap in traps:
        step = Step(trap.__doc__ or "", "inequality", "", probe=trap)
        assert not check_step(step, np.random.default_rng(0), 400).holds, trap.__name__


def test_reshuffling_breaks_the_rms_split() -> None:
    """Trap: the rms form needs independent batches; under one random order the multiplicity carries information."""
    n, D = 2, 1.0
    w = np.array([1.0, 1.0])
    # gap at step 1 is large exactly when the sample was not drawn at step 0, hence is drawn now
    total = 0.5 * (w[0] * D) ** 2 + 0.5 * (w[1] * D * np.sqrt(2)) ** 2
    naive = D * (w.sum() / n + np.sqrt(max(w @ w / n - (w.sum() / n) ** 2, 0)))
    assert np.sqrt(total) > naive
    assert probes.rms_split(np.random.default_rng(0))[0] <= probes.rms_split(np.random.default_rng(0))[1]
