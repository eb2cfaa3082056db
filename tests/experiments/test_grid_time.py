"""What ``grid plan`` says of time: sums by hand, and against training that is timed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from experiments.bases.spec import BaseSpec
from experiments.bases.training import PretrainSpec, train
from experiments.grid.calibrate import Timing
from experiments.grid.calibrate_cohorts import CohortTiming, calibrate_cohorts, random_images, typical
from experiments.grid.cost import Cost, network_facts
from experiments.grid.estimate import estimate
from experiments.grid.facts import TaskFacts
from experiments.grid.pretraining_time import pretrained, pretraining
from experiments.grid.run_spec import RunSpec
from experiments.grid.wall_time import PER_BYTE, PER_RUN, START, Work, wall_clock, work_of
from experiments.grid.yaml_source import parse_grid
from experiments.models import build_model

BASE = BaseSpec(kind="random", architecture="mlp_16", classes=10)
MADE = CohortTiming(0.001, 0.0001, 3.0, "folded", 4, 2.0, (0.01, 0.001), (0.02, 0.002), 0.5, 3.0)


def run(seed: int, **fields: object) -> RunSpec:
    return RunSpec.model_validate(
        dict(task="a", base=BASE, learning_rate=0.1, steps=20, batch_size=8, seed=seed) | fields
    )


def test_work_by_hand() -> None:
    runs = [run(0), run(1), run(0, batch_size=16, steps=10, checkpoints=(5, 10)), *(run(s) for s in range(2, 8))]
    tasks = {"a": TaskFacts("a", 10, 100, 30, 50)}
    cost = Cost(9, 10, 170, 9 * 160, 10 * 80, 1.0, 1.0, 10**6)
    found = work_of(runs, cost, tasks, MADE, passes=3.0)
    training = 0.001 * 170 + 0.0001 * 9 * 160
    evaluation = (0.01 + 0.02) * 10 + 0.001 * 10 * 30 + 0.002 * 10 * 50
    assert found.busy == pytest.approx(training + evaluation + PER_RUN * 9 + PER_BYTE * 10**6 + 0.5 * 8)  # 8 seeds
    assert (found.cohorts, found.planning) == (2 + 1, 2 * 3.0)  # eight runs in fours, and one of another batch size
    assert found.longest == pytest.approx(4 * (0.001 * 20 + 0.0001 * 160))
    sam = work_of(runs, cost, tasks, MADE, passes=6.0)
    assert sam.busy - found.busy == pytest.approx(training)
    apart = work_of([run(0), run(1, task="b")], cost, tasks | {"b": TaskFacts("b", 3, 9, 1, 1)}, MADE, 3.0)
    assert apart.cohorts == 2  # heads of other sizes are not stacked
    loop = work_of(runs, cost, tasks, replace(MADE, way="loop", chunk=1), 3.0)
    assert loop.cohorts == 1 + 1  # eight runs after each other


def test_workers_wait_for_the_longest_cohort() -> None:
    short, long = Work(1.0, 40.0, 10, 4.0), Work(2.0, 20.0, 1, 20.0)
    assert wall_clock([short], 2) == START + 1 + 20
    assert wall_clock([short, long], 2) == START + 3 + 30
    assert wall_clock([short, long], 30) == START + 3 + 20


def test_the_planners_way_takes_about_as_long_as_it_is_said_to() -> None:
    runs = [run(s, steps=400) for s in range(6)]
    facts = network_facts(BASE)
    found = calibrate_cohorts(runs, facts, Timing(1e-4, 1e-6, 0.9, 1.1, (8,), 5), seconds=0.8, resamples=5)
    assert found is not None
    assert found.way == "written"
    assert found.speed_up > 1.5
    from experiments.finetune.cohort.train import train_cohort
    from experiments.grid.result import Cohort

    network, one = build_model("mlp_16", classes=10), typical(runs)
    together = [one.model_copy(update={"seed": seed}) for seed in range(found.chunk)]
    data = random_images(facts, 8, one, 10, "cpu", 0)
    cohort = Cohort("c", tuple(map(str, together)), "written", found.chunk, {"engine": "compiled"})
    times = []
    for _ in range(3):
        began = time.process_time()
        train_cohort(together, network, [network.state_dict()] * found.chunk, [data] * found.chunk, cohort)
        times.append(time.process_time() - began)
    assert min(times) == pytest.approx(found.training(400 * found.chunk, 3200 * found.chunk), rel=2.0)
    assert min(times) > found.training(400 * found.chunk, 3200 * found.chunk) / 3
    assert torch.get_num_threads() >= 1


def test_pretraining_is_counted_and_takes_about_as_long_as_it_is_said_to() -> None:
    numbers = {"steps": 60, "share": 0.5, "batch_size": 32}
    base = dict(kind="pretrain", architecture="mlp_16", classes=10, data="a", quality=numbers)
    specs = [BaseSpec.model_validate(base | {"seed": seed}) for seed in (0, 1)]
    others = [BASE, BaseSpec.model_validate(base | {"quality": "none"})]
    ((_, alike),) = pretrained([*specs, *others]).items()
    assert alike == specs
    tasks = {"a": TaskFacts("a", 10, 100, 64, 0)}
    facts = network_facts(BASE)
    plain = pretraining(alike, facts, tasks, seconds=0)
    assert (plain.bases, plain.steps, plain.batch_size, plain.samples) == (2, 60, 32, 2 * 60 * 32)
    assert plain.seconds is None
    found = pretraining(alike, facts, tasks, seconds=0.1)
    assert found.seconds is not None
    images = random_images(facts, 32, None, 10, "cpu", 1)
    began = time.process_time()
    for seed in (0, 1):
        made = train(
            build_model("mlp_16", classes=10), images, PretrainSpec.model_validate(numbers | {"share": 1}), seed
        )
        assert [step.step for step in made] == list(range(1, 61))
    assert found.seconds == pytest.approx(time.process_time() - began, rel=2.0)
    assert found.seconds > (time.process_time() - began) / 3


def test_the_total_has_the_pretraining_in_it() -> None:
    text = "name: t\ntasks: [digits8:flip]\nlearning_rate: 0.1\nbatch_size: 8\nsteps: 15\n"
    text += "base: {kind: pretrain, architecture: logistic, data: 'digits8:pretraining', quality: [weak, strong]}\n"
    found = estimate(parse_grid(text), seconds=0.4, workers=2, check=False)
    assert [(each.quality, each.steps) for each in found.pretraining] == [("weak", 300), ("strong", 3000)]
    weak, strong = (each.seconds or 0.0 for each in found.pretraining)
    assert strong > 3 * weak > 0
    assert found.seconds == pytest.approx(wall_clock([row.work for row in found.rows if row.work], 2) + weak + strong)
    assert found.high is not None
    assert found.high > found.seconds


def test_steps_that_take_too_long_are_not_tried() -> None:
    slow = Timing(0.0, 0.5, 0.9, 1.1, (8,), 1)
    assert calibrate_cohorts([run(0)], network_facts(BASE), slow, seconds=2.0) is None


def test_an_estimate_has_cohorts_and_their_planning() -> None:
    text = "name: t\ntasks: [digits8:flip]\nbase: {kind: random, architecture: logistic, classes: 10}\n"
    found = estimate(parse_grid(text + "learning_rate: [0.1, 0.2]\nbatch_size: 8\nsteps: 15\n"), seconds=0.4, workers=2)
    (row,) = found.rows
    assert row.cohorts is not None
    assert row.work is not None
    assert found.seconds == pytest.approx(wall_clock([row.work], 2))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.seconds < found.high
