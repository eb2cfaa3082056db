"""Derivations about training: clocks, Theorem 2 (stability), Theorem 3 (drift), PL training risk."""

from __future__ import annotations

from theory.clocks import nu_formula, tau_formula
from theory.derivations import probes
from theory.derivations.core import Derivation, Step
from theory.drift import drift_base_formula, drift_energy_formula, drift_noise_formula
from theory.stability import (
    epsilon_rms_formula,
    epsilon_sup_formula,
    gamma_with_replacement_formula,
    gamma_without_replacement_formula,
)
from theory.symbols import symbol
from theory.training import convex_risk_formula, pl_risk_formula


def clock_sgd() -> Derivation:
    """Training time and noise time of SGD at a constant learning rate, by induction, with their limits."""
    import sympy

    eta, kappa, K = symbol("eta"), symbol("kappa"), symbol("K")
    q = 1 + eta * kappa
    tau, nu = tau_formula().expression, nu_formula().expression
    curve, omega, low = sympy.Symbol("h", real=True), symbol("omega"), symbol("m")
    L = symbol("L")
    inside = (sympy.Ge(curve, low), sympy.Le(curve, L), sympy.Ge(low, -L))
    return Derivation(
        name="clock",
        theorem="Training clock of SGD",
        claim=r"$\tau = ((1+\eta\kappa)^K-1)/\kappa$ and $\nu = \eta((1+\eta\kappa)^{2K}-1)/(\kappa(2+\eta\kappa))$",
        steps=(
            Step(
                r"one step on a common batch: every Hessian in $[m, L]$ gives $\|x^+-y^+\| \le q\|x-y\|$",
                "inequality",
                "convex function of the eigenvalue, largest at an end of the interval",
                lhs=sympy.Abs(1 - eta * (curve + omega)),
                rhs=sympy.Max(1 - eta * (low + omega), eta * (L + omega) - 1),
                where=inside,
                ranges={low: (-1.0, 1.0), curve: (-1.0, 1.0), L: (0.01, 1.0), omega: (0.0, 1.0)},
            ),
            Step(r"$w_k = \eta_k\prod_{l>k}q_l$, $\tau = \sum_k w_k$, $\nu = \sum_k w_k^2$", "definition", "section 4"),
            Step(
                r"one more step: old responses are multiplied by $q$, a new one of $\eta$ is added",
                "identity",
                "induction",
                lhs=tau.subs(K, K + 1),
                rhs=q * tau + eta,
            ),
            Step(r"first step", "identity", "start of the induction", lhs=tau.subs(K, 1), rhs=eta),
            Step(r"the same for the squares", "identity", "induction", lhs=nu.subs(K, K + 1), rhs=q**2 * nu + eta**2),
            Step(r"first step", "identity", "start of the induction", lhs=nu.subs(K, 1), rhs=eta**2),
            Step(
                r"training time",
                "identity",
                "closed form of the sum",
                lhs=eta * (q**K - 1) / (q - 1),
                rhs=tau,
            ),
            Step(
                r"noise time",
                "identity",
                "sum of a geometric series of ratio $q^2$",
                lhs=eta**2 * (q ** (2 * K) - 1) / (q**2 - 1),
                rhs=nu,
            ),
            Step(r"$\kappa \to 0$", "identity", "limit", lhs=sympy.Limit(tau, kappa, 0), rhs=eta * K),
            Step(r"$\kappa \to 0$", "identity", "limit", lhs=sympy.Limit(nu, kappa, 0), rhs=eta**2 * K),
            Step(
                r"$\nu \le \tau^2 \le K\nu$: noise time and training time bracket each other",
                "inequality",
                "nonnegative responses; Cauchy--Schwarz",
                lhs=sympy.Max(nu / tau**2, tau**2 / (K * nu)),
                rhs=sympy.Integer(1),
                where=(sympy.Gt(eta * kappa, -0.9),),
            ),
        ),
        claims=(tau_formula, nu_formula),
    )


