"""``mergebound measure curvature``: Hessians, Gauss-Newton matrices, Gram matrices of task vectors, smoothness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.commands.about_experts import Chosen, ExpertsCommand, about_experts
from experiments.commands.options import AsJson, Out
from experiments.commands.showing import show
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.measure.curvature.report import CurvatureReport

_SHOWN = {
    "eigenvalues": ("task", "end", "index", "eigenvalue", "residual", "limit"),
    "traces": ("task", "part", "trace", "trace_low", "trace_high"),
    "density": (),
    "segments": ("task", "segment", "length", "largest_curvature", "A", "A_low", "A_high", "Lambda"),
    "segment_points": (),
    "gram": ("task", "anchor", "expert", "layer", "other", "other_layer", "value", "standard_error"),
    "clipped": (),
    "smoothness": ("task", "what", "where", "smallest", "largest", "largest_limit"),
    "global_smoothness": ("task", "coordinates", "L", "L_of_one_image", "tier"),
}
_LONG = 40


def register(group: typer.Typer) -> None:
    """Add ``curvature`` to the group."""
    group.command("curvature", cls=ExpertsCommand)(curvature)


@about_experts(images=128, seed_first=True)
def curvature(
    about: Chosen,
    parts: Annotated[
        str,
        typer.Option(
            "--parts", help="Comma-separated: spectrum, trace, density, segments, gram, smoothness, precision, or all."
        ),
    ] = "spectrum,trace,segments,gram,smoothness",
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="Of spectrum, trace and smoothness: hessian, gauss_newton, fisher, sampled_fisher, empirical_fisher.",
        ),
    ] = "hessian",
    coordinates: Annotated[
        str,
        typer.Option(
            "--coordinates",
            help="Of the same: trained (BatchNorm's running statistics stay fixed) or merged (all coordinates).",
        ),
    ] = "trained",
    gram_kind: Annotated[str, typer.Option("--gram-kind", help="Of the Gram matrices.")] = "gauss_newton",
    by: Annotated[str, typer.Option("--by", help="Coefficients: all, layer (per block) or tensor.")] = "all",
    anchors: Annotated[
        str,
        typer.Option("--anchors", help="Of the Gram matrices: own, base, average, own_average, base_own."),
    ] = "own,average",
    eigenvalues: Annotated[int, typer.Option("--eigenvalues", min=1, help="How many at the top.")] = 1,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Lanczos products.")] = 30,
    products: Annotated[int, typer.Option("--products", min=2, help="Products of each trace.")] = 24,
    trace_method: Annotated[
        str, typer.Option("--trace-method", help="hutchinson (also per layer), hutch++ or xtrace.")
    ] = "hutchinson",
    probes: Annotated[int, typer.Option("--probes", min=1, help="Start vectors of the density.")] = 2,
    points: Annotated[int, typer.Option("--points", min=2, help="Points on each segment.")] = 5,
    batches: Annotated[int, typer.Option("--batches", min=0, help="Mini-batches whose smoothness is measured.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Their size.")] = 16,
    head: Annotated[bool, typer.Option("--head", help="Spectrum, trace and density with the expert's head.")] = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Curvature of every task's risk: `mergebound measure curvature --store RUNS --query "learning_rate < 0.1"`.

    Extreme eigenvalues (residuals, and a limit that holds with 99 %), traces with standard errors, curvature on the
    segments to the average, the Gram matrices that price every choice of coefficients (with `--out`, also the
    coefficients that minimise the prediction, for `mergebound merge --method curvature_optimal`), and smoothness.
    """
    from experiments.measure.curvature.report import WANTED, Options, measure_curvature

    wanted = WANTED if parts.strip() == "all" else tuple(p.strip() for p in parts.split(",") if p.strip())
    chosen: dict[str, Any] = {
        "kind": kind,
        "coordinates": coordinates,
        "gram_kind": gram_kind,
        "trace_method": trace_method,
    }
    options = Options(
        wanted=tuple(wanted),
        by=by,
        anchors=tuple(a.strip() for a in anchors.split(",") if a.strip()),
        eigenvalues=eigenvalues,
        steps=steps,
        probes=probes,
        products=products,
        points=points,
        batches=batches,
        batch_size=batch_size,
        head=head,
        seed=about.seed,
        **chosen,
    )
    subject = about.open()
    report = measure_curvature(subject, options)
    count = len(subject.calibration[0])
    headline = (
        f"{subject.architecture}: {subject.size} experts, {subject.base.numel():,} merged coordinates, {count} images "
        f"per task, seed {about.seed}; losses in nats, tier {report.tier}, intervals 95 %"
    )
    shown = {name: columns for name, columns in _SHOWN.items() if name in report.tables}
    if "gram" in report.tables and len(report.tables["gram"]) > _LONG:
        shown["gram"] = ()
    show(
        report.tables,
        headline=headline,
        notes=report.notes,
        figures=_figures(report) if out is not None else None,
        shown=shown,
        as_json=as_json,
        out=out,
    )
    if out is not None and report.coefficients is not None:
        from merging.statistics import save_coefficients

        path = out / "curvature_optimal.safetensors"
        try:
            save_coefficients(path, report.coefficients, method="curvature_optimal", images=count, seed=about.seed)
        except OSError as error:
            raise MergeboundError(f"--out {out}: cannot be written ({error.strerror or error})") from error
        if not as_json:
            typer.echo(f"written: {path}")


def _figures(report: CurvatureReport) -> dict[str, Figure]:
    """Curvature along the segments, and spectral densities."""
    from matplotlib.figure import Figure

    figures: dict[str, Figure] = {}
    if report.segments:
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for segment in report.segments:
            frame = segment.to_frame()
            (line,) = axes.plot(frame["t"], frame["curvature"], marker="o", label=segment.name)
            half = 1.96 * frame["curvature_error"]
            axes.fill_between(
                frame["t"], frame["curvature"] - half, frame["curvature"] + half, color=line.get_color(), alpha=0.2
            )
        axes.set_xlabel("t, from the expert (0) to the average (1)")
        axes.set_ylabel("curvature of the task's loss, nats")
        axes.legend()
        figures["segment_curvature"] = figure
    if report.densities:
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for name, part in report.tables["density"].groupby("task", sort=False):
            axes.plot(part["eigenvalue"], part["density"], label=str(name))
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-8)
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density (stochastic Lanczos quadrature)")
        axes.legend()
        figures["spectral_density"] = figure
    return figures
