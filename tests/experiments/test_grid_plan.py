"""``mergebound grid plan`` and what it counts, against the loop's own batches, real networks and sums by hand."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bases.spec import BaseSpec
from experiments.cli import main
from experiments.finetune.loop import Sampling, batches
from experiments.grid.bases import base_specs, open_base
from experiments.grid.calibrate import Timing, _fitted, calibrate
from experiments.grid.cost import network_facts, samples_of
from experiments.grid.errors import GridError
from experiments.grid.estimate import estimate
from experiments.grid.expand import expand
from experiments.grid.facts import facts_of, published_facts
from experiments.grid.run_spec import RunSpec
from experiments.grid.schema import grid_schema
from experiments.grid.spec import GridSpec
from experiments.grid.yaml_source import parse_grid, read_grid
from experiments.inputs.shares import subset_size
from experiments.models import build_model, count_flops
from experiments.tasks.named import open_task

LOGISTIC = """\
name: small
tasks: [digits8:flip, digits8:roll]
base: {kind: random, architecture: logistic, classes: 10}
learning_rate: [0.1, 0.2]
batch_size: 8
steps: 15
checkpoints: {every: 10}
"""


def cli(*words: str) -> int:
    try:
        main(["grid", *words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.sampled_from(["reshuffle", "without_replacement", "with_replacement"]),
)
def test_samples_are_those_of_the_loop(n: int, size: int, steps: int, share: float, sampling: Sampling) -> None:
    used = subset_size(n, share)
    size = min(size, used)
    base = BaseSpec(kind="random", architecture="vit", classes=10)
    run = RunSpec(
        task="t", base=base, learning_rate=1, steps=steps, batch_size=size, data_share=share, sampling=sampling
    )
    rows = batches(used, size, steps, sampling, np.random.default_rng(0))
    assert samples_of(run, n) == sum(len(each) for each in rows)


@pytest.mark.parametrize("architecture", ["vit", "resnet_bn", "mlp_64"])
def test_sizes_are_linear_in_the_classes(architecture: str) -> None:
    facts = network_facts(BaseSpec(kind="random", architecture=architecture, classes=10))
    model = build_model(architecture, classes=37)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert facts.at(37) == (sum(p.numel() for p in model.parameters()), size, count_flops(model))


def test_published_sizes_are_those_of_the_data() -> None:
    for name in ("digits8:flip", "digits8:pretraining"):
        opened = facts_of(name, open_task(name))
        published = published_facts(name)
        assert (published.classes, published.train, published.validation, published.test) == (
            (opened.classes, opened.train, opened.validation, opened.test)
        )


@pytest.mark.skipif(not os.environ.get("MERGEBOUND_DATA"), reason="MERGEBOUND_DATA does not name the folder of npz8")
def test_published_sizes_of_npz8() -> None:
    for name in ("npz8:ucmerced", "npz8:chars74k"):
        opened, published = facts_of(name, open_task(name)), published_facts(name)
        assert (published.classes, published.train, published.validation, published.test) == (
            (opened.classes, opened.train, opened.validation, opened.test)
        )


def test_a_small_grid_by_hand() -> None:
    found = estimate(parse_grid(LOGISTIC), seconds=0.0)
    # 80 images, batches of 8: 15 steps are 120 samples; 65 outputs-by-inputs products: 10 x 64 multiply-adds
    assert (found.runs, found.tasks, found.total.checkpoints, found.total.steps) == (4, 2, 8, 60)
    assert found.total.samples == 4 * 120
    assert found.total.flops == 3 * (2 * 64 * 10) * 480
    assert found.total.evaluated == 8 * (256 + 400)
    assert found.total.bytes == 8 * 4 * 650
    assert (found.seconds, found.problems, found.published) == (None, (), ())


def test_operations_follow_what_is_trained() -> None:
    plain = estimate(parse_grid(LOGISTIC), seconds=0.0).total.flops
    assert estimate(parse_grid(LOGISTIC + "trained: head\n"), seconds=0.0).total.flops == plain / 3
    assert estimate(parse_grid(LOGISTIC + "optimizer: sam\n"), seconds=0.0).total.flops == plain * 2


def test_times_are_fitted_by_a_line() -> None:
    found = _fitted({8: [0.018] * 3, 64: [0.130] * 3}, [8, 16, 64])
    assert (found.fixed, found.per_sample) == (pytest.approx(0.002), pytest.approx(0.002))
    assert (found.low, found.high, found.batches, found.steps) == (0.9, 1.1, (8, 64), 6)
    assert found.seconds(10, 160) == pytest.approx(10 * 0.002 + 160 * 0.002)
    scaled = _fitted({2: [0.1, 0.1, 0.3]}, [64])
    assert (scaled.fixed, scaled.per_sample, scaled.low, round(scaled.high, 9)) == (0.0, 0.05, 0.5, 2.6)
    falling = _fitted({8: [0.2], 64: [0.1]}, [8, 64])  # noise: larger batches are not faster
    assert (falling.fixed, falling.per_sample) == (0.0, 0.1 / 64)


def test_calibration_restores_the_threads_and_times_the_grids_batches() -> None:
    import torch

    base = BaseSpec(kind="random", architecture="mlp_64", classes=10)
    before = torch.get_num_threads()
    found = calibrate(base, network_facts(base), [4, 32], seconds=0.2)
    assert torch.get_num_threads() == before
    assert found.batches == (4, 32)
    assert 0 < found.seconds(1, 32) < 5


def test_the_cost_of_the_paper_grid() -> None:
    """Operations of ResNet-18 at 224 pixels: 1.8 billion multiply-adds (He et al. 2015)."""
    text = read_grid("paper-resnet").text.replace(", resnet50.tv_in1k, resnet152.tv_in1k", "")
    found = estimate(parse_grid(text), seconds=0.0, check=False)
    assert (found.runs, found.total.checkpoints, found.total.steps) == (540, 2160, 540 * 4000)
    assert len(found.published) == 20
    assert found.total.flops / (3 * found.total.samples) / 2e9 == pytest.approx(1.8, rel=0.02)
    assert found.total.samples < 180 * 4000 * (64 + 128 + 256)  # short last batches


def test_a_base_that_is_pretrained_on_the_spot(tmp_path: Path) -> None:
    spec = BaseSpec.model_validate(
        {
            "kind": "pretrain",
            "architecture": "mlp_64",
            "data": "digits8:pretraining",
            "quality": {"steps": 3, "batch_size": 16},
        }
    )
    first = open_base(spec, cache=tmp_path)
    (kept,) = tmp_path.glob("mlp_64-custom-*.safetensors")
    written = kept.stat().st_mtime_ns
    again = open_base(spec, cache=tmp_path)
    assert (again.digest, kept.stat().st_mtime_ns, first.classes) == (first.digest, written, 10)
    assert first.provenance.accuracy is not None
    other = open_base(spec.model_copy(update={"data": "digits8:flip"}), cache=tmp_path)
    assert other.digest != first.digest


def test_bases_are_multiplied_in_order() -> None:
    content = {"kind": "random", "classes": 10, "seed": [0, 1], "architecture": ["vit", "resnet_gn"]}
    found = [(base.architecture, base.seed) for base in base_specs(content)]
    assert found == list(itertools.product(["vit", "resnet_gn"], [0, 1]))
    with pytest.raises(GridError, match="twice"):
        base_specs({**content, "seed": [0, 0]})


# --- the commands ----------------------------------------------------------------------------------------------------


def test_plan_prints_counts_and_exits_by_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(LOGISTIC)
    assert cli("plan", str(file), "--no-calibrate", "--json", "--store", str(tmp_path / "store")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["total"]["samples"], found["problems"]) == (4, 480, [])
    assert cli("plan", str(file), "--calibrate-seconds", "0.2", "--workers", "3") == 0
    text = capsys.readouterr().out
    assert "small: 4 runs on 2 tasks, 8 checkpoints, 60 steps, 480 samples" in text
    assert "with 3 workers" in text

    file.write_text(LOGISTIC.replace("batch_size: 8", "batch_size: 81"))
    assert cli("plan", str(file), "--no-calibrate") == 1
    text = capsys.readouterr().out
    assert f"{file}, line 5: batch_size: 81 is larger than the 80 training images" in text
    file.write_text(LOGISTIC + "momentun: 0.5\n")
    assert cli("plan", str(file)) == 2
    assert "line 8: momentun: there is no such key; did you mean 'momentum'?" in capsys.readouterr().err


def test_expand_writes_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("expand", "digits-small", "--csv", str(tmp_path / "runs.csv")) == 0
    with (tmp_path / "runs.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    runs = expand(read_grid("digits-small").spec)
    assert [(r["task"], r["architecture"], float(r["learning_rate"]), int(r["steps"])) for r in rows] == [
        (run.task, run.architecture, run.learning_rate, run.steps) for run in runs
    ]
    assert cli("expand", "digits-small", "--csv", str(tmp_path / "runs.csv" / "again.csv")) == 2


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("presets", "--json") == 0
    found = {row["name"]: row["runs"] for row in json.loads(capsys.readouterr().out)}
    assert found["paper-resnet"] == 1620


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def test_the_schema_knows_every_entry_and_refers_to_nothing_else() -> None:
    schema = json.loads(json.dumps(grid_schema()))
    assert set(schema["properties"]) == set(GridSpec.model_fields)
    assert set(schema["required"]) == {"name", "tasks", "base"}
    assert schema["additionalProperties"] is False
    assert {ref.removeprefix("#/$defs/") for ref in _references(schema)} <= set(schema["$defs"])


def test_a_timing_is_plain_data() -> None:
    assert Timing(0.5, 0.25, 0.9, 1.1, (1,), 1).seconds(2, 8) == 3.0
