"""``mergebound merge`` and ``mergebound methods`` as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.cli import main
from merging.checkpoint import read_metadata
from merging.config import expert_names
from merging.merge import merge_state_dicts

INPUTS = ("base", "e1", "e2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(INPUTS):
        generator = torch.Generator().manual_seed(index)
        state = {
            "body.weight": torch.randn(5, 4, generator=generator),
            "norm.running_var": torch.rand(4, generator=generator),
            "norm.num_batches_tracked": torch.tensor(index),
            "head.weight": torch.randn(2, 4, generator=generator),
        }
        save_file(state, f"{name}.safetensors")
    return tmp_path


def run(*arguments: str) -> int:
    try:
        main(["merge", "--base", "base.safetensors", "e1.safetensors", "e2.safetensors", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest() for name in INPUTS}


def test_merge_writes_what_the_library_computes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(folder)
    options = ["--method", "ties", "--set", "density=0.5", "--set", "scope=tensor", "--set", "coefficient=0.7"]
    assert run(*options, "--out", "o.safetensors") == 0
    text = capsys.readouterr().out
    assert "ties(density=0.5, scope=tensor" in text
    assert "1 private from the base (head.weight), 1 constants" in text
    base, *experts = (load_file(f"{name}.safetensors") for name in INPUTS)
    named = dict(zip(("e1", "e2"), experts, strict=True))
    expected = merge_state_dicts("ties", base, named, density=0.5, scope="tensor", coefficient=0.7)
    merged = load_file("o.safetensors")
    assert all(torch.equal(merged[n], expected[n]) for n in expected)
    record = read_metadata("o.safetensors")
    assert record["method"] == "ties"
    assert record["parameters"]["density"] == 0.5
    assert record["base"] == {"file": "base.safetensors", "sha256": before["base"]}
    assert [expert["sha256"] for expert in record["experts"]] == [before["e1"], before["e2"]]
    assert digests(folder) == before
    assert sorted(os.listdir(folder)) == ["base.safetensors", "e1.safetensors", "e2.safetensors", "o.safetensors"]


def test_alpha_private_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "risk_optimal", "--alpha", "0.3,0.7", "--private", "", "--json"]
    assert run(*options, "--out", "o.safetensors") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == "o.safetensors"
    assert report["coefficients"] == {"e1": 0.3, "e2": 0.7}
    assert report["tensors"] == {"shared": 2, "private": 0, "buffers": 1, "constants": 1}
    base, e1, e2 = (load_file(f"{name}.safetensors")["head.weight"] for name in INPUTS)
    torch.testing.assert_close(load_file("o.safetensors")["head.weight"], base + 0.3 * (e1 - base) + 0.7 * (e2 - base))


def test_private_from_an_expert(folder: Path) -> None:
    assert run("--private-from", "e2.safetensors", "--private", "head.*", "--out", "o.safetensors") == 0
    assert torch.equal(load_file("o.safetensors")["head.weight"], load_file("e2.safetensors")["head.weight"])


def test_seed_and_order(folder: Path) -> None:
    merges = []
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("--method", "dare", "--seed", seed, "--out", f"{out}.safetensors") == 0
        merges.append(load_file(f"{out}.safetensors")["body.weight"])
    assert torch.equal(merges[0], merges[1])
    assert not torch.equal(merges[0], merges[2])
    main_order = ["merge", "--base", "base.safetensors", "e2.safetensors", "e1.safetensors", "--method", "dare"]
    with pytest.raises(SystemExit) as stop:
        main([*main_order, "--seed", "1", "--out", "d.safetensors"])
    assert not stop.value.code
    assert torch.equal(load_file("d.safetensors")["body.weight"], merges[0])


def test_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "o.safetensors", "--dry-run") == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert not (folder / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "tys"], "unknown merging method 'tys': did you mean ties"),
        (["--method", "ties", "--set", "density=2"], "--set density=2: parameter 'density' is 2.0"),
        (["--method", "ties", "--set", "density"], "--set density: write name=value"),
        (["--method", "ties", "--set", "dnsity=0.2"], "has no parameter 'dnsity': choose among density"),
        (["--method", "ties", "--set", "density=0.2", "--set", "density=0.3"], "'density' is set twice"),
        (["--method", "weighted"], "needs coefficients: add --alpha with 2 comma-separated numbers"),
        (["--method", "weighted", "--alpha", "1"], "give one finite number for each of the 2 experts"),
        (["--method", "weighted", "--alpha", "a,b"], "--alpha a,b: 'a' is not a number"),
        (["--private", "*"], "base.safetensors: nothing is left to merge"),
        (["--private-from", "e9.safetensors"], "is not among the experts"),
        (["--out", "o.pt"], "merges are written as .safetensors only"),
        (["--out", "e1.safetensors"], "the target is one of the inputs"),
        (["--out", "no/o.safetensors"], "the folder 'no' does not exist"),
        (["e1.safetensors"], "e1.safetensors is given 2 times"),
        (["e9.safetensors"], "e9.safetensors: there is no such file"),
    ],
)
def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    before = digests(folder)
    assert run("--out", "o.safetensors", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert digests(folder) == before
    assert sorted(os.listdir(folder)) == ["base.safetensors", "e1.safetensors", "e2.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body.weight": torch.full((5, 4), float("nan"))}, "e2.safetensors: tensor 'body.weight' holds 20 NaN"),
        ({"body.weight": None}, "e2.safetensors: tensor 'body.weight' of the base is missing"),
        ({"body.weight": torch.zeros(4, 4)}, "tensor 'body.weight' has shape (4, 4) where the base has (5, 4)"),
        (
            {"body.weight": torch.zeros(5, 4, dtype=torch.int64)},
            "has type torch.int64 where the base has torch.float32",
        ),
        ({"adapter": torch.zeros(4)}, "e2.safetensors: tensor 'adapter' does not exist in the base"),
        (None, "e2.safetensors: not a complete safetensors file"),
    ],
)
def test_bad_checkpoints(
    folder: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any] | None, message: str
) -> None:
    file = folder / "e2.safetensors"
    if change is None:
        file.write_bytes(file.read_bytes()[:-7])
    else:
        altered: dict[str, Any] = load_file(file) | change
        save_file({name: tensor for name, tensor in altered.items() if tensor is not None}, file)
    save_file({"old": torch.zeros(1)}, "o.safetensors")
    assert run("--out", "o.safetensors", "--overwrite") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(load_file("o.safetensors")) == ["old"]  # what was there stays


def test_names_tell_experts_apart(tmp_path: Path) -> None:
    assert expert_names([Path("x/a.safetensors"), Path("x/b.pt")]) == ("a", "b")
    assert expert_names([Path("x/m.safetensors"), Path("y/m.safetensors")]) == ("x/m", "y/m")
    assert expert_names([Path("x/m.safetensors.index.json"), Path("y/m.safetensors.index.json")]) == ("x/m", "y/m")


def test_methods_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["methods", "--json"])
    listed = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert {"average", "weighted", "task_arithmetic", "ties", "dare", "risk_optimal"} <= set(listed)
    assert listed["ties"]["parameters"][0]["domain"] == "(0, 1]"
    with pytest.raises(SystemExit):
        main(["methods"])
    assert "2306.01708" in capsys.readouterr().out


ALONE = """
import sys
from experiments.cli import main

