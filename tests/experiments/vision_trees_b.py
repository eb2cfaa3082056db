"""Tiny copies of vision data sets in their real on-disk formats, written here by hand: the other twelve."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from tests.experiments.vision_trees import Builder, Tree, Written, idx_part, noise, plain, write_idx, write_image

_BREEDS = (
    "Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer "
    "British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees "
    "havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland Persian pomeranian pug "
    "Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese Sphynx staffordshire_bull_terrier "
    "wheaten_terrier yorkshire_terrier"
)
BREEDS = tuple(_BREEDS.split())


def flowers102(root: Path, rng: np.random.Generator) -> Tree:
    """One photograph of each class in each part, the numbers of the parts mixed; labels 1 .. 102 in MATLAB files."""
    from scipy.io import savemat

    from experiments.tasks import find

    base = root / "flowers-102"
    labels = np.zeros(306, dtype=np.uint8)
    parts: dict[str, Written] = {}
    sets = {}
    keys = {"train": "trnid", "validation": "valid", "test": "tstid"}
    for (part, key), own in zip(keys.items(), np.split(rng.permutation(306) + 1, 3), strict=True):
        labels[own - 1] = rng.permutation(102) + 1
        sets[key] = own.astype(np.uint16)[None]
        parts[part] = []
        for number in own.tolist():
            image = plain(rng)
            write_image(base / "jpg" / f"image_{number:05d}.jpg", image)
            parts[part].append((image, int(labels[number - 1]) - 1))
    savemat(base / "imagelabels.mat", {"labels": labels[None]})
    savemat(base / "setid.mat", sets)
    files = tuple(f"flowers-102/{name}" for name in ("imagelabels.mat", "setid.mat", "jpg/image_00001.jpg"))
    return Tree(parts, find("flowers102").class_names, False, files, files)


def pcam(root: Path, rng: np.random.Generator) -> Tree:
    """HDF5 files of images (n, 96, 96, 3) and labels (n, 1, 1, 1)."""
    import h5py

    (root / "pcam").mkdir(parents=True)
    parts: dict[str, Written] = {}
    files = []
    for part, word, count in (("train", "train", 5), ("validation", "valid", 3), ("test", "test", 4)):
        x, y = noise(rng, (count, 96, 96, 3)), (np.arange(count) % 2).astype(np.uint8)
        for key, array in (("x", x), ("y", y.reshape(-1, 1, 1, 1))):
            files.append(f"pcam/camelyonpatch_level_2_split_{word}_{key}.h5")
            with h5py.File(root / files[-1], "w") as file:
                file[key] = array
        parts[part] = list(zip(x, y.tolist(), strict=True))
    names = ("lymph node", "lymph node containing metastatic tumor tissue")
    return Tree(parts, names, True, tuple(files), tuple(files))


def fer2013(root: Path, rng: np.random.Generator, form: str = "fer2013.csv") -> Tree:
    """One of the three tables, in its own order and spelling of columns."""
    base = root / "fer2013"
    base.mkdir(parents=True)
    usages = ["Training"] * 8 + ["PublicTest"] * 2 + ["PrivateTest"] * 2
    written = [(noise(rng, (48, 48, 1)), label) for label in (*range(7), 3, 0, 6, 2, 5)]
    header = {
        "fer2013.csv": ["emotion", "pixels", "Usage"],
        "icml_face_data.csv": ["emotion", " Usage", " pixels"],
        "train.csv": ["emotion", "pixels"],
    }[form]
    with (base / form).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        for usage, (image, label) in zip(usages, written, strict=True):
            cells = {"emotion": label, "pixels": " ".join(map(str, image.ravel())), "Usage": usage}
            if form != "train.csv" or usage == "Training":
                table.writerow([cells[name.strip()] for name in header])
    parts = {"train": written[:8]} if form == "train.csv" else {"train": written[:8], "test": written[8:]}
    names = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")
    return Tree(parts, names, True, (f"fer2013/{form}",), (f"fer2013/{form}",))


def oxford_iiit_pet(root: Path, rng: np.random.Generator) -> Tree:
    """Two lists of images, and in the folder what the real one holds besides: MATLAB files, a damaged image, a PNG."""
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    parts: dict[str, Written] = {}
    for part, name, number in (("train", "trainval", 1), ("test", "test", 201)):
        parts[part] = []
        lines = []
        for label in rng.permutation(37).tolist():
            image, stem = plain(rng), f"{BREEDS[label]}_{number}"
            write_image(base / "images" / f"{stem}.jpg", image)
            lines.append(f"{stem} {label + 1} {1 if stem[0].isupper() else 2} 1\n")
            parts[part].append((image, label))
        (base / "annotations" / f"{name}.txt").write_text("".join(lines))
    (base / "images" / "Abyssinian_100.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    (base / "images" / "beagle_116.jpg").write_bytes(b"\xff\xd8 not a picture")
    mau = next(image for image, label in parts["train"] if BREEDS[label] == "Egyptian_Mau")
    Image.fromarray(mau).save(base / "images" / "Egyptian_Mau_1.jpg", format="PNG")
    files = tuple(f"oxford-iiit-pet/annotations/{name}.txt" for name in ("trainval", "test"))
    files = (*files, "oxford-iiit-pet/images/pug_201.jpg")
    names = tuple(" ".join(word[0].upper() + word[1:] for word in breed.split("_")) for breed in BREEDS)
    return Tree(parts, names, False, files, files)


def stl10(root: Path, rng: np.random.Generator) -> Tree:
    """Bytes, planes of columns; labels from 1."""
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    parts: dict[str, Written] = {}
    for part, labels in (("train", [*rng.permutation(10).tolist(), 4]), ("test", [9, 0, 0])):
        x = noise(rng, (len(labels), 96, 96, 3))
        (base / f"{part}_X.bin").write_bytes(x.transpose(0, 3, 2, 1).tobytes())
        (base / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in labels))
        parts[part] = list(zip(x, labels, strict=True))
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    (base / "class_names.txt").write_text("\n".join(names) + "\n")
    (base / "unlabeled_X.bin").touch()  # torchvision wants it to be there
    files = tuple(f"stl10_binary/{part}_{kind}.bin" for part in ("train", "test") for kind in "Xy")
    files = (*files, "stl10_binary/class_names.txt")
    return Tree(parts, names, True, files, files)


def python2(value: object) -> bytes:
    """A pickle as Python 2 with numpy 1 wrote it (protocol 2): text as bytes, arrays by ``_reconstruct``."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(each) for pair in value.items() for each in pair) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, str):
        return _python2(value.encode())
    if isinstance(value, bytes):
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    assert isinstance(value, np.ndarray)
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(map(_python2, value.shape)) + b"\x86"
    return start + b"(K\x01" + shape + kind + b"\x89" + _python2(value.tobytes()) + b"tb"


