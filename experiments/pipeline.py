"""The main job for one architecture and regime: fine-tune, collect, merge, predict, measure.

Every finished expert and every finished group is on disk before the next starts, so an interrupted run continues.
Predictions are made from calibration images; test images are used for measurements only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.collected import PoolStatistics, collect_pool
from experiments.experts import Expert, Progress, make_base, make_pool
from experiments.measure.backbone import Backbone
from experiments.measure.function_space import (
    GroupStatistics,
    MergePoint,
    Midpoint,
    predicted_logits,
    price,
    project,
    sweep,
    trivial,
)
from experiments.models import build_model
from experiments.pool import PlannedGroup, draw_groups, draw_pool
from experiments.spec import MethodSpec, ValidationSpec
from experiments.tasks.digits8 import digits8
from experiments.tasks.types import Family, Split
from merging.merge import merge_flat
from merging.registry import get
from theory.dispersion import smallest_bound
from theory.drift import buffer_weights
from theory.errors import MergeboundError
from theory.function_space import cross_entropy, minimise_risk
from theory.risk import network_bound

Row = dict[str, Any]
TUNING_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4)
RISK_OPTIMAL = ("secant", "tangent_base", "secant_tangent", "tangent_expert", "tangent_both")


@dataclass(frozen=True)
class Frames:
    """Result tables; see :mod:`experiments.report` for the columns."""

    merges: pd.DataFrame
    experts: pd.DataFrame
    coefficients: pd.DataFrame
    lines: pd.DataFrame
    optimal: pd.DataFrame


@dataclass(frozen=True)
class Measured:
    """Measured joint risk of a merge on the test sets: per-task loss and accuracy, and the standard error of the mean
    loss (images shared by tasks are counted once)."""

    losses: np.ndarray
    accuracies: np.ndarray
    standard_error: float

    @property
    def loss(self) -> float:
        """Mean over tasks."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Mean over tasks."""
        return float(self.accuracies.mean())


def measure(pool: PoolStatistics, vector: Tensor, members: Sequence[int], splits: dict[str, Split]) -> Measured:
    """Loss and accuracy of the merged coordinates on every member's own task, through its own head."""
    names = [pool.tasks[j] for j in members]
    unique = list(dict.fromkeys(names))
    features = pool.backbone.features(vector, torch.cat([splits[name].images for name in unique]))
    pieces = dict(zip(unique, features.split([len(splits[name]) for name in unique]), strict=True))
    losses, accuracies, by_image = [], [], []
    for j, name in zip(members, names, strict=True):
        logits = pool.readouts[j].logits(pieces[name])
        labels = splits[name].labels
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
        by_image.append(pd.Series(loss.numpy(), index=splits[name].source))
        losses.append(float(loss.mean()))
        accuracies.append(float((logits.argmax(dim=1) == labels).double().mean()))
    joined = pd.concat(by_image, axis=1).mean(axis=1)
    error = float(joined.std(ddof=1) / np.sqrt(len(joined)))
    return Measured(np.array(losses), np.array(accuracies), error)


def merge_vector(
    pool: PoolStatistics, members: Sequence[int], names: Sequence[str], method: MethodSpec, seed: int
) -> Tensor:
    """The merged coordinates M of a group, (P,)."""
    return merge_flat(
        method.name,
        pool.base,
        pool.deltas[list(members)],
        pool.backbone.space,
        pool.backbone.partition,
        names=list(names),
        seed=seed,
        **method.settings,
    )


def linear_coefficients(method: MethodSpec, size: int) -> np.ndarray | None:
    """alpha of a method that is linear with fixed coefficients, else ``None``."""
    if method.name == "average":
        return np.full(size, 1.0 / size)
    if method.name == "task_arithmetic":
        return np.full(size, float(method.settings.get("coefficient", 0.3)))
    return None


def dispersion(pool: PoolStatistics, vector: Tensor, members: Sequence[int]) -> float:
    """V(M) = mean over experts of |M - x_j|^2."""
    return float((vector - pool.vectors[list(members)]).double().square().sum(dim=1).mean())


# --- bounds ----------------------------------------------------------------------------------------------------------


