"""The points of a cell and their scores per test image: base, experts, merges, multitask models."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from experiments.atomic import write_atomically
from experiments.measure.backbone import Readout
from experiments.measure.landscape.scores import shared_sources
from experiments.measure.subject import Subject
from experiments.models import head_prefix
from experiments.studies.scale.cells import Chosen
from experiments.studies.scale.multitask import MultitaskModel, Start, train_fixed, train_optimised
from experiments.studies.scale.scoring import Score, Scorer
from experiments.studies.scale.spec import ScaleSpec, label, settings_for
from experiments.tasks.types import Split
from merging.merge import merge_flat
from theory.errors import MergeboundError

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Points:
    """Scores of a cell's points.

    Attributes:
        rows: one per point, task and way of scoring: ``point`` (its number), ``kind`` (base, expert, merge,
            multitask_fixed, multitask_optimised), ``method``, ``experts`` (N), ``chain``, ``seed``, ``members`` (joined
            by ``;``), ``task``, ``group`` (held_in, held_out), ``scored_by``, ``accuracy``, ``loss``, ``images``.
        correct: (rows, images), 0 or 1, NaN beyond a task's images.
        sources: numbers of test images in what tasks share, by task; tasks that share nothing are absent.
    """

    rows: pd.DataFrame
    correct: NDArray[np.float32]
    sources: dict[str, NDArray[np.int64]]


def score_points(
    scorers: dict[int, Scorer],
    groups: Sequence[Chosen],
    spec: ScaleSpec,
    multitask: Sequence[tuple[str, MultitaskModel]],
    tell: Tell,
) -> Points:
    """Score everything of a cell.

    Args:
        scorers: by seed of fine-tuning; the first one scores base and multitask models.
        groups: to be merged by every method.
        spec: the study.
        multitask: name and model.
        tell: told (stage, done, total).
    """
    rows: list[dict[str, Any]] = []
    tables: list[NDArray[np.float32]] = []
    first = next(iter(scorers.values()))
    total = 1 + len(multitask) + sum(s.subject.size for s in scorers.values()) + len(groups) * len(spec.methods)
    done = 0

    def add(scores: list[Score], **about: Any) -> None:
        nonlocal done
        for one in scores:
            held_in = one.scored_by == "head"
            rows.append(
                {"point": done, **about, "task": one.task, "group": "held_in" if held_in else "held_out",
                 "scored_by": one.scored_by, "accuracy": float(one.correct.mean()),
                 "loss": float(one.loss.mean()) if one.loss is not None else np.nan, "images": len(one.correct)}
            )  # fmt: skip
            tables.append(one.correct.astype(np.float32))
        done += 1
        tell("scoring", done, total)

    nobody = {"method": "", "experts": 0, "chain": -1, "members": ""}
    add(first.score(first.subject.base), kind="base", seed=next(iter(scorers)), **nobody)
    for seed, scorer in scorers.items():
        for j, name in enumerate(scorer.subject.tasks):
            about = {"kind": "expert", "method": "", "experts": 1, "chain": -1, "members": name, "seed": seed}
            add(scorer.score(scorer.subject.vectors[j]), **about)
    for name, model in multitask:
        vector, heads = point_of(first.subject, model)
        add(first.score(vector, heads=heads), kind=f"multitask_{name}", seed=next(iter(scorers)), **nobody)
    for group in groups:
        scorer = scorers[group.seed]
        subject = scorer.subject.choose(group.members)
        for method in spec.methods:
            merged = merge_flat(
                method.name, subject.base, subject.deltas, subject.networks[0].space, subject.networks[0].partition,
                names=subject.names, seed=spec.seed + group.chain, **settings_for(method, group.size),
            )  # fmt: skip
            about = {"kind": "merge", "method": label(method), "experts": group.size, "chain": group.chain}
            add(scorer.score(merged), **about, members=";".join(subject.tasks), seed=group.seed)
    width = max(len(one) for one in tables)
    correct = np.full((len(tables), width), np.nan, dtype=np.float32)
    for place, one in enumerate(tables):
        correct[place, : len(one)] = one
    return Points(pd.DataFrame(rows), correct, _sources(first))


def _sources(scorer: Scorer) -> dict[str, NDArray[np.int64]]:
    names = [*scorer.subject.tasks, *(one.task for one in scorer.held_out)]
    splits = [*scorer.tests, *(one.test for one in scorer.held_out)]
    found = shared_sources(names, splits)
    return {name: source for name, source in zip(names, found, strict=True) if source is not None}


def point_of(subject: Subject, model: MultitaskModel) -> tuple[Tensor, list[Readout]]:
    """A multitask model as a point of the merged coordinates with heads of its own."""
    prefix = head_prefix(subject.model)
    vector = subject.networks[0].space.flatten(dict(model.shared)).to(subject.base.dtype)
    return vector, [Readout(head[prefix + "weight"], head.get(prefix + "bias")) for head in model.heads]


def train_multitask(subject: Subject, base: dict[str, Tensor], spec: ScaleSpec) -> list[tuple[str, MultitaskModel]]:
    """Both multitask models of a cell: ``fixed`` and ``optimised``.

    Args:
        subject: base and experts (their training and calibration images, recipes, and heads before training).
        base: every tensor of x_0.
        spec: the study.

    Raises:
        MergeboundError: experts whose recipe or training images are not known, or a run that diverged.
    """
    assert spec.multitask is not None
    run = subject.runs[0]
    train = [data for data in subject.train if data is not None]
    heads = [head for head in subject.start_heads if head is not None]
    if run is None or len(train) < subject.size or len(heads) < subject.size:
        raise MergeboundError("multitask: needs experts of a grid, with their recipes and training images")
    start = Start(subject.model.requires_grad_(True), base, tuple(heads))
    few = np.arange(spec.multitask.images)
    validation: list[Split] = [split.take(few[: len(split)]) for split in subject.calibration]
    found = [
        ("fixed", train_fixed(start, train, run, spec.seed)),
        ("optimised", train_optimised(start, train, validation, run, spec.multitask, spec.seed)),
    ]
    subject.model.requires_grad_(False).eval()
    return found


def multitask_table(models: Sequence[tuple[str, MultitaskModel]]) -> pd.DataFrame:
    """What was trained: one row per model and measurement on validation images."""
    rows = []
    for name, model in models:
        about = {"model": name, "chosen_rate": model.rate, "chosen_step": model.steps, "steps_spent": model.trained}
        for rate, step, loss in model.trace or ((model.rate, model.steps, float("nan")),):
            rows.append({**about, "rate": rate, "step": step, "validation_loss": loss, "tier": "measured"})
    return pd.DataFrame(rows)


def save_points(path: Path, points: Points) -> None:
    """Write points as one file that is either absent or complete."""
    buffer = io.BytesIO()
    about = {
        "rows": json.loads(points.rows.to_json(orient="split", double_precision=15)),
        "tasks": list(points.sources),
    }
    arrays = {f"source{k}": source for k, source in enumerate(points.sources.values())}
    packed = np.where(np.isnan(points.correct), 2, points.correct).astype(np.uint8)
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), correct=packed, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_points(path: Path) -> Points:
    """Read what :func:`save_points` wrote.

    Raises:
        MergeboundError: the file holds something else (remove it and run again).
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            about = json.loads(str(found["about"]))
            packed = found["correct"].astype(np.float32)
            sources = {task: found[f"source{k}"] for k, task in enumerate(about["tasks"])}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise MergeboundError(f"{path}: cannot be read ({error}); remove it and run again") from error
    rows = pd.DataFrame(about["rows"]["data"], columns=about["rows"]["columns"])
    rows["loss"] = rows["loss"].astype(float)
    return Points(rows, np.where(packed == 2, np.nan, packed).astype(np.float32), sources)
