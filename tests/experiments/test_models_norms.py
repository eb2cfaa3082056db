"""The inventory of normalisation layers against literal walks over the modules."""

from __future__ import annotations

import pytest
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

from experiments.models import NormLayer, build_model, normalisation_layers, statistics_advice
from experiments.models.build import build_shapes
from merging.batchnorm import reestimate_batchnorm

WALKS: tuple[tuple[str, dict[str, set[str]]], ...] = (
    ("resnet18", {"BatchNorm": {"BatchNorm2d"}}),
    ("efficientnet_b0", {"BatchNorm": {"BatchNormAct2d"}}),
    ("vit_tiny_patch16_224", {"LayerNorm": {"LayerNorm"}}),
    ("vit_small_patch14_dinov2", {"LayerNorm": {"LayerNorm"}, "layer scale": {"LayerScale"}}),
    ("convnextv2_atto", {"LayerNorm": {"LayerNorm", "LayerNorm2d"}, "GlobalResponseNorm": {"GlobalResponseNorm"}}),
    ("resnetv2_50x1_bit", {"GroupNorm": {"GroupNormAct"}, "weight standardisation": {"StdConv2d"}}),
    ("nfnet_f0", {"weight standardisation": {"ScaledStdConv2d", "ScaledStdConv2dSame"}}),
    ("levit_128s", {"BatchNorm": {"BatchNorm1d", "BatchNorm2d"}}),
    ("vit_so150m_patch16_reg4_gap_256", {"LayerNorm": {"LayerNorm"}}),
    ("aimv2_large_patch14_224", {"RMSNorm": {"RmsNorm"}}),
    ("poolformer_s12", {"GroupNorm": {"GroupNorm1"}, "LayerNorm": {"LayerNorm2d"}, "layer scale": {"LayerScale2d"}}),
    ("resnet_s2_gn", {"GroupNorm": {"GroupNorm"}}),
    ("cifar_resnet32", {"BatchNorm": {"BatchNorm2d"}}),
)


@pytest.mark.parametrize(("name", "walk"), WALKS, ids=[name for name, _ in WALKS])
def test_layers_are_those_of_a_literal_walk(name: str, walk: dict[str, set[str]]) -> None:
    model = build_shapes(name)
    found = normalisation_layers(model)
    literal = []
    for path, module in model.named_modules():
        for kind, classes in walk.items():
            if type(module).__name__ in classes:
                literal.append((path, kind))
    assert [(layer.name, layer.kind) for layer in found] == literal
    assert literal
    for layer in found:
        module = model.get_submodule(layer.name)
        assert layer.has_statistics == ("running_mean" in dict(module.named_buffers(recurse=False)))
        own = dict(module.named_parameters(recurse=False))
        if layer.kind != "weight standardisation":
            assert layer.affine == bool({"weight", "gamma"} & set(own))
        assert layer.channels == (own.get("weight") if "weight" in own else next(iter(own.values()))).squeeze().shape[0]


def test_every_kind_is_known_by_itself() -> None:
    kinds = {
        "BatchNorm": nn.BatchNorm2d(6),
        "InstanceNorm": nn.InstanceNorm2d(6),
        "LayerNorm": nn.LayerNorm(6),
        "GroupNorm": nn.GroupNorm(2, 6),
        "RMSNorm": nn.RMSNorm(6),
        "frozen BatchNorm": freeze_batch_norm_2d(nn.BatchNorm2d(6)),
    }
    model = nn.ModuleDict({kind.replace(" ", "_"): layer for kind, layer in kinds.items()})
    found = normalisation_layers(model)
    assert [layer.kind for layer in found] == list(kinds)
    assert {layer.channels for layer in found} == {6}
    assert [layer.has_statistics for layer in found] == [True, False, False, False, False, True]
    assert [layer.affine for layer in found] == [True, False, True, True, True, True]
    bare = normalisation_layers(nn.ModuleList([nn.BatchNorm2d(5, affine=False, track_running_stats=False)]))
    assert bare == [NormLayer("0", "BatchNorm", 5, False, False)]
    assert normalisation_layers(nn.Linear(3, 3)) == []


def test_bare_parameters_that_scale_a_branch_are_noted() -> None:
    layers = normalisation_layers(build_shapes("convnext_atto"))
    scales = [layer for layer in layers if layer.kind == "layer scale"]
    assert len(scales) == 2 + 2 + 6 + 2  # one for each block
    assert scales[0] == NormLayer("stages.0.blocks.0.gamma", "layer scale", 40, False, True)


def test_the_advice_is_what_reestimation_changes() -> None:
    model = build_model("cifar_resnet20", 4)
    layers = normalisation_layers(model)
    advice = statistics_advice(layers)
    assert "19 BatchNorm layers" in advice
    assert "688 channels" in advice
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = reestimate_batchnorm(model, state, [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    changed = {name.rpartition(".")[0] for name in state if not torch.equal(state[name], fresh[name])}
    assert changed == {layer.name for layer in layers if layer.has_statistics}
    assert "nothing to re-estimate" in statistics_advice(normalisation_layers(build_shapes("vit_s1")))
    frozen = freeze_batch_norm_2d(build_model("cifar_resnet20", 4))
    assert "frozen" in statistics_advice(normalisation_layers(frozen))
