"""Methods on matrices: RegMean (linear once the Gram matrices are frozen), Iso-C, TSV, KnOTS, WUDI.

Cutting a spectrum is discontinuous where singular values cross or vanish: no guarantee.  Away from there Iso-C and the
exact WUDI have derivatives in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from theory.errors import AssumptionError, RecipeError
from theory.operators.effects import (
    Action,
    Effect,
    Operator,
    Setting,
    frozen,
    normalised,
    numbers,
    one_number,
    scaled,
)
from theory.operators.linear import linear_effect
from theory.sensitivity import LocalSensitivity, local_sensitivity
from theory.symbolic import FloatArray, Formula, evaluate
from theory.symbols import symbol


def regmean_maps(
    grams: ArrayLike, coefficients: ArrayLike | None = None, off_diagonal: float = 0.9, tolerance: float | None = None
) -> FloatArray:
    """What each expert's weight rows are multiplied by: ``W = sum_i W_i A_i`` with A of shape ``(N, d, d)``.

    ``A_i = w_i (I - T T^+) + G_i T^+`` with ``T = sum_i G_i`` and w the shares of the coefficients: ``G_i T^-1`` where
    T is invertible.  ``grams`` has shape ``(N, d, d)``; off-diagonal entries are multiplied by ``off_diagonal`` first.
    ``T^+`` is taken after T was scaled to a unit diagonal; eigenvalues below ``d tolerance`` of the largest count as
    zero (default: the machine precision).  ``sum_i A_i = I``: copies of one expert are given back.

    Source: Jin et al. 2023, arXiv:2212.09849, section 3 (rows here are columns there).

    >>> import numpy as np
    >>> regmean_maps(np.array([np.diag([3.0, 1.0]), np.diag([1.0, 1.0])])).round(9).tolist()[0]
    [[0.75, 0.0], [0.0, 0.5]]
    """
    G = numbers("regmean", "grams", grams)
    if G.ndim != 3 or G.shape[1] != G.shape[2]:
        raise RecipeError(f"regmean: grams has shape {G.shape}; give one Gram matrix per expert, (N, d, d)")
    if not np.all(np.isfinite(G)):
        raise RecipeError("regmean: grams is not finite; collect it again")
    G = G / max(float(np.abs(G).max()), 1e-300)  # the unit of the inputs does not matter
    w = np.ones(len(G)) if coefficients is None else normalised(np.asarray(coefficients, dtype=np.float64))
    if w.shape != (len(G),):
        raise RecipeError(f"regmean: coefficients have shape {w.shape} for {len(G)} Gram matrices; give one each")
    if np.any(w < 0) or not np.any(w > 0):
        raise RecipeError("regmean: coefficients are negative or all zero; give nonnegative numbers, one positive")
    eye = np.eye(G.shape[1])
    G = (G * (off_diagonal + (1 - off_diagonal) * eye)) * w[:, None, None]
    total = G.sum(axis=0)
    diagonal = np.diag(total)
    alive = diagonal > 0
    scale = np.where(alive, 1 / np.sqrt(np.where(alive, diagonal, 1.0)), 0.0)
    unit = total * scale[:, None] * scale[None, :] + np.diag((~alive).astype(float))
    values, vectors = np.linalg.eigh(unit)
    cut = len(unit) * (np.finfo(np.float64).eps if tolerance is None else tolerance) * values[-1]
    kept = vectors[:, values > cut]
    inverse = (kept / values[values > cut]) @ kept.T * scale[:, None] * scale[None, :]
    return np.asarray((w / w.sum())[:, None, None] * (eye - total @ inverse) + G @ inverse)


def regmean_sensitivity(
    layers: Sequence[ArrayLike] | ArrayLike,
    coefficients: ArrayLike | None = None,
    off_diagonal: float = 0.9,
    others: bool = False,
) -> FloatArray:
    """``c_i``: the largest operator norm of :func:`regmean_maps` over the layers; shape ``(N,)``; exact and attained.

    ``layers`` is one array ``(N, d, d)`` or a sequence of them; with ``others`` there are tensors without Gram
    matrices, which are averaged.  *Trap:* it can exceed 1, because G_i and the sum need not commute.

    >>> import numpy as np
    >>> G = np.array([[[1.0, 0.9], [0.9, 1.0]], [[100.0, 0.0], [0.0, 0.01]]])
    >>> bool(regmean_sensitivity(G, off_diagonal=1.0)[0] > 1)
    True
    """
    single = not isinstance(layers, (list, tuple)) or (len(layers) > 0 and np.ndim(layers[0]) == 2)
    parts: list[Any] = [layers] if single else list(layers)  # type: ignore[arg-type]
    if not parts:
        raise RecipeError("regmean: grams is empty; give one array (N, d, d) per layer")
    norms = [np.linalg.norm(regmean_maps(part, coefficients, off_diagonal), 2, axis=(1, 2)) for part in parts]
    if others:
        w = np.ones(len(norms[0])) if coefficients is None else normalised(np.asarray(coefficients, dtype=np.float64))
        norms.append(w / w.sum())
    return np.asarray(np.max(norms, axis=0))


def _regmean(experts: int, given: Mapping[str, Any]) -> Effect:
    assumption = frozen(
        "input Gram matrices", "they are measured with the experts on samples; inputs of deeper layers move"
    )
    if "grams" not in given:
        reason = "linear per layer once the Gram matrices are frozen, but |G_i (sum G)^-1| is unbounded: give grams"
        return Effect("none", reason, assumptions=(assumption,))
    c = regmean_sensitivity(
        given["grams"], given.get("coefficients"), one_number("regmean", "off_diagonal", given["off_diagonal"])
    )
    if c.shape != (experts,):
        raise RecipeError(f"regmean: grams are of {len(c)} experts and there are {experts}; give one per expert")
    reason = "linear per layer once the Gram matrices are frozen: the norm of G_i (sum G)^-1, of the worst layer"
    return Effect("global", reason, c, c, None, None, 0 * c, (assumption,))


def iso_gain_formula() -> Formula:
    """Iso-C's amplification along the weakest rotation: ``2 s_mean/(s_r + s_{r-1})``."""
    mean, low, following = symbol("s_mean"), symbol("s_low"), symbol("s_next")
    return Formula("gain", ("s_mean", "s_low", "s_next"), 2 * mean / (low + following), "section 10, Iso-C")


