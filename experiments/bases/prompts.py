"""The customary prompt templates of the 20 vision tasks; ``{}`` stands for the class name.

Source: the prompts published with CLIP (Radford et al. 2021, arXiv 2103.00020, ``data/prompts.md`` of its repository)
for the data sets that it was evaluated on; for EMNIST, KMNIST and Fashion-MNIST those of the model merging literature
(Ilharco et al. 2023, arXiv 2212.04089; Wang et al. 2024, arXiv 2405.07813).
"""

from __future__ import annotations

from experiments.tasks.catalogue import find, spelling
from theory.errors import MergeboundError

GENERIC = ("a photo of a {}.",)
"""For data sets without templates of their own."""

_BOTH = ("a photo of a {}.", "a photo of the {}.")
_LOOKS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_OBJECTS = tuple(
    prompt
    for article in ("a", "the")
    for prompt in (
        *(f"a {look}photo of {article} {{}}." for look in _LOOKS),
        f"a photo of {article} small {{}}.",
        f"a photo of {article} big {{}}.",
    )
)
_AERIAL = tuple(
    f"{above} {picture} of {article}{{}}."
    for article in ("", "a ", "the ")
    for picture in ("imagery", "photo", "view")
    for above in ("satellite", "aerial")
)
_THINGS = ("texture", "pattern", "thing", "object")
_TEXTURES = tuple(f"a photo of {article} {{}} {thing}." for article in ("a", "the") for thing in _THINGS)
_CARS = (
    *_BOTH,
    "a photo of my {}.",
    "i love my {}!",
    *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
)
_FACES = (
    "a photo of a {} looking face.",
    "a photo of a face showing the emotion: {}.",
    "a photo of a face looking {}.",
    "a face that looks {}.",
    "they look {}.",
    "look at how {} they are.",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "SUN397": _BOTH,
    "Stanford Cars": _CARS,
    "RESISC45": _AERIAL,
    "EuroSAT": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "SVHN": ('a photo of the number: "{}".',),
    "GTSRB": tuple(f'a {how} photo of a "{{}}" traffic sign.' for how in ("zoomed in", "centered", "close up")),
    "MNIST": ('a photo of the number: "{}".',),
    "DTD": _TEXTURES,
    "Flowers102": ("a photo of a {}, a type of flower.",),
    "PCAM": ("this is a photo of {}",),
    "FER2013": _FACES,
    "Oxford-IIIT Pet": ("a photo of a {}, a type of pet.",),
    "STL10": _BOTH,
    "CIFAR100": _OBJECTS,
    "CIFAR10": _OBJECTS,
    "Food101": ("a photo of {}, a type of food.",),
    "Fashion-MNIST": _BOTH,
    "EMNIST letters": ('a photo of the digit character: "{}".',),
    "KMNIST": ("a photo of the character {}.",),
    "Rendered SST2": ("a {} review of a movie.",),
}
"""By the usual names of the data sets."""


def templates_for(name: str) -> tuple[str, ...]:
    """The templates of a data set, in any usual spelling of its name; :data:`GENERIC` for one that has none."""
    by_name = {spelling(each): templates for each, templates in TEMPLATES.items()}
    names = [name]
    try:
        entry = find(name)
        names += [entry.name, entry.title, *entry.aliases]
    except MergeboundError:
        pass
    return next((by_name[spelling(each)] for each in names if spelling(each) in by_name), GENERIC)
