"""Derivations of further forms: Lemma 1 in a metric and per layer, trained heads, sharper stability, training risks."""

from __future__ import annotations

from theory.clocks import nu_formula
from theory.derivations import form_probes, probes
from theory.derivations.core import Derivation, Step
from theory.lemma import lemma_formula
from theory.symbols import symbol
from theory.training import descent_risk_formula, distance_risk_formula


def lemma_forms() -> Derivation:
    """Lemma 1: matrix form, per layer, from first derivatives only."""
    import sympy

    R, L, V = symbol("R"), symbol("L"), symbol("V")
    first, second = sympy.symbols("lambda_1 lambda_2", positive=True)
    u, v = sympy.symbols("u_1 u_2", positive=True)
    split = sympy.sqrt(first / 2) * u + sympy.sqrt(second / 2) * v
    return Derivation(
        name="lemma 1 forms",
        theorem="Lemma 1, matrix, per layer, first derivatives",
        claim=r"$\sqrt{f(x+u)} \le \sqrt{f(x)} + \sqrt{\tfrac12u^\top Pu}$, $+\sum_l\sqrt{\lambda_l/2}\|u_l\|$, "
        r"$+\sqrt{\Lambda/2}$",
        steps=(
            Step(r"in coordinates $y = P^{1/2}x$ the smoothness is one", "definition", r"$\nabla^2f \preceq P$"),
            Step(
                r"matrix form",
                "inequality",
                "Lemma 1 in those coordinates",
                probe=form_probes.matrix_form,
                scope="random smooth nonconvex functions",
            ),
            Step(
                r"per layer: Lemma 1 block by block, the slope of $\sqrt f$ in block l is at most $\sqrt{\lambda_l/2}$",
                "inequality",
                "the other blocks do not move; suprema over all points",
                probe=form_probes.layers_form,
                scope="three layers, nonconvex",
            ),
            Step(
                r"one layer more: the squared step of two layers",
                "identity",
                "square",
                lhs=first / 2 * u**2 + second / 2 * v**2 + sympy.sqrt(first * second) * u * v,
                rhs=split**2,
            ),
            Step(
                r"the sum over layers is at least the matrix form of a block-diagonal P",
                "inequality",
                r"$\sqrt{a^2+b^2} \le a+b$",
                lhs=sympy.sqrt(first / 2 * u**2 + second / 2 * v**2),
                rhs=split,
            ),
            Step(
                r"first derivatives only: $(\sqrt\phi)' = \phi'/(2\sqrt\phi) \le \sqrt{\Lambda/2}$",
                "inequality",
                r"$\Lambda = \sup\phi_+'^2/(2\phi)$; integrate",
                probe=form_probes.first_derivatives,
                scope="grids of 2001 points, with the slack of a grid",
            ),
            Step(
                r"each is the risk after a move with $LV$ in place of the energy",
                "identity",
                "square",
                lhs=R + sympy.sqrt(2 * R * L * V) + L * V / 2,
                rhs=(sympy.sqrt(R) + sympy.sqrt(L * V / 2)) ** 2,
            ),
        ),
        claims=(lemma_formula,),
    )


