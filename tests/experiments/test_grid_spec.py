"""Grids: what a specification expands to, against literal products, scipy's Sobol points and arithmetic by hand."""

from __future__ import annotations

import itertools
import math
import random
from decimal import Decimal

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.grid.axes import HYPERPARAMETERS, at, points, read_axis, stream
from experiments.grid.errors import GridError
from experiments.grid.expand import count, expand, expansion, laid
from experiments.grid.expressions import parse
from experiments.grid.run_spec import RunSpec
from experiments.grid.spec import GridSpec
from experiments.grid.yaml_source import grid_presets, parse_grid, read_grid

BASE = {"kind": "random", "architecture": "vit", "classes": 10}
PLAIN = {"name": "g", "tasks": ["digits8"], "base": BASE, "learning_rate": 0.1, "steps": 10, "batch_size": 8}

rates = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=3, unique=True)
batches = st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True)
shares = st.lists(st.sampled_from([0.25, 0.5, 0.8, 1.0]), min_size=1, max_size=3, unique=True)
tasks = st.lists(st.sampled_from(["digits8:flip", "digits8:roll", "npz8:mnist"]), min_size=1, max_size=3, unique=True)
bases = st.lists(st.sampled_from(["vit", "resnet_gn", "resnet_bn"]), min_size=1, max_size=2, unique=True)


def grid(**changes: object) -> GridSpec:
    return GridSpec.model_validate({**PLAIN, **changes})


@settings(max_examples=15, deadline=None)
@given(rates, batches, shares, tasks, bases, st.integers(1, 3))
def test_a_product_is_the_literal_product_in_the_stated_order(
    rate: list[float], batch: list[int], share: list[float], names: list[str], nets: list[str], seeds: int
) -> None:
    spec = grid(
        learning_rate=rate,
        batch_size=batch,
        data_share=share,
        tasks=names,
        base={**BASE, "architecture": nets},
        seeds=seeds,
    )
    wanted = list(itertools.product(nets, names, rate, batch, share, range(seeds)))
    runs = expand(spec)
    found = [(r.architecture, r.task, r.learning_rate, r.batch_size, r.data_share, r.seed) for r in runs]
    assert found == wanted
    assert count(spec) == len(wanted)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), rates, st.data())
def test_tied_axes_go_together_and_the_rest_is_multiplied(n: int, rate: list[float], data: st.DataObject) -> None:
    batch = data.draw(st.lists(st.integers(1, 64), min_size=n, max_size=n, unique=True))
    steps = data.draw(st.lists(st.integers(1, 64), min_size=n, max_size=n, unique=True))
    spec = grid(learning_rate=rate, batch_size=batch, steps=steps, tie=["batch_size", "steps"])
    wanted = {(t, r, s, b) for t in range(8) for r in rate for s, b in zip(steps, batch, strict=True)}
    runs = expand(spec)
    names = list(dict.fromkeys(run.task for run in runs))
    assert {(names.index(r.task), r.learning_rate, r.steps, r.batch_size) for r in runs} == wanted
    assert count(spec) == len(runs) == 8 * len(rate) * n


@settings(max_examples=15, deadline=None)
@given(rates, st.lists(st.floats(0.0, 0.9), min_size=1, max_size=3, unique=True), batches, st.booleans())
def test_conditional_axes_replace_those_of_the_grid(
    rate: list[float], momenta: list[float], batch: list[int], tied: bool
) -> None:
    spec = grid(
        tasks=["digits8:flip"],
        optimizer=["sgd", "adamw"],
        learning_rate=0.5,
        batch_size=batch,
        when=[
            {"match": {"optimizer": "adamw"}, "set": {"learning_rate": rate}},
            {"match": {"optimizer": "sgd", "task": "digits8"}, "set": {"momentum": momenta}},
        ],
    )
    wanted = {("adamw", r, 0.0, b) for r in rate for b in batch} | {("sgd", 0.5, m, b) for m in momenta for b in batch}
    runs = expand(spec)
    assert {(r.optimizer, r.learning_rate, r.momentum, r.batch_size) for r in runs} == wanted
    assert count(spec) == len(runs) == len(wanted)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5))
