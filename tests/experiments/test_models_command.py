"""``mergebound models`` as a user meets it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.cli import main
from experiments.models import build_model, count_flops, count_parameters, list_models, resnet_family

Capture = pytest.CaptureFixture[str]


def run(*arguments: str) -> int:
    try:
        main(["models", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def shown(capture: Capture, *arguments: str) -> Any:
    assert run(*arguments, "--json") == 0
    return json.loads(capture.readouterr().out)


def test_list(capsys: Capture) -> None:
    assert run("list", "cifar_*") == 0
    assert capsys.readouterr().out.split() == list(list_models("cifar_*"))
    assert shown(capsys, "list", "vit_s") == list(list_models("vit_s"))
    assert run("list", "no_such_network") == 2
    assert "'no_such_network'" in capsys.readouterr().err


def test_show_a_convolutional_network(capsys: Capture) -> None:
    facts = shown(capsys, "show", "cifar_resnet20")
    assert facts["parameters"] == 269_722
    assert facts["backbone_parameters"] == 269_722 - 650
    assert facts["head"] == {
        "tensors": ["linear.bias", "linear.weight"],
        "says": "linear (Linear), reads 64 features",
    }
    assert facts["norms"] == {"BatchNorm": {"layers": 19, "channels": 688}}
    assert facts["input"]["height"] == 32
    assert run("show", "cifar_resnet20") == 0
    out = capsys.readouterr().out
    for part in ("269,722", "3 x 32 x 32", "linear (Linear)", "19 x BatchNorm", "reestimate_batchnorm"):
        assert part in out


def test_show_for_other_images(capsys: Capture) -> None:
    facts = shown(capsys, "show", "vit_tiny_patch16_224", "--image-size", "64", "--channels", "1", "--classes", "5")
    model = build_model("vit_tiny_patch16_224", 5, img_size=64, in_chans=1)
    assert facts["parameters"] == count_parameters(model)
    assert (facts["input"]["channels"], facts["input"]["height"]) == (1, 64)
    small, large = (shown(capsys, "show", "resnet18", "--image-size", size)["flops"] for size in ("32", "64"))
    assert large / small == pytest.approx(4, rel=0.01)  # a network without a size of its own


def test_show_names_what_it_does_not_know(capsys: Capture) -> None:
    assert run("show", "resnet1") == 2
    assert "timm has no model 'resnet1'" in capsys.readouterr().err
    assert run("show", "vit_s1", "--image-size", "31") == 2
    assert "30 or 32" in capsys.readouterr().err


def test_family(capsys: Capture) -> None:
    rows = shown(capsys, "family", "resnet", "--norm", "gn", "--image-size", "8", "--channels", "1", "--classes", "3")
    assert [row["name"] for row in rows] == [member.name for member in resnet_family()]
    for row in rows[:3]:
        model = build_model(row["name"], 3, norm="gn", img_size=8, in_chans=1)
        assert (row["parameters"], row["flops"]) == (count_parameters(model), count_flops(model))
    assert run("family", "vit") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[1].split()[0] == "vit_s1"
    assert run("family", "mlp") == 2
    assert "choose one of vit, resnet" in capsys.readouterr().err
