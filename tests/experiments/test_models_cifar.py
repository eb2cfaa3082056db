"""The CIFAR ResNets: against a literal forward pass, published sizes and published accuracies."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.models import CifarResNet, build_model, count_parameters, input_format
from theory.errors import MergeboundError

PUBLISHED = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018}
ACCURACY = {
    20: ("resnet20-12fca82f", 80.3),
    32: ("resnet32-d509ac18", 82.7),
    44: ("resnet44-014dd654", 82.3),
    56: ("resnet56-4bfd9763", 82.3),
}


def literal(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The network written out: nothing of the class is used."""

    def norm(y: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        y = (y - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + 1e-5)
        return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    x = torch.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(torch.relu(norm(y, f"{name}.bn1")), state[f"{name}.conv2.weight"], padding=1)
            y = norm(y, f"{name}.bn2")
            if stride == 2:
                half = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:], dtype=x.dtype)
                x = torch.cat([half, x[:, :, ::2, ::2], half], dim=1)
            x = torch.relu(y + x)
    return x.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("depth", sorted(PUBLISHED))
def test_published_numbers_of_parameters(depth: int) -> None:
    model = build_model(f"cifar_resnet{depth}")
    assert count_parameters(model) == PUBLISHED[depth]
    assert count_parameters(build_model(f"cifar_resnet{depth}_gn")) == PUBLISHED[depth]
    blocks = (depth - 2) // 6
    wanted = {"conv1.weight", "linear.weight", "linear.bias"}
    norms = ["bn1"]
    for stage in (1, 2, 3):
        for block in range(blocks):
            wanted |= {f"layer{stage}.{block}.conv{k}.weight" for k in (1, 2)}
            norms += [f"layer{stage}.{block}.bn{k}" for k in (1, 2)]
    wanted |= {f"{n}.{part}" for n in norms for part in ("weight", "bias", "running_mean", "running_var")}
    assert {name for name in model.state_dict() if not name.endswith("num_batches_tracked")} == wanted


@pytest.mark.parametrize(("depth", "size"), [(20, 32), (32, 32), (20, 31)])
def test_forward_pass_written_out(depth: int, size: int) -> None:
    model = CifarResNet(depth, 7).double().eval()
    generator = torch.Generator().manual_seed(depth)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            state[name] = tensor * noise.exp() if name.endswith("running_var") else tensor + noise
    model.load_state_dict(state, strict=True)  # no step counters, like the published files
    images = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), literal(state, images, (depth - 2) // 6), rtol=1e-9, atol=1e-10)


def test_group_norm_and_grey_images() -> None:
    model = build_model("cifar_resnet20", 10, in_chans=1, norm="gn").eval()
    assert not list(model.buffers())
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == 19
    images = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(build_model("cifar_resnet20_gn").state_dict())


def test_timms_interface() -> None:
    model = CifarResNet(20, 10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = model.forward_features(images)
        assert maps.shape == (2, 64, 8, 8)
        pooled = model.forward_head(maps, pre_logits=True)
        assert pooled.shape == (2, 64)
        assert torch.equal(model.get_classifier()(pooled), model(images))
        model.reset_classifier(5)
        assert model(images).shape == (2, 5)
        model.reset_classifier(0)
        assert torch.equal(model(images), pooled)
    with pytest.raises(MergeboundError, match="6n"):
        CifarResNet(21)
    with pytest.raises(MergeboundError, match="'max'"):
        model.reset_classifier(5, "max")


@pytest.mark.skipif("MERGEBOUND_DATA" not in os.environ, reason="MERGEBOUND_DATA is not set: no CIFAR-10 networks")
def test_resnet20_reaches_the_accuracy_of_the_data_sets_notes() -> None:
    measured = accuracy(Path(os.environ["MERGEBOUND_DATA"]), 20)
    assert measured == pytest.approx(ACCURACY[20][1], abs=0.5)


def accuracy(folder: Path, depth: int) -> float:
    """Per cent of the 1,500 test images that a published network gets right."""
    weights = folder / "cifar10_resnets" / f"{ACCURACY[depth][0]}.safetensors"
    if not weights.exists():
        pytest.skip(f"{weights} is missing")
    model = build_model(f"cifar_resnet{depth}").eval()
    model.load_state_dict(load_file(weights), strict=True)
    form = input_format(model)
    with np.load(folder / "cifar10.npz", allow_pickle=False) as data:
        images, labels = torch.from_numpy(data["x_test"]), torch.from_numpy(data["y_test"])
    assert len(images) == 1500
    x = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(form.mean)[:, None, None]) / torch.tensor(form.std)[
        :, None, None
    ]
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), labels.split(250), strict=True))
    return 100.0 * right / len(labels)