def clock_momentum() -> Derivation:
    """Heavy ball: the matrix recursion, and the certified convex response by a Lyapunov function."""
    import sympy

    beta, eta, L = symbol("beta"), symbol("eta"), symbol("L")
    x, v, g = sympy.symbols("x v g", real=True)
    gamma = eta / (1 - beta)
    dv, dg, dx, c = sympy.symbols("v_d g_d x_d c", real=True)
    dz = dx - gamma * beta * dv
    before = dz**2 + gamma**2 * beta * dv**2
    after = (dz - gamma * dg) ** 2 + gamma**2 * beta * (beta * dv + dg) ** 2
    a, b_, d_ = (
        gamma**2 * beta * (1 - beta**2),
        -2 * gamma**2 * beta * (1 + beta),
        2 * gamma / L - gamma**2 * (1 + beta),
    )
    stable = sympy.Le(eta * (1 + beta) * L, 2 * (1 - beta) ** 2)
    return Derivation(
        name="momentum",
        theorem="Training clock of heavy ball",
        claim=r"convex per sample and $\eta \le 2(1-\beta)^2/((1+\beta)L)$: $w_k = \eta(1+\beta)/(1-\beta)$",
        steps=(
            Step(r"$v^+ = \beta v + g$, $x^+ = x - \eta v^+$; $z = x - \gamma\beta v$", "definition", "heavy ball"),
            Step(
                r"$z^+ = z - \gamma g$ with $\gamma = \eta/(1-\beta)$",
                "identity",
                "insert",
                lhs=(x - eta * (beta * v + g)) - gamma * beta * (beta * v + g),
                rhs=(x - gamma * beta * v) - gamma * g,
            ),
            Step(
                r"one batch, convex, $L$-smooth: $\langle \delta x, \delta g\rangle \ge \|\delta g\|^2/L$",
                "assumption",
                "cocoercivity (Baillon--Haddad)",
            ),
            Step(
                r"the fall of $\|\delta z\|^2 + \gamma^2\beta\|\delta v\|^2$ in one step",
                "identity",
                "expand",
                lhs=before - after,
                rhs=a * dv**2 + b_ * dv * dg + d_ * dg**2 + 2 * gamma * (dx * dg - dg**2 / L),
                ranges={item: (-2.0, 2.0) for item in (dv, dg, dx)},
            ),
            Step(
                r"its quadratic part is nonnegative: the discriminant",
                "inequality",
                r"equivalent to $\eta(1+\beta)L \le 2(1-\beta)^2$",
                lhs=b_**2 / 4,
                rhs=a * d_,
                where=(stable,),
                ranges={eta: (1e-3, 1.0), L: (1e-3, 10.0), beta: (0.01, 0.95)},
            ),
            Step(
                r"a kick $u$ sets the function to $\gamma^2(1+\beta)u^2$",
                "identity",
                r"$\delta z = -\gamma u$, $\delta v = u$",
                lhs=before.subs({dx: -eta, dv: 1}),
                rhs=gamma**2 * (1 + beta),
            ),
            Step(
                r"distance from the function: $\|\delta x\| \le \sqrt{1+\beta}\,\sqrt{\text{function}}$",
                "inequality",
                "Cauchy--Schwarz",
                lhs=sympy.Abs(c + gamma * beta * dv),
                rhs=sympy.sqrt(1 + beta) * sympy.sqrt(c**2 + gamma**2 * beta * dv**2),
                ranges={c: (-2.0, 2.0), dv: (-2.0, 2.0)},
            ),
            Step(
                r"the response",
                "identity",
                "multiply",
                lhs=sympy.sqrt(1 + beta) * sympy.sqrt(gamma**2 * (1 + beta)),
                rhs=eta * (1 + beta) / (1 - beta),
            ),
            Step(
                r"twins of random convex quadratics after one kick stay below it",
                "inequality",
                "the whole chain",
                probe=probes.momentum_distance,
                scope="30 steps with a new Hessian in each",
            ),
        ),
    )


