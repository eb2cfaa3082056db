"""What is known of a task without opening it: classes and images, from the catalogues of data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import MOST_VALIDATION, TEST_SHARE, VALIDATION_SHARE, ImageTask
from experiments.tasks.digits_images import CALIBRATION, OWN, PRETRAINING, TEST
from experiments.tasks.named import open_task
from experiments.tasks.npz8 import FILES


@dataclass(frozen=True)
class TaskFacts:
    """Sizes of a task.

    Attributes:
        name: as a grid names it.
        classes: of the labels.
        train, validation, test: images in each part.
        opened: whether the data themselves were counted, not their source's publication.
    """

    name: str
    classes: int
    train: int
    validation: int
    test: int
    opened: bool = False


def facts_of(name: str, task: ImageTask) -> TaskFacts:
    """The sizes of a task that is open."""
    return TaskFacts(name, task.classes, len(task.train), len(task.validation), len(task.test), True)


def published_facts(name: str, root: str | Path | None = None) -> TaskFacts:
    """The sizes of a task as its source publishes them; a file or folder is opened.

    Raises:
        MergeboundError: an unknown name, or a path that cannot be read.
    """
    family, _, rest = name.partition(":")
    if family == "digits8":
        return TaskFacts(name, 10, PRETRAINING if rest == "pretraining" else OWN, CALIBRATION, TEST)
    if family == "npz8":
        file = next(each for each in FILES if each.name == rest)
        return _split(name, file.classes, {"train": file.train, "test": file.test})
    if Path(name).suffix == ".npz" or Path(name).is_dir():
        return facts_of(name, open_task(name, root))
    entry = find(name)
    return _split(name, entry.classes, dict(entry.counts))


def _split(name: str, classes: int, parts: dict[str, int]) -> TaskFacts:
    """As :func:`experiments.tasks.dataset.split` divides them."""
    left = parts["train"]
    test = parts.get("test", round(TEST_SHARE * left))
    left -= 0 if "test" in parts else test
    validation = parts.get("validation", min(MOST_VALIDATION, round(VALIDATION_SHARE * left)))
    left -= 0 if "validation" in parts else validation
    return TaskFacts(name, classes, left, validation, test)