def test_sobol_points_are_scipys(n: int, seed: int) -> None:
    from scipy.stats import qmc

    axes = {
        "momentum": {"uniform": {"low": 0.1, "high": 0.9}},
        "learning_rate": {"log_uniform": {"low": 1e-4, "high": 1e-1}},
        "batch_size": [4, 8, 16],
        "steps": {"uniform": {"low": 5, "high": 9}},
    }
    spec = GridSpec.model_validate(
        {
            "name": "g",
            "tasks": ["digits8:flip"],
            "base": BASE,
            "draw_seed": seed,
            "sobol": {"count": n, "axes": axes},
        }
    )
    power = 1 << max(0, (n - 1).bit_length())
    engine = qmc.Sobol(4, scramble=True, rng=np.random.default_rng([seed, 0x6A1D, *b"sobol 0"]))
    u = engine.random(power)[:n]  # coordinates: learning_rate, steps, batch_size, momentum (the order of a run)
    runs = expand(spec)
    assert len(runs) == n == count(spec)
    np.testing.assert_allclose([r.learning_rate for r in runs], 1e-4 * 1000.0 ** u[:, 0], rtol=1e-12)
    assert [r.steps for r in runs] == [5 + math.floor(5 * x) for x in u[:, 1]]
    assert [r.batch_size for r in runs] == [(4, 8, 16)[math.floor(3 * x)] for x in u[:, 2]]
    np.testing.assert_allclose([r.momentum for r in runs], 0.1 + 0.8 * u[:, 3], rtol=1e-12)


@pytest.mark.parametrize("kind", ["sobol", "random"])
def test_smaller_designs_are_the_beginning_of_larger_ones(kind: str) -> None:
    axes = {"learning_rate": {"log_uniform": {"low": 1e-3, "high": 1.0}}, "batch_size": [1, 2, 3]}
    rest = {"name": "g", "tasks": ["digits8:flip"], "base": BASE, "steps": 5}
    small, large = (expand(GridSpec.model_validate({**rest, kind: {"count": n, "axes": axes}})) for n in (5, 12))
    assert large[:5] == small


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 30), st.integers(0, 3), st.sampled_from(["uniform", "log_uniform"]))
def test_drawn_axes_are_nested_within_their_range_and_named_by_the_seed(n: int, seed: int, kind: str) -> None:
    axes = [read_axis("learning_rate", {kind: {"low": 0.01, "high": 0.3, "samples": k}}) for k in (n, n + 7)]
    small, large = (points("learning_rate", axis, seed) for axis in axes)
    assert large[:n] == small
    assert all(0.01 <= value <= 0.3 for value in large)
    assert points("learning_rate", axes[1], seed + 1) != large
    u = stream(seed, "learning_rate").random(n)
    wanted = 0.01 * 30.0**u if kind == "log_uniform" else 0.01 + 0.29 * u
    np.testing.assert_allclose(small, wanted, rtol=1e-12)


def test_whole_numbers_are_drawn_uniformly() -> None:
    axis = read_axis("batch_size", {"uniform": {"low": 3, "high": 6, "samples": 4}})
    assert [at("batch_size", axis, u) for u in (0.0, 0.2499, 0.25, 0.5, 0.75, 0.999999)] == [3, 3, 4, 5, 6, 6]
    logarithmic = read_axis("steps", {"log_uniform": {"low": 1, "high": 7, "samples": 4}})
    assert [at("steps", logarithmic, u) for u in (0.0, 0.34, 0.67, 0.999)] == [1, 2, 4, 7]  # cuts of [1, 8) by octave


@settings(max_examples=20, deadline=None)
@given(st.integers(-3, 0), st.integers(1, 9), st.integers(0, 30))
def test_ranges_count_in_decimals_and_include_both_ends(exponent: int, step: int, n: int) -> None:
    unit = Decimal(10) ** exponent
    low, stride = Decimal(1), step * unit
    high = low + n * stride
    axis = read_axis("weight_decay", {"from": float(low), "to": float(high), "step": float(stride)})
    wanted = [float(low + k * stride) for k in range(n + 1)]
    assert list(points("weight_decay", axis, 0)) == wanted


def test_the_order_of_keys_in_the_file_does_not_matter() -> None:
    content = yaml.safe_load(read_grid("digits-full").text)
    wanted = expand(read_grid("digits-full").spec)
    for seed in range(2):
        keys = list(content)
        random.Random(seed).shuffle(keys)
        axes = list(content["sobol"]["axes"])
        random.Random(seed + 10).shuffle(axes)
        joint = {"axes": {name: content["sobol"]["axes"][name] for name in axes}, "count": 64}
        mixed = {key: joint if key == "sobol" else content[key] for key in keys}
        other = parse_grid(yaml.safe_dump(mixed, sort_keys=False)).spec
        assert expand(other) == wanted
        assert other.digest() == read_grid("digits-full").spec.digest()


