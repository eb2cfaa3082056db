"""``mergebound measure landscape``: the loss along lines and on planes through base, experts and merges, and how flat
it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.commands.about_experts import Chosen, ExpertsCommand, about_experts, telling
from experiments.commands.options import AsJson, Out
from experiments.commands.showing import show
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.measure.landscape.planes import Plane
    from experiments.measure.subject import Subject


def register(group: typer.Typer) -> None:
    """Add the command to the group ``measure``."""
    group.command("landscape", cls=ExpertsCommand)(landscape)


@about_experts()
def landscape(
    about: Chosen,
    part: Annotated[
        str | None,
        typer.Option("--part", help="Images that are scored: test, calibration or train. Default: test where known."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Merges that are marked, comma-separated. Default: all that fit.")
    ] = None,
    to: Annotated[
        str, typer.Option("--lines-to", help="Merges that lines lead to, comma-separated, or `none`.")
    ] = "average",
    lines: Annotated[bool, typer.Option("--lines/--no-lines", help="Lines and error barriers.")] = True,
    points: Annotated[int, typer.Option("--points", min=3, help="Points of a line.")] = 21,
    plane: Annotated[
        str,
        typer.Option("--plane", help="`A,B`: through the base and two experts; `pca`; `none`. Default: the first two."),
    ] = "",
    grid: Annotated[int, typer.Option("--grid", min=3, help="Points along the plane's longer side.")] = 15,
    margin: Annotated[float, typer.Option("--margin", min=0, help="Rim of the plane around the points.")] = 0.25,
    flat: Annotated[bool, typer.Option("--flatness/--no-flatness", help="Sharpness around the points.")] = True,
    flat_images: Annotated[
        int, typer.Option("--flatness-images", min=2, help="Images per task for flatness, which needs gradients.")
    ] = 64,
    radius: Annotated[float, typer.Option("--radius", help="Of the ball of SAM sharpness.")] = 0.05,
    batchnorm: Annotated[
        str,
        typer.Option(
            "--batchnorm",
            help="Running statistics: `merged` as coordinates; estimated again at every point on calibration images, "
            "`reestimated` of all tasks together, or `task` of each task alone.",
        ),
    ] = "merged",
    fast: Annotated[bool, typer.Option("--fast", help="Lower precision where it is faster and close.")] = False,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Rise in error up to which ends count as connected.")
    ] = 0.02,
    resamples: Annotated[int, typer.Option("--resamples", min=2, help="Of the images, for intervals.")] = 1000,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Loss along lines and on a plane through base, experts and merges; error barriers; flatness.

    Heads are the experts' own throughout. Every number has an interval over images, or says what else it covers.
    """
    import dataclasses

    subject = about.open(at_least=2)
    import pandas as pd

    from experiments.measure.landscape.flatness import FlatnessOptions, flatness
    from experiments.measure.landscape.lines import barriers, line, usual_lines
    from experiments.measure.landscape.marks import merge_points
    from experiments.measure.landscape.planes import surface
    from experiments.measure.landscape.scores import evaluator, panel

    chosen = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    ends = [] if to.strip() == "none" else [name.strip() for name in to.split(",") if name.strip()]
    pair = _pair(subject, plane)
    drawn = ("loss", "error") if out is not None else ()
    if drawn:
        from experiments.measure.landscape import figures
    tables: dict[str, pd.DataFrame] = {}
    pictures: dict[str, Any] = {}
    with telling() as tell:
        merges = merge_points(subject, chosen, seed=about.seed)
        made: dict[str, Tensor] = dict(merges.vectors)
        extra = [name for name in ends if name not in made]
        made |= merge_points(subject, extra, seed=about.seed).vectors if extra else {}
        judge = evaluator(
            subject, panel(subject, part, about.images, about.seed),
            batchnorm=batchnorm, path="fast" if fast else "exact",  # type: ignore[arg-type]
        )  # fmt: skip
        if lines:
            found = [
                line(judge, start, end, tasks, points=points, resamples=resamples, tolerance=tolerance, progress=tell)
                for start, end, tasks in usual_lines(subject, {name: made[name] for name in ends})
            ]
            tables["barriers"] = barriers(found)
            tables["lines"] = pd.concat([one.to_frame() for one in found], ignore_index=True)
            for quantity in drawn:
                pictures[f"lines_{quantity}"] = figures.lines_figure(found, quantity)
        if plane != "none":
            shape = _plane(subject, pair, merges.vectors)
            cut = surface(judge, shape, merges.vectors, grid=grid, margin=margin, progress=tell)
            tables["marks"], tables["plane"] = cut.marks_frame(), cut.to_frame()
            for quantity in drawn:
                pictures[f"plane_{quantity}"] = figures.contour_figure(cut, quantity)
        if flat:
            around = {"base": subject.base}
            around |= dict(zip(subject.names, subject.vectors, strict=True))
            around |= {name: made[name] for name in ends}
            own = {name: (i,) for i, name in enumerate(subject.names)}
            measured = flatness(
                subject, panel(subject, part, flat_images, about.seed), around, tasks=own,
                options=dataclasses.replace(FlatnessOptions(), radius=radius), batchnorm=batchnorm,  # type: ignore[arg-type]
                seed=about.seed, progress=tell,
            )  # fmt: skip
            tables["flatness"], tables["rises"] = measured.to_frame(), measured.rises_frame()
            if drawn:
                pictures["flatness"] = figures.flatness_figure(measured)
    captions = [f"{name}: {picture.caption}" for name, picture in pictures.items()]
    left = [f"{name} is not marked: {why}" for name, why in merges.left_out.items()] if plane != "none" else []
    show(
        tables,
        headline=f"{subject.architecture}: {subject.size} experts, {judge.panel.part} images, statistics {batchnorm}, "
        f"network run as {judge.path}, seed {about.seed}",
        notes=[*left, *captions],
        figures={name: picture.figure for name, picture in pictures.items()},
        facts={"part": judge.panel.part, "images": list(judge.panel.sizes), "batchnorm": batchnorm, "path": judge.path,
               "seed": about.seed},
        shown=_SHOWN,
        as_json=as_json,
        out=out,
    )  # fmt: skip


