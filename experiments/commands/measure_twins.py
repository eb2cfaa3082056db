"""``mergebound measure twins``: stability of experts and of their merges, from coupled runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.commands.about_experts import Chosen, ExpertsCommand, about_experts
from experiments.commands.measure_settings import MethodSettings, listed, method_settings
from experiments.commands.options import AsJson, Out
from experiments.commands.showing import show
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.measure.subject import Subject
    from experiments.measure.twins.merges import MergeChoice
    from experiments.measure.twins.study import ExpertTwins, TwinJob

_STABILITY = ("expert", "step", "part", "value", "low", "high", "error", "count")
_MERGES = ("expert", "method", "sensitivity", "low", "high", "largest", "theory", "guarantee")
_ABOVE = {
    "local": "the theory's c_i is local: a change that alters what the method chooses may move the merge further",
    "mean square": "the theory's c_i holds in the mean over the method's draws, and all twins share one draw",
    "none": "the theory's c_i is no bound here",
    "global": "it should bound every change: check the settings, and report this",
}
_EXACT = 1e-6
"""Rounding that is not called a difference."""
_BOUNDS = ("expert", "form", "value", "measured", "ratio", "gap", "tau", "gamma")


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command("twins", cls=ExpertsCommand)(twins)


@about_experts()
def twins(
    about: Chosen,
    count: Annotated[int, typer.Option("--twins", min=1, help="Exchanged samples of each expert.")] = 16,
    replicates: Annotated[int, typer.Option("--replicates", min=1, help="Repetitions with other seeds.")] = 1,
    only: Annotated[str | None, typer.Option("--of", help="Only the twins of this expert; the others stay.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Merging methods, comma-separated. Default: all that fit.")
    ] = None,
    settings: MethodSettings = None,
    merge: Annotated[bool, typer.Option("--merge/--no-merge", help="Carry twins through merging methods.")] = True,
    chunk: Annotated[int | None, typer.Option("--chunk", min=1, help="Twins at a time.")] = None,
    memory: Annotated[int | None, typer.Option("--memory", min=1, help="MiB that all but the data may take.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="With --base: recipe by which experts are trained anew.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="With --base: steps.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="With --base: batch size.")] = 32,
    momentum: Annotated[float, typer.Option("--momentum", help="With --base: momentum.")] = 0.0,
    optimizer: Annotated[str, typer.Option("--optimizer", help="With --base: sgd, adamw or sam.")] = "sgd",
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Stability eps_i: how far an expert (and its merge) moves when one training sample is replaced by a fresh one.

    Each expert is trained again from its base, and with it its twins, which see the same batches but one other sample.
    """
    from experiments.measure.twins.study import frames, growth_figure, jobs_from_subject, measure_expert

    given = _chosen(methods, settings or ())
    if about.store is not None:
        subject, jobs = _grid(about, about.store)
    else:
        if learning_rate is None or steps is None:
            raise MergeboundError(
                "twins train experts anew: give --learning-rate and --steps with --base, or runs of a grid by --store"
            )
        subject = about.open()
        recipe = {"learning_rate": learning_rate, "steps": steps, "batch_size": batch_size, "momentum": momentum,
                  "optimizer": optimizer, "sampling": "without_replacement", "seed": about.seed}  # fmt: skip
        jobs = jobs_from_subject(subject, recipe)
    names = [job.name for job in jobs]
    chosen = [i for i, name in enumerate(names) if only is None or only in (name, subject.names[i])]
    if not chosen:
        raise MergeboundError(f"--of {only!r}: no such expert; choose from {', '.join(names)}")
    choices = _choices(subject.size, given)
    found = [
        measure_expert(
            jobs[i],
            subject=subject if merge else None,
            expert=i,
            twins=count,
            seed=about.seed,
            choices=choices,
            chunk=chunk,
            memory=None if memory is None else memory << 20,
            replicates=replicates,
        )
        for i in chosen
    ]
    tables = frames(found)
    printed = tables["stability"]
    notes = _notes(found, about.store is None)
    show(
        {**tables, "eps": printed[printed["statistic"] == "rms"]},
        headline=f"stability of {len(found)} of {subject.size} experts, {count} twins each (tier: estimated)",
        notes=notes,
        figures={"growth": growth_figure(found)} if out is not None else None,
        facts={"seed": about.seed, "tier": "estimated"},
        shown={"stability": (), "merges": _MERGES, "theorem2": _BOUNDS, "eps": _STABILITY},
        as_json=as_json,
        out=out,
    )


