"""Read the user's own checkpoints and images and check that they belong together, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.measure.backbone import Backbone
from experiments.models import DIGIT_ARCHITECTURES, build_model, input_format
from experiments.tasks.files import LoadedImages, check_labels, load_images
from experiments.tasks.form import InputFormat
from merging.checkpoint import load_state_dict, read_metadata
from merging.compatible import check_compatible, check_finite
from merging.errors import CheckpointError
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import matches, partition
from theory.errors import MergeboundError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class Group:
    """Checkpoints and images, read and checked.

    Attributes:
        names: one distinct name per expert.
        base_path, expert_paths, data_paths: where everything was read from.
        architecture: the network's name.
        networks: for each task j, logits as a function of the merged coordinates x, through expert j's private tensors.
        base: x_0, (P,).
        vectors: x_i, (N, P).
        private: by expert, its private tensors.
        patterns: glob patterns of private tensors.
        data: calibration images of each task.
        form: what the network takes.
        classes: outputs of each expert's head.
        batch_norm: whether the network normalises by batch statistics in training.
    """

    names: tuple[str, ...]
    base_path: Path
    expert_paths: tuple[Path, ...]
    data_paths: tuple[Path, ...]
    architecture: str
    networks: tuple[Backbone, ...]
    base: Tensor
    vectors: Tensor
    private: tuple[Mapping[str, Tensor], ...]
    patterns: tuple[str, ...]
    data: tuple[LoadedImages, ...]
    form: InputFormat
    classes: tuple[int, ...]
    batch_norm: bool

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.names)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """A number per task; tasks with the same number have the same images."""
        where = [path.resolve() for path in self.data_paths]
        return tuple(where.index(path) for path in where)

    @property
    def positions(self) -> float:
        """How often a parameter is used per image, roughly: once per 16 x 16 pixels."""
        return max(1.0, self.form.height * self.form.width / 256.0)

    @property
    def work(self) -> float:
        """Parameters x positions x images x experts^2, about the multiplications of the secant's forward passes."""
        images = max(len(item.split) for item in self.data)
        return float(self.base.numel()) * self.positions * images * self.size**2


def load_group(
    base: Path,
    experts: Sequence[Path],
    data: Sequence[Path],
    *,
    names: Sequence[str] | None = None,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    private: Sequence[str] | None = None,
    shared_head: bool = False,
    images: int = 128,
    seed: int = 0,
    split: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: Progress | None = None,
) -> Group:
    """Read checkpoints and images and check that they belong together.

    Args:
        base, experts: checkpoints.
        data: one data set per expert, see :mod:`experiments.tasks.files`.
        names: one distinct name per expert; default the file stems, or paths where stems repeat.
        model: a digit architecture or a timm model; default what the checkpoints' metadata say.
        model_options: for timm's constructor.
        private: glob patterns of tensors that stay each expert's own; default the classifier.
        shared_head: nothing is private.
        images, seed, split: which calibration images.
        image_size, mean, std: instead of the model's own.

    Raises:
        MergeboundError: names the file, the field and the remedy.
    """
    if len(experts) != len(data):
        raise MergeboundError(
            f"--data: {len(data)} data sets for {len(experts)} experts; give one per expert, in the same order"
        )
    if len(experts) < 2:
        raise MergeboundError(f"--experts: {len(experts)} expert(s) leave nothing to merge; give two or more")
    labels = _names(experts) if names is None else tuple(names)
    tell = progress or (lambda stage, done, total: None)
    steps = 2 * len(experts) + 1
    origin = load_state_dict(base)
    tell(f"reading {base.name}", 1, steps)
    architecture = model or _recorded_architecture((base, *experts))
    network = _build(architecture, dict(model_options or {}), base)
    patterns = _private_patterns(network, private, shared_head)
    try:
        parts = partition(origin, patterns)
    except CheckpointError as error:
        raise CheckpointError(f"{base}: {error}") from None
    _check_model(network, origin, base, architecture, patterns)
    check_finite(origin, {}, parts, base_name=str(base))
    layout = flat_space(origin, parts)
    space = FlatSpace(layout.names, layout.shapes, layout.offsets, torch.float32)
    whole = Backbone.of(network, origin, shared_head=True)
    constants = {name: _single(origin[name]) for name in parts.constants}
    rows, networks, heads = [], [], []
    for number, path in enumerate(experts):
        state = load_state_dict(path)
        check_compatible(origin, {str(path): state}, parts)
        check_finite(origin, {str(path): state}, parts)
        own = _private_tensors(network, state, path, patterns)
        rows.append(space.flatten(state))
        named = {f"model.{name}": tensor for name, tensor in {**constants, **own}.items()}
        networks.append(replace(whole, space=space, partition=parts, constants=named))
        heads.append(own)
        tell(f"reading {path.name}", number + 2, steps)
    form = _input_format(network, architecture, image_size, mean, std)
    loaded, classes = [], []
    vectors = torch.stack(rows)
    for j, path in enumerate(data):
        item = load_images(path, form, images=images, seed=seed, split=split)
        outputs = _outputs(networks[j], vectors[j], item, architecture, experts[j])
        check_labels(path, item.split.labels, outputs, str(experts[j]))
        loaded.append(item)
        classes.append(outputs)
        tell(f"reading {path.name}", len(experts) + j + 2, steps)
    return Group(
        labels,
        base,
        tuple(experts),
        tuple(data),
        architecture,
        tuple(networks),
        space.flatten(origin),
        vectors,
        tuple(heads),
        patterns,
        tuple(loaded),
        form,
        tuple(classes),
        any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()),
    )


