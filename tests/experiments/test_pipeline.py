"""The main job of one architecture, in small: against plain models, interrupted, and blind to test data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import experiments.pipeline as pipeline
from experiments.coefficients import TUNING_GRID
from experiments.collected import PoolStatistics, collect_pool
from experiments.experts import make_base, make_pool
from experiments.measure.backbone import Backbone
from experiments.measure.function_space import MergePoint, collect, price, trivial
from experiments.models import build_model, head_prefix
from experiments.pipeline import Frames, join_frames, line_pairs, read_finished, run_architecture, spread
from experiments.pool import PlannedExpert, PlannedGroup, draw_groups, draw_pool
from experiments.spec import ValidationSpec, load_spec
from experiments.tasks.digits8 import digits8
from experiments.tasks.types import Family, Split
from merging.merge import merge_state_dicts
from merging.partition import partition
from theory.errors import MergeboundError

Folders = pytest.TempPathFactory
State = dict[str, Tensor]
TABLES = ("merges", "experts", "coefficients", "lines", "optimal")


def small(architecture: str, heads: str = "trained") -> ValidationSpec:
    """A few seconds' version of ``digits8-smoke``."""
    spec = load_spec("digits8-smoke").model_dump()
    spec |= {"architectures": (architecture,), "heads": heads, "groups_per_size": 2}
    spec["family"] |= {"tasks": ("identity", "flip", "rotate90"), "pretraining": 100, "test": 40}
    spec["family"] |= {"calibration": 24, "calibration_per_task": 16}
    spec["base"] |= {"steps": 10}
    spec |= {"sweep_groups": 1, "optimal_groups": 2}
    if heads == "shared":
        spec |= {"experts_per_task": 4, "group_sizes": (2,)}
    return ValidationSpec.model_validate(spec)


def family_of(spec: ValidationSpec) -> Family:
    return digits8(seed=spec.seed, **spec.family.model_dump())


@cache
def stored(path: Path) -> State:
    loaded: State = load_file(path)
    return loaded


@cache
def plain_model(architecture: str) -> nn.Module:
    return build_model(architecture, classes=10).eval()


@cache
def prefix_of(architecture: str) -> str:
    """Name prefix of the head's tensors."""
    return head_prefix(plain_model(architecture))


def silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Run:
    """A finished run and where it is on disk."""

    spec: ValidationSpec
    architecture: str
    folder: Path
    frames: Frames

    def state(self, name: str) -> State:
        """A checkpoint as it was stored."""
        place = self.folder / "base" if name == "base" else self.folder / "mild" / "experts" / name
        return dict(stored(place.with_suffix(".safetensors")))

    def head(self, name: str) -> State:
        """An expert's own head; nothing if heads are merged."""
        if self.spec.heads == "shared":
            return {}
        return {key: tensor for key, tensor in self.state(name).items() if key.startswith(prefix_of(self.architecture))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Folders) -> Callable[..., Run]:
    """Runs by architecture and kind of head; each is made once."""

    @cache
    def make(architecture: str, heads: str) -> Run:
        spec, folder = small(architecture, heads), tmp_path_factory.mktemp(f"{architecture}-{heads}")
        return Run(spec, architecture, folder, run_architecture(spec, architecture, folder, silent))

    def made(architecture: str, heads: str = "trained") -> Run:
        return make(architecture, heads)

    return made


Finished = Callable[..., Run]


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    return table[[column for column in table.columns if not column.startswith("seconds")]]


def check_same_tables(first: Frames, second: Frames) -> None:
    """Bit for bit, except how long things took."""
    for name in TABLES:
        left, right = (without_seconds(getattr(frames, name)) for frames in (first, second))
        pd.testing.assert_frame_equal(left, right, check_exact=True, obj=name)


def image_losses(architecture: str, state: State, split: Split) -> np.ndarray:
    """Per-image cross-entropy of the plain network."""
    model = plain_model(architecture)
    model.load_state_dict(state)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(split.images), split.labels, reduction="none")
    return np.asarray(losses.double().numpy())


