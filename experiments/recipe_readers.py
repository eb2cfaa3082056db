"""Read how an expert was trained from the files that other tools leave: timm's ``args.yaml`` (with ``summary.csv``) and
Hugging Face's ``trainer_state.json`` with a JSON dump of ``TrainingArguments``.

Every key is mapped, listed as unknown (with what to give), or listed as ignored with the reason; nothing is guessed
silently: what is assumed (one device, the tool's default) is in ``notes``.  Units: ``n`` samples, ``batch_size``
samples per optimisation step over all devices and accumulated batches, ``steps`` optimisation steps, learning rates as
used by each step.  Constants of the loss (L, gradient norms, risks) are in no such file and stay unknown.

``training_args.bin`` is a pickle, which runs code when it is opened: it is never read.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from theory import Expert, RecipeError, Schedule, schedules
from theory.unknown import Range

REQUIRED = {
    "n": "the number of training samples",
    "batch_size": "samples per optimisation step over all devices",
    "learning_rate": "one number, or a schedule with one value per step",
    "steps": "the number of optimisation steps",
}
NOT_COVERED = (
    "is not covered by the stability and drift theorems: give the measured drift (norm of the task vector), and "
    "epsilon if it was measured; the bound is then estimated"
)
LARGEST_FILE = 200_000_000


@dataclass(frozen=True)
class RecipeReading:
    """What the files of one run say: ``known`` fields of :class:`theory.Expert`; ``unknown`` fields with what to give;
    ``ranges`` of fields that the files only bracket; ``ignored`` keys with the reason; ``notes`` (assumptions of the
    theory that the run touches, defaults that were assumed); ``per_sample_loss`` (A3): False where it is broken;
    ``interpolated``: known fields that the log has only for some steps; ``assumed``: known fields that rest on a guess
    (the number of devices, accumulated batches, a default of the tool)."""

    name: str
    tool: str
    files: tuple[Path, ...]
    known: Mapping[str, Any]
    unknown: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    ignored: Mapping[str, str]
    notes: tuple[str, ...]
    per_sample_loss: bool | None = None
    interpolated: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Known fields, and the middle (a whole number) of those that are only bracketed."""
        middles = {name: round((low + high) / 2) for name, (low, high) in self.ranges.items()}
        return {**middles, **self.known}

    @property
    def guessed(self) -> tuple[str, ...]:
        """Fields at the middle of a bracket, interpolated from a log, or resting on a guess: whatever uses them is
        *estimated*, and the bound's assumptions name them."""
        brackets = (name for name in self.ranges if name not in self.known)
        assumed = (name for name in self.assumed if name in self.known)
        return tuple(dict.fromkeys((*brackets, *self.interpolated, *assumed)))

    def expert(self, **given: Any) -> Expert:
        """The expert, with ``given`` fields added or put in place of those read; the files' gaps are named."""
        values = {**self.fields(), **given}
        values["measured"] = frozenset(values.get("measured", ())) | (set(self.guessed) - given.keys())
        scheduled = any(isinstance(values.get(name), Schedule) for name in ("learning_rate", "batch_size"))
        missing = [name for name in REQUIRED if name not in values and not (name == "steps" and scheduled)]
        if missing:
            what = self.unknown.get(missing[0], REQUIRED[missing[0]])
            raise RecipeError(f"{self.files[0]}: {missing[0]} is not in the files; give {what}")
        return Expert(self.name, **values)

    def stated(self) -> dict[str, Range]:
        """The brackets as ranges for :func:`theory.unknown.bound_interval`."""
        return {f"{self.name}.{name}": Range(low, high) for name, (low, high) in self.ranges.items()}

    def explain(self) -> str:
        """Readable list of what is known, bracketed, unknown, ignored and assumed."""
        lines = [f"{self.name}: {self.tool} ({', '.join(path.name for path in self.files)})", ""]
        for name, value in self.known.items():
            shown = f"schedule of {value.steps} steps" if isinstance(value, Schedule) else value
            lines.append(f"  {name} = {shown}")
        lines += [f"  {name} between {low:g} and {high:g}" for name, (low, high) in self.ranges.items()]
        lines += [f"unknown: {name}: give {what}" for name, what in self.unknown.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"ignored: {name}: {why}" for name, why in self.ignored.items()]
        return "\n".join(lines)