@dataclass(frozen=True)
class SingleExpert:
    """One checkpoint with its network and images, read and checked.

    Attributes:
        architecture: the network's name.
        network: the network, with initial weights; its head may have another size than the checkpoint's.
        state: every tensor of the checkpoint.
        private: names of the network's parameters that stay the expert's own.
        data: images of its task.
    """

    architecture: str
    network: nn.Module
    state: Mapping[str, Tensor]
    private: tuple[str, ...]
    data: LoadedImages


def load_expert(
    checkpoint: Path,
    data: Path,
    *,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    private: Sequence[str] | None = None,
    shared_head: bool = False,
    images: int = 128,
    seed: int = 0,
    split: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> SingleExpert:
    """Read one checkpoint and images of its task and check that they belong together; see :func:`load_group`.

    Raises:
        MergeboundError: names the file, the field and the remedy.
    """
    state = load_state_dict(checkpoint)
    architecture = model or _recorded_architecture((checkpoint,))
    network = _build(architecture, dict(model_options or {}), checkpoint)
    patterns = _private_patterns(network, private, shared_head)
    _check_model(network, state, checkpoint, architecture, ())
    check_finite(state, {}, partition(state, ()), base_name=str(checkpoint))
    form = _input_format(network, architecture, image_size, mean, std)
    loaded = load_images(data, form, images=images, seed=seed, split=split)
    whole = Backbone.of(network, state, shared_head=True)
    outputs = _outputs(whole, whole.vector(state), loaded, architecture, checkpoint)
    check_labels(data, loaded.split.labels, outputs, str(checkpoint))
    names = tuple(name for name, _ in network.named_parameters() if matches(name, patterns))
    return SingleExpert(architecture, network, state, names, loaded)


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    stems = tuple(path.stem for path in paths)
    return stems if len(set(stems)) == len(stems) else tuple(str(path) for path in paths)


def _single(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()


def _recorded_architecture(paths: Sequence[Path]) -> str:
    for path in paths:
        if path.suffix == ".safetensors":
            recorded = read_metadata(path).get("architecture")
            if isinstance(recorded, str):
                return recorded
    raise MergeboundError(
        f"{paths[0]}: the checkpoints do not say which network they are of; pass --model with a timm model name (or "
        f"{', '.join(DIGIT_ARCHITECTURES)})"
    )


def _build(architecture: str, options: dict[str, Any], base: Path) -> nn.Module:
    for name in ("pretrained", "num_classes", "checkpoint_path"):
        if name in options:
            raise MergeboundError(f"--model-option {name}: weights and head come from the checkpoints; leave it out")
    if architecture in DIGIT_ARCHITECTURES and options:
        raise MergeboundError(
            f"--model-option {next(iter(options))}: model {architecture!r} has no options; leave it out"
        )
    try:
        return build_model(architecture, **options).eval()
    except MergeboundError as error:
        raise MergeboundError(f"--model {architecture} (for {base.name}): {error}") from None
    except Exception as error:  # timm's constructors raise whatever their options make them raise
        reason = str(error).partition("\n")[0]
        raise MergeboundError(
            f"--model {architecture}: timm cannot build it ({reason}); correct --model-option"
        ) from error


def _private_patterns(network: nn.Module, private: Sequence[str] | None, shared_head: bool) -> tuple[str, ...]:
    if private is not None and shared_head and any(private):
        raise MergeboundError("--private and --shared-head exclude each other; give one of them")
    if shared_head:
        return ()
    if private is not None:
        return tuple(pattern for pattern in private if pattern)
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
    if isinstance(classifier, nn.Module) and any(True for _ in classifier.parameters()):
        for name, module in network.named_modules():
            if module is classifier:
                return (f"{name}.*",)
    raise MergeboundError(
        f"--private: no single classifier found in {type(network).__name__}; name the experts' own tensors, as "
        "--private 'head.*', or pass --shared-head"
    )


def _check_model(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, architecture: str, patterns: tuple[str, ...]
) -> None:
    """Every tensor of the network in the checkpoint, and the other way round; private ones and a head's size apart."""
    expected = network.state_dict()
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
    outputs = (
        {id(tensor) for tensor in classifier.state_dict(keep_vars=True).values()}
        if isinstance(classifier, nn.Module)
        else set()
    )
    own = {name for name, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in outputs}
    remedy = f"name the network of these checkpoints with --model (now {architecture!r}) and --model-option"
    for name, tensor in expected.items():
        if matches(name, patterns):
            continue
        if name not in state:
            if name.endswith("num_batches_tracked"):
                continue
            raise MergeboundError(f"{path}: tensor '{name}' of the network is missing; {remedy}")
        skip = 1 if name in own else 0
        if state[name].shape[skip:] != tensor.shape[skip:]:
            raise MergeboundError(
                f"{path}: tensor '{name}' has shape {tuple(state[name].shape)} where the network has "
                f"{tuple(tensor.shape)}; {remedy}"
            )
    for name in state:
        if name not in expected and not matches(name, patterns):
            raise MergeboundError(f"{path}: tensor '{name}' is not in the network; {remedy}")


def _private_tensors(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, patterns: tuple[str, ...]
) -> dict[str, Tensor]:
    found = {}
    for name in network.state_dict():
        if not matches(name, patterns):
            continue
        if name not in state:
            raise MergeboundError(
                f"{path}: the private tensor '{name}' is missing; save the expert with its head, or change --private"
            )
        tensor = _single(state[name])
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path}: tensor '{name}' holds NaN or infinite values; use a checkpoint saved before training diverged"
            )
        found[name] = tensor
    return found


def _input_format(
    network: nn.Module,
    architecture: str,
    image_size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> InputFormat:
    if image_size is not None and image_size < 1:
        raise MergeboundError(f"--image-size {image_size}: give a positive number of pixels")
    if architecture in DIGIT_ARCHITECTURES:
        size = 8 if image_size is None else image_size
        half = (0.5,)
        return InputFormat(1, size, size, half if mean is None else mean, half if std is None else std)
    return input_format(network, image_size, mean=mean, std=std)


def _outputs(network: Backbone, vector: Tensor, item: LoadedImages, architecture: str, path: Path) -> int:
    try:
        with torch.no_grad():
            logits = network.call(vector, item.split.images[:1])
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise MergeboundError(
            f"{path}: the network {architecture!r} does not run on images of shape "
            f"{tuple(item.split.images.shape[1:])} ({reason}); correct --image-size, --model-option or --private"
        ) from error
    if logits.ndim != 2:
        raise MergeboundError(
            f"{path}: the network {architecture!r} returns shape {tuple(logits.shape)} instead of one row of logits; "
            "use an image classifier"
        )
    return int(logits.shape[1])