def merged_losses(run: Run, names: Sequence[str], method: str, part: str, **settings: Any) -> np.ndarray:
    """Per task (with that expert's head) and image: the merge is made from the stored checkpoints."""
    tasks = family_of(run.spec).tasks
    base, states = run.state("base"), {name: run.state(name) for name in names}
    private = () if run.spec.heads == "shared" else (prefix_of(run.architecture) + "*",)
    parts = partition(base, private=private)
    merged = merge_state_dicts(method, base, states, partition=parts, seed=run.spec.seed, **settings)
    splits: list[Split] = [getattr(tasks[name.split("-")[1]], part) for name in names]
    return np.stack(
        [
            image_losses(run.architecture, merged | run.head(name), split)
            for name, split in zip(names, splits, strict=True)
        ]
    )


def collected(run: Run) -> tuple[PoolStatistics, list[PlannedGroup]]:
    """The pool's statistics, from the checkpoints on disk."""
    spec, family = run.spec, family_of(run.spec)
    base = make_base(spec, run.architecture, family, run.folder)
    plans = draw_pool(spec, "mild")
    experts = make_pool(spec, run.architecture, family, base, plans, run.folder / "mild" / "experts", silent)
    backbone = Backbone.of(build_model(run.architecture), base, shared_head=spec.heads == "shared")
    groups = list(draw_groups(spec, "mild", plans))
    return collect_pool(backbone, base, experts, family, [g.members for g in groups], silent), groups


# --- measurements against plain models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "heads"), [("vit", "trained"), ("resnet_bn", "trained"), ("vit", "frozen"), ("vit", "shared")]
)
def test_measured_risk_and_its_error_are_those_of_the_plain_merged_model(
    finished: Finished, architecture: str, heads: str
) -> None:
    run = finished(architecture, heads)
    settings = {method.name: dict(method.settings) for method in run.spec.methods}
    for row in run.frames.merges.to_dict("records"):
        names = row["experts"].split(";")
        losses = merged_losses(run, names, row["method"], "test", **settings[row["method"]])
        assert row["measured_loss"] == pytest.approx(losses.mean(), rel=1e-5, abs=1e-6)
        per_image = losses.mean(axis=0)  # tasks share their test images
        error = per_image.std(ddof=1) / np.sqrt(len(per_image))
        assert row["measured_se"] == pytest.approx(error, rel=1e-4)
        assert row["N"] == len(names)


@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
def test_expert_and_base_columns_are_those_of_the_plain_models(finished: Finished, architecture: str) -> None:
    run = finished(architecture)
    tasks = family_of(run.spec).tasks
    own = {}
    for row in run.frames.experts.to_dict("records"):
        state, task = run.state(row["expert"]), tasks[row["task"]]
        own[row["expert"]] = image_losses(architecture, state, task.test).mean()
        assert row["test_loss"] == pytest.approx(own[row["expert"]], rel=1e-5)
        calibration = image_losses(architecture, state, task.calibration).mean()
        assert row["calibration_loss"] == pytest.approx(calibration, rel=1e-5)
    on_base = {
        row["expert"]: image_losses(
            architecture, run.state("base") | run.head(row["expert"]), tasks[row["task"]].test
        ).mean()
        for row in run.frames.experts.to_dict("records")
    }
    for row in run.frames.merges.to_dict("records"):
        names = row["experts"].split(";")
        assert row["base_loss"] == pytest.approx(np.mean([on_base[name] for name in names]), rel=1e-5)
        assert row["expert_loss"] == pytest.approx(np.mean([own[name] for name in names]), rel=1e-5)
        assert row["merging_cost"] == pytest.approx(row["measured_loss"] - row["expert_loss"], abs=1e-12)


