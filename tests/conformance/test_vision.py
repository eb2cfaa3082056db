"""What every vision data set must do: the catalogue's order, a tiny tree in its real format, and damaged trees."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import tasks
from experiments.tasks.catalogue import spelling
from tests.experiments import vision_trees, vision_trees_b
from tests.experiments.vision_trees import LOSS, Tree
from theory.errors import MergeboundError

ORDER = (
    "SUN397, Stanford Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST, DTD | Oxford Flowers102, PCAM, FER2013, "
    "Oxford-IIIT Pet, STL10, CIFAR100 | CIFAR10, Food101, Fashion-MNIST, EMNIST letters, KMNIST, Rendered SST2"
)
CLASSES = (397, 196, 45, 10, 10, 43, 10, 47, 102, 2, 7, 37, 10, 100, 10, 101, 10, 26, 10, 2)
NAMES = [entry.name for entry in tasks.vision()]


def build(name: str, root: Path) -> Tree:
    """Write the tree of a data set."""
    builders = {**vision_trees.BUILDERS, **vision_trees_b.BUILDERS}
    return builders[name](root, np.random.default_rng([20, NAMES.index(name)]))


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tree]]:
    """Each data set's tree, built once; tests put back what they damage."""
    built = {}
    for name in NAMES:
        if name == "pcam":
            pytest.importorskip("h5py")
        root = tmp_path_factory.mktemp(name)
        built[name] = (root, build(name, root))
    return built


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_order_and_prefixes_are_the_customary_ones() -> None:
    titles = ORDER.replace(" | ", ", ").split(", ")
    assert [tasks.find(title).name for title in titles] == NAMES
    assert tuple(entry.classes for entry in tasks.vision()) == CLASSES
    for count in (8, 14, 20):
        assert tasks.vision(count) == tasks.vision()[:count]
    assert len(tasks.vision(20)) == 20
    for count in (0, 7, 21, -8):
        with pytest.raises(MergeboundError, match="8, 14 or 20"):
            tasks.vision(count)