def iso_c_gain(singular_values: ArrayLike, shape: tuple[int, int]) -> float:
    """Norm of the derivative of ``A -> mean(s) U V'`` at ``A = U S V'`` of full rank and this shape (one matrix).

    Along ``U V'`` the map is linear with slope one; a rotation in the plane of components j and k is amplified by
    ``2 s_mean/(s_j + s_k)``, a turn out of the row or column space (rectangular matrices) by ``s_mean/s_r``; symmetric
    changes without trace are lost.  Exact; *local*: infinite where the rank drops (``inf``).

    >>> iso_c_gain([1.0, 1.0], (2, 2)), iso_c_gain([3.0, 1.0], (2, 2)), iso_c_gain([3.0, 1.0], (2, 3))
    (1.0, 1.0, 2.0)
    """
    s = np.sort(numbers("iso_c", "singular_values", singular_values).ravel())
    if len(s) != min(shape) or np.any(s < 0) or not np.all(np.isfinite(s)):
        raise RecipeError(f"iso_c: singular_values are not the {min(shape)} of a matrix {shape}; give all of them")
    if s[0] == 0:
        return float("inf")
    s = s / s[-1]
    mean = s.mean()
    gains = [1.0]
    if len(s) > 1:
        gains.append(float(evaluate(iso_gain_formula, mean, s[0], s[1])))
    if shape[0] != shape[1]:
        with np.errstate(over="ignore", divide="ignore"):
            gains.append(float(mean / s[0]))
    return max(gains)


_SPECTRAL = "singular vectors turn without bound where singular values meet, and components cut off jump"


def _iso_c(experts: int, given: Mapping[str, Any]) -> Effect:
    alpha = scaled(given, experts)
    if given["matrices"] == "none":
        return linear_effect(alpha / experts)
    if "spectra" not in given:
        return Effect("none", _SPECTRAL + "; give spectra (singular values and shape of the summed task vector)")
    try:
        pairs = [(values, (int(shape[0]), int(shape[1]))) for values, shape in given["spectra"]]
    except (TypeError, ValueError, IndexError) as error:
        raise RecipeError(
            "iso_c: spectra is no sequence of (singular values, shape); give one pair per matrix"
        ) from error
    if not pairs:
        raise RecipeError("iso_c: spectra is empty; give one pair (singular values, shape) per matrix")
    gains = [iso_c_gain(values, shape) for values, shape in pairs]
    c = np.abs(alpha) * max(gains)
    reason = _SPECTRAL + "; this is the Jacobian's norm there (other tensors are averaged: smaller)"
    return Effect("local", reason, c, c)