def stability() -> Derivation:
    """Theorem 2: stability of one expert, all samplings, with cap and floor."""
    import sympy

    tau, n, gamma, nu, b = (symbol(key) for key in ("tau", "n", "Gamma", "nu", "b"))
    D, D2 = symbol("D_inf"), symbol("D_2")
    ordered = {b: (1, 20), n: (20, 60)}
    return Derivation(
        name="theorem 2",
        theorem="Theorem 2",
        claim=r"$\varepsilon^2 \le D_\infty^2[(\tau/n)^2+\Gamma]$ and $\varepsilon \le D_2[\tau/n+\sqrt\Gamma]$",
        steps=(
            Step(
                r"twins: $\|x-x'\| \le \sum_k \frac{w_k}{b_k} I_k u_k$, $I_k$ counts sample $j$ in batch $k$",
                "definition",
                "unroll the recursion of the clock",
            ),
            Step(
                r"without replacement: $\nu\,\mathrm{Var}(I)/b^2$ for the indicator of probability $b/n$",
                "identity",
                "Bernoulli variance",
                lhs=nu * (b / n) * (1 - b / n) / b**2,
                rhs=nu * (1 / (b * n) - 1 / n**2),
                ranges=ordered,
            ),
            Step(
                r"with replacement: binomial multiplicity",
                "identity",
                "binomial variance",
                lhs=nu * b * (1 / n) * (1 - 1 / n) / b**2,
                rhs=nu * (1 - 1 / n) / (b * n),
                ranges=ordered,
            ),
            Step(
                r"second moment, distinct samples, batch sizes that vary",
                "identity",
                "independent batches",
                probe=probes.moments_without_replacement,
                scope="all subsets enumerated, n up to 4",
            ),
            Step(
                r"second moment, independent draws",
                "identity",
                "independent batches",
                probe=probes.moments_with_replacement,
                scope="all multiplicities enumerated, n up to 4",
            ),
            Step(
                r"second moment, reshuffling: $\frac1n\sum w_k^2/b_k - (\frac1n\sum w_k)^2$ per epoch",
                "identity",
                "the sample is in exactly one batch of a full epoch; short last batch and cut epochs included",
                probe=probes.moments_reshuffle,
                scope="all permutations enumerated, n up to 4",
            ),
            Step(
                r"sup form",
                "identity",
                r"$u_k \le D_\infty$ leaves the second moment of the multiplicities",
                lhs=sympy.sqrt(D**2 * ((tau / n) ** 2 + gamma)),
                rhs=D * sympy.sqrt((tau / n) ** 2 + gamma),
            ),
            Step(
                r"rms form: mean plus martingale difference, $I_k$ independent of $u_k$",
                "inequality",
                "Minkowski; first two samplings",
                probe=probes.rms_split,
                scope="gaps that depend on past draws and on the data, summed out",
            ),
            Step(
                r"rms form",
                "identity",
                "factor out",
                lhs=D2 * tau / n + D2 * sympy.sqrt(gamma),
                rhs=D2 * (tau / n + sympy.sqrt(gamma)),
            ),
            Step(
                r"the sup form is never above the rms form with the same gap",
                "inequality",
                r"$\sqrt{a^2+b^2} \le a+b$",
                lhs=sympy.sqrt((tau / n) ** 2 + gamma),
                rhs=tau / n + sympy.sqrt(gamma),
            ),
            Step(
                r"cap: $\varepsilon^2 \le 2\,\mathbb E\|x-a\|^2$ for an anchor that does not depend on the data",
                "inequality",
                r"$\mathbb E\langle x-a, x^{(j)}-a\rangle = \mathbb E\|\mathbb E[x-a \mid S_{-j}]\|^2 \ge 0$",
                probe=probes.cap,
                scope="arbitrary algorithms on two samples of three outcomes, summed out",
            ),
            Step(
                r"floor: $\varepsilon^2 \ge \frac2n \mathrm{tr\,Var}(x)$",
                "inequality",
                "Efron--Stein",
                probe=probes.efron_stein,
                scope="arbitrary algorithms on two samples of three outcomes, summed out",
            ),
        ),
        claims=(
            epsilon_sup_formula,
            epsilon_rms_formula,
            gamma_without_replacement_formula,
            gamma_with_replacement_formula,
        ),
    )


