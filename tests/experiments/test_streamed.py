"""Streamed inputs: the same numbers whatever the workers, errors that name the file, and no wait without a limit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.finetune.loop import Hyperparameters, finetune, pretrain
from experiments.inputs.augment import Augmentation
from experiments.inputs.order import epoch_order, shuffled, with_epochs
from experiments.inputs.prefetch import InputTimeout, background, in_order, ordered
from experiments.inputs.reader import Reader
from experiments.inputs.resident import load_resident
from experiments.inputs.streamed import CHUNK, Streamed, stream
from experiments.inputs.transforms import VIEWS, Views, training_view, view_generator
from experiments.models import build_model
from experiments.tasks.fit import fit
from experiments.tasks.form import InputFormat
from experiments.tasks.images import ArrayImages, FileImages, ReadImages, Subset, read_image
from theory.errors import MergeboundError

needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
FORM = InputFormat(3, 24, 20, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bilinear", 0.9)
COUNT = 21


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileImages:
    """Photographs of several sizes and formats."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng([0, 0x57EA])
    names = []
    for row in range(COUNT):
        height, width = rng.integers(30, 70, size=2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).resize(
            (int(width), int(height))
        )
        names.append(f"{row}.{'jpg' if row % 2 else 'png'}")
        image.save(root / names[-1])
    return FileImages(root, tuple(names), rng.integers(0, 5, COUNT))


def literal(images: FileImages | Subset, row: int, epoch: int, views: Views | None, seed: int) -> np.ndarray:
    """One sample, channels first, normalised in float64."""
    image = images.read(row)
    view = fit(image, FORM)
    if views is not None:
        view = training_view(image, FORM, views, view_generator(seed, epoch, row))  # rows name the draws
    return ((view / 255 - np.asarray(FORM.mean)) / np.asarray(FORM.std)).transpose(2, 0, 1)


ORDER = [
    (np.arange(0, 18), 0),
    (np.asarray([20, 3, 3, 0]), 1),
    (np.arange(20, -1, -1), 2),
    (np.asarray([], dtype=int), 2),
]


@pytest.mark.parametrize("views", [None, VIEWS["crop_flip"], VIEWS["trivial"]])
def test_batches_are_the_literal_ones_whatever_the_workers(files: FileImages, views: Views | None) -> None:
    for workers, ahead in ((1, 0), (2, 1 << 20), (5, 30_000)):
        data = replace(stream(files, FORM, views=views, seed=4, workers=workers), ahead_bytes=ahead)
        loaded = list(data.loader(iter(ORDER)))
        assert len(loaded) == len(ORDER)
        for (rows, epoch), (x, labels) in zip(ORDER, loaded, strict=True):
            assert (x.shape, x.dtype) == ((len(rows), 3, 24, 20), torch.float32)
            assert labels.tolist() == files.labels[rows].tolist()
            if len(rows):
                expected = np.stack([literal(files, row, epoch, views, 4) for row in rows.tolist()])
                assert float(np.abs(x.numpy() - expected).max()) < 2e-6
                alone, _ = data.batch(rows, epoch)
                assert torch.equal(alone, x)