def heads() -> Derivation:
    """Trained private heads: the 2x2 recursion, its powers, and the two stabilities."""
    import sympy

    eta, q = symbol("eta"), symbol("q")
    e, k = sympy.symbols("e k", positive=True)
    own = ((q + e) ** k + (q - e) ** k) / 2
    other = ((q + e) ** k - (q - e) ** k) / 2
    tau, n, gamma = symbol("tau"), symbol("n"), symbol("Gamma")
    above = {q: (0.6, 1.5), e: (0.01, 0.5), k: (1, 12)}
    return Derivation(
        name="heads",
        theorem="Trained heads, 2x2 recursion",
        claim=r"$(\delta_s,\delta_p)^+ \le \begin{pmatrix} q & \eta L_{sp} \\ \eta L_{sp} & q\end{pmatrix}"
        r"(\delta_s,\delta_p) + \tfrac{\eta}{b}I_k(u_s,u_p)$, block by block as Theorem 2",
        steps=(
            Step(
                r"one common step moves the shared block by at most $q\|d_s\| + \eta\|H_{sp}\|\|d_p\|$",
                "inequality",
                "diagonal blocks inherit the bounds of the eigenvalues (Cauchy interlacing)",
                probe=form_probes.head_step,
                scope="random symmetric Hessians, two blocks of two",
            ),
            Step(
                r"$L_{sp} \le (L-m)/2$",
                "inequality",
                r"$H - \tfrac{L+m}2I$ has norm at most $(L-m)/2$, and so have its blocks",
                probe=form_probes.cross_block,
                scope="random symmetric Hessians",
            ),
            Step(
                r"products of matrices $\begin{pmatrix} q & e \\ e & q\end{pmatrix}$ keep that form; constant rate: "
                r"induction for the diagonal entry",
                "identity",
                "sums and differences of the blocks decouple",
                lhs=q * own + e * other,
                rhs=own.subs(k, k + 1),
                ranges=above,
                integers=frozenset({k}),
            ),
            Step(
                r"and for the other entry",
                "identity",
                "induction",
                lhs=q * other + e * own,
                rhs=other.subs(k, k + 1),
                ranges=above,
                integers=frozenset({k}),
            ),
            Step(
                r"no coupling: the clock of the whole",
                "identity",
                r"$L_{sp} = 0$",
                lhs=eta * own.subs(e, 0),
                rhs=eta * q**k,
                ranges=above,
            ),
            Step(
                r"twins: $\|\delta_s\| \le \sum_k \tfrac{I_k}{b_k}(r^{ss}_ku_s + r^{sp}_ku_p)$: one response, the sum "
                r"weighted by the two gaps; its second moment",
                "identity",
                "multiplicities as in Theorem 2, every sampling",
                probe=probes.moments_reshuffle,
                scope="all permutations enumerated, n up to 4",
            ),
            Step(
                r"stability of one block, $\tau$ and $\Gamma$ of its weighted response",
                "identity",
                "Theorem 2 with gap one",
                lhs=sympy.sqrt(1 * ((tau / n) ** 2 + gamma)),
                rhs=sympy.sqrt((tau / n) ** 2 + gamma),
            ),
        ),
    )


