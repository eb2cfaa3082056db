"""Pretraining: against torch's own optimizer, resumed to the same bits after SIGKILL, cached, measured."""

from __future__ import annotations

import math
import multiprocessing
import signal
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bases import read_base
from experiments.bases.pretraining import accuracy_of, digest_of, pretrain_base
from experiments.bases.training import QUALITIES, PretrainSpec, order, train
from experiments.finetune.schedules import schedule
from experiments.inputs.shares import nested_subset
from experiments.models import build_model
from experiments.tasks.digits8 import digits8
from experiments.tasks.types import Split
from theory.errors import MergeboundError

SPEC = PretrainSpec(steps=12, share=0.5, batch_size=16, learning_rate=2e-3, warm_up=0.2)


@cache
def sample() -> tuple[Split, Split]:
    """Pretraining images, and others to validate on."""
    family = digits8(train_per_task=8, pretraining=400, calibration=20, calibration_per_task=10, test=300)
    return family.pretraining, family.tasks["identity"].test


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_training_is_torchs_adamw_with_warm_up_and_cosine_decay() -> None:
    data, _ = sample()
    model = build_model("vit", seed=1)
    for _ in train(model, data, SPEC, 1):
        pass
    truth = build_model("vit", seed=1).train()
    rows = np.sort(nested_subset(len(data), SPEC.share, 1))
    matrices = [p for p in truth.parameters() if p.ndim > 1]
    vectors = [p for p in truth.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": SPEC.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    )
    factor = schedule("cosine", SPEC.steps, warm_up=2)
    for step, (_, batch) in enumerate(order(len(rows), SPEC.batch_size, SPEC.steps, 1)):
        images, labels = data.images[rows[batch]], data.labels[rows[batch]]
        optimizer.zero_grad()
        logits = truth(images)
        smooth = F.one_hot(labels, 10) * (1 - SPEC.label_smoothing) + SPEC.label_smoothing / 10
        loss = -(smooth * torch.log_softmax(logits, 1)).sum(1).mean()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in truth.parameters() if p.grad is not None))
        for p in truth.parameters():
            p.grad = None if p.grad is None else p.grad * min(1.0, 1.0 / norm)
        for group in optimizer.param_groups:
            group["lr"] = SPEC.learning_rate * factor(step)
        optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), truth.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 40), st.integers(0, 5))
def test_property_every_epoch_is_a_new_order_of_whole_batches(count: int, size: int, steps: int, seed: int) -> None:
    found = list(order(count, size, steps, seed))
    assert len(found) == steps
    by_epoch: dict[int, list[int]] = {}
    for epoch, rows in found:
        assert len(rows) == min(size, count)
        by_epoch.setdefault(epoch, []).extend(rows.tolist())
    assert list(by_epoch) == list(range(len(by_epoch)))
    for epoch, rows in by_epoch.items():
        assert len(set(rows)) == len(rows)
        if epoch < len(by_epoch) - 1:
            assert len(rows) == count // min(size, count) * min(size, count)


