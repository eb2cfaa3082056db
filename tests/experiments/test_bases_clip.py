"""CLIP bases: logits equal to open_clip's own computation on a tiny model; files, heads and prompts; no network."""

from __future__ import annotations

import json
import socket
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bases import BaseSpec, load_base, read_base, save_base
from experiments.bases.prompts import GENERIC, TEMPLATES, templates_for
from experiments.tasks.catalogue import prompt_names, vision
from merging.checkpoint import save_state_dict
from theory.errors import MergeboundError

NAME, OTHER = "tiny-clip-of-the-tests", "another-of-the-tests"
CLASSES = ("zero", "one", "a cat", "naïve café")


def test_every_vision_task_has_its_customary_templates() -> None:
    for entry in vision():
        found = templates_for(entry.name)
        assert found == templates_for(entry.title), entry.name
        assert all(template.count("{}") == 1 for template in found), entry.name
        assert len(set(found)) == len(found), entry.name
    names = [entry.name for entry in vision()]
    generic = [name for name in names if templates_for(name) is GENERIC]
    assert generic == []
    assert len(TEMPLATES) == 20
    counts = {name: len(templates_for(name)) for name in ("sun397", "resisc45", "dtd", "cifar100", "stanford_cars")}
    assert counts == {"sun397": 2, "resisc45": 18, "dtd": 8, "cifar100": 18, "stanford_cars": 8}
    assert templates_for("my own images") is GENERIC


def test_without_open_clip_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from experiments.bases.clip import load_clip

    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MergeboundError, match=r"pip install 'mergebound\[clip\]'"):
        load_clip("ViT-B-32")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("MERGEBOUND_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """open_clip, which was told of a tiny model."""
    open_clip = pytest.importorskip("open_clip", reason="the clip extra is not installed")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder = tmp_path_factory.mktemp("config")
    (folder / f"{NAME}.json").write_text(json.dumps(config))
    config["embed_dim"] = 12
    (folder / f"{OTHER}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return open_clip


@pytest.fixture(scope="module")
def truth(library: Any) -> nn.Module:
    """A random tiny model, every tensor away from its start."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: nn.Module = library.create_model(NAME)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def images(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def written(model: nn.Module, path: Path) -> Path:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_state_dict(path, state) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def literal_head(library: Any, model: nn.Module, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Class by class, template by template."""
    tokenizer = library.get_tokenizer(NAME)
    rows = []
    with torch.no_grad():
        for name in names:
            each = []
            for template in templates:
                embedding = model.encode_text(tokenizer([template.format(name)]))[0]  # type: ignore[operator]
                each.append(embedding / embedding.norm())
            mean = torch.stack(each).mean(0)
            rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_zero_shot_logits_are_open_clips_own(library: Any, truth: nn.Module, tmp_path: Path, suffix: str) -> None:
    from experiments.bases.clip import load_clip
    from experiments.bases.zero_shot import text_head

    path = written(truth, tmp_path / f"w{suffix}")
    clip = load_clip(NAME, path)
    templates = templates_for("cifar10")
    text = text_head(clip, CLASSES, templates=templates)
    torch.testing.assert_close(text, literal_head(library, truth, CLASSES, templates), rtol=1e-5, atol=1e-6)
    build = library.build_zero_shot_classifier
    theirs = build(truth, library.get_tokenizer(NAME), CLASSES, templates)
    torch.testing.assert_close(text, theirs.T, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        image = F.normalize(truth.encode_image(images()), dim=-1)  # type: ignore[operator]
        wanted = truth.logit_scale.exp() * image @ theirs  # type: ignore[operator,union-attr]
        model = clip.classifier(text)
        torch.testing.assert_close(model(images()), wanted, rtol=1e-4, atol=1e-4)
        features = model.forward_features(images())
        assert torch.equal(model.forward_head(features), model(images()))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), image)
    assert clip.provenance.sha256 == sha256(path.read_bytes()).hexdigest()
    assert (clip.form.height, clip.form.mean) == (32, library.OPENAI_DATASET_MEAN)


def test_the_weights_are_open_clips_own_loading_at_another_image_size_too(
    library: Any, truth: nn.Module, tmp_path: Path
) -> None:
    from experiments.bases.clip import load_clip

    path = written(truth, tmp_path / "w.safetensors")
    for size in (None, 48):
        theirs = library.create_model(NAME, pretrained=str(path), force_image_size=size).eval()
        clip = load_clip(NAME, path, image_size=size)
        with torch.no_grad():
            given = images(size=size or 32)
            assert torch.equal(clip.model.encode_image(given), theirs.encode_image(given))  # type: ignore[operator]
        assert clip.form.height == (size or 32)


