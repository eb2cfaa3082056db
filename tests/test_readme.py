"""The code of the README and of the pages runs, commands exist, tables are current, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import theory
from docs.building import fixtures
from docs.building.api_pages import PACKAGES
from docs.building.blocks import blocks_of, commands, faults, pages
from docs.building.captions import captioned
from docs.building.command_pages import cell, command_pages
from docs.building.docstrings import escape_bars, together
from docs.building.inline import command_line, inline_commands, inline_faults
from docs.building.links import dead
from docs.building.run_pages import Failed, run_block
from experiments.cli import build_app
from experiments.commands.methods import markdown_table
from experiments.grid.expand import expand
from experiments.grid.yaml_source import parse_grid

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/grid.md", "docs/merging.md", "docs/tasks-and-models.md", "docs/theory.md")
"""Pages whose Python blocks are run, in order and in one namespace each."""

TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXTS["README.md"]


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], flags=re.DOTALL)


def test_the_page_on_merging_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    for number, code in enumerate(blocks("python", "docs/merging.md")):
        exec(compile(code, f"docs/merging.md block {number}", "exec"), scope)
    printed = capsys.readouterr().out
    assert "photos" in printed
    assert float(printed.splitlines()[-1]) > 0.01  # the barrier before alignment


def test_the_page_on_theory_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    for number, code in enumerate(blocks("python", "docs/theory.md")):
        exec(compile(code, f"docs/theory.md block {number}", "exec"), scope)
    printed = capsys.readouterr().out
    for words in (
        "E F(M) <= 0.2696   (tier: certified)",
        "ours, master bound",
        "no guarantee: the operator is discontinuous",
        "limits reached: budget of samples",
        "guaranteed; tier: certified",
        "widened most by: photos.learning_rate",
    ):
        assert words in printed, words


def test_the_page_on_tasks_and_models_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    for number, code in enumerate(blocks("python", "docs/tasks-and-models.md")):
        exec(compile(code, f"docs/tasks-and-models.md block {number}", "exec"), scope)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("['sun397', 'stanford_cars'")
    assert lines[2].split()[:3] == ["108", "12", "40"]
    assert lines[4] == "True"  # half of the data lies within four fifths of them
    assert lines[2].split()[3] == lines[7].split()[2]  # the split's digest comes with the expert


def test_the_page_on_grids_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for code in blocks("python", "docs/grid.md"):
        exec(compile(code, "docs/grid.md", "exec"), {})
    assert capsys.readouterr().out.split()[:2] == ["1000", "logistic"]
    grid = parse_grid(blocks("yaml", "docs/grid.md")[0], "docs/grid.md")
    sgd, adamw = 3 * 2, 2  # learning rates x tied batch sizes; AdamW has one learning rate
    assert len(expand(grid.spec)) == 2 * 2 * (sgd + adamw) * 2  # tasks, networks, seeds


def test_calculators_named_on_the_page_on_theory_are_exported() -> None:
    table = TEXTS["docs/theory.md"].split("| statement | calculator |")[1].split("\n\n")[0]
    rows = [line.split("|")[2] for line in table.splitlines()[2:]]
    assert len(rows) >= 18
    for name in re.findall(r"`(\w+)", "".join(rows)):
        assert name in theory.__all__, name


def test_the_table_of_methods_is_current() -> None:
    page = TEXTS["docs/merging.md"]
    table = page.split("<!-- methods: begin -->")[1].split("<!-- methods: end -->")[0].strip()
    assert table == markdown_table(), "run `mergebound methods --markdown` and paste its output into docs/merging.md"


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


GROUPS = ("advise", "base", "collect", "data", "grid", "measure", "models", "study")
"""Commands whose options belong to commands of their own."""


ALL = pages()
"""The README and every page that is written by hand; `make docs` runs their blocks and commands."""
CHEAP = ("docs/concepts.md", "docs/migration.md", "docs/tutorials/merge.md", "docs/tutorials/report.md")
"""Pages that are run here too, in a second or two each."""


@pytest.mark.parametrize("page", ALL)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    assert [fault for block in blocks_of(page) for fault in faults(block)] == []


@pytest.mark.parametrize("page", CHEAP)
def test_cheap_pages_do_what_they_say(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fixtures.prepare(page, tmp_path)
    scope: dict[str, object] = {}
    for block in blocks_of(page):
        if block.runs:
            run_block(block, tmp_path, scope)


def test_the_runner_notices_what_does_not_hold(tmp_path: Path) -> None:
    """Blocks are found with their marks; one that prints something else, fails or is not refused is an error."""
    page = "\n".join(
        [
            "<!-- prints: two -->\n```python\nprint('one')\n```",
            "```python\nassert False\n```",
            "<!-- refused: no -->\n```sh\necho no\n```",
            "```sh\nexit 3\n```",
            "```yaml\na: 1\n```",
        ]
    )
    found = blocks_of("page.md", page)
    assert [block.language for block in found] == ["python", "python", "sh", "sh", "yaml"]
    assert [len(list(faults(block))) for block in found] == [0, 0, 0, 0, 1]
    for block in found[:4]:
        with pytest.raises(Failed, match=block.place):
            run_block(block, tmp_path, {})
    assert commands("# a\nb \\\n  c\n\nd # e") == ("b c", "d # e")


def test_the_tutorials_bound_is_the_example() -> None:
    (written,) = [b for b in blocks_of("docs/tutorials/newcomer.md") if b.marked("file") == ("own_bound.py",)]
    assert written.code == (ROOT / "docs/examples/own_bound.py").read_text()


def test_the_tutorials_bound_passes_the_tutorials_tests(tmp_path: Path) -> None:
    """In this process: the files as the page gives them, and every test of the second one."""
    names = ("own_bound.py", "test_own_bound.py")
    code = {
        name: next(b.code for b in blocks_of("docs/tutorials/newcomer.md") if name in b.marked("file"))
        for name in names
    }
    bound: dict[str, object] = {}
    exec(compile(code["own_bound.py"], "own_bound.py", "exec"), bound)
    tests: dict[str, object] = dict(bound)
    exec(compile(code["test_own_bound.py"].replace("from own_bound import never_drawn\n", ""), names[1], "exec"), tests)
    for n in (2, 7):
        tests["test_the_algorithm_that_remembers_one_sample_attains_it"](n)  # type: ignore[operator]
    for name in (
        "remembering_more_stays_below",
        "more_than_one_epoch_says_nothing",
        "steps_may_be_an_array",
        "a_missing_constant_is_named",
    ):
        tests[f"test_{name}"]()  # type: ignore[operator]


@pytest.fixture(scope="module")
def app() -> Any:
    return command_line()


@pytest.mark.parametrize("page", ALL)
def test_commands_and_options_that_a_page_names_exist(page: str, app: Any) -> None:
    assert list(inline_faults(page, app)) == []


def test_the_pages_name_most_commands(app: Any) -> None:
    named = {" ".join(command.removeprefix("mergebound ").split()[:2]) for page in ALL
             for _, command in inline_commands(page, app)}  # fmt: skip
    assert {"data get", "models show", "grid run", "study scale", "study hyperparameters", "advise training"} <= named
    assert {"demo", "merge", "predict", "bound", "methods", "finetune"} <= {one.split()[0] for one in named}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Use `mergebound grid run FILE --store out`, and `grid\nplan ...`.", []),
        ("`collect fisher|gram`, `mergebound GROUP --any`, `python x --any`, `measure` and `merge`", []),
        ("As `study scale --report-only` or ``mergebound merge --help``", []),
        ("```text\nmergebound nothing\n```", []),
        ("One\n`mergebound mrege --out x`", ["page.md:2: `mergebound` has no command 'mrege'"]),
        ("`grid\nplann`", ["page.md:1: `mergebound grid` has no command 'plann'"]),
        ("`collect fisher|grams`", ["page.md:1: `mergebound collect` has no command 'grams'"]),
        ("`study scale --cluster`", ["page.md:1: `mergebound study scale` has no option --cluster"]),
        ("`mergebound merge --ou=x`", ["page.md:1: `mergebound merge` has no option --ou"]),
        ("`merge --coeff 1`", ["page.md:1: `mergebound merge` has no option --coeff"]),
        (
            "<!-- elsewhere: x -->\n```sh\nmergebound demo \\\n  --slow\n```",
            ["page.md:2: `mergebound demo` has no option --slow"],
        ),
        ("<!-- refused: x -->\n```sh\nmergebound demo --slow\n```", []),
    ],
)
def test_a_command_that_there_is_not_is_named_with_its_line(text: str, said: list[str], app: Any) -> None:
    found = list(inline_faults("page.md", app, text))
    assert len(found) == len(said)
    assert all(one.startswith(start) for one, start in zip(found, said, strict=True)), found


def test_figures_and_links_exist() -> None:
    """Links into the generated part are checked by the build of the site."""
    for page in ALL:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            made = "generated/" in target
            assert target.startswith("http") or made or ((ROOT / page).parent / target).exists(), (page, target)


DOCUMENTED = {name for package, groups in PACKAGES.items() for _, modules in groups
              for name in (package, *(f"{package}.{module}" for module in modules))}  # fmt: skip
"""Modules that have a page of the programming interface."""


def test_modules_that_pages_import_are_documented() -> None:
    for page in ALL:
        code = "\n".join(block.code for block in blocks_of(page) if block.language == "python")
        used = set(re.findall(r"^(?:from|import) ((?:theory|merging|experiments)[\w.]*)", code, flags=re.MULTILINE))
        assert used <= DOCUMENTED, (page, sorted(used - DOCUMENTED))


def test_documented_modules_exist() -> None:
    for name in DOCUMENTED:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name


def test_every_command_has_its_page_with_every_option() -> None:
    found = command_pages()
    for command, option in (("merge", "--coef"), ("study", "--report-only"), ("grid", "--forget-damaged")):
        assert option in found[f"{command}.md"]
    for group in GROUPS:
        help_of_group = CliRunner().invoke(build_app(), [group, "--help"], env={"COLUMNS": "200"}).output
        for name in re.findall(r"^│ ([a-z][a-z-]*)  ", help_of_group, flags=re.MULTILINE):
            assert f"## `mergebound {group} {name}`" in found[f"{group}.md"], (group, name)


def test_text_of_the_code_survives_markup() -> None:
    """Norms in docstrings and options in help are shown as they are written."""
    assert escape_bars(["|x| and ``|y|``", "so::", "", "    a | b", "", "and |z|"]) == [
        "\\|x\\| and ``|y|``", "so::", "", "    a | b", "", "and \\|z\\|",
    ]  # fmt: skip
    assert escape_bars([]) == []
    assert together(":ivar a, b: two, both: here") == ":ivar a,b: two, both: here"
    assert together(":param a: one, alone") == ":param a: one, alone"
    assert escape_bars(["|a\nb|", ""]) == ["\\|a", "b\\|", ""]
    assert cell("as `a|b` or --out [x*y]") == "as `a\\|b` or --out \\[x\\*y\\]"
    named = "<!-- file: a.py -->\n<!-- prints: x -->\n```python\npass\n```"
    assert captioned(named) == "<!-- prints: x -->\n```{code-block} python\n:caption: a.py\n\npass\n```"
    assert captioned("```python\npass\n```") == "```python\npass\n```"


def test_dead_links_of_the_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#here">x</a> <a href="https://example.org/c">x</a>')
    (tmp_path / "b.html").write_text('<h1 id="here">x</h1> <a href="#gone">x</a> <img src="no.png">')
    assert list(dead(tmp_path)) == ["b.html: #gone: there is no such anchor", "b.html: no.png: there is no such file"]