def stability_forms() -> Derivation:
    """Sharper stability: the recursion, gaps from the loss, reshuffling, samples that tasks share."""
    import sympy

    D, eta, n, b = symbol("D_2"), symbol("eta"), symbol("n"), symbol("b")
    a, c, s = sympy.symbols("a c s", positive=True)
    many, few = sympy.symbols("n_l n_i", positive=True)
    return Derivation(
        name="sharper stability",
        theorem="Theorem 2, sharper forms",
        claim=r"$e_+^2 = (qe + \eta D/n)^2 + \eta^2D^2\mathrm{Var}(I)/b^2$; $D = 2\sqrt{2LF}$; shared samples add up",
        steps=(
            Step(
                r"one step: the multiplicity of a batch is independent of the twins before it",
                "inequality",
                "mean and variance of the multiplicity; Cauchy--Schwarz over the exchanged sample",
                probe=form_probes.recursion_step,
                scope="batches of distinct samples, summed out",
            ),
            Step(
                r"never above the rms form: if $e \le a + s$ then $e_+ \le (a + \eta D/n) + \sqrt{s^2 + \eta^2D^2c}$, "
                r"here for $q = 1$",
                "inequality",
                "Minkowski in the plane",
                lhs=sympy.sqrt((a + s + eta * D / n) ** 2 + eta**2 * D**2 * c),
                rhs=a + eta * D / n + sympy.sqrt(s**2 + eta**2 * D**2 * c),
            ),
            Step(
                r"gap from the loss: $\|\nabla f(z)-\nabla f(z')\| \le \sqrt{2L}(\sqrt{f(z)}+\sqrt{f(z')})$",
                "inequality",
                "self-bounding gradients and Minkowski; the two losses have equal means",
                probe=form_probes.loss_gap,
                scope="finite spaces, summed out",
            ),
            Step(
                r"the step of the exchanged sample is not common: this gap needs $m \le 0$ or $\kappa \ge 0$ (any "
                r"sampling), so that dropping the contraction costs nothing; with a fresh sample's loss, "
                r"$D_k = \sqrt{2L\,\mathbb EF_S(x_k)} + \sqrt{2L\,\mathbb EF(x_k)}$ has both gradients at one twin and "
                r"needs neither (independent batches)",
                "assumption",
                "section 5, from the loss",
            ),
            Step(
                r"reshuffling, rms: within an epoch the sample is drawn once, epochs add up: one epoch's mean square",
                "identity",
                r"$P(I_k = 1) = b_k/n$, disjoint events",
                lhs=(b / n) * (a * D / b) ** 2,
                rhs=a**2 * D**2 / (n * b),
            ),
            Step(
                r"samples that tasks share, all copies at once, equal n: $\bar E \le (\sum_lc_l\varepsilon_l)^2$",
                "inequality",
                "Minkowski over the exchanged sample",
                probe=form_probes.shared_sum,
                scope="random displacements",
            ),
            Step(
                r"unequal n, task i's samples are among task l's: mean over task i's samples of expert l's squares",
                "inequality",
                r"a mean over $n_i$ of $n_l$ squares is at most $n_l/n_i$ times their mean",
                lhs=(few * a) / few,
                rhs=many / few * ((few * a + (many - few) * c) / many),
                where=(sympy.Ge(many, few),),
            ),
        ),
    )


def distance_risk() -> Derivation:
    """Training risk through the distance to a minimiser, any step size."""
    keys = ("F_star", "L", "r0", "q", "K", "nu", "sigma", "b", "eta", "mu", "F0")
    star, L, r, q, K, nu, sigma, b, eta, mu, start = (symbol(key) for key in keys)
    bound = distance_risk_formula().expression
    kappa = symbol("kappa")
    noise = nu_formula().expression * sigma**2 / b
    square = r**2 * (1 + eta * kappa) ** (2 * K) + noise
    return Derivation(
        name="distance risk",
        theorem="Training risk through the distance to a minimiser",
        claim=r"$\mathbb EF(x_K)-F^\star \le \tfrac L2(r^2q^{2K} + \nu\sigma^2/b)$, any step size",
        steps=(
            Step(
                r"one step: $\mathbb E\|x_+-x^\star\|^2 \le q^2\mathbb E\|x-x^\star\|^2 + \eta^2\sigma^2/b$",
                "inequality",
                "the full gradient vanishes at the minimiser; unbiased batches",
                probe=form_probes.minimiser_step,
                scope="random quadratics with two-point noise",
            ),
            Step(
                r"the closed form solves the recursion",
                "identity",
                r"induction; $\nu$ is the noise time of the clock",
                lhs=square.subs(K, K + 1),
                rhs=(1 + eta * kappa) ** 2 * square + eta**2 * sigma**2 / b,
            ),
            Step(r"and starts at $r^2$", "identity", "K = 0", lhs=square.subs(K, 0), rhs=r**2),
            Step(
                r"smoothness at the minimiser: $F(x)-F^\star \le \tfrac L2\|x-x^\star\|^2$",
                "inequality",
                "descent lemma where the gradient is zero",
                probe=form_probes.above_minimum,
                scope="random smooth nonconvex functions",
            ),
            Step(
                r"strongly convex: $r^2 \le 2(F_0-F^\star)/\mu$",
                "inequality",
                "quadratic growth",
                probe=form_probes.strongly_convex_distance,
                scope="random quadratics",
            ),
            Step(
                r"insert",
                "identity",
                r"from the risk at the base",
                lhs=mu / 2 * (2 * (start - star) / mu),
                rhs=start - star,
            ),
            Step(
                r"the bound",
                "identity",
                "multiply",
                lhs=star + L * r**2 * q ** (2 * K) / 2 + L * nu * sigma**2 / (2 * b),
                rhs=bound,
            ),
        ),
        claims=(distance_risk_formula,),
    )


