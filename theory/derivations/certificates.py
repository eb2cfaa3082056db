"""Derivations about logits: the output-space certificate (also of the function-space remainder) and loss changes."""

from __future__ import annotations

from theory.certificate import output_formula
from theory.derivations import logit_probes, probes
from theory.derivations.core import Derivation, Step
from theory.linearization_error import largest_loss_formula, taylor_factor_formula
from theory.symbols import symbol


def output_certificate() -> Derivation:
    """The certificate from logits: any two logit fields, with and without labels, and its sharp form."""
    import sympy

    risk, rho, ell = symbol("FK"), symbol("rho"), symbol("ell")
    S = sympy.Symbol("S", positive=True)
    root = sympy.sqrt(risk) + sympy.sqrt(rho**2 / 4 / 2)
    return Derivation(
        name="output certificate",
        theorem="Output-space certificate",
        claim=r"$\sqrt{F(M)} \le \sqrt{F(\hat h)} + \sqrt{\mathbb E\,\mathrm{range}(h(M)-\hat h)^2/8}$, cross-entropy",
        steps=(
            Step(
                r"$\ell(h) = \log\sum_c e^{h_c} - h_y \ge 0$ with either pair of logit fields: $h(M)$ and $h(x_j)$, or "
                r"$h(M)$ and a prediction $\hat h$",
                "definition",
                "cross-entropy; nothing is assumed of the network",
            ),
            Step(
                r"along the line $h + t\delta$: $\phi'' = \mathrm{Var}_{p}(\delta)$ under the softmax",
                "identity",
                "differentiate twice",
                probe=logit_probes.second_derivative,
                scope="random logits, complex steps",
            ),
            Step(
                r"$\mathrm{Var}_p(\delta) \le \mathrm{range}(\delta)^2/4$, at every point of the line",
                "inequality",
                "Popoviciu",
                probe=logit_probes.popoviciu,
                scope="random logits",
            ),
            Step(
                r"Lemma 1 along the line with $A = \mathrm{range}^2/4$: $\sqrt{A/2}$",
                "identity",
                r"$\phi'' \le A$ holds on the whole line, so no condition on the segment is left",
                lhs=sympy.sqrt(rho**2 / 4 / 2),
                rhs=rho / sympy.sqrt(8),
            ),
            Step(
                r"one image",
                "inequality",
                "Lemma 1, directional",
                probe=logit_probes.one_image,
                scope="random logits",
            ),
            Step(
                r"root mean squares over images add up",
                "inequality",
                "Minkowski",
                probe=probes.minkowski,
                scope="random finite spaces, summed out",
            ),
            Step(
                r"the certificate, as computed, over several images",
                "inequality",
                "together",
                probe=logit_probes.certificate,
                scope="six images, random logits",
            ),
            Step(
                r"from the expert's own risk: no labels are needed",
                "inequality",
                "the range does not know the label",
                probe=logit_probes.label_free,
                scope="six images, random logits",
            ),
            Step(
                r"the bound on the risk",
                "identity",
                "square",
                lhs=root**2,
                rhs=output_formula().expression,
            ),
            Step(
                r"with labels: Taylor with the largest curvature",
                "inequality",
                r"$\phi(1) \le \phi(0) + \phi'(0) + \tfrac12\sup\phi''$",
                probe=logit_probes.taylor,
                scope="random logits",
            ),
            Step(
                r"with labels: the loss rises by at most $\max_c\delta_c - \delta_y$",
                "inequality",
                "the log-sum-exp rises by at most the largest change",
                probe=logit_probes.largest_difference,
                scope="random logits",
            ),
            Step(
                r"the smaller of the two image by image",
                "inequality",
                "together",
                probe=logit_probes.labelled,
                scope="six images, random logits",
            ),
            Step(
                r"sharp form: $\ell = \log(1+S)$ with $S = \sum_{c\ne y}e^{h_c-h_y}$, and every exponent moves by at "
                r"most $\rho$",
                "identity",
                r"$S = e^\ell - 1$",
                lhs=sympy.log(1 + S * sympy.exp(rho)).subs(S, sympy.exp(ell) - 1),
                rhs=largest_loss_formula().expression,
            ),
            Step(
                r"no change of that range does worse",
                "inequality",
                "exponents are ordered",
                probe=logit_probes.sharp_form,
                scope="random logits",
            ),
            Step(
                r"and the range on all wrong classes does it",
                "identity",
                "attained",
                probe=logit_probes.sharp_is_attained,
                scope="random logits",
            ),
            Step(
                r"the sharp form is below the certificate",
                "inequality",
                "the certificate holds for every change of that range",
                lhs=sympy.sqrt(largest_loss_formula().expression),
                rhs=sympy.sqrt(ell) + rho / sympy.sqrt(8),
                ranges={ell: (1e-6, 20.0), rho: (1e-3, 20.0)},
            ),
        ),
        claims=(output_formula, largest_loss_formula),
    )


def loss_changes() -> Derivation:
    """Second-order account of a logit change: slope, variance and the factor that bounds the rest."""
    import sympy

    rho, t = symbol("rho"), sympy.Symbol("t", positive=True)
    psi = taylor_factor_formula().expression
    return Derivation(
        name="loss change",
        theorem="Change of the loss, second order",
        claim=r"$\ell(h+\delta)-\ell(h) - (p-e_y)\delta \le \mathrm{Var}_p(\delta)\,\psi(\mathrm{range}\,\delta)$, "
        r"$\psi(\rho) = (e^\rho-1-\rho)/\rho^2$",
        steps=(
            Step(
                r"$\phi'' = \mathrm{Var}_{p_t}(\delta)$ along the line",
                "identity",
                "differentiate twice",
                probe=logit_probes.second_derivative,
                scope="random logits, complex steps",
            ),
            Step(
                r"$\mathrm{Var}_{p_t}(\delta) \le e^{t\,\mathrm{range}}\,\mathrm{Var}_p(\delta)$",
                "inequality",
                r"$|\phi'''| \le \mathrm{range}\cdot\phi''$, the third central moment (self-concordance, Bach 2010)",
                probe=logit_probes.tilted_variance,
                scope="random logits",
            ),
            Step(
                r"Taylor with integral remainder: an antiderivative of $(1-t)e^{\rho t}$",
                "identity",
                "differentiate",
                lhs=sympy.diff(sympy.exp(rho * t) * ((1 - t) / rho + 1 / rho**2), t),
                rhs=(1 - t) * sympy.exp(rho * t),
                ranges={rho: (0.05, 5.0), t: (0.01, 1.0)},
            ),
            Step(
                r"between its limits",
                "identity",
                "insert 1 and 0",
                lhs=sympy.exp(rho) / rho**2 - (1 / rho + 1 / rho**2),
                rhs=psi,
                ranges={rho: (0.05, 5.0)},
            ),
            Step(
                r"small changes: one half", "identity", "limit", lhs=sympy.Limit(psi, rho, 0), rhs=sympy.Rational(1, 2)
            ),
            Step(
                r"the rest after the slope",
                "inequality",
                "together",
                probe=logit_probes.second_order,
                scope="random logits",
            ),
            Step(
                r"the smallest of all such bounds, as computed",
                "inequality",
                r"also $\mathrm{range}^2/8$, the third moment, and $\max_c\delta_c-\delta_y$",
                probe=logit_probes.shipped_change,
                scope="random logits",
            ),
        ),
        claims=(taylor_factor_formula,),
    )