def drift() -> Derivation:
    """Theorem 3 (a)-(d)."""
    import sympy

    g, tau, sigma, sigma0, nu, b, eta, L = (
        symbol(key) for key in ("g", "tau", "sigma", "sigma0", "nu", "b", "eta", "L")
    )
    T, N2, F0, FK, q = (symbol(key) for key in ("T", "N2", "F0", "FK", "q"))
    a, s, v, grad, fall = sympy.symbols("a s v G_k Phi", positive=True)
    factor, n = sympy.symbols("B n'", positive=True)
    return Derivation(
        name="theorem 3",
        theorem="Theorem 3",
        claim=r"$\mathbb E\|\Delta\|^2 \le d^2$ in four forms",
        steps=(
            Step(
                r"(a) one step from $r = \mathrm{rms}\|\Delta\|$, conditionally unbiased noise: "
                r"$r_+^2 \le (qr+\eta g)^2 + \eta^2\sigma^2/b$",
                "inequality",
                "noise is uncorrelated with the past; the step of the full gradient moves by at most $qr + \\eta g$",
                probe=probes.noisy_step,
                scope="random nonconvex quadratics on finite spaces, summed out",
            ),
            Step(
                r"if $r \le a + s$ then $r_+ \le (qa + \eta g) + \sqrt{q^2s^2+\eta^2\sigma^2/b}$",
                "inequality",
                "Minkowski in the plane",
                lhs=sympy.sqrt((q * (a + s) + eta * g) ** 2 + eta**2 * sigma**2 / b),
                rhs=(q * a + eta * g) + sympy.sqrt(q**2 * s**2 + eta**2 * sigma**2 / b),
            ),
            Step(
                r"the two parts follow the recursions of $\tau$ and $\nu$",
                "identity",
                r"$a = g\tau$, $s^2 = \nu\sigma^2/b$",
                lhs=q**2 * (nu * sigma**2 / b) + eta**2 * sigma**2 / b,
                rhs=(q**2 * nu + eta**2) * sigma**2 / b,
            ),
            Step(
                r"(a)",
                "identity",
                "add",
                lhs=g * tau + sympy.sqrt(nu * sigma**2 / b),
                rhs=g * tau + sigma * sympy.sqrt(nu / b),
            ),
            Step(
                r"noise of a batch of distinct samples: $\mathrm{Var}$ falls by $(n-b)/(n-1)$",
                "identity",
                "each sample is in the batch with probability b/n, two with b(b-1)/(n(n-1)); deviations sum to zero",
                lhs=(1 / factor**2) * (factor / n - factor * (factor - 1) / (n * (n - 1))) * n * sigma**2,
                rhs=sigma**2 / factor * (n - factor) / (n - 1),
                ranges={factor: (1.0, 10.0), n: (11.0, 60.0)},
            ),
            Step(
                r"(b) every step pushes by at most $\sqrt{g^2+\sigma_0^2/b}$ in root mean square",
                "inequality",
                "batch gradient at the base: mean g, variance at the base; Minkowski over steps, any sampling",
                probe=probes.minkowski,
                scope="random finite spaces, summed out",
            ),
            Step(
                r"(b)",
                "identity",
                "constant batch size",
                lhs=sympy.sqrt(tau**2 * (g**2 + sigma0**2 / b)),
                rhs=tau * sympy.sqrt(g**2 + sigma0**2 / b),
            ),
            Step(
                r"(c) descent lemma with unbiased noise: $\mathbb E F_+ \le F - \eta(1-\tfrac{L\eta}2)\|\nabla F\|^2 + "
                r"\tfrac{L\eta^2\sigma^2}{2b}$; $\eta \le 1/L$ leaves $\tfrac\eta2\|\nabla F\|^2$",
                "inequality",
                r"$1-L\eta/2 \ge 1/2$",
                lhs=eta * grad**2 / 2,
                rhs=eta * (1 - L * eta / 2) * grad**2,
                where=(sympy.Le(L * eta, 1),),
            ),
            Step(
                r"sum over steps: $\sum\eta_k\mathbb E\|\nabla F\|^2 \le 2(F_0-F_K+\tfrac{L\sigma^2N_2}{2b})$; "
                r"Cauchy--Schwarz over steps with weights $\eta_k$: drift of the full gradients",
                "inequality",
                r"$(\sum\eta_ka_k)^2 \le T\sum\eta_ka_k^2$, here for two steps",
                lhs=(eta * a + v * s) ** 2,
                rhs=(eta + v) * (eta * a**2 + v * s**2),
            ),
            Step(
                r"(c)",
                "identity",
                "noise adds a martingale of variance $\\sigma^2N_2/b$",
                lhs=sympy.sqrt(T * 2 * (F0 - FK + L * sigma**2 * N2 / (2 * b))) + sigma * sympy.sqrt(N2 / b),
                rhs=drift_energy_formula().expression,
                where=(sympy.Ge(F0, FK),),
            ),
            Step(
                r"(d) $\Delta_K = -\sum_k\hat w_kg_k$ exactly, $\hat w_k = \sum_{l\ge k}\eta_l\beta^{l-k}$",
                "identity",
                "linear recursion",
                probe=probes.heavy_ball_unrolled,
                scope="six steps, any schedule and momentum",
            ),
            Step(
                r"(d) from losses: $\|g_B\|^2 \le 2LF_B$ and Cauchy--Schwarz",
                "inequality",
                "Lemma 1's first half, for the batch loss",
                probe=probes.self_bounding,
                scope="random smooth nonconvex functions",
            ),
            Step(
                r"(d) Cauchy--Schwarz with weights $\hat w_k$, here for two steps",
                "inequality",
                "weights are nonnegative",
                lhs=a * grad + s * fall,
                rhs=sympy.sqrt((a + s) * (a * grad**2 + s * fall**2)),
            ),
        ),
        claims=(drift_noise_formula, drift_base_formula, drift_energy_formula),
    )