def logged_drift(expert: Expert) -> tuple[float, float]:
    """Drift d of the shared and of the head part from the training log: theory.md 6(d)."""
    hyper, log = expert.plan.hyper, expert.log
    weights = buffer_weights(np.full(len(log.batch_loss), hyper.learning_rate), hyper.momentum)
    return float(weights @ log.gradient_norm_shared), float(weights @ log.gradient_norm_head)


def bound_columns(
    method: MethodSpec,
    members: Sequence[int],
    experts: Sequence[Expert],
    pool: PoolStatistics,
    drifts: pd.DataFrame,
    V: float,
    shares_images: bool,
) -> Row:
    """The master bound of one merge from the checkpoints (V and drift measured) and from the training logs (6(d))."""
    rows = drifts.iloc[list(members)]
    size = len(members)
    risks = np.array([experts[j].training_loss for j in members])
    settings: Row = {"method": method.name, "trained_heads": True, "shared_samples": shares_images}
    if method.name in ("task_arithmetic", "dare"):
        settings["coefficients"] = float(method.settings.get("coefficient", 0.3))
    if method.name == "dare":
        settings["drop_rate"] = float(method.settings.get("drop", 0.5))
    scale = float(method.settings.get("coefficient", 1.0))
    if method.name == "ties":  # local sensitivity at fixed support and signs: at most lambda per coordinate
        settings["sensitivity"] = scale
    stiffness = pool.smoothness[list(members)]
    measured = network_bound(
        risks,
        stiffness,
        rows["drift"].to_numpy(),
        dispersion=V,
        private_drift=rows["head_drift"].to_numpy(),
        **settings,
    )
    logged, weights = rows["drift_bound"].to_numpy(), np.full(size, 1.0 / size)
    if method.name == "ties":  # |merged entry| <= lambda max_i |Delta_i|, hence |M - x_0|^2 <= lambda^2 sum d_i^2
        settings["dispersion"] = float(weights @ (scale * np.sqrt((logged**2).sum()) + logged) ** 2)
    from_logs = network_bound(
        risks, stiffness, logged, private_drift=rows["head_drift_bound"].to_numpy(), **settings
    )
    terms = {f"term_{term.name}": float(term.value) for term in from_logs.terms}
    chance = float(np.log(pool.readouts[members[0]].weight.shape[0])) if pool.readouts[members[0]].weight is not None else np.log(10.0)
    return {
        "bound_master_checkpoints": float(measured.value),
        "bound_master_logs": float(from_logs.value),
        "vacuous_master_checkpoints": bool(measured.value >= chance),
        "vacuous_master_logs": bool(from_logs.value >= chance),
        **terms,
    }


def expert_table(
    spec: ValidationSpec, architecture: str, regime: str, experts: Sequence[Expert], pool: PoolStatistics, base: Any
) -> pd.DataFrame:
    """One row per expert: hyperparameters, risks, drift measured and from its log."""
    rows = []
    head = pool.backbone.head
    for j, expert in enumerate(experts):
        task, hyper = expert.plan.task, expert.plan.hyper
        own = measure(pool, pool.vectors[j], [j], dict(pool.test))
        calibration = measure(pool, pool.vectors[j], [j], dict(pool.calibration))
        shared_bound, head_bound = logged_drift(expert)
        head_drift = 0.0
        if head:
            squares = [
                (expert.state[name] - base[name]).double().square().sum() for name in base if name.startswith(head)
            ]
            head_drift = float(torch.stack(squares).sum().sqrt())
        rows.append(
            {
                "regime": regime,
                "architecture": architecture,
                "seed": spec.seed,
                "expert": expert.plan.name,
                "task": task,
                "half": expert.plan.half,
                "learning_rate": hyper.learning_rate,
                "steps": hyper.steps,
                "batch_size": hyper.batch_size,
                "data_share": hyper.data_share,
                "n": expert.samples,
                "momentum": hyper.momentum,
                "weight_decay": hyper.weight_decay,
                "sampling": hyper.sampling,
                "training_loss": expert.training_loss,
                "calibration_loss": calibration.loss,
                "test_loss": own.loss,
                "test_accuracy": own.accuracy,
                "drift": float(pool.deltas[j].double().norm()),
                "head_drift": head_drift,
                "drift_bound": shared_bound,
                "head_drift_bound": head_bound,
                "smoothness": float(pool.smoothness[j]),
                "finite": expert.log.finite,
                "seconds": expert.log.seconds,
            }
        )
    return pd.DataFrame(rows)


