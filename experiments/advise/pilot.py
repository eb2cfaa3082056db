"""The pilot: short runs of every recipe on every task, and what their merges cost at every checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.advise.domain import domain_of
from experiments.advise.pilot_spec import PilotSpec, pilot_runs
from experiments.bases.spec import BaseSpec
from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec
from experiments.measure.predictors.collect import point_at
from experiments.measure.subject import Subject
from experiments.store import Store
from theory.errors import MergeboundError
from theory.function_space import cross_entropy, joint_standard_error

_GROUPS = 0x9209
_log = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pilot:
    """A pilot that was run.

    Attributes:
        spec: what was tried.
        tasks, base: of the runs.
        folder: of the store with the runs.
        runs: digests by recipe, in the order of the tasks.
        recipes: the first task's run of every recipe.
        rows: one per recipe, checkpoint, group and scale; see :func:`pilot_rows`.
        samples: that one expert's pilot runs took.
        seconds: that training took, all runs together.
        images: training images of each task.
        classes: of each task.
        hull: whether the network has BatchNorm.
    """

    spec: PilotSpec
    tasks: tuple[str, ...]
    base: BaseSpec
    folder: Path
    runs: tuple[tuple[str, ...], ...]
    recipes: tuple[RunSpec, ...]
    rows: pd.DataFrame
    samples: float
    seconds: float
    images: tuple[int, ...]
    classes: tuple[int, ...]
    hull: bool


def run_pilot(
    pilot: PilotSpec,
    tasks: Sequence[str],
    base: BaseSpec,
    samples: float,
    folder: Path,
    *,
    root: str | Path | None = None,
    workers: int | None = None,
    judged: Sequence[str] | None = None,
    say: Say | None = None,
) -> Pilot:
    """Train the pilot's runs in a store of their own (a second call goes on), and measure their merges.

    Args:
        pilot: what is tried.
        tasks: two or more, as :func:`experiments.tasks.named.expand` gives them.
        base: of all experts.
        samples: budget of one expert, of which the pilot takes its share.
        folder: of the store.
        root: of the data sets.
        workers: processes; default one per core.
        judged: the tasks whose experts are merged and measured (default all): the others are trained only.
        say: is told what is being done.

    Raises:
        MergeboundError: fewer than two tasks, a budget that is too small, or what grids raise.
    """
    from experiments.tasks.named import anchored, open_task

    tell = say or _log.info
    names = tuple(anchored(task) for task in tasks)
    opened = [open_task(name, root, seed=0) for name in names]
    images = tuple(len(task.train) for task in opened)
    wanted = tuple(anchored(task) for task in judged or tasks)
    if len(wanted) < 2 or not set(wanted) <= set(names):
        raise MergeboundError(f"tasks: {len(wanted)} are to be merged; give two or more of those that are trained")
    planned = pilot_runs(pilot, names, base, pilot.share * samples, min(images))
    runs = tuple(run for recipe in planned for run in recipe)
    train_runs(runs, folder, root=root, workers=workers, say=tell)
    columns = [names.index(task) for task in wanted]
    with Store.open(folder, "r") as store:
        by_spec = {_key(store.spec(digest)): digest for digest in store.runs()}
        digests = tuple(tuple(by_spec[_key(recipe[k])] for k in columns) for recipe in planned)
        rows, hull = pilot_rows(pilot, store, digests, [opened[k].classes for k in columns], root, tell)
        seconds = sum(store.log(d).seconds for recipe in digests for d in recipe)
    return Pilot(
        spec=pilot,
        tasks=wanted,
        base=base,
        folder=folder,
        runs=digests,
        recipes=tuple(recipe[0] for recipe in planned),
        rows=rows,
        samples=float(sum(recipe[0].steps * recipe[0].batch_size for recipe in planned)),
        seconds=seconds,
        images=tuple(images[k] for k in columns),
        classes=tuple(opened[k].classes for k in columns),
        hull=hull,
    )


def _key(run: RunSpec) -> str:
    """What tells a run from the others of its store; a base's path may be written otherwise there."""
    return run.model_dump_json(exclude={"base"})


