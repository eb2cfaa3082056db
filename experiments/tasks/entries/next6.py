"""Entries 9 to 14 of the catalogue.

Addresses and MD5 sums are those of torchvision's classes, sizes those that the servers state.  PCAM's addresses are
those of its Zenodo record (torchvision takes the same bytes from a file service that a program cannot read plainly);
its sums are torchvision's: the table on PCAM's own page has those of the validation and test files exchanged.
"""

from __future__ import annotations

from experiments.tasks.entries.names import CIFAR100, FLOWERS, PETS
from experiments.tasks.vision_data import Archive, VisionData

_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_ZENODO = "https://zenodo.org/records/2546921/files/camelyonpatch_level_2_split_"
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def _pcam(part: str, md5: str, size: int) -> Archive:
    return Archive(f"{_ZENODO}{part}.h5.gz", into="pcam", md5=md5, size=size)


ENTRIES: tuple[VisionData, ...] = (
    VisionData(
        name="flowers102",
        title="Oxford Flowers102",
        classes=102,
        class_names_from="torchvision's list, in the order of the labels (the source names them on its page only)",
        class_names=FLOWERS,
        spoken=tuple({"pink-yellow dahlia?": "pink and yellow dahlia"}.get(name, name) for name in FLOWERS),
        counts={"train": 1020, "validation": 1020, "test": 6149},
        files=("flowers-102/jpg/", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        archives=(
            Archive(
                f"{_OXFORD}/flowers/102/102flowers.tgz",
                into="flowers-102",
                md5="52808999861908f626f3c1f4e79d11fa",
                size=344862509,
            ),
            Archive(
                f"{_OXFORD}/flowers/102/imagelabels.mat",
                into="flowers-102",
                md5="e0620be6f572b9609742df49c70aed4d",
                size=502,
            ),
            Archive(
                f"{_OXFORD}/flowers/102/setid.mat",
                into="flowers-102",
                md5="a5357ecc9cb78c4bef273ce3793fc85c",
                size=14989,
            ),
        ),
        citation="Nilsback, Zisserman: Automated flower classification over a large number of classes, ICVGIP 2008",
        homepage=f"{_OXFORD}/flowers/102/",
        form="colour photographs, short side 500 pixels",
        aliases=("flowers", "oxford_flowers"),
        note=(
            "trnid trains (1,020 images), valid validates (1,020), tstid tests (6,149), as published; codes that train "
            "on tstid do not compare."
        ),
    ),
    VisionData(
        name="pcam",
        title="PCAM",
        classes=2,
        class_names_from="the words of zero-shot studies; the files have 0 and 1",
        class_names=("lymph node", "lymph node containing metastatic tumor tissue"),
        counts={"train": 262144, "validation": 32768, "test": 32768},
        files=tuple(
            f"pcam/camelyonpatch_level_2_split_{part}_{kind}.h5" for part in ("train", "valid", "test") for kind in "xy"
        ),
        archives=(
            _pcam("train_x", "1571f514728f59376b705fc836ff4b63", 6421353462),
            _pcam("train_y", "35c2d7259d906cfc8143347bb8e05be7", 21378),
            _pcam("valid_x", "d5b63470df7cfa627aeec8b9dc0c066e", 805965320),
            _pcam("valid_y", "2b85f58b927af9964a4c15b8f7e8f179", 3038),
            _pcam("test_x", "d8c2d60d490dbd479f8199bdfa0cf6ec", 800875929),
            _pcam("test_y", "60a7035772fbdb7f34eb86d4420cf66a", 3040),
        ),
        licence="CC0 1.0",
        citation="Veeling et al.: Rotation equivariant CNNs for digital pathology, MICCAI 2018, arXiv 1806.03962",
        homepage="https://github.com/basveeling/pcam",
        form="96 x 96 colour",
        aliases=("patch_camelyon",),
        note="Reading it takes the extra 'pcam' (h5py).",
    ),
    VisionData(
        name="fer2013",
        title="FER2013",
        classes=7,
        class_names_from="the source's list, in the order of its numbers",
        class_names=("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral"),
        spoken=("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"),
        counts={"train": 28709, "test": 7178},
        files=("fer2013/fer2013.csv|fer2013/icml_face_data.csv|fer2013/train.csv",),
        manual=(
            "accept the rules at https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-"
            "recognition-challenge and put fer2013.csv or icml_face_data.csv (either has all labels; train.csv has "
            "those of the training part) into the folder fer2013"
        ),
        citation="Goodfellow et al.: Challenges in representation learning, ICONIP 2013, arXiv 1307.0414",
        homepage=(
            "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge"
        ),
        form="48 x 48 grey",
        aliases=("fer",),
        note="Test is PublicTest and PrivateTest together, as torchvision takes it.",
    ),
    VisionData(
        name="oxford_iiit_pet",
        title="Oxford-IIIT Pet",
        classes=37,
        class_names_from="the names of the images",
        class_names=PETS,
        counts={"train": 3680, "test": 3669},
        files=(
            "oxford-iiit-pet/images/",
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet/annotations/test.txt",
        ),
        archives=(
            Archive(
                f"{_OXFORD}/pets/data/images.tar.gz",
                into="oxford-iiit-pet",
                md5="5c4f3ee8e5d25df40f4fd59a7f44e54c",
                size=791918971,
            ),
            Archive(
                f"{_OXFORD}/pets/data/annotations.tar.gz",
                into="oxford-iiit-pet",
                md5="95a8c909bbe2e81eed6a22bccdf3f68f",
                size=19173078,
            ),
        ),
        licence="CC BY-SA 4.0",
        citation="Parkhi et al.: Cats and dogs, CVPR 2012",
        homepage=f"{_OXFORD}/pets/",
        form="colour photographs of many sizes",
        aliases=("pets", "oxford_pets", "oxfordpet", "oxford_iiit_pets", "pet"),
        note="What no list names (MATLAB files, damaged images) lies in the folder of images and is not read.",
    ),
    VisionData(
        name="stl10",
        title="STL10",
        classes=10,
        class_names_from="class_names.txt",
        class_names=_STL10,
        counts={"train": 5000, "test": 8000},
        files=(
            *(f"stl10_binary/{part}_{kind}.bin" for part in ("train", "test") for kind in "Xy"),
            "stl10_binary/class_names.txt",
        ),
        archives=(
            Archive(
                "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                md5="91f7769df0f17e558f3565bffb0c7dfb",
                size=2640397119,
            ),
        ),
        citation="Coates, Lee, Ng: An analysis of single-layer networks in unsupervised feature learning, AISTATS 2011",
        homepage="https://cs.stanford.edu/~acoates/stl10/",
        form="96 x 96 colour",
        aliases=("stl",),
        note="The 100,000 images without labels are not used; the archive holds them, 2.8 GB when unpacked.",
    ),
    VisionData(
        name="cifar100",
        title="CIFAR100",
        classes=100,
        class_names_from="the file meta (fine labels)",
        class_names=CIFAR100,
        counts={"train": 50000, "test": 10000},
        files=tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")),
        archives=(
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                md5="eb9058c3a382ffc7106e4002c42a8d85",
                size=169001437,
            ),
        ),
        citation="Krizhevsky: Learning multiple layers of features from tiny images, technical report 2009",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        form="32 x 32 colour",
        note="Pickled files, read as plain data: no code in them runs.",
    ),
)