def test_tuned_coefficients_are_those_that_calibration_images_prefer(finished: Finished) -> None:
    run = finished("vit")
    rows = run.frames.optimal.query("method == 'task_arithmetic_tuned'").to_dict("records")
    assert len(rows) == run.spec.optimal_groups
    for row in rows:
        names = row["experts"].split(";")
        grid = [
            merged_losses(run, names, "task_arithmetic", "calibration", coefficient=value).mean()
            for value in TUNING_GRID
        ]
        best = TUNING_GRID[int(np.argmin(grid))]
        expected = merged_losses(run, names, "task_arithmetic", "test", coefficient=best).mean()
        assert row["measured_loss"] == pytest.approx(expected, rel=1e-5)


def test_risk_optimal_rows_measure_the_merge_at_their_coefficients(finished: Finished) -> None:
    run = finished("vit")
    rows = run.frames.optimal[run.frames.optimal["method"].str.startswith("risk_optimal_")]
    assert len(rows) > 0
    for row in rows.to_dict("records"):
        alpha = [float(value) for value in row["alpha"].split(";")]
        names = row["experts"].split(";")
        losses = merged_losses(run, names, "risk_optimal", "test", coefficients=dict(zip(names, alpha, strict=True)))
        assert row["measured_loss"] == pytest.approx(losses.mean(), abs=1e-3), "alpha is stored with four digits"


