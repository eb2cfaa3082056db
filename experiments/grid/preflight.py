"""Whether a grid can be run here: looked at before anything runs, all problems at once, each with its line."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.bases.spec import BaseSpec
from experiments.finetune.low_rank import matrices
from experiments.grid.bases import base_specs, weights_file
from experiments.grid.cost import shapes
from experiments.grid.errors import GridError, Place
from experiments.grid.expand import expansion, origin
from experiments.grid.facts import TaskFacts, facts_of, published_facts
from experiments.grid.remarks import one_source
from experiments.grid.run_spec import RunSpec
from experiments.grid.spec import GridSpec
from experiments.grid.yaml_source import GridFile
from experiments.inputs.shares import subset_size
from experiments.models import head_tensors, input_format
from experiments.tasks.catalogue import find
from experiments.tasks.dataset import ImageTask
from experiments.tasks.named import expand as expand_tasks
from experiments.tasks.named import open_task
from theory.errors import MergeboundError


def check_grid(
    grid: GridFile | GridSpec,
    root: str | Path | None = None,
    store: str | Path | None = None,
    device: str = "cpu",
    *,
    download: bool = False,
    runs: Sequence[RunSpec] | None = None,
) -> list[GridError]:
    """What would stop a grid, before anything runs.

    Every data set is opened, every network built (its shapes), every file of weights looked for; batches are compared
    with the training images that are there; store, disk and device are tried.

    Args:
        grid: read from a file (problems then have their line), or made in Python.
        root: folder of the data sets; default: what ``MERGEBOUND_DATA`` names.
        store: folder that the results will go to; ``None`` leaves it out.
        device: ``cpu`` or ``cuda`` (``cuda:0``).
        download: whether published weights may be downloaded when the grid runs.
        runs: of the grid, where they are known already.

    Returns:
        the problems, in the order of the file; empty where the grid can be run.  A problem with the device or the store
        names the option of the command line, or the line of the file that says so.
    """
    spec = grid.spec if isinstance(grid, GridFile) else grid
    try:
        runs = expansion(spec).runs if runs is None else runs
    except GridError as error:
        return [_placed(grid, error)]
    found = [said_by(spec, "device", device, each) for each in check_device(device)]
    found += [said_by(spec, "store", store, each) for each in ([] if store is None else check_store(store))]
    tasks, problems = open_tasks(spec, runs, root)
    found += problems
    found += _check_bases(spec, root, download, tasks)
    facts = _facts(runs, tasks, root)
    found += check_batches(spec, runs, facts)
    if not found:
        found += check_parts(spec, runs)
        found += check_lone_images(spec, runs, facts)
    placed = {str(error): error for error in (_placed(grid, each) for each in found)}
    return sorted(placed.values(), key=lambda error: error.line or 0)


def _facts(
    runs: Iterable[RunSpec], tasks: Mapping[tuple[str, int], ImageTask], root: str | Path | None
) -> dict[tuple[str, int], TaskFacts]:
    """Sizes of the tasks that are open, and of the others as published, where they are."""
    found: dict[tuple[str, int], TaskFacts] = {}
    for key in dict.fromkeys((run.task, run.split_seed) for run in runs):
        try:
            found[key] = facts_of(key[0], tasks[key]) if key in tasks else published_facts(key[0], root)
        except MergeboundError:
            continue  # a file or folder that cannot be read, which is a problem of its own
    return found


def said_by(spec: GridSpec, name: str, value: object, error: GridError) -> GridError:
    """A problem with a device or store, in the file where the file says so, else with the option."""
    if getattr(spec, name) is None or str(getattr(spec, name)) != str(value):
        return error
    return GridError(error.message.removeprefix(f"--{name} "), (name,))


def _placed(grid: GridFile | GridSpec, error: GridError) -> GridError:
    return grid.error(error) if isinstance(grid, GridFile) and error.place else error


def check_device(device: str) -> list[GridError]:
    """Whether there is such a device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        return [GridError(f"--device {device}: there is no such kind of device; give cpu or cuda")]
    if kind == "cpu":
        return []
    if kind == "cuda" and not torch.cuda.is_available():
        return [GridError(f"--device {device}: PyTorch finds no GPU here; give --device cpu or use a machine with one")]
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        return [GridError(f"--device {device}: cannot be used ({reason}); give another one")]
    return []