# --- one regime --------------------------------------------------------------------------------------------------------


def run_regime(
    spec: ValidationSpec, architecture: str, regime: str, family: Family, folder: Path, progress: Progress
) -> Frames:
    """Fine-tune the pool of one regime, merge every group with every method, predict and measure."""
    base = make_base(spec, architecture, family, folder)
    place = folder / regime
    plans = draw_pool(spec, regime)
    experts = make_pool(spec, architecture, family, base, plans, place / "experts", progress)
    diverged = {i for i, e in enumerate(experts) if not e.log.finite}
    groups = [g for g in draw_groups(spec, regime, plans) if not diverged & set(g.members)]
    if not groups:
        raise MergeboundError(f"regime {regime}: every group holds a diverged expert; lower the learning rates")
    model = build_model(architecture, classes=10, seed=spec.seed)
    backbone = Backbone.of(model, base, shared_head=spec.heads == "shared")
    pairs = line_pairs(spec, groups)
    pool = collect_pool(backbone, base, experts, family, [g.members for g in groups], progress)
    table = expert_table(spec, architecture, regime, experts, pool, base)
    common = {"regime": regime, "architecture": architecture, "seed": spec.seed}
    test = dict(pool.test)

    def stage(name: str, keys: Sequence[str], make: Any) -> pd.DataFrame:
        """Rows of one stage, one JSON line per key, appended as each is done."""
        path = place / f"{name}.jsonl"
        done = _read_lines(path)
        for number, key in enumerate(keys):
            if key not in done:
                rows = [{**common, **row} for row in make(number)]
                with path.open("a") as handle:
                    handle.write(json.dumps({"key": key, "rows": rows}) + "\n")
                done[key] = rows
            progress(name, number + 1, len(keys))
        return pd.DataFrame([row for key in keys for row in done[key]])

    pending = _Pending(spec, pool, groups, plans, _read_lines(place / "merges.jsonl"), progress)
    merges = stage(
        "merges",
        [str(g.number) for g in groups],
        lambda k: _merge_rows(spec, pool, groups[k], plans, experts, table, family, pending),
    )
    chosen = _spread(groups, spec.sweep_groups)
    coefficients = stage("coefficients", [str(g.number) for g in chosen], lambda k: _sweep_rows(spec, pool, chosen[k], test))
    lines = stage("lines", [f"{a}-{b}" for a, b in pairs], lambda k: _line_rows(pool, plans, *pairs[k]))
    picked = _spread(groups, spec.optimal_groups)
    optimal = stage(
        "optimal", [str(g.number) for g in picked], lambda k: _optimal_rows(spec, pool, picked[k], plans, test)
    )
    return Frames(merges, table, coefficients, lines, optimal)


def _read_lines(path: Path) -> dict[str, list[Row]]:
    """Finished keys of a stage; a last line cut short by an interruption is ignored."""
    done: dict[str, list[Row]] = {}
    if not path.exists():
        return done
    lines = path.read_bytes().split(b"\n")
    whole = b"".join(line + b"\n" for line in lines[:-1])
    if lines[-1]:
        path.write_bytes(whole)
    for line in whole.splitlines():
        entry = json.loads(line)
        done[entry["key"]] = entry["rows"]
    return done


def _spread(groups: Sequence[PlannedGroup], count: int) -> list[PlannedGroup]:
    """``count`` groups, as evenly as possible over group sizes, first drawn first."""
    sizes = sorted({len(g.members) for g in groups})
    ranked = sorted(groups, key=lambda g: ([h.number for h in groups if len(h.members) == len(g.members)].index(g.number), sizes.index(len(g.members))))
    return sorted(ranked[:count], key=lambda g: g.number)


