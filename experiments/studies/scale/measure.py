"""One cell: its stages, each a file that is either absent or complete."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.atomic import write_atomically
from experiments.bases.spec import BaseSpec
from experiments.measure.opening import from_store
from experiments.measure.subject import Subject
from experiments.store import Store
from experiments.studies.scale.cells import Cell, Chosen, chains
from experiments.studies.scale.multitask import MultitaskModel
from experiments.studies.scale.points import (
    Tell,
    multitask_table,
    save_points,
    score_points,
    train_multitask,
)
from experiments.studies.scale.scoring import make_scorer
from experiments.studies.scale.shape import measure_shape
from experiments.studies.scale.spec import ScaleSpec
from experiments.studies.scale.terms import measure_terms
from experiments.tasks.named import anchored
from theory.errors import MergeboundError

POINTS, MULTITASK, TERMS, SHAPE, ABOUT = "points.npz", "multitask.csv", "terms.csv", "shape.csv", "cell.csv"


def stages(spec: ScaleSpec, cell: Cell) -> tuple[str, ...]:
    """Files that a finished cell has."""
    found = [ABOUT, POINTS]
    if spec.multitask is not None and cell.base in spec.multitask.bases:
        found.append(MULTITASK)
    if spec.terms is not None and cell.base in spec.terms.bases:
        found.append(TERMS)
    if spec.landscape is not None and cell.base in spec.landscape.bases:
        found.append(SHAPE)
    return tuple(found)


def finished(spec: ScaleSpec, cell: Cell, folder: Path) -> int:
    """How many of a cell's files are there."""
    return sum((folder / name).is_file() for name in stages(spec, cell))


def cell_runs(store: Store, spec: ScaleSpec, cell: Cell, base: BaseSpec, seed: int) -> tuple[str, ...]:
    """Digests of a cell's experts of one seed, in the order of the held-in tasks.

    Args:
        base: of the cell.

    Raises:
        MergeboundError: an expert that is missing or diverged.
    """
    names = {anchored(task): task for task in spec.held_in}
    found: dict[str, str] = {}
    for digest in store.runs():
        run = store.spec(digest)
        if _same(run.base, base) and run.seed == seed and run.task in names:
            found[names[run.task]] = digest
    for task in spec.held_in:
        outcome = store.outcome(found[task]) if task in found else None
        if outcome != "finished":
            raise MergeboundError(
                f"{cell.folder}: the expert of {task} is {outcome or 'missing'}; "
                + ("lower the family's learning rate" if outcome == "diverged" else "run the same command again")
            )
    return tuple(found[task] for task in spec.held_in)


def _same(one: BaseSpec, other: BaseSpec) -> bool:
    """Whether two entries name one base; a grid makes paths of weights absolute."""
    files = [None if base.weights is None else base.weights.name for base in (one, other)]
    plain = [base.model_copy(update={"weights": None}) for base in (one, other)]
    return files[0] == files[1] and plain[0] == plain[1]


def measure_cell(
    spec: ScaleSpec, cell: Cell, base: BaseSpec, store: Path, folder: Path, root: str | None, tell: Tell
) -> None:
    """Do what is missing of a cell.

    Args:
        spec: the study.
        cell: which.
        base: its base, by which its runs are found.
        store: of its family's experts.
        folder: for its files.
        root: of the data sets.
        tell: told (stage, done, total).

    Raises:
        MergeboundError: experts or data that are missing.
    """
    wanted = [name for name in stages(spec, cell) if not (folder / name).is_file()]
    if not wanted:
        return
    groups = chains(spec)
    images = max(
        spec.terms.images if spec.terms is not None else 8, spec.multitask.images if spec.multitask is not None else 8
    )
    with Store.open(store, "r") as opened:
        seeds = dict.fromkeys(group.seed for group in groups)
        digests = {seed: cell_runs(opened, spec, cell, base, seed) for seed in seeds}
        subjects = {s: from_store(opened, d, images=images, seed=spec.seed, root=root) for s, d in digests.items()}
        state = dict(opened.base(opened.digests(next(iter(digests.values()))[0])[0]).state)
    first = next(iter(subjects.values()))
    if {POINTS, MULTITASK} & set(wanted):
        models: list[tuple[str, MultitaskModel]] = []
        if MULTITASK in stages(spec, cell):
            tell("multitask", 0, 1)
            models = train_multitask(first, state, spec)
            _table(folder / MULTITASK, multitask_table(models))
        scorers = {seed: make_scorer(subject, spec, root) for seed, subject in subjects.items()}
        save_points(folder / POINTS, score_points(scorers, groups, spec, models, tell))
    if TERMS in wanted:
        own = [group for group in groups if group.seed == next(iter(seeds))]
        _table(folder / TERMS, measure_terms(first, own, spec, tell))
    if SHAPE in wanted:
        _table(folder / SHAPE, measure_shape(first, spec, tell))
    if ABOUT in wanted:
        _table(folder / ABOUT, _about(cell, first, groups))


def _about(cell: Cell, subject: Subject, groups: tuple[Chosen, ...]) -> pd.DataFrame:
    parameters = sum(p.numel() for p in subject.model.parameters())
    log = [log for log in subject.logs if log is not None]
    return pd.DataFrame(
        [
            {
                "family": cell.family,
                "architecture": cell.architecture,
                "base": cell.base,
                "parameters": parameters,
                "merged_parameters": int(subject.base.numel()),
                "groups": len(groups),
                "training_seconds": round(sum(one.seconds for one in log), 2),
                "base_tensors": _digest(subject),
            }
        ]
    )


def _digest(subject: Subject) -> str:
    import hashlib

    return hashlib.sha256(subject.base.contiguous().numpy().tobytes()).hexdigest()[:16]


def _table(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, frame.to_csv(index=False).encode())
