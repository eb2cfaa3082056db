"""Whole merges of files: in chunks, byte for byte what the merge tensor by tensor or in memory writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.merge_job import Resources, execute, prepare
from experiments.merge_job.chunks import streamed_merge
from merging.checkpoint import load_state_dict, open_checkpoint, save_checkpoint, save_state_dict
from merging.config import MergeSpec
from merging.errors import CheckpointError, MethodError
from merging.lazy import LazyState, specs
from merging.settings import Gradient, Rule
from merging.streaming import selection
from tests.merging.streamed import State, bits

RECORD = {"a": "record"}
SHAPES: dict[str, tuple[int, ...]] = {
    "stem.weight": (4, 3, 3),
    "blocks.0.weight": (19, 31),
    "blocks.0.bias": (19,),
    "blocks.1.weight": (19, 31),
    "scale": (),
    "empty": (0, 3),
    "norm.running_mean": (6,),
    "norm.running_var": (6,),
    "head.weight": (5, 4),
}


def checkpoint(seed: int, dtype: torch.dtype = torch.float32) -> State:
    rng = np.random.default_rng(seed)
    state = {n: torch.tensor(np.float32(np.round(rng.standard_normal(s), 2))).to(dtype) for n, s in SHAPES.items()}
    state["norm.running_var"] = state["norm.running_var"].abs()
    state["norm.num_batches_tracked"] = torch.tensor(seed)
    return state


def write(folder: Path, states: dict[str, State], save: Callable[[Path, State], Any] | None = None) -> dict[str, Path]:
    found = {}
    for name, state in states.items():
        found[name] = folder / f"{name}.safetensors"
        (save or save_state_dict)(found[name], state)
    return found


def family(folder: Path, dtype: torch.dtype = torch.float32, change: Callable[[str, State], Any] | None = None) -> Any:
    states = {name: checkpoint(seed, dtype) for seed, name in enumerate(("base", "c", "a", "b"))}
    for name, state in states.items():
        if change is not None:
            change(name, state)
    return write(folder, states)


def spec_of(paths: dict[str, Path], method: str = "ties", **changes: Any) -> MergeSpec:
    names = tuple(name for name in paths if name != "base")
    return replace(MergeSpec(method, paths["base"], tuple(paths[name] for name in names), names), **changes)


def outcome(spec: MergeSpec, out: Path, **resources: Any) -> Any:
    """All bytes that a merge writes, by file, or what it says."""
    spec = replace(spec, out=out)
    try:
        execute(prepare(spec), RECORD, Resources(**resources))
    except (CheckpointError, MethodError) as error:
        left = [path.name for path in out.parent.iterdir() if path.name.startswith((".", out.name))]
        assert left == []
        return type(error), str(error).replace(str(out), "OUT")
    files = sorted(out.iterdir()) if out.is_dir() else sorted(out.parent.glob(f"{out.stem}*"))
    return {path.name.replace(out.stem, "out"): path.read_bytes().replace(out.stem.encode(), b"out") for path in files}


def assert_all_same(spec: MergeSpec, folder: Path, *, suffix: str = ".safetensors", pure: bool = True) -> Any:
    """In chunks, with any number of threads, mapped or read: what is written without chunks."""
    running = set(threading.enumerate())
    expected = outcome(spec, folder / f"defined{suffix}", streamed=False)
    if pure:  # not by way of the definition, either
        assert streamed_merge(prepare(replace(spec, out=folder / f"never{suffix}")), Resources()) is not None
    for number, resources in enumerate(
        [{}, {"threads": 3, "max_memory": 10**9 if pure else None}, {"mapped": False, "threads": 2}]
    ):
        found = outcome(spec, folder / f"chunks{number}{suffix}", streamed=True, **resources)
        if isinstance(expected, tuple) or isinstance(found, tuple):
            assert found == expected
        else:
            assert list(found) == list(expected)
            for name, content in found.items():
                assert content == expected[name], name
    assert not set(threading.enumerate()) - running
    return expected


@pytest.mark.parametrize(("coefficient", "told"), [(0.3, False), (0.9, True)])
@pytest.mark.parametrize("streamed", [False, True])
def test_running_variances_set_to_zero_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, coefficient: float, told: bool, streamed: bool
) -> None:
    """With three experts whose variances are half the base's, a sum of coefficients above 2 makes all six negative."""

    def halve(name: str, state: State) -> None:
        state["norm.running_var"] = torch.full((6,), 1.0 if name == "base" else 0.5)

    paths = family(tmp_path, change=halve)
    spec = spec_of(paths, "task_arithmetic", settings={"coefficient": coefficient}, out=tmp_path / "out.safetensors")
    with caplog.at_level("WARNING"):
        execute(prepare(spec), RECORD, Resources(streamed=streamed))
    messages = [record.getMessage() for record in caplog.records if "running variances" in record.getMessage()]
    assert len(messages) == told
    assert all(message.startswith("6 ") and " of BatchNorm's" in message for message in messages)
    variances = load_state_dict(tmp_path / "out.safetensors")["norm.running_var"]
    assert bool((variances == 0.0).all()) == told


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("ties", {}),
    ("ties", {"settings": {"density": Gradient((0.1, 0.6))}, "rules": (Rule("stem.*", {"scope": "tensor"}),)}),
    ("ties", {"coefficients": (0.5, 1.0, 1.5), "dtype": "bfloat16"}),
    ("average", {"private": (), "max_shard_size": 2000}),
    ("average", {"dtype": "float64", "private_from": "a"}),
    ("weighted", {"coefficients": (0.5, 0.25, 0.25), "base": None}),
    ("task_arithmetic", {"coefficients": (2.0, -1.0, 1.0), "dtype": "float16", "private_from": "b"}),
    ("dare", {"settings": {"drop": 0.3}, "seed": 4}),
    ("dare_ties", {"settings": {"drop": 0.3}, "rules": (Rule("blocks.*", {"aggregation": "sum"}),)}),
    ("magmax", {}),
    ("consensus_ta", {}),
    ("lines", {}),
    ("breadcrumbs", {"settings": {"density": 0.5}}),
    ("tsv_m", {}),
]