def test_order_says_what_varies_slowest() -> None:
    spec = grid(tasks=["digits8:flip", "digits8:roll"], batch_size=[4, 8], seeds=2, order=["seed", "batch_size"])
    found = [(r.seed, r.batch_size, r.task[8:]) for r in expand(spec)]
    assert found == list(itertools.product([0, 1], [4, 8], ["flip", "roll"]))


def test_linear_scaling_and_whole_numbers_by_expression() -> None:
    spec = grid(
        tasks=["digits8:flip"],
        learning_rate="0.1 * batch_size / 256",
        batch_size=[64, 128],
        steps="min(100, 6400 // batch_size)",
        warm_up="0.1 * steps",
        schedule="cosine",
    )
    found = [(r.learning_rate, r.batch_size, r.steps, r.warm_up) for r in expand(spec)]
    assert found == [(0.1 * 64 / 256, 64, 100, 10), (0.1 * 128 / 256, 128, 50, 5)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from("+-*/"), st.sampled_from("+-*/"))
def test_expressions_are_pythons_arithmetic(a: int, b: int, first: str, second: str) -> None:
    text = f"-({a} {first} batch_size) {second} {b} ** 0.5"
    wanted = eval(text, {"batch_size": 7.5})
    assert parse(text, ("batch_size",)).value({"batch_size": 7.5}) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "batch_size.real", "[1][0]", "lambda: 1", "1 if 1 else 2", "'a' * 9", "open(1)", "1 < 2", "x"],
)
def test_expressions_are_arithmetic_and_nothing_else(text: str) -> None:
    with pytest.raises(GridError):
        parse(text, ("batch_size",))


def test_expressions_end_quickly_and_without_overflow() -> None:
    with pytest.raises(GridError, match="no value"):
        parse("9 ** 9 ** 9 ** 9", ()).value({})
    with pytest.raises(GridError, match="no value"):
        parse("1 / (batch_size - batch_size)", ("batch_size",)).value({"batch_size": 2})


def test_overrides_come_last_and_may_merge_runs() -> None:
    spec = grid(
        tasks=["digits8:flip", "digits8:roll"],
        learning_rate=[0.1, 0.2],
        seeds=2,
        overrides=[
            {"match": {"task": "digits8:roll"}, "set": {"learning_rate": 0.5}},
            {"match": {"task": "digits8:roll", "seed": 1}, "set": {"steps": 4, "checkpoints": [2]}},
        ],
    )
    found = expansion(spec)
    assert {(r.task[8:], r.learning_rate, r.seed, r.steps, r.checkpoints) for r in found.runs} == {
        ("flip", 0.1, 0, 10, (10,)),
        ("flip", 0.1, 1, 10, (10,)),
        ("flip", 0.2, 0, 10, (10,)),
        ("flip", 0.2, 1, 10, (10,)),
        ("roll", 0.5, 0, 10, (10,)),
        ("roll", 0.5, 1, 4, (2, 4)),
    }
    assert found.notes == ("2 of 8 combinations became the same as others and are merged",)


def test_excluded_runs_are_left_out() -> None:
    spec = grid(tasks=["digits8"], batch_size=[4, 8, 16], exclude=[{"task": "digits8:flip"}, {"batch_size": [4, 8]}])
    runs = expand(spec)
    assert {run.batch_size for run in runs} == {16}
    assert len(runs) == 7


def test_checkpoints_are_laid_up_to_the_last_step() -> None:
    spec = grid(tasks=["digits8:flip"], steps=[10, 20, 25], checkpoints={"every": 10})
    assert [r.checkpoints for r in expand(spec)] == [(10,), (10, 20), (10, 20, 25)]
    assert laid((3, 7), 5) == (3, 5)
    assert laid(None, 5) == (5,)


