"""Images per second into the network, next to the images per second that training consumes.

``python benchmarks/inputs.py`` prints the tables; ``--out docs/results/inputs`` writes them too, ``--quick`` is a check
of seconds.  Photographs are made on the fly (JPEG, 256 to 500 pixels a side).  Training runs on one thread; "attached"
is the time of training steps fed by the loader over the time of the same steps on one repeated batch, the two taking
turns, medians of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.inputs.cache import cached
from experiments.inputs.opening import open_inputs
from experiments.inputs.order import shuffled
from experiments.inputs.prefetch import in_order
from experiments.inputs.resident import load_resident
from experiments.inputs.streamed import stream
from experiments.tasks.form import InputFormat
from experiments.tasks.images import ArrayImages, FileImages, Images

SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Loading:
    """How fast one way of loading is; ``rate`` in images per second of wall clock time, median of the rounds."""

    inputs: str
    size: int
    views: str
    dtype: str
    workers: str
    rate: float


@dataclass(frozen=True)
class Training:
    """One network on one thread; ``ratio`` is the loader's rate over the training's, ``attached`` see above."""

    network: str
    parameters: int
    size: int
    precision: str
    inputs: str
    loader_rate: float
    training_rate: float
    ratio: float
    attached: float


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    files: int = 384
    arrays: int = 8192
    batch: int = 64
    rounds: int = 5
    seconds: float = 1.0
    processes: bool = True
    networks: tuple[str, ...] = ()


QUICK = Plan(12, 64, 8, 1, 0.0, False, ("mlp", "resnet-1M"))


# --- images ----------------------------------------------------------------------------------------------------------


def write_photographs(folder: Path, count: int) -> FileImages:
    """JPEG files of quality 90, smooth shapes and grain, sides of 256 to 500 pixels."""
    from PIL import Image

    rng = np.random.default_rng([SEED, 0x0F11E5])
    names = []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(256, 501, size=2))
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 6, smooth.shape)
        names.append(f"{number}.jpg")
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(folder / names[-1], quality=90)
    return FileImages(folder, tuple(names), rng.integers(0, 10, count))


def make_arrays(count: int, size: int) -> ArrayImages:
    """Random pixels in memory."""
    rng = np.random.default_rng([SEED, size])
    return ArrayImages(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 10, count))


def form_of(size: int) -> InputFormat:
    """What the networks take: colour, as trained on ImageNet."""
    return InputFormat(3, size, size, MEAN, STD, "bicubic", 0.875 if size > 64 else 1.0)


# --- loading ---------------------------------------------------------------------------------------------------------


def rate(data: Any, plan: Plan) -> float:
    """Images per second of a loader that nothing waits for, median of the rounds; the first batches are not counted."""
    found = []
    with closing(in_order(data, shuffled(len(data), min(plan.batch, len(data)), seed=SEED, epochs=None))) as batches:
        for _ in range(2):
            next(batches)
        for _ in range(plan.rounds):
            count, started = 0, time.perf_counter()
            while not count or time.perf_counter() - started < plan.seconds:
                count += len(next(batches)[1])
            found.append(count / (time.perf_counter() - started))
    return median(found)


def sources(
    photographs: Images, folder: Path, plan: Plan
) -> Iterator[tuple[str, int, str, str, str, Callable[[], Any]]]:
    """Inputs, size, views, type, workers, and what opens the data."""
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for size in (32, 224):
        images = make_arrays(plan.arrays if size == 32 else max(16, plan.arrays // 32), size)
        form = replace(form_of(size), crop=1.0)
        for views in ("none", "light", "flip_shift"):
            for name, dtype in types.items():
                yield (
                    *("resident", size, views, name, "0"),
                    lambda images=images, form=form, views=views, dtype=dtype: load_resident(
                        images, form, augment=views, dtype=dtype
                    ),
                )
    form = form_of(224)
    ways = [("threads", count) for count in (1, 2)]
    ways += [("processes", count) for count in (1, 2)] if plan.processes else []
    for kind, count in ways:
        for views in ("none", "crop_flip", "rand"):
            yield (
                *("streamed", 224, views, "float32", f"{count} {kind}"),
                lambda kind=kind, count=count, views=views: stream(
                    photographs, form, views=views, workers=count, kind=kind
                ),
            )
    for decode in ("fast", "draft"):
        for views in ("none", "crop_flip"):
            yield (
                *(f"streamed, {decode}", 224, views, "float32", "1 threads"),
                lambda decode=decode, views=views: stream(photographs, form, views=views, workers=1, decode=decode),
            )
    cached(photographs, form, folder)
    for views in ("none", "flip_shift"):
        yield (
            *("cached", 224, views, "float32", "0"),
            lambda views=views: open_inputs(photographs, form, memory_limit=0, cache=folder, augment=views),
        )


# --- training --------------------------------------------------------------------------------------------------------


def networks() -> dict[str, tuple[int, Callable[[], nn.Module]]]:
    """Image size and constructor of each network."""
    import timm
    from timm.models.resnet import BasicBlock, ResNet

    def small_stem(model: Any, channels: int) -> nn.Module:
        """3 x 3 without a stride instead of 7 x 7 and pooling, as is usual at 32 x 32."""
        model.conv1, model.maxpool = nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.Identity()
        found: nn.Module = model
        return found

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 10))

    return {
        "mlp": (32, mlp),
        "resnet-1M": (32, lambda: small_stem(ResNet(BasicBlock, [1] * 4, 10, channels=(32, 64, 128, 256)), 64)),
        "resnet18": (32, lambda: small_stem(timm.create_model("resnet18", num_classes=10), 64)),
        "vit-tiny, patch 4": (
            32,
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4),
        ),
        "resnet18 at 224": (224, lambda: timm.create_model("resnet18", num_classes=10)),
        "vit-tiny at 224": (224, lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10)),
    }


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, precision: str) -> float:
    """Seconds of some steps of SGD with momentum."""
    model.train()
    parameters = list(model.parameters())
    buffers = [torch.zeros_like(parameter) for parameter in parameters]
    started = time.perf_counter()
    for _ in range(steps):
        x, labels = next(batches)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(x)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, buffer in zip(parameters, buffers, strict=True):
                parameter.sub_(buffer.mul_(0.9).add_(parameter.grad), alpha=1e-3)
    return time.perf_counter() - started


def training(
    name: str, size: int, model: nn.Module, precision: str, inputs: str, data: Any, loader_rate: float, plan: Plan
) -> Training:
    """Training on a repeated batch and fed by the loader, in turns."""
    batch = min(plan.batch, len(data))
    fixed = data.batch(np.arange(batch), 0)

    def repeated() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield fixed

    train(model, repeated(), 1, precision)
    once = train(model, repeated(), 1, precision)
    steps = max(1, round(3 * plan.seconds / once))
    still, ratios = [], []
    for _ in range(plan.rounds):
        still.append(train(model, repeated(), steps, precision))
        # a new loader each time: one left open would have run ahead during the other turn
        with closing(in_order(data, shuffled(len(data), batch, seed=SEED, epochs=None))) as batches:
            next(batches)
            full = (pair for pair in batches if len(pair[1]) == batch)
            ratios.append(train(model, full, steps, precision) / still[-1])
    speed = batch * steps / median(still)
    count = sum(p.numel() for p in model.parameters())
    return Training(name, count, size, precision, inputs, loader_rate, speed, loader_rate / speed, median(ratios))


# --- the run ---------------------------------------------------------------------------------------------------------


def run(plan: Plan, say: Callable[[str], None]) -> tuple[list[Loading], list[Training]]:
    """Measure everything; ``say`` is told each line as it comes."""
    torch.set_num_threads(1)
    loading: list[Loading] = []
    trained: list[Training] = []
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "photographs").mkdir()
        photographs = write_photographs(Path(scratch) / "photographs", plan.files)
        for inputs, size, views, dtype, workers, opened in sources(photographs, Path(scratch) / "cache", plan):
            loading.append(Loading(inputs, size, views, dtype, workers, rate(opened(), plan)))
            say(str(loading[-1]))
        small = load_resident(make_arrays(plan.arrays, 32), replace(form_of(32), crop=1.0), augment="flip_shift")
        large = {
            "streamed, 1 thread, crop_flip": stream(photographs, form_of(224), views="crop_flip", workers=1),
            "cached, flip_shift": open_inputs(
                photographs, form_of(224), memory_limit=0, cache=Path(scratch) / "cache", augment="flip_shift"
            ),
        }
        speeds = {(row.inputs, row.size, row.views, row.dtype, row.workers): row.rate for row in loading}
        known = {
            "resident, flip_shift": speeds["resident", 32, "flip_shift", "float32", "0"],
            "streamed, 1 thread, crop_flip": speeds["streamed", 224, "crop_flip", "float32", "1 threads"],
            "cached, flip_shift": speeds["cached", 224, "flip_shift", "float32", "0"],
        }
        for name, (size, build) in networks().items():
            if plan.networks and name not in plan.networks:
                continue
            torch.manual_seed(SEED)
            model = build()
            for precision in ("float32", "bfloat16") if bf16_units() else ("float32",):
                for inputs, data in {"resident, flip_shift": small}.items() if size == 32 else large.items():
                    trained.append(training(name, size, model, precision, inputs, data, known[inputs], plan))
                    say(str(trained[-1]))
    return loading, trained


def bf16_units() -> tuple[str, ...]:
    """The bfloat16 instructions that the processor has, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return tuple(name for name in ("amx_bf16", "avx512_bf16") if name in flags)


