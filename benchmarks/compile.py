"""Does ``torch.compile`` pay for the networks of the digits?  Steps of the loop and of stacked experts, in turns.

``python benchmarks/compile.py`` prints, for a small ResNet with BatchNorm and a small ViT: seconds of a step as PyTorch
runs it, seconds of a compiled step, their ratio, the seconds that compiling took, and after how many steps that is won
back.  ``--experts 8`` says how many are stacked by ``torch.func.vmap`` (the cohort engine's own
:class:`experiments.finetune.cohort.vmapped.Vmapped`), ``--batch 16`` the batch size.

On a processor it needs a C++ compiler and counts processor time, the compiler's included; nothing is taken from
caches.  ``--device cuda`` runs the same on a GPU, with CUDA graphs through ``mode="reduce-overhead"``, and counts wall
time; it has **not been measured** on one.

Measured for the ResNet at batch 16 on two shared Xeon cores, one thread, with other work running: one expert 1.06 and
1.15 times as fast (two measurements), 44 s of processor time to compile, won back after tens of thousands of steps; 8
experts by vmap 1.47 times as fast, about as long to compile, won back after a few thousand steps.  So it does not pay
on a processor for the steps that such grids have.  The ViT and GPUs: not measured.

What it is for: the planner of cohorts does not offer compiled steps.  A compiled function belongs to one cohort (its
experts leave one by one, and every number of experts is another shape), so that each cohort pays for compiling, many
times over while ways are probed; grids on the digits have cohorts of 20 to 200 steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

Step = Callable[[], Any]
RATE, MOMENTUM = 0.01, 0.9


def images_of(network: nn.Module, shape: tuple[int, ...], device: str) -> Tensor:
    """Random images for a network, ``shape`` before channels, height and width."""
    from experiments.models import input_format

    form = input_format(network)
    made = torch.Generator().manual_seed(0)
    return torch.randn(*shape, form.channels, form.height, form.width, generator=made).to(device)


def loop_step(architecture: str, batch: int, device: str, compiled: dict[str, Any] | None) -> Step:
    """One expert: forward, backward, heavy ball."""
    from experiments.models import build_model

    network = build_model(architecture, classes=10).to(device).train()
    images, labels = images_of(network, (batch,), device), (torch.arange(batch) % 10).to(device)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM)
    run: Any = network if compiled is None else torch.compile(network, dynamic=False, **compiled)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(run(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def stacked_step(architecture: str, experts: int, batch: int, device: str, compiled: dict[str, Any] | None) -> Step:
    """Several experts by vmap, each with its own weights and batch: forward, backward, heavy ball."""
    from experiments.finetune.cohort.stack import moving
    from experiments.finetune.cohort.vmapped import Vmapped
    from experiments.models import build_model

    network = build_model(architecture, classes=10).to(device).train()
    way = Vmapped(network)
    moved = set(moving(network))
    stacked = {name: torch.stack([each.detach()] * experts) for name, each in network.state_dict().items()}
    statistics_ = {name: each for name, each in stacked.items() if name in moved}
    learned = dict(network.named_parameters())
    tensors = {name: each.requires_grad_(name in learned) for name, each in stacked.items() if name not in moved}
    tensors = {name: each for name, each in tensors.items() if name in learned or each.is_floating_point()}
    leaves = [tensors[name] for name in learned]
    buffers = [torch.zeros_like(each) for each in leaves]
    images, labels = images_of(network, (batch, experts), device), (torch.arange(batch) % 10).to(device)
    run: Any = way.logits if compiled is None else torch.compile(way.logits, dynamic=False, **compiled)

    def step() -> None:
        logits = run(tensors, statistics_, images)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(experts), reduction="sum") / batch
        gradients = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            torch._foreach_mul_(buffers, MOMENTUM)
            torch._foreach_add_(buffers, gradients)
            torch._foreach_add_(leaves, buffers, alpha=-RATE)

    return step


def clock(device: str) -> float:
    """Processor time on a processor (neighbours do not count), else wall time when the device is done."""
    if device == "cpu":
        spent = os.times()
        return spent.user + spent.system + spent.children_user + spent.children_system
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Step, device: str, count: int) -> float:
    """Seconds of one step."""
    began = clock(device)
    for _ in range(count):
        step()
    return (clock(device) - began) / count


def measure(name: str, plain: Step, compiled: Step, device: str, rounds: int, count: int) -> None:
    """Print one row; the two take turns."""
    plain()
    began = clock(device)
    try:
        compiled()
        compiled()
    except Exception as error:  # whatever the compiler raises is the finding
        print(f"{name:28s} cannot be compiled: {str(error).strip().splitlines()[0][:90]}")
        return
    seconds = clock(device) - began
    turns = [(timed(plain, device, count), timed(compiled, device, count)) for _ in range(rounds)]
    a, b = (statistics.median(each) for each in zip(*turns, strict=True))
    won = f"{seconds / (a - b):,.0f} steps" if a > b else "never"
    print(f"{name:28s} {a * 1e3:8.2f} ms {b * 1e3:8.2f} ms {a / b:6.2f} {seconds:8.1f} s   {won}", flush=True)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of one turn")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"--device {args.device}: PyTorch finds no GPU here; not measured")
        return 0
    torch.set_num_threads(1)
    options: dict[str, Any] = {} if args.device == "cpu" else {"mode": "reduce-overhead"}
    print(f"{'':28s} {'eager':>11s} {'compiled':>11s} {'ratio':>6s} {'compiling':>10s}   won back after")
    for architecture in ("resnet_bn", "vit"):
        pair = [loop_step(architecture, args.batch, args.device, each) for each in (None, options)]
        measure(f"{architecture}, one expert", *pair, args.device, args.rounds, args.steps)
        stacked = [stacked_step(architecture, args.experts, args.batch, args.device, each) for each in (None, options)]
        measure(f"{architecture}, {args.experts} by vmap", *stacked, args.device, args.rounds, args.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
