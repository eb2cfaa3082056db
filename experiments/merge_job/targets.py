"""Targets that a merge may be written to; what exists and what is read is never replaced unasked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from merging.checkpoint import Checkpoint
from merging.errors import CheckpointError
from merging.folder import SAFETENSORS_INDEX
from merging.legacy import LEGACY_SUFFIXES
from merging.remote_path import shown, url_of


def check_output(out: Path, inputs: Sequence[Path], *, overwrite: bool = False) -> None:
    """Refuse a target that cannot be written, that exists, or that is one of the inputs, before anything is read.

    Raises:
        CheckpointError: names the target and the remedy.
    """
    if url_of(out) is not None:
        _check_remote_output(out, inputs, overwrite=overwrite)
        return
    folder = out.suffix != ".safetensors"
    if out.name.endswith((*LEGACY_SUFFIXES, ".json", ".yaml", ".yml", ".npz", ".h5", ".gguf", ".onnx")):
        raise CheckpointError(
            f"{out}: merges are written as .safetensors only: change the suffix of --out, or name a folder"
        )
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: the folder '{out.parent}' does not exist: create it first")
    target = out.resolve()
    for path in inputs:
        place = path.resolve()
        if place == target or (folder and target in place.parents) or (place.is_dir() and place in target.parents):
            raise CheckpointError(
                f"{out}: the target is one of the inputs, which are never changed: choose another --out"
            )
    if folder and out.is_file():
        raise CheckpointError(f"{out}: this is a file where a folder would be written: choose another --out")
    if not folder and out.is_dir():
        raise CheckpointError(f"{out}: this is a folder: name a file in it, or a folder without suffix")
    index = out.with_name(out.name.removesuffix(".safetensors") + SAFETENSORS_INDEX)
    exists = any(out.iterdir()) if folder and out.is_dir() else (out.exists() or (not folder and index.exists()))
    if exists and not overwrite:
        raise CheckpointError(f"{out}: this exists already: choose another --out, or add --overwrite")


def _check_remote_output(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    from merging.remote_write import refuse_existing

    target = shown(out).rstrip("/")
    for path in inputs:
        place = shown(path).rstrip("/")
        if place == target or place.startswith(target + "/") or target.startswith(place + "/"):
            raise CheckpointError(
                f"{target}: the target is one of the inputs, which are never changed: choose another --out"
            )
    refuse_existing(url_of(out) or target, overwrite=overwrite)


def check_files(out: Path, inputs: Sequence[Checkpoint]) -> None:
    """Refuse a target whose file, index or shards would replace a file of an input."""
    target = Path(shown(out)).resolve()
    stem = re.escape(target.name.removesuffix(".safetensors"))
    names = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?(\.safetensors|{re.escape(SAFETENSORS_INDEX)})")
    for checkpoint in inputs:
        for file in checkpoint.files:
            place = file.resolve()
            if place.parent == target.parent and names.fullmatch(place.name):
                raise CheckpointError(
                    f"{shown(out)}: the target would replace '{shown(file)}' of the inputs, which are never changed: "
                    "choose another --out"
                )
