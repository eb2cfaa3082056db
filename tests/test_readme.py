"""The README's code runs, its commands exist, and its figure is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import build_app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run_and_print_what_they_claim(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")[number]
    scope: dict[str, object] = {}
    exec(compile(code, f"README block {number}", "exec"), scope)
    printed = capsys.readouterr().out
    if "bound" in scope:
        assert all(word in printed for word in ("training", "dispersion", "instability", "A1", "certified"))
        assert scope["bound"].value > 0  # type: ignore[attr-defined]
    if "best" in scope:
        risk_of_average = float(printed.splitlines()[0])
        assert scope["best"].risk <= risk_of_average  # type: ignore[attr-defined]
        assert scope["best"].gap < 1e-5  # type: ignore[attr-defined]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_commands_and_options_exist() -> None:
    runner, app = CliRunner(), build_app()
    commands = set(re.findall(r"`?mergebound (\w+)", README))
    assert {"demo", "predict", "bound", "merge", "methods"} <= commands
    for command in commands:
        result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, command
        used = {
            option
            for line in README.splitlines()
            if f"mergebound {command}" in line
            for option in re.findall(rf"mergebound {command}[^`]*?(--[\w-]+)", line)
        }
        assert all(option in result.output for option in used), command


def test_figures_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
