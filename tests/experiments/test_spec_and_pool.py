"""The specification of a validation run: what is refused, and what is drawn from it."""

from __future__ import annotations

import copy
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments.pool import draw_groups, draw_pool
from experiments.spec import ValidationSpec, load_spec, presets
from theory.errors import MergeboundError


def content(preset: str = "digits8-smoke") -> dict[str, Any]:
    text = resources.files("experiments.presets").joinpath(f"{preset}.yaml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def changed(place: str, value: object, preset: str = "digits8-smoke") -> dict[str, Any]:
    """The preset with one entry set, e.g. ``family.test``."""
    spec = copy.deepcopy(content(preset))
    *path, last = place.split(".")
    node = spec
    for key in path:
        node = node.setdefault(key, {})
    node[last] = value
    return spec


def read(folder: Path, spec: object) -> ValidationSpec:
    path = folder / "own.yaml"
    path.write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec))
    return load_spec(path)


def refusal(folder: Path, spec: object) -> str:
    """The message: one line, which names the file."""
    with pytest.raises(MergeboundError) as caught:
        read(folder, spec)
    message = str(caught.value)
    assert "own.yaml" in message
    assert "\n" not in message
    assert len(message) < 500
    return message


# --- reading ---------------------------------------------------------------------------------------------------------


def test_every_preset_loads_and_carries_its_own_name() -> None:
    assert {"digits8", "digits8-full", "digits8-smoke", "digits8-weak-base"} <= set(presets())
    for preset in presets():
        assert load_spec(preset).name == preset