@pytest.mark.parametrize("channels", [1, 3])
def test_streamed_is_resident_bit_by_bit(channels: int) -> None:
    whole = arrays(40, side=30, channels=channels)
    images = Subset(whole, np.arange(39, 4, -1))
    form = InputFormat(3, 24, 24, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bilinear", 0.9)
    options = dict(augment=Augmentation(3, "reflect", 0.5, 0.1, 0.2, 5), seed=3, name="letters", first_row=7)
    for more in (dict(), dict(dtype=torch.bfloat16, channels_last=True)):
        still, moving = load_resident(images, form, **options, **more), stream(images, form, **options, **more)
        for rows, epoch in ((np.arange(35), 0), (np.asarray([3, 3, 20]), 2)):
            (x, labels), (y, others) = still.batch(rows, epoch), moving.batch(rows, epoch)
            assert torch.equal(x, y)
            assert x.stride() == y.stride()
            assert torch.equal(labels, others)
        assert torch.equal(still.labels, moving.labels)
        part = np.asarray([30, 4])
        assert torch.equal(still.take(part).batch(np.arange(2), 1)[0], moving.take(part).batch(np.arange(2), 1)[0])
        assert torch.equal(still.evaluation().batch(part, 1)[0], moving.evaluation().batch(part, 1)[0])


def test_processes_give_the_same_and_name_the_damaged_file(files: FileImages, tmp_path: Path) -> None:
    data = stream(files, FORM, views=VIEWS["crop_flip"], seed=4)
    apart = replace(data, kind="processes", workers=2)
    for (x, labels), (y, others) in zip(data.loader(ORDER), apart.loader(ORDER), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)
    assert multiprocessing.active_children() == []
    whole = Image.open(files.root / "1.jpg")
    whole.save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-200])
    broken = stream(FileImages(tmp_path, ("good.jpg", "cut.jpg"), np.zeros(2, dtype=np.int64)), FORM, workers=1)
    with pytest.raises(MergeboundError, match=r"cut\.jpg: not a readable image"):
        list(replace(broken, kind="processes").loader([(np.arange(2), 0)]))
    assert multiprocessing.active_children() == []


@needs_fifo
def test_a_killed_process_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    """A named pipe stands for a file that never comes: the worker waits in its ``open``."""
    os.mkfifo(tmp_path / "slow.jpg")
    data = stream(FileImages(tmp_path, ("slow.jpg",), np.zeros(1, dtype=np.int64)), FORM, kind="processes", workers=1)

    def kill() -> None:
        with open(tmp_path / "slow.jpg", "wb"):  # returns when the worker has opened the other end
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            time.sleep(0.2)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(
        MergeboundError, match=r"slow\.jpg: the worker process that read it ended \(by signal 9 \(SIGKILL"
    ):
        next(data.loader([(np.arange(1), 0)]))
    killer.join(10)


@needs_fifo
def test_a_stuck_process_is_ended_at_the_limit(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck.jpg")
    data = stream(
        FileImages(tmp_path, ("stuck.jpg",), np.zeros(1, dtype=np.int64)),
        FORM,
        kind="processes",
        workers=1,
        limit_s=0.3,
    )
    with pytest.raises(InputTimeout, match=r"stuck\.jpg.*within 0\.3 s and was ended"):
        next(data.loader([(np.arange(1), 0)]))
    assert multiprocessing.active_children() == []


@needs_fifo
def test_a_stuck_thread_is_an_error_at_the_limit(tmp_path: Path, files: FileImages) -> None:
    os.mkfifo(tmp_path / "stuck.png")
    (tmp_path / "good.jpg").write_bytes((files.root / "1.jpg").read_bytes())
    images = FileImages(tmp_path, ("good.jpg", "stuck.png", "good.jpg"), np.zeros(3, dtype=np.int64))
    started = time.perf_counter()
    with pytest.raises(InputTimeout, match=r"stuck\.png: not read within 0\.2 s"):
        stream(images, FORM, limit_s=0.2).batch(np.arange(3), 0)
    assert time.perf_counter() - started < 5
    with open(tmp_path / "stuck.png", "wb"):  # lets the thread go
        pass


def test_errors_in_threads_come_in_their_turn(tmp_path: Path, files: FileImages) -> None:
    (tmp_path / "good.jpg").write_bytes((files.root / "1.jpg").read_bytes())
    (tmp_path / "text.png").write_text("no image")
    images = FileImages(tmp_path, ("good.jpg", "text.png", "absent.png"), np.zeros(3, dtype=np.int64))
    loaded = stream(images, FORM).loader([(np.asarray([0]), 0), (np.asarray([1]), 0)])
    assert next(loaded)[0].shape == (1, 3, 24, 20)
    with pytest.raises(MergeboundError, match=r"text\.png: not a readable image"):
        next(loaded)
    with pytest.raises(MergeboundError, match=r"absent\.png: there is no such file"):
        stream(images, FORM).batch(np.asarray([2]), 0)
    with pytest.raises(MergeboundError, match=r"good\.jpg: a colour image"):
        stream(images, InputFormat(1, 8, 8)).batch(np.asarray([0]), 0)

    def fails(row: int) -> np.ndarray:
        raise ArithmeticError("odd\nnumber")

    with pytest.raises(MergeboundError, match=r"^box\.zip, image 0: cannot be read \(ArithmeticError: odd number\)"):
        stream(ReadImages(fails, np.zeros(1, dtype=np.int64), "box.zip", ""), FORM).batch(np.asarray([0]), 0)
    with pytest.raises(MergeboundError, match=r"cannot be sent to worker processes .* use threads"):
        next(
            stream(ReadImages(fails, np.zeros(1, dtype=np.int64), "box.zip", ""), FORM, kind="processes").loader(
                [(np.asarray([0]), 0)]
            )
        )


@dataclass
class Watched:
    """Images that count what is read."""

    whole: ArrayImages
    reads: list[int] = field(default_factory=list)
    fingerprint: str = "0" * 64

    @property
    def labels(self) -> np.ndarray:
        return self.whole.labels

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, row: int) -> np.ndarray:
        self.reads.append(row)
        return self.whole.read(row)

    def place(self, row: int) -> str:
        return self.whole.place(row)