def merge(*words):
    try:
        main(["merge", *words])
    except SystemExit as stop:
        assert not stop.code, words

merge("e1.safetensors", "e3.pth.tar", "--out", "o.safetensors")
merge("e1.safetensors", "e2.safetensors", "--out", "p.safetensors")
assert "numba" not in sys.modules, "small merges do not pay for loading the compiler"
import merging.many
assert "numba" not in sys.modules, "it is imported only where it runs"
"""


def test_in_a_process_of_its_own_warnings_are_one_line_and_nothing_is_compiled(folder: Path) -> None:
    state = load_file("e2.safetensors")
    torch.save({"state_dict": state, "state_dict_ema": state}, "e3.pth.tar")
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "60"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    expected = "warning: e3.pth.tar holds 'state_dict' and 'state_dict_ema': 'state_dict' is used; save another"
    assert done.stderr.splitlines() == [expected + " to a file of its own"]
    assert [expert["name"] for expert in read_metadata("o.safetensors")["experts"]] == ["e1", "e3"]
    assert set(load_file("p.safetensors")) == set(load_file("e1.safetensors"))


def test_a_group_without_coefficients_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--private", "", "--coef", "body.*=0.3,0.4", "--method", "ties", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "1 tensor with e1 0.3, e2 0.4: body.weight" in text
    assert "1 tensor with no coefficients: head.weight" in text


def test_a_file_without_the_name_of_its_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--method", "own.py", "--out", "o.safetensors") == 2
    assert "name the Method in it too, as own.py:METHOD" in capsys.readouterr().err
