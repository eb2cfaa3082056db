"""The comparison, unit by unit: pilots, advice, experts of judged tasks, and merges measured on test images.

Every unit (network, budget) writes one JSON file when it is finished; a second call goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.advise.compare_spec import CompareSpec
from experiments.advise.pilot import run_pilot, train_runs
from experiments.advise.training import TrainingAdvice, advise_training, run_of
from experiments.atomic import write_atomically
from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from experiments.measure.predictors.merges import Merge, merged_vector
from experiments.measure.subject import Subject, draw
from experiments.store import Store
from theory.function_space import cross_entropy

_SPLITS, _RECIPES = 0x5B117, 0x6E0
Say = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One network with one budget."""

    network: str
    samples: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.network}-{self.samples}"


def units(spec: CompareSpec) -> tuple[Unit, ...]:
    """All units, in order."""
    return tuple(Unit(network, samples) for network in spec.networks for samples in spec.samples)


def splits(spec: CompareSpec, tasks: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(advised, judged) tasks of every split, different ones, drawn by the seed."""
    rng = np.random.default_rng([spec.seed, _SPLITS])
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for _ in range(1000 * spec.splits):
        order = [int(i) for i in rng.permutation(tasks)]
        advised = tuple(sorted(order[: spec.advised]))
        found.setdefault(advised, tuple(sorted(order[spec.advised :])))
        if len(found) == spec.splits:
            break
    return tuple(found.items())


def run_comparison(
    spec: CompareSpec,
    work: Path,
    *,
    root: str | Path | None = None,
    workers: int | None = None,
    say: Say = lambda line: None,
) -> dict[str, list[Row]]:
    """Do what is missing, and return the rows of all finished units by table (``training``, ``merging``, ``advice``).

    Raises:
        MergeboundError: what pilots, grids and advice raise.
    """
    found: dict[str, list[Row]] = {"training": [], "merging": [], "advice": []}
    for unit in units(spec):
        path = work / spec.digest() / f"{unit.name}.json"
        if path.exists():
            content = json.loads(path.read_text())
        else:
            say(f"{unit.name}: begins")
            content = _unit(spec, unit, work / spec.digest() / unit.name, root, workers, say)
            write_atomically(path, json.dumps(content).encode())
        for name, rows in content.items():
            found[name] += rows
    return found


def _unit(
    spec: CompareSpec, unit: Unit, folder: Path, root: str | Path | None, workers: int | None, say: Say
) -> dict[str, list[Row]]:
    from experiments.tasks.named import anchored, expand

    tasks = tuple(anchored(task) for task in expand(spec.tasks))
    base = BaseSpec(architecture=unit.network, **spec.base)
    pilot = spec.pilot.model_copy(update={"seed": spec.seed})
    advices: list[TrainingAdvice] = []
    chosen = splits(spec, len(tasks))
    for number, (advised, _) in enumerate(chosen):
        say(f"{unit.name}: advice {number + 1} of {len(chosen)}")
        made = run_pilot(
            pilot, tasks, base, unit.samples, folder / "pilot", root=root, workers=workers,
            judged=[tasks[i] for i in advised], say=lambda line: None,
        )  # fmt: skip
        advices.append(
            advise_training([tasks[i] for i in advised], base, unit.samples, folder / "pilot", made=made, root=root)
        )
    customary = {
        name: tuple(customary_run(fields, task, base, unit.samples, spec.seed) for task in tasks)
        for name, fields in spec.recipes.items()
    }
    wanted: dict[str, RunSpec] = {}
    for (_, judged), advice in zip(chosen, advices, strict=True):
        for i in judged:
            run = run_of(advice.recipe, tasks[i], base, spec.seed)
            wanted[_key(run)] = run
    for usual_runs in customary.values():
        wanted |= {_key(run): run for run in usual_runs}
    say(f"{unit.name}: {len(wanted)} experts")
    train_runs(list(wanted.values()), folder / "experts", root=root, workers=workers, say=lambda line: None)
    training: list[Row] = []
    with Store.open(folder / "experts", "r") as store:
        digests = {_key(store.spec(digest)): digest for digest in store.runs()}
        for number, ((_, judged), advice) in enumerate(zip(chosen, advices, strict=True)):
            about = {
                "network": unit.network, "samples": unit.samples, "split": number,
                "judged": ";".join(_short(tasks[i]) for i in judged),
            }  # fmt: skip
            runs = [run_of(advice.recipe, tasks[i], base, spec.seed) for i in judged]
            scale = advice.coefficient * spec.advised  # lambda N carries over to as many judged experts as there are
            methods: dict[str, Merge] = {"advised": Merge(alpha=np.full(len(judged), scale / len(judged)))}
            methods["average"] = Merge(method="average")
            training += _measured(spec, store, digests, runs, "advice", methods, about, root)
            for name, all_runs in customary.items():
                usual = {label: Merge(method=label, settings=set_) for label, set_ in spec.methods.items()}
                training += _measured(
                    spec, store, digests, [all_runs[i] for i in judged], name, usual, about, root
                )  # fmt: skip
    advice_rows = [_advice_row(unit, n, advice) for n, advice in enumerate(advices)]
    merging = _merging(spec, unit, tasks, folder, root, say) if spec.groups else []
    return {"training": training, "merging": merging, "advice": advice_rows}


def customary_run(fields: Mapping[str, Any], task: str, base: BaseSpec, samples: float, seed: int) -> RunSpec:
    """A customary recipe with all samples of the budget."""
    steps = max(1, int(samples / int(fields["batch_size"])))
    return RunSpec(task=task, base=base, steps=steps, seed=seed, **dict(fields))


def _key(run: RunSpec) -> str:
    return run.model_dump_json(exclude={"base"})


def _short(task: str) -> str:
    return Path(task).name if Path(task).is_absolute() else task


def _measured(
    spec: CompareSpec,
    store: Store,
    digests: Mapping[str, str],
    runs: Sequence[RunSpec],
    recipe: str,
    methods: Mapping[str, Merge],
    about: Row,
    root: str | Path | None,
) -> list[Row]:
    """Test loss and accuracy of merges of some runs by some methods; a run that diverged makes all of them so."""
    from experiments.measure.opening import from_store

    named = [digests[_key(run)] for run in runs]
    if any(store.outcome(digest) != "finished" for digest in named):
        nothing = {"loss": np.nan, "accuracy": 0.0, "own_loss": np.nan, "own_accuracy": 0.0, "diverged": True}
        return [about | {"recipe": recipe, "method": name, "tier": "measured", "seed": spec.seed} | nothing
                for name in methods]  # fmt: skip
    subject = from_store(store, named, images=8, seed=spec.seed, root=root)
    return [
        about | {"recipe": recipe, "method": name, "diverged": False, "tier": "measured", "seed": spec.seed} | row
        for name, row in zip(methods, judged_on_test(subject, list(methods.values()), spec), strict=True)
    ]


def judged_on_test(subject: Subject, merges: Sequence[Merge], spec: CompareSpec) -> list[Row]:
    """Joint loss (nats) and accuracy of merges and of the experts alone on test images."""
    splits_ = []
    for data in subject.test:
        assert data is not None  # experts of a store have tests
        splits_.append(draw(data, spec.test_images, spec.seed))

    def pair(j: int, vector: Tensor) -> tuple[float, float]:
        parts = [subject.networks[j].features(vector, part) for part in torch.split(splits_[j].images, 256)]
        logits = np.nan_to_num(torch.cat(parts).double().numpy(), nan=0.0, posinf=1e6, neginf=-1e6)
        labels = splits_[j].labels.numpy()
        return float(cross_entropy(logits, labels).mean()), float((logits.argmax(axis=-1) == labels).mean())

    own = np.array([pair(j, subject.vectors[j]) for j in range(subject.size)]).mean(axis=0)
    rows = []
    for merge in merges:
        vector = merged_vector(subject, merge, spec.seed)
        found = np.array([pair(j, vector) for j in range(subject.size)]).mean(axis=0)
        rows.append(
            {"loss": float(found[0]), "accuracy": float(found[1]), "own_loss": float(own[0]),
             "own_accuracy": float(own[1])}
        )  # fmt: skip
    return rows


def _advice_row(unit: Unit, number: int, advice: TrainingAdvice) -> Row:
    first = advice.changes[advice.changes["what"] != "everything as recommended"]
    return {
        "network": unit.network,
        "samples": unit.samples,
        "split": number,
        **{name: float(value) for name, value in advice.recipe.items()},
        "scale": advice.coefficient * len(advice.pilot.tasks),
        "experts": advice.experts,
        "predicted": advice.predicted.value,
        "low": advice.predicted.low,
        "high": advice.predicted.high,
        "source": advice.source,
        "spearman": advice.quality.spearman,
        "median_error": advice.quality.median_error,
        "active": advice.active,
        "theory": advice.theory.verdict,
        "bound": None if not np.isfinite(advice.theory.bound) else advice.theory.bound,
        "active_of_bound": advice.theory.active,
        "first_change": str(first.iloc[0]["what"]) if len(first) else "",
        "pilot_samples": advice.samples["pilot"],
        "training_samples": advice.samples["training"],
        "tier": advice.predicted.tier,
        "seed": advice.seed,
    }


def _merging(
    spec: CompareSpec, unit: Unit, tasks: Sequence[str], folder: Path, root: str | Path | None, say: Say
) -> list[Row]:
    """Groups of pilot experts with recipes of their own: `advise merge` beside usual methods, on test images."""
    from experiments.advise.making import with_merge
    from experiments.advise.merging import advise_merge
    from experiments.measure.opening import from_store

    rows: list[Row] = []
    rng = np.random.default_rng([spec.seed, _RECIPES])
    with Store.open(folder / "pilot", "r") as store:
        by_task: dict[str, list[str]] = {}
        for digest in sorted(store.runs()):
            if store.outcome(digest) == "finished":
                by_task.setdefault(store.spec(digest).task, []).append(digest)
        for number in range(spec.groups):
            say(f"{unit.name}: group {number + 1} of {spec.groups}")
            chosen = sorted(int(i) for i in rng.permutation(len(tasks))[: spec.advised])
            named = [by_task[tasks[i]][int(rng.integers(len(by_task[tasks[i]])))] for i in chosen]
            subject = from_store(store, named, images=spec.calibration_images, seed=spec.seed, root=root)
            advice = advise_merge(subject, seed=spec.seed)
            best = (
                with_merge(advice, advice.label)
                if (advice.candidates.loc[advice.candidates["label"] == advice.label, "coefficients"] != "").any()
                else Merge(method=advice.method, settings=advice.settings)
            )
            merges = {"advised": best} | {
                name: Merge(method=name, settings=set_) for name, set_ in spec.group_methods.items()
            }
            about = {
                "network": unit.network, "samples": unit.samples, "group": number,
                "experts": ";".join(f"{_short(tasks[i])}@{d[:8]}" for i, d in zip(chosen, named, strict=True)),
                "label": advice.label, "left_out": len(advice.left_out), "judge": advice.judge,
                "predicted": advice.predicted.value, "low": advice.predicted.low, "high": advice.predicted.high,
                "checked": advice.risk.value, "checked_low": advice.risk.low, "checked_high": advice.risk.high,
                "base": advice.base.value, "active": advice.account.active, "bound": advice.account.bound,
            }  # fmt: skip
            for name, row in zip(merges, judged_on_test(subject, list(merges.values()), spec), strict=True):
                rows.append(about | {"method": name, "tier": "measured", "seed": spec.seed} | row)
    return rows


def frames(found: Mapping[str, Sequence[Row]]) -> dict[str, pd.DataFrame]:
    """Tables of rows."""
    return {name: pd.DataFrame(list(rows)) for name, rows in found.items()}
