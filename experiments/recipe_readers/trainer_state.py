"""Hugging Face's ``trainer_state.json``, with a JSON dump of ``TrainingArguments``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.recipe_readers.files import Values, read_json
from experiments.recipe_readers.reading import NOT_COVERED, Notebook, RecipeReading, count_devices, plain_schedule
from theory import RecipeError, Schedule, schedules

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
    state = Values(path, read_json(path))
    if "global_step" not in state.content:
        raise RecipeError(
            f"{path}: has no global_step, so it is not trainer_state.json; give a run's trainer_state.json"
        )
    book = Notebook()
    arguments_path = _beside(path, _ARGUMENT_FILES)
    results_path = _beside(path, _RESULT_FILES)
    arguments = Values(arguments_path or path, {} if arguments_path is None else read_json(arguments_path))
    results = Values(results_path or path, {} if results_path is None else read_json(results_path))
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
    workers = count_devices(book, devices)
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


def _trainer_optimizer(arguments: Values, book: Notebook, *, known: bool) -> None:
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
    state: Values,
    arguments: Values,
    results: Values,
    book: Notebook,
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


def _trainer_rates(arguments: Values, book: Notebook, log: _Log, steps: int, planned: int) -> None:
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
        book.known["learning_rate"] = plain_schedule(Schedule(made.values[:steps]))
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
    book.known["learning_rate"] = plain_schedule(Schedule(np.interp(np.arange(steps), index, log.rates)))
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


def _trainer_log(book: Notebook, log: _Log, steps: int) -> None:
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