def test_presets_that_claim_results_judge_both_regimes_on_both_architectures() -> None:
    for preset in ("digits8", "digits8-full", "digits8-weak-base"):
        spec = load_spec(preset)
        assert set(spec.regimes) == {"mild", "harsh"}
        assert {"vit", "resnet_gn"} <= set(spec.architectures)
        assert len(draw_pool(spec, "mild")) == 48
        assert len(draw_groups(spec, "mild", draw_pool(spec, "mild"))) == 96
        assert {method.name for method in spec.methods} == {"average", "task_arithmetic", "ties", "dare"}


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("colour", "red", ["colour"]),
        ("family.colour", "red", ["family.colour"]),
        ("regimes.mild.colour", 1, ["regimes.mild.colour"]),
        ("regimes.mild.learning_rate", [0.03, 0.01], ["regimes.mild", "learning_rate", "upside down"]),
        ("regimes.mild.steps", [15, 5], ["regimes.mild", "steps", "upside down"]),
        ("regimes.mild.learning_rate", [-0.01, 0.03], ["regimes.mild.learning_rate"]),
        ("regimes.mild.momentum", [0.0, 1.0], ["regimes.mild.momentum"]),
        ("regimes.mild.weight_decay", [-0.1], ["regimes.mild.weight_decay"]),
        ("regimes.mild.data_share", [0.5, 1.5], ["regimes.mild.data_share"]),
        ("regimes.mild.batch_size", [8, 21], ["regimes.mild.batch_size", "21", "20 images", "train_per_task"]),
        ("family.train_per_task", 0, ["family.train_per_task"]),
        ("group_sizes", [2, 9], ["group_sizes", "9", "8"]),
        ("group_sizes", [1], ["group_sizes"]),
        ("family.tasks", ["identity", "flip"], ["group_sizes", "3", "2"]),
        ("heads", "shared", ["group_sizes", "experts_per_task"]),
        ("heads", "none", ["heads"]),
        ("architectures", ["vgg"], ["architectures"]),
        ("seed", "seven", ["seed"]),
    ],
)
def test_entries_that_cannot_work_are_refused_with_their_place(
    tmp_path: Path, place: str, value: object, words: list[str]
) -> None:
    message = refusal(tmp_path, changed(place, value))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("place", "empty"),
    [("regimes", {}), ("methods", []), ("architectures", []), ("group_sizes", []), ("regimes.mild.batch_size", [])],
)
def test_empty_lists_are_refused_with_their_place(tmp_path: Path, place: str, empty: object) -> None:
    assert place.rpartition(".")[2] in refusal(tmp_path, changed(place, empty))


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        ("methods", [{"name": "avrage"}], "avrage"),
        ("methods", [{"name": "ties", "settings": {"density": 2.0}}], "density"),
        ("family.tasks", ["identity", "flip", "sideways"], "sideways"),
        ("family.tasks", ["identity", "flip", "flip"], "flip"),
        ("family.pretraining", 1700, "pretraining"),
    ],
)
def test_what_would_fail_hours_later_is_refused_at_once(tmp_path: Path, place: str, value: object, word: str) -> None:
    assert word in refusal(tmp_path, changed(place, value))


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words", "name: [unclosed", "a: b: c"])
def test_files_that_hold_no_spec_are_refused(tmp_path: Path, text: str) -> None:
    refusal(tmp_path, text)


def test_missing_sources_are_refused_with_the_presets_listed(tmp_path: Path) -> None:
    for source in ("digits9", tmp_path / "absent.yaml"):
        with pytest.raises(MergeboundError, match=r"digits8-smoke"):
            load_spec(source)


def test_a_large_batch_fits_when_tasks_share_their_images(tmp_path: Path) -> None:
    spec = changed("regimes.mild.batch_size", [64])
    spec["family"]["share_images"] = True
    assert read(tmp_path, spec).regimes["mild"].batch_size == (64,)


# --- the digest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("name", "other"),
        ("seed", 2),
        ("architectures", ["vit"]),
        ("heads", "frozen"),
        ("family.tasks", ["identity", "flip", "roll"]),
        ("family.share_images", True),
        ("family.train_per_task", 41),
        ("family.pretraining", 301),
        ("family.calibration", 65),
        ("family.calibration_per_task", 33),
        ("family.test", 101),
        ("base.steps", 41),
        ("base.learning_rate", 0.006),
        ("base.batch_size", 65),
        ("base.turns", 0.5),
        ("regimes.mild.learning_rate", [0.01, 0.04]),
        ("regimes.mild.steps", [5, 16]),
        ("regimes.mild.batch_size", [8, 15]),
        ("regimes.mild.data_share", [0.5, 0.9]),
        ("regimes.mild.momentum", [0.0, 0.4]),
        ("regimes.mild.weight_decay", [0.0, 0.002]),
        ("experts_per_task", 3),
        ("group_sizes", [2, 4]),
        ("groups_per_size", 5),
        ("methods", [{"name": "average"}]),
        ("methods", [{"name": "task_arithmetic", "settings": {"coefficient": 0.4}}]),
        ("sweep_groups", 3),
        ("sweep_values", [0.0, 0.3]),
        ("lines", 2),
        ("optimal_groups", 3),
    ],
)
def test_the_digest_changes_with_every_field(place: str, value: object) -> None:
    before = ValidationSpec.model_validate(content())
    after = ValidationSpec.model_validate(changed(place, value))
    assert before.digest() != after.digest()
    assert before.digest() == ValidationSpec.model_validate(content()).digest()
    assert len(before.digest()) == 12


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["digits8", "digits8-smoke"])
def test_experts_cover_tasks_and_halves_evenly_within_the_regimes_ranges(preset: str) -> None:
    spec = load_spec(preset)
    for name, regime in spec.regimes.items():
        pool = draw_pool(spec, name)
        per_cell = Counter((expert.task, expert.half) for expert in pool)
        assert set(per_cell) == {(task, half) for task in spec.family.tasks for half in "AB"}
        assert set(per_cell.values()) == {spec.experts_per_task // 2}
        assert len({expert.name for expert in pool}) == len(pool)
        assert len({expert.seed for expert in pool}) == len(pool)
        for expert in pool:
            hyper = expert.hyper
            low, high = regime.learning_rate
            assert low * (1 - 1e-3) <= hyper.learning_rate <= high * (1 + 1e-3)
            assert regime.steps[0] <= hyper.steps <= regime.steps[1]
            for field in ("batch_size", "data_share", "momentum", "weight_decay"):
                assert getattr(hyper, field) in getattr(regime, field)


def test_experts_are_heterogeneous_and_learning_rates_log_uniform() -> None:
    spec = load_spec("digits8").model_copy(update={"experts_per_task": 100})
    regime = spec.regimes["harsh"]
    hypers = [expert.hyper for expert in draw_pool(spec, "harsh")]
    for field in ("batch_size", "data_share", "momentum", "weight_decay"):
        counts = Counter(getattr(hyper, field) for hyper in hypers)
        assert set(counts) == set(getattr(regime, field))
        assert min(counts.values()) > 0.25 * len(hypers)
    for field in ("learning_rate", "steps"):
        low, high = np.log(getattr(regime, field))
        place = (np.log([getattr(hyper, field) for hyper in hypers]) - low) / (high - low)
        deciles = np.histogram(place, bins=10, range=(-0.01, 1.01))[0]
        assert deciles.min() > 0.05 * len(hypers)


@pytest.mark.parametrize("preset", ["digits8", "digits8-smoke"])
def test_groups_lie_in_one_half_with_distinct_tasks_and_the_sizes_asked_for(preset: str) -> None:
    spec = load_spec(preset)
    for regime in spec.regimes:
        pool = draw_pool(spec, regime)
        groups = draw_groups(spec, regime, pool)
        assert [group.number for group in groups] == list(range(len(groups)))
        cells = Counter((len(group.members), group.half) for group in groups)
        assert cells == {(size, half): spec.groups_per_size // 2 for size in spec.group_sizes for half in "AB"}
        for group in groups:
            assert {pool[i].half for i in group.members} == {group.half}
            assert len({pool[i].task for i in group.members}) == len(group.members)


def test_soups_are_distinct_experts_of_one_task_and_one_half() -> None:
    spec = ValidationSpec.model_validate({**content(), "heads": "shared", "experts_per_task": 6})
    pool = draw_pool(spec, "mild")
    groups = draw_groups(spec, "mild", pool)
    for group in groups:
        assert len({pool[i].task for i in group.members}) == 1
        assert {pool[i].half for i in group.members} == {group.half}
        assert len(set(group.members)) == len(group.members)
    assert len({pool[group.members[0]].task for group in groups}) > 1


def test_draws_are_reproducible_and_depend_on_seed_and_regime() -> None:
    spec = load_spec("digits8")
    other = spec.model_copy(update={"seed": spec.seed + 1})
    pool = draw_pool(spec, "mild")
    assert pool == draw_pool(spec, "mild")
    assert draw_groups(spec, "mild", pool) == draw_groups(spec, "mild", pool)
    assert [e.seed for e in pool] != [e.seed for e in draw_pool(other, "mild")]
    assert [e.seed for e in pool] != [e.seed for e in draw_pool(spec, "harsh")]
    members = [group.members for group in draw_groups(spec, "mild", pool)]
    assert members != [group.members for group in draw_groups(other, "mild", draw_pool(other, "mild"))]


def test_a_regime_draws_the_same_experts_whatever_its_place_in_the_file() -> None:
    spec = load_spec("digits8")
    turned = spec.model_copy(update={"regimes": dict(reversed(spec.regimes.items()))})
    assert draw_pool(spec, "harsh") == draw_pool(turned, "harsh")
