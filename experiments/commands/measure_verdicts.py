"""``mergebound measure verdicts``: which assumptions of the theory hold for these experts, and which tier follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from experiments.commands.about_experts import Chosen, ExpertsCommand, about_experts, telling
from experiments.commands.options import AsJson, Checkpoints, Out, TrainingSamples
from experiments.commands.showing import show
from theory.errors import MergeboundError

if TYPE_CHECKING:
    pass

_SHOWN: dict[str, tuple[str, ...]] = {
    "summary_of_statements": ("about", "statement", "standing", "tier", "broken", "open"),
    "summary_of_assumptions": ("about", "key", "name", "verdict", "seen", "why"),
    "statements": (),
    "assumptions": (),
    "evidence": (),
    "cosines": ("first", "second", "value", "low", "high", "null", "chance"),
}


def register(group: typer.Typer) -> None:
    """Add ``verdicts`` to the group."""
    group.command("verdicts", cls=ExpertsCommand)(verdicts)


@about_experts(images=128)
def verdicts(
    about: Chosen,
    samples: TrainingSamples = 128,
    checkpoints: Checkpoints = 2,
    batches: Annotated[
        int, typer.Option("--batches", min=0, help="Batches at base and expert for their curvature.")
    ] = 2,
    curvature: Annotated[
        int, typer.Option("--curvature-samples", min=1, help="Samples whose own Hessians are looked at.")
    ] = 8,
    lanczos: Annotated[int, typer.Option("--lanczos", min=2, help="Products for the ends of each spectrum.")] = 20,
    recipe_only: Annotated[
        bool, typer.Option("--recipe-only", help="Judge recipes, images and checkpoints: seconds, no gradients.")
    ] = False,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Coefficient of every task vector in the merge; default 1/N.")
    ] = None,
    chosen_on: Annotated[
        str, typer.Option("--chosen-on", help="What coefficients were chosen on: nothing, held-out, train, unknown.")
    ] = "nothing",
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of the step-size conditions, for checkpoints.")
    ] = None,
    smoothness: Annotated[
        float | None, typer.Option("--L", min=0, help="Claimed smoothness, held against all.")
    ] = None,
    lipschitz: Annotated[float | None, typer.Option("--G", min=0, help="Claimed bound on gradients.")] = None,
    bound: Annotated[float | None, typer.Option("--B", min=0, help="Claimed bound on losses.")] = None,
    sigma: Annotated[float | None, typer.Option("--sigma", min=0, help="Claimed bound on the gradient noise.")] = None,
    mu: Annotated[float | None, typer.Option("--mu", min=0, help="Claimed PL constant.")] = None,
    least: Annotated[
        float | None, typer.Option("--least", help="F*, the smallest training objective, for the PL ratio.")
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Does the theory apply: `mergebound measure verdicts --store RUNS --query "task == 'mnist'" --out FOLDER`.

    Each assumption of each theorem with verdict (holds, violated, unknown), the numbers behind it, and which bounds it
    feeds with which tier. With `--out`: tables as CSV and a page, `verdicts.html`.
    """
    from experiments.measure.verdicts.page import headline, lines_of, write
    from experiments.measure.verdicts.report import Options, Stated, verdicts_of

    subject = about.open()
    options = Options(
        measure=not recipe_only,
        samples=samples,
        pairs=min(samples, 32),
        curvature_samples=curvature,
        lanczos=lanczos,
        batches=batches,
        coefficients=scale,
        chosen_on=chosen_on,
        learning_rate=learning_rate,
        last_checkpoint=True if about.store is not None else None,
        seed=about.seed,
    )
    claims = Stated(L=smoothness, G=lipschitz, B=bound, sigma=sigma, mu=mu, least=least)
    path = [] if recipe_only else about.checkpoints(subject, checkpoints)
    with telling() as tell:
        found = verdicts_of(subject, options=options, stated=claims, checkpoints=path, progress=tell)
    tables = {
        "summary_of_statements": found.summary("statements"),
        "summary_of_assumptions": found.summary("assumptions"),
        "statements": found.statements_frame(),
        "assumptions": found.to_frame(),
        "evidence": found.evidence_frame(),
    }
    if found.pairs:
        tables["cosines"] = found.cosines_frame()
    page = None
    if out is not None:
        try:
            page = write(found, out)
        except OSError as error:
            raise MergeboundError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    show(
        tables,
        headline=f"{subject.architecture}, {headline(found)}; seed {about.seed}",
        notes=[*lines_of(found), *found.notes],
        facts={"seed": about.seed, "experts": list(found.names)},
        shown={name: columns for name, columns in _SHOWN.items() if name in tables},
        as_json=as_json,
        out=out,
    )
    if page is not None and not as_json:
        typer.echo(f"written: {page}")
