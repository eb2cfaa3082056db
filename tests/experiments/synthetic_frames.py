"""Synthetic result frames with a known truth, in the schema of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

METHODS = ("average", "task_arithmetic", "ties", "dare")


@dataclass(frozen=True)
class Frames:
    merges: pd.DataFrame
    experts: pd.DataFrame
    coefficients: pd.DataFrame
    lines: pd.DataFrame
    optimal: pd.DataFrame


def make_frames(
    seed: int = 0,
    regimes: tuple[str, ...] = ("mild", "harsh"),
    architectures: tuple[str, ...] = ("vit", "resnet_gn", "resnet_bn"),
    experts_per_half: int = 24,
    groups_per_size: int = 12,
    best: str = "tangent_both",
) -> Frames:
    """``best`` is the prediction planted as most accurate; secant below, tangent at the base above."""
    rng = np.random.default_rng(seed)
    merges, experts, coefficients, lines, optimal = [], [], [], [], []
    for regime in regimes:
        hurt = 0.25 if regime == "mild" else 1.6
        for architecture in architectures:
            pool = []
            for k in range(2 * experts_per_half):
                lr = 10 ** rng.uniform(-3, -1)
                steps = int(rng.choice([40, 80, 160, 320]))
                effect = 0.5 * np.log10(lr * 30) + 0.35 * np.log2(steps / 80) + 0.15 * rng.normal()
                pool.append(
                    {
                        "regime": regime,
                        "architecture": architecture,
                        "seed": seed,
                        "expert": f"e{k:02d}",
                        "task": f"task{k % 8}",
                        "half": "A" if k < experts_per_half else "B",
                        "learning_rate": lr,
                        "steps": steps,
                        "batch_size": int(rng.choice([8, 16, 32, 64])),
                        "data_share": rng.uniform(0.2, 1.0),
                        "n": 400,
                        "momentum": rng.choice([0.0, 0.5, 0.9]),
                        "weight_decay": rng.choice([0.0, 1e-4, 1e-2]),
                        "training_loss": 0.1,
                        "calibration_loss": 0.3 + 0.05 * rng.normal(),
                        "test_loss": 0.3 + 0.05 * rng.normal(),
                        "test_accuracy": 0.9,
                        "drift": np.exp(effect),
                        "drift_bound": np.exp(effect) * 4,
                        "seconds": 1.0,
                        "effect": effect,
                    }
                )
            experts += pool
            group = 0
            for half in ("A", "B"):
                members = [row for row in pool if row["half"] == half]
                for size in (2, 4, 6, 8):
                    for _ in range(groups_per_size):
                        chosen = [members[i] for i in rng.choice(len(members), size, replace=False)]
                        own = float(np.mean([row["test_loss"] for row in chosen]))
                        shared = hurt * np.exp(np.mean([row["effect"] for row in chosen])) * size**0.5 * 0.6
                        head = {"regime": regime, "architecture": architecture, "group": group, "N": size}
                        names = ";".join(str(row["expert"]) for row in chosen)
                        base = 2.0
                        for m, method in enumerate(METHODS):
                            cost = shared * (1 + 0.12 * m) * np.exp(0.05 * rng.normal())
                            measured = own + cost
                            gap = 0.1 + 0.5 * cost
                            row = head | {
                                "seed": seed,
                                "half": half,
                                "experts": names,
                                "tasks": ";".join(str(item["task"]) for item in chosen),
                                "method": method,
                                "measured_loss": measured,
                                "measured_accuracy": float(np.exp(-0.4 * measured)),
                                "measured_se": 0.02 * measured,
                                "expert_loss": own,
                                "expert_accuracy": 0.9,
                                "base_loss": base,
                                "base_accuracy": 0.3,
                                "merging_cost": cost,
                                "expert_loss_calibration": own + 0.01 * rng.normal(),
                            }
                            noise = {
                                "secant": -0.5 * gap + 0.05 * rng.normal(),
                                "tangent_base": 0.6 * gap + 0.05 * rng.normal(),
                                "tangent_expert": 0.3 * gap + 0.1 * rng.normal(),
                                "tangent_both": 0.25 * gap + 0.1 * rng.normal(),
                                "secant_tangent": 0.2 * gap + 0.15 * rng.normal(),
                                "curvature_endpoint": 0.5 * rng.normal() - 0.3,
                            }
                            noise[best] = 0.02 * rng.normal()
                            row |= {f"pred_{name}": measured * np.exp(value) for name, value in noise.items()}
                            row |= {f"seconds_{name}": 0.05 for name in noise}
                            terms = np.sqrt([0.1, measured * 2 * size, measured / size])
                            row |= {
                                "cert_output_range": measured * np.exp(0.8 + 0.4 * rng.normal()),
                                "bound_master_checkpoints": measured * 6 * np.exp(0.3 * rng.normal()),
                                "bound_master_logs": terms.sum() ** 2,
                                "vacuous_master_checkpoints": bool(rng.uniform() < 0.3),
                                "vacuous_master_logs": True,
                                "term_training": terms[0],
                                "term_dispersion": terms[1],
                                "term_instability": terms[2],
                                "trivial_expert_risk": own,
                                "trivial_base_risk": base,
                                "trivial_V": shared * np.exp(0.3 * rng.normal()),
                                "trivial_N": size,
                                "seconds_measure": 0.2,
                            }
                            merges.append(row)
                        methods = {
                            "average": 1.0,
                            "task_arithmetic_tuned": 0.9,
                            "ties": 1.1,
                            "dare": 1.3,
                            "risk_optimal_secant": 0.75,
                            "risk_optimal_tangent": 0.8,
                            "risk_optimal_both": 0.7,
                        }
                        for method, factor in methods.items():
                            loss = own + shared * factor * np.exp(0.05 * rng.normal())
                            optimal.append(
                                head
                                | {
                                    "half": half,
                                    "method": method,
                                    "measured_loss": loss,
                                    "measured_accuracy": float(np.exp(-0.4 * loss)),
                                }
                            )
                        if group % groups_per_size < 3:
                            for lam in np.linspace(0, 1.2, 9):
                                loss = own + 1.5 * (1 - lam * size**0.5 / 1.6) ** 2 + shared * lam
                                coefficients.append(
                                    head
                                    | {
                                        "experts": names,
                                        "lam": lam,
                                        "measured_loss": loss,
                                        "pred_secant": loss * np.exp(-0.3 * lam),
                                        "pred_tangent_base": loss * np.exp(0.6 * lam),
                                        "pred_secant_tangent": loss * np.exp(0.1 * lam),
                                    }
                                )
                        group += 1
            for t in np.linspace(0, 1, 11):
                for task, center in (("a", 0.0), ("b", 1.0), ("mean", 0.5)):
                    loss = 0.3 + hurt * ((t - center) ** 2 if task != "mean" else 0.25 + (t - 0.5) ** 2)
                    bump = t * (1 - t)
                    lines.append(
                        {
                            "regime": regime,
                            "architecture": architecture,
                            "expert_a": "e00",
                            "expert_b": "e01",
                            "t": t,
                            "task": task,
                            "measured_loss": loss,
                            "pred_secant": loss * np.exp(-1.2 * bump),
                            "pred_tangent_base": loss * np.exp(1.6 * bump),
                        }
                    )
    experts_frame = pd.DataFrame(experts).drop(columns="effect")
    return Frames(
        *(pd.DataFrame(rows) for rows in (merges,)),
        experts_frame,
        *(pd.DataFrame(rows) for rows in (coefficients, lines, optimal)),
    )
