"""The 20 vision data sets of the merging literature, in the customary order; its prefixes are the usual benchmarks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from experiments.tasks.vision_data import Archive, VisionData
from theory.errors import MergeboundError, nearest

BENCHMARKS = (8, 14, 20)
"""The usual numbers of tasks."""

__all__ = ["BENCHMARKS", "Archive", "VisionData", "find", "prompt_names", "spelling", "vision"]


def vision(count: int = 20) -> tuple[VisionData, ...]:
    """The first 8, 14 or 20 data sets of the customary order.

    Order: SUN397, Stanford Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST, DTD | Oxford Flowers102, PCAM, FER2013,
    Oxford-IIIT Pet, STL10, CIFAR100 | CIFAR10, Food101, Fashion-MNIST, EMNIST letters, KMNIST, Rendered SST2
    (Ilharco et al., arXiv 2212.04089, for the first eight; Wang et al., arXiv 2405.07813, for 14 and 20).

    Raises:
        MergeboundError: another count.
    """
    from experiments.tasks.entries import first8, last6, next6

    if count not in BENCHMARKS:
        raise MergeboundError(
            f"vision({count!r}): the benchmarks have 8, 14 or 20 tasks; take vision(20) and slice it, or name data "
            "sets with tasks.find(NAME)"
        )
    return (*first8.ENTRIES, *next6.ENTRIES, *last6.ENTRIES)[:count]


def find(name: str) -> VisionData:
    """The entry of a name in any usual spelling (``Stanford_Cars``, ``cars``, ``SUN397``, ``fashion-mnist``).

    Raises:
        MergeboundError: unknown; names the nearest.
    """
    known = {spelling(each): entry for entry in vision() for each in (entry.name, entry.title, *entry.aliases)}
    if spelling(name) not in known:
        usual = [entry.name for entry in vision()]
        close = nearest(name, usual)
        raise MergeboundError(f"there is no vision data set {name!r}; {close}, or list them with: mergebound data list")
    return known[spelling(name)]


def spelling(name: str) -> str:
    """A name without case, spaces and punctuation.

    >>> spelling("Fashion-MNIST") == spelling("fashion_mnist")
    True
    """
    return re.sub(r"[^0-9a-z]", "", name.lower())


def prompt_names(name: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names as zero-shot prompts say them, in the order of ``class_names``.

    The catalogue's spoken names where it has them (matched by class name, so a data set with fewer classes works),
    else the names themselves in words: ``AnnualCrop`` gives ``annual crop``, ``abbey_ruin/outdoor`` ``abbey ruin
    outdoor``.

    Args:
        name: of the data set; names that the catalogue does not know are allowed.
        class_names: in the order of the labels.
    """
    try:
        entry = find(name)
    except MergeboundError:
        spoken: dict[str, str] = {}
    else:
        spoken = dict(zip(entry.class_names, entry.spoken, strict=True)) if entry.spoken and entry.class_names else {}
    return tuple(spoken.get(each) or in_words(each) for each in class_names)


def in_words(name: str) -> str:
    """A folder's name in words.

    >>> in_words("HerbaceousVegetation"), in_words("bus_station/indoor"), in_words("AM General Hummer")
    ('herbaceous vegetation', 'bus station indoor', 'AM General Hummer')
    """
    if re.fullmatch(r"([A-Z][a-z]+)+", name):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return " ".join(re.sub(r"[_/]+", " ", name).split())