def arrays(count: int, side: int = 12, channels: int = 1, classes: int = 4) -> ArrayImages:
    rng = np.random.default_rng([count, 0xA11])
    labels = rng.integers(0, classes, count)
    pixels = rng.integers(0, 200, (count, side, side, channels)) + 12 * labels[:, None, None, None]
    return ArrayImages(pixels.astype(np.uint8), labels)


def test_what_is_read_ahead_is_bounded() -> None:
    images = Watched(arrays(800))
    form = InputFormat(1, 12, 12)
    chunks = 6
    data = replace(stream(images, form, workers=2), ahead_bytes=chunks * CHUNK * 144)
    order = [(rows, 0) for rows in np.arange(800).reshape(-1, 32)]
    loaded = data.loader(order)
    for taken in range(1, 6):
        next(loaded)
        time.sleep(0.03)  # time to run ahead, were it not bounded
        assert len(images.reads) <= 32 * taken + chunks * CHUNK
    loaded.close()
    seen = len(images.reads)
    time.sleep(0.05)
    assert len(images.reads) == seen  # the workers have ended
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inputs-")]


def test_samples_of_a_subset_keep_their_draws(files: FileImages) -> None:
    data = stream(files, FORM, views=VIEWS["crop_flip"], seed=1)
    rows = np.asarray([7, 2, 19, 11])
    part = data.take(rows)
    assert len(part) == 4
    assert torch.equal(part.labels, data.labels[torch.from_numpy(rows)])
    assert torch.equal(part.batch(np.asarray([3, 0]), 5)[0], data.batch(np.asarray([11, 7]), 5)[0])
    assert torch.equal(part.take(np.asarray([1])).batch(np.asarray([0]), 5)[0], data.batch(np.asarray([2]), 5)[0])
    assert torch.equal(part.evaluation().batch(np.arange(4), 5)[0], stream(files, FORM).batch(rows, 0)[0])
    assert not torch.equal(data.batch(rows, 0)[0], data.batch(rows, 1)[0])


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 3), st.integers(0, 60), st.integers(0, 5))
def test_an_order_goes_on_from_any_step(n: int, size: int, epoch: int, step: int, seed: int) -> None:
    whole = [(rows.tolist(), e) for rows, e in shuffled(n, size, seed=seed, epochs=4)]
    per_epoch = -(-n // size)
    for e in range(4):
        assert sorted(row for rows, at in whole for row in rows if at == e) == list(range(n))
    step = min(step, per_epoch)
    rest = [(rows.tolist(), e) for rows, e in shuffled(n, size, seed=seed, epochs=4, start=(epoch, step))]
    assert rest == whole[epoch * per_epoch + step :]


def test_epochs_go_on_where_a_run_stopped(files: FileImages) -> None:
    data = stream(files, FORM, views=VIEWS["gentle"], seed=2)
    whole = list(data.epochs(8, 2))
    assert [len(labels) for _, labels in whole] == [8, 8, 5] * 2
    rest = list(data.epochs(8, 2, start=(1, 1)))
    for (x, labels), (y, others) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)
    assert not np.array_equal(epoch_order(21, 0, 2), epoch_order(21, 1, 2))
    with pytest.raises(MergeboundError, match="start"):
        shuffled(10, 5, seed=0, start=(0, 3))