def descent_risk() -> Derivation:
    """Training risk of any smooth loss: training does not raise it by more than its noise."""
    import sympy

    start, L, sigma, N2, b, eta, K = (symbol(key) for key in ("F0", "L", "sigma", "N2", "b", "eta", "K"))
    grad = sympy.Symbol("G_k", positive=True)
    return Derivation(
        name="descent risk",
        theorem="Training risk by descent",
        claim=r"$\mathbb EF(x_K) \le F_0 + \tfrac{L\sigma^2N_2}{2b}$ for $\eta_k \le 2/L$",
        steps=(
            Step(
                r"$\mathbb EF_+ \le F - \eta(1-\tfrac{L\eta}2)\|\nabla F\|^2 + \tfrac{L\eta^2\sigma^2}{2b}$",
                "inequality",
                "descent lemma, unbiased noise",
                probe=form_probes.noisy_descent,
                scope="random smooth nonconvex functions with two-point noise",
            ),
            Step(
                r"$\eta \le 2/L$: the gradient term helps",
                "inequality",
                r"$1-L\eta/2 \ge 0$",
                lhs=-eta * (1 - L * eta / 2) * grad**2,
                rhs=sympy.Integer(0),
                where=(sympy.Le(L * eta, 2),),
            ),
            Step(
                r"sum over steps",
                "identity",
                r"$N_2 = \sum\eta_k^2$, here $K\eta^2$",
                lhs=start + K * L * eta**2 * sigma**2 / (2 * b),
                rhs=descent_risk_formula().expression.subs(N2, K * eta**2),
            ),
            Step(
                r"the bound",
                "identity",
                "any schedule",
                lhs=start + L * N2 * sigma**2 / (2 * b),
                rhs=descent_risk_formula().expression,
            ),
        ),
        claims=(descent_risk_formula,),
    )


def aggregation() -> Derivation:
    """The sharpest aggregation, task by task, with the nearer anchor."""
    import sympy

    p, a, b_, c, d = sympy.symbols("p a_1 b_1 a_2 b_2", positive=True)
    left = sympy.sqrt(p * (a + b_) ** 2 + (1 - p) * (c + d) ** 2)
    right = sympy.sqrt(p * a**2 + (1 - p) * c**2) + sympy.sqrt(p * b_**2 + (1 - p) * d**2)
    return Derivation(
        name="aggregation",
        theorem="Sharpest aggregation",
        claim=r"$\sqrt{F_S(M)} \le \sqrt{\sum_jp_j\min_{a\in\{x_j,x_0\}}(\sqrt{F_j(a)}+\sqrt{\tfrac{L_j}2"
        r"\mathbb E\|M-a\|^2})^2}$",
        steps=(
            Step(
                r"Lemma 1 from either anchor, task by task",
                "inequality",
                "Theorem 4 needs nothing of its anchor (the base with the final heads)",
                probe=probes.lipschitz_root,
                scope="random smooth nonconvex functions",
            ),
            Step(
                r"never above the two sums of squares, here for two tasks",
                "inequality",
                "Minkowski",
                lhs=left,
                rhs=right,
                ranges={p: (0.01, 0.99)},
            ),
            Step(
                r"the minimum over anchors only lowers it",
                "inequality",
                "the shipped aggregation",
                probe=form_probes.sharper_aggregation,
                scope="three tasks",
            ),
        ),
    )