def _choices(experts: int, given: Mapping[str, Mapping[str, Any]] | None) -> list[MergeChoice] | None:
    """The methods that are named, with what is set of them over what they have by default."""
    from experiments.measure.twins.merges import MergeChoice, default_choices

    if given is None:
        return None
    usual = {choice.method: choice.settings for choice in default_choices(experts)}
    return [MergeChoice(name, {**usual.get(name, {}), **settings}) for name, settings in given.items()]


def _chosen(methods: str | None, settings: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """Settings of the named methods; nothing where none is named, which leaves all that fit as they are."""
    if methods is None:
        if settings:
            raise MergeboundError(f"--set {settings[0]}: name its method with --methods, too")
        return None
    return method_settings(listed(methods), settings)


def _grid(about: Chosen, folder: Path) -> tuple[Subject, tuple[TwinJob, ...]]:
    from experiments.commands.grid_store import data_root
    from experiments.measure.twins.study import jobs_from_store
    from experiments.store import Store

    subject = about.open()
    with Store.open(folder, "r") as opened:
        return subject, jobs_from_store(opened, about.digests(opened), data_root(opened, about.root))


def _notes(found: Any, checkpoints: bool) -> list[str]:
    from experiments.measure.twins.estimates import FEW

    notes = ["Theorem 2 with gaps of the exchanged pairs at x_0 and x_K and kappa = 0; cap is sqrt(2) times the drift."]
    fewest = min(each.stability.epsilon.count for each in found)
    if fewest < FEW:
        notes.append(
            f"{fewest} twins are few: intervals fall short of 95 % or say next to nothing; give --twins {FEW} or more "
            "(16 to 32 where a figure matters)"
        )
    left = [float((each.twins.starts >= 0).mean()) for each in found]
    if min(left) < 1:
        notes.append(f"{min(left):.0%} or more of the exchanged samples were in a batch; the others move nothing")
    worst = max((each.replay for each in found if each.replay == each.replay), default=float("nan"))
    if worst == worst:
        notes.append(f"base runs differ from the stored experts by at most {worst:.1e} of the largest weight change")
    share = [each.twins.rounding[-1] / each.stability.epsilon.value for each in found if each.stability.epsilon.value]
    if share and max(share) == max(share):
        notes.append(
            f"a row that exchanges nothing ends {max(share):.1e} of eps_i away from the base run: rounding, grown"
        )
    if checkpoints:
        notes.append("experts were trained anew by the given recipe from half of the images, with frozen heads")
    notes += _above_theory(found)
    for name, reason in (found[0].skipped if found else {}).items():
        notes.append(f"not merged by {name}: {reason}")
    return notes


def _above_theory(found: Sequence[ExpertTwins]) -> list[str]:
    """Why a measured sensitivity may lie above the theory's: one note for every method where it surely does."""
    above = {
        (one.method, one.theory, one.guarantee, one.reason)
        for each in found
        for one in each.merges
        if one.sensitivity.low > one.theory * (1 + _EXACT)
    }
    notes = []
    for method, theory, guarantee, reason in sorted(above):
        why = f"{_ABOVE[guarantee]} ({reason.partition(';')[0]})"
        notes.append(f"{method}: measured c_i lies above {theory:.3g} with its whole interval; {why}")
    return notes