def training_risk() -> Derivation:
    """The PL bound on the training risk of an expert."""
    import sympy

    keys = ("F_star", "F0", "mu", "eta", "K", "L", "sigma", "b")
    star, start, mu, eta, K, L, sigma, b = (symbol(key) for key in keys)
    bound = pl_risk_formula().expression
    grad = sympy.Symbol("G_k", positive=True)
    gap = sympy.Symbol("Phi", positive=True)
    return Derivation(
        name="training risk",
        theorem="Training risk under a PL condition",
        claim=r"$\mathbb E F(x_K) - F^\star \le (F_0-F^\star)(1-\mu\eta)^K + "
        r"\tfrac{L\sigma^2\eta}{2b\mu}(1-(1-\mu\eta)^K)$",
        steps=(
            Step(r"$\tfrac12\|\nabla F\|^2 \ge \mu(F-F^\star)$, $\eta \le 1/L$, unbiased batches", "assumption", "PL"),
            Step(
                r"one step of the descent lemma contracts the gap",
                "inequality",
                "insert the PL condition",
                lhs=gap - eta * (1 - L * eta / 2) * grad**2 + L * eta**2 * sigma**2 / (2 * b),
                rhs=(1 - mu * eta) * gap + L * eta**2 * sigma**2 / (2 * b),
                where=(sympy.Le(L * eta, 1), sympy.Ge(grad**2, 2 * mu * gap)),
            ),
            Step(
                r"the closed form solves the recursion",
                "identity",
                "induction",
                lhs=bound.subs(K, K + 1) - star,
                rhs=(1 - mu * eta) * (bound - star) + L * eta**2 * sigma**2 / (2 * b),
            ),
            Step(r"and starts at the initial gap", "identity", "K = 0", lhs=bound.subs(K, 0), rhs=start),
            Step(
                r"long training: the noise floor",
                "identity",
                r"$(1-\mu\eta)^K \to 0$",
                lhs=bound.subs((1 - mu * eta) ** K, 0),
                rhs=star + L * sigma**2 * eta / (2 * b * mu),
            ),
            Step(
                r"the bound: initial gap and a geometric series of noise",
                "identity",
                "unroll",
                lhs=star
                + (start - star) * (1 - mu * eta) ** K
                + L * eta**2 * sigma**2 / (2 * b) * (1 - (1 - mu * eta) ** K) / (mu * eta),
                rhs=bound,
            ),
        ),
        claims=(pl_risk_formula,),
    )


def convex_risk() -> Derivation:
    """Training risk of a convex expert, last iterate, constant learning rate."""
    keys = ("F_star", "r0", "eta", "K", "L", "sigma", "b", "H_K")
    star, distance, eta, K, L, sigma, b, harmonic = (symbol(key) for key in keys)
    unit = eta**2 * (1 + L * eta) * sigma**2 / (2 * b)
    return Derivation(
        name="convex risk",
        theorem="Training risk of a convex expert",
        claim=r"$\mathbb E F(x_K) - F^\star \le \frac{r^2}{2\eta K} + \frac{\eta(1+L\eta)\sigma^2}{2b}H_K$",
        steps=(
            Step(
                r"for every fixed $z$: $\mathbb E\|x_+-z\|^2 \le \|x-z\|^2 - 2\eta(\mathbb E F(x_+)-F(z)) + "
                r"\eta^2(1+L\eta)\sigma^2/b$, $\eta \le 1/L$",
                "inequality",
                "convexity at x, descent lemma from x to the next point, unbiased noise",
                probe=probes.convex_step,
                scope="sums of softplus functions with two-point noise",
            ),
            Step(
                r"with $z = x_k$, the mean of the risks after step $k$ is at most $F(x_k) + C_k/A_k$; adding $F(x_k)$ "
                r"to the mean of the later risks raises it by at most $\eta_kC_{k+1}/(A_kA_{k+1})$",
                "cited",
                "Shamir and Zhang 2013, here with weights",
            ),
            Step(
                r"constant learning rate: the ladder is harmonic, $\sum_{k=0}^{K-2} 1/(K-k) = H_K - 1$",
                "identity",
                "reverse the order of summation",
                probe=probes.harmonic_ladder,
                scope="K up to 40",
            ),
            Step(
                r"start, first noise and ladder",
                "identity",
                "add",
                lhs=star + distance**2 / (2 * eta * K) + K * unit / (K * eta) + unit / eta * (harmonic - 1),
                rhs=convex_risk_formula().expression,
            ),
        ),
        claims=(convex_risk_formula,),
    )
