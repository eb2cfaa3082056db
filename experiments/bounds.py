"""The master bound of merges of networks, and the table of experts with what the bound needs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.collected import PoolStatistics
from experiments.experts import Expert
from experiments.measured import measure
from experiments.spec import MethodSpec, ValidationSpec
from theory.drift import buffer_weights
from theory.risk import network_bound


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
    trained_heads: bool,
) -> dict[str, Any]:
    """The master bound of one merge from the checkpoints (V and drift measured) and from the training logs (6(d))."""
    rows = drifts.iloc[list(members)]
    risks = np.array([experts[j].training_loss for j in members])
    settings: dict[str, Any] = {"method": method.name, "trained_heads": trained_heads, "shared_samples": shares_images}
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
    logged = rows["drift_bound"].to_numpy()
    private = rows["head_drift_bound"].to_numpy()
    if method.name in ("ties", "dare"):
        settings["dispersion"] = _non_linear_dispersion(method, members, pool, rows, settings, risks, private)
    from_logs = network_bound(risks, stiffness, logged, private_drift=private, **settings)
    terms = {f"term_{term.name}": float(term.value) for term in from_logs.terms}
    chance = float(np.log(pool.classes))
    return {
        "bound_master_checkpoints": float(measured.value),
        "bound_master_logs": float(from_logs.value),
        "vacuous_master_checkpoints": bool(measured.value >= chance),
        "vacuous_master_logs": bool(from_logs.value >= chance),
        **terms,
    }


def _non_linear_dispersion(
    method: MethodSpec,
    members: Sequence[int],
    pool: PoolStatistics,
    rows: pd.DataFrame,
    settings: Mapping[str, Any],
    risks: np.ndarray,
    private: np.ndarray,
) -> float:
    """Bound on E V of TIES or DARE from the logs: the shared part from its drift, BatchNorm's statistics (which these
    methods average) as measured."""
    cut = pool.backbone.space.offsets[len(pool.backbone.partition.shared)]
    buffers = pool.deltas[list(members), cut:].double()
    spread = float((buffers - buffers.mean(dim=0)).square().sum(dim=1).mean()) if buffers.numel() else 0.0
    shared = np.sqrt(np.maximum(rows["drift_bound"].to_numpy() ** 2 - buffers.square().sum(dim=1).numpy(), 0.0))
    if method.name == "ties":  # |merged entry| <= lambda max_i |Delta_i|, hence |M - x_0|^2 <= lambda^2 sum d_i^2
        scale = float(method.settings.get("coefficient", 1.0))
        return float(np.mean((scale * np.sqrt((shared**2).sum()) + shared) ** 2)) + spread
    bound = network_bound(risks, pool.smoothness[list(members)], shared, private_drift=private, **settings)
    return float(bound.V) + spread


def expert_table(
    spec: ValidationSpec,
    architecture: str,
    regime: str,
    experts: Sequence[Expert],
    pool: PoolStatistics,
    base: Mapping[str, Tensor],
) -> pd.DataFrame:
    """One row per expert: hyperparameters, risks, drift measured and from its log."""
    rows = []
    head = pool.backbone.head
    for j, expert in enumerate(experts):
        task, hyper = expert.plan.task, expert.plan.hyper
        own = measure(pool, pool.vectors[j], [j], pool.test)
        calibration = measure(pool, pool.vectors[j], [j], pool.calibration)
        shared_bound, head_bound = logged_drift(expert)
        head_drift = 0.0
        buffers = pool.deltas[j, pool.backbone.space.offsets[len(pool.backbone.partition.shared)] :]
        shared_bound = float(np.hypot(shared_bound, float(buffers.double().norm())))  # no gradient moves statistics
        if head:
            squares = [
                (expert.state[name] - base[name]).double().square().sum() for name in base if name.startswith(head)
            ]
            head_drift = float(torch.stack(squares).sum().sqrt())
        else:  # the head is merged too: one vector
            shared_bound, head_bound = float(np.hypot(shared_bound, head_bound)), 0.0
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