class Plain:
    """The same data without a loader."""

    def __init__(self, data: Streamed) -> None:
        self.data = data

    @property
    def labels(self) -> torch.Tensor:
        return self.data.labels

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, rows: np.ndarray, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data.batch(rows, epoch)

    def take(self, rows: np.ndarray) -> Plain:
        return Plain(self.data.take(rows))


@pytest.mark.parametrize("sampling", ["reshuffle", "without_replacement"])
def test_training_is_the_same_with_batches_prepared_ahead(sampling: str) -> None:
    data = stream(arrays(60, classes=3), InputFormat(1, 8, 8), views=VIEWS["crop_flip"])
    model = build_model("resnet_gn", 3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hyper = Hyperparameters(0.05, 9, 16, data_share=0.8, momentum=0.9, sampling=sampling)  # type: ignore[arg-type]

    def noise(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return x + float(rng.standard_normal())

    for transform in (None, noise):
        state, log = finetune(model, start, data, hyper, 1, transform=transform)
        other, plain = finetune(model, start, Plain(data), hyper, 1, transform=transform)
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert log.batch_loss.tolist() == plain.batch_loss.tolist()
        assert log.batch_size.tolist() == plain.batch_size.tolist()
    for views in (False, True):
        options = dict(steps=6, learning_rate=1e-3, batch_size=16, seed=0, views=views)
        one = pretrain(model, start, data, **options)  # type: ignore[arg-type]
        two = pretrain(model, start, Plain(data), **options)  # type: ignore[arg-type]
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inputs-")]


def test_any_data_can_be_prepared_ahead() -> None:
    data = Plain(stream(arrays(40), InputFormat(1, 12, 12)))
    order = list(with_epochs(np.array_split(np.arange(40), 7), 40))
    for (x, labels), (y, others) in zip(in_order(data, order), background(data, order), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, others)


def test_epochs_are_counted_by_samples_drawn() -> None:
    batches = [np.zeros(size, dtype=int) for size in (4, 4, 2, 4, 4, 4)]
    assert [epoch for _, epoch in with_epochs(batches, 10)] == [0, 0, 0, 1, 1, 1]
    assert [epoch for _, epoch in with_epochs([np.zeros(7, dtype=int)] * 5, 10)] == [0, 0, 1, 2, 2]


def test_ordered_results_and_errors() -> None:
    def slow(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        if item == 17:
            raise KeyError("seventeen")
        return item * item

    def items() -> Iterator[int]:
        assert threading.current_thread() is threading.main_thread()
        yield from range(40)

    found: list[int] = []
    with pytest.raises(KeyError, match="seventeen"):
        found.extend(ordered([slow] * 3, items(), ahead=5))
    assert found == [item * item for item in range(17)]
    assert list(ordered([slow], [], ahead=1)) == []


def test_draft_decoding_is_close(tmp_path: Path) -> None:
    """The decoder's own halving against a full decoding: the same views within a few grey levels."""
    y, x = np.mgrid[0:300, 0:400]
    image = np.stack([127 + 100 * np.sin(x / 17), 127 + 100 * np.cos(y / 23), (x + y) / 3], -1).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "large.jpg", quality=90)
    images = Subset(FileImages(tmp_path, ("large.jpg",), np.zeros(1, dtype=np.int64)), np.asarray([0]))
    assert read_image(tmp_path / "large.jpg", at_least=(150, 150)).shape == (150, 200, 3)
    assert read_image(tmp_path / "large.jpg", at_least=(151, 150)).shape == (300, 400, 3)
    form = InputFormat(3, 64, 64)
    exact, draft = Reader(images, form).view(0, 0), Reader(images, form, decode="draft").view(0, 0)
    difference = np.abs(exact.astype(int) - draft)
    assert difference.mean() < 1.5
    assert difference.max() < 24
    assert Reader(images, form, VIEWS["crop_flip"], decode="draft").view(0, 0).shape == (64, 64, 3)


def test_fast_decoding_is_within_two_grey_levels(files: FileImages, tmp_path: Path) -> None:
    y, x = np.mgrid[0:300, 0:260]
    rng = np.random.default_rng([0, 0xFA57])
    waves = np.stack([127 + 100 * np.sin(x / 7), 127 + 100 * np.cos(y / 13), (x + y) / 3], -1)
    image = Image.fromarray(np.clip(waves + rng.normal(0, 9, waves.shape), 0, 255).astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=90)
    image.convert("L").save(tmp_path / "grey.jpeg")
    image.save(tmp_path / "b.png")
    whole = FileImages(tmp_path, ("a.jpg", "grey.jpeg", "b.png"), np.zeros(3, dtype=np.int64))
    for form in (InputFormat(3, 64, 48, crop=0.9), InputFormat(3, 128, 128, interpolation="bilinear")):
        for views in (None, VIEWS["crop_flip"]):
            for row in range(3):
                exact = Reader(whole, form, views).view(row, 0)
                fast = Reader(whole, form, views, decode="fast").view(row, 0)
                assert int(np.abs(exact.astype(int) - fast).max()) <= 2
    grey = replace(whole, grey=True)
    one = InputFormat(1, 64, 64)
    for row in (1, 2):
        assert (
            np.abs(Reader(grey, one).view(row, 0).astype(int) - Reader(grey, one, decode="fast").view(row, 0)).max()
            <= 2
        )
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-3000])
    (tmp_path / "text.jpg").write_text("no image")
    for name, wanted in (("cut.jpg", "not a readable"), ("text.jpg", "not a readable"), ("none.jpg", "no such file")):
        broken = FileImages(tmp_path, (name,), np.zeros(1, dtype=np.int64))
        with pytest.raises(MergeboundError, match=f"{name}: .*{wanted}"):
            Reader(broken, FORM, decode="fast").view(0, 0)
    data = stream(files, FORM, decode="fast", views="trivial", seed=2)
    assert torch.equal(data.batch(np.arange(9), 1)[0], replace(data, workers=1).batch(np.arange(9), 1)[0])


def test_wrong_settings_are_named(files: FileImages) -> None:
    data = stream(files, FORM)
    wrong = {"workers": 0, "kind": "fibres", "limit_s": 0.0, "dtype": torch.uint8, "source": np.arange(3)}
    for name, value in wrong.items():
        with pytest.raises(MergeboundError, match=name):
            replace(data, **{name: value})
    with pytest.raises(MergeboundError, match="channels = 4"):
        replace(data, form=InputFormat(4, 8, 8)).batch(np.arange(1), 0)
    with pytest.raises(MergeboundError, match=r"rows: .*0 \.\. 20"):
        data.batch(np.asarray([21]), 0)
