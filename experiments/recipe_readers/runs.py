"""The folder or file of a run, whichever tool left it."""

from __future__ import annotations

from pathlib import Path

from experiments.recipe_readers.reading import RecipeReading
from experiments.recipe_readers.timm_args import read_timm
from experiments.recipe_readers.trainer_state import read_trainer
from theory import RecipeError


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
