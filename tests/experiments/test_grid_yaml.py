"""Bad grids: each is refused with file, line, place and remedy, before anything runs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.grid.errors import GridError, dotted
from experiments.grid.preflight import check_grid
from experiments.grid.yaml_source import parse_grid, read_grid, read_runs

GOOD = """\
name: mine
tasks: [digits8]
base: {kind: random, architecture: vit, classes: 10}
learning_rate: 0.1
batch_size: 8
steps: 10
"""

# what to write instead of, or after, the good file's lines; the line of the complaint; its place; what it says
BAD = {
    "unknown key": ("learning_rat: 0.2", 7, "learning_rat", "did you mean 'learning_rate'"),
    "unknown key within": ("when:\n  - match: {seed: 0}\n    sett: {momentum: 0.1}", 9, "when[0].sett", "'set'"),
    "unknown hyperparameter": (
        "overrides:\n  - match: {seed: 0}\n    set:\n      momentun: 0.1",
        10,
        "overrides[0].set.momentun",
        "'momentum'",
    ),
    "unknown field of a base": ("4:base:\n  kind: random\n  architektur: vit", 5, "base.architektur", "'architecture'"),
    "base without classes": ("3:base: {kind: random, architecture: vit}", 3, "base", "classes"),
    "weights of a random base": (
        "3:base:\n  kind: random\n  classes: 10\n  architecture: vit\n  weights: a.pt",
        7,
        "base.weights",
        "leave it out",
    ),
    "bool for a number": ("4:learning_rate: yes", 4, "learning_rate", "not a number"),
    "text for a number": ("4:learning_rate: fast", 4, "learning_rate", "reads 'fast'"),
    "fraction of a step": ("6:steps: 10.5", 6, "steps", "give a whole number, such as 10"),
    "bool for a whole number": ("6:steps: true", 6, "steps", "give a whole number, such as 100"),
    "outside the domain": ("momentum:\n  - 0.5\n  - 1.0", 9, "momentum[1]", "less than 1"),
    "unknown choice": ("optimizer: [sgd, adamm]", 7, "optimizer[1]", "'adam"),
    "unknown augmentation": ("augment: lite", 7, "augment", "'light'"),
    "empty axis": ("4:learning_rate: []", 4, "learning_rate", "no runs"),
    "empty base axis": ("3:base: {kind: random, architecture: [], classes: 10}", 3, "base.architecture", "no runs"),
    "no tasks": ("2:tasks: []", 2, "tasks", "no runs"),
    "no seeds": ("seeds: []", 7, "seeds", "no runs"),
    "no checkpoints": ("checkpoints: []", 7, "checkpoints", "leave it out"),
    "repeated value": ("momentum: [0.1, 0.2, 0.1]", 7, "momentum[2]", "twice"),
    "task twice": ("2:tasks: [npz8, npz8:mnist]", 2, "tasks", "twice"),
    "unknown task of a family": ("2:tasks:\n- npz8:mnist\n- npz8:emnist", 4, "tasks[1]", "no task 'emnist'"),
    "empty range": ("6:steps: {from: 20, to: 10, step: 2}", 6, "steps.from", "above"),
    "range without step": ("6:steps: {from: 20, to: 30}", 6, "steps", "step is missing"),
    "fractional step of a range": ("6:steps: {from: 20, to: 30, step: 0.5}", 6, "steps.step", "whole"),
    "upside down": ("weight_decay: {uniform: {low: 1, high: 0, samples: 2}}", 7, "weight_decay.uniform.low", "smaller"),
    "logarithm of zero": (
        "weight_decay: {log_uniform: {low: 0, high: 1, samples: 2}}",
        7,
        "weight_decay.log_uniform.low",
        "above 0",
    ),
    "no samples": ("weight_decay: {uniform: {low: 0, high: 1}}", 7, "weight_decay.uniform", "samples is missing"),
    "unknown scale": ("weight_decay: {log_unifrom: {low: 0.1, high: 1}}", 7, "weight_decay.log_unifrom", "log_uniform"),
    "domain of a range": ("momentum: {uniform: {low: 0, high: 1, samples: 3}}", 7, "momentum.uniform.high", "less"),
    "10^12 runs": ("seeds: 1000000000000", 7, "seeds", "8,000,000,000,000 runs"),
    "10^12 points": (
        "sobol:\n  count: 1000000000000\n  axes:\n    momentum: {uniform: {low: 0, high: 0.9}}",
        8,
        "sobol.count",
        "lower count",
    ),
    "warm-up as long as the run": ("warm_up: 10", 7, "warm_up", "leaves none of the 10 steps"),
    "warm-up by an override": (
        "overrides:\n- match: {task: digits8:flip}\n  set:\n    warm_up: 12",
        10,
        "overrides[0].set.warm_up",
        "12",
    ),
    "nesterov without momentum": ("nesterov: true", 7, "nesterov", "momentum above 0"),
    "rank without low_rank": ("rank: 2", 7, "rank", "low_rank"),
    "unknown name in an expression": ("4:learning_rate: 0.1 * batchsize", 4, "learning_rate", "'batch_size'"),
    "expressions in a circle": (
        "4:learning_rate: weight_decay\nweight_decay: learning_rate",
        4,
        "learning_rate",
        "circle",
    ),
    "negative by expression": ("4:learning_rate: batch_size - 8", 4, "learning_rate", "greater than 0"),
    "uneven tie": ("seeds: 3\nmomentum: [0.1, 0.2]\ntie: [seed, momentum]", 9, "tie", "seed has 3"),
    "tie of nothing": ("tie: [steps, momentum]", 7, "tie[1]", "momentum has no values"),
    "drawn and listed": (
        "sobol:\n  count: 4\n  axes:\n    learning_rate: {uniform: {low: 0.1, high: 1}}",
        10,
        "sobol.axes.learning_rate",
        "give it once",
    ),
    "seed and seeds": ("seed: 0\nseeds: 2", 8, "seeds", "one of the two"),
    "match of a task that is not there": (
        "exclude:\n  - {task: digits8:flipp}",
        8,
        "exclude[0].task",
        "'digits8:flip'",
    ),
    "override of nothing": ("overrides:\n  - match: {seed: 3}\n    set: {steps: 5}", 8, "overrides[0]", "no run"),
    "everything excluded": ("exclude:\n  - {seed: 0}", 7, "exclude", "every run"),
    "checkpoints out of order": ("checkpoints: [5, 3]", 7, "checkpoints[1]", "after"),
    "wrong kind of checkpoints": ("checkpoints: {evry: 5}", 7, "checkpoints.evry", "{every: 1000}"),
    "needed value missing": ("6:# steps: 10", 1, "", "steps is missing"),
    "duplicate key": ("steps: 12", 7, "steps", "twice, first on line 6"),
    "duplicate key within": ("seeds: 1\nsobol: {count: 2, count: 3}", 8, "sobol.count", "twice"),
    "tab": ("when:\n\t- match: {seed: 0}", 8, "", "tab"),
    "open bracket": ("momentum: [0.1, 0.2", 8, "", "brackets"),
    "an alias of itself": ("exclude: &a [*a]", 7, "exclude[0]", "alias"),
    "a python object": ("momentum: !!python/object/apply:os.getcwd []", 7, "", "constructor"),
}


def bad_text(change: str) -> str:
    lines = GOOD.splitlines()
    number, colon, rest = change.partition(":")
    if colon and number.isdigit():
        lines[int(number) - 1 : int(number)] = rest.splitlines()
        return "\n".join(lines) + "\n"
    return GOOD + change + "\n"


@pytest.mark.parametrize("case", BAD)
def test_bad_grids_are_refused_with_line_place_and_remedy(case: str) -> None:
    change, line, place, said = BAD[case]
    if case == "unknown field of a base":
        change = "3:" + change.partition(":")[2]
    with pytest.raises(GridError) as caught:
        read_runs(parse_grid(bad_text(change), "mine.yaml"))
    message = str(caught.value)
    assert "\n" not in message
    assert (caught.value.line, dotted(caught.value.place)) == (line, place), message
    assert said in message
    assert message.startswith(f"mine.yaml, line {line}: {place}")


def test_the_good_grid_is_good() -> None:
    assert len(read_runs(parse_grid(GOOD)).runs) == 8
    assert check_grid(parse_grid(GOOD)) == []


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), ("- a\n- b\n", "not a mapping"), ("grid", "not a mapping")]
)
def test_files_that_are_no_mapping(text: str, said: str) -> None:
    with pytest.raises(GridError, match=said):
        parse_grid(text, "mine.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GridError, match=r"nothing\.yaml: there is no such file; presets: digits-full"):
        read_grid(tmp_path / "nothing.yaml")
    with pytest.raises(GridError, match="did you mean 'digits-small'"):
        read_grid("digit-small")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GridError, match=r"bytes\.yaml: is not a text file"):
        read_grid(tmp_path / "bytes.yaml")
    (tmp_path / "large.yaml").write_text("# " + "x" * (1 << 20))
    with pytest.raises(GridError, match="more than"):
        read_grid(tmp_path / "large.yaml")


def test_aliases_do_not_explode() -> None:
    lines = ["a0: &a0 [1, 2]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9))]
    with pytest.raises(GridError, match="more than 200,000 entries"):
        parse_grid("\n".join(lines))


def test_numbers_in_powers_of_ten_are_numbers() -> None:
    runs = read_runs(parse_grid(GOOD.replace("0.1", "[1e-3, 2E+0, 1.5e-2]"))).runs
    assert sorted({run.learning_rate for run in runs}) == [0.001, 0.015, 2.0]


def test_json_is_read_too(tmp_path: Path) -> None:
    import json

    spec = parse_grid(GOOD).spec
    (tmp_path / "g.json").write_text(json.dumps(spec.content()))
    assert read_grid(tmp_path / "g.json").spec.digest() == spec.digest()


# --- what only this machine tells ------------------------------------------------------------------------------------


def problems(change: str, **options: object) -> list[GridError]:
    return check_grid(parse_grid(bad_text(change), "mine.yaml"), **options)  # type: ignore[arg-type]


def test_a_batch_larger_than_the_data() -> None:
    (found,) = problems("5:batch_size:\n  - 8\n  - 64\ndata_share: [0.5, 1.0]\nexclude: [{data_share: 1.0}]")[:1]
    assert (found.line, found.place) == (7, ("batch_size", 1))
    assert "64 is larger than the 40 training images of digits8:identity that data_share 0.5 leaves" in str(found)
    assert problems("5:batch_size: 80") == []
    assert len(problems("5:batch_size: 81")) == 8  # one for each task
    (found,) = problems("overrides:\n- match: {task: digits8:flip}\n  set: {batch_size: 99}")
    assert found.line == 9


def test_a_batch_of_one_image_where_batchnorm_has_one_number() -> None:
    text = GOOD.replace("architecture: vit", "architecture: resnet_bn").replace("[digits8]", "[digits8:flip]")
    lone = text.replace("batch_size: 8", "batch_size: [8, 79]")
    (found,) = check_grid(parse_grid(lone, "mine.yaml"))
    assert (found.line, found.place) == (5, ("batch_size", 1))
    assert "the last of an epoch of 80 images of digits8:flip holds one" in str(found)
    assert check_grid(parse_grid(lone.replace("steps: 10", "steps: 1"))) == []  # it never comes to that batch
    assert check_grid(parse_grid(lone + "sampling: without_replacement\n")) == []
    assert check_grid(parse_grid(lone + "trained: head\n")) == []
    assert check_grid(parse_grid(lone.replace("resnet_bn", "resnet_gn"))) == []
    (found,) = check_grid(parse_grid(text.replace("batch_size: 8", "batch_size: 1"), "mine.yaml"))
    assert "give 2 or more" in str(found)


def test_a_part_that_the_network_does_not_have() -> None:
    text = GOOD.replace("architecture: vit", "architecture: [vit, logistic]")
    assert check_grid(parse_grid(text + "trained: head\n")) == []
    for line in ("trained: [full, backbone]", "trained: low_rank\nrank: 2"):
        (found,) = check_grid(parse_grid(text + line + "\n", "mine.yaml"))
        assert found.line == 7
        assert "logistic has no" in str(found)


def test_a_missing_data_set(tmp_path: Path) -> None:
    found = problems("2:tasks:\n  - digits8:flip\n  - mnist\n  - npz8:gtsrb", root=tmp_path)
    assert [(each.line, each.place) for each in found] == [(4, ("tasks", 1)), (5, ("tasks", 2))]
    assert f"{tmp_path}/MNIST/raw" in str(found[0])
    assert f"mergebound data get mnist --root {tmp_path}" in str(found[0])
    assert f"{tmp_path}/gtsrb.npz" in str(found[1])


def test_missing_weights_and_pretraining_data(tmp_path: Path) -> None:
    base = "3:base:\n  kind: checkpoint\n  architecture: cifar_resnet20\n  classes: 10\n  weights: not/here.safetensors"
    (found,) = problems(base, root=tmp_path)
    assert (found.line, dotted(found.place)) == (7, "base.weights")
    assert f"{tmp_path}/not/here.safetensors" in str(found)
    (tmp_path / "not").mkdir()
    (tmp_path / "not/here.safetensors").touch()
    assert problems(base, root=tmp_path) == []  # looked up below the folder of the data sets
    (found,) = problems("3:base: {kind: pretrain, architecture: vit}")
    assert "needs data" in str(found)
    (found,) = problems("3:base:\n  kind: pretrain\n  architecture: vit\n  data: digits8:pretrain")
    assert (found.line, "'pretraining'" in str(found)) == (6, True)
    (found,) = problems("3:base: {kind: random, architecture: resnet17, classes: 10}")
    assert (found.line, "resnet1" in str(found)) == (3, True)


def test_colour_images_for_a_network_of_grey_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {}
    for part, n in (("train", 60), ("test", 20)):
        parts[f"x_{part}"] = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        parts[f"y_{part}"] = np.arange(n) % 3
    np.savez(tmp_path / "colour.npz", **parts)
    (found,) = problems(f"2:tasks: [{tmp_path}/colour.npz]")
    assert (found.line, "3 channels, but vit takes 1" in str(found)) == (3, True)


def test_an_absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = problems("seed: 1", device="cuda")
    assert "--device cuda: PyTorch finds no GPU here" in str(found)
    (found,) = problems("seed: 1", device="gpu0")
    assert "--device gpu0: there is no such kind of device" in str(found)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = problems("seed: 1", store=tmp_path / "file" / "store")
    assert f"{tmp_path}/file is a file" in str(found)
    assert problems("seed: 1", store=tmp_path / "new" / "store") == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"], "checking leaves nothing behind"
    if os.path.isdir("/proc/self"):
        (found,) = problems("seed: 1", store="/proc/self/store")
        assert "--store /proc/self/store: /proc/self cannot be written" in str(found)


def test_a_device_or_store_that_the_file_names_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = f"{tmp_path}/file/store"
    lines = f"device: gpu0\nstore: {store}"
    first, second = problems(lines, device="gpu0", store=store)
    assert (dotted(first.place), dotted(second.place)) == ("device", "store")
    assert second.line == (first.line or 0) + 1
    assert "device: gpu0: there is no such kind of device; give cpu or cuda" in str(first)
    assert f"store: {store}: {tmp_path}/file is a file; give a folder" in str(second)
    (other,) = problems(lines, device="gpu1")  # said on the command line
    assert (other.line, "--device gpu1: there is no such" in str(other)) == (None, True)
    plain, placed = parse_grid(GOOD), parse_grid(GOOD + lines + "\n")
    assert plain.spec.digest() == placed.spec.digest()  # where it runs is not what it is


def test_all_problems_are_found_at_once(tmp_path: Path) -> None:
    found = problems("2:tasks: [mnist, digits8:flip]\nclip_norm: 1", root=tmp_path, device="gpu", store="/proc/x")
    assert [each.line for each in found] == [None, None, 2]