def test_runs_are_counted_without_being_made() -> None:
    wide = {"from": 1, "to": 10**6, "step": 1}
    with pytest.raises(GridError, match=r"1,000,000,000,000 runs") as caught:
        count(grid(tasks=["digits8:flip"], steps=wide, batch_size=wide))
    assert "steps 1,000,000" in str(caught.value)
    assert "batch_size 1,000,000" in str(caught.value)
    with pytest.raises(GridError, match="most_runs"):
        count(grid(tasks=["digits8:flip"], seeds=10**12))
    when = [{"match": {"optimizer": "sgd"}, "set": {"steps": wide, "batch_size": wide}}]
    with pytest.raises(GridError, match="most_runs"):
        count(grid(tasks=["digits8:flip"], when=when))
    assert count(grid(tasks=["digits8:flip"], seeds=1000, most_runs=1000)) == 1000


def test_draws_of_whole_numbers_that_coincide_are_noted() -> None:
    few, when = {"uniform": {"low": 1, "high": 3, "samples": 20}}, {"match": {"optimizer": "sgd"}}
    axes = {"momentum": [0.1, 0.2]}
    found = expansion(grid(tasks=["digits8:flip"], batch_size=few, sobol=[{"count": 8, "axes": axes}]))
    assert len(found.runs) == 6
    assert found.notes[0].startswith("batch_size: of 20 values that were drawn 3 are different; ")
    assert found.notes[1].startswith("sobol[0]: of 8 values that were drawn 2 are different")
    changed = [{**when, "set": {"batch_size": few}}]
    assert expansion(grid(tasks=["digits8:flip"], when=changed)).notes[0].startswith("when[0].set.batch_size: of 20")
    enough = {"uniform": {"low": 1, "high": 10**6, "samples": 3}}
    assert expansion(grid(tasks=["digits8:flip"], batch_size=enough)).notes == ()


def test_a_specification_survives_json() -> None:
    import json

    for name in ("digits-full", "local-npz"):
        spec = read_grid(name).spec
        again = GridSpec.model_validate(json.loads(json.dumps(spec.content())))
        assert again.digest() == spec.digest()
        assert expand(again) == expand(spec)


def test_every_hyperparameter_of_a_run_is_an_entry_of_a_grid() -> None:
    assert set(HYPERPARAMETERS) <= set(GridSpec.model_fields)
    assert set(RunSpec.model_fields) - set(HYPERPARAMETERS) == {"task", "base", "checkpoints"}
    defaults = expand(grid(tasks=["digits8:flip"]))[0]
    literal = RunSpec(task="digits8:flip", base=BASE, learning_rate=0.1, steps=10, batch_size=8)  # type: ignore[arg-type]
    assert defaults == literal


PAPER = {
    "paper-resnet": (3 * 20 * 27, 6480),
    "paper-vit": (3 * 8 * 27, 2592),
    "digits-small": (1000, 1000),
    "digits-full": (2048, 3680),
    "digits8-independent": (48, 48),
    "local-npz": (288, 1152),
    "one-gpu-30min": (432, 1728),
    "npz8-mild": (56, 56),
    "npz8-harsh": (56, 56),
}


def test_presets_have_their_exact_sizes() -> None:
    assert set(grid_presets()) == set(PAPER)
    for name, (runs, checkpoints) in PAPER.items():
        found = expand(read_grid(name).spec)
        assert (len(found), sum(len(run.checkpoints) for run in found)) == (runs, checkpoints), name
        assert read_grid(name).text.startswith(f"# {name}: "), "says what it is"
        assert f"{runs:,}" in read_grid(name).text, "says how large it is"


def test_the_paper_grid_is_the_protocols() -> None:
    """Protocol A, written out as loops."""
    from experiments.tasks.catalogue import vision

    wanted = [
        (net, task.name, lr, batch, share)
        for net in ("resnet18.tv_in1k", "resnet50.tv_in1k", "resnet152.tv_in1k")
        for task in vision(20)
        for lr in (0.01, 0.005, 0.001)
        for batch in (64, 128, 256)
        for share in (0.5, 0.8, 1.0)
    ]
    runs = expand(read_grid("paper-resnet").spec)
    assert [(r.architecture, r.task, r.learning_rate, r.batch_size, r.data_share) for r in runs] == wanted
    rest = {
        (r.steps, r.checkpoints, r.momentum, r.weight_decay, r.schedule, r.optimizer, r.seed, r.trained) for r in runs
    }
    assert rest == {(4000, (1000, 2000, 3000, 4000), 0.9, 1e-4, "constant", "sgd", 0, "full")}