_SHOWN = {
    "barriers": ("line", "task", "length", "loss_barrier", "loss_barrier_low", "loss_barrier_high", "error_barrier",
                 "error_barrier_low", "error_barrier_high", "verdict"),
    "lines": (),
    "marks": ("name", "kind", "u", "v", "relative", "loss", "loss_se", "error", "error_se", "foot_loss"),
    "plane": (),
    "flatness": ("point", "task", "loss", "measure", "value", "standard_error", "low", "high"),
    "rises": (),
}  # fmt: skip


def _pair(subject: Subject, text: str) -> tuple[int, int] | None:
    """The two experts that ``--plane`` names; nothing for ``pca`` and ``none``."""
    if text in ("pca", "none"):
        return None
    names = [name.strip() for name in text.split(",")] if text else list(subject.names[:2])
    unknown = [name for name in names if name not in subject.names]
    if unknown:
        raise MergeboundError(f"--plane: there is no expert {unknown[0]!r}; experts are {', '.join(subject.names)}")
    if len(set(names)) != 2 or len(names) != 2:
        raise MergeboundError(f"--plane {text}: name two different experts, as A,B, or write pca or none")
    return subject.names.index(names[0]), subject.names.index(names[1])


def _plane(subject: Subject, pair: tuple[int, int] | None, merges: Mapping[str, Tensor]) -> Plane:
    """Through the base and two experts, or the principal plane of base, experts and merges."""
    import torch

    from experiments.measure.landscape.lines import shared_size
    from experiments.measure.landscape.planes import plane_through, principal_plane

    size = shared_size(subject)
    if pair is None:
        every = torch.cat([subject.base[None], subject.vectors, *(vector[None] for vector in merges.values())])
        return principal_plane(every, measured=size)
    return plane_through(subject.base, subject.vectors[pair[0]], subject.vectors[pair[1]], measured=size)