def line_pairs(spec: ValidationSpec, groups: Sequence[PlannedGroup]) -> list[tuple[int, int]]:
    """Pairs of experts for the loss along a line: the first ``spec.lines`` groups' first two members."""
    pairs = dict.fromkeys(g.members[:2] for g in groups)
    return list(pairs)[: spec.lines]  # type: ignore[arg-type]


class _Pending:
    """Merged vectors of the non-linear methods and their residual products, batched by anchor over all groups."""

    def __init__(
        self,
        spec: ValidationSpec,
        pool: PoolStatistics,
        groups: Sequence[PlannedGroup],
        plans: Sequence[Any],
        done: dict[str, list[Row]],
        progress: Progress,
    ) -> None:
        self.vectors: dict[tuple[int, int], Tensor] = {}
        self.points: dict[tuple[int, int], MergePoint] = {}
        self.seconds: dict[tuple[int, int], float] = {}
        wanted: dict[tuple[int, int], tuple[PlannedGroup, np.ndarray, Tensor]] = {}
        for group in groups:
            if str(group.number) in done:
                continue
            names = [plans[i].name for i in group.members]
            for m, method in enumerate(spec.methods):
                started = time.perf_counter()
                vector = merge_vector(pool, group.members, names, method, spec.seed)
                self.seconds[group.number, m] = time.perf_counter() - started
                self.vectors[group.number, m] = vector
                V = dispersion(pool, vector, group.members)
                alpha = linear_coefficients(method, len(group.members))
                if alpha is not None:
                    self.points[group.number, m] = MergePoint(alpha, None, None, V)
                else:
                    coefficients, residual = project(vector - pool.base, pool.deltas[list(group.members)])
                    wanted[group.number, m] = (group, coefficients, residual)
        at_base: dict[tuple[int, int, int], np.ndarray] = {}
        at_own: dict[tuple[int, int, int], np.ndarray] = {}
        by_task: dict[str, list[tuple[int, int]]] = {}
        by_expert: dict[int, list[tuple[int, int]]] = {}
        for key, (group, _, _) in wanted.items():
            for j in group.members:
                by_task.setdefault(pool.tasks[j], []).append(key)
                by_expert.setdefault(j, []).append(key)
        total = len(by_task) + len(by_expert)
        for count, (task, keys) in enumerate(by_task.items()):
            directions = torch.stack([wanted[key][2] for key in dict.fromkeys(keys)])
            products = pool.backbone.products(pool.base, directions, pool.calibration[task].images)
            for key, product in zip(dict.fromkeys(keys), products, strict=True):
                for j in wanted[key][0].members:
                    if pool.tasks[j] == task:
                        at_base[(*key, j)] = pool.readouts[j].products(product).double().numpy()
            progress("non-linear merges", count + 1, total)
        for count, (j, keys) in enumerate(by_expert.items()):
            directions = torch.stack([wanted[key][2] for key in keys])
            products = pool.backbone.products(pool.vectors[j], directions, pool.calibration[pool.tasks[j]].images)
            for key, product in zip(keys, products, strict=True):
                at_own[(*key, j)] = pool.readouts[j].products(product).double().numpy()
            progress("non-linear merges", len(by_task) + count + 1, total)
        for key, (group, coefficients, _) in wanted.items():
            self.points[key] = MergePoint(
                coefficients,
                tuple(at_base[(*key, j)] for j in group.members),
                tuple(at_own[(*key, j)] for j in group.members),
                dispersion(pool, self.vectors[key], group.members),
            )


