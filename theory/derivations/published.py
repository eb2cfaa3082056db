"""Derivations of the comparison catalogue: Hardt-Recht-Singer, Lei-Ying, one round of FedAvg, PAC-Bayes."""

from __future__ import annotations

from theory.clocks import tau_formula
from theory.derivations import form_probes, probes
from theory.derivations.core import Derivation, Step
from theory.published.fedavg import one_round_formula
from theory.published.hardt import burn_in_formula, convex_formula, nonconvex_formula, strongly_convex_formula
from theory.published.lei_ying import l1_gap_formula, l1_step_formula, l2_instability_formula, l2_step_formula
from theory.published.pac_bayes import best_expectation_formula, expectation_formula, high_probability_formula
from theory.symbols import symbol


def hardt() -> Derivation:
    """Uniform stability of SGD (Hardt, Recht and Singer 2016), with the sensitivity of a merge."""
    import sympy

    keys = ("B", "L", "a", "n", "c", "G", "K", "m0", "T", "mu", "eta", "kappa", "D_inf")
    B, L, a, n, c, G, K, m, T, mu, eta, kappa, gap = (symbol(key) for key in keys)
    tau = tau_formula().expression.subs(kappa, -mu)
    start = sympy.Symbol("t_0", positive=True)
    best = (2 * a * c * G**2 / B) ** (1 / (L * a + 1)) * K ** (L * a / (L * a + 1))
    burned = B * start / (n - 1) + 2 * c * G**2 / (L * (n - 1)) * (K / start) ** (L * a)
    step, grown, unit = sympy.Symbol("l", positive=True), sympy.Symbol("Pi", positive=True), 2 * G / (L * n)
    product = sympy.gamma(K + 1 + L * a) * sympy.gamma(m + 1) / (sympy.gamma(K + 1) * sympy.gamma(m + 1 + L * a))
    moderate = {a: (0.1, 3.0), L: (0.1, 3.0), n: (3, 60), m: (0, 10), K: (11, 40)}
    return Derivation(
        name="hardt",
        theorem="Hardt, Recht and Singer 2016, for merges",
        claim=r"convex $2cG^2T/n$; strongly convex $2cG^2/(\mu n)$; nonconvex with burn-in",
        steps=(
            Step(r"$f$ is $G$-Lipschitz: gaps are at most $2G$, and distances cost $G$", "assumption", "stated"),
            Step(
                r"convex: the l1 form of Theorem 1 with $\tau = T$ and gap $2G$",
                "identity",
                "insert",
                lhs=(c * G * gap * T / n).subs(gap, 2 * G),
                rhs=convex_formula().expression,
            ),
            Step(
                r"strongly convex: training time saturates, $\tau \le 1/\mu$",
                "inequality",
                "geometric series",
                lhs=tau,
                rhs=1 / mu,
                where=(sympy.Lt(eta * mu, 1),),
            ),
            Step(
                r"insert",
                "identity",
                "gap $2G$",
                lhs=c * G * 2 * G / n / mu,
                rhs=strongly_convex_formula().expression,
            ),
            Step(
                r"nonconvex, $\eta_l \le a/l$: after the burn-in twins separate by $\tfrac{2G}{Ln}(\Pi-1)$, $\Pi = "
                r"\prod(1+La/l)$: one more step",
                "identity",
                r"$e_+ = (1+La/l)e + 2aG/(nl)$",
                lhs=(1 + L * a / step) * unit * (grown - 1) + 2 * a * G / (n * step),
                rhs=unit * ((1 + L * a / step) * grown - 1),
            ),
            Step(
                r"the product is a ratio of Gamma functions",
                "identity",
                "induction",
                lhs=product.subs(K, K + 1),
                rhs=product * (1 + L * a / (K + 1)),
                ranges=moderate,
            ),
            Step(
                r"whole burn-in: not drawn with probability $1 - m_0/n$ at least, else the loss is at most $B$",
                "identity",
                "union bound, b = 1",
                lhs=B * m / n + c * G * unit * (product - 1),
                rhs=burn_in_formula().expression,
                ranges=moderate,
            ),
            Step(
                r"$\Pi \le (K/t_0)^{La}$",
                "inequality",
                r"$\ln(1+x) \le x$ and $\sum 1/l \le \ln(K/t_0)$, here for one factor",
                lhs=1 + L * a / (m + 1),
                rhs=((m + 1) / m) ** (L * a),
                ranges={m: (1.0, 10.0)},
            ),
            Step(
                r"the best real burn-in balances the two terms",
                "identity",
                "derivative zero",
                lhs=B * best ** (L * a + 1),
                rhs=2 * a * c * G**2 * K ** (L * a),
                ranges=moderate,
            ),
            Step(
                r"value there",
                "identity",
                "insert",
                lhs=burned.subs(start, best),
                rhs=nonconvex_formula().expression,
                ranges=moderate,
            ),
            Step(
                r"no other burn-in is better",
                "inequality",
                "convex in the logarithm of the burn-in",
                lhs=nonconvex_formula().expression,
                rhs=burned,
                ranges=moderate,
            ),
        ),
        claims=(convex_formula, strongly_convex_formula, nonconvex_formula, burn_in_formula),
    )


