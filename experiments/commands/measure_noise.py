"""``mergebound measure noise``: gradients, their noise and gaps, one-step factors, and the bounds made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.commands.about_experts import Chosen, ExpertsCommand, about_experts
from experiments.commands.options import AsJson, Checkpoints, Out, TrainingSamples
from experiments.commands.showing import show

if TYPE_CHECKING:
    import pandas as pd

    from experiments.measure.noise.objective import Point
    from experiments.measure.subject import Subject

_CONSTANTS = ("expert", "constant", "value", "low", "high", "samples", "how")
_DRIFT = ("expert", "form", "part", "measured", "bound", "ratio", "violated", "why")
_BOUNDS = ("subject", "statement", "bounds", "value", "inputs", "why")
_TASKS = ("point", "task", "other", "norm", "other_norm", "cosine", "low", "high", "heterogeneity")


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command("noise", cls=ExpertsCommand)(noise)


@about_experts()
def noise(
    about: Chosen,
    samples: TrainingSamples = 256,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Samples of each side for the largest gap.")] = 64,
    checkpoints: Checkpoints = 3,
    batches: Annotated[
        int, typer.Option("--batches", min=0, help="Batches at base and expert for the one-step factor; 0: none.")
    ] = 4,
    curvature: Annotated[
        int, typer.Option("--curvature-samples", min=1, help="Samples whose own Hessians give L.")
    ] = 16,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of the one-step factor, for checkpoints without a run.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Of the one-step factor, for checkpoints without a run.")
    ] = 32,
    memory: Annotated[int, typer.Option("--memory", min=1, help="Megabytes for per-sample gradients.")] = 256,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Gradients of every expert's loss at base, checkpoints and expert: norms, noise, gaps between samples, one-step
    factors, cosines between tasks; and every bound of the theory next to the constants that it is made of."""
    subject = about.open()
    from experiments.measure.noise.constants import constants_of

    path = about.checkpoints(subject, checkpoints)
    constants = constants_of(
        subject,
        samples=samples,
        pairs=pairs,
        checkpoints=path,
        curvature_samples=curvature,
        batches=batches,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=about.seed,
        memory=memory * 2**20,
    )
    tables: dict[str, pd.DataFrame] = {"constants": constants.to_frame(), "points": constants.points_frame()}
    shown: dict[str, tuple[str, ...]] = {"constants": _CONSTANTS, "points": ()}
    pairs_of = [e.steps.to_frame().assign(expert=e.name) for e in constants.experts if e.steps is not None]
    if pairs_of:
        import pandas as pd

        tables["one_step"] = pd.concat(pairs_of, ignore_index=True)
        shown["one_step"] = ()
    tables |= _tasks(subject, path, samples, about.seed, memory * 2**20, shown)
    notes = list(constants.notes)
    if all(run is not None for run in subject.runs):
        from experiments.measure.noise.bounds import bounds_table
        from experiments.measure.noise.drift import drift_table

        tables["drift"] = drift_table(subject, constants)
        shown["drift"] = _DRIFT
        tables["bounds"] = bounds_table(subject, constants)
        shown["bounds"] = _BOUNDS
        violated = int(tables["drift"]["violated"].sum())
        if violated:
            notes.append(f"{violated} rows of the drift table lie above their bound: see their assumptions")
    else:
        notes.append("how the experts were trained is not known: no clock, hence no Theorems 2 and 3; open a store")
    show(
        tables,
        headline=f"{subject.architecture}: gradients of {subject.size} experts, seed {about.seed}; tier estimated, "
        "95 % intervals",
        notes=notes,
        facts={"seed": about.seed, "tier": "estimated", "experts": list(subject.names)},
        shown=shown,
        as_json=as_json,
        out=out,
    )


def _tasks(
    subject: Subject,
    path: list[tuple[Point, ...]],
    samples: int,
    seed: int,
    memory: int,
    shown: dict[str, Any],
) -> dict[str, pd.DataFrame]:
    """Gradients of all tasks at common points, and every expert's own along its way."""
    from experiments.measure.noise.report import gradients_along, gradients_between

    tables = {"along_training": gradients_along(subject, path, samples=samples, seed=seed, memory=memory)}
    if subject.size > 1:
        tables["tasks"] = gradients_between(subject, path, samples=samples, seed=seed, memory=memory)
        shown["tasks"] = _TASKS
    return tables
