"""The report: self-contained, complete, honest about what is missing, atomic."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import atomic
from experiments import report as r
from experiments import validation as v
from experiments.atomic import write_atomically
from tests.experiments.synthetic_frames import Frames, make_frames

QUICK = v.Settings(resamples=40)
META = {
    "command": "mergebound demo --seed 0",
    "seed": 0,
    "versions": {"torch": "2.11"},
    "hashes": {"grid.yaml": "0123abcd"},
    "assumptions": [("samples are <independent>", "violated", "tasks share images"), ("seeds", "holds", "by design")],
    "notes": ["A note of the author."],
}


class Page(HTMLParser):
    """Collects tags, identifiers and references; checks that tags are balanced."""

    void = frozenset(["meta", "br", "hr", "img", "link"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def frames() -> Frames:
    return make_frames(architectures=("vit",), groups_per_size=4)


@pytest.fixture(scope="module")
def page(frames: Frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    return r.write_report(
        out, frames.merges, frames.experts, frames.coefficients, frames.lines, frames.optimal, META, QUICK
    )


def test_page_is_self_contained_and_well_formed(page: Path) -> None:
    text = page.read_text()
    assert "http:" not in text
    assert "https:" not in text
    parsed = Page(text)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {"script", "link", "img", "iframe"}.isdisjoint(parsed.tags)
    known = {f"#{name}" for name in parsed.ids}
    assert all(reference in known for reference in parsed.references)


def test_page_has_every_figure_table_and_fact(page: Path, frames: Frames) -> None:
    text = page.read_text()
    names = sorted(path.stem for path in (page.parent / "figures").glob("*.png"))
    assert names == sorted(path.stem for path in (page.parent / "figures").glob("*.svg"))
    assert len(names) == 8
    assert all(f'<figure id="{name}">' in text for name in names)
    assert text.count("<figcaption>") == 8
    assert "samples are &lt;independent&gt;" in text
    for fact in ("mergebound demo --seed 0", "0123abcd", "torch", "A note of the author.", "within N", "calibrated"):
        assert fact in text
    assert "Not drawn" not in text
    saved = pd.read_csv(page.parent / "results.csv")
    assert len(saved) == len(frames.merges)
    assert np.allclose(saved["measured_loss"], frames.merges["measured_loss"])
    for name in ("experts", "coefficients", "lines", "optimal", "table_validation", "table_aims"):
        assert (page.parent / f"{name}.csv").stat().st_size > 0
    assert not [path for path in page.parent.rglob("*") if path.name.startswith(".")]


def test_headline_quotes_the_tables(frames: Frames) -> None:
    tables = r.compute_tables(frames.merges, frames.optimal, QUICK)
    text = " ".join(r.headline(frames.merges, tables))
    assert f"{len(frames.merges)} merged models (1 architecture, 2 regimes)" in text
    assert "both tangents" in text
    harsh = tables.brackets[tables.brackets["regime"] == "harsh"].iloc[0]
    assert f"AUC {harsh['auc']:.2f}" in text
    assert f"in {100 * harsh['inside']:.0f} % of merges" in text
    assert "is vacuous in 100 %" in text
    assert re.search(r"\d+ of \d+ stated aims are met", text)


def test_missed_aims_are_named(frames: Frames) -> None:
    merges = frames.merges.copy()
    for column in [name for name in merges if name.startswith("pred_")]:
        merges[column] *= 3.0
    text = " ".join(r.headline(merges, r.compute_tables(merges, None, QUICK)))
    assert re.search(r"not met: median error of the best function-space prediction \(ViT, mild: [12]\.\d\d, aim", text)
    assert "bracket holds the measurement" in text


def test_missing_frames_and_columns_are_reported(tmp_path: Path, frames: Frames) -> None:
    bare = frames.merges[["regime", "architecture", "group", "N", "method", "experts", "measured_loss", "pred_secant"]]
    text = r.write_report(tmp_path, bare, settings=QUICK).read_text()
    assert "Not drawn" in text
    assert "coefficient_sweep: coefficient sweep: there are no rows to draw" in text
    assert '<figure id="predicted_against_measured">' in text
    assert not (tmp_path / "lines.csv").exists()


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column experts is missing"):
        r.write_report(tmp_path / "x", pd.DataFrame({"regime": ["a"], "architecture": ["b"]}))
    assert not (tmp_path / "x").exists()


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_atomically(tmp_path / "a.txt", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_only_stated_aims_are_counted(frames: Frames) -> None:
    tables = r.compute_tables(frames.merges, None, QUICK)
    stated = tables.aims[tables.aims["kind"] == "stated"]
    assert len(stated) < len(tables.aims)
    assert not stated["regime"].eq("all").any()
    sentence = r.headline(frames.merges, tables)[-1]
    assert sentence.startswith(f"{int(stated['met'].sum())} of {len(stated)} stated aims")


def test_reestimated_statistics_come_with_their_verdict(frames: Frames) -> None:
    merges = frames.merges.assign(reestimated_loss=2.0, reestimated_accuracy=0.5)
    table = r.reestimated_table(merges)
    assert set(table["verdict"]) == {"not covered"}
    mean = merges[(merges["method"] == "ties") & (merges["regime"] == table["regime"].iloc[0])]
    mean = mean[mean["architecture"] == table["architecture"].iloc[0]]["measured_loss"].mean()
    row = table[(table["method"] == "ties")].iloc[0]
    assert row["measured_loss"] == pytest.approx(mean)
    assert r.reestimated_table(frames.merges).empty