def _batch(path: Path, labels: list[int], key: str, rng: np.random.Generator) -> Written:
    """Write one CIFAR file: rows of red, green and blue planes."""
    x = noise(rng, (len(labels), 32, 32, 3))
    rows = np.ascontiguousarray(x.transpose(0, 3, 1, 2).reshape(len(labels), 3072))
    names = [f"image_{number}.png" for number in range(len(labels))]
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = [label // 5 for label in labels]
    path.write_bytes(
        python2({"data": rows, key: labels, "coarse_labels": coarse, "filenames": names, "batch_label": "a batch"})
    )
    return list(zip(x, labels, strict=True))


def cifar10(root: Path, rng: np.random.Generator) -> Tree:
    """Five batches of two images, a test batch and the names."""
    base = root / "cifar-10-batches-py"
    train: Written = []
    for number, labels in enumerate(np.split(rng.permutation(10), 5), 1):
        train += _batch(base / f"data_batch_{number}", labels.tolist(), "labels", rng)
    test = _batch(base / "test_batch", [3, 3, 0], "labels", rng)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(python2({"num_cases_per_batch": 2, "label_names": names, "num_vis": 3072}))
    files = tuple(sorted(f"cifar-10-batches-py/{path.name}" for path in base.iterdir()))
    return Tree({"train": train, "test": test}, tuple(names), True, files, files)


def cifar100(root: Path, rng: np.random.Generator) -> Tree:
    """One image of each fine class to train on."""
    from experiments.tasks import find

    base = root / "cifar-100-python"
    train = _batch(base / "train", rng.permutation(100).tolist(), "fine_labels", rng)
    test = _batch(base / "test", [99, 4, 4, 0], "fine_labels", rng)
    names = find("cifar100").class_names
    (base / "meta").write_bytes(python2({"fine_label_names": list(names), "coarse_label_names": ["fish"] * 20}))
    files = tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta"))
    return Tree({"train": train, "test": test}, names, True, files, files)


def food101(root: Path, rng: np.random.Generator) -> Tree:
    """101 folders; the lists name classes in an order of their own."""
    from experiments.tasks import find

    base, names = root / "food-101", find("food101").class_names
    (base / "meta").mkdir(parents=True)
    parts: dict[str, Written] = {}
    for part, number in (("train", 1005), ("test", 13)):
        parts[part] = []
        listed = {}
        for label in rng.permutation(101).tolist():
            image = plain(rng)
            listed[names[label]] = [f"{names[label]}/{number}"]
            write_image(base / "images" / names[label] / f"{number}.jpg", image)
            parts[part].append((image, label))
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))
    files = tuple(f"food-101/{name}" for name in ("meta/train.json", "meta/test.json", "images/waffles/13.jpg"))
    return Tree(parts, names, False, files, files)