def _spectral(name: str) -> Any:
    def compute(experts: int, given: Mapping[str, Any]) -> Effect:
        if given.get("matrices") == "none" and name != "knots":
            return linear_effect(scaled(given, experts) / experts)
        if name == "tsv_m" and not given["orthogonalize"] and given["truncation"] == "none":
            alpha = scaled(given, experts)
            c = np.abs(alpha)
            reason = "nothing is cut off or made orthogonal: the sum (matrices), the mean (other tensors)"
            return Effect("global", reason, c, c, None, None, 0 * c)
        if name == "knots" and given["inner"] == "task_arithmetic":
            return linear_effect(scaled(given, experts))
        if name == "knots" and given["inner"] == "dare_ties":
            return Effect(
                "none", "no guarantee: masks, trimming and election act on a basis that turns with the experts"
            )
        return Effect("none", "no guarantee: " + _SPECTRAL)

    return compute


def wudi_products(task_vectors: ArrayLike, expert: int) -> tuple[Any, Any]:
    """``(jvp, vjp)`` of the exact WUDI merge ``T = R G^+`` with respect to one expert's matrix ``(m, n)``.

    ``G = sum_i D_i'D_i/|D_i|^2``, ``R = sum_i D_i D_i'D_i/|D_i|^2``.  From ``T G = R``:
    ``dT = (d G_i + (D_i - T) dG_i) G^+ + (T G^+ dG)(I - G G^+)``, where ``dG_i = (d'D_i + D_i'd)/|D_i|^2 -
    2 <D_i, d> D_i'D_i/|D_i|^4``.  The last part is there only if G is singular, and asks that its rank stay the same.
    *Trap:* with G_i frozen (RegMean's norm ``|G_i G^+|``) the second part, which is of the same size, is missing.

    ``task_vectors`` has shape ``(N, m, n)``.  Raises :class:`AssumptionError` for an expert that is zero.
    """
    D = numbers("wudi", "task_vectors", task_vectors)
    if D.ndim != 3:
        raise RecipeError(f"wudi: task_vectors has shape {D.shape}; give one matrix per expert, (N, m, n)")
    if not np.all(np.isfinite(D)):
        raise RecipeError("wudi: task_vectors is not finite; leave that expert out")
    D = D / max(float(np.abs(D).max()), 1e-300)  # the derivative does not depend on the unit
    squares = (D**2).sum(axis=(1, 2))
    if squares[expert] == 0:
        raise AssumptionError("wudi: this expert's task vector is zero, where the merge is discontinuous; leave it out")
    safe = np.where(squares > 0, squares, 1.0)[:, None, None]
    grams = np.swapaxes(D, 1, 2) @ D / safe
    G, R = grams.sum(axis=0), (D @ grams).sum(axis=0)
    values, vectors = np.linalg.eigh(G)
    kept = values > len(G) * np.finfo(np.float64).eps * values[-1]
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    null = np.eye(len(G)) - vectors[:, kept] @ vectors[:, kept].T
    T = R @ inverse
    own, gram, length = D[expert], grams[expert], squares[expert]
    left, right = own - T, T @ inverse

    def bend(d: FloatArray) -> FloatArray:
        product = d.T @ own
        return np.asarray((product + product.T) / length - 2 * float(np.vdot(own, d)) / length * gram)

    def jvp(d: FloatArray) -> FloatArray:
        change = bend(d)
        return np.asarray((d @ gram + left @ change) @ inverse + right @ change @ null)

    def vjp(u: FloatArray) -> FloatArray:
        pulled = left.T @ u @ inverse + right.T @ u @ null  # gradient with respect to dG_i
        symmetric = pulled + pulled.T
        return np.asarray(
            u @ inverse @ gram + own @ symmetric / length - 2 * float(np.vdot(gram, pulled)) / length * own
        )

    return jvp, vjp


