"""Families of growing size: parameters and operations against closed forms, spacing, names."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.models import (
    build_model,
    closest,
    count_flops,
    count_parameters,
    describe_family,
    resnet_family,
    vit_family,
)
from experiments.models.build import build_shapes
from experiments.models.families import SPACING, Described, FamilyMember, head_size, patch_of
from theory.errors import MergeboundError


@cache
def described(kind: str) -> tuple[Described, ...]:
    return describe_family(kind)


def vit_parameters(member: FamilyMember, patch: int, tokens: int, channels: int, classes: int) -> int:
    d = member.width
    block = 2 * (2 * d) + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    embedding = patch * patch * channels * d + d + tokens * d
    return embedding + member.depth * block + 2 * d + d * classes + classes


def vit_flops(member: FamilyMember, patch: int, tokens: int, channels: int, classes: int) -> int:
    d, n = member.width, tokens
    block = n * 12 * d * d + 2 * n * n * d
    return 2 * (n * patch * patch * channels * d + member.depth * block + d * classes)


def resnet_numbers(member: FamilyMember, side: int, channels: int, classes: int) -> tuple[int, int]:
    """Parameters and operations with the stem for small images."""
    w = member.width
    parameters = 9 * channels * w + 2 * w
    products = 9 * channels * w * side**2
    before = w
    for stage in range(4):
        wide = w * 2**stage
        side = side if stage == 0 else -(-side // 2)
        for block in range(member.depth):
            parameters += 9 * before * wide + 9 * wide * wide + 4 * wide
            products += (9 * before * wide + 9 * wide * wide) * side**2
            if block == 0 and stage > 0:
                parameters += before * wide + 2 * wide
                products += before * wide * side**2
            before = wide
    return parameters + before * classes + classes, 2 * (products + before * classes)


def test_members_are_spaced_geometrically_and_grow_both_ways() -> None:
    for kind, members in (("vit", vit_family()), ("resnet", resnet_family())):
        rows = described(kind)
        assert [row.member for row in rows] == list(members)
        assert len(members) == 7
        for row, member in zip(rows, members, strict=True):
            assert 0.8 < row.parameters / member.target < 1.25
        assert 0.07e6 < rows[0].parameters < 0.13e6
        assert 80e6 < rows[-1].parameters < 100e6
        ratios = [b.parameters / a.parameters for a, b in itertools.pairwise(rows)]
        assert all(SPACING / 1.6 < ratio < SPACING * 1.6 for ratio in ratios)
        for smaller, larger in itertools.pairwise(rows):
            assert smaller.member.width < larger.member.width
            assert smaller.member.depth <= larger.member.depth
            assert smaller.flops < larger.flops
    assert [m.depth for m in vit_family()] == [round(3 * 2 ** ((k - 1) / 3)) for k in range(1, 8)]
    assert [m.depth for m in resnet_family()] == [math.ceil(k / 2) for k in range(1, 8)]


def test_parameters_and_operations_in_closed_form() -> None:
    for row in described("vit"):
        assert row.parameters == vit_parameters(row.member, 4, 64, 3, 10)
        assert row.flops == vit_flops(row.member, 4, 64, 3, 10)
    for row in described("resnet"):
        assert (row.parameters, row.flops) == resnet_numbers(row.member, 32, 3, 10)


@pytest.mark.parametrize(("size", "channels", "classes"), [(8, 1, 4), (64, 3, 100)])
def test_closed_forms_for_other_images_and_norms(size: int, channels: int, classes: int) -> None:
    for k in (0, 3):
        patch, member = patch_of(size), vit_family()[k]
        model = build_shapes(member.name, classes, img_size=size, in_chans=channels)
        assert count_parameters(model) == vit_parameters(member, patch, (size // patch) ** 2, channels, classes)
        assert count_flops(model) == vit_flops(member, patch, (size // patch) ** 2, channels, classes)
        member = resnet_family()[k]
        for norm in ("bn", "gn"):
            model = build_shapes(member.name, classes, img_size=size, in_chans=channels, norm=norm)
            truth = resnet_numbers(member, size, channels, classes)
            assert (count_parameters(model), count_flops(model)) == truth


def test_operations_do_not_depend_on_how_they_are_counted() -> None:
    """Shapes alone, and a real forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("vit_s1", "resnet_s1", "cifar_resnet20"):
        model = build_model(name).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
        assert count_flops(model) == counter.get_total_flops()
    assert count_flops(build_shapes("cifar_resnet20")) == pytest.approx(
        2 * 40.55e6, rel=0.01
    )  # He et al.: 41M products
    with pytest.raises(MergeboundError, match="does not run on images of shape"):
        count_flops(build_model("vit_s1"), 40)


def test_stems_and_norms() -> None:
    small, large = build_model("resnet_s1"), build_model("resnet_s1", img_size=128)
    with torch.no_grad():
        assert small.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 4, 4)  # type: ignore[operator]
        assert large.forward_features(torch.zeros(2, 3, 128, 128)).shape == (2, 64, 4, 4)  # type: ignore[operator]
    assert isinstance(small.maxpool, nn.Identity)
    assert isinstance(large.maxpool, nn.MaxPool2d)
    grouped = build_model("resnet_s3", norm="gn")
    assert {m.num_groups for m in grouped.modules() if isinstance(m, nn.GroupNorm)} == {10}
    assert not list(grouped.buffers())
    by_name = build_model("resnet_s3_gn").state_dict()
    assert all(torch.equal(tensor, by_name[name]) for name, tensor in grouped.state_dict().items())


def test_photographs() -> None:
    for name in ("vit_s2", "resnet_s2"):
        model = build_shapes(name, 11, img_size=224)
        assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 11)
    assert (patch_of(224), patch_of(32), patch_of(64), patch_of(128), patch_of(28), patch_of(8)) == (16, 4, 8, 16, 4, 1)


def test_members_by_number_of_parameters() -> None:
    assert closest("vit", 1e6) == "vit_s3"
    assert closest("resnet", 1e9) == "resnet_s7"
    for member in (*vit_family(), *resnet_family()):
        assert closest(member.kind, 0.8 * member.target) == closest(member.kind, 1.25 * member.target) == member.name
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MergeboundError, match="positive number"):
            closest("vit", wrong)
    with pytest.raises(MergeboundError, match="did you mean 'resnet'"):
        closest("resnets", 1e6)


@given(st.integers(1, 600))
@settings(max_examples=40, deadline=None)
def test_patches_divide_the_image_or_the_error_names_sizes_that_work(size: int) -> None:
    try:
        patch = patch_of(size)
    except MergeboundError as error:
        named = [int(word) for word in str(error).rpartition("give ")[2].split() if word.isdigit()]
        assert named
        assert all(other % patch_of(other) == 0 for other in named)
        return
    assert size % patch == 0
    if 8 <= size <= 128:
        assert 16 <= (size // patch) ** 2 <= 256


@given(st.sampled_from([member.width for member in vit_family()]))
def test_heads_divide_the_width(width: int) -> None:
    assert width % head_size(width) == 0
    assert width // head_size(width) >= 3
