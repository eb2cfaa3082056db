"""Bases: stored and read back bit for bit, matched with any file of weights; what is wrong is named."""

from __future__ import annotations

import json
import os
import threading
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from experiments.bases import Base, BaseSpec, load_base, read_base, save_base, tensors_digest
from experiments.bases.base import make_base, random_base
from experiments.bases.checkpoint import load_checkpoint_base
from experiments.bases.known_hashes import check_hash, read_record, remember, replace_entry
from experiments.bases.reading import without_prefixes
from experiments.bases.waiting import alone
from experiments.models import build_model, head_tensors
from experiments.tasks.types import Split
from merging.checkpoint import load_state_dict, save_state_dict
from theory.errors import MergeboundError

ARCHITECTURE = "resnet_bn"


def trained(seed: int = 3, classes: int = 10) -> dict[str, Tensor]:
    """A network's state dict with every tensor moved away from its start."""
    torch.manual_seed(seed)
    state = build_model(ARCHITECTURE, classes=classes, seed=seed).state_dict()
    return {n: t + 1 if not t.is_floating_point() else t + 0.1 * torch.randn_like(t) for n, t in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def refusal(architecture: str, path: Path, **options: object) -> str:
    with pytest.raises(MergeboundError) as caught:
        load_checkpoint_base(architecture, path, **{"classes": 10, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- storing ---------------------------------------------------------------------------------------------------------


def test_a_stored_base_is_read_back_bit_for_bit_in_order_and_with_its_provenance(tmp_path: Path) -> None:
    base = random_base(ARCHITECTURE, classes=7, seed=5)
    save_base(tmp_path / "base.safetensors", base)
    again = read_base(tmp_path / "base.safetensors")
    assert same(dict(again.state), dict(base.state))
    assert again == Base(again.state, ARCHITECTURE, 7, {}, base.provenance, base.digest)
    assert same(again.model().state_dict(), build_model(ARCHITECTURE, classes=7, seed=5).state_dict())


def test_a_base_whose_tensors_were_changed_afterwards_is_refused(tmp_path: Path) -> None:
    base = random_base(ARCHITECTURE, classes=7)
    other = dict(base.state) | {"fc.bias": base.state["fc.bias"] + 1}
    save_state_dict(tmp_path / "base.safetensors", other, {"base": base.describe()})
    with pytest.raises(MergeboundError, match=r"base\.safetensors: the tensors are not those that were recorded"):
        read_base(tmp_path / "base.safetensors")


@pytest.mark.parametrize("record", [{}, {"base": None}, {"base": {"digest": "x"}}, {"base": {"provenance": 3}}])
def test_a_file_without_the_record_of_a_base_is_refused(tmp_path: Path, record: dict[str, object]) -> None:
    save_state_dict(tmp_path / "other.safetensors", trained(), record)
    with pytest.raises(MergeboundError, match=r"other\.safetensors: holds no record of a base"):
        read_base(tmp_path / "other.safetensors")


def test_the_digest_tells_names_shapes_types_and_values_apart_and_not_the_order() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1), "c": torch.empty(0, 2)}
    found = tensors_digest(state)
    assert found == tensors_digest(dict(reversed(state.items())))
    assert found == tensors_digest(state | {"a": torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)})
    changed = [
        state | {"a": state["a"].reshape(3, 2)},
        state | {"a": state["a"].double()},
        state | {"a": state["a"] + torch.eye(2, 3)},
        {"A": state["a"], "b": state["b"], "c": state["c"]},
        {"a": state["a"], "b": state["b"]},
        state | {"c": torch.empty(2, 0)},
    ]
    assert len({found, *map(tensors_digest, changed)}) == 7


# --- any checkpoint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "model.", "module.model.backbone.", "_orig_mod.module."]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, prefix: str, suffix: str) -> None:
    state = trained()
    path = tmp_path / f"weights{suffix}"
    named = {prefix + name: tensor for name, tensor in state.items()}
    if suffix == ".pth":
        torch.save({"state_dict": named, "epoch": 3}, path)
    else:
        save_state_dict(path, named)
    base = load_checkpoint_base(ARCHITECTURE, path, classes=10)
    assert same(dict(base.state), state)
    assert base.provenance.sha256 == sha256(path.read_bytes()).hexdigest()
    assert f"{len(state)} tensors were matched" in base.provenance.notes[0]