@pytest.mark.parametrize(("method", "changes"), CHANGES)
def test_the_same_bytes(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    written = assert_all_same(spec_of(family(tmp_path), method, **changes), tmp_path)
    assert not isinstance(written, tuple)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("method", ["average", "ties", "dare_ties"])
def test_stored_types(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All of one type; float64 is merged tensor by tensor, or in memory where it has to be."""
    pure = (method, dtype) != ("ties", torch.float64)
    assert not isinstance(assert_all_same(spec_of(family(tmp_path, dtype), method), tmp_path, pure=pure), tuple)


@pytest.mark.parametrize("method", ["average", "ties"])
def test_one_tensor_or_one_expert_of_double_precision(method: str, tmp_path: Path) -> None:
    def one_tensor(name: str, state: State) -> None:
        state["scale"] = state["scale"].double() / 3

    def one_expert(name: str, state: State) -> None:
        if name == "b":
            state |= {key: tensor.double() / 3 for key, tensor in state.items() if tensor.is_floating_point()}

    for change in (one_tensor, one_expert):
        folder = tmp_path / change.__name__
        folder.mkdir()
        pure = method == "average" and change is not one_tensor
        assert not isinstance(assert_all_same(spec_of(family(folder, change=change), method), folder, pure=pure), tuple)


@pytest.mark.parametrize("method", ["average", "ties", "dare", "breadcrumbs"])
def test_tied_weights(method: str, tmp_path: Path) -> None:
    """Merged once, written under all names; ranked once."""

    def tie(name: str, state: State) -> None:
        state["lm_out.weight"] = state["blocks.0.weight"].clone()
        state["another.weight"] = state["blocks.0.weight"].clone()

    assert_all_same(spec_of(family(tmp_path, change=tie), method), tmp_path)
    merged = load_state_dict(tmp_path / "chunks0.safetensors")
    assert np.array_equal(bits(merged["lm_out.weight"]), bits(merged["blocks.0.weight"]))


@pytest.mark.parametrize("policy", ["union", "intersection"])
@pytest.mark.parametrize("method", ["average", "ties", "dare_ties"])
def test_policies(method: str, policy: str, tmp_path: Path) -> None:
    def change(name: str, state: State) -> None:
        if name == "a":
            del state["blocks.1.weight"]
        if name in ("a", "b"):
            state["extra.weight"] = state["blocks.0.weight"] * 2
        if name == "c":
            state["only.c"] = torch.tensor([1.0, 2.0], dtype=torch.float16)

    spec = spec_of(family(tmp_path, change=change), method, policy=policy)
    assert not isinstance(assert_all_same(spec, tmp_path), tuple)


@pytest.mark.parametrize("method", ["average", "ties", "dare_ties", "magmax"])
def test_inputs_that_are_fetched_whole(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Legacy files, shards and adapters; with domains that are sampled."""
    monkeypatch.setattr(selection, "SMALL", 16)
    monkeypatch.setattr(selection, "COLLECTED", 64)
    monkeypatch.setattr(selection, "_SAMPLED", 64)
    states = {name: checkpoint(seed) for seed, name in enumerate(("base", "old", "shards"))}
    paths = {"base": tmp_path / "base.pt", "old": tmp_path / "old.bin"}
    torch.save(states["base"], paths["base"])
    torch.save({"state_dict": states["old"]}, paths["old"], _use_new_zipfile_serialization=False)
    paths["shards"] = save_checkpoint(tmp_path / "shards", states["shards"], max_shard_size=1500)
    adapter = tmp_path / "adapter"
    rng = np.random.default_rng(0)
    factors = {"A": rng.standard_normal((2, 31)), "B": rng.standard_normal((19, 2))}
    key = "base_model.model.blocks.0.lora_{}.weight"
    adapter.mkdir()
    save_state_dict(
        adapter / "adapter_model.safetensors",
        {key.format(part): torch.tensor(np.float32(values)) for part, values in factors.items()},
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["0"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    paths["adapter"] = adapter
    assert not isinstance(assert_all_same(spec_of(paths, method), tmp_path), tuple)


@pytest.mark.parametrize("method", ["average", "ties", "karcher", "breadcrumbs"])
@pytest.mark.parametrize("base", [True, False])
def test_not_a_number_is_blamed_on_its_file(method: str, base: bool, tmp_path: Path) -> None:
    if not base and method in ("ties", "breadcrumbs"):
        return
    for bad in ("base", "a", "c") if base else ("a", "c"):
        folder = tmp_path / bad
        folder.mkdir()

        def poison(name: str, state: State, bad: str = bad) -> None:
            if name == bad:
                state["blocks.0.weight"][3, 3] = float("nan")

        spec = spec_of(family(folder, change=poison), method)
        kind, words = assert_all_same(spec if base else replace(spec, base=None), folder)
        assert kind is CheckpointError
        assert words.startswith(f"{folder / bad}.safetensors: tensor 'blocks.0.weight' holds 1 NaN")


def test_private_heads_may_hold_anything(tmp_path: Path) -> None:
    """What is copied is not looked at, unless it would overflow another type."""

    def poison(name: str, state: State) -> None:
        state["head.weight"][0] = float("nan")

    spec = spec_of(family(tmp_path, change=poison), "average", dtype="float16")
    assert not isinstance(assert_all_same(spec, tmp_path), tuple)
    (tmp_path / "x").mkdir()

    def large(name: str, state: State) -> None:
        state["head.weight"][0] = 1e6

    kind, words = assert_all_same(
        replace(spec_of(family(tmp_path / "x", change=large)), dtype="float16"), tmp_path / "x"
    )
    assert kind is MethodError
    assert words == "tensor 'head.weight' overflows torch.float16: store the merge in another --dtype"


@pytest.mark.parametrize("method", ["ties", "average", "karcher", "model_stock"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_disk_that_fails_ends_everything(
    method: str, threads: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever access fails, in whichever pass: one error, no thread left, no file left."""
    from merging.streaming.source import MappedFile

    spec = spec_of(family(tmp_path), method, out=tmp_path / "out.safetensors")
    job = prepare(spec)
    accesses = iter(range(10**9))
    genuine = MappedFile.read_into

    def failing(file: MappedFile, buffer: Any, begin: int) -> None:
        if next(accesses) >= after:
            raise CheckpointError(f"{file.path}: cannot be read")
        genuine(file, buffer, begin)

    monkeypatch.setattr(MappedFile, "read_into", failing)
    before = {path.name for path in tmp_path.iterdir()}
    running = threading.active_count()
    with pytest.raises(CheckpointError, match="cannot be read"):
        execute(job, RECORD, Resources(threads=threads, streamed=True, mapped=False))
    assert threading.active_count() == running
    assert {path.name for path in tmp_path.iterdir()} == before


def test_tensors_fetched_whole_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranking over a model of which nothing lies in files holds a few tensors at a time, not the model."""
    from merging.streaming.source import Inputs

    monkeypatch.setattr(selection, "SMALL", 16)
    monkeypatch.setattr(selection, "COLLECTED", 64)
    monkeypatch.setattr(selection, "_SAMPLED", 64)
    paths = family(tmp_path)
    whole = {name: f"t{name}" for name in map(str, range(30))}
    states = [
        LazyState({new: specs(state)["blocks.0.weight"] for new in whole}, lambda name, s=state: s["blocks.0.weight"])
        for state in (open_checkpoint(path) for path in paths.values())
    ]
    most = 0
    genuine = Inputs._fetch

    def watched(inputs: Inputs, which: int, name: str) -> torch.Tensor:
        nonlocal most
        found = genuine(inputs, which, name)
        most = max(most, len(inputs._whole))
        return found

    monkeypatch.setattr(Inputs, "_fetch", watched)
    domain = [(name, 19 * 31) for name in sorted(whole)]
    with Inputs(states[0], states[1:]) as inputs:
        found = selection.select(inputs, domain, 5000, chunk=100)
        assert most <= len(states) + 1  # one that a search ended in
    flat = np.abs(np.tile((states[1]["0"] - states[0]["0"]).numpy().reshape(-1), len(whole)))
    assert int((flat > found[0].value).sum()) < 5000 <= int((flat >= found[0].value).sum())