@dataclass
class _Notebook:
    """Collects what a reader finds."""

    known: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    per_sample_loss: bool | None = None
    interpolated: tuple[str, ...] = ()
    assumed: list[str] = field(default_factory=list)

    def close(self, name: str, tool: str, files: tuple[Path, ...]) -> RecipeReading:
        return RecipeReading(
            *(name, tool, files, self.known, self.unknown, self.ranges, self.ignored, tuple(self.notes)),
            self.per_sample_loss,
            self.interpolated,
            tuple(dict.fromkeys(self.assumed)),
        )


# --- files ------------------------------------------------------------------------------------------------------------


def read_run(path: Path, *, name: str | None = None, n: int | None = None, devices: int | None = None) -> RecipeReading:
    """Read a run from its folder or file; the tool is recognised by the files.

    ``n``: number of training samples (in no file of timm's, rarely in Hugging Face's); ``devices``: number of
    processes that trained together (in no file; one is assumed and noted).  Raises :class:`theory.RecipeError` for
    files that cannot be read, for pickles, and for numbers that make no sense, with file, key and remedy.
    """
    for label, value in (("n", n), ("devices", devices)):
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
            raise RecipeError(f"{path}: {label} is {value!r}; give a whole number of at least 1")
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle"):
        raise RecipeError(
            f"{path}: is a pickle, which can run any code when it is opened, so it is not read; write the arguments as "
            "JSON where they were made (training_args.to_json_string() into training_args.json)"
        )
    if path.is_dir():
        if (path / "args.yaml").is_file():
            return read_timm(path / "args.yaml", name=name, n=n, devices=devices)
        state = _state_in(path)
        if state is not None:
            return read_trainer(state, name=name, n=n, devices=devices)
        pickled = " (training_args.bin is a pickle and is not read)" if (path / "training_args.bin").is_file() else ""
        raise RecipeError(
            f"{path}: holds neither args.yaml (timm) nor trainer_state.json (Hugging Face){pickled}; give the folder "
            "of one training run"
        )
    if path.suffix in (".yaml", ".yml"):
        return read_timm(path, name=name, n=n, devices=devices)
    if path.suffix == ".json":
        return read_trainer(path, name=name, n=n, devices=devices)
    raise RecipeError(f"{path}: is neither args.yaml nor trainer_state.json; give a training run's folder or file")


