"""Recipes from the files of timm and the Trainer: schedules against the tools' own, and every gap named."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2

from experiments.recipe_file import ExpertModel, read_recipe
from experiments.recipe_readers import read_run
from theory import AssumptionError, Expert, Merge, RecipeError, Schedule, master_bound
from theory.unknown import bound_interval

TIMM: dict[str, Any] = {
    # the keys that timm's training script writes, in its order (sorted), with its values
    "aa": None,
    "amp": False,
    "batch_size": 32,
    "bce_loss": False,
    "clip_grad": None,
    "clip_mode": "norm",
    "cooldown_epochs": 2,
    "cutmix": 0.0,
    "cutmix_minmax": None,
    "data": None,
    "data_dir": "images",
    "decay_epochs": 3,
    "decay_milestones": [3, 5],
    "decay_rate": 0.1,
    "epoch_repeats": 0.0,
    "epochs": 8,
    "grad_accum_steps": 1,
    "jsd_loss": False,
    "layer_decay": None,
    "lr": 0.05,
    "lr_base": 0.1,
    "lr_base_scale": "",
    "lr_base_size": 256,
    "lr_cycle_decay": 0.5,
    "lr_cycle_limit": 1,
    "lr_cycle_mul": 1.0,
    "lr_k_decay": 1.0,
    "lr_noise": None,
    "min_lr": 0.001,
    "mixup": 0.0,
    "model": "resnet18",
    "model_ema": False,
    "momentum": 0.9,
    "opt": "sgd",
    "opt_betas": None,
    "opt_eps": None,
    "resume": "",
    "sched": "cosine",
    "sched_on_updates": False,
    "seed": 42,
    "smoothing": 0.0,
    "train_num_samples": None,
    "warmup_epochs": 2,
    "warmup_lr": 0.0001,
    "warmup_prefix": False,
    "weight_decay": 0.0001,
    "workers": 4,
}


def write_timm(folder: Path, summary: list[float] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(TIMM | changes, default_flow_style=False))
    if summary is not None:
        lines = ["epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"]
        lines += [f"{epoch},1.0,1.1,50.0,90.0,{float(rate)!r}" for epoch, rate in enumerate(summary)]
        (folder / "summary.csv").write_text("\n".join(lines) + "\n")
    return folder


def timm_rates(updates: int, **changes: Any) -> np.ndarray:
    """The learning rate of every update, by timm's own scheduler driven as its training script does."""
    args = TIMM | changes
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args["lr"])
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args["sched"],
        num_epochs=args["epochs"],
        decay_epochs=args["decay_epochs"],
        decay_milestones=args["decay_milestones"],
        cooldown_epochs=args["cooldown_epochs"],
        decay_rate=args["decay_rate"],
        min_lr=args["min_lr"],
        warmup_lr=args["warmup_lr"],
        warmup_epochs=args["warmup_epochs"],
        warmup_prefix=args["warmup_prefix"],
        step_on_epochs=not args["sched_on_updates"],
        updates_per_epoch=updates,
    )
    seen = []
    for epoch in range(epochs):
        for update in range(updates):
            seen.append(optimizer.param_groups[0]["lr"])
            if scheduler is not None:
                scheduler.step_update(epoch * updates + update + 1)
        if scheduler is not None:
            scheduler.step(epoch + 1)
    return np.array(seen)


def rates_of(known: Any, steps: int) -> np.ndarray:
    return known.values if isinstance(known, Schedule) else np.full(steps, known)


