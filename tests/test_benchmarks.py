"""The pieces of ``benchmarks/merging.py``: tables from synthetic measurements, order of runs, meters, agreement."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.merge_speed.agreement import Agreement, compare
from benchmarks.merge_speed.cache import evict, resident, warm
from benchmarks.merge_speed.cases import CASES, FLOOR, OURS, Plan
from benchmarks.merge_speed.data import count, file_bytes, vit_shapes, write_checkpoints
from benchmarks.merge_speed.main import large_dtype, parse, without_paths, write
from benchmarks.merge_speed.run import Bench, Run, run_case, run_once, turns
from benchmarks.merge_speed.tables import report, summarise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures through /proc")


def run(tool: str, state: str, turn: int, wall: float, **fields: Any) -> Run:
    values: dict[str, Any] = dict(
        input_bytes=3_000_000_000, output_bytes=1_000_000_000, user=wall / 2, system=wall / 4, wall=wall, above=1e8
    )
    return Run("linear", tool, "float32", state, 97_000_000, 8, 1, turn, **(values | fields))


def synthetic() -> list[Run]:
    """Ours takes 2 s warm and 4 s cold, mergekit three times as long, the floor 1 s and 3 s; FusionBench is absent."""
    walls = {"warm": (2.0, 1.0, 9.0), "cold": (4.0, 5.0, 3.0)}
    floors = {"warm": (1.0, 1.0, 7.0), "cold": (3.0, 2.0, 30.0)}
    runs = []
    for state in ("warm", "cold"):
        for turn in range(3):
            wall = walls[state][turn]
            runs.append(run(OURS, state, turn, wall, above=1e8 * (1 + turn)))
            runs.append(run("mergekit", state, turn, 3 * wall, resident=0.25 if state == "cold" else 1.0))
            runs.append(run(FLOOR, state, turn, floors[state][turn]))
    runs.append(Run("linear", "fusionbench", "float32", "warm", 97_000_000, 8, 1, 0, error="not installed"))
    return runs


def test_warm_files_that_do_not_fit_the_page_cache_are_told() -> None:
    whole = report(summarise(synthetic()), [], {})
    assert "do not fit the page cache" not in whole
    part = report(summarise([*synthetic(), run(OURS, "warm", 3, 2.0, resident=0.625)]), [], {})
    assert "as little as 62.5% of the inputs" in part


def test_summary_of_synthetic_runs() -> None:
    rows = {row["tool"]: row for row in summarise(synthetic())}
    ours = rows[OURS]
    assert (ours["wall_warm"], ours["wall_cold"], ours["runs"]) == (2.0, 4.0, 6)
    assert (ours["cpu"], ours["user"], ours["system"]) == (1.5, 1.0, 0.5)
    assert ours["rate_warm"] == pytest.approx(2.0)
    assert ours["rate_cold"] == pytest.approx(1.0)  # 4 GB in 4 s
    assert ours["memory"] == pytest.approx(0.3)  # the largest of all runs
    assert (ours["floor_warm"], ours["floor_cold"]) == (2.0, 4.0 / 3.0)
    assert rows["mergekit"]["cpu_ratio"] == pytest.approx(3.0)
    assert rows["mergekit"]["resident"] == 0.25  # of cold runs alone
    absent = rows["fusionbench"]
    assert absent["error"] == "not installed"
    assert isnan(absent["cpu"])
    assert isnan(absent["cpu_ratio"])


def test_ratios_stay_within_one_merge() -> None:
    other = [replace(item, case="karcher", user=10 * item.user, system=10 * item.system) for item in synthetic()]
    rows = summarise([*synthetic(), *(item for item in other if item.tool != OURS)])
    ratios = {(row["case"], row["tool"]): row["cpu_ratio"] for row in rows}
    assert ratios["linear", "mergekit"] == pytest.approx(3.0)
    assert isnan(ratios["karcher", "mergekit"])  # ours was not run there


def test_whole_processes_are_kept_apart() -> None:
    whole = run(OURS, "whole", 0, 100.0, above=7e8)
    row = next(row for row in summarise([*synthetic(), whole]) if row["tool"] == OURS)
    assert (row["whole_wall"], row["whole_cpu"], row["whole_memory"]) == (100.0, 75.0, 0.7)
    assert (row["wall_warm"], row["memory"], row["runs"]) == (2.0, 0.3, 6)


def test_page_and_files(tmp_path: Path) -> None:
    runs = synthetic()
    found = [Agreement("linear", "mergekit", "float32", 1e-9, 5e-3, 0.0, 1.0, 0.0, False)]
    page = report(summarise(runs), found, {"seed": "0", "machine": "2 cores"})
    assert "## 97.0M parameters x 8 experts, float32, 1 thread" in page
    line = next(line for line in page.splitlines() if line.startswith("| linear | mergekit"))
    assert [cell.strip() for cell in line.split("|")[3:7]] == ["4.50", "3.0", "6.00", "12.00"]
    assert "| not installed" in page
    assert "nan" not in page
    assert "at most 25.0%" in page
    tables = [block for block in page.split("\n\n") if block.startswith("|")]
    for table in tables:  # every line of a table has as many cells as its heading
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    rate = {"task": "t", "merges": 10, "per_second": 9.0, "per_second_wall": 8.0, "loop_per_second": 3.0, "ratio": 3.0}
    write(tmp_path, runs, found, {"seed": "0"}, [rate])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "agreement.csv",
        "in_memory.csv",
        "runs.csv",
        "summary.csv",
        "tables.md",
    ]
    assert "|     10 |" in (tmp_path / "tables.md").read_text(encoding="utf-8")
    with open(tmp_path / "runs.csv", encoding="utf-8") as handle:
        read = list(csv.DictReader(handle))
    assert len(read) == len(runs)
    assert float(read[1]["wall"]) == runs[1].wall
    assert read[-1]["wall"] == ""


def test_tools_take_turns() -> None:
    order = list(turns(("a", "b"), ("warm", "whole"), 2))
    assert [(state, tool) for state, _, tool in order] == [("warm", tool) for tool in "abab"] + [
        ("whole", tool) for tool in "ab"
    ]


@given(st.integers(2_000, 3_000_000))
def test_shapes_reach_the_size(parameters: int) -> None:
    shapes = vit_shapes(parameters)
    assert parameters <= count(shapes)
    last = list(shapes)[-1]
    assert count({name: shape for name, shape in shapes.items() if name != last}) < parameters or len(shapes) == 2
    assert file_bytes(shapes, "bfloat16") * 2 == file_bytes(shapes, "float32")


def test_checkpoints_depend_on_the_seed_alone(tmp_path: Path) -> None:
    shapes = vit_shapes(5_000)
    two = write_checkpoints(tmp_path / "two", shapes, 2, "float32", 7)
    three = write_checkpoints(tmp_path / "three", shapes, 3, "float32", 7)
    half = write_checkpoints(tmp_path / "half", shapes, 2, "bfloat16", 7)
    other = write_checkpoints(tmp_path / "other", shapes, 2, "float32", 8)
    assert [file.name for file in two] == [file.name for file in three[:3]]
    for index in range(3):
        a, b, c, d = (load_file(files[index]) for files in (two, three, half, other))
        assert {name: tuple(tensor.shape) for name, tensor in a.items()} == shapes
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert all(torch.equal(a[name].bfloat16(), c[name]) for name in a)
        assert not any(torch.equal(a[name], d[name]) for name in a)
    base, expert = load_file(two[0]), load_file(two[1])
    spread = float((expert["pos_embed"] - base["pos_embed"]).std())
    assert 0.0009 < spread < 0.0021
    assert float(base["pos_embed"].std()) == pytest.approx(0.02, rel=0.1)


def tensors(*values: list[float], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.tensor(value, dtype=dtype) for index, value in enumerate(values)}


def test_agreement_by_hand(tmp_path: Path) -> None:
    save_file(tensors([1.0, 2.0], [0.0, 0.0]), tmp_path / "base.safetensors")
    save_file(tensors([1.5, 2.0], [0.0, 2.0]), tmp_path / "ours.safetensors")
    save_file(tensors([1.5, 2.25], [0.0, 2.001]), tmp_path / "theirs.safetensors")
    base, ours, theirs = (tmp_path / f"{name}.safetensors" for name in ("base", "ours", "theirs"))
    found = compare("linear", "mergekit", "float32", base, [ours], [theirs], random=False)
    assert (found.difference, found.change) == (0.25, 2.0)
    assert found.beyond == 0.25  # 0.25 is beyond 0.002, 0.001 is not
    assert found.spread == pytest.approx(np.sqrt((0.25 + 0.0625 + 2.001**2) / 4.25))
    assert found.zeros == -0.25
    assert not found.agrees
    assert compare("linear", "mergekit", "float32", base, [ours], [ours], random=False).agrees
    assert replace(found, random=True, spread=1.005, zeros=0.0).agrees
    assert not replace(found, random=True, spread=1.02, zeros=0.0).agrees
    save_file({"t0": torch.ones(2)}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="t1"):
        compare("linear", "mergekit", "float32", base, [ours], [tmp_path / "less.safetensors"], random=False)


def test_bfloat16_agrees_within_its_rounding(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4096, generator=generator)
    exact = start + 0.1 * torch.randn(4096, generator=generator)
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "near", "up", "far")]
    near = exact.bfloat16()
    up = (near.view(torch.int16) + 1).view(torch.bfloat16)  # one unit in the last place away
    for file, tensor in zip(files, (start.bfloat16(), near, up, near + 0.05), strict=True):
        save_file({"w": tensor}, file)
    base, first, second, third = files
    beyond = compare("linear", "mergekit", "bfloat16", base, [first], [second], random=False).beyond
    assert beyond < 0.5
    assert not compare("linear", "mergekit", "bfloat16", base, [first], [third], random=False).agrees


def test_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "data.bin"
    file.write_bytes(bytes(4 << 20))
    warm([file])
    assert resident([file]) > 0.99
    evict([file])
    left = resident([file])
    if left > 0.01:
        pytest.skip("this file system keeps its files in memory")
    assert file.read_bytes() == bytes(4 << 20)
    assert resident([file]) > 0.99


WORK = """
import time
import numpy as np
from benchmarks.merge_speed.meter import measure