def _mnist_like(folder: str, names: tuple[str, ...], root: Path, rng: np.random.Generator, ending: str = "") -> Tree:
    files = [
        f"{folder}/raw/{word}-{kind}-ubyte{ending}"
        for word in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    train = idx_part(root / files[0], root / files[1], [*rng.permutation(10).tolist(), 5], rng)
    test = idx_part(root / files[2], root / files[3], [9, 9, 0], rng)
    return Tree({"train": train, "test": test}, names, True, tuple(files), tuple(files))


def fashion_mnist(root: Path, rng: np.random.Generator, ending: str = "") -> Tree:
    """Four idx files; ``ending`` of ``.gz``: as downloaded."""
    names = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
    return _mnist_like("FashionMNIST", tuple(names.split(",")), root, rng, ending)


def kmnist(root: Path, rng: np.random.Generator) -> Tree:
    """Four idx files."""
    return _mnist_like("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"), root, rng)


def emnist_letters(root: Path, rng: np.random.Generator, folder: str = "EMNIST/raw", ending: str = "") -> Tree:
    """idx files with rows and columns exchanged, labels 1 .. 26; the archive's own folder is ``EMNIST/raw/gzip``."""
    parts: dict[str, Written] = {}
    files = []
    for part, labels in (("train", rng.permutation(26)), ("test", np.array([25, 0, 7]))):
        upright = noise(rng, (len(labels), 28, 28))
        stored = {"images-idx3": upright.transpose(0, 2, 1), "labels-idx1": (labels + 1).astype(np.uint8)}
        for kind, array in stored.items():
            files.append(f"{folder}/emnist-letters-{part}-{kind}-ubyte{ending}")
            write_idx(root / files[-1], array)
        parts[part] = list(zip(upright[..., None], labels.tolist(), strict=True))
    return Tree(parts, tuple("abcdefghijklmnopqrstuvwxyz"), True, tuple(files), tuple(files))


def rendered_sst2(root: Path, rng: np.random.Generator) -> Tree:
    """Three parts of two folders; a part's images in the order of folders and names."""
    parts: dict[str, Written] = {}
    for part, folder in (("train", "train"), ("validation", "valid"), ("test", "test")):
        parts[part] = []
        for label, name in enumerate(("negative", "positive")):
            for number in ("10", "11", "9") if part == "train" or label else ("9",):
                image = noise(rng, (7, 7, 3))
                write_image(root / "rendered-sst2" / folder / name / f"{number}.png", image)
                parts[part].append((image, label))
    base = "rendered-sst2/test"
    return Tree(parts, ("negative", "positive"), True, (f"{base}/negative/9.png",), (f"{base}/positive/11.png",))


BUILDERS: dict[str, Builder] = {
    "flowers102": flowers102,
    "pcam": pcam,
    "fer2013": fer2013,
    "oxford_iiit_pet": oxford_iiit_pet,
    "stl10": stl10,
    "cifar100": cifar100,
    "cifar10": cifar10,
    "food101": food101,
    "fashion_mnist": fashion_mnist,
    "emnist_letters": emnist_letters,
    "kmnist": kmnist,
    "rendered_sst2": rendered_sst2,
}
