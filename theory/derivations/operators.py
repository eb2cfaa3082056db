"""Derivations about merging operators: sensitivities, what adds to V, counterexamples where nothing is guaranteed."""

from __future__ import annotations

from theory.derivations import operator_probes as probes
from theory.derivations.core import Derivation, Step
from theory.operators.masks import mask_noise_formula, plain_mask_noise_formula, trim_change_formula
from theory.operators.matrices import iso_gain_formula
from theory.operators.span import model_stock_ratio_formula, model_stock_slope_formula, slerp_weight_formula
from theory.symbols import symbol


def linear_operators() -> Derivation:
    """Sensitivity of linear merges: fixed coefficients, per layer, frozen Fisher and Gram matrices."""
    import sympy

    alpha, p = symbol("alpha"), symbol("p")
    fisher, rest = sympy.symbols("F_i F_r", positive=True)
    x, y, base = sympy.symbols("x_i x_i' x_0", real=True)
    share = p * fisher / (p * fisher + rest)
    entry = sympy.Symbol("x_i", real=True)
    return Derivation(
        name="linear operators",
        theorem="Sensitivity of linear merges",
        claim=r"$c_i = |\alpha_i|$; per layer the largest; Fisher: the largest share; RegMean: $\|(\sum G)^{-1}G_i\|$",
        steps=(
            Step(r"coefficients do not depend on the samples; twins differ in one expert", "assumption", "A2"),
            Step(
                r"only expert i moves",
                "identity",
                "the base and the other experts cancel",
                lhs=(base + alpha * (x - base)) - (base + alpha * (y - base)),
                rhs=alpha * (x - y),
            ),
            Step(
                r"$\|M - M'\| = |\alpha_i|\,\|x_i - x_i'\|$: exact for every pair of experts",
                "identity",
                "norms",
                probe=probes.linear_merge,
                scope="random experts",
            ),
            Step(
                r"a coefficient per layer: the largest $|\alpha_{il}|$, attained by a change in that layer alone",
                "inequality",
                "blocks are orthogonal",
                probe=probes.layers_merge,
                scope="random layers",
            ),
            Step(
                r"Fisher with frozen information: coordinate by coordinate linear, with the share as derivative",
                "identity",
                "the information does not move",
                lhs=sympy.diff((p * fisher * entry + rest * base) / (p * fisher + rest), entry),
                rhs=share,
            ),
            Step(
                r"shares are at most one and sum to one: $c_i$ is the largest share",
                "inequality",
                "nonnegative information",
                probe=probes.fisher_partition,
                scope="random Fisher diagonals",
            ),
            Step(
                r"RegMean with frozen Gram matrices: $W = \sum W_iA_i$, $A_i = G_i(\sum G)^{-1}$, one row at a time",
                "inequality",
                "operator norm",
                probe=probes.regmean_row,
                scope="random Gram matrices",
            ),
            Step(
                r"no general bound of one: Gram matrices that do not commute give $\|A_i\| > 1$",
                "inequality",
                "an inverse and a matrix that do not commute",
                probe=probes.regmean_above_one,
                scope="inputs of one expert along a skew direction",
            ),
        ),
    )


