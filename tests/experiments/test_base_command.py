"""``mergebound base``: what it lists, gets and shows; one line where something is wrong."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import timm

from experiments.bases import save_base
from experiments.bases.base import random_base
from experiments.cli import main
from merging.checkpoint import save_state_dict

Capture = pytest.CaptureFixture[str]
NAME = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEBOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def run(capture: Capture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["base", *arguments])
    shown = capture.readouterr()
    assert "Traceback" not in shown.out + shown.err
    return int(stop.value.code or 0), shown.out, shown.err


def test_show_prints_where_a_base_comes_from(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    base = random_base("vit", classes=10, seed=3)
    save_base(path, base)
    code, out, _ = run(capsys, "show", str(path), "--json")
    content = json.loads(out)
    assert code == 0
    assert content["sha256"] == sha256(path.read_bytes()).hexdigest()
    assert content["parameters"] == sum(p.numel() for p in base.model().parameters()) == 34290
    assert content["base"]["provenance"]["kind"] == "random"
    assert content["base"]["digest"] == base.digest
    code, out, _ = run(capsys, "show", str(path))
    assert code == 0
    assert "initial weights of seed 3" in out
    save_state_dict(path, base.state)
    code, out, _ = run(capsys, "show", str(path))
    assert code == 0
    assert "read it as a checkpoint" in out


def test_show_refuses_what_is_damaged_in_one_line(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    code, _, err = run(capsys, "show", str(tmp_path / "b.safetensors"))
    assert code == 2
    assert "b.safetensors" in err
    assert len(err.strip().splitlines()) == 1


def test_list_names_published_weights_without_the_network(capsys: Capture, no_network: None) -> None:
    code, out, _ = run(capsys, "list", "test_resnet*", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["name"] for row in rows] == timm.list_models("test_resnet*", pretrained=True)
    assert {row["here"] for row in rows} == {"no"}
    assert all(row["licence"] and row["source"] for row in rows)
    assert "test_resnet.r160_in1k" in run(capsys, "list", "test_resnet*")[1]
    assert "No weights were used" in run(capsys, "list")[1]
    assert "no weights named" in run(capsys, "list", "zzz*")[1]


def test_get_records_the_hash_and_notices_a_change(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_state_dict(path, timm.create_model("test_resnet").state_dict())
    asked: list[tuple[str, bool]] = []

    def found(repository: str, names: Any, *, download: bool, **_: object) -> tuple[Path, None]:
        asked.append((repository, download))
        return path, None

    monkeypatch.setattr("experiments.bases.pretrained.hub_file", found)
    code, out, err = run(capsys, "get", NAME)
    assert code == 0
    assert asked == [("timm/test_resnet.r160_in1k", True)]
    assert sha256(path.read_bytes()).hexdigest() in out
    assert "trust on first use" in out
    assert "licence: apache-2.0" in err
    assert NAME in run(capsys, "list")[1]
    save_state_dict(path, timm.create_model("test_resnet").state_dict())
    code, _, err = run(capsys, "get", NAME)
    assert code == 2
    assert "its SHA-256 is" in err
    code, _, err = run(capsys, "get", NAME, "--sha256", "0" * 64)
    assert code == 2
    assert "as expected" in err


def test_unknown_names_and_missing_weights_are_one_line(capsys: Capture) -> None:
    for name in ("resnet18_of_my_dreams", "resnet18.gold", "vit"):
        code, _, err = run(capsys, "get", name)
        assert code == 2
        assert len(err.strip().splitlines()) == 1


def test_without_a_connection_get_says_so(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file\non the Hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    code, _, err = run(capsys, "get", NAME)
    assert code == 2
    assert "could not be downloaded" in err


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
