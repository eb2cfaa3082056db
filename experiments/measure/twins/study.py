"""Twins of the experts of a grid, or of checkpoints with a recipe: eps_i, c_i through merges, Theorem 2 beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.measure.subject import Subject
from experiments.measure.twins.estimates import Stability, stability
from experiments.measure.twins.merges import MergeChoice, MergeTwins, MethodStability, default_choices, merges_frame
from experiments.measure.twins.pairs import draw_pairs, fresh_rows, sample_of
from experiments.measure.twins.theorem2 import Theorem2, cap, gradient_gaps, theorem2
from experiments.measure.twins.train import TwinRun, train_twins
from merging.merge import merge_flat
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

    from experiments.store import Store


@dataclass(frozen=True, eq=False)
class TwinJob:
    """What twins of one expert need.

    Attributes:
        name: of the expert.
        run: how it was (or is to be) trained.
        network, start: architecture and x_0 with its head.
        train: the training part, of which S is a share; augmented as the run says.
        fresh: held-back images.
        state: the expert's final state dict as it was stored; ``None`` where it is not known.
    """

    name: str
    run: RunSpec
    network: nn.Module
    start: Mapping[str, Tensor]
    train: TrainingData
    fresh: TrainingData
    state: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class ExpertTwins:
    """What was found for one expert.

    Attributes:
        name: of the expert.
        twins: its runs.
        stability: eps_i.
        merges: one entry per merging method; empty for a single expert.
        bounds: Theorem 2 with measured gaps and kappa 0.
        cap: sqrt(2) drift.
        replay: largest difference between the base run and the stored expert over the largest change of a weight; NaN
            where none is stored.
        skipped: methods that do not take these experts, with the reason.
    """

    name: str
    twins: TwinRun
    stability: Stability
    merges: tuple[MethodStability, ...]
    bounds: tuple[Theorem2, ...]
    cap: float
    replay: float
    skipped: Mapping[str, str]


def jobs_from_store(store: Store, digests: Sequence[str], root: str | Path | None = None) -> tuple[TwinJob, ...]:
    """Runs of a grid, as they were trained; fresh samples come from their validation parts."""
    from experiments.engines.workplace import Workplace

    place = Workplace(store.base, root)
    found = []
    for digest in digests:
        job = place.job(store.spec(digest), *store.digests(digest))
        found.append(
            TwinJob(
                f"{job.run.task} {digest[:8]}",
                job.run,
                job.network,
                job.start,
                job.train,
                job.validation,
                store.state(digest),
            )
        )
    return tuple(found)


def jobs_from_subject(subject: Subject, recipe: Mapping[str, Any]) -> tuple[TwinJob, ...]:
    """Checkpoints without runs: each expert is trained anew from x_0 by a recipe, head frozen (eps_private = 0).

    Half of the calibration images are S, the other half are fresh.

    Args:
        recipe: fields of :class:`~experiments.grid.run_spec.RunSpec` but task and base.

    Raises:
        MergeboundError: too few images for the batch size.
    """
    from experiments.bases.spec import BaseSpec
    from experiments.models.parts import replace_head

    found = []
    for i, name in enumerate(subject.names):
        images = subject.calibration[i]
        half = len(images) // 2
        if half < 1:
            raise MergeboundError(f"{name}: {len(images)} images; twins need two or more, raise --images")
        network, space = subject.model, subject.networks[i].space
        shared = space.unflatten(subject.base)
        state = {n: t.detach().clone() for n, t in network.state_dict().items()}
        state |= {n: t.detach().clone() for n, t in {**shared, **subject.heads[i]}.items() if n in state}
        classes = max((len(t) for t in subject.heads[i].values()), default=0)
        if any(state[n].shape != network.state_dict()[n].shape for n in state):
            import copy

            network = replace_head(copy.deepcopy(network), classes)
        base = BaseSpec(kind="random", architecture=subject.architecture, classes=max(1, classes))
        frozen = "backbone" if subject.heads[i] else "full"
        run = RunSpec(**{"task": subject.tasks[i], "base": base, "trained": frozen, **recipe})
        rows = np.arange(len(images))
        found.append(TwinJob(name, run, network, state, images.take(rows[:half]), images.take(rows[half:])))
    return tuple(found)


def measure_expert(
    job: TwinJob,
    *,
    subject: Subject | None = None,
    expert: int = 0,
    twins: int = 16,
    seed: int = 0,
    steps: Sequence[int] | None = None,
    choices: Sequence[MergeChoice] | None = None,
    chunk: int | None = None,
    memory: int | None = None,
    replicates: int = 1,
) -> ExpertTwins:
    """eps_i of one expert with growth over the checkpoints, and c_i through every merging method of a subject.

    Args:
        job: of :func:`jobs_from_store` or :func:`jobs_from_subject`.
        subject: whose other experts stay fixed; without it nothing is merged.
        expert: which of them this is.
        twins: exchanged samples, at most those of S and of the held-back images.
        seed: names them (seed + r in replicate r, which also trains with the run's seed + r).
        steps: checkpoints; default quarters of the run.
        choices: merging methods; default all that fit.
        replicates: how often all is repeated with other seeds; merges are of the first.
    """
    run = job.run
    sample = sample_of(run, job.train)
    count = min(twins, len(sample), len(job.fresh))
    stops = steps if steps is not None else sorted({max(1, run.steps * k // 4) for k in (1, 2, 3, 4)})
    pairs = draw_pairs(len(sample), len(job.fresh), count, seed)
    merger, skipped = (
        (None, {}) if subject is None or subject.size < 2 else _merger(subject, expert, run, choices, seed)
    )
    found = []
    for r in range(replicates):
        again = run if r == 0 else run.model_copy(update={"seed": run.seed + r})
        chosen = pairs if r == 0 else draw_pairs(len(sample), len(job.fresh), count, seed + r)
        found.append(
            train_twins(
                again,
                job.network,
                job.start,
                job.train,
                job.fresh,
                chosen,
                steps=stops,
                chunk=chunk,
                memory=memory,
                collect=merger.collect if merger is not None and r == 0 else None,
            )
        )
    exchanged = fresh_rows(sample, job.fresh, pairs)
    gaps = [gradient_gaps(run, job.network, state, sample, exchanged, pairs) for state in (job.start, found[0].state)]
    return ExpertTwins(
        job.name,
        found[0],
        stability(found, seed=seed),
        () if merger is None else tuple(merger.results(len(pairs))),
        theorem2(run, len(sample), np.stack(gaps, axis=1)),
        cap(found),
        _replay(job, found[0]),
        skipped,
    )


def _merger(
    subject: Subject, expert: int, run: RunSpec, choices: Sequence[MergeChoice] | None, seed: int
) -> tuple[MergeTwins, dict[str, str]]:
    """Merges by every method that takes the subject, and why others do not."""
    network = subject.networks[expert]
    kept, skipped = [], {}
    for choice in default_choices(subject.size) if choices is None else choices:
        try:
            merge_flat(
                choice.method, subject.base, list(subject.deltas), network.space, network.partition,
                names=subject.names, seed=seed, **choice.settings,
            )  # fmt: skip
            kept.append(choice)
        except MergeboundError as error:
            if choices is not None:
                raise
            skipped[choice.method] = str(error)
    merger = MergeTwins(
        subject.base, subject.vectors, network.space, network.partition, expert, kept, run.steps, subject.names, seed
    )
    return merger, skipped


def _replay(job: TwinJob, found: TwinRun) -> float:
    if job.state is None:
        return float("nan")
    away, moved = 0.0, 0.0
    for name, tensor in found.state.items():
        if tensor.is_floating_point() and tensor.numel() and "running_" not in name:
            away = max(away, float((tensor - job.state[name].to(tensor)).abs().max()))
            moved = max(moved, float((tensor - job.start[name].to(tensor)).abs().max()))
    return away / moved if moved else float("nan")


def frames(found: Sequence[ExpertTwins]) -> dict[str, pd.DataFrame]:
    """Tables: ``stability``, ``merges``, ``theorem2``."""
    import pandas as pd

    stable, merged, bounds = [], [], []
    for each in found:
        stable.append(each.stability.to_frame().assign(expert=each.name, n=each.stability.n))
        if each.merges:
            merged.append(merges_frame(each.merges).assign(expert=each.name))
        eps = each.stability.epsilon
        rows = [{**vars(bound)} for bound in each.bounds]
        rows.append({"form": "cap", "value": each.cap, "tier": "estimated"})
        for row in rows:
            bounds.append({"expert": each.name, **row, "measured": eps.value, "low": eps.low, "high": eps.high,
                           "ratio": row["value"] / eps.value if eps.value else np.nan, "seed": eps.seed})  # fmt: skip
    tables = {"stability": pd.concat(stable, ignore_index=True)}
    if merged:
        tables["merges"] = pd.concat(merged, ignore_index=True)
    tables["theorem2"] = pd.DataFrame(bounds)
    return tables


def growth_figure(found: Sequence[ExpertTwins]) -> Any:
    """eps_i over steps, one line per expert, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for each in found:
        curve = each.stability.rms["all"]
        steps = [0, *each.stability.steps]
        axes.plot(steps, [0.0, *(q.value for q in curve)], marker="o", label=each.name)
        axes.fill_between(steps, [0.0, *(q.low for q in curve)], [0.0, *(q.high for q in curve)], alpha=0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("stability eps_i (rms over samples)")
    axes.legend()
    return figure