def ties() -> Derivation:
    """TIES: what holds at fixed support and signs, and why nothing holds globally."""
    import sympy

    lam, C = sympy.symbols("lambda C", positive=True)
    w, others, entry, rest = sympy.symbols("w_i W_o Delta_i S_o", positive=True)
    s = lam / C
    return Derivation(
        name="ties",
        theorem="TIES has no sensitivity",
        claim=r"at fixed support and signs $c_i = \lambda\max_k w_i/\sum_{agree} w \le \lambda$; globally no constant "
        r"exists: for every $C$ some twins have $\|M - M'\| > C\|x - x'\|$",
        steps=(
            Step(r"trim, elect the sign of the sum, average those that agree", "definition", "Yadav et al. 2023"),
            Step(
                r"where support and signs do not change: derivative of the disjoint mean",
                "identity",
                "the set of experts that are averaged is fixed",
                lhs=sympy.diff(lam * (w * entry + rest) / (w + others), entry),
                rhs=lam * w / (w + others),
            ),
            Step(
                r"at most $\lambda$, and $\lambda$ where the expert is heard alone: not $\lambda/N$",
                "inequality",
                "nonnegative weights",
                lhs=lam * w / (w + others),
                rhs=lam,
            ),
            Step(
                r"the Jacobian is diagonal: its norm is the largest entry",
                "identity",
                "coordinates do not mix",
                probe=probes.elected_fixed,
                scope="random task vectors, difference quotients of a piecewise linear map",
            ),
            Step(
                r"counterexample: $\Delta_1 = 1 \pm s$ against $\Delta_2 = -1$: the vote flips, the merge goes from "
                r"$\lambda(1+s)$ to $-\lambda$",
                "identity",
                "one expert is heard on each side",
                lhs=lam * (1 + s) - (-lam),
                rhs=lam * (2 + s),
            ),
            Step(
                r"at $s = \lambda/C$ the experts are $2s$ apart and the merges more than $C$ times as far",
                "inequality",
                r"$\lambda(2+s) - 2Cs = \lambda s$",
                lhs=C * 2 * s,
                rhs=lam * (2 + s),
            ),
            Step(
                r"the ratio is unbounded",
                "identity",
                r"limit $s \to 0$",
                lhs=sympy.Limit(1 / (lam * (2 + w) / (2 * w)), w, 0),
                rhs=sympy.Integer(0),
            ),
            Step(
                r"by the definition itself: no constant up to $e^{20}$ holds",
                "inequality",
                "run on both twins",
                probe=probes.ties_jump,
                scope="candidates C up to 5e8",
            ),
        ),
    )


def masks() -> Derivation:
    """Fixed masks, trimming, random drops with a probability per entry (Breadcrumbs, DELLA, dropping), L1 rescaling."""
    import sympy

    alpha, drop, p, lam, d = (symbol(key) for key in ("alpha", "drop", "p", "lambda_", "d"))
    other = sympy.Symbol("varrho'", positive=True)
    keep, rates = 1 - drop, {drop: (0.01, 0.95), other: (0.01, 0.95)}
    own = p * (1 - lam) ** 2 * d**2
    cross = (1 - p) * lam**2 * d**2
    return Derivation(
        name="masks",
        theorem="Masks, trimming and dropping",
        claim=r"a fixed mask is a contraction; trimming mass $d^2$ of task i changes $V$ by "
        r"$(2p_i\lambda-\lambda^2)d^2$; masks that follow the data are discontinuous",
        steps=(
            Step(
                r"a mask that does not depend on the samples: $\|m\circ(x-y)\| \le \|x-y\|$",
                "inequality",
                "entries are zero or one",
                probe=probes.fixed_mask,
                scope="random masks",
            ),
            Step(
                r"task arithmetic, disjoint supports: mass $d^2$ of task i costs itself and the others",
                "definition",
                r"$M-x_i = (\lambda-1)\Delta_i$ there, $M-x_j = \lambda\Delta_i$ for the others",
            ),
            Step(
                r"what trimming that mass does to $V$",
                "identity",
                r"after trimming $M-x_i = -\Delta_i$ there, and the others lose nothing",
                lhs=p * d**2 - (own + cross),
                rhs=trim_change_formula().expression,
            ),
            Step(
                r"lower if and only if $\lambda \ge 2p_i$",
                "inequality",
                "sign of the factor",
                lhs=trim_change_formula().expression,
                rhs=sympy.Integer(0),
                where=(sympy.Ge(lam, 2 * p),),
                ranges={p: (0.01, 1.0), lam: (0.0, 2.0)},
            ),
            Step(
                r"a drop probability per entry, survivors rescaled: variance of the multiplier",
                "identity",
                "Bernoulli",
                lhs=keep * (alpha / keep) ** 2 - alpha**2,
                rhs=mask_noise_formula().expression,
                ranges=rates,
            ),
            Step(
                r"not rescaled",
                "identity",
                "Bernoulli",
                lhs=keep * alpha**2 - (keep * alpha) ** 2,
                rhs=plain_mask_noise_formula().expression,
                ranges=rates,
            ),
            Step(
                r"summed over entries and independent experts",
                "identity",
                "variances of independent masks add up",
                probe=probes.mask_second_moment,
                scope="two experts, two entries, all masks enumerated",
            ),
            Step(
                r"$\varrho/(1-\varrho)$ is convex: at the same mean rate, unequal rates add more for equal magnitudes "
                r"(DELLA against DARE)",
                "inequality",
                "convexity",
                lhs=((drop + other) / 2) / (1 - (drop + other) / 2),
                rhs=(drop / (1 - drop) + other / (1 - other)) / 2,
                ranges=rates,
            ),
            Step(
                r"survivors rescaled to the $L_1$ norm: the Jacobian is a projection plus a matrix of rank one",
                "identity",
                r"$J = r\,\mathrm{diag}(m) + (m\Delta)g^\top$",
                probe=probes.l1_masks,
                scope="complex steps in five dimensions",
            ),
            Step(
                r"masks that follow magnitudes (Breadcrumbs, TIES' trimming, TALL masks) jump by a whole entry: no "
                r"constant up to $e^{20}$ holds",
                "inequality",
                "two entries change places",
                probe=probes.trim_jump,
                scope="candidates C up to 5e8",
            ),
        ),
        claims=(trim_change_formula,),
    )