def lei_ying() -> Derivation:
    """On-average stability without a Lipschitz constant (Lei and Ying 2020), with the sensitivity of a merge."""
    import sympy

    keys = ("L", "n", "r", "later", "eta", "Fk", "c", "G", "epsilon")
    L, n, r, later, eta, risk, c, G, eps = (symbol(key) for key in keys)
    u, v = sympy.symbols("u v", positive=True)
    return Derivation(
        name="lei-ying",
        theorem="Lei and Ying 2020, for merges",
        claim=r"$\varepsilon_1 \le \tfrac{2\sqrt{2L}}n\sum\eta_k\sqrt{F_S(x_k)}$ and the squared form with a free $r$",
        steps=(
            Step(r"convex, $\eta_k \le 2/L$: a common sample does not separate twins", "assumption", "b = 1"),
            Step(
                r"else they separate by at most $\eta\sqrt{2L}(\sqrt f + \sqrt{f'})$",
                "inequality",
                "self-bounding gradients",
                probe=probes.self_bounding,
                scope="random smooth nonconvex functions",
            ),
            Step(
                r"l1: probability $1/n$, and the two losses have equal means",
                "identity",
                "average",
                lhs=eta * sympy.sqrt(2 * L) * (sympy.sqrt(risk) + sympy.sqrt(risk)) / n,
                rhs=l1_step_formula().expression,
            ),
            Step(
                r"l2: $(u+v)^2 \le (1+r)u^2 + (1+1/r)v^2$",
                "inequality",
                "arithmetic and geometric mean",
                lhs=(u + v) ** 2,
                rhs=(1 + r) * u**2 + (1 + 1 / r) * v**2,
            ),
            Step(
                r"mean square gap of two gradients: $2\sqrt{2LF}$, squared",
                "inequality",
                "as in the gap from the loss",
                probe=form_probes.loss_gap,
                scope="finite spaces, summed out",
            ),
            Step(
                r"with probability $1/n$; every later step grows it by $1+r/n$",
                "identity",
                "unroll",
                lhs=(1 + 1 / r) * eta**2 * (2 * sympy.sqrt(2 * L * risk)) ** 2 / n * (1 + r / n) ** later,
                rhs=l2_step_formula().expression,
            ),
            Step(
                r"a distance costs a Lipschitz loss",
                "identity",
                "sensitivity of the merge",
                lhs=G * (c * eps),
                rhs=l1_gap_formula().expression,
            ),
            Step(
                r"and a smooth one, at the best parameter: Theorem 1",
                "identity",
                "sensitivity of the merge",
                lhs=L * c**2 * eps**2 / 2,
                rhs=l2_instability_formula().expression,
            ),
        ),
        claims=(l1_step_formula, l2_step_formula, l1_gap_formula, l2_instability_formula),
    )


