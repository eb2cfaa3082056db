"""``mergebound design``: hyperparameters, coefficients or data shares that minimise the bound, or meet a target."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from theory import Budget, Design


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command("design")
    def design(
        recipe: Annotated[Path, typer.Option("--recipe", "-r", help="Recipe file; see docs/examples/recipe.yaml.")],
        free: Annotated[
            list[str],
            typer.Option(
                "--free",
                "-f",
                help="What may change: all.steps=10:5000 (one number) or each.steps=10:5000 (per expert).",
            ),
        ],
        budget: Annotated[
            list[str] | None,
            typer.Option("--budget", "-b", help="Limit of all experts together: samples=1e6, steps=..., data=..."),
        ] = None,
        target: Annotated[
            float | None, typer.Option("--target", help="Find the cheapest recipe whose bound is at most this.")
        ] = None,
        minimal_risk: Annotated[
            float, typer.Option("--minimal-risk", help="Smallest possible risk; the target is for the excess over it.")
        ] = 0.0,
        cost: Annotated[str, typer.Option("--cost", help="What is cheap: samples, steps or data.")] = "samples",
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the report.")] = False,
    ) -> None:
        """Choose learning rates, steps, batch sizes, data shares or coefficients that minimise the master bound.

        The recipe gives everything that is fixed, and constants of the loss (no `training_risk`: the bound on it must
        follow, so give `initial_risk`, `sigma`, `minimal_risk` and `pl_constant`, `mu` or `minimizer_distance`).

        Example: `mergebound design -r recipe.yaml --free learning_rate=0.001:0.5 --free each.steps=10:5000
        --budget samples=1e6`
        """
        from experiments.recipe_file import read_recipe
        from theory import RecipeError
        from theory import design as solve

        merge = read_recipe(recipe)
        limits = dict(_limits(item) for item in free)
        try:
            found = solve(
                merge,
                limits,
                budgets=[_budget(item) for item in budget or ()],
                target=target,
                minimal_risk=minimal_risk,
                cost=_budget(f"{cost}=inf"),
            )
        except RecipeError as error:
            raise type(error)(f"{recipe}: {error}") from error
        if as_json:
            typer.echo(json.dumps(design_as_dict(found), indent=2, allow_nan=False))
            return
        Console().print(found.explain(), markup=False, highlight=False, soft_wrap=True)


def _limits(text: str) -> tuple[str, tuple[float, float]]:
    from theory import RecipeError

    name, _, ends = text.partition("=")
    try:
        low, high = (float(end) for end in ends.split(":"))
    except ValueError as error:
        raise RecipeError(f"--free {text}: has no two limits; write it as steps=10:5000") from error
    return name.strip(), (low, high)


def _budget(text: str) -> Budget:
    from theory import Budget, RecipeError

    kind, _, limit = text.partition("=")
    if kind not in ("samples", "steps", "data"):
        raise RecipeError(f"--budget or --cost {text.partition('=inf')[0]}: choose samples, steps or data")
    try:
        return Budget(kind, float(limit))  # type: ignore[arg-type]
    except ValueError as error:
        raise RecipeError(f"--budget {text}: has no limit; write it as samples=1e6") from error


def design_as_dict(found: Design) -> dict[str, Any]:
    """A design as plain JSON values; infinite numbers become strings."""

    def plain(value: float | None) -> float | str | None:
        return value if value is None or math.isfinite(value) else str(value)

    return {
        "value": plain(float(found.bound.value)),
        "tier": found.bound.tier,
        "choices": dict(found.choices),
        "cost": {kind: plain(value) for kind, value in found.cost.items()},
        "active_term": found.active_term,
        "limits": list(found.limits),
        "shadow_prices": [
            {"name": item.name, "price": plain(item.price), "elasticity": plain(item.elasticity)}
            for item in found.shadow_prices
        ],
        "sensitivities": [
            {"expert": item.expert, "field": item.field, "elasticity": plain(item.elasticity), "role": item.role}
            for item in found.sensitivities
        ],
        "lower_bound": plain(found.lower_bound),
        "gap": plain(found.gap),
        "evidence": found.evidence,
        "least_training": None if found.least_training is None else found.least_training.explain(),
    }