class _Dropped(nn.Module):
    """A network with dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def _dropped() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Dropped()


@cache
def _whole() -> dict[str, Tensor]:
    model = _dropped()
    for _ in train(model, sample()[0], SPEC, 9):
        pass
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@settings(max_examples=12)
@given(st.sets(st.integers(1, SPEC.steps - 1), max_size=3), st.integers(0, 99))
def test_property_stopping_anywhere_changes_no_bit_even_with_dropout(stops: set[int], noise: int) -> None:
    kept = None
    for stop in [*sorted(stops), SPEC.steps]:
        model = _dropped()
        torch.manual_seed(noise)  # whatever else the process draws
        for now in train(model, sample()[0], SPEC, 9, kept=kept):
            if now.step == stop:
                kept = now.keep()
                if stop < SPEC.steps:
                    break
    assert same(dict(model.state_dict()), _whole())


def test_the_generator_of_the_process_is_left_alone() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    for _ in train(_dropped(), sample()[0], SPEC, 9):
        pass
    assert torch.equal(before, torch.get_rng_state())


def _slowly(data: Split, place: Path) -> None:
    """In a process that is killed."""
    torch.set_num_threads(1)
    pretrain_base("resnet_bn", data, SPEC, seed=5, cache=place, every=0.0, report=lambda *_: time.sleep(0.1))


def test_killed_pretraining_leaves_nothing_complete_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data, _ = sample()
    truth = pretrain_base("resnet_bn", data, SPEC, seed=5)
    place = tmp_path / "cache"
    child = multiprocessing.get_context("fork").Process(target=_slowly, args=(data, place))
    child.start()
    stop = int(np.random.default_rng([5, 0x51C]).integers(1, 6))
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and child.is_alive():
            found = list(place.glob(".*.partial.safetensors")) if place.exists() else []
            if found and _step(found[0]) >= stop:
                break
            time.sleep(0.01)
    finally:
        child.kill()
        child.join(30)
    assert child.exitcode == -signal.SIGKILL, "the child ended before it could be killed"
    assert not [path for path in place.iterdir() if not path.name.startswith(".")]
    base = pretrain_base("resnet_bn", data, SPEC, seed=5, cache=place)
    assert base.digest == truth.digest
    assert base.provenance.details["resumed_at"] >= stop
    assert [path.suffix for path in place.iterdir() if "partial" in path.name] == []


def _step(path: Path) -> int:
    from merging.checkpoint import read_metadata

    try:
        return int(read_metadata(path)["step"])
    except (ValueError, KeyError, OSError):
        return 0


def test_a_finished_base_is_taken_from_the_cache_and_what_decides_its_bits_makes_another(tmp_path: Path) -> None:
    data, validation = sample()
    first = pretrain_base("vit", data, SPEC, cache=tmp_path)
    calls: list[int] = []
    again = pretrain_base("vit", data, SPEC, cache=tmp_path, report=lambda step, *_: calls.append(step))
    assert (again.digest, calls) == (first.digest, [])
    assert len(list(tmp_path.iterdir())) == 1
    stored = read_base(next(tmp_path.iterdir()))
    assert same(dict(stored.state), dict(first.state))
    assert stored.provenance.details["data"] == digest_of(data)
    measured = pretrain_base("vit", data, SPEC, cache=tmp_path, validation=validation)
    with torch.no_grad():
        right = (measured.model()(validation.images).argmax(1) == validation.labels).float().mean()
    assert measured.provenance.accuracy == pytest.approx(float(right))
    assert (measured.provenance.quality, measured.provenance.images) == ("custom", 300)
    other = SPEC.model_copy(update={"learning_rate": 3e-3})
    variants = [
        pretrain_base("vit", data, other, cache=tmp_path),
        pretrain_base("vit", data, SPEC, cache=tmp_path, seed=1),
        pretrain_base("vit", data.take(np.arange(300)), SPEC, cache=tmp_path),
        pretrain_base("vit", data, SPEC, cache=tmp_path, classes=12),
    ]
    assert len({first.digest, *(variant.digest for variant in variants)}) == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_better_grades_measure_better() -> None:
    data, validation = sample()
    reached = []
    for grade in ("none", "weak", "strong"):
        smaller = {"steps": QUALITIES[grade].steps // 15, "batch_size": 40, "learning_rate": 5e-3}  # type: ignore[index]
        spec = QUALITIES[grade].model_copy(update=smaller)  # type: ignore[index]
        base = pretrain_base("vit", data, spec, validation=validation)
        reached.append(base.provenance.accuracy or 0.0)
    assert reached[0] < 0.3
    assert reached[0] + 0.05 < reached[1] < reached[2] - 0.1
    none = pretrain_base("vit", data, "none", seed=2)
    assert same(dict(none.state), build_model("vit", seed=2).state_dict())
    assert none.provenance.quality == "none"


def test_two_at_once_make_it_once_and_agree(tmp_path: Path) -> None:
    data, _ = sample()
    steps: list[int] = []
    found: list[str] = []

    def make() -> None:
        base = pretrain_base("vit", data, SPEC, cache=tmp_path, wait=60, report=lambda step, *_: steps.append(step))
        found.append(base.digest)

    workers = [threading.Thread(target=make) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert steps == list(range(1, SPEC.steps + 1))


def test_who_has_waited_long_enough_works_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from experiments.bases.waiting import alone

    data, _ = sample()
    truth = pretrain_base("vit", data, SPEC, cache=tmp_path)
    target = next(tmp_path.glob("*.safetensors"))
    target.unlink()
    with alone(tmp_path / f".{target.stem}.lock", 1.0) as held:
        assert held
        base = pretrain_base("vit", data, SPEC, cache=tmp_path, wait=0.1, every=0.0)
    assert base.digest == truth.digest
    assert "it is made twice" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_damaged_kept_state_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, _ = sample()
    truth = pretrain_base("vit", data, SPEC, cache=tmp_path)
    target = next(tmp_path.glob("*.safetensors"))
    partial = tmp_path / f".{target.stem}.partial.safetensors"
    target.unlink()
    partial.write_bytes(b"half a file")
    assert pretrain_base("vit", data, SPEC, cache=tmp_path).digest == truth.digest
    assert "starts again" in caplog.text
    assert not partial.exists()


def test_a_run_that_leaves_the_finite_numbers_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    data, _ = sample()
    wild = SPEC.model_copy(update={"learning_rate": 1e30, "gradient_clip": 0.0})
    with pytest.raises(MergeboundError, match=r"left the finite numbers at step \d+ of 12; lower learning_rate"):
        pretrain_base("vit", data, wild, cache=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(MergeboundError, match="did you mean 'strong'"):
        pretrain_base("vit", data, "stronk")  # type: ignore[arg-type]
    with pytest.raises(MergeboundError, match="more than classes = 3"):
        pretrain_base("vit", data, SPEC, classes=3)


def test_the_digest_of_data_sees_images_labels_and_augmentation() -> None:
    data, _ = sample()

    class Augmented(Split):
        def batch(self, rows: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
            images, labels = super().batch(rows, epoch)
            return images + 0.01 * epoch, labels

    other = data.images.clone()
    other[-1, 0, 3, 3] += 1e-3
    labels = data.labels.clone()
    labels[7] = (labels[7] + 1) % 10
    digests = [
        digest_of(data),
        digest_of(Split(other, data.labels, data.source)),
        digest_of(Split(data.images, labels, data.source)),
        digest_of(Augmented(data.images, data.labels, data.source)),
        digest_of(data.take(np.arange(len(data))[::-1].copy())),
    ]
    assert len(set(digests)) == 5
    assert digest_of(Split(data.images.clone(), data.labels, data.source)) == digests[0]


def test_accuracy_counts_every_image_once() -> None:
    _, validation = sample()
    model = build_model("resnet_bn", seed=3)
    whole = accuracy_of(model, validation, batch_size=300)
    assert whole == pytest.approx(accuracy_of(model, validation, batch_size=7))
    assert not model.training