def model_stock() -> Derivation:
    """Model Stock: the ratio as best shrinkage, its sensitivity with the ratio frozen, and why that is not all."""
    import sympy

    N, cosine, t = symbol("N"), symbol("cosine"), sympy.Symbol("t", real=True)
    signal, noise, r, theta = sympy.symbols("s^2 v r vartheta", positive=True)
    ratio = model_stock_ratio_formula().expression
    best = N * signal / (N * signal + noise)
    error = (1 - t) ** 2 * signal + t**2 * noise / N
    x, y = sympy.symbols("x_i x_i'", real=True)
    pair = 2 * sympy.cos(theta) / (1 + sympy.cos(theta))
    angles = {cosine: (0.0, 0.99)}
    return Derivation(
        name="model stock",
        theorem="Model Stock",
        claim=r"$t = N\cos\vartheta/(1+(N-1)\cos\vartheta)$; $c_i = |t|/N$ with $t$ frozen; unbounded without",
        steps=(
            Step(
                r"$\Delta_i = \mu + \xi_i$ with noise orthogonal to $\mu$ and to other noise, of one size",
                "assumption",
                r"then $\cos\vartheta = s^2/(s^2+v)$ with $s = \|\mu\|$, $v = \|\xi\|^2$",
            ),
            Step(
                r"error of $t$ times the mean: derivative",
                "identity",
                "quadratic",
                lhs=sympy.diff(error, t),
                rhs=2 * (t * (signal + noise / N) - signal),
                ranges={t: (-2.0, 2.0)},
            ),
            Step(r"it vanishes", "identity", "solve", lhs=sympy.diff(error, t).subs(t, best), rhs=sympy.Integer(0)),
            Step(
                r"no other ratio has a smaller error",
                "inequality",
                "convex",
                probe=probes.stock_shrinks,
                scope="up to eight experts",
            ),
            Step(
                r"in terms of the cosine: the ratio",
                "identity",
                r"$v = s^2(1-\cos\vartheta)/\cos\vartheta$",
                lhs=best.subs(noise, signal * (1 - cosine) / cosine),
                rhs=ratio,
                ranges={cosine: (0.01, 0.99)},
            ),
            Step(
                r"frozen ratio: $c_i = |t|/N$",
                "identity",
                "linear",
                lhs=t / N * x - t / N * y,
                rhs=t / N * (x - y),
                ranges={t: (-2.0, 2.0), x: (-2.0, 2.0), y: (-2.0, 2.0)},
            ),
            Step(
                r"the ratio reacts to the angle",
                "identity",
                "quotient rule",
                lhs=sympy.diff(ratio, cosine),
                rhs=model_stock_slope_formula().expression,
                ranges=angles,
            ),
            Step(
                r"orthogonal task vectors go to the base",
                "identity",
                r"$\cos\vartheta = 0$",
                lhs=ratio.subs(cosine, 0),
                rhs=sympy.Integer(0),
            ),
            Step(
                r"equal task vectors are given back",
                "identity",
                r"$\cos\vartheta = 1$",
                lhs=sympy.simplify(ratio.subs(cosine, 1)),
                rhs=sympy.Integer(1),
            ),
            Step(
                r"the frozen value is not the sensitivity: the full derivative is never smaller",
                "inequality",
                "directions orthogonal to all task vectors see the frozen ratio",
                probe=probes.stock_above_frozen,
                scope="three task vectors in six dimensions",
            ),
            Step(
                r"counterexample: turn $\Delta_1$ of length $r$ by an angle, orthogonal to $\Delta_2$ of length one: "
                r"$dt/d\vartheta = -2$",
                "identity",
                "two experts, right angle",
                lhs=sympy.diff(pair, theta).subs(theta, sympy.pi / 2),
                rhs=sympy.Integer(-2),
            ),
            Step(
                r"the merge moves by $\|\Delta_1+\Delta_2\|\,d\vartheta$ and the expert by $r\,d\vartheta$: the "
                r"sensitivity exceeds $1/r$",
                "inequality",
                r"$\sqrt{1+r^2}/r \ge 1/r$",
                lhs=1 / r,
                rhs=sympy.sqrt(1 + r**2) / r,
            ),
            Step(
                r"no constant serves all inputs",
                "inequality",
                "short task vectors turn easily",
                probe=probes.stock_unbounded,
                scope="candidates C up to 1.6e5",
            ),
        ),
        claims=(model_stock_ratio_formula, model_stock_slope_formula),
    )