def report(loading: Sequence[Loading], trained: Sequence[Training], facts: dict[str, str]) -> str:
    """The tables in Markdown."""
    lines = ["# Images per second into the network", "", *(f"* {key}: {value}" for key, value in facts.items()), ""]
    lines += ["## Loading", "", "| inputs | size | views | type | workers | images/s |", "|---|---:|---|---|---|---:|"]
    lines += [
        f"| {row.inputs} | {row.size} | {row.views} | {row.dtype} | {row.workers} | {row.rate:,.0f} |"
        for row in loading
    ]
    lines += [
        "",
        "## Training on one thread",
        "",
        "Ratio: the loader's images per second over training's.  Attached: time of training fed by the loader over "
        "time on one repeated batch.",
        "",
        "| network | parameters | size | precision | inputs | loader images/s | training images/s | ratio | attached |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.network} | {row.parameters:,} | {row.size} | {row.precision} | {row.inputs} | {row.loader_rate:,.0f} "
        f"| {row.training_rate:,.1f} | {row.ratio:.1f} | {row.attached:.3f} |"
        for row in trained
    ]
    slow = [row for row in trained if row.ratio < 1]
    lines += ["", f"{len(trained) - len(slow)} of {len(trained)} trainings consume less than the loader gives."]
    return "\n".join(lines) + "\n"


def write(folder: Path, loading: Sequence[Loading], trained: Sequence[Training], facts: dict[str, str]) -> None:
    """``loading.csv``, ``training.csv`` and ``tables.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, kind in (("loading", loading, Loading), ("training", trained, Training)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [field.name for field in fields(kind)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    (folder / "tables.md").write_text(report(loading, trained, facts), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    from benchmarks.merge_speed.machine import describe

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and networks, one round, no processes")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = parser.parse_args(arguments)
    facts = describe("python benchmarks/inputs.py" + " --quick" * given.quick, SEED)
    facts["bfloat16 units"] = ", ".join(bf16_units()) or "none"
    loading, trained = run(QUICK if given.quick else Plan(), lambda line: print(line, file=sys.stderr, flush=True))
    print(report(loading, trained, facts))
    if given.out is not None:
        write(given.out, loading, trained, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
