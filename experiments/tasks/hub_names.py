"""Where the 20 vision data sets lie on the Hugging Face hub: the copies that FusionBench uses, where it names one.

Source: the data set configurations of FusionBench (Tang et al., arXiv 2406.03280).  Splits differ from those of the
data sets' own sources in places (SUN397, EuroSAT, DTD, GTSRB, RESISC45), so results from them have another digest and
are not to be mixed.  ``refs/convert/parquet`` is the hub's own conversion of repositories in other formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class HubPlace:
    """One data set on the hub.

    Attributes:
        repository: ``owner/name``.
        config: the folder (configuration) below it, empty where there is one only.
        image, label: columns.
        train, test: names of the parts.
        revision: branch, tag or commit; None is the default branch.
        note: what users should know.
    """

    repository: str
    config: str = ""
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"
    revision: str | None = None
    note: str = ""

    @property
    def shown(self) -> str:
        """Repository and configuration in one word."""
        return f"{self.repository}:{self.config}" if self.config else self.repository


HUB: Mapping[str, HubPlace] = {
    "sun397": HubPlace("tanganke/sun397"),
    "stanford_cars": HubPlace("tanganke/stanford_cars"),
    "resisc45": HubPlace("tanganke/resisc45", note="18,900 / 6,300 images"),
    "eurosat": HubPlace("tanganke/eurosat"),
    "svhn": HubPlace("ufldl-stanford/svhn", "cropped_digits"),
    "gtsrb": HubPlace("tanganke/gtsrb", note="26,640 / 12,630 images"),
    "mnist": HubPlace("ylecun/mnist"),
    "dtd": HubPlace("tanganke/dtd"),
    "flowers102": HubPlace("dpdl-benchmark/oxford_flowers102"),
    "pcam": HubPlace("1aurent/PatchCamelyon", note="labels are false and true"),
    "fer2013": HubPlace("clip-benchmark/wds_fer2013", image="jpg", label="cls", revision=CONVERTED),
    "oxford_iiit_pet": HubPlace("timm/oxford-iiit-pet"),
    "stl10": HubPlace("tanganke/stl10"),
    "cifar100": HubPlace("tanganke/cifar100"),
    "cifar10": HubPlace("tanganke/cifar10"),
    "food101": HubPlace("ethz/food101", test="validation"),
    "fashion_mnist": HubPlace("zalando-datasets/fashion_mnist"),
    "emnist_letters": HubPlace("tanganke/emnist_letters", note="images are transposed"),
    "kmnist": HubPlace("tanganke/kmnist"),
    "rendered_sst2": HubPlace("nateraw/rendered-sst2", revision=CONVERTED),
}
"""By the catalogue's names, in the customary order."""