def test_a_backbone_beside_a_head_of_another_name(tmp_path: Path) -> None:
    state = trained()
    named = {f"backbone.{n}": t for n, t in state.items() if not n.startswith("fc.")}
    save_state_dict(
        tmp_path / "b.safetensors", named | {"head.weight": torch.zeros(4, 40), "head.bias": torch.zeros(4)}
    )
    base = load_checkpoint_base(ARCHITECTURE, tmp_path / "b.safetensors", classes=6, seed=9)
    fresh = build_model(ARCHITECTURE, classes=6, seed=9).state_dict()
    for name, tensor in base.state.items():
        assert torch.equal(tensor, fresh[name] if name.startswith("fc.") else state[name]), name
    said = " ".join(base.provenance.notes)
    assert "the head is new" in said
    assert "not used: head.bias, head.weight" in said or "not used: head.weight, head.bias" in said


@pytest.mark.parametrize(("head", "classes", "kept"), [("auto", 10, True), ("auto", 4, False), ("new", 10, False)])
def test_the_head_is_kept_where_it_fits_and_wanted(tmp_path: Path, head: str, classes: int, kept: bool) -> None:
    state = trained()
    save_state_dict(tmp_path / "w.safetensors", state)
    base = load_checkpoint_base(ARCHITECTURE, tmp_path / "w.safetensors", classes=classes, seed=2, head=head)  # type: ignore[arg-type]
    fresh = build_model(ARCHITECTURE, classes=classes, seed=2).state_dict()
    assert torch.equal(base.state["fc.weight"], state["fc.weight"] if kept else fresh["fc.weight"])
    assert torch.equal(base.state["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])


@pytest.mark.parametrize("name", ["levit_128s", "deit_tiny_distilled_patch16_224"])
def test_heads_that_are_not_one_linear_layer(tmp_path: Path, name: str) -> None:
    options = {} if name.startswith("levit") else {"img_size": 32}
    network = build_model(name, classes=3, seed=1, **options)
    save_state_dict(tmp_path / "w.safetensors", network.state_dict())
    kept = load_checkpoint_base(name, tmp_path / "w.safetensors", classes=3, seed=2, options=options)
    assert same(dict(kept.state), network.state_dict())
    new = load_checkpoint_base(name, tmp_path / "w.safetensors", classes=5, seed=2, options=options)
    fresh = build_model(name, classes=5, seed=2, **options).state_dict()
    head = head_tensors(network)
    assert len(head) > 2
    for key, tensor in new.state.items():
        assert torch.equal(tensor, fresh[key] if key in head else kept.state[key]), key
    assert "the head is new" in new.provenance.notes


def test_a_head_that_must_be_kept_and_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "w.safetensors", trained())
    message = refusal(ARCHITECTURE, tmp_path / "w.safetensors", classes=4, head="keep")
    assert "fc.weight (10, 40)" in message
    assert "fc.weight (4, 40)" in message


def test_counters_of_batchnorm_may_be_absent_and_half_precision_is_converted(tmp_path: Path) -> None:
    state = {n: t.half() for n, t in trained().items() if not n.endswith("num_batches_tracked")}
    save_state_dict(tmp_path / "w.safetensors", state)
    base = load_checkpoint_base(ARCHITECTURE, tmp_path / "w.safetensors", classes=10)
    assert base.state["bn1.num_batches_tracked"] == 0
    assert torch.equal(base.state["conv1.weight"], state["conv1.weight"].float())
    assert any("converted" in note for note in base.provenance.notes)


def test_missing_foreign_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = trained()
    save_state_dict(path, {n: t for n, t in state.items() if not n.startswith("layer2")})
    message = refusal(ARCHITECTURE, path)
    assert "missing layer2.0.conv1.weight, layer2.0.bn1.weight" in message
    assert "more" in message
    save_state_dict(path, state | {"conv1.weight": torch.zeros(8, 3, 3, 3)})
    assert "conv1.weight is (8, 3, 3, 3) where (8, 1, 3, 3) is needed" in refusal(ARCHITECTURE, path)
    save_state_dict(path, state | {"layer1.1.conv1.weight": torch.zeros(8, 8, 3, 3)})
    assert "not part of it layer1.1.conv1.weight" in refusal(ARCHITECTURE, path)
    kept = load_checkpoint_base(ARCHITECTURE, path, classes=10, allow_unused=True)
    assert same(dict(kept.state), state)


def test_an_adapter_an_unknown_network_and_another_hash_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_state_dict(path, {"base_model.model.fc.lora_A.weight": torch.zeros(2, 40)})
    assert "LoRA adapter" in refusal(ARCHITECTURE, path)
    save_state_dict(path, trained())
    with pytest.raises(MergeboundError, match="resnetty"):
        load_checkpoint_base("resnetty", path, classes=10)
    right = sha256(path.read_bytes()).hexdigest()
    assert load_checkpoint_base(ARCHITECTURE, path, classes=10, sha256=right[:8]).provenance.sha256 == right
    wrong = ("0" if right[0] != "0" else "1") + right[1:]
    assert wrong in refusal(ARCHITECTURE, path, sha256=wrong)


def test_averaged_weights_are_read_when_asked_for(tmp_path: Path) -> None:
    plain, averaged = trained(1), trained(2)
    path = tmp_path / "last.pth.tar"
    ema = {f"module.{name}": tensor for name, tensor in averaged.items()}
    torch.save({"epoch": 1, "state_dict": plain, "state_dict_ema": ema}, path)
    assert same(dict(load_checkpoint_base(ARCHITECTURE, path, classes=10).state), plain)
    base = load_checkpoint_base(ARCHITECTURE, path, classes=10, ema=True)
    assert same(dict(base.state), averaged)
    assert "averaged (EMA) weights" in base.provenance.notes
    torch.save({"state_dict": plain}, path)
    assert "no averaged weights" in refusal(ARCHITECTURE, path, ema=True)
    save_state_dict(tmp_path / "w.safetensors", plain)
    assert "leave ema out" in refusal(ARCHITECTURE, tmp_path / "w.safetensors", ema=True)


@given(st.lists(st.sampled_from(["module.", "model.", "backbone.", "net."]), max_size=3), st.integers(1, 5))
def test_property_a_chain_of_wrappers_is_found_whole(chain: list[str], size: int) -> None:
    wanted = {f"blocks.{k}.weight": 0 for k in range(size)}
    renamed, prefix = without_prefixes(tuple("".join(chain) + name for name in wanted), wanted)
    assert prefix == "".join(chain)
    assert sorted(renamed.values()) == sorted(wanted)


def test_two_tensors_that_become_one_are_refused(tmp_path: Path) -> None:
    state = trained()
    save_state_dict(
        tmp_path / "w.safetensors", {f"backbone.{n}": t for n, t in state.items()} | {"fc.bias": state["fc.bias"]}
    )
    assert "'backbone.fc.bias' and 'fc.bias' are both there" in refusal(ARCHITECTURE, tmp_path / "w.safetensors")


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_the_first_use_records_and_later_uses_compare(tmp_path: Path) -> None:
    record = tmp_path / "deep" / "bases.lock.json"
    assert "trust on first use" in remember(record, "m", "a" * 64, 5, "here")
    assert "is the one recorded" in remember(record, "m", "a" * 64, 5, "there")
    with pytest.raises(MergeboundError, match=r"m: its SHA-256 is b+, but on \d{4}-\d\d-\d\d it was a+"):
        remember(record, "m", "b" * 64, 5, "there")
    replace_entry(record, "m", "b" * 64, 6, "there")
    assert read_record(record)["m"]["sha256"] == "b" * 64
    assert [path.name for path in record.parent.iterdir()] == ["bases.lock.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"m": 3}', '{"m": {}}'])
def test_a_damaged_record_of_hashes_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(MergeboundError, match=r"r\.json: .*remove it"):
        remember(tmp_path / "r.json", "m", "a" * 64, 5, "here")


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(6, 64), st.booleans())
def test_property_a_hash_agrees_with_its_beginnings_only(found: str, length: int, upper: bool) -> None:
    start = found[:length].upper() if upper else found[:length]
    check_hash(found, start, "w")
    other = start[:-1] + ("0" if start[-1].lower() != "0" else "1")
    with pytest.raises(MergeboundError, match=r"not .* as expected"):
        check_hash(found, other, "w")


@pytest.mark.parametrize("wrong", ["", "abc", "xyz123", "a" * 65])
def test_what_is_no_hash_is_refused(wrong: str) -> None:
    with pytest.raises(MergeboundError, match="is not a SHA-256"):
        check_hash("a" * 64, wrong, "w")


def test_many_writers_of_the_record_lose_nothing(tmp_path: Path) -> None:
    record = tmp_path / "r.json"
    writers = [threading.Thread(target=remember, args=(record, f"m{k}", f"{k:064d}", k, "here")) for k in range(12)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=30)
    assert json.loads(record.read_text()).keys() == {f"m{k}" for k in range(12)}


def test_waiting_for_a_lock_has_a_limit_and_can_be_given_up(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with alone(path, 1.0) as first:
        assert first
        started = time.monotonic()
        with alone(path, 0.2) as second:
            assert not second
        assert 0.15 < time.monotonic() - started < 3.0
        with alone(path, 60.0, done=lambda: True) as third:
            assert not third
    assert not path.exists()


# --- specifications --------------------------------------------------------------------------------------------------


def test_a_specification_loads_each_simple_kind_and_measures(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    data = Split(torch.randn(60, 1, 8, 8, generator=drawn), torch.arange(60) % 10, np.arange(60))
    random = load_base(BaseSpec(kind="random", architecture="vit", classes=10, seed=4), validation=data)
    assert same(dict(random.state), build_model("vit", seed=4).state_dict())
    model = random.model()
    with torch.no_grad():
        right = (model(data.images).argmax(1) == data.labels).float().mean()
    assert random.provenance.accuracy == pytest.approx(float(right))
    assert random.provenance.images == 60
    save_state_dict(tmp_path / "w.safetensors", trained())
    spec = BaseSpec(kind="checkpoint", architecture=ARCHITECTURE, weights=tmp_path / "w.safetensors", classes=10)
    assert BaseSpec.model_validate_json(spec.model_dump_json()) == spec
    assert same(dict(load_base(spec).state), trained())
    with pytest.raises(MergeboundError, match="needs training data"):
        load_base(BaseSpec(kind="pretrain", architecture="vit"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "checkpoint", "classes": 3}, "weights: a base of kind checkpoint needs it"),
        ({"kind": "random"}, "classes: a base of kind random needs it"),
        ({"kind": "clip", "weights": "w"}, "class_names: a base of kind clip needs it"),
        ({"kind": "clip", "class_names": ["a"]}, "weights or tag: a base of kind clip needs it"),
        ({"kind": "clip", "class_names": ["a"], "tag": "t", "classes": 2}, "there are 1 class_names"),
        ({"kind": "random", "classes": 2, "weights": "w"}, "weights: means nothing"),
        ({"kind": "pretrain", "quality": "great"}, "quality"),
        ({"kind": "pretrain", "quality": {"steps": -1}}, "steps"),
        ({"kind": "sunshine"}, "kind"),
    ],
)
def test_a_specification_that_makes_no_sense_is_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        BaseSpec.model_validate({"architecture": "vit", **fields})


def test_a_base_of_another_network_does_not_build() -> None:
    base = random_base("vit", classes=10)
    wrong = make_base(base.state, ARCHITECTURE, 10, {}, base.provenance)
    with pytest.raises(MergeboundError, match=r"does not fit .*missing conv1\.weight"):
        wrong.model()
    with pytest.raises(MergeboundError, match="depth_of_feeling"):
        random_base("test_resnet", classes=3, options={"depth_of_feeling": 4})


@pytest.mark.skipif(
    "MERGEBOUND_DATA" not in os.environ, reason="MERGEBOUND_DATA is not set: the real networks are needed"
)
def test_a_published_cifar_network_loads_whole() -> None:
    path = Path(os.environ["MERGEBOUND_DATA"]) / "cifar10_resnets" / "resnet20-12fca82f.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    hashed = "067e58d1f213d012fea54d151d17091064bd0debafb040f28a5c14e66845cf9a"
    base = load_checkpoint_base("cifar_resnet20", path, classes=10, sha256=hashed, head="keep")
    stored = load_state_dict(path)
    assert all(torch.equal(tensor, base.state[name]) for name, tensor in stored.items())
    assert {name.rpartition(".")[2] for name in set(base.state) - set(stored)} == {"num_batches_tracked"}
    assert sum(tensor.numel() for name, tensor in base.model().named_parameters()) == 269_722