def _merge_rows(
    spec: ValidationSpec,
    pool: PoolStatistics,
    group: PlannedGroup,
    plans: Sequence[Any],
    experts: Sequence[Expert],
    table: pd.DataFrame,
    family: Family,
    pending: _Pending,
) -> list[Row]:
    members, size = list(group.members), len(group.members)
    stats = pool.group(members)
    images = torch.stack([pool.calibration[pool.tasks[j]].images for j in members])
    own = table.iloc[members]
    base_measured = measure(pool, pool.base, members, dict(pool.test))
    rows = []
    for m, method in enumerate(spec.methods):
        vector, point = pending.vectors[group.number, m], pending.points[group.number, m]
        anchors = pool.vectors[members]
        features, products = pool.backbone.products_at((anchors + vector) / 2, vector - anchors, images)
        heads = [pool.readouts[j] for j in members]
        midpoint = Midpoint(
            tuple(h.logits(f).double().numpy() for h, f in zip(heads, features, strict=True)),
            tuple(h.products(f).double().numpy() for h, f in zip(heads, products, strict=True)),
        )
        started = time.perf_counter()
        prices = price(stats, point, midpoint)
        marginal = time.perf_counter() - started
        measured = measure(pool, vector, members, dict(pool.test))
        rows.append(
            {
                "group": group.number,
                "half": group.half,
                "experts": ";".join(plans[i].name for i in members),
                "tasks": ";".join(pool.tasks[i] for i in members),
                "N": size,
                "method": method.name,
                "measured_loss": measured.loss,
                "measured_accuracy": measured.accuracy,
                "measured_se": measured.standard_error,
                "expert_loss": float(own["test_loss"].mean()),
                "expert_accuracy": float(own["test_accuracy"].mean()),
                "base_loss": base_measured.loss,
                "base_accuracy": base_measured.accuracy,
                "merging_cost": measured.loss - float(own["test_loss"].mean()),
                "expert_loss_calibration": float(stats.own_risks().mean()),
                **prices,
                **trivial(stats, point),
                **bound_columns(method, members, experts, pool, table, point.dispersion, family.shares_images),
                **_seconds(pool, size, point.base_residual is None, pending.seconds[group.number, m], marginal),
            }
        )
    return rows


def _seconds(pool: PoolStatistics, size: int, linear: bool, merging: float, marginal: float) -> Row:
    """Seconds to price one merge alone with nothing cached, from measured unit costs, against evaluating the merge."""
    c = pool.costs
    directions = size if linear else size + 1
    forward, product = size * (size + 1) * c.forward, size * directions * c.product
    chord = forward if linear else forward + size * c.product
    base, own = size * c.forward + product, size * c.forward + product
    return {
        "seconds_secant": chord,
        "seconds_tangent_base": base,
        "seconds_tangent_expert": own,
        "seconds_tangent_both": base + own,
        "seconds_secant_tangent": chord + base,
        "seconds_second_order": chord + base,
        "seconds_curvature_endpoint": own,
        "seconds_curvature_segment": own + size * c.product_at,
        "seconds_curvature_gradient": own + size * c.product_at,
        "seconds_midpoint": size * (c.forward + c.product_at),
        "seconds_marginal": marginal,
        "seconds_measure": merging + size * c.forward,
    }


def _sweep_rows(spec: ValidationSpec, pool: PoolStatistics, group: PlannedGroup, test: dict[str, Split]) -> list[Row]:
    members, size = list(group.members), len(group.members)
    values = np.array(spec.sweep_values)
    alphas = np.repeat(values[:, None], size, axis=1)
    stats = pool.group(members)
    predicted = sweep(stats, alphas, ("secant", "tangent_base", "secant_tangent"))
    total = pool.deltas[members].sum(dim=0)
    rows = []
    for k, value in enumerate(values):
        measured = measure(pool, _safe(pool, pool.base + float(value) * total), members, test)
        rows.append(
            {
                "group": group.number,
                "half": group.half,
                "N": size,
                "experts": ";".join(pool.tasks[i] for i in members),
                "lam": float(value),
                "measured_loss": measured.loss,
                "measured_accuracy": measured.accuracy,
                **{f"pred_{kind}": float(risk[k]) for kind, risk in predicted.items()},
            }
        )
    return rows


def _safe(pool: PoolStatistics, vector: Tensor) -> Tensor:
    """Clamp merged running variances at zero, as merging does."""
    from merging.partition import is_variance

    out = vector
    for name, piece in pool.backbone.space.segments():
        if is_variance(name):
            out = out.clone() if out is vector else out
            out[piece] = out[piece].clamp(min=0.0)
    return out


