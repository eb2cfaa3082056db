"""Published weights from a local file: the same tensors as timm's own loading, hashes checked, nothing downloaded."""

from __future__ import annotations

import socket
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from experiments.bases import BaseSpec, load_base
from experiments.bases.known_hashes import read_record
from experiments.bases.pretrained import known, load_pretrained, locate
from experiments.models import build_model
from merging.checkpoint import save_state_dict
from theory.errors import MergeboundError

NAMES = ("test_vit", "test_resnet", "test_convnext")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "test_vit": [{}, {"img_size": 96}, {"in_chans": 1}, {"img_size": 64, "in_chans": 6}],
    "test_resnet": [{}, {"in_chans": 1}],
    "test_convnext": [{}, {"in_chans": 2}],
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("MERGEBOUND_CACHE", str(tmp_path / "cache"))


def weights_of(name: str, path: Path, classes: int = 1000) -> dict[str, Tensor]:
    """A file of weights as timm publishes them, with every tensor away from its start."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = timm.create_model(name, num_classes=classes)
        state = {
            n: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t + 3 for n, t in model.state_dict().items()
        }
    if path.suffix == ".safetensors":
        save_state_dict(path, state)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in NAMES for options in OPTIONS[name]])
def test_the_tensors_are_those_of_timms_own_loading(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights_of(name, path)
    overlay = {"file": str(path)}
    truth = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **options)
    base = load_pretrained(name, weights=path, classes=5, options=options, seed=3)
    fresh = build_model(name, classes=5, seed=3, **options).state_dict()
    classifier = timm.get_pretrained_cfg(name).classifier
    for key, tensor in truth.state_dict().items():
        wanted = fresh[key] if key.startswith(f"{classifier}.") else tensor
        assert torch.equal(base.state[key], wanted), key
    assert list(base.state) == list(fresh)
    images = torch.randn(2, options.get("in_chans", 3), options.get("img_size", 160), options.get("img_size", 160))
    with torch.no_grad():
        torch.testing.assert_close(
            base.model().forward_features(images), truth.eval().forward_features(images), rtol=0, atol=0
        )
    kept = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    whole = load_pretrained(name, weights=path, options=options)
    assert whole.classes == 1000
    assert all(torch.equal(tensor, whole.state[key]) for key, tensor in kept.state_dict().items())


def test_position_embeddings_are_resized_as_timm_resizes_them(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    path = tmp_path / "w.safetensors"
    state = weights_of("test_vit", path)
    base = load_pretrained("test_vit", weights=path, classes=2, options={"img_size": 96})
    prefix = 1 if "cls_token" in state else 0
    truth = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], num_prefix_tokens=prefix)
    assert base.state["pos_embed"].shape == truth.shape
    torch.testing.assert_close(base.state["pos_embed"], truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("held", [37, 0])
def test_a_file_with_another_head_or_none(held: int, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = weights_of("test_resnet", path, classes=held)
    base = load_pretrained("test_resnet", weights=path, classes=4)
    assert base.state["fc.weight"].shape[0] == 4
    assert torch.equal(base.state["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    if held:
        assert load_pretrained("test_resnet", weights=path).classes == 37
    else:
        with pytest.raises(MergeboundError, match=r"w\.pth: holds no classifier"):
            load_pretrained("test_resnet", weights=path)


def test_the_seed_names_the_new_head_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights_of("test_resnet", path)
    a, b, c = (load_pretrained("test_resnet", weights=path, classes=4, seed=seed) for seed in (0, 0, 1))
    assert a.digest == b.digest != c.digest
    assert {n for n in a.state if not torch.equal(a.state[n], c.state[n])} == {"fc.weight"} | (
        set() if torch.equal(a.state["fc.bias"], c.state["fc.bias"]) else {"fc.bias"}
    )


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = weights_of("test_resnet", path)
    save_state_dict(path, {n: t for n, t in state.items() if not n.startswith("layer3")})
    with pytest.raises(
        MergeboundError, match=r"w\.safetensors: does not fit test_resnet: missing layer3\.0\."
    ) as caught:
        load_pretrained("test_resnet", weights=path, classes=4)
    assert "\n" not in str(caught.value)
    path = tmp_path / "v.safetensors"
    save_state_dict(path, state | {"layer1.0.conv1.weight": torch.zeros(3, 3, 3, 3)})
    with pytest.raises(MergeboundError, match=r"layer1\.0\.conv1\.weight is \(3, 3, 3, 3\) where \("):
        load_pretrained("test_resnet", weights=path, classes=4)
    with pytest.raises(MergeboundError, match="depth_of_feeling"):
        load_pretrained("test_resnet", weights=path, classes=4, options={"depth_of_feeling": 4})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_resnett", "test_resnett"),
        ("test_resnet.gold", "no weights tagged 'gold'.*r160_in1k"),
        ("vit", "no published"),
    ],
)
def test_unknown_names_are_answered_with_advice(name: str, said: str) -> None:
    with pytest.raises(MergeboundError, match=said):
        known(name)


def test_nothing_is_downloaded_unless_asked(tmp_path: Path) -> None:
    name = "test_resnet.r160_in1k"
    with pytest.raises(MergeboundError, match=rf"not on this machine; get them with: mergebound base get {name}"):
        load_pretrained(name, classes=4, cache=tmp_path)
    with pytest.raises(MergeboundError, match="not on this machine"):
        load_base(BaseSpec(kind="pretrained", architecture=name, classes=4, seed=1), cache=tmp_path)


def test_a_file_in_the_hubs_cache_is_found_and_checked_against_its_published_hash(tmp_path: Path) -> None:
    name = "test_resnet.r160_in1k"
    cfg = known(name)
    state = weights_of("test_resnet", tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    digest = sha256(content).hexdigest()
    folder = tmp_path / "hub" / ("models--" + cfg.hf_hub_id.replace("/", "--"))
    commit = "0" * 40
    for place in ("blobs", f"snapshots/{commit}", "refs"):
        (folder / place).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs" / digest).write_bytes(content)
    (folder / "snapshots" / commit / "model.safetensors").symlink_to(folder / "blobs" / digest)
    path, published = locate(name, cfg, download=False, cache=tmp_path / "hub")
    assert published == digest
    base = load_pretrained(name, classes=1000, cache=tmp_path / "hub", record=tmp_path / "r.json")
    assert torch.equal(base.state["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert "the SHA-256 is the published one" in base.provenance.notes
    assert read_record(tmp_path / "r.json")[name]["sha256"] == digest
    path.resolve().write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(MergeboundError, match="damaged or another one"):
        load_pretrained(name, classes=1000, cache=tmp_path / "hub", record=tmp_path / "r.json")


def test_a_local_file_that_changes_between_two_uses_is_noticed(tmp_path: Path) -> None:
    path, record = tmp_path / "w.safetensors", tmp_path / "r.json"
    state = weights_of("test_resnet", path)
    first = load_pretrained("test_resnet", weights=path, classes=3, record=record)
    assert any("trust on first use" in note for note in first.provenance.notes)
    save_state_dict(path, state | {"layer1.0.conv1.weight": state["layer1.0.conv1.weight"] + 1})
    with pytest.raises(MergeboundError, match="but on"):
        load_pretrained("test_resnet", weights=path, classes=3, record=record)
    right = sha256(path.read_bytes()).hexdigest()
    assert (
        load_pretrained("test_resnet", weights=path, classes=3, record=record, sha256=right).provenance.sha256 == right
    )
    load_pretrained("test_resnet", weights=path, classes=3, record=record)


def test_names_of_torchs_own_files_carry_their_hash(tmp_path: Path) -> None:
    from experiments.bases.sources import url_file

    path = tmp_path / "weights" / "resnet50-0676ba61.pth"
    path.parent.mkdir()
    path.write_bytes(b"x")
    found, digits = url_file(
        "https://example.org/models/resnet50-0676ba61.pth", download=False, command="", cache=tmp_path
    )
    assert (found, digits) == (path, "0676ba61")
    with pytest.raises(MergeboundError, match="get them with: mergebound base get m"):
        url_file("https://example.org/a-123456.pth", download=False, command="mergebound base get m", cache=tmp_path)