def train_runs(
    runs: Sequence[RunSpec],
    folder: Path,
    *,
    root: str | Path | None = None,
    workers: int | None = None,
    say: Say | None = None,
) -> None:
    """Do what is missing of some runs in a store of their own.

    Raises:
        MergeboundError: cohorts that were given up, another grid in the folder, or what preparing raises.
    """
    import hashlib

    from experiments.engines.local import run_local
    from experiments.engines.prepare import prepare, tidy
    from experiments.store.database import DATABASE

    tell = say or _log.info
    digest = hashlib.sha256("\n".join(run.model_dump_json() for run in runs).encode()).hexdigest()
    if (folder / DATABASE).exists():
        with Store.open(folder, "r") as kept:
            if kept.meta.get("digest") == digest and kept.runs() and not kept.missing():
                return
    meta = {"grid": {"name": "advise"}, "digest": digest, "source": "advise"}
    prepare(folder, runs, meta, root=root, report=tell)
    outcome = run_local(folder, root, workers=workers)
    if not outcome.complete:
        first = next(iter(outcome.failed.items()), ("", "stopped"))
        raise MergeboundError(f"{folder}: runs are missing (cohort {first[0]}: {first[1]}); run the same command again")
    tidy(folder)


def coordinates(run: RunSpec, step: int) -> dict[str, float]:
    """The theory's coordinates of a recipe after ``step`` steps.

    ``time``: training time tau = eta k / (1 - beta) (section 4, gradients that do not depend on x); ``noise``: noise
    time per training time, eta / (b (1 - beta)); ``shrink``: omega tau, by which decay shrinks.
    """
    factor = schedule(run.schedule, run.steps, warm_up=run.warm_up)
    factors = np.array([factor(k) for k in range(step)])
    effective = run.learning_rate / (1.0 - run.momentum)
    time = effective * float(factors.sum())
    noise = effective * float((factors**2).sum() / factors.sum()) / run.batch_size
    return {"time": time, "noise": noise, "shrink": run.weight_decay * time}


def pilot_rows(
    pilot: PilotSpec,
    store: Store,
    runs: Sequence[Sequence[str]],
    classes: Sequence[int],
    root: str | Path | None,
    say: Say,
) -> tuple[pd.DataFrame, bool]:
    """What merges of every recipe's experts cost, measured on validation images.

    Returns:
        One row per recipe, checkpoint, group and scale: ``recipe``, ``step``, the coordinates, hyperparameters,
        ``experts`` (N), ``group`` (indices of tasks), ``scale`` (lambda N), ``risk`` with ``standard_error`` (joint,
        nats), ``accuracy`` with ``accuracy_error``, ``own_risk`` with ``own_error`` and ``own_accuracy`` (of the
        experts alone), ``base_risk`` with ``base_error`` (the base on the same images), ``training_risk`` (last batches
        of the logs), ``finite``, ``tier``, ``seed``; and whether the network has BatchNorm.
    """
    from experiments.engines.workplace import Workplace
    from experiments.measure.opening import from_store

    place = Workplace(store.base, root)
    rows: list[dict[str, Any]] = []
    hull = False
    for number, digests in enumerate(runs):
        say(f"pilot: merges of recipe {number + 1} of {len(runs)}")
        spec = store.spec(digests[0])
        for step in spec.checkpoints:
            about: dict[str, Any] = {"recipe": number, "step": step, **coordinates(spec, step)}
            about |= {
                "learning_rate": spec.learning_rate, "batch_size": spec.batch_size, "momentum": spec.momentum,
                "weight_decay": spec.weight_decay,
            }  # fmt: skip
            if any(store.outcome(digest) != "finished" for digest in digests):
                rows += _diverged(about, pilot, digests, classes)
                continue
            subject = from_store(
                store, digests, images=pilot.images, seed=pilot.seed, root=root, step=step, workplace=place
            )
            hull = domain_of(subject).hull
            logs = [store.log(digest).batch_loss[max(0, step - 10) : step] for digest in digests]
            about["training_risk"] = float(np.mean([log.mean() for log in logs]))
            rows += [
                about | row for row in _measured(subject, pilot, hull, classes, [pilot.seed, _GROUPS, number, step])
            ]
    return pd.DataFrame(rows), hull


