"""What a user sees who types something wrong: one line that says what to do, exit code 2, nothing written."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from experiments.cli import INTERRUPTED, interruption, main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def error_line(capture: Capture, *arguments: str) -> str:
    """The one line on standard error of a command that is refused."""
    assert exit_code(*arguments) == 2
    shown = capture.readouterr()
    lines = [line for line in shown.err.splitlines() if line.strip()]
    assert "Traceback" not in shown.out + shown.err
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_an_unknown_preset_is_answered_with_the_presets(capsys: Capture, tmp_path: Path) -> None:
    line = error_line(capsys, "demo", "--spec", "digits9")
    assert "'digits9'" in line
    assert "digits8-smoke" in line
    assert list(tmp_path.iterdir()) == []


def test_a_missing_spec_file_is_named(capsys: Capture, tmp_path: Path) -> None:
    line = error_line(capsys, "demo", "--spec", "mine.yaml")
    assert "mine.yaml: no such file" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [unclosed", ["own.yaml", "YAML"]),
        ("name: x\nseed: [1, 2]", ["own.yaml", "seed"]),
        ("", ["own.yaml"]),
    ],
)
def test_a_bad_spec_file_is_named_with_the_place(capsys: Capture, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "own.yaml").write_text(text)
    line = error_line(capsys, "demo", "--spec", "own.yaml")
    for word in words:
        assert word in line
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_a_missing_recipe_is_named(capsys: Capture) -> None:
    assert "absent.yaml" in error_line(capsys, "bound", "--recipe", "absent.yaml")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["frobnicate"], "frobnicate"),
        (["demo", "--frobnicate"], "--frobnicate"),
        (["demo", "--workers", "many"], "--workers"),
        (["merge"], "experts"),
    ],
)
def test_what_the_parser_refuses_comes_with_the_way_to_the_help(
    capsys: Capture, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    assert exit_code(*arguments) == 2
    shown = capsys.readouterr()
    assert problem in shown.err
    assert "--help" in shown.err
    assert "Traceback" not in shown.out + shown.err
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "predict", "merge", "bound"])
def test_every_command_explains_itself(capsys: Capture, command: str) -> None:
    assert exit_code(command, "--help") == 0
    assert f"mergebound {command}" in capsys.readouterr().out


def test_no_arguments_list_the_commands(capsys: Capture) -> None:
    exit_code()
    shown = capsys.readouterr()
    for command in ("demo", "predict", "merge", "methods", "bound"):
        assert command in shown.out + shown.err


def test_an_interruption_says_that_the_next_run_continues(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.demo.run_demo", interrupted)
    code = exit_code("demo", "--spec", "digits8-smoke")
    shown = capsys.readouterr()
    assert code == 130
    assert "Traceback" not in shown.err
    assert "run the same command again to continue" in shown.err


def test_an_interruption_of_what_keeps_nothing_says_so(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.commands.about_experts.Chosen.open", interrupted)
    checkpoints = ("--base", "b", "--experts", "e", "--data", "d")
    for words in (("twins", "--learning-rate", "0.1", "--steps", "3"), ("curvature",), ("landscape",)):
        assert exit_code("measure", *words, *checkpoints) == 130
        assert "nothing is kept to go on from" in capsys.readouterr().err
    kept = [("grid", "run"), ("advise", "training"), ("merge",)], [("advise", "merge"), ("predict",), ()]
    assert [[interruption(words) == INTERRUPTED for words in some] for some in kept] == [[True] * 3, [False] * 3]


def test_an_output_folder_that_cannot_be_made_is_named(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = error_line(capsys, "demo", "--spec", "digits8-smoke", "--out", str(tmp_path / "file"))
    assert "--out" in line
    assert "choose another" in line


def test_the_version_is_that_of_the_distribution(capsys: Capture) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.strip() == f"mergebound {importlib.metadata.version('mergebound')}"
