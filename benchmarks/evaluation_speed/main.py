"""Evaluation: the path that is chosen on this machine against a plain float32 loop, with the accuracy of both.

Images are the embedded digits, enlarged to what a network takes; the head of every network is fitted to its (random or
published) features by ridge regression on other digits, so that accuracies and margins are those of a classifier that
works.  With ``MERGEBOUND_DATA`` set, ResNet-20 is the published CIFAR-10 network on the test images of
``cifar10.npz``.  One thread; plain loop and fast path take turns (A B A B ...); medians of processor seconds.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.merge_speed.meter import measure as read
from experiments.evaluate.cpu import cpu
from experiments.evaluate.fast import FastModel, fast_evaluator
from experiments.evaluate.metrics import score, summarise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """A network: how it is built, the side of its images, how many images are evaluated, and in which batches."""

    name: str
    build: Callable[[], nn.Module]
    side: int
    images: int
    batch: int
    classifier: str


@dataclass(frozen=True)
class Row:
    """One line of the tables; rates in images per processor second, differences in accuracy points."""

    network: str
    parameters: int
    side: int
    images: int
    batch: int
    path: str
    plain_rate: float
    fast_rate: float
    ratio: float
    plain_accuracy: float
    fast_accuracy: float
    points: float
    largest_difference: float
    agreement: float
    plain_memory_mb: float
    fast_memory_mb: float
    choosing_s: float
    data: str


class Mlp(nn.Sequential):
    """Three linear layers with BatchNorm."""

    def __init__(self, inputs: int = 3072, width: int = 1024) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=10, **options)
        return model

    return build


def resnet20() -> nn.Module:
    from experiments.models import CifarResNet

    return CifarResNet(20)


CASES = (
    Case("resnet20", resnet20, 32, 1024, 256, "linear"),
    Case("resnet18", timm_model("resnet18"), 32, 512, 128, "fc"),
    Case("resnet50", timm_model("resnet50"), 224, 16, 8, "fc"),
    Case("vit_tiny", timm_model("vit_tiny_patch16_224"), 224, 32, 16, "head"),
    Case("vit_tiny_p8", timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8), 32, 512, 128, "head"),
    Case("vit_tiny_p4", timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4), 32, 256, 64, "head"),
    Case("mlp", Mlp, 32, 1024, 256, "7"),
)


def digits(count: int, side: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Enlarged digits as (count, 3, side, side), normalised, and their labels; repeated where there are too few."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng([0, 0xE7A1]).permutation(len(raw.target))
    rows = np.resize(order[start:], count)
    x = torch.from_numpy(raw.images[rows].astype(np.float32) / 16.0)[:, None]
    x = nn.functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return normalise(x), torch.from_numpy(raw.target[rows].astype(np.int64))


def normalise(x: Tensor) -> Tensor:
    return ((x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)).contiguous()


def cifar10(count: int) -> tuple[Tensor, Tensor, Path] | None:
    """Test images, labels and the file of the published ResNet-20, if there is a data folder."""
    folder = os.environ.get("MERGEBOUND_DATA")
    if not folder:
        return None
    files = sorted((Path(folder) / "cifar10_resnets").glob("resnet20-*.safetensors"))
    if not files or not (Path(folder) / "cifar10.npz").is_file():
        return None
    with np.load(Path(folder) / "cifar10.npz", allow_pickle=False) as data:
        take = None if count >= 1024 else count  # all test images but in quick runs
        x, y = data["x_test"][:take], data["y_test"][:take]
    return normalise(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255.0), torch.from_numpy(y), files[0]


def prepare(case: Case, images: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The network in evaluation mode, test images, labels, and what they are."""
    torch.manual_seed(0)
    model = case.build()
    real = cifar10(images) if case.name == "resnet20" else None
    if real is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(real[2]))
        return model.eval().requires_grad_(False), real[0], real[1], "cifar10.npz"
    x, y = digits(images, case.side)
    fit, labels = digits(max(64, min(512, images)), case.side, start=min(images, 1200))
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        fit_statistics(model, fit)
    model.eval().requires_grad_(False)
    fit_head(model.get_submodule(case.classifier), model, fit, labels)
    return model, x, y, "digits"


