"""A1 and A2 from the images: do tasks share samples, and were judged images used before (theory.md section 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.inputs.training_data import TrainingData
from experiments.measure.subject import Subject
from experiments.measure.verdicts.finding import Evidence, Finding, Leaning, finding

_CHUNK = 1024
_ALIKE = 0.01
"""Share of images that are rearrangements of another task's from which A1 is violated."""
_CHANCE = 10.0
"""...if it is so many times the share of such pairs within one task."""


@dataclass(frozen=True, eq=False)
class Digests:
    """What identifies the images of one sample.

    Attributes:
        pixels: digest of each image as the network sees it.
        values: digest of its sorted pixels: the same for every rearrangement (turned, mirrored, shifted round).
        rows: row numbers of the underlying data set; ``None`` where they are not known.
        family: name of that data set; row numbers of different families are not comparable.
    """

    pixels: tuple[bytes, ...]
    values: tuple[bytes, ...]
    rows: np.ndarray | None
    family: str

    def __len__(self) -> int:
        return len(self.pixels)


def digests_of(data: TrainingData, family: str) -> Digests:
    """Digests of all images of a sample, 1,024 at a time; no augmentation is applied where ``data`` has none."""
    pixels: list[bytes] = []
    values: list[bytes] = []
    for start in range(0, len(data), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(data)), dtype=np.int64)
        images, _ = data.batch(rows, 0)
        flat = images.to(torch.float32).contiguous().flatten(1).cpu().numpy()
        pixels += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in flat]
        values += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in np.sort(flat, axis=1)]
    source = getattr(data, "source", None)
    return Digests(tuple(pixels), tuple(values), None if source is None else np.asarray(source), family)


def family_of(task: str) -> str:
    """What a task's row numbers refer to: all ``digits8`` tasks show the same images, other tasks their own."""
    return "digits8" if task.startswith("digits8:") else task


@dataclass(frozen=True)
class Overlap:
    """Images of one sample that another one has too; counts over the first.

    Attributes:
        same: by row number of one data set, or pixel by pixel.
        alike: the same pixels in any order (these include the same).
        within: images of the first whose sorted pixels another image of the first has: how often that is chance.
        size: of the first.
    """

    same: int
    alike: int
    within: int
    size: int


def overlap(first: Digests, second: Digests) -> Overlap:
    """Count the images of ``first`` that ``second`` shows."""
    there, there_alike = set(second.pixels), set(second.values)
    same = np.array([p in there for p in first.pixels], dtype=bool)
    if first.rows is not None and second.rows is not None and first.family == second.family:
        same |= np.isin(first.rows, second.rows)
    alike = same | np.array([v in there_alike for v in first.values], dtype=bool)
    within = len(first.values) - len(set(first.values))
    return Overlap(int(same.sum()), int(alike.sum()), within, len(first))


def judge_independence(names: Sequence[str], samples: Sequence[Digests], *, training: bool = True) -> Finding:
    """A1: whether tasks share images.

    Args:
        names: of the experts.
        samples: digests of each S_i, or of other images of its task where S_i is not known.
        training: they are the whole S_i; otherwise a shared image is evidence only.

    Returns:
        ``violated`` (covered: exchange all copies at once, sensitivities add) where an image is shared, or where 1 % of
        a sample or more are another's images with their pixels rearranged, ten times more than within one sample;
        ``holds`` where no image of any whole S_i is shared, or a single task is given.
    """
    if len(samples) == 1:
        return finding("independent_samples", "merge", "holds", "there is one task")
    pairs = [(i, k, overlap(samples[i], samples[k])) for i in range(len(names)) for k in range(len(names)) if i != k]
    i, k, top = max(pairs, key=lambda item: (item[2].same / item[2].size, item[2].alike / item[2].size))
    worst_same, worst_alike = top.same, max(p[2].alike / p[2].size for p in pairs)
    a, b, rearranged = max(pairs, key=lambda item: item[2].alike / item[2].size)
    chance = rearranged.within / rearranged.size
    turned = worst_alike >= _ALIKE and worst_alike >= _CHANCE * chance
    covers = "every image of both samples" if training else "the images given, not the training samples"
    evidence = (
        Evidence.exact("largest share of a sample that another task has", worst_same / top.size, covers),
        Evidence.exact("images shared by that pair", worst_same, covers),
        Evidence.exact("largest share that is another task's with pixels rearranged", worst_alike, covers),
        Evidence.exact("the same within one sample (chance)", chance, covers),
    )
    remedy = "state shared_samples=True: all copies of an image are exchanged at once and sensitivities add up"
    if worst_same or turned:
        what = f"{names[i]} and {names[k]} share {worst_same} of {top.size} images"
        if not worst_same:
            what = f"{rearranged.alike} of {rearranged.size} images of {names[a]} are rearranged images of {names[b]}"
        if training:
            return finding("independent_samples", "merge", "violated", what, *evidence, covered=True, remedy=remedy)
        return finding("independent_samples", "merge", "unknown", what, *evidence, seen="against", remedy=remedy)
    if training:
        why = f"none of {sum(len(s) for s in samples)} training images is another task's, pixel by pixel"
        return finding("independent_samples", "merge", "holds", why, *evidence)
    why = "training samples are not known; the images given are not shared"
    return finding("independent_samples", "merge", "unknown", why, *evidence, seen="for")