def wudi_sensitivity(task_vectors: ArrayLike, expert: int, *, seed: int = 0, iterations: int = 200) -> LocalSensitivity:
    """Local sensitivity of the exact WUDI merge of one matrix to one expert, by power iteration on its products.

    >>> import numpy as np
    >>> D = np.random.default_rng(0).standard_normal((3, 4, 3))
    >>> found = wudi_sensitivity(D, 0)
    >>> found.adjoint_gap < 1e-9, found.tier
    (True, 'estimated')
    """
    jvp, vjp = wudi_products(task_vectors, expert)
    return local_sensitivity(jvp, vjp, np.asarray(task_vectors).shape[1:], seed=seed, iterations=iterations)


_ADAM = "Adam normalises the gradient entry by entry: smooth only on a scale of 1e-8, so that no useful constant exists"


def _wudi(experts: int, given: Mapping[str, Any]) -> Effect:
    scale = np.asarray(given["coefficient"], dtype=np.float64)
    if given["matrices"] == "none":
        share = 1.0 / experts if given["others"] == "mean" else 0.0
        return linear_effect(np.broadcast_to(scale * share, (experts, *scale.shape)).copy())
    if given["solver"] == "adam":
        if np.all(given["steps"] == 0):
            reason = "no step is taken: the sum (matrices), the mean or nothing (other tensors)"
            c = np.broadcast_to(np.abs(scale), (experts, *scale.shape)).copy()
            return Effect("global", reason, c, c, None, None, 0 * c)
        return Effect("none", f"no guarantee: {_ADAM}")
    if "matrices_of_experts" not in given:
        return Effect("none", "no guarantee: R G^+ jumps where the rank of G changes; give matrices_of_experts")
    parts = [numbers("wudi", "matrices_of_experts", part) for part in given["matrices_of_experts"]]
    if not parts or any(part.ndim != 3 or len(part) != experts for part in parts):
        raise RecipeError("wudi: matrices_of_experts is no sequence of arrays (N, m, n); give one per matrix")
    norms = [[wudi_sensitivity(part, i).value for i in range(experts)] for part in parts]
    found = np.max(norms, axis=0)
    c = np.abs(scale) * found.reshape(found.shape + (1,) * scale.ndim)
    reason = "no guarantee where the rank of G changes; this is a lower estimate of the Jacobian's norm there"
    return Effect("local", reason, c, c)