def test_builders_exist_for_all() -> None:
    assert [*vision_trees.BUILDERS, *vision_trees_b.BUILDERS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_complete(name: str) -> None:
    entry = tasks.find(name)
    for names in (entry.class_names, entry.spoken):
        assert not names or len(set(names)) == entry.classes
    assert "train" in entry.counts
    assert all(count >= entry.classes for counts in (entry.counts, *entry.other_counts) for count in counts.values())
    assert entry.files
    assert entry.licence
    assert entry.citation
    assert entry.homepage.startswith("http")
    for archive in entry.archives:
        for text, digits in ((archive.md5, 32), (archive.sha256, 64)):
            assert text is None or (len(text) == digits and set(text) <= set("0123456789abcdef"))
        assert archive.md5 or archive.sha256
        assert archive.filename
        assert not archive.into.startswith(("/", "."))


def test_usual_spellings_are_understood_and_others_get_a_proposal() -> None:
    usual = {
        "Cars": "stanford_cars",
        "stanford-cars": "stanford_cars",
        "SUN397": "sun397",
        "fashion-mnist": "fashion_mnist",
        "FashionMNIST": "fashion_mnist",
        "CIFAR-10": "cifar10",
        "cifar_100": "cifar100",
        "Oxford-IIIT Pet": "oxford_iiit_pet",
        "flowers-102": "flowers102",
        "STL-10": "stl10",
        "rendered-sst2": "rendered_sst2",
        "EMNIST letters": "emnist_letters",
    }
    assert {name: tasks.find(name).name for name in usual} == usual
    every = [each for e in tasks.vision() for each in {spelling(name) for name in (e.name, e.title, *e.aliases)}]
    assert len(every) == len(set(every)), "two entries share a spelling"
    with pytest.raises(MergeboundError, match="mnist"):
        tasks.find("mnits")


def test_the_package_is_light() -> None:
    import subprocess

    code = (
        "import sys; from experiments import tasks; tasks.vision(); "
        "print([m for m in ('torchvision', 'timm', 'scipy.io', 'h5py', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


# --- every data set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_root_names_a_file_and_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(MergeboundError) as caught:
        tasks.load(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    entry = tasks.find(name)
    named = message.partition(": ")[0]
    expected = [str(tmp_path / alternative) for each in entry.files for alternative in each.split("|")]
    assert named != str(tmp_path)
    assert any(each == named or each.startswith(f"{named}/") for each in expected), (named, expected)
    assert entry.manual in message if entry.manual else f"mergebound data get {name} --root {tmp_path}" in message
    assert entry.missing(tmp_path)
    with pytest.raises(MergeboundError, match="no such folder"):
        tasks.load(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_is_read(name: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[name]
    data = tasks.load(name, root)
    assert data.name == name
    assert data.class_names == tree.class_names
    assert set(data.parts) == set(tree.parts)
    for part, written in tree.parts.items():
        images = data.parts[part]
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == [label for _, label in written]
        for row, (image, _) in enumerate(written):
            found = images.read(row)
            assert found.dtype == np.uint8
            assert found.shape == image.shape
            assert np.abs(found.astype(int) - image).max() <= (0 if tree.exact else LOSS), images.place(row)
    assert not tasks.find(name).missing(root)
    findings = tasks.check_data(name, root, images=3)
    assert findings, "the tree is tiny, so its counts differ from the official ones"
    assert {finding.level for finding in findings} == {"warning"}


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_a_seeded_split_with_a_digest(name: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[name]
    seeded = "test" not in tree.parts or "validation" not in tree.parts
    if seeded and max(np.unique([label for _, label in tree.parts["train"]], return_counts=True)[1]) == 1:
        with pytest.raises(MergeboundError, match="too few for a validation part"):
            tasks.task(name, root)
        return
    digests = [tasks.task(name, root, seed=seed, validation=2, test=0.2).digest for seed in (3, 3, 4, 5, 6, 7)]
    task = tasks.task(name, root, seed=3, validation=2, test=0.2)
    assert digests[0] == digests[1] == task.digest
    assert len(task.digest) == 64
    assert (len(set(digests)) > 1) == seeded
    drawn = {"train": task.train, "validation": task.validation, "test": task.test}
    places = [
        (part if part in tree.parts else "train", images.place(row))
        for part, images in drawn.items()
        for row in range(len(images))
    ]
    assert len(set(places)) == len(places) == sum(map(len, tree.parts.values()))


@pytest.mark.parametrize("name", NAMES)
def test_images_may_be_sent_to_workers(name: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, _ = trees[name]
    images = tasks.load(name, root).parts["train"]
    sent = pickle.loads(pickle.dumps(images))
    assert sent.fingerprint == images.fingerprint
    np.testing.assert_array_equal(sent.read(len(sent) - 1), images.read(len(images) - 1))


def read_all(name: str, root: Path) -> None:
    data = tasks.load(name, root)
    for part in data.parts.values():
        for row in range(len(part)):
            part.read(row)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_damaged_file_is_named(name: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[name]
    assert tree.gone
    assert tree.cut
    for kind, files in (("gone", tree.gone), ("cut", tree.cut)):
        for file in files:
            path = root / file
            whole = path.read_bytes()
            path.unlink()  # not rewritten in place: it may be mapped
            if kind == "cut":
                path.write_bytes(whole[: len(whole) // 2])
            try:
                with pytest.raises(MergeboundError) as caught:
                    read_all(name, root)
            finally:
                path.unlink(missing_ok=True)
                path.write_bytes(whole)
            message = str(caught.value)
            # a class folder does not say which images it should hold, so an empty one is named itself
            named = [str(path).removesuffix(".gz"), *([str(path.parent)] if kind == "gone" else [])]
            assert any(each in message for each in named), (kind, file, message)
            assert "\n" not in message
    read_all(name, root)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_names_are_distinct_words(name: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    names = tasks.prompt_names(name, trees[name][1].class_names)
    assert len(set(names)) == tasks.find(name).classes
    assert not any("_" in each or each != each.strip() for each in names)


# --- checks against the catalogue ------------------------------------------------------------------------------------


def test_other_classes_are_errors_and_other_counts_are_warnings(trees: dict[str, tuple[Path, Tree]]) -> None:
    data = tasks.load("mnist", trees["mnist"][0])
    renamed = tasks.DataSet("mnist", (*data.class_names[:9], "nine"), data.parts)
    assert next((f.level, "'nine'" in f.message) for f in tasks.check(renamed)) == ("error", True)
    more = tasks.DataSet("mnist", (*data.class_names, "10"), data.parts)
    assert "11 classes" in tasks.check(more)[0].message
    swapped = tasks.DataSet("mnist", data.class_names, {"train": data.parts["test"]})
    levels = [(finding.level, finding.message) for finding in tasks.check(swapped)]
    assert ("error", "MNIST: no training image of class '1' and 6 more") in levels
    assert any(level == "warning" and "no test part" in message for level, message in levels)
