"""Random merges of quadratic experts that leave the bound one form each: of gap, drift, training risk and head.

The exact values depend on the first two moments of the data only, so the same recipe may be told the largest gap of
samples ``theta +- root y`` with signs y, the rms envelope, or the logged losses of the run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from theory import Expert, Merge, Schedule, expert_moments
from theory.errors import MergeboundError
from theory.quadratic import ExpertMoments, QuadraticTask
from theory.risk import Bound, master_bound
from theory.tightness import Batch, random_batch

RISKS = ("given", "PL", "convex", "distance", "descent")
HEADS = ("none", "frozen", "trained", "trained, split")


@dataclass(frozen=True)
class Told:
    """One merge with what the bound was told: exact joint risk, the bound, and the categories it belongs to."""

    exact: np.ndarray
    bound: Bound
    categories: tuple[str, ...]


def _turn(left: np.ndarray, inner: np.ndarray) -> np.ndarray:
    return left @ inner @ np.swapaxes(left, -1, -2)


def largest_push(task: QuadraticTask, block: slice) -> np.ndarray:
    """``max ||[H (z - z')]_block||`` over samples ``theta +- root y``; shape ``(C,)``."""
    values, vectors = np.linalg.eigh(task.Omega)
    root = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    dim = task.H.shape[-1]
    pushes = [(task.H @ root @ np.array(signs, dtype=float))[..., block] for signs in product((-1, 1), repeat=dim)]
    return np.asarray(2 * np.max([np.linalg.norm(push, axis=-1) for push in pushes], axis=0))


def minimiser_distance(task: QuadraticTask, base: np.ndarray, expert: Expert) -> np.ndarray:
    """Rms distance of the base from the nearest minimiser of the training objective with its decay."""
    decay = np.broadcast_to(np.asarray(expert.weight_decay, dtype=float), task.H.shape[:1])[:, None, None]
    bent = task.H + decay * np.eye(task.H.shape[-1])
    inverse = np.linalg.pinv(bent, rcond=1e-10, hermitian=True)
    seen = inverse @ bent  # flat directions keep the base's coordinate
    away = (seen @ base[..., None])[..., 0] - (inverse @ task.H @ task.theta[..., None])[..., 0]
    spread = np.trace(_turn(inverse @ task.H, task.Omega), axis1=-2, axis2=-1) / np.asarray(expert.n)
    return np.asarray(np.sqrt((away**2).sum(axis=-1) + spread))


def _cut(expert: Expert, steps: int) -> Expert:
    changes: dict[str, Any] = {"steps": steps}
    for field in ("learning_rate", "batch_size"):
        value = getattr(expert, field)
        if isinstance(value, Schedule):
            changes[field] = Schedule(value.values[..., :steps])
    return replace(expert, **changes)


def logs(task: QuadraticTask, base: np.ndarray, expert: Expert) -> tuple[Schedule, Schedule] | None:
    """Expected losses and rms norms of the batches before every step; None where no common number of steps exists."""
    if np.ndim(expert.steps) or expert.sampling == "reshuffle":
        return None
    n, H = np.asarray(expert.n, dtype=float), task.H
    decay = np.broadcast_to(np.asarray(expert.weight_decay, dtype=float), n.shape)[:, None, None]
    bent, losses, norms = H + decay * np.eye(H.shape[-1]), [], []
    inside = np.trace(_turn(H, task.Omega), axis1=-2, axis2=-1) * (1 - 1 / n)
    for k in range(int(expert.steps)):  # type: ignore[arg-type]
        sizes = expert.batch_size.values[..., k] if isinstance(expert.batch_size, Schedule) else expert.batch_size
        b = np.broadcast_to(np.asarray(sizes, dtype=float), n.shape)
        if k:
            now = expert_moments(task, base, _cut(expert, k))
        else:
            still = np.zeros_like(H)
            start = np.asarray(expert.initial_risk)
            now = ExpertMoments(base, still, still, still, n, n, start, start)
        slope = (bent @ now.mean[..., None] - H @ task.theta[..., None])[..., 0]
        own = _turn(bent, now.covariance) + _turn(H, task.Omega) / n[:, None, None]
        own = own - 2 * bent @ now.data_covariance @ H
        shrink = np.where(n > 1, (n - b) / np.maximum(n - 1, 1), 0.0) if expert.sampling != "with_replacement" else 1.0
        square = (slope**2).sum(axis=-1) + np.trace(own, axis1=-2, axis2=-1) + shrink * inside / b
        losses.append(np.maximum(now.training_risk, 0.0))
        norms.append(np.sqrt(np.maximum(square, 0.0)))
    return Schedule(np.stack(losses, axis=-1)), Schedule(np.stack(norms, axis=-1))


def split_risk(batch: Batch, cut: int) -> np.ndarray:
    """Exact joint risk where coordinates beyond ``cut`` are private: every task keeps its own expert's."""
    total = np.zeros(len(batch.base))
    size, dim = batch.coefficients.shape[0], batch.base.shape[-1]
    shared = (np.arange(dim) < cut).astype(float)
    for j, task in enumerate(batch.tasks):
        mean, covariance = batch.base.copy(), np.zeros_like(task.H)
        for i in range(size):
            part = batch.coefficients[i][:, None] * shared + (1 - shared) * (i == j)
            mean = mean + part * (batch.experts[i].mean - batch.base)
            covariance = covariance + part[:, :, None] * batch.experts[i].covariance * part[:, None, :]
        away = mean - task.theta
        value = np.einsum("ci,cij,cj->c", away, task.H, away)
        total = total + batch.weights[j] / 2 * (
            value + np.trace(task.H @ (covariance + task.Omega), axis1=-2, axis2=-1)
        )
    return np.asarray(total)


NOTHING: dict[str, Any] = dict.fromkeys(
    (
        *("initial_gradient_norm", "sigma", "sigma0", "D_inf", "D_2", "D_envelope", "initial_risk", "training_risk"),
        *("minimal_risk", "base_norm", "pl_constant"),
    )
)


def told(
    task: QuadraticTask, base: np.ndarray, full: Expert, exact: ExpertMoments, kinds: tuple[str, str, str]
) -> Expert:
    """The expert with only the constants that one form of gap, drift and training risk reads."""
    gap, drift, risk = kinds
    keep: set[str] = set()
    more: dict[str, Any] = {}
    keep |= {"envelope": {"D_envelope"}, "rms": {"D_2"}}.get(gap, set())
    if gap == "sup":
        more["D_inf"] = largest_push(task, slice(None))
    keep |= {
        "6(a)": {"initial_gradient_norm", "sigma"},
        "6(b)": {"initial_gradient_norm", "sigma0", "base_norm"},
        "6(c)": {"initial_risk", "training_risk", "sigma", "base_norm"},
    }.get(drift, set())
    if drift == "measured":
        more["drift"] = exact.drift
    keep |= {
        "given": {"training_risk"},
        "PL": {"initial_risk", "sigma", "minimal_risk", "base_norm"},
        "convex": {"sigma", "minimal_risk"},
        "distance": {"sigma", "minimal_risk"},
        "descent": {"initial_risk", "sigma", "base_norm"},
    }[risk]
    if risk in ("convex", "distance"):
        more["minimizer_distance"] = minimiser_distance(task, base, full)
    if "loss log" in (gap, drift) or drift == "gradient log":
        found = logs(task, base, full)
        if found is not None:
            if "loss log" in (gap, drift):
                more["batch_losses"] = found[0]
            if drift == "gradient log":
                more["batch_gradient_norms"] = found[1]
    return replace(full, **(NOTHING | {name: getattr(full, name) for name in keep} | more))


def forms(rng: np.random.Generator, expert: Expert) -> tuple[str, str, str]:
    """Random forms of gap, drift and training risk that may cover a run (others are refused by name elsewhere)."""
    plain = not np.any(expert.momentum) and expert.sampling != "reshuffle"
    logged = np.ndim(expert.steps) == 0 and expert.sampling != "reshuffle"
    gaps = ["envelope", "sup"] + ["rms"] * (expert.sampling != "reshuffle") + ["loss log"] * logged
    drifts = ["6(b)", "6(b)", "measured"] + ["6(a)", "6(c)"] * plain + ["gradient log", "loss log"] * logged
    gap, drift = str(rng.choice(gaps)), str(rng.choice(drifts))
    risk = str(rng.choice((*RISKS, "PL", "PL"))) if plain and rng.random() < 0.7 else "given"
    if "log" in gap and rng.random() < 0.2:
        gap = "envelope"  # what was logged is measured: most recipes shall be certified
    if drift in ("measured", "gradient log", "loss log") and rng.random() < 0.6:
        drift = "6(b)"
    return gap, drift, risk


def tell(seed: int, configurations: int = 32) -> Told | None:
    """A random batch with random forms; None where the forms do not cover its recipe (the refusal is typed)."""
    rng = np.random.default_rng(seed)
    fixed: dict[str, Any] = {}
    if rng.random() < 0.5:
        fixed["momentum"] = 0.0
    if rng.random() < 0.4:
        fixed["sampling"] = str(rng.choice(["without_replacement", "with_replacement"]))
    elif rng.random() < 0.4:
        fixed["sampling"] = "reshuffle"
    batch = random_batch(seed + 50_000, configurations, **fixed)
    head = str(rng.choice(HEADS))
    dim = batch.base.shape[-1]
    split = head.startswith("trained") and dim > 1 and not batch.merge.shared_samples and batch.merge.method != "dare"
    if head != "frozen" and not split:
        head = "none"
    exact = batch.exact.risk
    kinds = [forms(rng, expert) for expert in batch.merge.experts]
    try:
        experts = []
        for task, full, own, chosen in zip(batch.tasks, batch.merge.experts, batch.experts, kinds, strict=True):
            expert = told(task, batch.base, full, own, chosen)
            if head != "none":
                expert = replace(expert, head="trained" if split else "frozen")
            if head == "trained, split":
                blocks = {"D_inf_shared": slice(0, dim - 1), "D_inf_private": slice(dim - 1, dim)}
                expert = replace(expert, **{name: largest_push(task, block) for name, block in blocks.items()})
            experts.append(expert)
        merge = replace(batch.merge, experts=tuple(experts))
        bound = master_bound(merge)
    except MergeboundError:
        return None
    if split:
        exact = split_risk(batch, dim - 1)
    return Told(np.asarray(exact), bound, categories(merge, bound, head))


def categories(merge: Merge, bound: Bound, head: str) -> tuple[str, ...]:
    """Every category that a merge belongs to, from the forms that the bound says it used."""
    found = [f"merge: {merge.method}", f"head: {head}", f"tier: {bound.tier}", f"experts: {len(merge.experts)}"]
    found.append(f"shared samples: {bool(merge.shared_samples)}")
    for expert, row in zip(merge.experts, bound.experts, strict=True):
        run = f"{expert.sampling}, momentum {bool(np.any(expert.momentum))}"
        schedule = isinstance(expert.learning_rate, Schedule) or isinstance(expert.batch_size, Schedule)
        found += [
            f"run: {run}, decay {bool(np.any(expert.weight_decay))}, schedule {schedule}",
            f"nesterov {bool(expert.nesterov)}, decoupled {bool(expert.decoupled_decay)}",
            *(f"stability: {form}" for form in row.epsilon_form.split(" or ")),
            *(f"drift: {form}" for form in row.drift_form.split(" or ")),
            *(f"training risk: {form}" for form in row.risk_form.split(" or ")),
        ]
    return tuple(dict.fromkeys(found))


def count(seeds: range, configurations: int = 32, slack: float = 1 + 1e-8) -> tuple[Counter[str], list[Any]]:
    """Recipes per category (configurations, not batches) and every violation found."""
    found: Counter[str] = Counter()
    wrong: list[Any] = []
    for seed in seeds:
        row = tell(seed, configurations)
        if row is None:
            found["refused"] += configurations
            continue
        size = row.exact.size
        found.update(dict.fromkeys(row.categories, size))
        found["all"] += size
        high = np.asarray(row.bound.value)
        found["finite"] += int(np.isfinite(high).sum())
        if np.isnan(high).any() or not np.all(row.exact <= high * slack):
            wrong.append((seed, float((row.exact / high).max()), row.categories))
    return found, wrong
