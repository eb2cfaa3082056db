"""docs/theory-traps.md and the tests agree: every test it names exists, every test of a trap file is on it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "theory-traps.md").read_text(encoding="utf-8")
FILES = ("test_traps_setting.py", "test_traps_training.py", "test_traps_merging.py")


def rows() -> list[list[str]]:
    table = PAGE.split("| trap | section |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def named(cell: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w./]+\.py)::(test_\w+)`", cell)


@cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_is_complete_and_every_section_occurs() -> None:
    for row in rows():
        assert len(row) == 5, row
        assert all(row), row
        assert named(row[4]), row
        assert len(named(row[4])) == row[4].count("::"), row
    assert {int(row[1]) for row in rows()} == set(range(1, 13))


def test_every_named_test_exists() -> None:
    missing = [
        f"{file}::{test}"
        for row in rows()
        for file, test in named(row[4])
        if test not in functions_of((HERE / file).resolve())
    ]
    assert missing == []


def test_every_trap_test_is_on_the_page() -> None:
    listed = {pair for row in rows() for pair in named(row[4])}
    for file in FILES:
        absent = {test for test in functions_of(HERE / file) if (file, test) not in listed}
        assert absent == set(), file
