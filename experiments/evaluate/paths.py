"""Paths of evaluation: which there are for a network, how a copy of it is put on one, and how they are timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.evaluate.cpu import cpu
from experiments.evaluate.folding import Pair, fold

_ROUNDS = (5, 15)
CHUNK = 32
"""Images that a convolutional network takes at a time so that its activations stay in the processor's cache."""


class Chunks(nn.Module):
    """A network that is given a few images at a time."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of all images, joined."""
        return torch.cat([self.model(part) for part in torch.split(images, self.size)])


def prepared(images: Tensor, path: str) -> Tensor:
    """Images in the type and layout of a path."""
    parts = path.split("+")
    if parts[0] == "bf16":
        images = images.to(torch.bfloat16)
    if "channels_last" in parts and images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return images


def paths(model: nn.Module, allow: Sequence[str], foldable: bool, device: torch.device) -> list[str]:
    """Candidates worth trying."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    layouts = ["+channels_last"] if "channels_last" in allow and len(convolutions) > 1 else []
    folds = "+fold" if "fold" in allow and foldable else ""
    out = [f"fp32{folds}"] if folds else []
    out += [f"fp32{folds}{layout}" for layout in layouts]
    if "chunk" in allow and len(convolutions) > 1 and device.type == "cpu":
        out.append(f"fp32{folds}{''.join(layouts)}+chunk{CHUNK}")
    processor = cpu()
    if "bf16" in allow and (device.type != "cpu" or processor.bf16 or not processor.known):
        half = [f"bf16{folds}", *(f"bf16{folds}{layout}" for layout in layouts)]
        attention = any(getattr(m, "fused_attn", False) is True for m in model.modules())
        out += half + ([f"{path}+unfused" for path in half] if attention else [])
    return out


def build(plain: nn.Module, path: str, pairs: Sequence[Pair], last: str) -> nn.Module:
    """A copy of a network on a path."""
    parts = path.split("+")
    twin = copy.deepcopy(plain)
    if "fold" in parts:
        fold(twin, pairs)
    if parts[0] == "bf16":
        _to_bfloat16(twin, last)
    if "unfused" in parts:
        for module in twin.modules():
            attention: Any = module
            if hasattr(module, "fused_attn"):
                attention.fused_attn = False
    if "channels_last" in parts:
        for module in twin.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    size = next((int(part.removeprefix("chunk")) for part in parts if part.startswith("chunk")), 0)
    return Chunks(twin, size) if size else twin


def _to_bfloat16(model: nn.Module, last: str) -> None:
    kept = {model.get_submodule(last)} if last else set()
    for module in kept:
        module.register_forward_pre_hook(_as_float32)
    for module in model.modules():
        if module in kept or isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.bfloat16())


def _as_float32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in args)


def race(models: Mapping[str, nn.Module], images: Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of one batch by each path, in turns (A B C A B C ...)."""
    inputs = {path: prepared(images, path) for path in models}
    times: dict[str, list[float]] = {path: [] for path in models}
    started = time.perf_counter()
    for turn in range(_ROUNDS[1]):
        if turn >= _ROUNDS[0] and time.perf_counter() - started > seconds:
            break
        for path, model in models.items():
            times[path].append(seconds_of(model, inputs[path]))
    return times


@torch.inference_mode()
def seconds_of(model: nn.Module, images: Tensor) -> float:
    """Seconds of one forward pass: of this thread where it does all the work, so that others do not disturb."""
    alone = images.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    started = clock()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return clock() - started