def existing(folder: str | Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = Path(folder).expanduser().absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def check_store(folder: str | Path) -> list[GridError]:
    """Whether a store can be written in a folder, by writing an empty file where it will be."""
    there = existing(folder)
    if not there.is_dir():
        return [GridError(f"--store {folder}: {there} is a file; give a folder")]
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        said = f"{there} cannot be written ({error.strerror})"
        return [GridError(f"--store {folder}: {said}; change its permissions or give another folder")]
    return []


def check_disk(folder: str | Path, needed: int) -> list[GridError]:
    """Whether so many bytes fit on the disk of a folder."""
    free = shutil.disk_usage(existing(folder)).free
    if needed <= free:
        return []
    said = f"the checkpoints need {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free"
    return [GridError(f"--store {folder}: {said}; keep fewer checkpoints or give a folder on another disk")]


def open_tasks(
    spec: GridSpec, runs: Iterable[RunSpec], root: str | Path | None
) -> tuple[dict[tuple[str, int], ImageTask], list[GridError]]:
    """The tasks of a grid by name and split seed, and problems with those that cannot be opened."""
    tasks: dict[tuple[str, int], ImageTask] = {}
    problems: dict[str, GridError] = {}
    for name, seed in dict.fromkeys((run.task, run.split_seed) for run in runs):
        if name in problems:
            continue
        try:
            tasks[name, seed] = open_task(name, root, seed=seed)
        except MergeboundError as error:
            problems[name] = GridError(_with_remedy(name, str(error), root), _task_place(spec, name))
    return tasks, list(problems.values())


def _with_remedy(name: str, message: str, root: str | Path | None) -> str:
    """How a data set of the catalogue can be got, where the message does not say it."""
    try:
        advice = find(name).advice(root or "DIR")
    except MergeboundError:
        return message
    return message if "mergebound data get" in message or advice in message else f"{message}; get it with: {advice}"


def _task_place(spec: GridSpec, name: str) -> Place:
    return next((("tasks", k) for k, each in enumerate(spec.tasks) if name in expand_tasks([each])), ("tasks",))


def _check_bases(
    spec: GridSpec, root: str | Path | None, download: bool, tasks: Mapping[tuple[str, int], ImageTask]
) -> list[GridError]:
    found = []
    for number, content in enumerate(spec.base):
        for base in base_specs(content):
            error = _base_problem(base, root, download, tasks)
            if error is not None:
                found.append(error.at(("base", number)))
    return found


def _base_problem(
    base: BaseSpec, root: str | Path | None, download: bool, tasks: Mapping[tuple[str, int], ImageTask]
) -> GridError | None:
    place = "architecture"
    try:
        form = input_format(shapes(base, base.classes or 10))
        place = "weights"
        if base.weights is not None:
            weights_file(base, root)
        elif base.kind == "pretrained" and not download:
            from experiments.bases.pretrained import known, locate

            place = "architecture"
            locate(base.architecture, known(base.architecture), download=False)
        elif base.kind == "pretrain":
            place = "data"
            if not base.data:
                return GridError("a base of kind pretrain needs data: the task that it is pretrained on", ("kind",))
            for other, seed in tasks:
                if seed != 0 and one_source(other, base.data):
                    said = (
                        f"it is pretrained on split 0 of {base.data}, whose images split {seed} of {other} may test on"
                    )
                    return GridError(f"{said}; leave split_seed at 0, or pretrain on other data", (place,))
            if not any(base.data == name for name, _ in tasks):
                open_task(base.data, root)
        place = "architecture"
        for (name, _), task in tasks.items():
            stored = int(task.train.read(0).shape[2])
            if stored not in (1, form.channels):
                said = f"{name} has images of {stored} channels, but {base.architecture} takes {form.channels}"
                return GridError(
                    f"{said}; give the base options: {{in_chans: {stored}}}, or leave the task out", (place,)
                )
    except MergeboundError as error:
        return GridError(str(error), (place,))
    return None


def check_batches(
    spec: GridSpec, runs: Iterable[RunSpec], tasks: Mapping[tuple[str, int], TaskFacts]
) -> list[GridError]:
    """Runs whose batch is larger than the training images that they use: one problem per task and place."""
    worst: dict[tuple[str, Place], tuple[int, int, RunSpec]] = {}
    counts: dict[tuple[str, Place], int] = {}
    for run in runs:
        facts = tasks.get((run.task, run.split_seed))
        if facts is None:
            continue
        used = subset_size(facts.train, run.data_share)
        if run.batch_size > used:
            key = (run.task, origin(spec, run, "batch_size"))
            counts[key] = counts.get(key, 0) + 1
            if key not in worst or used < worst[key][1]:
                worst[key] = (run.batch_size, used, run)
    return [
        GridError(
            f"{size} is larger than the {used} training images of {task} that data_share {run.data_share:g} leaves "
            f"({counts[task, place]} runs); lower it, raise data_share or exclude these runs",
            place,
        )
        for (task, place), (size, used, run) in worst.items()
    ]


def check_parts(spec: GridSpec, runs: Iterable[RunSpec]) -> list[GridError]:
    """Runs that train a part which their network does not have."""
    found: dict[tuple[str, Place], GridError] = {}
    lacking: dict[tuple[str, str], str] = {}
    for run in runs:
        if run.trained not in ("backbone", "low_rank"):
            continue
        key = (run.trained, run.base.model_dump_json())
        if key not in lacking:
            network = shapes(run.base, run.base.classes or 10)
            head = head_tensors(network)
            there = [name for name, _ in network.named_parameters() if name not in head]
            there = there if run.trained == "backbone" else list(matrices(network, head))
            what = "no parameters" if run.trained == "backbone" else "no matrices"
            lacking[key] = "" if there else f"{run.architecture} has {what} outside its head"
        if lacking[key]:
            place = origin(spec, run, "trained")
            said = f"{run.trained}: {lacking[key]}; train it in full, or leave the network out"
            found.setdefault((lacking[key], place), GridError(said, place))
    return list(found.values())


def check_lone_images(
    spec: GridSpec, runs: Iterable[RunSpec], tasks: Mapping[tuple[str, int], TaskFacts]
) -> list[GridError]:
    """Runs with a batch of one image, where BatchNorm has one number per channel: one problem per task and place."""
    found: dict[tuple[str, Place], GridError] = {}
    needs: dict[str, bool] = {}
    for run in runs:
        facts = tasks.get((run.task, run.split_seed))
        if facts is None or run.trained not in ("full", "backbone"):
            continue
        used = subset_size(facts.train, run.data_share)
        last = run.sampling == "reshuffle" and used % run.batch_size == 1 and run.steps > used // run.batch_size
        if run.batch_size > 1 and not last:
            continue
        key = run.base.model_dump_json()
        if key not in needs:
            needs[key] = _needs_two(run.base)
        if needs[key]:
            place = origin(spec, run, "batch_size")
            which = f"the last of an epoch of {used} images of {run.task} holds one" if last else "hold one image"
            said = f"batches of {run.batch_size}: {which}, which {run.architecture}'s BatchNorm cannot normalise"
            remedy = "give another batch_size or data_share, or sampling: without_replacement"
            found.setdefault((run.task, place), GridError(f"{said}; {remedy if last else 'give 2 or more'}", place))
    return list(found.values())


def _needs_two(base: BaseSpec) -> bool:
    """Whether a network cannot be trained on one image; found by its shapes."""
    network = shapes(base, base.classes or 10)
    form = input_format(network)
    device = next(network.parameters()).device
    try:
        network.train()(torch.zeros(1, form.channels, form.height, form.width, device=device))
    except ValueError as error:  # PyTorch's own words
        return "more than 1 value per channel" in str(error)
    except (RuntimeError, NotImplementedError):  # an operation that shapes alone do not tell
        return False
    return False


def facts_without_data(
    names: Iterable[str], root: str | Path | None, opened: Mapping[tuple[str, int], ImageTask]
) -> dict[str, TaskFacts]:
    """Sizes of tasks by name: of the data where they are open, else as published.

    Raises:
        MergeboundError: a path that cannot be read.
    """
    known: dict[str, Any] = {name: task for (name, _), task in opened.items()}
    return {name: facts_of(name, known[name]) if name in known else published_facts(name, root) for name in names}
