"""``mergebound predict``: the risk of merging the user's own checkpoints, without evaluating a merge."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.commands.merge_settings import read_settings
from experiments.commands.options import AsJson, several_values
from merging.config import expert_names
from merging.errors import CheckpointError, MethodError
from merging.registry import get
from merging.writer import atomic_file
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.predict import Estimate, MethodPrediction, Options, Report

SeveralValues = several_values("--experts", "--data")
"""The class of a command whose options ``--experts`` and ``--data`` take all values up to the next option."""
WIDTH, NARROW = 118, 100
"""Columns where the output is not a terminal; terminals below NARROW do not see every method's bound."""
_MARKS = {"narrow": "[green]narrow[/]", "medium": "[yellow]medium[/]", "wide": "[bold red]wide[/]", "unknown": "-"}


def register(app: typer.Typer) -> None:
    """Add ``predict`` to the command line."""
    app.command("predict", cls=SeveralValues)(predict)


def predict(
    base: Annotated[Path, typer.Option("--base", help="The checkpoint the experts were fine-tuned from.")],
    experts: Annotated[list[Path], typer.Option("--experts", help="Fine-tuned checkpoints: `--experts E1 E2 ...`.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            help="One data set per expert, in order: an `.npz` with `x_test` and `y_test` (or another split) or "
            "a folder with one sub-folder of images per class.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="A timm model name, or vit/resnet_gn/resnet_bn; default: as the checkpoints say."),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option("--model-option", help="An option of timm's constructor, as `img_size=32`; repeatable."),
    ] = None,
    private: Annotated[
        list[str] | None,
        typer.Option(
            "--private",
            help="Glob pattern of tensors that stay each expert's own; repeatable. Default: the classifier.",
        ),
    ] = None,
    shared_head: Annotated[bool, typer.Option("--shared-head", help="Merge the head too (same-task soups).")] = False,
    images: Annotated[int, typer.Option("--images", help="Calibration images per data set, drawn at random.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Names the images drawn, and DARE's masks.")] = 0,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Which split of the data; default: the first of val, test, train that exists."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Pixels, where the network was trained at another size.")
    ] = None,
    mean: Annotated[str | None, typer.Option("--mean", help="Normalisation, as `0.5` or `0.49,0.46,0.41`.")] = None,
    std: Annotated[str | None, typer.Option("--std", help="Normalisation, as `0.5` or `0.23,0.22,0.23`.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Comma-separated; see `mergebound methods`. Default: all that fit.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A method's parameter, as `ties.density=0.2`; repeatable.")
    ] = None,
    coefficients: Annotated[
        str, typer.Option("--coefficients", help="Scales of task arithmetic, comma-separated.")
    ] = "0.3",
    alpha: Annotated[
        list[str] | None,
        typer.Option("--alpha", help="Coefficients of your own, one per expert, as `0.3,0.7`; repeatable."),
    ] = None,
    bounds: Annotated[str, typer.Option("--bounds", help="Lowest and highest coefficient of risk_optimal.")] = "0,1",
    simplex: Annotated[bool, typer.Option("--simplex", help="risk_optimal's coefficients sum to one.")] = False,
    hull: Annotated[
        bool | None,
        typer.Option(
            "--hull/--no-hull",
            help="Chosen coefficients are nonnegative with sum at most 1. Default: if the network has BatchNorm.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective", help="What risk_optimal minimises: secant, tangent or middle (default with tangents)."
        ),
    ] = None,
    tangent: Annotated[
        bool | None,
        typer.Option("--tangent/--no-tangent", help="Jacobian products: the bracket's other end. Default: if cheap."),
    ] = None,
    bound: Annotated[
        bool | None,
        typer.Option("--bound/--no-bound", help="The master bound (measures the smoothness). Default: if cheap."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.", min=1)] = None,
    out_coefficients: Annotated[
        Path | None, typer.Option("--out-coefficients", help="Write the best coefficients to this .yaml file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the risk of merging: `mergebound predict --base B.safetensors --experts E1.safetensors E2.safetensors
    --data D1.npz D2.npz --model resnet18`.

    No merge is evaluated. Each method gets a bracket from secant (N+1 forward passes per data set) and tangent (as many
    Jacobian products): narrow means that the prediction can be trusted, wide that the merge may collapse.
    """
    options = read_options(
        methods=methods,
        settings=settings or [],
        coefficients=coefficients,
        alphas=alpha or [],
        bounds=bounds,
        simplex=simplex,
        hull=hull,
        objective=objective,
        tangent=tangent,
        bound=bound,
        seed=seed,
    )
    if out_coefficients is not None:
        _check_target(out_coefficients)
    if len(data) != len(experts):
        raise MergeboundError(
            f"--data: {len(data)} data sets for {len(experts)} experts; give one per expert, in the same order"
        )
    names = expert_names(experts)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from experiments.predict import load_group
    from experiments.predict import predict as price

    with _progress() as bar:
        task = bar.add_task("reading", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        group = load_group(
            base,
            experts,
            data,
            names=names,
            model=model,
            model_options=read_model_options(model_option or []),
            private=private,
            shared_head=shared_head,
            images=images,
            seed=seed,
            split=split,
            image_size=image_size,
            mean=None if mean is None else tuple(read_numbers("--mean", mean)),
            std=None if std is None else tuple(read_numbers("--std", std)),
            progress=tell,
        )
        report = price(group, options, progress=tell)
    if out_coefficients is not None:
        _write_coefficients(out_coefficients, report)
    if as_json:
        typer.echo(json.dumps(plain(dataclasses.asdict(report)), indent=2, allow_nan=False))
        return
    _print(report, out_coefficients)


# --- reading options -------------------------------------------------------------------------------------------------


def read_options(
    *,
    methods: str | None,
    settings: Sequence[str],
    coefficients: str,
    alphas: Sequence[str],
    bounds: str,
    simplex: bool,
    hull: bool | None,
    objective: str | None,
    tangent: bool | None,
    bound: bool | None,
    seed: int,
) -> Options:
    """Parse what was typed.

    Raises:
        MergeboundError: names the option and the remedy.
    """
    from experiments.predict import Options
    from experiments.predict.report import OBJECTIVES

    chosen = None if methods is None else tuple(name.strip() for name in methods.split(",") if name.strip())
    if chosen is not None and not chosen:
        raise MethodError("--methods: the list is empty; name methods, as --methods average,ties")
    for name in chosen or ():
        get(name)
    if objective not in (None, *OBJECTIVES):
        raise MergeboundError(f"--objective {objective}: choose {', '.join(OBJECTIVES)}")
    limits = read_numbers("--bounds", bounds)
    if len(limits) != 2:
        raise MergeboundError(f"--bounds {bounds}: give two numbers, as 0,1")
    return Options(
        methods=chosen,
        settings=_method_settings(settings, chosen),
        coefficients=tuple(read_numbers("--coefficients", coefficients)),
        alphas=tuple(tuple(read_numbers("--alpha", text)) for text in alphas),
        bounds=(limits[0], limits[1]),
        simplex=simplex,
        hull=hull,
        objective=objective,
        tangent=tangent,
        bound=bound,
        seed=seed,
    )


def read_numbers(option: str, text: str) -> list[float]:
    """Comma-separated finite numbers.

    Raises:
        MergeboundError: something else.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise MergeboundError(f"{option} {text}: write comma-separated numbers, as 0.3,0.7") from None
    if not all(math.isfinite(value) for value in values):
        raise MergeboundError(f"{option} {text}: give finite numbers")
    return values


def read_model_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are read as YAML (numbers, true, false, text).

    Raises:
        MergeboundError: malformed or repeated.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise MergeboundError(f"--model-option {pair}: write name=value, each name once, as img_size=32")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise MergeboundError(f"--model-option {pair}: the value cannot be read; write name=value") from None
    return found


def _method_settings(pairs: Sequence[str], methods: tuple[str, ...] | None) -> dict[str, dict[str, Any]]:
    """``ties.density=0.2``, or ``density=0.2`` for every chosen method that has it."""
    grouped: dict[str, list[str]] = {}
    for pair in pairs:
        name = pair.partition("=")[0]
        method, dot, _ = name.partition(".")
        if dot:
            get(method)
            grouped.setdefault(method, []).append(pair[len(method) + 1 :])
            continue
        candidates = methods or ("average", "task_arithmetic", "ties", "dare", "risk_optimal")
        owners = [m for m in candidates if name in {parameter.name for parameter in get(m).parameters}]
        if "=" not in pair or not owners:
            raise MethodError(
                f"--set {pair}: no method among {', '.join(candidates)} has it; write method.name=value, as "
                "ties.density=0.2"
            )
        for owner in owners:
            grouped.setdefault(owner, []).append(pair)
    return {method: read_settings(get(method), values) for method, values in grouped.items()}


# --- writing ---------------------------------------------------------------------------------------------------------


def _check_target(path: Path) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise CheckpointError(f"{path}: coefficients are written as .yaml; change the suffix of --out-coefficients")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder '{path.parent}' does not exist; create it first")


def _write_coefficients(path: Path, report: Report) -> None:
    row = next((r for r in report.methods if r.label == report.risk_optimal), None)
    if row is None:
        row = next(r for r in report.methods if r.label == report.best)
    content = {
        "method": row.method,
        "settings": dict(row.settings),
        "base": _beside(path, report.base),
        "coefficients": [
            {"expert": _beside(path, expert.file), "alpha": value}
            for expert, value in zip(report.experts, row.coefficients, strict=True)
        ],
        "predicted_risk": dataclasses.asdict(row.risk),
        "optimality_gap": row.optimality_gap,
        "objective": report.objective,
        "private": list(report.private),
        "seed": report.seed,
        "command": row.command,
    }
    with atomic_file(path) as handle:
        handle.write(yaml.safe_dump(plain(content), sort_keys=False).encode())


def _beside(path: Path, file: str) -> str:
    """A path as seen from the folder of another, where `mergebound merge --config` looks for it."""
    return os.path.relpath(file, path.parent)


def plain(value: Any) -> Any:
    """JSON-ready data: tuples become lists, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _show(value: Estimate | None, plus: bool = False) -> str:
    if value is None or math.isnan(value.value):
        return "-"
    error = f"{value.standard_error:.3f}" if not math.isnan(value.standard_error) else "unknown"
    return f"{value.value:{'+' if plus else ''}.3f} ±{error}"


def _print(report: Report, written: Path | None) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(
        f"{escape(report.architecture)}: {len(report.experts)} experts, {report.parameters:,} merged coordinates, seed "
        f"{report.seed}; every risk in nats, tier {report.tier}, ± one standard error from the calibration images"
    )
    console.print(_expert_table(report))
    console.print()
    console.print(_method_table(report, narrow=console.width < NARROW))
    console.print()
    console.print(f"[dim]{escape(report.verdict_rule)}; tangents: {escape(report.tangents_rule)}[/]")
    best = next(row for row in report.methods if row.label == report.best)
    console.print(
        f"\nsmallest prediction: [bold]{escape(best.label)}[/], {best.verdict} bracket: {escape(best.advice)}"
    )
    console.print(_task_table(best))
    optimal = next((row for row in report.methods if row.label == report.risk_optimal), None)
    if optimal is not None:
        shown = ", ".join(
            f"{escape(e.name)} {value:.4g}" for e, value in zip(report.experts, optimal.coefficients, strict=True)
        )
        console.print(
            f"risk_optimal (minimises the {report.objective}): {shown}; optimality gap {optimal.optimality_gap:.1e}"
        )
    _print_bound(console, best)
    verdicts = Table("assumption", "verdict", "statement", "why", box=None, pad_edge=False)
    for item in report.assumptions:
        verdicts.add_row(item.name, item.verdict, escape(item.statement), escape(item.why))
    console.print(verdicts)
    for note in report.notes:
        console.print(f"note: {escape(note)}")
    console.print("\nto make this merge:" if optimal is None else "\nto merge with the best coefficients:")
    typer.echo((optimal or best).command)
    if written is not None:
        typer.echo(f"written: {written}")


def _grid(first: str, *others: str) -> Table:
    """A plain table whose numbers are never broken over lines."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=12)
    for name in others:
        table.add_column(name, no_wrap=name != "data", overflow="fold")
    return table


def _expert_table(report: Report) -> Table:
    table = _grid("expert", "data", "images", "own risk", "accuracy", "base's risk", "drift")
    for expert in report.experts:
        table.add_row(
            escape(expert.name),
            escape(Path(expert.data).name + (f" ({expert.split})" if expert.split else "")),
            f"{expert.images} of {expert.images_available}",
            _show(expert.risk),
            f"{100 * expert.accuracy:.0f} %",
            _show(expert.base_risk),
            f"{expert.drift:.3g}",
        )
    table.add_row("mean", "", "", _show(report.expert_risk), "", _show(report.base_risk), "")
    return table


def _method_table(report: Report, *, narrow: bool) -> Table:
    more = () if narrow else ("accuracy", "bound")
    columns = ("predicted risk", "secant", "tangent", "bracket", "merging cost", *more)
    table = _grid("method", *columns)
    for row in report.methods:
        values = (
            _show(row.risk),
            _show(row.secant),
            _show(row.tangent),
            _MARKS[row.verdict],
            _show(row.cost, plus=True),
        )
        vacuous = " (vacuous)" if row.bound is not None and row.bound.vacuous else ""
        bound = "-" if row.bound is None else f"{row.bound.value:.3g}{vacuous}"
        right = "-" if math.isnan(row.accuracy.value) else f"{100 * row.accuracy.value:.0f} %"
        style = "bold" if row.label == report.best else None
        table.add_row(escape(row.label), *values, *(() if narrow else (right, bound)), style=style)
    return table


def _task_table(row: MethodPrediction) -> Table:
    table = _grid("task of", "predicted", "secant", "tangent")
    for task in row.tasks:
        table.add_row(escape(task.expert), _show(task.middle or task.secant), _show(task.secant), _show(task.tangent))
    return table


def _print_bound(console: Console, row: MethodPrediction) -> None:
    if row.bound is None:
        return
    terms = ", ".join(
        f"{name} {value:.3g} ({100 * row.bound.shares[name]:.0f} %)" for name, value in row.bound.terms.items()
    )
    vacuous = ", vacuous: above chance" if row.bound.vacuous else ""
    console.print(
        f"master bound of {escape(row.label)}: {row.bound.value:.4g} (tier {row.bound.tier}{vacuous}); square roots of "
        f"its terms: {terms}; the risks are held out, so that instability is not needed"
    )


__all__ = ["predict", "read_options", "register"]
