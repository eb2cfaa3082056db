"""Checkpoints to merge: the tensors of a ViT-B, random base, small random task vectors, all from one seed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def vit_shapes(parameters: int, width: int = 768) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the blocks of a ViT until there are at least so many parameters, last block cut to fit.

    A tiny model is narrower, so that it too has several tensors.
    """
    while width > 16 and 12 * width * width > parameters:
        width //= 2
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.weight": (width, width), "pos_embed": (1, 197, width)}
    block = {
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
        "norm1.weight": (width,),
        "norm1.bias": (width,),
    }
    index = 0
    while count(shapes) < parameters:
        for name, shape in block.items():
            if count(shapes) >= parameters:
                break
            shapes[f"blocks.{index}.{name}"] = shape
        index += 1
    return shapes


def count(shapes: Mapping[str, Sequence[int]]) -> int:
    """Entries of all tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def file_bytes(shapes: Mapping[str, Sequence[int]], dtype: str) -> int:
    """Bytes of one checkpoint, header aside."""
    return count(shapes) * (4 if dtype == "float32" else 2)


def write_checkpoints(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], experts: int, dtype: str, seed: int
) -> tuple[Path, ...]:
    """Write base and experts as safetensors, one tensor of all files at a time; files that are there are kept.

    The base is normal with standard deviation 0.02; expert i adds normal noise of 0.001 times a scale in [1, 2).
    A tensor depends on (seed, expert, its place) only.

    Returns:
        The base and the experts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = (folder / "base.safetensors", *(folder / f"e{i}.safetensors" for i in range(experts)))
    if all(file.exists() for file in files):
        return files
    stored = getattr(torch, dtype)
    header = _header(shapes, dtype)
    unfinished = [file.with_suffix(".part") for file in files]
    with ExitStack() as stack:
        handles = [stack.enter_context(open(file, "wb")) for file in unfinished]
        for handle in handles:
            handle.write(header)
        for place, name in enumerate(sorted(shapes)):
            start = torch.randn(shapes[name], generator=_generator(seed, 0, place)).mul_(0.02)
            for index, handle in enumerate(handles):
                tensor = start
                if index:
                    generator = _generator(seed, index, place)
                    scale = 0.001 * (1.0 + float(torch.rand((), generator=generator)))
                    tensor = torch.randn(shapes[name], generator=generator).mul_(scale).add_(start)
                kept = tensor.to(stored).reshape(-1)
                handle.write(memoryview(kept.view(torch.uint8).numpy()))
    for part, file in zip(unfinished, files, strict=True):
        part.replace(file)
    return files


def _generator(seed: int, expert: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1009 + expert) * 1_000_003 + place)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    size = 4 if dtype == "float32" else 2
    entries, offset = {}, 0
    for name in sorted(shapes):
        end = offset + size * torch.Size(shapes[name]).numel()
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
