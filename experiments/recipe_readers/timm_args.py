"""timm's ``args.yaml``, with its ``summary.csv``."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.recipe_readers.files import Values, read_text, read_yaml
from experiments.recipe_readers.reading import NOT_COVERED, Notebook, RecipeReading, count_devices, plain_schedule
from theory import RecipeError, Schedule, schedules

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
    values, book = Values(path, read_yaml(path)), Notebook()
    if "opt" not in values.content and "sched" not in values.content:
        raise RecipeError(f"{path}: has neither opt nor sched, so it is not timm's args.yaml; give a run's args.yaml")
    workers = count_devices(book, devices)
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


def _timm_optimizer(values: Values, book: Notebook) -> None:
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


def _timm_rate(values: Values, book: Notebook, total: int) -> float:
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


def _timm_loss(values: Values, book: Notebook) -> None:
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


def _summary(path: Path, book: Notebook) -> _Summary | None:
    """Epochs that were run and the learning rate of each, from timm's ``summary.csv``; None without the file."""
    if not path.is_file():
        return None
    rows = [row for row in csv.DictReader(read_text(path).splitlines()) if row.get("epoch") not in (None, "", "epoch")]
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


def _timm_schedule(values: Values, book: Notebook, rate: float, updates: int, summary: _Summary | None) -> None:
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
        book.known["learning_rate"] = plain_schedule(used)
        _compare(book, used, summary, updates, per_update)
        return
    reason = f"sched {kind}" + (f" with {', '.join(odd)}" if odd else "")
    if summary is not None and summary.rates is not None and not per_update:
        book.known["learning_rate"] = plain_schedule(Schedule(np.repeat(summary.rates[:run], scale)))
        book.notes.append(f"{reason} is not computed here: learning rates are those of summary.csv, epoch by epoch")
        return
    book.unknown["learning_rate"] = f"a list with one value per step ({reason} is not computed here)"


def _compare(book: Notebook, used: Schedule, summary: _Summary | None, updates: int, per_update: bool) -> None:
    if summary is None or summary.rates is None or per_update:
        return
    wanted = used.values[::updates][: len(summary.rates)]
    if not np.allclose(wanted, summary.rates[: len(wanted)], rtol=1e-4, atol=1e-12):
        book.notes.append(
            "learning rates of summary.csv (averaged over parameter groups) differ from the schedule of args.yaml; the "
            "latter is used"
        )
