"""The pieces of ``benchmarks/inputs.py``: rates against known delays, tables from given numbers."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.input_speed.loading import rate, write_photographs
from benchmarks.input_speed.main import main
from benchmarks.input_speed.tables import Loading, Plan, Training, bf16_units, report, write
from benchmarks.input_speed.training import networks, training

LOADING = [
    Loading("resident", 32, "none", "float32", "0", 123456.7),
    Loading("streamed", 224, "rand", "float32", "2", 9.4),
]
TRAINING = [
    Training("mlp", 1_500_000, 32, "float32", "resident, light", 5000.0, 2500.0, 2.0, 1.01),
    Training("large", 9_000_000, 224, "bfloat16", "streamed", 50.0, 100.0, 0.5, 2.125),
]


@dataclass
class Slow:
    """Data whose batches take a known time."""

    seconds: float

    def __len__(self) -> int:
        return 64

    @property
    def labels(self) -> Tensor:
        return torch.zeros(64, dtype=torch.int64)

    def batch(self, rows: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        return torch.ones(len(rows), 3), self.labels[: len(rows)]

    def take(self, rows: np.ndarray) -> Slow:
        return self


def test_rates_are_images_per_second() -> None:
    found = rate(Slow(0.02), Plan(batch=8, rounds=3, seconds=0.06))
    assert 40 < found <= 8 / 0.02


def test_a_slow_loader_is_seen_while_training() -> None:
    found = training(
        "tiny", 3, nn.Linear(3, 2), "float32", "slow", Slow(0.03), 266.0, Plan(batch=8, rounds=3, seconds=0.0)
    )
    assert found.parameters == 8
    assert found.ratio == pytest.approx(266.0 / found.training_rate)
    assert found.attached > 2


def test_tables_and_files(tmp_path: Path) -> None:
    page = report(LOADING, TRAINING, {"machine": "2 cores"})
    assert "* machine: 2 cores" in page
    assert "| resident | 32 | none | float32 | 0 | 123,457 |" in page
    assert "| mlp | 1,500,000 | 32 | float32 | resident, light | 5,000 | 2,500.0 | 2.0 | 1.010 |" in page
    assert "1 of 2 trainings consume less than the loader gives." in page
    for block in (block for block in page.split("\n\n") if block.startswith("|")):
        assert len({line.count("|") for line in block.strip().splitlines()}) == 1
    write(tmp_path, LOADING, TRAINING, {})
    with open(tmp_path / "training.csv", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [float(row["attached"]) for row in rows] == [1.01, 2.125]
    assert rows[1]["network"] == "large"
    with open(tmp_path / "loading.csv", encoding="utf-8") as handle:
        assert [float(row["rate"]) for row in csv.DictReader(handle)] == [123456.7, 9.4]


def test_photographs_have_the_stated_sizes_and_are_reproducible(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    images = write_photographs(tmp_path / "one", 4)
    write_photographs(tmp_path / "two", 4)
    for name in images.files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        with Image.open(tmp_path / "one" / name) as opened:
            assert (opened.format, opened.mode) == ("JPEG", "RGB")
            assert all(256 <= side <= 500 for side in opened.size)


def test_networks_have_a_million_parameters_and_take_their_size() -> None:
    with torch.device("meta"):
        for name, (size, build) in networks().items():
            model = build()
            assert sum(p.numel() for p in model.parameters()) > 1_000_000, name
            assert model(torch.empty(2, 3, size, size)).shape == (2, 10)


def test_processor_flags_are_known_names() -> None:
    assert set(bf16_units()) <= {"amx_bf16", "avx512_bf16"}


def test_options() -> None:
    with pytest.raises(SystemExit):
        main(["--slow"])
