"""Cohorts: grouping and choices from a made-up clock, and one real probe of a tiny network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bases.spec import BaseSpec
from experiments.finetune.cohort.choosing import LARGEST, LARGEST_ON_GPU
from experiments.finetune.cohort.planner import LOOPED, make_plan
from experiments.finetune.cohort.probe import Candidate, Opened, Timing, expert_bytes, measure
from experiments.grid.result import Plan
from experiments.grid.run_spec import RunSpec
from experiments.models import build_model
from experiments.tasks.types import Split
from theory.errors import MergeboundError


def run(**fields: Any) -> RunSpec:
    base = BaseSpec(kind="random", architecture=fields.pop("architecture", "mlp_4"), classes=3, options={"img_size": 2})
    return RunSpec.model_validate(dict(task="a", base=base, learning_rate=0.1, steps=4000, batch_size=4) | fields)


def opened(one: RunSpec) -> Opened:
    """Task ``a`` has three classes, others five."""
    network = build_model(one.architecture, 3 if one.task == "a" else 5, 0, **one.base.options)
    rng = np.random.default_rng([0, 0x9A])
    images = torch.from_numpy(rng.standard_normal((12, 1, 2, 2)).astype(np.float32))
    return network, network.state_dict(), Split(images, torch.arange(12) % 3, np.arange(12))


class Made:
    """A probe that knows how many times as fast as the loop each way is, by way, options and chunk."""

    def __init__(self, speed: Any) -> None:
        self.speed = speed
        self.asked: list[Candidate] = []

    def __call__(self, candidates: Sequence[Candidate], run: RunSpec, opened: Opened) -> Mapping[Candidate, Timing]:
        self.asked += [each for each in candidates if each.way != "loop"]
        found = {}
        for each in candidates:
            ratio = 1.0 if each.way == "loop" else self.speed(str(each), each.chunk)
            found[each] = Timing(None, 0, "not today") if ratio is None else Timing(0.01 / ratio, 5)
        return found


def plan(runs: list[RunSpec], speed: Any, **options: Any) -> Plan:
    named = {f"{number:03d}": each for number, each in enumerate(runs)}
    return make_plan(named, open_network=opened, probe=Made(speed), **{"clock": lambda: 0.0, **options})


def test_the_fastest_way_is_taken_and_said() -> None:
    speeds = {"written compiled": 3.0, "written batched": 2.0, "folded": 4.0, "vmap": 0.5}
    made = plan([run(seed=s) for s in range(9)], lambda name, chunk: speeds[name])
    assert {cohort.way for cohort in made.cohorts} == {"folded"}
    assert made.cohorts[0].reason.startswith("folded 4.0 times the loop (4 experts, batch 4, 5 steps); written comp")
    assert "vmap 0.5 times" in made.cohorts[0].reason
    assert [len(cohort.runs) for cohort in made.cohorts] == [4, 4, 1]
    assert json.loads(json.dumps(asdict(made))) is not None
    assert (made.device, made.seed) == ("cpu", 0)
    assert torch.__version__ in made.machine


def test_never_a_way_that_is_slower_than_the_loop() -> None:
    made = plan([run(seed=s) for s in range(20)], lambda name, chunk: 1.02)
    assert {(cohort.way, cohort.chunk) for cohort in made.cohorts} == {("loop", 1)}
    assert max(len(cohort.runs) for cohort in made.cohorts) == LOOPED
    assert made.cohorts[0].reason.startswith("loop; ")


def test_a_narrow_lead_is_timed_again_and_the_worse_timing_counts() -> None:
    turns: dict[str, list[float]] = {"folded": [1.3, 1.3, 0.97], "vmap": [1.2, 1.2, 1.15]}

    def noisy(name: str, chunk: int) -> float:
        left = turns.get(name, [0.5])
        return left.pop(0) if len(left) > 1 else left[0]

    made = plan([run(seed=s) for s in range(9)], noisy)
    assert made.cohorts[0].way == "vmap"
    assert made.cohorts[0].reason.startswith("vmap 1.1 times the loop")
    assert "folded 1.0 times" in made.cohorts[0].reason


def test_chunks_grow_while_that_pays() -> None:
    grown = {4: 2.0, 8: 3.0, 16: 3.05, 32: 9.0}
    made = plan(
        [run(seed=s) for s in range(40)], lambda name, chunk: grown.get(chunk, 0.1) if name == "folded" else 0.5
    )
    assert {cohort.chunk for cohort in made.cohorts} == {16, 8}  # 16 was no great gain, so 32 was not tried
    assert sum(len(cohort.runs) for cohort in made.cohorts) == 40


def test_a_gpu_takes_up_to_128_experts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With networks that say that they are there, and a made-up clock: no GPU is needed."""
    runs = [run(seed=s) for s in range(150)]

    def speed(name: str, chunk: int) -> float:
        return chunk if name == "folded" else 0.5

    assert {len(cohort.runs) for cohort in plan(runs, speed, probe_seconds=100).cohorts} == {LARGEST, 150 - 2 * LARGEST}
    monkeypatch.setattr("experiments.finetune.cohort.choosing.device_type", lambda network: "cuda")
    made = plan(runs, speed, probe_seconds=100)
    assert [len(cohort.runs) for cohort in made.cohorts] == [128, 22]
    assert LARGEST_ON_GPU == made.cohorts[0].chunk == 128
    few = plan(runs[:40], speed, probe_seconds=100)
    assert [cohort.chunk for cohort in few.cohorts] == [40]


