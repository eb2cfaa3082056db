"""The embedded digits: splits that never meet, and transformations that lose nothing."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from experiments.tasks.digits8 import EIGHT, digits8, transformations
from experiments.tasks.types import Family, Split
from theory.errors import MergeboundError

SMALL = {"train_per_task": 20, "pretraining": 50, "calibration": 40, "calibration_per_task": 15, "test": 30}


def family(seed: int = 0, share_images: bool = False) -> Family:
    return digits8(seed=seed, share_images=share_images, **SMALL)


def rows(split: Split) -> set[int]:
    found = set(split.source.tolist())
    assert len(found) == len(split), "no image twice in one split"
    return found


def linear_part(name: str) -> np.ndarray:
    """The 64 x 64 matrix of an affine transformation of images."""
    transform = transformations()[name]
    origin = transform(np.zeros((1, 8, 8)))
    return (transform(np.eye(64).reshape(64, 8, 8)) - origin).reshape(64, 64).T


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_images", [False, True])
def test_pretraining_training_calibration_and_test_images_never_meet(share_images: bool) -> None:
    built = family(share_images=share_images)
    tasks = built.tasks.values()
    pools = [
        rows(built.pretraining),
        set.union(*(rows(task.train) for task in tasks)),
        set.union(*(rows(task.calibration) for task in tasks)),
        set.union(*(rows(task.test) for task in tasks)),
    ]
    for first, second in combinations(pools, 2):
        assert not first & second
    assert len(pools[0]) == 50
    assert len(pools[3]) == 30


def test_tasks_train_on_images_of_their_own_unless_told_to_share() -> None:
    own, shared = family(), family(share_images=True)
    assert not own.shares_images
    assert shared.shares_images
    for first, second in combinations(own.tasks.values(), 2):
        assert not rows(first.train) & rows(second.train)
    samples = [rows(task.train) for task in shared.tasks.values()]
    assert all(first == second for first, second in pairwise(samples))
    assert len(samples[0]) == 20 * len(EIGHT)
    assert samples[0] == set.union(*(rows(task.train) for task in own.tasks.values()))


def test_splits_have_the_sizes_asked_for_and_tasks_share_test_images() -> None:
    built = family()
    assert tuple(built.tasks) == EIGHT
    for task in built.tasks.values():
        assert [len(task.train), len(task.calibration), len(task.test)] == [20, 15, 30]
        assert task.classes == 10
        assert rows(task.test) == rows(built.tasks["identity"].test)


def test_images_are_the_transformed_digits_of_their_rows() -> None:
    raw = load_digits()
    for name, task in family().tasks.items():
        for split in (task.train, task.calibration, task.test):
            expected = transformations()[name](raw.images[split.source] / 16.0) * 2 - 1
            np.testing.assert_allclose(split.images.numpy()[:, 0], expected, atol=1e-6)
            np.testing.assert_array_equal(split.labels.numpy(), raw.target[split.source])
            assert split.images.dtype == torch.float32
            assert split.labels.dtype == torch.int64


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_images() -> None:
    first, again, other = family(3), family(3), family(4)
    for name in EIGHT:
        for part in ("train", "calibration", "test"):
            a, b = getattr(first.tasks[name], part), getattr(again.tasks[name], part)
            assert torch.equal(a.images, b.images)
            np.testing.assert_array_equal(a.source, b.source)
    assert rows(first.pretraining) != rows(other.pretraining)
    assert rows(first.tasks["roll"].train) != rows(other.tasks["roll"].train)


def test_take_keeps_images_labels_and_rows_together() -> None:
    split = family().tasks["flip"].train
    part = split.take(np.array([4, 1]))
    assert torch.equal(part.images, split.images[[4, 1]])
    assert part.labels.tolist() == [int(split.labels[4]), int(split.labels[1])]
    assert part.source.tolist() == [split.source[4], split.source[1]]


# --- transformations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(transformations()))
def test_transformations_are_signed_permutations_of_pixels(name: str) -> None:
    """Affine with a signed permutation as linear part: a bijection that keeps every distance, and stays in [0, 1]."""
    matrix, transform = linear_part(name), transformations()[name]
    assert set(np.unique(matrix)) <= {-1.0, 0.0, 1.0}
    np.testing.assert_array_equal(np.abs(matrix).sum(axis=0), 1)
    np.testing.assert_array_equal(np.abs(matrix).sum(axis=1), 1)
    images = np.random.default_rng(0).random((5, 8, 8))
    affine = images.reshape(5, 64) @ matrix.T + transform(np.zeros((1, 8, 8))).reshape(64)
    np.testing.assert_allclose(transform(images).reshape(5, 64), affine, atol=1e-12)
    assert transform(images).min() >= 0
    assert transform(images).max() <= 1


def test_transformations_differ_pairwise_on_digits() -> None:
    images = load_digits().images[:20] / 16.0
    seen = {name: transform(images) for name, transform in transformations().items()}
    for first, second in combinations(seen, 2):
        assert all(np.abs(a - b).max() > 0.2 for a, b in zip(seen[first], seen[second], strict=True))


def test_known_transformations_do_what_their_names_say() -> None:
    image = np.arange(64.0).reshape(1, 8, 8) / 63
    known = transformations()
    np.testing.assert_array_equal(known["identity"](image), image)
    np.testing.assert_array_equal(known["rotate180"](image), image[:, ::-1, ::-1])
    np.testing.assert_array_equal(known["rotate90"](known["rotate270"](image)), image)
    np.testing.assert_array_equal(known["transpose"](image)[0], image[0].T)
    np.testing.assert_array_equal(known["roll"](known["roll"](image)), image)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train_per_task": 200}, r"train_per_task \(200\)"),
        ({"pretraining": 1700}, r"pretraining \(1700\)"),
        ({"test": 1700}, r"test \(1700\)"),
        ({"calibration": 1700}, r"calibration \(1700\)"),
        ({"calibration": 100, "calibration_per_task": 101}, r"calibration_per_task \(101\)"),
        ({"tasks": ("identity", "sideways")}, "tasks.*'sideways'"),
    ],
)
def test_impossible_splits_are_refused_with_the_field_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(MergeboundError, match=named):
        digits8(**settings)  # type: ignore[arg-type]


def test_all_1797_images_can_be_used_and_not_one_more() -> None:
    exact = {"tasks": ("identity",), "pretraining": 500, "calibration": 256, "test": 400}
    assert len(digits8(**exact, train_per_task=641).tasks["identity"].train) == 641  # type: ignore[arg-type]
    with pytest.raises(MergeboundError, match="1797 images but 1798"):
        digits8(**exact, train_per_task=642)  # type: ignore[arg-type]