def work():
    block = np.ones(8 << 20)  # 64 MiB
    time.sleep(0.1)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        block[0] += 1.0

reading = measure(work)
assert 60 << 20 < reading.above < 90 << 20, reading
assert 0.2 <= reading.user + reading.system < 0.5, reading
assert reading.wall >= 0.3, reading
"""


def test_meter_sees_memory_and_time() -> None:
    """In a process of its own: memory of earlier tests that is freed or moved to disk meanwhile would be counted."""
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", WORK], cwd=root, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


def bench(folder: Path, **changes: Any) -> Bench:
    shapes = vit_shapes(3_000)
    base, *experts = write_checkpoints(folder / "files", shapes, 2, "float32", 0)
    (folder / "scratch").mkdir()
    python = Path(sys.executable)
    values: dict[str, Any] = dict(
        base=base, experts=tuple(experts), warm_up=(base, *experts), parameters=count(shapes), dtype="float32"
    )
    more = dict(scratch=folder / "scratch", pythons={FLOOR: python, OURS: python}, rounds=2, limit=60.0)
    return Bench(**(values | more | changes))


def test_floor_runs_and_absent_peers_are_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    runs, found = run_case(bench(tmp_path), "task_arithmetic", ("mergekit", FLOOR), ("warm", "whole"), lines.append)
    assert found == []
    assert [(item.tool, item.state, item.round) for item in runs] == [
        ("mergekit", "warm", 0),
        (FLOOR, "warm", 0),
        (FLOOR, "warm", 1),
        (FLOOR, "whole", 0),
    ]
    assert "make bench-peers" in runs[0].error
    size = (tmp_path / "files" / "base.safetensors").stat().st_size
    for item in runs[1:]:
        assert item.error == ""
        assert (item.input_bytes, item.output_bytes) == (3 * size, size)
        assert 0.0 < item.wall < 60.0
    assert runs[3].wall > runs[1].wall  # the whole process
    assert len(lines) == 4
    assert not list((tmp_path / "scratch").glob("task_arithmetic*"))


def test_a_run_is_stopped_at_its_limit(tmp_path: Path) -> None:
    slow = bench(tmp_path, limit=0.0)
    files = tuple(map(str, slow.experts))
    plan = Plan(FLOOR, "linear", "warm", str(slow.base), files, str(tmp_path / "out"))
    assert run_once(slow, plan, 0).error == "stopped after 0 s"


def test_plan_round_trip() -> None:
    plan = Plan("mergekit", "linear", "cold", "b", ("x", "y"), "o", ("b", "x"), "bfloat16", 2, 10)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.inputs == ("x", "y")
    assert replace(plan, case="ties_tensor").inputs == ("b", "x", "y")


def test_options() -> None:
    quick = parse(["--quick"])
    assert (quick.parameters, quick.experts, quick.rounds, quick.states) == (1_000_000, 3, 1, ["warm"])
    full = parse([])
    assert (full.parameters, full.experts, full.rounds, full.cases) == (97_000_000, 8, 3, list(CASES))
    assert without_paths(["--quick", "--folder", "/a", "--out=/b", "--rounds", "2"]) == ["--quick", "--rounds", "2"]
    assert large_dtype(30 * 10**9, 8) == "float32"
    assert large_dtype(15 * 10**9, 8) == "bfloat16"
    assert large_dtype(5 * 10**9, 8) is None
