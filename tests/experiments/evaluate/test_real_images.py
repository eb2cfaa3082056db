"""The published ResNet-20 on real CIFAR-10 images: accuracy, fast paths, transfer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.evaluate.cpu import cpu
from experiments.evaluate.evaluate import evaluate
from experiments.evaluate.fast import closeness, plain_copy
from experiments.evaluate.folding import structure
from experiments.evaluate.paths import build, prepared
from experiments.evaluate.results import EvaluationSet
from experiments.models import CifarResNet
from experiments.tasks.types import Split

FOLDER = os.environ.get("MERGEBOUND_DATA")
pytestmark = pytest.mark.skipif(not FOLDER, reason="MERGEBOUND_DATA is not set: the real data sets are not here")


def test_the_published_network() -> None:
    folder = Path(FOLDER or "")
    model = CifarResNet(20)
    model.load_state_dict(load_file(next((folder / "cifar10_resnets").glob("resnet20-*.safetensors"))))
    with np.load(folder / "cifar10.npz", allow_pickle=False) as data:
        x, y = torch.from_numpy(data["x_test"]), torch.from_numpy(data["y_test"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (x.permute(0, 3, 1, 2).float() / 255.0 - mean) / std
    found = evaluate(model, EvaluationSet.of_split("cifar10", Split(images, y, np.arange(len(y)))), batch_size=64)
    accuracy = found.intervals["accuracy"]
    assert accuracy.value == pytest.approx(0.803, abs=0.005)  # the data's README: 80.3 %
    half = 1.96 * np.sqrt(0.803 * 0.197 / 1500)
    assert accuracy.high - accuracy.low == pytest.approx(2 * half, rel=0.15)

    plain = plain_copy(model)
    probe = images[:128]
    form = structure(plain, probe[:2])
    assert len(form.pairs) == 19
    with torch.inference_mode():
        wanted = plain(probe)
        for path in ["fp32+fold+channels_last", *(["bf16+fold+channels_last"] if cpu().bf16 else [])]:
            twin: nn.Module = build(plain, path, form.pairs, form.last)
            close = closeness(wanted, twin(prepared(probe, path)).float())
            assert close.holds(path), (path, close)