@pytest.mark.parametrize("sched", ["cosine", "step", "multistep", "constant", "none"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("per_update", [False, True])
def test_timm_schedules_are_timms_own(tmp_path: Path, sched: str, prefix: bool, per_update: bool) -> None:
    changes = {"sched": sched, "warmup_prefix": prefix, "sched_on_updates": per_update}
    reading = read_run(write_timm(tmp_path / "photos", **changes), n=330, devices=1)
    assert reading.name == "photos"
    wanted = timm_rates(10, **changes)  # 330 images, batches of 32, the last short one dropped
    if sched == "none":
        wanted = wanted[: reading.known["steps"]]
    assert reading.known["steps"] == len(wanted)
    np.testing.assert_allclose(rates_of(reading.known["learning_rate"], len(wanted)), wanted, rtol=1e-9, atol=1e-15)


def test_timm_fields(tmp_path: Path) -> None:
    reading = read_run(write_timm(tmp_path / "a", summary=None), n=330)
    known = reading.known
    assert (known["n"], known["batch_size"], known["momentum"], known["weight_decay"]) == (330, 32, 0.9, 1e-4)
    assert known["optimizer"] == "sgd"
    assert known["nesterov"]
    assert not known["decoupled_decay"]
    assert known["drop_last"]
    assert known["sampling"] == "reshuffle"
    assert any("one device is assumed" in note for note in reading.notes)
    assert any("BatchNorm" in note for note in reading.notes)
    assert "model" in reading.ignored
    expert = reading.expert(
        L=0.1, curvature="convex", initial_gradient_norm=0.1, sigma0=0.5, D_inf=1.0, training_risk=0.1
    )
    assert np.isfinite(master_bound(Merge((expert,))).value)
    heavy = read_run(write_timm(tmp_path / "b", opt="momentum"), n=330)
    assert not heavy.known["nesterov"]
    decoupled = read_run(write_timm(tmp_path / "c", opt="sgdw"), n=330)
    assert decoupled.known["decoupled_decay"]


def test_timm_devices_accumulation_and_scaled_rate(tmp_path: Path) -> None:
    folder = write_timm(tmp_path, grad_accum_steps=3, lr=None, sched="none", cooldown_epochs=0)
    reading = read_run(folder, n=1000, devices=2)
    # 500 images per device, 15 batches of 32, 5 updates; 0.1 scaled linearly from 256 to 192 images
    assert reading.known["batch_size"] == 192
    assert reading.known["steps"] == 8 * 5
    assert reading.known["learning_rate"] == pytest.approx(0.1 * 192 / 256)
    adam = read_run(write_timm(tmp_path / "adam", lr=None, opt="adamw", sched="none"), n=1000)
    assert adam.known["learning_rate"] == pytest.approx(0.1 * math.sqrt(32 / 256))
    uneven = read_run(write_timm(tmp_path / "uneven", grad_accum_steps=4), n=330)
    assert any("accumulates 2 batches instead of 4" in note for note in uneven.notes)


def test_timm_adamw_and_clipping_are_refused_with_the_alternative(tmp_path: Path) -> None:
    for changes, word in (({"opt": "adamw"}, "adamw"), ({"clip_grad": 1.0}, "clip")):
        reading = read_run(write_timm(tmp_path / word, **changes), n=330)
        assert any(word in note and "measured drift" in note for note in reading.notes)
        loss = dict(L=1.0, initial_gradient_norm=0.1, sigma0=0.5, D_inf=1.0, training_risk=0.1)
        with pytest.raises(AssumptionError, match="measured drift"):
            master_bound(Merge((reading.expert(**loss),)))
        assert master_bound(Merge((reading.expert(drift=0.5, **loss),))).tier == "estimated"


def test_timm_without_n_says_so(tmp_path: Path) -> None:
    reading = read_run(write_timm(tmp_path))
    assert set(reading.unknown) == {"n", "learning_rate", "steps"}
    with pytest.raises(RecipeError, match=r"args.yaml: n is not in the files; give the number of training samples"):
        reading.expert(L=1.0)
    assert "n" in read_run(write_timm(tmp_path / "streamed", train_num_samples=640)).known


def test_timm_summary_counts_epochs_and_supplies_rates(tmp_path: Path) -> None:
    stopped = read_run(write_timm(tmp_path / "stopped", summary=list(timm_rates(1)[:4])), n=330)
    assert stopped.known["steps"] == 40
    assert any("4 of 10 epochs" in note for note in stopped.notes)
    assert not any("differ" in note for note in stopped.notes)
    other = read_run(write_timm(tmp_path / "other", summary=[0.3] * 10), n=330)
    assert any("differ from the schedule" in note for note in other.notes)
    rates = [0.5 - 0.03 * epoch for epoch in range(10)]
    poly = read_run(write_timm(tmp_path / "poly", sched="poly", summary=rates), n=330)
    np.testing.assert_allclose(poly.known["learning_rate"].values, np.repeat(rates, 10))
    unknown = read_run(write_timm(tmp_path / "plateau", sched="plateau"), n=330)
    assert "sched plateau" in unknown.unknown["learning_rate"]


def test_timm_mixup_breaks_the_per_sample_loss(tmp_path: Path) -> None:
    reading = read_run(write_timm(tmp_path, mixup=0.2), n=330)
    assert reading.per_sample_loss is False
    expert = reading.expert(L=0.1, initial_gradient_norm=0.1, sigma0=0.5, D_inf=1.0, training_risk=0.1)
    with pytest.raises(AssumptionError, match="per_sample_loss"):
        master_bound(Merge((expert,), per_sample_loss=reading.per_sample_loss))


# --- Hugging Face -----------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, Any] = {
    "output_dir": "out",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "max_grad_norm": 0.0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "warmup_steps": 0,
    "optim": "sgd",
    "seed": 42,
    "dataloader_drop_last": False,
    "group_by_length": False,
    "label_smoothing_factor": 0.0,
}


def hf_rates(kind: str, peak: float, warmup: int, total: int) -> np.ndarray:
    """Learning rates by the definitions in the documentation of Hugging Face's schedules."""
    seen = []
    for step in range(total):
        if kind != "constant" and step < warmup:
            seen.append(peak * step / warmup)
            continue
        progress = (step - warmup) / (total - warmup)
        seen.append({"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}.get(kind, 1.0) * peak)
    return np.array(seen)


def write_trainer(
    folder: Path,
    *,
    steps: int = 90,
    every: int = 10,
    older: bool = False,
    arguments: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    rates: np.ndarray | None = None,
    **changes: Any,
) -> Path:
    """The files of a run: trainer_state.json in a checkpoint folder, JSON arguments and results above it."""
    used = hf_rates("linear", 0.01, 9, 90) if rates is None else rates
    later = np.append(used, 0.0)
    history: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        rate = later[step] if older else used[step - 1]
        history.append(
            {"epoch": step / 30, "grad_norm": 0.5 + step / 1000, "learning_rate": rate, "loss": 1 / step, "step": step}
        )
    history.append({"epoch": 3.0, "eval_loss": 0.7, "step": steps})
    state = {
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": steps / 30,
        "eval_steps": 500,
        "global_step": steps,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": history,
        "logging_steps": every,
        "max_steps": 90,
        "num_input_tokens_seen": 0,
        "num_train_epochs": 3,
        "save_steps": 500,
        "total_flos": 1.0,
        "train_batch_size": 8,
        "trial_name": None,
        "trial_params": None,
    }
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | changes, indent=2, sort_keys=True) + "\n")
    if arguments is not None:
        (folder / "training_args.json").write_text(json.dumps(arguments, indent=2))
    if results is not None:
        (folder / "all_results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(
    "warm", [{"warmup_ratio": 0.1}, {"warmup_ratio": 0.0, "warmup_steps": 7}, {"warmup_steps": 0.1}]
)
def test_trainer_schedules(tmp_path: Path, kind: str, warm: dict[str, Any]) -> None:
    arguments = ARGUMENTS | {"lr_scheduler_type": kind} | warm
    count = 7 if warm.get("warmup_steps") == 7 else 9
    rates = hf_rates(kind, 0.01, count, 90)
    reading = read_run(write_trainer(tmp_path, arguments=arguments, rates=rates), n=480)
    np.testing.assert_allclose(rates_of(reading.known["learning_rate"], 90), rates, rtol=1e-12, atol=1e-18)
    assert not any("differ from" in note for note in reading.notes)


def test_trainer_fields(tmp_path: Path) -> None:
    reading = read_run(write_trainer(tmp_path / "notes", arguments=ARGUMENTS, results={"train_samples": 480}))
    known = reading.known
    assert reading.name == "notes"
    assert (known["n"], known["batch_size"], known["steps"], known["momentum"]) == (480, 16, 90, 0.0)
    assert known["optimizer"] == "sgd"
    assert "gradient_clipping" not in known
    assert not reading.ranges
    assert not reading.unknown
    assert "log_history: loss" in reading.ignored
    loss = dict(L=0.1, curvature="convex", initial_gradient_norm=0.1, sigma0=0.5, D_inf=1.0, training_risk=0.1)
    assert np.isfinite(master_bound(Merge((reading.expert(**loss),))).value)
    wrong = read_run(tmp_path / "notes", n=4800)
    assert any("do not give" in note for note in wrong.notes)
    two = read_run(tmp_path / "notes", devices=2, n=960)
    assert two.known["batch_size"] == 32


def test_trainer_default_is_refused_by_name(tmp_path: Path) -> None:
    """AdamW with clipping at 1 is what the Trainer does unless told otherwise."""
    few = {key: ARGUMENTS[key] for key in ("per_device_train_batch_size", "learning_rate")}
    reading = read_run(write_trainer(tmp_path, arguments=few), n=240)
    assert reading.known["optimizer"] == "adamw_torch"
    assert reading.known["gradient_clipping"]
    assert any("the Trainer's default" in note for note in reading.notes)
    loss = dict(L=1.0, initial_gradient_norm=0.1, sigma0=0.5, D_inf=1.0, training_risk=0.1)
    with pytest.raises(AssumptionError, match="adamw_torch"):
        master_bound(Merge((reading.expert(**loss),)))
    assert master_bound(Merge((reading.expert(drift=1.0, **loss),))).tier == "estimated"


@pytest.mark.parametrize("older", [False, True])
def test_trainer_without_arguments(tmp_path: Path, older: bool) -> None:
    """The log alone: rates interpolated in the convention of either version, n bracketed, optimizer unknown."""
    folder = write_trainer(tmp_path, older=older)
    (folder / "training_args.bin").write_bytes(pickle.dumps({"x": 1}))
    reading = read_run(folder)
    assert any("training_args.bin is a pickle" in note for note in reading.notes)
    assert reading.known["optimizer"] == "unknown"
    rates = reading.known["learning_rate"].values
    np.testing.assert_allclose(rates[10:], hf_rates("linear", 0.01, 9, 90)[10:], atol=1e-12 if older else 1e-9)
    low, high = reading.ranges["n"]
    assert low <= 30 * 8 - 7 <= 30 * 8 <= high
    assert reading.fields()["n"] == round((low + high) / 2)
    assert set(reading.stated()) == {f"{tmp_path.name}.n"}
    assert set(reading.guessed) == {"n", "learning_rate", "batch_size"}
    loss = dict(L=0.1, curvature="convex", initial_gradient_norm=0.1, sigma0=0.5, training_risk=0.1, optimizer="sgd")
    expert = reading.expert(**loss, D_inf=1.0, gradient_clipping=False, sampling="without_replacement")
    assert expert.measured == {"n", "learning_rate", "batch_size"}  # middle of a bracket, between logs, one device
    assert not reading.expert(**loss, D_inf=1.0, n=240, learning_rate=0.01, batch_size=8).measured
    found = bound_interval(Merge((expert,)), reading.stated(), samples=32)
    assert found.lower <= found.upper < 1.1 * found.lower


def test_trainer_log_of_every_step(tmp_path: Path) -> None:
    reading = read_run(write_trainer(tmp_path, every=1, arguments=ARGUMENTS), n=480)
    np.testing.assert_allclose(reading.known["batch_losses"].values, 1 / np.arange(1, 91))
    np.testing.assert_allclose(reading.known["batch_gradient_norms"].values, 0.5 + np.arange(1, 91) / 1000)
    decayed = read_run(write_trainer(tmp_path / "decay", every=1, arguments=ARGUMENTS | {"weight_decay": 0.1}), n=480)
    assert "batch_gradient_norms" not in decayed.known
    assert "without the weight decay" in decayed.ignored["log_history: grad_norm"]
    early = read_run(write_trainer(tmp_path / "early", steps=40, arguments=ARGUMENTS), n=480)
    assert early.known["steps"] == 40
    np.testing.assert_allclose(early.known["learning_rate"].values, hf_rates("linear", 0.01, 9, 90)[:40], atol=1e-15)


def test_disagreeing_log_is_noted(tmp_path: Path) -> None:
    folder = write_trainer(tmp_path, arguments=ARGUMENTS, rates=np.full(90, 0.02))
    assert any("differ from the schedule" in note for note in read_run(folder, n=480).notes)
    odd = read_run(write_trainer(tmp_path / "odd", arguments=ARGUMENTS | {"lr_scheduler_type": "polynomial"}), n=480)
    assert any("interpolated" in note for note in odd.notes)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "opened"
    path = tmp_path / "training_args.bin"
    path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(RecipeError, match="is a pickle"):
        read_run(path)
    with pytest.raises(RecipeError, match="pickle and is not read"):
        read_run(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("args.yaml", "opt: !!python/object/apply:os.getcwd []", "Python objects are not read"),
        ("args.yaml", "opt: [", "not plain YAML"),
        ("args.yaml", "- 1", "no mapping"),
        ("args.yaml", "colour: red", "not timm's args.yaml"),
        ("args.yaml", "opt: sgd\nbatch_size: many", "batch_size is 'many'"),
        ("args.yaml", "opt: sgd\nlr: .nan", "lr is nan"),
        ("args.yaml", "opt: sgd\nbatch_size: 10\nepochs: 2.5", "epochs is 2.5"),
        ("args.yaml", "opt: sgd\nbatch_size: 1000", "exceeds the 100 samples"),
        ("trainer_state.json", "{", "not valid JSON"),
        ("trainer_state.json", "[]", "no mapping"),
        ("trainer_state.json", "{}", "no global_step"),
        ("trainer_state.json", '{"global_step": 0}', "global_step is 0"),
        ("trainer_state.json", '{"global_step": 5, "log_history": 3}', "log_history is not a list"),
        (
            "trainer_state.json",
            '{"global_step": 5, "log_history": [{"step": 2, "loss": 1}, {"step": 1, "loss": 1}]}',
            "do not increase",
        ),
        ("trainer_state.json", '{"global_step": 5, "log_history": [{"step": "x", "loss": 1}]}', "not a number"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        read_run(tmp_path / name, n=100)
    assert name in str(caught.value)


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither args.yaml"):
        read_run(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_run(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r"neither args.yaml nor"):
        read_run(tmp_path / "absent.txt")
    with pytest.raises(RecipeError, match="n is 0"):
        read_run(tmp_path, n=0)
    (tmp_path / "args.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        read_run(tmp_path)


RECIPE = """
defaults: {L: 0.1, curvature: convex, initial_gradient_norm: 0.1, sigma0: 0.5, D_inf: 1.0, training_risk: 0.1}
experts:
  - {name: photos, run: photos, n: 330}
  - {name: notes, run: notes/checkpoint-90, momentum: 0.5}
"""


def test_recipe_file_names_runs(tmp_path: Path) -> None:
    """`mergebound bound --recipe`: an expert's run fills what the recipe does not give."""
    write_timm(tmp_path / "photos")
    write_trainer(tmp_path / "notes", arguments=ARGUMENTS, results={"train_samples": 480})
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    photos, notes = read_recipe(path).experts
    assert (photos.n, photos.batch_size, photos.nesterov, photos.drop_last) == (330, 32, True, True)
    assert isinstance(photos.learning_rate, Schedule)
    np.testing.assert_allclose(photos.learning_rate.values, timm_rates(10))
    assert (notes.n, notes.batch_size, notes.steps, notes.momentum) == (480, 16, 90, 0.5)
    assert np.isfinite(master_bound(read_recipe(path)).value)
    path.write_text(RECIPE.replace("n: 330", "n: 330, devices: 2"))
    assert read_recipe(path).experts[0].batch_size == 64
    path.write_text(RECIPE.replace("n: 330", "n: many"))
    with pytest.raises(RecipeError, match="n is 'many'"):
        read_recipe(path)
    path.write_text(RECIPE.replace("run: photos, n: 330", "run: 3"))
    with pytest.raises(RecipeError, match="run needs a path"):
        read_recipe(path)
    path.write_text(RECIPE.replace("run: photos, n: 330", "run: elsewhere"))
    with pytest.raises(RecipeError, match="elsewhere"):
        read_recipe(path)
    path.write_text(RECIPE.replace(", n: 330", ""))
    with pytest.raises(RecipeError, match="'photos': n is missing"):
        read_recipe(path)
    write_timm(tmp_path / "photos", mixup=0.4)
    path.write_text(RECIPE)
    assert read_recipe(path).per_sample_loss is False
    path.write_text(RECIPE + "merge: {per_sample_loss: true}\n")
    with pytest.raises(RecipeError, match="mixed samples"):
        read_recipe(path)


def test_recipe_file_knows_every_field() -> None:
    assert {item.name for item in fields(Expert)} == set(ExpertModel.model_fields)


def test_report_reads(tmp_path: Path) -> None:
    text = read_run(write_timm(tmp_path / "photos", opt="adamw")).explain()
    for words in ("photos: timm (args.yaml)", "unknown: n: give", "note: optimizer adamw", "ignored: model:"):
        assert words in text


def test_a_guessed_number_of_devices_makes_the_bound_an_estimate_and_is_named(tmp_path: Path) -> None:
    """One device is a guess: batch, steps and rates follow from it; with devices stated nothing is guessed."""
    folder = write_timm(tmp_path / "photos", opt="momentum", clip_grad=None)
    guess, stated = read_run(folder, n=330), read_run(folder, n=330, devices=1)
    assert set(guess.guessed) == {"batch_size", "steps", "learning_rate"}
    assert stated.guessed == ()
    constants = dict(L=1.0, initial_gradient_norm=0.1, sigma0=0.1, D_inf=0.3, training_risk=0.1, curvature="convex")
    claims = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
    for reading, tier in ((guess, "estimated"), (stated, "certified")):
        bound = master_bound(Merge((reading.expert(**constants),), **claims))  # type: ignore[arg-type]
        assert bound.tier == tier
        named = [item for item in bound.assumptions if item.name == "run"]
        assert bool(named) == (tier == "estimated")
        assert all("batch_size" in item.statement and "devices" in item.why for item in named)
        assert all(item.verdict == "unknown" for item in named)