def _line_rows(pool: PoolStatistics, plans: Sequence[Any], a: int, b: int) -> list[Row]:
    members = [a, b]
    stats = pool.group(members)
    rows = []
    for t in np.linspace(0.0, 1.0, 11):
        point = MergePoint(np.array([1.0 - t, t]), None, None, 0.0)
        measured = measure(pool, pool.vectors[a] + float(t) * (pool.vectors[b] - pool.vectors[a]), members, dict(pool.test))
        risks = {
            kind: [
                float(cross_entropy(h, y).mean())
                for h, y in zip(predicted_logits(stats, point, kind), stats.labels, strict=True)
            ]
            for kind in ("secant", "tangent_base")
        }
        for label, pick in (("a", slice(0, 1)), ("b", slice(1, 2)), ("mean", slice(0, 2))):
            rows.append(
                {
                    "expert_a": plans[a].name,
                    "expert_b": plans[b].name,
                    "t": float(t),
                    "task": label,
                    "measured_loss": float(measured.losses[pick].mean()),
                    **{f"pred_{kind}": float(np.mean(risk[pick])) for kind, risk in risks.items()},
                }
            )
    return rows


def _optimal_rows(
    spec: ValidationSpec, pool: PoolStatistics, group: PlannedGroup, plans: Sequence[Any], test: dict[str, Split]
) -> list[Row]:
    """Methods compared on test sets; every choice is made on the calibration images that the predictions use."""
    members, size = list(group.members), len(group.members)
    names = [plans[i].name for i in members]
    stats = pool.group(members)
    calibration = dict(pool.calibration)
    rows = []

    def add(label: str, vector: Tensor, alpha: np.ndarray | None = None, predicted: float | None = None) -> None:
        measured = measure(pool, vector, members, test)
        rows.append(
            {
                "group": group.number,
                "half": group.half,
                "N": size,
                "experts": ";".join(names),
                "method": label,
                "measured_loss": measured.loss,
                "measured_accuracy": measured.accuracy,
                "predicted": predicted,
                "alpha": None if alpha is None else ";".join(f"{v:.4f}" for v in alpha),
            }
        )

    for method in spec.methods:
        vector = merge_vector(pool, members, names, method, spec.seed)
        add(method.name, vector)
        if method.name == "average" or "coefficient" not in {p.name for p in get(method.name).parameters}:
            continue
        best, best_loss = vector, np.inf
        for value in TUNING_GRID:
            tuned = replace_setting(method, value)
            candidate = merge_vector(pool, members, names, tuned, spec.seed)
            loss = measure(pool, candidate, members, calibration).loss
            if loss < best_loss:
                best, best_loss = candidate, loss
        add(f"{method.name}_tuned", best)
    for kind in RISK_OPTIMAL:
        optimum = minimise_risk(stats.fields(kind), bounds=(0.0, 1.0))
        alpha = torch.as_tensor(optimum.alpha, dtype=pool.deltas.dtype)
        vector = _safe(pool, pool.base + alpha @ pool.deltas[members])
        add(f"risk_optimal_{kind}", vector, optimum.alpha, optimum.risk)
    return rows


def replace_setting(method: MethodSpec, coefficient: float) -> MethodSpec:
    """The same method with another coefficient lambda."""
    return method.model_copy(update={"settings": {**method.settings, "coefficient": coefficient}})


def run_architecture(spec: ValidationSpec, architecture: str, folder: Path, progress: Progress) -> Frames:
    """All regimes of one architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    family = digits8(
        seed=spec.seed,
        tasks=spec.family.tasks,
        share_images=spec.family.share_images,
        train_per_task=spec.family.train_per_task,
        pretraining=spec.family.pretraining,
        calibration=spec.family.calibration,
        calibration_per_task=spec.family.calibration_per_task,
        test=spec.family.test,
    )
    parts = [
        run_regime(
            spec, architecture, regime, family, folder, lambda s, d, t, r=regime: progress(f"{r}: {s}", d, t)
        )
        for regime in spec.regimes
    ]
    return join_frames(parts)


def join_frames(parts: Sequence[Frames]) -> Frames:
    """Stack the tables of several regimes or architectures."""
    stacked = {
        name: pd.concat([getattr(part, name) for part in parts], ignore_index=True)
        for name in ("merges", "experts", "coefficients", "lines", "optimal")
    }
    return Frames(**stacked)