def test_a_compiled_chain_takes_any_number_at_a_time() -> None:
    made = plan([run(seed=s) for s in range(70)], lambda name, chunk: 9.0 if name == "written compiled" else 1.0)
    assert [(cohort.way, cohort.chunk) for cohort in made.cohorts] == [("written", LARGEST), ("written", 6)]
    assert made.cohorts[0].options == {"engine": "compiled"}


def test_memory_lowers_the_chunk() -> None:
    one = run()
    each = expert_bytes(one, opened(one))
    weights = 4 * 4 + 4 + 4 * 3 + 3
    assert each == 4 * (weights * 7 + 2 * 4 * (4 + 4 + 4 + 3 + 4))  # flatten, linear, relu, head; and the image
    made = plan([run(seed=s) for s in range(9)], lambda name, chunk: 5.0 if name == "folded" else 0.1, memory=3 * each)
    assert {len(cohort.runs) for cohort in made.cohorts} == {3}
    assert "memory for 3 experts" in made.cohorts[0].reason


def test_what_does_not_work_is_left_out() -> None:
    made = plan([run(seed=s) for s in range(4)], lambda name, chunk: 2.0 if name == "vmap" else None)
    assert made.cohorts[0].way == "vmap"
    assert "folded does not work (not today)" in made.cohorts[0].reason


def test_the_probe_ends_in_time() -> None:
    ticks = iter(range(0, 1000, 10))
    made = plan([run(seed=s) for s in range(9)], lambda name, chunk: 2.0, probe_seconds=5, clock=lambda: next(ticks))
    assert "the time for the probe was over" in made.cohorts[0].reason
    assert max(cohort.chunk for cohort in made.cohorts) <= 9  # no chunk grew
    slow = plan([run(seed=s) for s in range(9)], lambda name, chunk: 2.0, probe_seconds=0.1)
    assert slow.cohorts[0].way == "loop"  # 0.01 s a step: four experts would take 0.8 s


def test_short_runs_are_not_probed_for_longer_than_they_are_worth() -> None:
    speeds = {4: 2.0, 8: 8.0}
    few = plan(
        [run(seed=s, steps=8) for s in range(9)],
        lambda name, chunk: speeds.get(chunk, 0.5) if name == "folded" else 0.5,
    )
    # the loop would take 0.72 s, so the probe has its second: 4 experts for 20 steps of 0.01 s fit in, 8 do not
    assert max(cohort.chunk for cohort in few.cohorts) == 4
    assert "the time for the probe was over" in few.cohorts[0].reason
    many = plan(
        [run(seed=s) for s in range(9)], lambda name, chunk: speeds.get(chunk, 0.5) if name == "folded" else 0.5
    )
    assert max(cohort.chunk for cohort in many.cohorts) == 8


def test_kinds_are_probed_once_and_heads_are_kept_apart() -> None:
    runs = [run(task=task, seed=s) for task in ("a", "b") for s in range(3)]
    named = {f"{number}": each for number, each in enumerate(runs)}
    probe = Made(lambda name, chunk: 2.0 if name == "folded" else 1.0)
    made = make_plan(named, open_network=opened, probe=probe)
    assert sorted(tuple(sorted(cohort.runs)) for cohort in made.cohorts) == [("0", "1", "2"), ("3", "4", "5")]
    assert sum(str(each) == "vmap" for each in probe.asked) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from([2, 4]), st.integers(1, 5), st.sampled_from("ab"), st.sampled_from(["sgd", "adamw"])),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=25, deadline=None)
def test_every_run_is_in_one_cohort_of_its_like(wanted: list[tuple[int, int, str, str]]) -> None:
    runs = [run(batch_size=b, steps=k, task=t, optimizer=o, seed=s) for s, (b, k, t, o) in enumerate(wanted)]
    made = plan(runs, lambda name, chunk: 2.0 if name == "folded" else 1.0)
    seen = [runs[int(digest)] for cohort in made.cohorts for digest in cohort.runs]
    assert sorted(each.seed for each in seen) == list(range(len(runs)))
    for cohort in made.cohorts:
        mine = [runs[int(digest)] for digest in cohort.runs]
        assert len({(each.batch_size, each.task, each.optimizer) for each in mine}) == 1
        assert [each.steps for each in mine] == sorted((each.steps for each in mine), reverse=True)
    assert len({cohort.name for cohort in made.cohorts}) == len(made.cohorts)


def test_a_clock_that_counts_steps() -> None:
    """The probe's arithmetic: what is not a step is taken out, and the quickest turn counts."""
    from experiments.finetune.cohort import probe as module

    elapsed = 0.0

    def train(each: Candidate, run: RunSpec, opened: Opened, seed: int, steps: int) -> None:
        nonlocal elapsed
        elapsed += 0.7 + steps * each.chunk * (0.05 if each.way == "vmap" else 0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_train", train)
        found = measure([Candidate("loop", 1), Candidate("vmap", 6)], run(), opened(run()), clock=lambda: elapsed)
    assert found[Candidate("loop", 1)].seconds == pytest.approx(0.2)
    assert found[Candidate("vmap", 6)].seconds == pytest.approx(0.05)


def test_a_real_probe_finds_that_theory_scale_networks_gain() -> None:
    made = make_plan({str(s): run(seed=s, steps=500) for s in range(12)}, open_network=opened, probe_seconds=1.0)
    assert {cohort.way for cohort in made.cohorts} == {"written"}
    assert "times the loop" in made.cohorts[0].reason


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(MergeboundError, match="no runs"):
        make_plan({}, open_network=opened)
    with pytest.raises(MergeboundError, match="batch_size = 40"):
        make_plan({"a": run(batch_size=40)}, open_network=opened)