def slerp() -> Derivation:
    """SLERP and the Karcher mean: the weights, the local sensitivity from inner products, and the antipodal trap."""
    import sympy

    s, angle, other = symbol("fraction"), symbol("angle"), sympy.Symbol("delta", positive=True)
    weight = slerp_weight_formula().expression
    far = sympy.sin((1 - s) * angle) / sympy.sin(angle)
    arc = {angle: (0.05, 3.0), s: (0.01, 0.99)}
    u = sympy.Symbol("u", positive=True)
    return Derivation(
        name="slerp",
        theorem="SLERP and the Karcher mean",
        claim=r"weights $\sin(s\vartheta)/\sin\vartheta$; local sensitivity $\max(|c_i|, \|c_iI + R^\top BR\|)$; no "
        r"global constant",
        steps=(
            Step(
                r"the point at fraction $s$ of the arc from $u_1$ to $u_2$ (unit vectors) is $a u_1 + b u_2$",
                "definition",
                "Shoemake 1985",
            ),
            Step(
                r"it has unit length",
                "identity",
                "trigonometry",
                lhs=far**2 + weight**2 + 2 * far * weight * sympy.cos(angle),
                rhs=sympy.Integer(1),
                ranges=arc,
            ),
            Step(
                r"and the angle $s\vartheta$ to the first vector",
                "identity",
                "trigonometry",
                lhs=far + weight * sympy.cos(angle),
                rhs=sympy.cos(s * angle),
                ranges=arc,
            ),
            Step(
                r"weight of the second vector",
                "identity",
                r"$b = \sin(s\vartheta)/\sin\vartheta$ from the component orthogonal to $u_1$",
                lhs=sympy.sqrt(1 - sympy.cos(s * angle) ** 2) / sympy.sin(angle),
                rhs=weight,
                ranges=arc,
            ),
            Step(
                r"nearly parallel vectors: linear interpolation",
                "identity",
                r"limit $\vartheta \to 0$",
                lhs=sympy.Limit(weight.subs(angle, u), u, 0),
                rhs=s,
            ),
            Step(
                r"$M = \sum_l c_l(G)v_l$ has the Jacobian $c_iI + \sum_{lk}(\partial c_l/\partial G_{ik})v_lv_k^\top$, "
                r"whose norm follows from the inner products $G = RR^\top$ alone",
                "identity",
                r"identity outside the span, $c_iI + R^\top BR$ inside",
                probe=probes.span_jacobian,
                scope="SLERP, multi-SLERP and Model Stock in eight dimensions, complex steps",
            ),
            Step(
                r"two vectors: the Karcher mean is SLERP",
                "identity",
                "the mean of two points lies on their geodesic",
                probe=probes.karcher_of_two,
                scope="random unit vectors",
            ),
            Step(
                r"counterexample: opposite vectors, half way: the weight exceeds $1/\delta$ at the angle $\pi-\delta$",
                "inequality",
                r"$\sin(\vartheta/2)/\sin\vartheta = 1/(2\cos(\vartheta/2))$",
                lhs=1 / other,
                rhs=sympy.sin((sympy.pi - other) / 2) / sympy.sin(sympy.pi - other),
                ranges={other: (1e-3, 1.0)},
            ),
            Step(
                r"the sensitivity is at least that: no constant serves all inputs",
                "inequality",
                "directions orthogonal to both vectors",
                probe=probes.slerp_unbounded,
                scope="angles down to 0.0025 from opposite",
            ),
        ),
        claims=(slerp_weight_formula,),
    )


