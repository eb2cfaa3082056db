"""``mergebound bound``: the master bound of a recipe file, term by term."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from theory import Bound


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command("bound")
    def bound(
        recipe: Annotated[Path, typer.Option("--recipe", "-r", help="Recipe file; see docs/examples/recipe.yaml.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
        latex: Annotated[bool, typer.Option("--latex", help="Also print the inequality in LaTeX.")] = False,
    ) -> None:
        """Bound the risk of a merged model from how its experts were trained.

        Reads a **recipe** (data sizes, learning rates, steps, batch sizes, and constants of the loss) and prints the
        master bound: training risk, dispersion and instability, with the formula, the tier and every assumption.

        Example: `mergebound bound --recipe docs/examples/recipe.yaml`
        """
        from experiments.recipe_file import read_recipe
        from theory import RecipeError, master_bound

        merge = read_recipe(recipe)
        try:
            result = master_bound(merge)
        except RecipeError as error:
            raise type(error)(f"{recipe}: {error}") from error
        if as_json:
            typer.echo(json.dumps(bound_as_dict(result), indent=2, allow_nan=False))
            return
        console = Console()
        console.print(result.explain(), markup=False, highlight=False, soft_wrap=True)
        if latex:
            console.print("\n" + result.latex(), markup=False, highlight=False, soft_wrap=True)


def bound_as_dict(bound: Bound) -> dict[str, Any]:
    """A bound of one configuration as plain JSON values; infinite numbers become the string ``"inf"``."""

    def plain(value: Any) -> float | str | None:
        if value is None:
            return None
        number = float(value)
        return "inf" if number == float("inf") else number

    return {
        "value": plain(bound.value),
        "tier": bound.tier,
        "terms": [
            {
                "name": term.name,
                "square_root": plain(term.value),
                "share": plain(term.share),
                "formula": term.formula,
                "source": term.source,
            }
            for term in bound.terms
        ],
        "dispersion": {
            "V": plain(bound.V),
            "effective_V": plain(bound.effective_V),
            "form": bound.dispersion_form,
        },
        "experts": [
            {
                "name": row.name,
                "risk": plain(row.risk),
                "risk_form": row.risk_form,
                "drift": plain(row.drift),
                "drift_form": row.drift_form,
                "epsilon": plain(row.epsilon),
                "epsilon_form": row.epsilon_form,
                "sensitivity": plain(row.sensitivity),
            }
            for row in bound.experts
        ],
        "assumptions": [
            {
                "name": item.name,
                "statement": item.statement,
                "verdict": item.verdict,
                "covered": item.covered,
                "why": item.why,
            }
            for item in bound.assumptions
        ],
        "measured": list(bound.measured),
        "latex": bound.latex(),
    }
