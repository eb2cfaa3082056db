"""``mergebound measure function-space``: logits and Jacobian products of experts, and predictions of their merges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.commands.about_experts import Chosen, ExpertsCommand, about_experts, telling
from experiments.commands.measure_settings import MethodSettings, listed, method_settings
from experiments.commands.options import AsJson, Out
from experiments.commands.showing import show
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

    from experiments.measure.predictors import FieldStatistics, Merge
    from experiments.measure.subject import Subject

USUAL = ("average", "task_arithmetic", "ties", "dare")


def register(group: typer.Typer) -> None:
    """Add the command to the group ``measure``."""
    group.command("function-space", cls=ExpertsCommand)(function_space)


@about_experts()
def function_space(
    about: Chosen,
    predictors: Annotated[
        str | None,
        typer.Option("--predictors", help="Comma-separated, or `all`. Default: what needs few passes and one product."),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Products for `all`, each `layer` or each `tensor`.")] = "all",
    alpha: Annotated[
        list[str] | None, typer.Option("--alpha", help="Coefficients of a merge, comma-separated; repeatable.")
    ] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Comma-separated; see `mergebound methods`.")] = None,
    settings: MethodSettings = None,
    residual: Annotated[
        str,
        typer.Option(
            "--residual",
            help="What becomes of the part of a non-linear merge off the task vectors: default, none, base, own, "
            "average, function, stretch.",
        ),
    ] = "default",
    target: Annotated[
        str, typer.Option("--target", help="labels; or without labels: pseudo, soft, entropy.")
    ] = "labels",
    temperature: Annotated[float, typer.Option("--temperature", help="Logits are divided by it.")] = 1.0,
    clip: Annotated[float | None, typer.Option("--clip", help="Losses are cut there, in nats.")] = None,
    optimal: Annotated[
        str | None, typer.Option("--optimal", help="A predictor whose best mixture is priced as one more merge.")
    ] = None,
    times: Annotated[bool, typer.Option("--times", help="Seconds against evaluating, and break-even.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per pass at most.")] = 256,
    memory: Annotated[int, typer.Option("--memory", min=1, help="MiB of temporary tensors at most.")] = 1024,
    save: Annotated[Path | None, typer.Option("--save", help="Keep what was collected in this `.npz` file.")] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Predict the joint risk of merges from logits and Jacobian products, without forming or evaluating a merge."""
    subject = about.open(at_least=2)
    import pandas as pd

    from experiments.measure.predictors import ZOO, Loss, collect_fields, kinds_for, predict_merge
    from experiments.measure.predictors.break_even import break_even, to_frame
    from experiments.measure.predictors.kinds import STANDARD

    loss = Loss(target, temperature, clip)  # type: ignore[arg-type]
    wanted = _merges(subject, alpha or (), methods, settings or ())
    names = None if predictors is None else list(ZOO) if predictors == "all" else listed(predictors)
    kinds = STANDARD if names is None else kinds_for(names)
    kinds = (*kinds, *(kinds_for([optimal]) if optimal else ()))
    if by != "all":
        kinds = (*kinds, "tangent_base")
    with telling() as tell:
        statistics = collect_fields(
            subject, kinds=kinds, by=by, batch=batch, memory=memory << 20, seed=about.seed, progress=tell
        )
    if save is not None:
        try:
            statistics.save(save)
        except OSError as error:
            raise MergeboundError(f"--save {save}: cannot be written ({error.strerror or error})") from error
    notes = ["low and high cover the draw of calibration images (95 %), not how far a prediction is off"]
    if optimal:
        wanted.append(_best(statistics, optimal))
        notes.append("optimal was chosen on the images it is priced on: judge it on others")
    if target != "labels":
        notes.append("risks without labels are biased: compare with --target labels where there are some")
    frame = predict_merge(
        subject, wanted, statistics, names=names, residual=residual, loss=loss, seed=about.seed  # type: ignore[arg-type]
    )  # fmt: skip
    broken = frame[frame["clamped"] > 0.0].drop_duplicates("merge")
    if len(broken):
        notes.append(
            f"{', '.join(broken['merge'])}: running variances of BatchNorm become negative, so nothing is predicted; "
            "keep the coefficients nonnegative with sum at most 1"
        )
    tables: dict[str, pd.DataFrame] = {
        "predictions": frame.sort_values(["merge", "risk"], kind="stable").reset_index(drop=True),
        "passes": _costs(statistics),
        "tasks": pd.DataFrame(
            {
                "expert": statistics.names,
                "task": statistics.tasks,
                "expert_risk": statistics.own_risks(),
                "base_risk": statistics.base_risks(),
                "images": statistics.images,
                "tier": statistics.tier,
            }
        ),
    }
    if times:
        tables["break_even"] = to_frame(break_even(subject, statistics, names, batch=batch, seed=about.seed))
    show(
        tables,
        headline=f"{subject.architecture}: {subject.size} experts, {min(statistics.images)} images per task, "
        f"{statistics.depth} layer{'s' if statistics.depth > 1 else ''}, seed {about.seed}",
        notes=notes,
        facts={"seed": about.seed, "by": by, "target": target, "kinds": list(statistics.kinds)},
        shown={"predictions": _SHOWN, "passes": ("kind", "meaning", "passes", "seconds", "error")},
        as_json=as_json,
        out=out,
    )


_SHOWN = ("merge", "predictor", "risk", "low", "high", "accuracy", "gap", "flag", "certificate_remainder", "tier")


def _merges(subject: Subject, alphas: Sequence[str], methods: str | None, settings: Sequence[str]) -> list[Merge]:
    """What is asked for; without anything the usual methods."""
    from experiments.measure.predictors import Merge

    found = []
    for text in alphas:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise MergeboundError(f"--alpha {text}: give numbers, comma-separated, one per expert") from None
        found.append(Merge(alpha=values))
    chosen = listed(methods) if methods is not None else [] if alphas else list(USUAL)
    given = method_settings(chosen, settings)
    found += [Merge(method=name, settings=given[name]) for name in chosen]
    if not found:
        raise MergeboundError("nothing to predict: give --methods or --alpha")
    return found


def _best(statistics: FieldStatistics, name: str) -> Merge:
    from experiments.measure.predictors import Merge, predictors
    from theory.function_space import minimise_risk

    found = minimise_risk(predictors([name], statistics)[0].fields(statistics), simplex=True)
    return Merge(label=f"optimal({name}: " + ", ".join(f"{v:.3f}" for v in found.alpha) + ")", alpha=found.alpha)


def _costs(statistics: FieldStatistics) -> pd.DataFrame:
    import pandas as pd

    from experiments.measure.predictors.kinds import KINDS, forward_equivalents, passes

    size, depth = statistics.size, statistics.depth
    return pd.DataFrame(
        [
            {
                "kind": kind,
                "meaning": KINDS[kind].meaning,
                "derivative": KINDS[kind].derivative,
                "passes": size * passes(kind, size, depth),
                "forward_equivalents": size * forward_equivalents(kind, size, depth),
                "seconds": statistics.seconds.get(kind, float("nan")),
                "error": statistics.second_error.get(kind, 0.0),
            }
            for kind in statistics.kinds
        ]
    )
