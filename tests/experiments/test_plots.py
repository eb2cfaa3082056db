"""Figures: drawn for every shape of input, deterministic, with captions, and true to the data behind them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments import plots as p
from experiments.validation import Settings
from tests.experiments.synthetic_frames import Frames, make_frames

QUICK = Settings(resamples=30)
DRAW: dict[str, Callable[[Frames], p.Picture]] = {
    "scatter": lambda f: p.predicted_against_measured(f.merges),
    "scatter_n": lambda f: p.predicted_against_measured(f.merges, "secant", colour="N"),
    "hyper": lambda f: p.risk_against_hyperparameters(f.merges, f.experts, "vit", settings=QUICK),
    "terms": lambda f: p.bound_terms(f.merges),
    "sweep": lambda f: p.coefficient_sweep(f.coefficients, 0),
    "line": lambda f: p.loss_along_line(f.lines, 0),
    "methods": lambda f: p.method_comparison(f.optimal, f.merges, settings=QUICK, seed=0),
    "bracket": lambda f: p.bracket_and_collapse(f.merges),
}


@pytest.fixture(scope="module", params=[1, 2])
def frames(request: pytest.FixtureRequest) -> Frames:
    names = ("vit", "resnet_gn")[: request.param]
    return make_frames(architectures=names, regimes=("mild", "harsh")[: request.param], groups_per_size=3)


@pytest.mark.parametrize("name", DRAW)
def test_every_figure_is_drawn_with_tier_and_seed(name: str, frames: Frames, tmp_path: Path) -> None:
    figure, caption = DRAW[name](frames)
    assert "Tier: estimated" in caption
    assert "Seed 0" in caption
    png = p.save_png(figure, tmp_path / "a.png", dpi=60)
    assert png.read_bytes().startswith(b"\x89PNG")
    _inside_the_canvas(figure)


def _inside_the_canvas(figure: Figure) -> None:
    """No axis label, title or legend text leaves the figure, and no two tick labels of an axis overlap."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = figure.bbox.width, figure.bbox.height
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        texts += [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]  # type: ignore[attr-defined]
        for axis in (ax.xaxis, ax.yaxis):
            boxes = [
                label.get_window_extent(renderer)
                for tick, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False)
                if label.get_text() and label.get_visible() and _in(axis.get_view_interval(), tick)
            ]
            for k, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[k + 1 :])
    for text in texts:
        if text.get_text():
            box = text.get_window_extent(renderer)
            assert box.x0 >= -1
            assert box.y0 >= -1
            assert box.x1 <= width + 1
            assert box.y1 <= height + 1


def _in(view: np.ndarray, value: float) -> bool:
    return bool(min(view) <= value <= max(view))


def test_output_is_deterministic() -> None:
    small = make_frames(architectures=("vit",), regimes=("mild",), groups_per_size=3)
    first, second = (p.bracket_and_collapse(small.merges).figure for _ in range(2))
    assert p.svg_bytes(first) == p.svg_bytes(second)
    assert p.png_bytes(first, 60) == p.png_bytes(second, 60)
    assert ET.fromstring(p.svg_bytes(first)).tag.endswith("svg")
    assert b"<dc:date>" not in p.svg_bytes(first)


def test_group_means_are_the_experts_means() -> None:
    merges = pd.DataFrame({"regime": "mild", "architecture": "vit", "experts": ["a;b", "b;c"]}, index=[7, 3])
    experts = pd.DataFrame(
        {
            "regime": "mild",
            "architecture": "vit",
            "expert": ["a", "b", "c"],
            "learning_rate": [0.01, 0.04, 0.09],
            "momentum": [0.0, 0.5, 0.9],
        }
    )
    out = p.group_means(merges, experts)
    assert out["mean_learning_rate"].tolist() == pytest.approx([0.02, 0.06])
    assert out["mean_momentum"].tolist() == pytest.approx([0.25, 0.7])
    assert "mean_steps" not in out


def test_stacked_terms_are_shares() -> None:
    merges = pd.DataFrame(
        {
            "regime": "mild",
            "architecture": "vit",
            "N": [2, 2],
            "term_training": [1.0, 2.0],
            "term_dispersion": [1.0, 1.0],
            "term_instability": [2.0, 1.0],
        }
    )
    heights = [patch.get_height() for patch in p.bound_terms(merges).figure.axes[0].patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([(0.25 + 0.5) / 2, 0.25, (0.5 + 0.25) / 2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: p.coefficient_sweep(pd.DataFrame()), "no rows"),
        (lambda: p.bound_terms(pd.DataFrame({"regime": ["mild"]})), "column architecture is missing"),
    ],
)
def test_missing_data_is_said(call: Callable[[], p.Picture], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