def _measured(
    subject: Subject, pilot: PilotSpec, hull: bool, classes: Sequence[int], seed: Sequence[int]
) -> list[dict[str, Any]]:
    size = subject.size
    own = [_losses(subject, j, subject.vectors[j]) for j in range(size)]
    base = [_losses(subject, j, subject.base)[0] for j in range(size)]
    names = [split.source + j * (1 << 24) for j, split in enumerate(subject.calibration)]
    rng = np.random.default_rng(list(seed))
    groups = [tuple(range(size))]
    groups += [tuple(sorted(int(i) for i in rng.permutation(size)[:k])) for k in range(2, size)]
    cap = pilot.cap * float(np.mean(np.log(classes)))
    rows = []
    for group in groups:
        whole = len(group) == size
        for scale in pilot.scales if whole else (1.0,):
            if hull and scale > 1.0:
                continue
            alpha = np.zeros(size)
            alpha[list(group)] = scale / len(group)
            vector = point_at(subject, alpha)
            losses = [_losses(subject, j, vector) for j in group]
            sources = [names[j] for j in group]
            risk = float(np.mean([loss.mean() for loss, _ in losses]))
            rows.append(
                {
                    "experts": len(group),
                    "group": ";".join(str(j) for j in group),
                    "scale": scale,
                    "risk": min(risk, cap),
                    "standard_error": joint_standard_error([loss for loss, _ in losses], sources),
                    "accuracy": float(np.mean([hits.mean() for _, hits in losses])),
                    "accuracy_error": joint_standard_error([hits for _, hits in losses], sources),
                    "own_risk": min(float(np.mean([own[j][0].mean() for j in group])), cap),
                    "own_error": joint_standard_error([own[j][0] for j in group], sources),
                    "own_accuracy": float(np.mean([own[j][1].mean() for j in group])),
                    "base_risk": float(np.mean([base[j].mean() for j in group])),
                    "base_error": joint_standard_error([base[j] for j in group], sources),
                    "finite": risk <= cap,
                    "tier": "measured",
                    "seed": pilot.seed,
                }
            )
    return rows


def _losses(subject: Subject, j: int, vector: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Losses of task j at merged coordinates (nats, clipped at 1e6), and hits (0 or 1), by image."""
    split = subject.calibration[j]
    parts = [subject.networks[j].features(vector, part) for part in torch.split(split.images, 256)]
    logits = np.nan_to_num(torch.cat(parts).double().numpy(), nan=0.0, posinf=1e6, neginf=-1e6)
    labels = split.labels.numpy()
    return np.minimum(cross_entropy(logits, labels), 1e6), (logits.argmax(axis=-1) == labels).astype(float)


def _diverged(
    about: dict[str, Any], pilot: PilotSpec, digests: Sequence[str], classes: Sequence[int]
) -> list[dict[str, Any]]:
    cap, nan = pilot.cap * float(np.mean(np.log(classes))), float("nan")
    row = {
        "experts": len(digests), "group": ";".join(str(j) for j in range(len(digests))), "scale": 1.0, "risk": cap,
        "standard_error": nan, "accuracy": 0.0, "accuracy_error": nan, "own_risk": cap, "own_error": nan,
        "own_accuracy": 0.0, "base_risk": nan, "base_error": nan, "training_risk": cap,
        "finite": False, "tier": "measured", "seed": pilot.seed,
    }  # fmt: skip
    return [about | row]
