"""Networks by name: options, seeds, names, and what they say that they take."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from experiments.models import build_model, count_parameters, input_format, list_models
from experiments.models.build import build_shapes, own_models
from experiments.models.form import _warn_of_crop
from theory.errors import MergeboundError

SMALL = ("vit", "resnet_gn", "cifar_resnet20", "vit_s1", "resnet_s1", "resnet_s1_gn", "test_vit", "test_resnet")


def test_digit_networks_have_the_sizes_that_they_had() -> None:
    sizes = {name: count_parameters(build_model(name)) for name in ("vit", "resnet_gn", "resnet_bn")}
    assert sizes == {"vit": 34_290, "resnet_gn": 38_770, "resnet_bn": 38_770}
    assert build_model("vit").get_parameter("pos_embed").std().item() == pytest.approx(0.3, rel=0.3)


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_names_the_weights_and_nothing_else_is_drawn(name: str) -> None:
    torch.manual_seed(5)
    untouched = torch.random.get_rng_state()
    first, again, other = (build_model(name, 4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), untouched)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_timm_networks_are_timms_own_with_the_given_options() -> None:
    ours = build_model("vit_tiny_patch16_224", 5, seed=3, img_size=32, in_chans=1, patch_size=8)
    torch.manual_seed(3)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, in_chans=1, patch_size=8)
    state = plain.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert ours(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet18", {"img_size": 32}, ("'img_size'", "leave 'img_size' out", "in_chans", "stem_type")),
        ("vit_tiny_patch16_224", {"widht": 3}, ("'widht'", "img_size", "patch_size", "embed_dim")),
        ("vit_tiny_patch16_224", {"num_classes": 3}, ("'num_classes'", "classes=")),
        ("resnet18", {"pretrained": True}, ("'pretrained'", "initial weights")),
        ("cifar_resnet20", {"patch_size": 4}, ("'patch_size'", "in_chans, img_size, norm")),
        ("vit", {"img_size": 32}, ("'img_size'", "takes none")),
        ("vit_s1", {"norm": "gn"}, ("'norm'", "in_chans, img_size")),
        ("resnet_s1_gn", {"norm": "bn"}, ("'norm'", "in_chans, img_size")),
        ("resnet_s1", {"norm": "ln"}, ("'ln'", "'bn'", "'gn'")),
        ("cifar_resnet20", {"norm": "ln"}, ("'ln'", "'bn'", "'gn'")),
        ("vit_s1", {"img_size": (32, 16)}, ("(32, 16)", "one number")),
        ("vit_s1", {"img_size": 31}, ("31", "30 or 32")),
        ("swin_tiny_patch4_window7_224", {"img_size": -3}, ("timm cannot build it with img_size=-3",)),
        ("vit_tiny_patch16_225", {}, ("no model 'vit_tiny_patch16_225'", "vit_tiny_patch16_224")),
        ("cifar_resnet21", {}, ("no model 'cifar_resnet21'", "cifar_resnet20")),
        ("vit_s8", {}, ("no model 'vit_s8'", "vit_s7")),
        ("resnet18.no_such_tag", {}, ("resnet18.no_such_tag", "no_such_tag")),
    ],
)
def test_errors_name_the_option_and_the_remedy(name: str, options: dict[str, object], says: tuple[str, ...]) -> None:
    with pytest.raises(MergeboundError) as caught:
        build_model(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_options_that_are_none_are_left_out() -> None:
    assert count_parameters(build_model("test_resnet", 10, img_size=None, in_chans=None)) == count_parameters(
        build_model("test_resnet", 10)
    )


def test_names_are_listed_and_each_of_the_toolkits_own_can_be_built() -> None:
    everything = list_models()
    assert everything[: len(own_models())] == own_models()
    assert set(timm.list_models()) <= set(everything)
    assert len(set(everything)) == len(everything)
    assert list_models("vit_s?") == tuple(f"vit_s{k}" for k in range(1, 8))
    assert "cifar_resnet20" in list_models("resnet20")
    assert list_models("nothing_is_called_so") == ()
    for name in own_models():
        model = build_shapes(name, 3)
        form = input_format(model)
        images = torch.empty(2, form.channels, form.height, form.width, device="meta")
        assert model.eval()(images).shape == (2, 3)


# --- what a network takes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch16_clip_224", "mixer_b16_224", "convnext_atto"])
def test_the_input_form_is_timms(name: str) -> None:
    model = build_shapes(name)
    form, config = input_format(model), resolve_model_data_config(model)
    assert (form.channels, form.height, form.width) == config["input_size"]
    assert (form.mean, form.std, form.crop) == (config["mean"], config["std"], config["crop_pct"])
    assert form.interpolation == config["interpolation"]


def test_the_input_form_follows_how_the_network_was_built() -> None:
    form = input_format(build_shapes("vit_tiny_patch16_224", 10, img_size=32, in_chans=1, patch_size=4))
    assert (form.channels, form.height, form.width) == (1, 32, 32)
    assert form.mean == pytest.approx((0.5,))
    assert input_format(build_shapes("swin_tiny_patch4_window7_224", 10, img_size=256)).height == 256
    assert input_format(build_shapes("resnet_s2", 10, img_size=64, in_chans=2)).height == 64
    assert input_format(build_shapes("resnet18", 10, in_chans=1)).mean == pytest.approx(
        (sum((0.485, 0.456, 0.406)) / 3,)
    )
    form = input_format(build_shapes("resnet18"), 48, mean=(0.1,), std=(0.2, 0.3, 0.4))
    assert (form.height, form.width, form.mean, form.std) == (48, 48, (0.1,), (0.2, 0.3, 0.4))


def test_the_input_form_of_the_cifar_and_digit_networks() -> None:
    cifar = input_format(build_model("cifar_resnet20"))
    assert (cifar.channels, cifar.height, cifar.width) == (3, 32, 32)
    assert (cifar.mean, cifar.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name in ("vit", "resnet_gn", "resnet_bn"):
        form = input_format(build_model(name))
        assert (form.channels, form.height, form.width, form.mean, form.std) == (1, 8, 8, (0.5,), (0.5,))


def test_photographs_that_timm_squashes_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_crop.cache_clear()
    model = build_shapes("convnext_atto")
    input_format(model)
    assert not caplog.records
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash"}
    for _ in range(2):
        input_format(model)
    (record,) = caplog.records
    assert "'squash'" in record.getMessage()
    assert "ConvNeXt" in record.getMessage()


def test_any_network_has_an_input_form() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1))
    assert input_format(model).channels == 2
    with pytest.raises(MergeboundError, match="image_size = 0"):
        input_format(model, 0)
    with pytest.raises(MergeboundError, match="mean"):
        input_format(model, mean=(0.1, 0.2, 0.3))