def matrix_operators() -> tuple[Operator, ...]:
    """RegMean, TSV-Merge, Iso-C, Iso-CTS, KnOTS, WUDI."""
    matrices = Setting("matrices", "2d", choices=("2d", "flatten", "none"))
    one, none = Setting("coefficient", 1.0), "none (deterministic)"
    spectral = "no guarantee (singular vectors and cut-offs are discontinuous); locally by derivative products"
    flat = (
        Action("dispersion", "either way", "weak directions are amplified, strong ones damped: V from the checkpoints"),
        Action(
            "instability",
            "raises",
            "weak directions turn easily: up to 2 mean(s)/(s_r + s_{r-1})",
            "full rank, locally",
        ),
    )
    cut = (
        Action("dispersion", "either way", "own mass beyond the kept components is lost, interference with it"),
        Action("instability", "either way", "by derivative products", "locally, distinct singular values"),
    )
    bias = "not task arithmetic: the spectrum is changed; measure it on the checkpoints"
    return (
        Operator(
            name="regmean",
            statement="(sum_i G_i)^-1 sum_i G_i W_i in every linear layer, G_i input Gram matrices",
            guarantee="none",
            sensitivity="|(sum G)^-1 G_i| of the worst layer (after the off-diagonal factor), G frozen; can "
            "exceed 1; no bound without the Gram matrices",
            bias="none against a weighted mean with these matrix weights, which sum to the identity",
            second_moment=none,
            actions=(
                Action(
                    "dispersion",
                    "lowers",
                    "minimises sum_i |X_i (W - W_i)|^2, V in the input-Gram norms",
                    "tasks weighted by sample count unless normalised",
                ),
                Action("instability", "raises", "matrix weights can exceed 1 in norm"),
            ),
            source="Jin et al. 2023, arXiv:2212.09849",
            compute=_regmean,
            settings=(Setting("off_diagonal", 0.9, 0.0, 1.0),),
            coefficients="optional",
            statistics={"grams": "input Gram matrices, (N, d, d) or a sequence of such, one per layer"},
        ),
        Operator(
            name="tsv_m",
            statement="lambda U S V' with the leading components of all experts, U and V made orthogonal",
            guarantee="none",
            sensitivity=spectral,
            bias=bias,
            second_moment=none,
            actions=cut,
            source="Gargiulo et al. 2025, arXiv:2412.00081",
            compute=_spectral("tsv_m"),
            settings=(
                one,
                Setting("truncation", "shared", choices=("shared", "none")),
                Setting("orthogonalize", True),
                matrices,
            ),
            coefficients="optional",
        ),
        Operator(
            name="iso_c",
            statement="lambda mean(s) U V' of sum_i alpha_i Delta_i = U S V'",
            guarantee="none",
            sensitivity="no guarantee globally; where the sum has full rank, |lambda alpha_i| max(1, 2 mean(s)/(s_r + "
            "s_{r-1}), and mean(s)/s_r if not square)",
            bias=bias,
            second_moment=none,
            actions=flat,
            source="Marczak et al. 2025, arXiv:2502.04959",
            compute=_iso_c,
            settings=(one, matrices),
            coefficients="optional",
            statistics={"spectra": "per matrix: (singular values of sum_i alpha_i Delta_i, shape)"},
        ),
        Operator(
            name="iso_cts",
            statement="lambda mean(s) U V' over a common subspace and the experts' own",
            guarantee="none",
            sensitivity=spectral,
            bias=bias,
            second_moment=none,
            actions=flat,
            source="Marczak et al. 2025, arXiv:2502.04959",
            compute=_spectral("iso_cts"),
            settings=(one, Setting("common", 0.8, 0.0, 1.0), matrices),
            coefficients="optional",
        ),
        Operator(
            name="knots",
            statement="lambda U S V', V' merged (TIES, DARE-TIES, sum) from a basis common to all experts",
            guarantee="none",
            sensitivity="|lambda alpha_i| for the sum, which is task arithmetic; " + spectral + " otherwise",
            bias="none for the sum; otherwise that of the rule in the common basis",
            second_moment="none, or the masks' in the common basis",
            actions=cut,
            source="Stoica et al. 2025, arXiv:2410.19735",
            compute=_spectral("knots"),
            settings=(
                Setting("inner", "ties", choices=("ties", "dare_ties", "task_arithmetic")),
                Setting("aligned", "v", choices=("v", "sigma_v")),
                Setting("concatenate", "columns", choices=("columns", "rows")),
                Setting("density", 0.2, 0.0, 1.0, low_open=True),
                Setting("scope", "global", choices=("global", "tensor")),
                Setting("aggregation", "mean", choices=("mean", "sum")),
                Setting("rounding", "up", choices=("up", "down")),
                Setting("drop", 0.1, 0.0, 1.0, high_open=True),
                one,
                matrices,
            ),
            coefficients="optional",
        ),
        Operator(
            name="wudi",
            statement="argmin_T sum_i |(T - Delta_i) Delta_i'|^2/|Delta_i|^2 (exact: R G^+), per matrix",
            guarantee="none",
            sensitivity="no guarantee (Adam: normalised steps; exact: jumps with the rank of G); exact and rank fixed: "
            "closed derivative products, whose frozen part is |G_i G^+|",
            bias="Adam stays within about steps times learning rate of the sum; exact: matrix weights G_i G^+",
            second_moment=none,
            actions=(
                Action("dispersion", "lowers", "minimises V in the norms of the experts' own row spaces"),
                Action("instability", "either way", "by derivative products", "exact solver, fixed rank"),
            ),
            source="Cheng et al. 2025, arXiv:2503.08099",
            compute=_wudi,
            settings=(
                Setting("solver", "adam", choices=("adam", "exact")),
                Setting("steps", 300.0, low=0.0),
                Setting("learning_rate", 1e-5, low=0.0),
                one,
                Setting("others", "mean", choices=("mean", "base")),
                matrices,
            ),
            statistics={"matrices_of_experts": "sequence of arrays (N, m, n), one per matrix"},
        ),
    )