def judge_fresh(
    name: str, train: Digests | None, calibration: Digests, test: Digests | None, *, judged_on: str = "test"
) -> Finding:
    """A2 of one expert: images on which merges are judged were not trained on, nor used to choose coefficients.

    Args:
        name: of the expert.
        train, calibration, test: digests; ``None`` where they are not known.
        judged_on: ``test``, or ``calibration`` where there is no test set.
    """
    judged = test if judged_on == "test" else calibration
    if judged is None:
        return finding("fresh_judges", name, "unknown", "no images to judge on are known; give a test set")
    others = {"training": train} if judged_on != "test" else {"training": train, "calibration": calibration}
    counts = {label: overlap(judged, other).same for label, other in others.items() if other is not None}
    evidence = [
        Evidence.exact(f"{judged_on} images that are {label} images", n, f"{len(judged)} images, pixel by pixel or row")
        for label, n in counts.items()
    ]
    if any(counts.values()):
        why = ", ".join(
            f"{n} of {len(judged)} {judged_on} images are {label} images" for label, n in counts.items() if n
        )
        return finding(
            "fresh_judges", name, "violated", why, *evidence, remedy="take these images out of the judged set"
        )
    if train is None:
        seen: Leaning = "for" if counts else "nothing"
        why = "the training sample is not known"
        return finding("fresh_judges", name, "unknown", why, *evidence, seen=seen, remedy="open the grid's store")
    return finding("fresh_judges", name, "holds", "no judged image was seen before", *evidence)


def judge_choices(chosen_on: str, *, recipes_known: bool, last_checkpoint: bool | None = None) -> Finding:
    """A2 of the merge: what its coefficients, checkpoints and hyperparameters were chosen on.

    Args:
        chosen_on: ``nothing`` (coefficients fixed beforehand, as for the average), ``held-out`` (calibration images
            that are no training images), ``train``, or ``unknown``.
        recipes_known: experts of a grid, whose recipes were written down before any of them was run.
        last_checkpoint: experts are the runs' last checkpoints; ``None`` where that is not known.
    """
    if chosen_on == "train":
        why = "coefficients were chosen on training images"
        return finding(
            "independent_choices", "merge", "violated", why, remedy="choose them on other images, or fix them"
        )
    if last_checkpoint is False:
        why = "experts are not their runs' last checkpoints: how these were chosen is not known"
        return finding("independent_choices", "merge", "unknown", why, seen="against", remedy="take the last step")
    if chosen_on == "unknown" or not recipes_known:
        what = "coefficients" if chosen_on == "unknown" else "recipes and checkpoints"
        why = f"it is not known on what {what} were chosen"
        return finding("independent_choices", "merge", "unknown", why, remedy="state data_independent_choices")
    why = "coefficients are fixed" if chosen_on == "nothing" else "coefficients depend on held-out images only"
    return finding("independent_choices", "merge", "holds", f"{why}; recipes were written down before training")


def judge_base(subject: Subject) -> Finding:
    """A2 of the base: a seeded random start depends on no sample; of other bases it is not known."""
    kinds = {run.base.kind for run in subject.runs if run is not None}
    if kinds == {"random"} and all(run is not None for run in subject.runs):
        return finding("independent_base", "merge", "holds", "the base is a seeded random start")
    own = {run.base.data for run in subject.runs if run is not None and run.base.data}
    shared = sorted({family_of(task) for task in own} & {family_of(run.task) for run in subject.runs if run})
    if shared:
        why = f"the base was pretrained on {', '.join(shared)}, which is an expert's data set, too"
        remedy = "pretrain on other images, or leave these experts out"
        return finding("independent_base", "merge", "unknown", why, seen="against", remedy=remedy)
    why = "what the base was trained on is not known image by image"
    return finding("independent_base", "merge", "unknown", why, remedy="state data_independent_choices if it is so")


def digests_of_subject(
    subject: Subject,
) -> tuple[tuple[Digests | None, ...], tuple[Digests, ...], tuple[Digests | None, ...]]:
    """Digests of the training, calibration and test images of every expert."""

    def each(parts: Sequence[TrainingData | None]) -> tuple[Digests | None, ...]:
        pairs = zip(parts, subject.tasks, strict=True)
        return tuple(None if data is None else digests_of(data, family_of(task)) for data, task in pairs)

    # rows of a calibration split that was drawn count within the part that it was drawn from, not the data set
    drawn = tuple(
        Digests(found.pixels, found.values, None, found.family)
        for found in (
            digests_of(split, family_of(task)) for split, task in zip(subject.calibration, subject.tasks, strict=True)
        )
    )
    return each(subject.train), drawn, each(subject.test)