def test_a_clip_base_is_stored_read_back_and_split_like_a_timm_model(
    library: Any, truth: nn.Module, tmp_path: Path
) -> None:
    from experiments.bases.clip import load_clip
    from experiments.models import forward_backbone, head_prefix
    from experiments.models.form import input_format

    path = written(truth, tmp_path / "w.safetensors")
    spec = BaseSpec(kind="clip", architecture=NAME, weights=path, class_names=CLASSES, data="mnist")
    base = load_base(spec, cache=tmp_path / "texts")
    assert load_base(spec, cache=tmp_path / "texts").digest == base.digest
    assert len(list((tmp_path / "texts").glob("text-*.safetensors"))) == 1
    save_base(tmp_path / "base.safetensors", base)
    model = read_base(tmp_path / "base.safetensors").model()
    assert head_prefix(model) == "head."
    form = input_format(model)
    assert (form.channels, form.height, form.width) == (3, 32, 32)
    assert (form.mean, form.std) == (library.OPENAI_DATASET_MEAN, library.OPENAI_DATASET_STD)
    assert {name.partition(".")[0] for name in base.state} == {"visual", "head"}
    clip = load_clip(NAME, path)
    names = prompt_names("mnist", CLASSES)
    text = literal_head(library, truth, names, templates_for("mnist"))
    with torch.no_grad():
        torch.testing.assert_close(model(images()), clip.classifier(text)(images()), rtol=1e-4, atol=1e-4)
        logits = model.get_classifier()(forward_backbone(model, images()))  # type: ignore[operator]
        torch.testing.assert_close(logits, model(images()))
    model.reset_classifier(7)  # type: ignore[operator]
    assert model(images()).shape == (3, 7)


def test_openais_own_state_dict_brings_quickgelu(library: Any, tmp_path: Path) -> None:
    from experiments.bases.clip import load_clip

    theirs = library.create_model(NAME, force_quick_gelu=True).eval()
    state = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    extra = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(20),
        "vocab_size": torch.tensor(49408),
    }
    torch.save(state | extra, tmp_path / "openai.pt")
    clip = load_clip(NAME, tmp_path / "openai.pt")
    assert clip.quick_gelu
    theirs.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        assert torch.equal(clip.model.encode_image(images()), theirs.encode_image(images()))  # type: ignore[operator]
    path = written(theirs, tmp_path / "renamed.safetensors")
    for chosen in (True, False):
        again = load_clip(NAME, path, quick_gelu=chosen)
        with torch.no_grad():
            equal = torch.equal(again.model.encode_image(images()), theirs.encode_image(images()))  # type: ignore[operator]
        assert equal is chosen
    base = clip.base(CLASSES)
    assert base.options == {"quick_gelu": True}
    with torch.no_grad():
        image = F.normalize(theirs.encode_image(images()), dim=-1)
        wanted = image @ base.state["head.weight"].T
        torch.testing.assert_close(base.model()(images()), wanted, rtol=1e-4, atol=1e-4)


def test_a_cache_of_texts_depends_on_weights_names_and_templates(
    library: Any, truth: nn.Module, tmp_path: Path
) -> None:
    from experiments.bases.clip import load_clip
    from experiments.bases.zero_shot import text_head

    clip = load_clip(NAME, written(truth, tmp_path / "w.safetensors"))
    other = load_clip(NAME, written(library.create_model(NAME), tmp_path / "v.safetensors"))
    cache = tmp_path / "texts"
    first = text_head(clip, CLASSES, cache=cache)
    assert torch.equal(first, text_head(clip, CLASSES, cache=cache))
    text_head(other, CLASSES, cache=cache)
    text_head(clip, CLASSES[::-1], cache=cache)
    text_head(clip, CLASSES, templates=("{}",), cache=cache)
    files = sorted(cache.iterdir())
    assert len(files) == 4
    for file in files:
        save_state_dict(file, {"other": torch.zeros(2)})
    with pytest.raises(MergeboundError, match=r"text-[0-9a-f]+\.safetensors: is not what was stored"):
        text_head(clip, CLASSES, cache=cache)


def test_what_is_wrong_is_named(library: Any, truth: nn.Module, tmp_path: Path) -> None:
    from experiments.bases.clip import load_clip
    from experiments.bases.zero_shot import text_head

    path = written(truth, tmp_path / "w.safetensors")
    with pytest.raises(MergeboundError, match="no CLIP model 'ViT-Z-1'"):
        load_clip("ViT-Z-1", path)
    with pytest.raises(
        MergeboundError, match=r"w\.safetensors: does not fit another-of-the-tests: .*text_projection is"
    ):
        load_clip(OTHER.replace("-of", "/of"), path)
    with pytest.raises(MergeboundError, match="give a local file, or one of the tags"):
        load_clip(NAME)
    with pytest.raises(MergeboundError, match="there are no weights tagged 'gold'"):
        load_clip("ViT-B-32", tag="gold")
    with pytest.raises(MergeboundError, match="mergebound base get clip:ViT-B-32:laion2b_s34b_b79k"):
        load_clip("ViT-B-32", tag="laion2b_s34b_b79k", cache=tmp_path)
    save_state_dict(tmp_path / "hf.safetensors", {"vision_model.embeddings.class_embedding": torch.zeros(3)})
    with pytest.raises(MergeboundError, match="names of the transformers library"):
        load_clip(NAME, tmp_path / "hf.safetensors")
    short = {n: t for n, t in truth.state_dict().items() if n != "ln_final.weight"}
    save_state_dict(tmp_path / "short.safetensors", short)
    with pytest.raises(MergeboundError, match=r"short\.safetensors: does not fit .*: missing ln_final\.weight"):
        load_clip(NAME, tmp_path / "short.safetensors")
    spec = BaseSpec(kind="clip", architecture=NAME, weights=path, class_names=CLASSES, options={"img_size": 32})
    with pytest.raises(MergeboundError, match="option 'img_size' is unknown; a CLIP base takes image_size"):
        load_base(spec)
    clip = load_clip(NAME, path)
    with pytest.raises(MergeboundError, match=r"template 'a photo' needs exactly one \{\}"):
        text_head(clip, CLASSES, templates=("a photo",))
    with pytest.raises(MergeboundError, match="no templates or no class names"):
        text_head(clip, ())
