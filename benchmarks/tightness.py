"""How tight every bound is: exact value over bound on random recipes, per theorem and for the published bounds.

Writes ``docs/results/theory/tightness.csv`` (theorems), ``tightness_published.csv`` (our bounds and the published ones
on the same recipes) and ``labels.csv`` (tight or upper, with the instance).  Give a folder to write elsewhere.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from theory import Expert, Merge, Schedule, expert_moments, merge_moments, with_true_constants
from theory.quadratic import QuadraticTask
from theory.scaling import scaling_markdown, scaling_table
from theory.side_by_side import compare
from theory.statement_labels import statements
from theory.tightness import all_ratios, random_batch

BATCHES, CONFIGURATIONS, RECIPES = 160, 64, 400
DEFAULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "theory"


def summary(values: np.ndarray) -> dict[str, str]:
    """Count, share with a finite bound, and median, 5-95 % range and maximum of exact/bound where it is finite.

    An infinite bound overflows, or its form does not cover that configuration of an array that it covers elsewhere.
    """
    finite = values[values != 0]
    low, middle, high = np.quantile(finite, [0.05, 0.5, 0.95])
    numbers = {"finite": finite.size / values.size, "median": middle, "5 %": low, "95 %": high, "max": finite.max()}
    return {"count": str(values.size)} | {name: f"{value:.4g}" for name, value in numbers.items()}


def theorems() -> list[dict[str, str]]:
    found: dict[str, list[np.ndarray]] = {}
    for seed in range(BATCHES):
        for name, values in all_ratios(random_batch(seed, CONFIGURATIONS)).items():
            found.setdefault(name, []).append(values)
    return [{"statement": name} | summary(np.concatenate(values)) for name, values in sorted(found.items())]


def bounded_merge(rng: np.random.Generator) -> tuple[list[QuadraticTask], np.ndarray, list[Expert]]:
    """An average of single-sample SGD experts whose samples are bounded, so that G and B exist on all reachable x.

    Hessians are diagonal, samples are theta +- s per coordinate, and learning rates are at most 1/L: iterates stay in
    the box of base and samples.
    """
    dim, size = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    base = rng.standard_normal(dim)
    theta, s = rng.standard_normal((size, dim)), rng.uniform(0.1, 1.0, (size, dim))
    h = np.exp(rng.uniform(-2, 0.5, (size, dim)))
    reach = np.maximum(np.abs(base), np.abs(theta) + s).max(axis=0)
    tasks, experts = [], []
    for i in range(size):
        task = QuadraticTask(np.diag(h[i]), theta[i], np.diag(s[i] ** 2))
        away = reach + np.abs(theta[i]) + s[i]
        L, n = float(h[i].max()), int(rng.integers(5, 200))
        strong = bool(rng.random() < 0.5)
        recipe = Expert(
            f"e{i}", n=n, batch_size=1, learning_rate=float(np.exp(rng.uniform(np.log(0.01), 0))) / L,
            steps=int(rng.integers(1, 40)), curvature="strongly_convex" if strong else "convex",
            sampling=str(rng.choice(["with_replacement", "without_replacement"])),  # type: ignore[arg-type]
            mu=float(h[i].min()) if strong else None, L=L, G=float(np.linalg.norm(h[i] * away)),
            B=float(0.5 * np.sum(h[i] * away**2)), D_inf=float(2 * np.linalg.norm(h[i] * s[i])),
        )  # fmt: skip
        expert = with_true_constants(task, base, recipe)
        losses = [float(expert.initial_risk)]  # type: ignore[arg-type]
        losses += [
            float(expert_moments(task, base, replace(expert, steps=k)).training_risk)
            for k in range(1, int(recipe.steps))  # type: ignore[arg-type]
        ]
        tasks.append(task)
        experts.append(replace(expert, batch_losses=Schedule(np.maximum(losses, 0.0)), G=recipe.G, B=recipe.B))
    return tasks, base, experts


def published() -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    found: dict[tuple[str, str, str], list[float]] = {}
    vacuous: dict[tuple[str, str, str], int] = {}
    for _ in range(RECIPES):
        tasks, base, experts = bounded_merge(rng)
        size = len(experts)
        merge = Merge(tuple(experts), shared_samples=False, data_independent_choices=True, per_sample_loss=True)
        exact = merge_moments(tasks, base, experts, np.full(size, 1 / size), np.full(size, 1 / size))
        truth = {"training": exact.training_risk, "gap": exact.gap, "risk": exact.risk}
        for row in compare(merge, dimension=base.size).rows:
            if row.value is None:
                continue
            key = (row.quantity, row.name, "ours" if row.ours else "published")
            ratio = float(np.asarray(truth[row.quantity])) / float(row.value)
            found.setdefault(key, []).append(ratio)
            vacuous[key] = vacuous.get(key, 0) + int(np.any(row.vacuous))
    return [
        {"quantity": key[0], "bound": key[1], "whose": key[2]}
        | summary(np.array(values))
        | {"vacuous": f"{vacuous[key] / len(values):.2f}"}
        for key, values in sorted(found.items())
    ]


def labels() -> list[dict[str, str]]:
    rows = []
    for row in statements():
        exact, upper = row.instance()
        rows.append(
            {
                "statement": row.name,
                "source": row.theorem,
                "label": row.label,
                "exact/upper": f"{exact / upper:.4g}",
                "instance": row.where,
                "search": row.search,
            }
        )
    return rows


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path.name}: {len(rows)} rows")


SCALING = "# Exponents of every term per hyperparameter and regime"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "tightness.csv", theorems())
    write(folder / "tightness_published.csv", published())
    write(folder / "labels.csv", labels())
    (folder / "scaling.md").write_text(f"{SCALING}\n\n{scaling_markdown(scaling_table())}\n")
    print("scaling.md")


if __name__ == "__main__":
    main()