def iso() -> Derivation:
    """Iso-C: equal singular values amplify rotations of weak directions."""
    import sympy

    mean, low, following = symbol("s_mean"), symbol("s_low"), symbol("s_next")
    e = sympy.Symbol("e", real=True)
    turn = sympy.atan(2 * e / (low + following))
    return Derivation(
        name="iso",
        theorem="Iso-C",
        claim=r"along the rotation of the two weakest directions the gain is $2\bar s/(s_r+s_{r-1})$",
        steps=(
            Step(
                r"$A + eJ$ with $A = \mathrm{diag}(s_{r-1}, s_r)$, $J$ the rotation by a right angle: the polar factor "
                r"turns by $\arctan(2e/(s_r+s_{r-1}))$",
                "definition",
                "the polar angle of a 2x2 matrix is that of $(M_{11}+M_{22}, M_{21}-M_{12})$",
            ),
            Step(
                r"derivative of the angle",
                "identity",
                "chain rule at zero",
                lhs=sympy.diff(turn, e).subs(e, 0),
                rhs=2 / (low + following),
            ),
            Step(
                r"the merge is $\bar s$ times the polar factor; $J$ and the derivative of a rotation have equal norms",
                "identity",
                "multiply; the mean of the singular values does not change in first order",
                lhs=mean * sympy.diff(turn, e).subs(e, 0),
                rhs=iso_gain_formula().expression,
            ),
            Step(
                r"in three dimensions the shipped norm is at least this",
                "inequality",
                "weakest pair",
                probe=probes.polar_turn,
                scope="central differences of a singular value decomposition",
            ),
            Step(
                r"unbounded where the rank drops",
                "identity",
                r"limit $s_{r-1}, s_r \to 0$ together",
                lhs=sympy.Limit(1 / iso_gain_formula().expression.subs(following, low), low, 0, "+"),
                rhs=sympy.Integer(0),
            ),
        ),
        claims=(iso_gain_formula,),
    )
