"""Entries 1 to 8 of the catalogue.

Addresses and MD5 sums are those of torchvision's classes; sizes and SHA-256 sums those of the TensorFlow Datasets
checksum lists (RESISC45: of torchgeo).
"""

from __future__ import annotations

from experiments.tasks.entries import first8_names as names
from experiments.tasks.vision_data import Archive, VisionData

_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_RESISC45 = "https://huggingface.co/datasets/isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e/"
_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")


def _mnist(name: str, md5: str, sha256: str, size: int) -> Archive:
    first, *others = (address + name for address in _MNIST)
    return Archive(first, "MNIST/raw", md5=md5, sha256=sha256, size=size, mirrors=tuple(others))


ENTRIES: tuple[VisionData, ...] = (
    VisionData(
        name="sun397",
        title="SUN397",
        classes=397,
        class_names_from="SUN397/ClassName.txt",
        counts={"train": 19850, "test": 19850},
        other_counts=({"train": 108754},),
        files=("SUN397/ClassName.txt",),
        archives=(
            Archive(
                "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
                md5="8ca2778205c41d23104230ba66911c7a",
                size=39_077_296_924,
            ),
            Archive(
                "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
                "SUN397",
                sha256="e3311ea5f812d4cc6faef194688343d1111f6cd6f70f2c62f393c2b8d6ba1ec9",
                size=18_293_705,
            ),
        ),
        citation="Xiao, Hays, Ehinger, Oliva, Torralba: SUN Database: Large-scale Scene Recognition, CVPR 2010",
        homepage="https://vision.princeton.edu/projects/2010/SUN/",
        form="colour photographs, many sizes",
        aliases=("sun", "sun-397"),
        note="The split is the source's first partition where Training_01.txt and Testing_01.txt lie in SUN397/ (or "
        "SUN397/Partitions/), else one by seed of all 108,754 images. The source's server does not always answer: "
        "the archive may be placed by hand.",
    ),
    VisionData(
        name="stanford_cars",
        title="Stanford Cars",
        classes=196,
        class_names_from="stanford_cars/devkit/cars_meta.mat",
        counts={"train": 8144, "test": 8041},
        files=(
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat|stanford_cars/devkit/cars_test_annos_withlabels.mat",
            "stanford_cars/cars_train/",
            "stanford_cars/cars_test/",
        ),
        manual="the source's address no longer works, so place a copy of your own: in stanford_cars/ the folders "
        "cars_train/ and cars_test/ (*.jpg), cars_test_annos_withlabels.mat, and devkit/ with cars_meta.mat and "
        "cars_train_annos.mat",
        citation="Krause, Stark, Deng, Fei-Fei: 3D Object Representations for Fine-Grained Categorization, 3dRR 2013",
        homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        form="colour photographs, many sizes",
        aliases=("cars", "cars196", "stanfordcars"),
    ),
    VisionData(
        name="resisc45",
        title="RESISC45",
        classes=45,
        class_names=names.RESISC45,
        class_names_from="the folders' names",
        counts={"train": 18900, "validation": 6300, "test": 6300},
        other_counts=({"train": 31500}, {"train": 18900, "test": 6300}),
        files=("resisc45/NWPU-RESISC45/|NWPU-RESISC45/|resisc45/airplane/",),
        archives=(
            Archive(
                _RESISC45 + "NWPU-RESISC45.zip",
                "resisc45",
                sha256="beeecd0b63656290ae6d65cf7763185b0c1c4c54a753ef8088d6fba3faaf1f53",
                size=427_389_445,
            ),
            Archive(
                _RESISC45 + "resisc45-train.txt",
                "resisc45",
                unpack=False,
                sha256="ecfa963be4d85eac83665f8be8634abcb4fe6f3546472cc0e87999e2cab4449b",
            ),
            Archive(
                _RESISC45 + "resisc45-val.txt",
                "resisc45",
                unpack=False,
                sha256="08d81f642526bec240589000af7f49a47e8d071a6e7925b0f36246a78ab64342",
            ),
            Archive(
                _RESISC45 + "resisc45-test.txt",
                "resisc45",
                unpack=False,
                sha256="e0927e80130b47317a2f18520d98382b6fc56f0d3edd3345140f7d02267c3805",
            ),
        ),
        licence="CC BY-NC 4.0 (stated by the mirror)",
        citation="Cheng, Han, Lu: Remote Sensing Image Scene Classification: Benchmark and State of the Art, Proc. "
        "IEEE 2017",
        homepage="https://doi.org/10.1109/JPROC.2017.2675998",
        form="colour, 256 x 256",
        aliases=("nwpu-resisc45", "resisc"),
        note="The source has no split: resisc45-train.txt, resisc45-val.txt and resisc45-test.txt (Neumann et al., "
        "arXiv 1911.06721) are used where they lie beside the images, else one is made by seed.",
    ),
    VisionData(
        name="eurosat",
        title="EuroSAT",
        classes=10,
        class_names=names.EUROSAT,
        class_names_from="the folders' names",
        counts={"train": 27000},
        files=("eurosat/2750/",),
        archives=(
            Archive(
                "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
                "EuroSAT.zip",
                "eurosat",
                md5="c8fa014336c82ac7804f0398fcb19387",
                sha256="8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
                size=94_280_567,
                mirrors=("https://madm.dfki.de/files/sentinel/EuroSAT.zip",),
            ),
        ),
        licence="MIT",
        citation="Helber, Bischke, Dengel, Borth: EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use "
        "and Land Cover Classification, JSTARS 2019",
        homepage="https://github.com/phelber/EuroSAT",
        form="colour, 64 x 64",
        spoken=names.EUROSAT_SPOKEN,
        note="There is no split of the source: test images are taken by seed.",
    ),
    VisionData(
        name="svhn",
        title="SVHN",
        classes=10,
        class_names=names.DIGITS,
        class_names_from="the digits",
        counts={"train": 73257, "test": 26032},
        files=(
            "train_32x32.mat|svhn/train_32x32.mat|SVHN/train_32x32.mat",
            "test_32x32.mat|svhn/test_32x32.mat|SVHN/test_32x32.mat",
        ),
        archives=(
            Archive(
                "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
                unpack=False,
                md5="e26dedcc434d2e4c54c9b2d4a06d8373",
                sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
                size=182_040_794,
            ),
            Archive(
                "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
                unpack=False,
                md5="eb5a983be6a315427106f1b164d9cef3",
                sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
                size=64_275_384,
            ),
        ),
        licence="for non-commercial use only",
        citation="Netzer, Wang, Coates, Bissacco, Wu, Ng: Reading Digits in Natural Images with Unsupervised Feature "
        "Learning, NIPS workshop 2011",
        homepage="http://ufldl.stanford.edu/housenumbers/",
        form="colour, 32 x 32",
        aliases=("street view house numbers",),
        note="Digit 0 has label 10 in the files and class 0 here; the extra part is not used.",
    ),
    VisionData(
        name="gtsrb",
        title="GTSRB",
        classes=43,
        class_names=names.GTSRB,
        class_names_from="the signs' meaning; folders are numbers",
        counts={"train": 26640, "test": 12630},
        other_counts=({"train": 39209, "test": 12630},),
        files=(
            "gtsrb/GTSRB/Training/|gtsrb/GTSRB/Final_Training/Images/",
            "gtsrb/GTSRB/Final_Test/Images/",
            "gtsrb/GT-final_test.csv",
        ),
        archives=(
            Archive(
                _GTSRB + "GTSRB-Training_fixed.zip",
                "gtsrb",
                md5="513f3c79a4c5141765e10e952eaa2478",
                size=187_490_228,
            ),
            Archive(
                _GTSRB + "GTSRB_Final_Test_Images.zip",
                "gtsrb",
                md5="c7e4e6327067d32654124b0fe9e82185",
                size=88_978_620,
            ),
            Archive(_GTSRB + "GTSRB_Final_Test_GT.zip", "gtsrb", md5="fe31e9c9270bbcd7b84b7f21a9d9d9e5", size=99_620),
        ),
        citation="Stallkamp, Schlipsing, Salmen, Igel: Man vs. computer: Benchmarking machine learning algorithms for "
        "traffic sign recognition, Neural Networks 2012",
        homepage="https://benchmark.ini.rub.de/gtsrb_news.html",
        form="colour, 15 to 250 pixels a side",
        aliases=("german traffic sign recognition benchmark", "german traffic signs"),
        note="The archive that torchvision reads holds 26,640 training images (those of the 2011 competition); the "
        "final training set has 39,209 and is read where it lies in GTSRB/Final_Training/Images.",
    ),
    VisionData(
        name="mnist",
        title="MNIST",
        classes=10,
        class_names=names.DIGITS,
        class_names_from="the digits",
        counts={"train": 60000, "test": 10000},
        files=(
            "MNIST/raw/train-images-idx3-ubyte",
            "MNIST/raw/train-labels-idx1-ubyte",
            "MNIST/raw/t10k-images-idx3-ubyte",
            "MNIST/raw/t10k-labels-idx1-ubyte",
        ),
        archives=(
            _mnist(
                "train-images-idx3-ubyte.gz",
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                9_912_422,
            ),
            _mnist(
                "train-labels-idx1-ubyte.gz",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                28_881,
            ),
            _mnist(
                "t10k-images-idx3-ubyte.gz",
                "9fb629c4189551a2d022fa330f9573f3",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                1_648_877,
            ),
            _mnist(
                "t10k-labels-idx1-ubyte.gz",
                "ec29112dd5afa0611ce80d1b7f02629c",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                4_542,
            ),
        ),
        citation="LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, Proc. IEEE "
        "1998",
        homepage="http://yann.lecun.com/exdb/mnist/",
        form="grey, 28 x 28",
    ),
    VisionData(
        name="dtd",
        title="DTD",
        classes=47,
        class_names=names.DTD,
        class_names_from="the folders' names",
        counts={"train": 1880, "validation": 1880, "test": 1880},
        files=(
            "dtd/dtd/images/|dtd/images/",
            "dtd/dtd/labels/train1.txt|dtd/labels/train1.txt",
            "dtd/dtd/labels/val1.txt|dtd/labels/val1.txt",
            "dtd/dtd/labels/test1.txt|dtd/labels/test1.txt",
        ),
        archives=(
            Archive(
                "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
                "dtd",
                md5="fff73e5086ae6bdbea199a49dfb8a4c1",
                sha256="e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
                size=625_239_812,
            ),
        ),
        licence="for research purposes",
        citation="Cimpoi, Maji, Kokkinos, Mohamed, Vedaldi: Describing Textures in the Wild, CVPR 2014",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        form="colour photographs, 300 to 640 pixels a side",
        aliases=("describable textures", "textures"),
        note="The split is the source's first of ten (train1, val1, test1).",
    ),
)