def fit_statistics(model: nn.Module, images: Tensor) -> None:
    """BatchNorm's statistics of real images, so that activations have the sizes that they have in use."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average
    model.train()
    with torch.no_grad():
        for part in torch.split(images, 64):
            model(part)


def fit_head(layer: nn.Module, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Ridge regression from the classifier's inputs to the classes."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().double()))
    with torch.inference_mode():
        for part in torch.split(images, 64):
            model(part)
    handle.remove()
    z = torch.cat(seen)
    middle, spread = z.mean(dim=0), z.std(dim=0).clamp(min=1e-6)
    z = (z - middle) / spread
    target = 10.0 * nn.functional.one_hot(labels, 10).double()
    gram = z.T @ z + 0.03 * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, z.T @ (target - target.mean(dim=0))).T / spread
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(target.mean(dim=0) - weight @ middle)


def plain_loop(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    """What one writes first."""
    out = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            out.append(model(images[start : start + batch]))
    return torch.cat(out)


def fast_loop(fast: FastModel, images: Tensor, batch: int) -> Tensor:
    return torch.cat([fast(part) for part in torch.split(images, batch)])


def processor_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(case: Case, *, rounds: int, images: int, seconds: float) -> Row:
    """Choose the path for a network, time it against the plain loop and compare what both predict."""
    model, x, y, data = prepare(case, images)
    started = time.perf_counter()
    fast = fast_evaluator(model, x[: case.batch], seconds=seconds)
    choosing = time.perf_counter() - started
    plain_out, fast_out = plain_loop(model, x, case.batch), fast_loop(fast, x, case.batch)
    plain_times, fast_times = [], []
    for _ in range(rounds):
        plain_times.append(processor_seconds(lambda: plain_loop(model, x, case.batch)))
        fast_times.append(processor_seconds(lambda: fast_loop(fast, x, case.batch)))
    plain_memory = above(lambda: plain_loop(model, x, case.batch))
    fast_memory = above(lambda: fast_loop(fast, x, case.batch))
    a, b = (summarise(score(out, y)) for out in (plain_out, fast_out))
    spread = float((plain_out - plain_out.mean(dim=1, keepdim=True)).square().mean().sqrt())
    return Row(
        case.name,
        sum(p.numel() for p in model.parameters()),
        case.side,
        len(x),
        case.batch,
        fast.path,
        len(x) / statistics.median(plain_times),
        len(x) / statistics.median(fast_times),
        statistics.median(p / f for p, f in zip(plain_times, fast_times, strict=True)),
        a.accuracy,
        b.accuracy,
        100.0 * (b.accuracy - a.accuracy),
        float((fast_out - plain_out).abs().max()) / spread,
        float((fast_out.argmax(1) == plain_out.argmax(1)).double().mean()),
        plain_memory,
        fast_memory,
        choosing,
        data,
    )


def above(work: Callable[[], object]) -> float:
    """Megabytes of anonymous memory above the level before, at the most; NaN where the system does not tell."""
    if sys.platform != "linux":
        return float("nan")
    with suppress(OSError, AttributeError):  # give back what earlier passes have freed, or it would not be counted
        ctypes.CDLL(None).malloc_trim(0)
    return read(work, interval=0.002).above / 1e6


def markdown(rows: Sequence[Row], rounds: int) -> str:
    """The page of the table."""
    lines = [
        "# Evaluation: chosen path against a plain float32 loop",
        "",
        f"{cpu()}, PyTorch {torch.__version__}, one thread, {rounds} rounds in turns, medians of processor seconds. "
        "`ratio` is the plain loop's seconds over the chosen path's; `points` is the difference of accuracy in points; "
        "`difference` is the largest one of a logit over the logits' spread; memory is above the level before.",
        "",
        "| network | side | path | plain images/s | fast images/s | ratio | accuracy plain | fast | points "
        "| difference | agreement | MB plain | MB fast | data |",
        "|---" * 14 + "|",
    ]
    lines += [
        f"| {r.network} ({r.parameters / 1e6:.2f}M) | {r.side} | `{r.path}` | {r.plain_rate:.1f} | {r.fast_rate:.1f} "
        f"| {r.ratio:.2f} | {r.plain_accuracy:.4f} | {r.fast_accuracy:.4f} | {r.points:+.2f} "
        f"| {r.largest_difference:.1e} | {r.agreement:.4f} | {r.plain_memory_mb:.0f} | {r.fast_memory_mb:.0f} "
        f"| {r.data} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, rows: Sequence[Row], rounds: int) -> None:
    """Write ``evaluation.csv`` and ``tables.md``."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "evaluation.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (out / "tables.md").write_text(markdown(rows, rounds), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks/evaluation.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks, few images, one round")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default all")
    parser.add_argument("--rounds", type=int, help="default 7 (--quick: 1)")
    parser.add_argument("--seconds", type=float, help="for choosing a path (default 0.5)")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: print only)")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds = options.rounds or (1 if options.quick else 7)
    names = options.cases or (["resnet20", "mlp"] if options.quick else [case.name for case in CASES])
    rows = []
    try:
        for case in CASES:
            if case.name in names:
                images = min(case.images, 64) if options.quick else case.images
                seconds = options.seconds or (0.05 if options.quick else 0.5)
                rows.append(measure(case, rounds=rounds, images=images, seconds=seconds))
                print(f"{case.name}: {rows[-1].path}, {rows[-1].ratio:.2f} times", file=sys.stderr, flush=True)
                if options.out is not None:
                    write(options.out, rows, rounds)
    finally:
        torch.set_num_threads(threads)
    print(markdown(rows, rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