def test_sweep_and_lines_measure_what_they_say(finished: Finished) -> None:
    run = finished("resnet_bn")
    for row in run.frames.coefficients.to_dict("records"):
        names = row["experts"].split(";")
        losses = merged_losses(run, names, "task_arithmetic", "test", coefficient=row["lam"])
        assert row["measured_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    lines = run.frames.lines
    ends = lines[lines["t"].isin([0.0, 1.0]) & (lines["task"] != "mean")]
    own = run.frames.experts.set_index("expert")["test_loss"]
    for row in ends.to_dict("records"):
        at_own_end = (row["task"] == "b") == (row["t"] == 1.0)
        if at_own_end:
            assert row["measured_loss"] == pytest.approx(own[row[f"expert_{row['task']}"]], rel=1e-5)


# --- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "heads"), [("resnet_bn", "trained"), ("vit", "shared")])
def test_prices_at_an_expert_and_at_the_base_are_measured_calibration_risks(
    finished: Finished, architecture: str, heads: str
) -> None:
    run = finished(architecture, heads)
    pool, groups = collected(run)
    table = run.frames.experts
    for group in groups:
        stats, size = pool.group(group.members), len(group.members)
        for j, unit in enumerate(np.eye(size)):
            prices = price(stats, MergePoint(unit, None, None, 0.0), weights=unit)
            own = table["calibration_loss"].iloc[group.members[j]]
            for name in ("pred_secant", "pred_tangent_expert", "pred_second_order", "pred_curvature_endpoint"):
                assert prices[name] == pytest.approx(own, rel=1e-5), name
        at_base = price(stats, MergePoint(np.zeros(size), None, None, 0.0))
        for name in ("pred_secant", "pred_tangent_base", "pred_second_order"):
            assert at_base[name] == pytest.approx(stats.base_risks().mean(), rel=1e-9), name


def test_merging_copies_of_one_expert_is_priced_as_that_expert(finished: Finished) -> None:
    pool, _ = collected(finished("vit"))
    x, head, split = pool.vectors[0], pool.readouts[0], pool.calibration[pool.tasks[0]]
    stats = collect(pool.backbone, pool.base, [x] * 3, [head] * 3, [split.images] * 3, [split.labels] * 3)
    third = MergePoint(np.full(3, 1 / 3), None, None, 0.0)
    prices, own = price(stats, third), float(stats.own_risks()[0])
    for name in ("pred_secant", "pred_tangent_expert", "pred_curvature_endpoint", "cert_output"):
        assert prices[name] == pytest.approx(own, rel=1e-5), name
    assert trivial(stats, third)["trivial_cosine"] == pytest.approx(1.0)


def test_statistics_of_a_group_are_the_same_collected_alone_or_with_the_pool(finished: Finished) -> None:
    pool, groups = collected(finished("resnet_bn"))
    members = list(groups[-1].members)
    splits = [pool.calibration[pool.tasks[j]] for j in members]
    alone = collect(
        pool.backbone,
        pool.base,
        [pool.vectors[j] for j in members],
        [pool.readouts[j] for j in members],
        [split.images for split in splits],
        [split.labels for split in splits],
    )
    together = pool.group(members)
    for field in ("base_logits", "expert_logits", "base_products", "own_products", "labels"):
        for first, second in zip(getattr(alone, field), getattr(together, field), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5, err_msg=field)
    np.testing.assert_allclose(alone.gram, together.gram, rtol=1e-6)


def other_test_images(**options: Any) -> Family:
    """The same family with test images replaced by noise and labels turned by one."""
    family = digits8(**options)
    generator = torch.Generator().manual_seed(0)
    tasks = {
        name: replace(
            task,
            test=Split(
                torch.randn(task.test.images.shape, generator=generator), (task.test.labels + 1) % 10, task.test.source
            ),
        )
        for name, task in family.tasks.items()
    }
    return replace(family, tasks=tasks)


def test_nothing_that_is_predicted_or_chosen_depends_on_test_data(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("resnet_bn")
    monkeypatch.setattr(pipeline, "digits8", other_test_images)
    blind = run_architecture(run.spec, run.architecture, tmp_path, silent)
    prefixes = ("pred", "cert_", "bound_", "term_", "vacuous_", "trivial_", "se_", "alpha", "expert_loss_cal")
    for name in TABLES:
        seen, other = getattr(run.frames, name), getattr(blind, name)
        columns = [column for column in seen.columns if column.startswith(prefixes)]
        pd.testing.assert_frame_equal(seen[columns], other[columns], check_exact=True, obj=name)
    measured = [c for c in run.frames.experts.columns if not c.startswith(("test_", "seconds"))]
    pd.testing.assert_frame_equal(run.frames.experts[measured], blind.experts[measured], check_exact=True)
    assert (run.frames.merges["measured_loss"] != blind.merges["measured_loss"]).all()
    predicted = {column for column in run.frames.merges.columns if column.startswith(("pred_", "cert_", "bound_"))}
    assert {"pred_secant", "pred_tangent_base", "cert_bracket", "bound_master_logs"} <= predicted


# --- drift -----------------------------------------------------------------------------------------------------------


def distance(first: State, second: State, names: Sequence[str]) -> float:
    return float(torch.cat([(first[n] - second[n]).double().reshape(-1) for n in names]).norm())


@pytest.mark.parametrize("heads", ["trained", "frozen", "shared"])
def test_drift_columns_are_those_of_the_kind_of_head(finished: Finished, heads: str) -> None:
    run = finished("vit", heads)
    base, prefix = run.state("base"), prefix_of("vit")
    head = [name for name in base if name.startswith(prefix)]
    body = [name for name in base if not name.startswith(prefix)]
    for row in run.frames.experts.to_dict("records"):
        state = run.state(row["expert"])
        merged = body + head if heads == "shared" else body
        assert row["drift"] == pytest.approx(distance(state, base, merged), rel=1e-5)
        assert 0 < row["drift"] <= row["drift_bound"] * (1 + 1e-5)
        if heads == "trained":
            assert row["head_drift"] == pytest.approx(distance(state, base, head), rel=1e-5)
            assert 0 < row["head_drift"] <= row["head_drift_bound"] * (1 + 1e-5)
        else:
            assert row["head_drift"] == 0
            assert row["head_drift_bound"] == 0
        if heads == "frozen":
            assert distance(state, base, head) == 0


@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
def test_the_logged_drift_bounds_everything_that_the_fine_tuning_moved(finished: Finished, architecture: str) -> None:
    """Theorem 3 (d) as the tables use it: also where running statistics are coordinates that no gradient moves."""
    table = finished(architecture).frames.experts
    assert (table["drift"] <= table["drift_bound"] * (1 + 1e-5)).all()


@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
def test_bounds_from_logs_are_above_those_from_checkpoints(finished: Finished, architecture: str) -> None:
    """Same L and training risks, larger drifts and V; DARE's V from logs is a mean over masks, so it is left out."""
    merges = finished(architecture).frames.merges
    merges = merges[merges["method"] != "dare"]
    assert (merges["bound_master_logs"] >= merges["bound_master_checkpoints"] * (1 - 1e-6)).all()
    assert (merges["bound_master_checkpoints"] >= merges["measured_loss"]).all()
    terms = merges[["term_training", "term_dispersion", "term_instability"]].sum(axis=1) ** 2
    np.testing.assert_allclose(terms, merges["bound_master_logs"], rtol=1e-9)


def test_reestimated_statistics_are_measured_for_batchnorm_only(finished: Finished) -> None:
    assert "reestimated_loss" not in finished("vit").frames.merges
    merges = finished("resnet_bn").frames.merges
    assert np.isfinite(merges["reestimated_loss"]).all()
    assert (merges["reestimated_loss"] - merges["measured_loss"]).abs().max() > 1e-3


def test_soups_of_one_task_use_one_head_for_the_whole_group(finished: Finished) -> None:
    run = finished("vit", "shared")
    for row in run.frames.merges.to_dict("records"):
        assert len(set(row["tasks"].split(";"))) == 1
    expected = run.spec.groups_per_size * len(run.spec.methods)
    assert len(run.frames.merges) == expected


# --- interruption ----------------------------------------------------------------------------------------------------


class Stop:
    """Progress that interrupts once a stage has come to the given count."""

    def __init__(self, stage: str, count: int) -> None:
        self.stage, self.count = f"mild: {stage}", count

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self.stage and done >= self.count:
            raise KeyboardInterrupt


STOPS = (("fine-tune", 2), ("merges", 1), ("merges", 3), ("optimal", 1))


def test_an_interrupted_run_continues_to_exactly_the_same_tables(finished: Finished, tmp_path: Path) -> None:
    run = finished("vit")
    for stage, count in STOPS:
        with pytest.raises(KeyboardInterrupt):
            run_architecture(run.spec, "vit", tmp_path, Stop(stage, count))
    stored = (tmp_path / "mild" / "merges.jsonl").read_bytes()
    continued = run_architecture(run.spec, "vit", tmp_path, silent)
    assert (tmp_path / "mild" / "merges.jsonl").read_bytes() == stored, "finished groups are not made again"
    check_same_tables(continued, run.frames)


def cut_last_line(path: Path) -> None:
    """As a crash in the middle of a write leaves it."""
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: (last + len(whole)) // 2])


def test_a_line_cut_short_is_made_again_and_the_rest_kept(finished: Finished, tmp_path: Path) -> None:
    run = finished("resnet_bn")
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    kept = {}
    for name in ("merges", "coefficients", "lines", "optimal"):
        path = tmp_path / "mild" / f"{name}.jsonl"
        kept[name] = path.read_bytes().splitlines()[:-1]
        cut_last_line(path)
    again = run_architecture(run.spec, "resnet_bn", tmp_path, silent)
    check_same_tables(again, run.frames)
    for name, lines in kept.items():
        now = (tmp_path / "mild" / f"{name}.jsonl").read_bytes().splitlines()
        assert now[:-1] == lines
        assert len(now) == len(lines) + 1


def test_a_finished_run_is_read_back_without_any_work(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("vit")
    for name in ("merge_rows", "sweep_rows", "line_rows", "optimal_rows"):
        monkeypatch.delattr(pipeline, name)
    check_same_tables(run_architecture(run.spec, "vit", run.folder, silent), run.frames)


def test_a_file_that_is_only_half_a_line_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "merges.jsonl"
    assert read_finished(path) == {}
    path.write_text('{"key": "0", "rows": [{"a"')
    assert read_finished(path) == {}
    path.write_text('{"key": "0", "rows": [{"a": 1}]}\n{"key": "1", "ro')
    assert read_finished(path) == {"0": [{"a": 1}]}
    assert path.read_text() == '{"key": "0", "rows": [{"a": 1}]}\n'


# --- diverged experts ------------------------------------------------------------------------------------------------


def with_rates(rates: dict[int, float]) -> Callable[..., tuple[PlannedExpert, ...]]:
    """Draw the pool, and give some experts another learning rate (and time to blow up)."""

    def draw(spec: ValidationSpec, regime: str) -> tuple[PlannedExpert, ...]:
        plans = list(draw_pool(spec, regime))
        for i, rate in rates.items():
            plans[i] = replace(plans[i], hyper=replace(plans[i].hyper, learning_rate=rate, steps=60))
        return tuple(plans)

    return draw


@pytest.mark.parametrize("architecture", ["resnet_bn"])
def test_groups_with_a_diverged_expert_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    spec = small(architecture).model_copy(update={"group_sizes": (2,), "groups_per_size": 2})
    members = draw_groups(spec, "mild", draw_pool(spec, "mild"))[0].members
    monkeypatch.setattr(pipeline, "draw_pool", with_rates({members[0]: 1e15}))
    for _ in range(2):  # also when read back from disk
        frames = run_architecture(spec, architecture, tmp_path, silent)
        assert np.flatnonzero(~frames.experts["finite"]).tolist() == [members[0]]
        diverged = frames.experts["expert"][members[0]]
        kept = frames.merges
        assert 0 < kept["group"].nunique() < 4
        assert not kept["experts"].str.contains(diverged, regex=False).any()
        predicted = kept[[c for c in kept.columns if c.startswith(("pred_", "measured_"))]]
        assert np.isfinite(predicted.to_numpy(dtype=float)).all()


def test_a_regime_in_which_every_expert_diverges_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("resnet_gn")
    monkeypatch.setattr(pipeline, "draw_pool", with_rates({i: 1e15 for i in range(6)}))
    with pytest.raises(MergeboundError, match=r"regimes\.mild: every group .*lower learning_rate"):
        run_architecture(spec, "resnet_gn", tmp_path, silent)


# --- small parts -----------------------------------------------------------------------------------------------------


def test_spread_is_even_over_sizes_and_halves_and_nested() -> None:
    spec = load_spec("digits8")
    groups = draw_groups(spec, "mild", draw_pool(spec, "mild"))
    chosen = spread(groups, 16)
    cells = pd.Series([(len(g.members), g.half) for g in chosen]).value_counts()
    assert len(cells) == 8
    assert set(cells) == {2}
    assert [g.number for g in chosen] == sorted(g.number for g in chosen)
    assert {g.number for g in spread(groups, 8)} < {g.number for g in chosen}
    assert spread(groups, 10**6) == list(groups)
    assert spread(groups, 0) == []


def test_line_pairs_are_distinct_pairs_of_group_members() -> None:
    groups = [PlannedGroup(0, "A", (0, 2)), PlannedGroup(1, "A", (0, 2, 4)), PlannedGroup(2, "B", (1, 3))]
    assert line_pairs(groups, 5) == [(0, 2), (1, 3)]
    assert line_pairs(groups, 1) == [(0, 2)]


def test_joined_tables_keep_every_row(finished: Finished) -> None:
    first, second = finished("vit").frames, finished("resnet_bn").frames
    joined = join_frames([first, second])
    for name in TABLES:
        assert len(getattr(joined, name)) == len(getattr(first, name)) + len(getattr(second, name))
        assert set(getattr(joined, name)["architecture"]) == {"vit", "resnet_bn"}
