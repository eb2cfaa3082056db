"""Entries 15 to 20 of the catalogue.

Addresses and MD5 sums are those of torchvision's classes, sizes those that the servers state.
"""

from __future__ import annotations

from experiments.tasks.entries.names import FOOD
from experiments.tasks.vision_data import Archive, VisionData

_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_SPLITS = ("train", "valid", "test")


def _idx(url: str, folder: str, *known: tuple[str, int]) -> tuple[Archive, ...]:
    return tuple(
        Archive(f"{url}{name}.gz", into=folder, md5=md5, size=size)
        for name, (md5, size) in zip(_IDX, known, strict=True)
    )


ENTRIES: tuple[VisionData, ...] = (
    VisionData(
        name="cifar10",
        title="CIFAR10",
        classes=10,
        class_names_from="the file batches.meta",
        class_names=_CIFAR10,
        counts={"train": 50000, "test": 10000},
        files=(
            *(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
            "cifar-10-batches-py/test_batch",
            "cifar-10-batches-py/batches.meta",
        ),
        archives=(
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                md5="c58f30108f718f92721af3b95e74349a",
                size=170498071,
            ),
        ),
        citation="Krizhevsky: Learning multiple layers of features from tiny images, technical report 2009",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        form="32 x 32 colour",
        aliases=("cifar",),
        note="Pickled files, read as plain data: no code in them runs.",
    ),
    VisionData(
        name="food101",
        title="Food101",
        classes=101,
        class_names_from="meta/train.json, sorted",
        class_names=FOOD,
        counts={"train": 75750, "test": 25250},
        files=("food-101/images/", "food-101/meta/train.json", "food-101/meta/test.json"),
        archives=(
            Archive(
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                md5="85eeb15f3717b99a5da872d97d918f87",
                size=4996278331,
            ),
        ),
        licence=(
            "images of Foodspotting, not property of ETH Zurich; use beyond scientific fair use must be negotiated "
            "with the picture owners"
        ),
        citation="Bossard, Guillaumin, Van Gool: Food-101, mining discriminative components, ECCV 2014",
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        form="colour photographs, long side at most 512 pixels",
        aliases=("food",),
        note=(
            "Numbered as torchvision does, by sorted name: cheese_plate is 16 and cheesecake 17; classes.txt and some "
            "mirrors have these two the other way round."
        ),
    ),
    VisionData(
        name="fashion_mnist",
        title="Fashion-MNIST",
        classes=10,
        class_names_from="the source's list",
        class_names=_FASHION,
        spoken=("T-shirt or top", *(name.lower() for name in _FASHION[1:])),
        counts={"train": 60000, "test": 10000},
        files=tuple(f"FashionMNIST/raw/{name}" for name in _IDX),
        archives=_idx(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "FashionMNIST/raw",
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26421880),
            ("25c81989df183df01b3e8a0aad5dffbe", 29515),
            ("bef4ecab320f06d8554ea6380940ec79", 4422102),
            ("bb300cfdad3c16e7a12a480ee83cd310", 5148),
        ),
        licence="MIT",
        citation="Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        form="28 x 28 grey",
        aliases=("fmnist", "fashion"),
    ),
    VisionData(
        name="emnist_letters",
        title="EMNIST letters",
        classes=26,
        class_names_from="the alphabet; upper and lower case of a letter are one class",
        class_names=tuple("abcdefghijklmnopqrstuvwxyz"),
        counts={"train": 124800, "test": 20800},
        other_counts=({"train": 88800, "test": 14800},),
        files=tuple(
            f"EMNIST/raw/emnist-letters-{part}-{kind}-ubyte|EMNIST/raw/gzip/emnist-letters-{part}-{kind}-ubyte.gz"
            for part in ("train", "test")
            for kind in ("images-idx3", "labels-idx1")
        ),
        archives=(
            Archive(
                "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
                into="EMNIST/raw",
                md5="58c8d27c78d21e728a6bc7b3cc06412e",
                size=561753746,
            ),
        ),
        citation="Cohen et al.: EMNIST, extending MNIST to handwritten letters, IJCNN 2017, arXiv 1702.05373",
        homepage="https://www.nist.gov/itl/products-and-services/emnist-dataset",
        form="28 x 28 grey",
        aliases=("emnist",),
        note=(
            "Stored with rows and columns exchanged, handed out upright; labels 1 .. 26 become 0 .. 25. The paper's "
            "table counts 88,800 and 14,800 images, the files hold 124,800 and 20,800."
        ),
    ),
    VisionData(
        name="kmnist",
        title="KMNIST",
        classes=10,
        class_names_from="the source's list (Hepburn spelling of the hiragana)",
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        counts={"train": 60000, "test": 10000},
        files=tuple(f"KMNIST/raw/{name}" for name in _IDX),
        archives=_idx(
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            "KMNIST/raw",
            ("bdb82020997e1d708af4cf47b453dcf7", 18165135),
            ("e144d726b3acfaa3e44228e80efcd344", 29497),
            ("5c965bf0a639b31b8f53240b1b52f4d7", 3041136),
            ("7320c461ea6c1c855c0b718fb2a4b134", 5120),
        ),
        licence="CC BY-SA 4.0",
        citation="Clanuwat et al.: Deep learning for classical Japanese literature, arXiv 1812.01718",
        homepage="https://github.com/rois-codh/kmnist",
        form="28 x 28 grey",
        aliases=("kuzushiji", "kuzushiji-mnist"),
    ),
    VisionData(
        name="rendered_sst2",
        title="Rendered SST2",
        classes=2,
        class_names_from="the folders",
        class_names=("negative", "positive"),
        counts={"train": 6920, "validation": 872, "test": 1821},
        files=tuple(f"rendered-sst2/{part}/{name}/" for part in _SPLITS for name in ("negative", "positive")),
        archives=(
            Archive(
                "https://openaipublic.azureedge.net/clip/data/rendered-sst2.tgz",
                md5="2384d08e9dcfa4bd55b324e610496ee5",
            ),
        ),
        citation="Radford et al.: Learning transferable visual models from natural language supervision, ICML 2021",
        homepage="https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
        form="448 x 448 pictures of sentences",
        aliases=("sst2",),
        note="The source gives the size as 131 MB; the sentences are those of Socher et al., EMNLP 2013.",
    ),
)
