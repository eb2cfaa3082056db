"""Gradients of a subject's tasks at common points and along training, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor

from experiments.measure.noise.constants import training_sample
from experiments.measure.noise.heterogeneity import TaskGradients, successive_cosines, task_gradients
from experiments.measure.noise.objective import Point, objective_of, path_of
from experiments.measure.noise.per_sample import MEMORY
from experiments.measure.subject import Subject


def gradients_at(
    subject: Subject,
    x: Tensor,
    *,
    heads: Sequence[Mapping[str, Tensor]] | None = None,
    name: str = "",
    samples: int = 256,
    seed: int = 0,
    memory: int = MEMORY,
) -> TaskGradients:
    """Gradients of every task at one point of the merged coordinates, through each task's own head.

    Args:
        subject: two experts or more.
        x: (P,), for instance ``subject.base`` or an expert's.
        heads: private tensors of each task; default: those after fine-tuning.
        name: of the point.
        samples: training samples of each task at most, drawn for every task alone.
        seed: names the draws.
        memory: bytes for per-sample gradients.
    """
    chosen = subject.heads if heads is None else heads
    drawn = [training_sample(subject, j, samples, seed) for j in range(subject.size)]
    objectives = [objective_of(subject, j, Point(name, -1, x, chosen[j])) for j in range(subject.size)]
    return task_gradients(
        objectives,
        [split for split, _ in drawn],
        [n for _, n in drawn],
        subject.names,
        point=name,
        seed=seed,
        memory=memory,
    )


def gradients_between(
    subject: Subject,
    checkpoints: Sequence[Sequence[Point]] = (),
    *,
    samples: int = 256,
    seed: int = 0,
    memory: int = MEMORY,
) -> pd.DataFrame:
    """Cosines between the tasks' shared gradients at the base, at every expert and at the experts' average; and each
    task at its own place of its own way, checkpoint by checkpoint, where all ways have as many.

    Columns as :meth:`TaskGradients.to_frame`; ``point`` is ``own <name>`` where every task is at its own place.
    """
    places = {"base, final heads": subject.base, "average": subject.vectors.double().mean(dim=0).to(subject.base.dtype)}
    places |= {f"expert {name}": x for name, x in zip(subject.names, subject.vectors, strict=True)}
    frames = [
        gradients_at(subject, x, name=name, samples=samples, seed=seed, memory=memory).to_frame()
        for name, x in places.items()
    ]
    paths = [path_of(subject, j, checkpoints=checkpoints[j] if checkpoints else ()) for j in range(subject.size)]
    if len({len(path) for path in paths}) == 1:
        drawn = [training_sample(subject, j, samples, seed) for j in range(subject.size)]
        for number in range(len(paths[0])):
            objectives = [objective_of(subject, j, path[number]) for j, path in enumerate(paths)]
            found = task_gradients(
                objectives,
                [split for split, _ in drawn],
                [n for _, n in drawn],
                subject.names,
                point=f"own {paths[0][number].name}",
                seed=seed,
                memory=memory,
            )
            frames.append(found.to_frame())
    return pd.concat(frames, ignore_index=True)


def gradients_along(
    subject: Subject,
    checkpoints: Sequence[Sequence[Point]] = (),
    *,
    samples: int = 256,
    seed: int = 0,
    memory: int = MEMORY,
) -> pd.DataFrame:
    """How every expert's gradient turns along its way; columns of :func:`successive_cosines`, and ``expert``."""
    frames = []
    for j, name in enumerate(subject.names):
        path = path_of(subject, j, checkpoints=checkpoints[j] if checkpoints else ())
        sample, n = training_sample(subject, j, samples, seed)
        objectives = [objective_of(subject, j, point) for point in path]
        frame = successive_cosines(
            objectives, sample, [point.name for point in path], population=n, seed=seed, memory=memory
        )
        frame.insert(0, "expert", name)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