def fedavg() -> Derivation:
    """One round of federated averaging with client drift."""
    import sympy

    keys = ("F0", "T", "chi", "g", "L", "W", "h")
    start, T, chi, g, L, W, h = (symbol(key) for key in keys)
    u, H, x = sympy.symbols("u H xi", real=True)
    own = sympy.Symbol("H", positive=True)
    both = {u: (-3.0, 3.0), H: (-3.0, 3.0), x: (-3.0, 3.0)}
    return Derivation(
        name="fedavg",
        theorem="One round of FedAvg/FedNova with client drift",
        claim=r"$\mathbb EF_S(M) \le F_0 + \tfrac T2(\chi^2-g^2) + LW + \max(L-\tfrac1{2T},0)h^2$",
        steps=(
            Step(
                r"$M - x_0 = -H - \xi$, martingale noise with $\mathbb E\|\xi\|^2 \le W$",
                "definition",
                "merge of experts",
            ),
            Step(r"descent lemma for $F_S$", "cited", "smoothness"),
            Step(
                r"polarisation",
                "identity",
                "expand",
                lhs=-u * H,
                rhs=-T / 2 * u**2 - H**2 / (2 * T) + T / 2 * (u - H / T) ** 2,
                ranges=both,
            ),
            Step(
                r"noise and drift",
                "inequality",
                r"$(a+b)^2 \le 2a^2 + 2b^2$",
                lhs=(H + x) ** 2,
                rhs=2 * H**2 + 2 * x**2,
                ranges=both,
            ),
            Step(
                r"together, and $\mathrm{rms}\|H\| \le h$ where its coefficient is positive",
                "inequality",
                "monotone",
                lhs=start - T / 2 * g**2 - own**2 / (2 * T) + T / 2 * chi**2 + L / 2 * (2 * own**2 + 2 * W),
                rhs=one_round_formula().expression,
                where=(sympy.Le(own, h),),
            ),
        ),
        claims=(one_round_formula,),
    )


def pac_bayes() -> Derivation:
    """PAC-Bayes for merges: Gaussian prior at the base, posterior at the merge."""
    import sympy

    keys = ("L", "s", "dim", "B", "moved", "v", "N", "n", "delta")
    L, s, dim, B, rho, v, N, n, delta = (symbol(key) for key in keys)
    t = sympy.Symbol("t", positive=True)
    third = sympy.Rational(1, 3)
    at_best = (B * rho * sympy.sqrt(v) / (4 * L * dim)) ** third
    change = rho**2 / (2 * s**2 * t) + t * B**2 * v / 8
    best_t = 2 * rho / (s * B * sympy.sqrt(v))
    kl = rho**2 / (2 * s**2)
    small = {v: (0.01, 1.0), dim: (1, 100), N: (1, 20), n: (2, 60)}
    return Derivation(
        name="pac-bayes",
        theorem="PAC-Bayes for merges",
        claim=r"gap at most $Ls^2\dim + \tfrac{B\rho\sqrt v}{2s}$ for every $s$; its minimum over $s$",
        steps=(
            Step(r"losses in $[0,B]$, prior $N(x_0,s^2I)$ fixed before the data", "assumption", "stated"),
            Step(
                r"smoothing costs $\tfrac L2s^2\dim$ on either side",
                "identity",
                "the linear term has mean zero",
                lhs=2 * (L / 2 * s**2 * dim),
                rhs=L * s**2 * dim,
            ),
            Step(r"change of measure and Hoeffding: $\mathrm{KL}/t + tB^2v/8$", "cited", "Donsker and Varadhan"),
            Step(
                r"at its best $t$",
                "identity",
                "insert",
                lhs=change.subs(t, best_t),
                rhs=B * rho * sympy.sqrt(v) / (2 * s),
                ranges=small,
            ),
            Step(
                r"no other $t$ is better",
                "inequality",
                "arithmetic and geometric mean",
                lhs=B * rho * sympy.sqrt(v) / (2 * s),
                rhs=change,
                ranges=small,
            ),
            Step(
                r"the gap in expectation",
                "identity",
                "add",
                lhs=2 * (L / 2 * s**2 * dim) + B * rho * sympy.sqrt(v) / (2 * s),
                rhs=expectation_formula().expression,
            ),
            Step(
                r"at the best $s$",
                "identity",
                "derivative zero",
                lhs=expectation_formula().expression.subs(s, at_best),
                rhs=best_expectation_formula().expression,
                ranges=small,
            ),
            Step(
                r"no other $s$ is better",
                "inequality",
                "arithmetic and geometric mean of three terms",
                lhs=best_expectation_formula().expression,
                rhs=expectation_formula().expression,
                ranges=small,
            ),
            Step(
                r"high probability, one task: $\mathrm{kl} \le (\mathrm{KL}+\ln(2N\sqrt n/\delta))/n$",
                "cited",
                "Maurer",
            ),
            Step(
                r"Pinsker: the excess of one task",
                "identity",
                r"losses in $[0,B]$",
                lhs=B * sympy.sqrt((kl + sympy.log(2 * N * sympy.sqrt(n) / delta)) / n / 2),
                rhs=high_probability_formula().expression,
                ranges=small,
            ),
        ),
        claims=(expectation_formula, best_expectation_formula, high_probability_formula),
    )