def _state_in(folder: Path) -> Path | None:
    """``trainer_state.json`` of the folder, or of its last checkpoint."""
    if (folder / "trainer_state.json").is_file():
        return folder / "trainer_state.json"
    found = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        number = path.parent.name.removeprefix("checkpoint-")
        if number.isdigit():
            found.append((int(number), path))
    return max(found)[1] if found else None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError(f"{path}: is larger than {LARGEST_FILE // 10**6} MB; give the file that the tool wrote")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror or error}); give a training run's file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not a text file; give args.yaml or trainer_state.json") from error


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds no mapping of names to values; give the file that the tool wrote")
    return {str(key): value for key, value in content.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(path, json.loads(_text(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: is not valid JSON; give the file that the tool wrote") from error


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return _mapping(path, yaml.safe_load(_text(path)))
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"{path}: is not plain YAML (Python objects are not read); give the args.yaml that timm wrote"
        ) from error


class _Values:
    """The keys of a file, taken one by one; numbers are checked, what is left over can be listed."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content, self.taken = path, content, set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        value = self.content.get(key, default)
        return default if value is None else value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float | None:
        value = self.get(key, default)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{self.path}: {key} is {value!r}; it should be a number") from error
        if isinstance(value, bool) or not math.isfinite(number) or number < least:
            raise RecipeError(f"{self.path}: {key} is {value!r}; it should be a finite number of at least {least:g}")
        return number

    def whole(self, key: str, default: int | None = None, *, least: int = 0) -> int | None:
        number = self.number(key, default, least=least)
        if number is None:
            return None
        if number != int(number):
            raise RecipeError(f"{self.path}: {key} is {number:g}; it should be a whole number")
        return int(number)

    def left(self) -> list[str]:
        return [key for key in self.content if key not in self.taken]


def _plain_schedule(values: Schedule) -> float | Schedule:
    """One number if the schedule is constant."""
    first = float(values.values[0])
    return first if np.all(values.values == first) else values


# --- timm -------------------------------------------------------------------------------------------------------------

_TIMM_SGD = {
    # name: (nesterov, decoupled decay)
    "sgd": (True, False),
    "nesterov": (True, False),
    "momentum": (False, False),
    "sgdw": (True, True),
}
_TIMM_DATA = ("data", "data_dir", "dataset", "train_split", "val_split", "num_classes", "class_map", "img_size")


def read_timm(
    path: Path, *, name: str | None = None, n: int | None = None, devices: int | None = None
) -> RecipeReading:
    """Read ``args.yaml`` of timm's training script, and the ``summary.csv`` next to it.

    timm's conventions: ``opt: sgd`` is Nesterov momentum (0.9 unless given), ``momentum`` heavy ball, ``sgdw``
    decoupled decay; the training loader drops the last short batch; the learning rate follows the scheduler once per
    epoch unless ``sched_on_updates``; ``lr: null`` means ``lr_base`` scaled by the global batch size; cool-down epochs
    come on top of ``epochs`` for cosine, tanh and poly.  ``summary.csv`` says how many epochs were run and which rates
    were used.  Raises :class:`theory.RecipeError`.
    """
    values, book = _Values(path, _yaml(path)), _Notebook()
    if "opt" not in values.content and "sched" not in values.content:
        raise RecipeError(f"{path}: has neither opt nor sched, so it is not timm's args.yaml; give a run's args.yaml")
    workers = _devices(book, devices)
    per_device = values.whole("batch_size", 128, least=1) or 128
    accumulated = values.whole("grad_accum_steps", 1, least=1) or 1
    total = per_device * workers * accumulated
    if values.get("batch_size") is None:
        book.assumed.append("batch_size")
        book.notes.append("batch_size is not in the file: 128 per device, the tool's default, is assumed")
    samples = n if n is not None else values.whole("train_num_samples", least=1)
    _timm_optimizer(values, book)
    rate = _timm_rate(values, book, total)
    _timm_loss(values, book)
    summary = _summary(path.with_name("summary.csv"), book)
    files = (path,) if summary is None else (path, path.with_name("summary.csv"))
    book.known |= {"sampling": "reshuffle", "drop_last": True}
    if samples is None:
        book.unknown["n"] = "the number of training samples (n=...; the file does not have it)"
        book.known["batch_size"] = total
        book.unknown["learning_rate"] = "n first: steps per epoch, and with them the schedule, depend on it"
        book.unknown["steps"] = "n first: the number of steps is epochs times steps per epoch"
    else:
        repeats = values.number("epoch_repeats", 0.0) or 0.0
        if repeats > 0:
            book.notes.append("epoch_repeats shows samples several times per epoch: epochs are not single passes")
        seen = int(samples * repeats) if repeats > 0 else samples
        loaded = -(-seen // workers) // per_device  # the sampler pads every device to the same share
        if loaded < 1:
            raise RecipeError(
                f"{path}: batch_size {per_device * workers} over all devices exceeds the {samples} samples; check n "
                "and devices"
            )
        updates = -(-loaded // accumulated)
        book.known |= {"n": samples, "batch_size": total}
        if loaded % accumulated:
            book.notes.append(
                f"the last step of an epoch accumulates {loaded % accumulated} batches instead of {accumulated}: its "
                "smaller batch is not in the recipe (steps are counted as they were run)"
            )
        _timm_schedule(values, book, rate, updates, summary)
    if book.assumed:  # steps per epoch, the schedule and scaled learning rates follow from the batch
        book.assumed += ["steps", "learning_rate"]
    for key in _TIMM_DATA:
        if key in values.content:
            values.get(key)
            book.ignored[key] = "names data, which the theory does not use"
    for key in values.left():
        book.ignored[key] = "has no place in the theory (model, speed, logging, augmentation or evaluation)"
    return book.close(name or path.parent.name or "timm run", "timm", files)


def _devices(book: _Notebook, devices: int | None) -> int:
    if devices is None:
        book.notes.append("one device is assumed; give devices=... for a distributed run (the batch grows with it)")
        book.assumed.append("batch_size")
    return devices or 1


def _timm_optimizer(values: _Values, book: _Notebook) -> None:
    name = str(values.get("opt", "sgd")).lower()
    momentum = values.number("momentum", 0.9) or 0.0
    decay = values.number("weight_decay", 2e-5) or 0.0
    if name in _TIMM_SGD:
        nesterov, decoupled = _TIMM_SGD[name]
        book.known |= {"optimizer": "sgd", "momentum": momentum, "weight_decay": decay}
        book.known |= {"nesterov": nesterov and momentum > 0, "decoupled_decay": decoupled}
    else:
        book.known |= {"optimizer": name, "weight_decay": decay}
        book.notes.append(f"optimizer {name} {NOT_COVERED}")
        book.ignored["momentum"] = f"belongs to SGD; the optimizer is {name}"
    if decay > 0:
        book.notes.append("weight decay spares biases and normalisation parameters; the theory decays all alike")
    if values.get("clip_grad") is not None:
        book.known["gradient_clipping"] = True
        book.notes.append(f"gradient clipping (clip_grad) {NOT_COVERED}")
    for key in ("clip_mode", "opt_eps", "opt_betas"):
        if values.get(key) is not None:
            book.ignored[key] = "detail of clipping or of an adaptive optimizer"
    if values.get("layer_decay") is not None:
        book.notes.append("layer_decay gives layers different learning rates; the recipe holds the largest")


def _timm_rate(values: _Values, book: _Notebook, total: int) -> float:
    rate = values.number("lr")
    base = values.number("lr_base", 0.1) or 0.1
    size = values.number("lr_base_size", 256, least=1) or 256
    scale = str(values.get("lr_base_scale", "") or "")
    if rate is not None:
        return rate
    optimizer = str(book.known["optimizer"])
    rule = scale or ("sqrt" if any(word in optimizer for word in ("ada", "lamb")) else "linear")
    ratio = total / size
    found = base * (ratio**0.5 if rule == "sqrt" else ratio)
    book.notes.append(f"learning rate {found:g} follows from lr_base by {rule} scaling with the batch of {total}")
    return found


def _timm_loss(values: _Values, book: _Notebook) -> None:
    mixed = [key for key in ("mixup", "cutmix") if (values.number(key, 0.0) or 0) > 0]
    mixed += [key for key in ("cutmix_minmax",) if values.get(key) is not None]
    mixed += [key for key in ("jsd_loss",) if values.get(key, False)]
    if mixed:
        book.per_sample_loss = False
        book.notes.append(f"{mixed[0]} mixes samples: the loss is not a per-sample loss (A3 is broken)")
    if values.get("smoothing", 0.0):
        book.notes.append("smoothing: the training loss has smoothed labels; risks and constants must be of that loss")
    if values.get("model_ema", False):
        book.notes.append("model_ema averages weights: the theory covers the last iterate, not the average")
    if values.get("resume"):
        book.notes.append("resume: the run continued another one; the recipe describes the whole schedule")
    book.notes.append("BatchNorm in training mode breaks A3 (per-sample loss); the file does not say which layers ran")


@dataclass(frozen=True)
class _Summary:
    epochs: int
    rates: np.ndarray | None


def _summary(path: Path, book: _Notebook) -> _Summary | None:
    """Epochs that were run and the learning rate of each, from timm's ``summary.csv``; None without the file."""
    if not path.is_file():
        return None
    rows = [row for row in csv.DictReader(_text(path).splitlines()) if row.get("epoch") not in (None, "", "epoch")]
    if not rows:
        return None
    try:
        epochs = int(float(rows[-1]["epoch"])) + 1
        rates = np.array([float(row["lr"]) for row in rows]) if all(row.get("lr") for row in rows) else None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: a row has no numbers in epoch and lr; give the file as timm wrote it") from error
    book.ignored["summary.csv: train_loss"] = "average over an epoch of changing weights, with augmentation"
    book.ignored["summary.csv: eval_*"] = "validation results; give a held-out risk to network_bound instead"
    return _Summary(epochs, rates if rates is not None and len(rates) == epochs else None)


def _timm_schedule(values: _Values, book: _Notebook, rate: float, updates: int, summary: _Summary | None) -> None:
    kind = str(values.get("sched", "cosine")).lower()
    epochs = values.whole("epochs", 300, least=1) or 300
    warmup = values.whole("warmup_epochs", 5) or 0
    prefix = bool(values.get("warmup_prefix", False))
    per_update = bool(values.get("sched_on_updates", False))
    warm_rate, final = values.number("warmup_lr", 1e-5) or 0.0, values.number("min_lr", 0.0) or 0.0
    cooldown = values.whole("cooldown_epochs", 0) or 0
    every, factor = values.number("decay_epochs", 90.0) or 90.0, values.number("decay_rate", 0.1)
    milestones = values.get("decay_milestones", [90, 180, 270])
    cycles = values.whole("lr_cycle_limit", 1) or 1
    odd = [key for key in ("lr_noise",) if values.get(key) is not None]
    odd += ["lr_cycle_limit"] if cycles != 1 else []
    odd += [key for key, usual in (("lr_cycle_mul", 1.0), ("lr_k_decay", 1.0)) if values.number(key, usual) != usual]
    for key in ("lr_noise_pct", "lr_noise_std", "lr_cycle_decay", "patience_epochs", "decay_fn", "start_epoch"):
        values.get(key)
    planned = epochs + (cooldown if kind in ("cosine", "tanh", "poly") else 0) + (warmup if prefix else 0)
    run = planned if summary is None else min(summary.epochs, planned)
    if summary is not None and summary.epochs < planned:
        book.notes.append(f"summary.csv has {summary.epochs} of {planned} epochs: the run stopped early, or goes on")
    if summary is None:
        book.notes.append(f"no summary.csv: all {planned} epochs are taken as run")
    book.known["steps"] = run * updates
    scale = 1 if per_update else updates
    span = {} if per_update else {"steps_per_epoch": updates}
    unit = updates if per_update else 1
    length = (planned - (warmup if prefix else 0)) * updates
    made: Schedule | None = None
    whole_every = float(every) == int(every)
    if not odd:
        if kind == "cosine":
            made = schedules.cosine(rate, length, final=final, horizon=epochs * unit, **span)
        elif kind == "step" and whole_every:
            made = schedules.step(rate, length, every=int(every) * unit, factor=float(factor or 0), **span)
        elif kind == "multistep":
            # timm counts a milestone as passed one epoch (or update) earlier than torch
            points = [max(int(point) * unit - 1, 0) for point in milestones]
            made = schedules.multi_step(rate, length, milestones=points, factor=float(factor or 0), **span)
        elif kind in ("none", "constant"):
            made = schedules.constant(rate, length)
    if made is not None and kind != "none":
        made = schedules.linear_warmup(made, warmup * unit, start=warm_rate, peak=rate, shift=prefix, **span)
    if made is not None:
        used = Schedule(made.values[: run * updates])
        book.known["learning_rate"] = _plain_schedule(used)
        _compare(book, used, summary, updates, per_update)
        return
    reason = f"sched {kind}" + (f" with {', '.join(odd)}" if odd else "")
    if summary is not None and summary.rates is not None and not per_update:
        book.known["learning_rate"] = _plain_schedule(Schedule(np.repeat(summary.rates[:run], scale)))
        book.notes.append(f"{reason} is not computed here: learning rates are those of summary.csv, epoch by epoch")
        return
    book.unknown["learning_rate"] = f"a list with one value per step ({reason} is not computed here)"


def _compare(book: _Notebook, used: Schedule, summary: _Summary | None, updates: int, per_update: bool) -> None:
    if summary is None or summary.rates is None or per_update:
        return
    wanted = used.values[::updates][: len(summary.rates)]
    if not np.allclose(wanted, summary.rates[: len(wanted)], rtol=1e-4, atol=1e-12):
        book.notes.append(
            "learning rates of summary.csv (averaged over parameter groups) differ from the schedule of args.yaml; the "
            "latter is used"
        )


# --- Hugging Face -----------------------------------------------------------------------------------------------------

_ARGUMENT_FILES = ("training_args.json", "train_args.json", "args.json")
_RESULT_FILES = ("all_results.json", "train_results.json")


def read_trainer(
    path: Path, *, name: str | None = None, n: int | None = None, devices: int | None = None
) -> RecipeReading:
    """Read ``trainer_state.json`` of Hugging Face's Trainer, and the JSON files next to it or one folder up.

    ``training_args.json`` (``training_args.to_json_string()``) holds the arguments; ``all_results.json`` or
    ``train_results.json`` the number of samples.  Without the arguments the optimizer is unknown (the Trainer's
    default, AdamW with clipping at norm 1, is not covered) and learning rates are interpolated from the log.  Where
    only steps per epoch are known, ``n`` is bracketed.  Raises :class:`theory.RecipeError`.
    """
    state = _Values(path, _json(path))
    if "global_step" not in state.content:
        raise RecipeError(
            f"{path}: has no global_step, so it is not trainer_state.json; give a run's trainer_state.json"
        )
    book = _Notebook()
    arguments_path = _beside(path, _ARGUMENT_FILES)
    results_path = _beside(path, _RESULT_FILES)
    arguments = _Values(arguments_path or path, {} if arguments_path is None else _json(arguments_path))
    results = _Values(results_path or path, {} if results_path is None else _json(results_path))
    if arguments_path is None:
        pickled = " (training_args.bin is a pickle and is not read)" if _beside(path, ("training_args.bin",)) else ""
        book.notes.append(f"no training_args.json{pickled}: optimizer, decay and clipping are not known")
    steps = state.whole("global_step", least=1)
    planned = state.whole("max_steps", steps, least=1)
    if steps is None or planned is None:
        raise RecipeError(f"{path}: global_step is missing; give a run's trainer_state.json")
    if steps < planned:
        book.notes.append(f"stopped at step {steps} of {planned}")
    book.known["steps"] = steps
    _trainer_optimizer(arguments, book, known=arguments_path is not None)
    log = _log(path, state.get("log_history", []))
    workers = _devices(book, devices)
    accumulated = arguments.whole("gradient_accumulation_steps", 1, least=1) or 1
    per_device = arguments.whole("per_device_train_batch_size", least=1) or state.whole("train_batch_size", least=1)
    total = None if per_device is None else per_device * workers * accumulated
    if total is not None and arguments_path is None:
        book.assumed.append("batch_size")
        book.notes.append("one batch per step is assumed: gradient_accumulation_steps is not in trainer_state.json")
    if total is not None:
        book.known["batch_size"] = total
    else:
        book.unknown["batch_size"] = "samples per step: per-device batch times devices times accumulation"
    _trainer_samples(state, arguments, results, book, n, total, planned, accumulated)
    book.known["sampling"] = "reshuffle"
    book.known["drop_last"] = bool(arguments.get("dataloader_drop_last", False))
    if arguments.get("group_by_length", False):
        book.notes.append("group_by_length sorts batches by length: they are not random batches of the theory")
    if workers > 1:
        book.notes.append("several devices pad the last batch of an epoch by repeating samples")
    _trainer_rates(arguments, book, log, steps, planned)
    _trainer_log(book, log, steps)
    if arguments.get("label_smoothing_factor", 0):
        book.notes.append("label_smoothing_factor: risks and constants must be of the smoothed loss")
    if arguments.get("neftune_noise_alpha") is not None:
        book.notes.append(
            "neftune_noise_alpha adds noise to embeddings: the loss is random beyond the choice of batches"
        )
    for source, reason in ((state, "progress or bookkeeping"), (arguments, "speed, logging, saving or evaluation")):
        for key in source.left():
            book.ignored[key] = f"has no place in the theory ({reason})"
    files = tuple(item for item in (path, arguments_path, results_path) if item is not None)
    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    return book.close(name or folder.name or "trainer run", "Hugging Face Trainer", files)


def _beside(path: Path, names: tuple[str, ...]) -> Path | None:
    folders = [path.parent] + ([path.parent.parent] if path.parent.name.startswith("checkpoint-") else [])
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _trainer_optimizer(arguments: _Values, book: _Notebook, *, known: bool) -> None:
    name = str(arguments.get("optim", "adamw_torch" if known else "unknown")).lower().removeprefix("optimizernames.")
    decay = arguments.number("weight_decay", 0.0) or 0.0
    limit = arguments.number("max_grad_norm", 1.0)
    if arguments.get("adafactor", False):
        name = "adafactor"
    book.known["optimizer"] = name
    if known:
        book.known["weight_decay"] = decay
        if decay > 0:
            book.notes.append("weight decay spares biases and normalisation parameters; the theory decays all alike")
    if name == "sgd":
        book.known["momentum"] = 0.0  # the Trainer passes the learning rate only
        if arguments.get("optim_args"):
            book.notes.append("optim_args is not read for SGD; the Trainer passes no momentum")
    else:
        book.notes.append(f"optimizer {name} {NOT_COVERED}")
    if limit is not None and limit > 0:
        book.known["gradient_clipping"] = True
        default = "" if arguments.content.get("max_grad_norm") is not None else ", the Trainer's default"
        book.notes.append(f"gradient clipping (max_grad_norm {limit:g}{default}) {NOT_COVERED}")
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if arguments.get(key) is not None:
            book.ignored[key] = "detail of an adaptive optimizer"


def _trainer_samples(
    state: _Values,
    arguments: _Values,
    results: _Values,
    book: _Notebook,
    n: int | None,
    total: int | None,
    planned: int,
    accumulated: int,
) -> None:
    samples = n if n is not None else results.whole("train_samples", least=1)
    asked = arguments.number("max_steps", -1.0, least=-1.0)
    epochs = None if (asked or -1) > 0 else arguments.number("num_train_epochs") or state.number("num_train_epochs")
    per_epoch = None
    if epochs:
        per_epoch = planned / epochs
    else:
        done, step = state.number("epoch"), state.number("global_step")
        per_epoch = step / done if done and step else None
        if per_epoch is not None:
            book.notes.append("steps per epoch follow from the logged epoch, which is rounded")
    state.get("epoch"), state.get("num_train_epochs")
    if samples is not None:
        book.known["n"] = samples
        if (
            total is not None
            and per_epoch is not None
            and not (per_epoch - 1.01) * total < samples < (per_epoch + 1.01) * total
        ):
            book.notes.append(
                f"{samples} samples in batches of {total} do not give the {per_epoch:g} steps per epoch of the log; "
                "check n, devices and accumulation"
            )
        return
    if total is None or per_epoch is None:
        book.unknown["n"] = "the number of training samples (n=...)"
        return
    # an epoch has ceil(n/B) steps; with accumulation some versions round down, and a dropped batch is not counted
    rounded_up = accumulated == 1 and not arguments.get("dataloader_drop_last", False)
    low = max((math.floor(per_epoch + 1e-9) - 1) * total + 1, total)
    high = math.ceil(per_epoch - 1e-9) * total if rounded_up else (math.ceil(per_epoch - 1e-9) + 1) * total - 1
    book.ranges["n"] = (float(low), float(max(low, high)))


@dataclass(frozen=True)
class _Log:
    steps: np.ndarray
    rates: np.ndarray | None
    losses: np.ndarray | None
    norms: np.ndarray | None


def _log(path: Path, history: Any) -> _Log:
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise RecipeError(f"{path}: log_history is not a list of entries; give the file as the Trainer wrote it")
    rows = [row for row in history if "step" in row and "loss" in row]

    def column(key: str) -> np.ndarray | None:
        try:
            if not rows or not all(row.get(key) is not None for row in rows):
                return None
            found = np.array([float(row[key]) for row in rows])
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{path}: log_history has a {key} that is not a number; check the file") from error
        return found if np.all(np.isfinite(found) & (found >= 0)) else None

    steps = column("step")
    if rows and (steps is None or np.any(np.diff(steps) <= 0)):
        raise RecipeError(f"{path}: the steps of log_history do not increase; give the log of one run")
    return _Log(np.zeros(0) if steps is None else steps, column("learning_rate"), column("loss"), column("grad_norm"))


def _trainer_rates(arguments: _Values, book: _Notebook, log: _Log, steps: int, planned: int) -> None:
    rate = arguments.number("learning_rate", 5e-5 if arguments.content else None)
    kind = str(arguments.get("lr_scheduler_type", "linear")).lower().removeprefix("schedulertype.")
    warm = arguments.number("warmup_steps", 0.0) or 0.0
    share = arguments.number("warmup_ratio", 0.0) or 0.0
    extra = arguments.get("lr_scheduler_kwargs")
    warmup = int(warm) if warm >= 1 else math.ceil(planned * (warm or share))
    makers: dict[str, Callable[[float, int], Schedule]] = {
        "linear": lambda peak, length: schedules.linear(peak, length),
        "cosine": lambda peak, length: schedules.cosine(peak, length),
        "constant_with_warmup": lambda peak, length: schedules.constant(peak, length),
    }
    made: Schedule | None = None
    if rate is not None and not extra:
        if kind == "constant":
            made = schedules.constant(rate, planned)
        elif kind in makers and warmup < planned:
            made = schedules.linear_warmup(makers[kind](rate, planned - warmup), warmup, start=0.0, peak=rate)
    if made is not None:
        book.known["learning_rate"] = _plain_schedule(Schedule(made.values[:steps]))
        if log.rates is not None and not _agrees(made.values, log):
            book.notes.append("logged learning rates differ from the schedule of the arguments; the latter is used")
        return
    why = "arguments are not known" if rate is None else f"lr_scheduler_type {kind} is not computed here"
    if log.rates is None or not len(log.steps):
        book.unknown["learning_rate"] = f"one number, or a list with one value per step ({why}, and the log has none)"
        return
    # a rate of 0 at the last planned step can only be the *next* step's: older versions log it after the scheduler
    after = bool(log.rates[-1] == 0 and log.steps[-1] >= planned)
    index = log.steps - (0 if after else 1)
    book.known["learning_rate"] = _plain_schedule(Schedule(np.interp(np.arange(steps), index, log.rates)))
    if len(set(index)) < steps:
        book.interpolated = ("learning_rate",)
    book.notes.append(
        f"{why}: learning rates are interpolated between {len(log.steps)} logged ones (constant outside; versions "
        "differ by one step in which rate they log)"
    )


def _agrees(values: np.ndarray, log: _Log) -> bool:
    """Whether the log matches the schedule in either version's convention (rate of this step, or of the next)."""
    assert log.rates is not None
    for shift in (1, 0):
        index = (log.steps - shift).astype(int)
        inside = (index >= 0) & (index < len(values))
        if np.allclose(values[index[inside]], log.rates[inside], rtol=1e-3, atol=1e-12):
            return True
    return False


def _trainer_log(book: _Notebook, log: _Log, steps: int) -> None:
    """Losses and gradient norms, where every single step was logged."""
    every = len(log.steps) == steps and np.array_equal(log.steps, np.arange(1, steps + 1))
    if not every:
        book.ignored["log_history: loss"] = "averaged between logged steps; log every step to have batch_losses"
        book.ignored["log_history: grad_norm"] = "one step in many; log every step to have batch_gradient_norms"
        return
    if log.losses is not None:
        book.known["batch_losses"] = Schedule(log.losses)
    if log.norms is not None and book.known.get("weight_decay") == 0:
        book.known["batch_gradient_norms"] = Schedule(log.norms)
        book.notes.append("gradient norms are of one run, before clipping; the theory speaks of their rms over runs")
    elif log.norms is not None:
        book.ignored["log_history: grad_norm"] = "without the weight decay, which the theory's norms include"
