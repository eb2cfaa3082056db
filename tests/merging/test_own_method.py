"""A method of one's own, as the guide says: in Python, by file, by entry point, and under the conformance tests."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.cli import main
from merging.errors import MethodError
from merging.merge import merge_state_dicts
from merging.method import Method
from merging.registry import get
from merging.settings import Rule
from tests.conformance import test_methods as conformance

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "examples" / "own_method.py"
PAGE = (ROOT / "docs" / "own_method.md").read_text()
EXPERTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def median() -> Method:
    return get(f"{FILE}:METHOD")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_states(tmp_path)
    return tmp_path


def write_states(place: Path) -> None:
    for index, name in enumerate(("base", *EXPERTS)):
        generator = torch.Generator().manual_seed(index)
        save_file({"body.weight": torch.randn(4, 3, generator=generator)}, place / f"{name}.safetensors")


def states() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base, *experts = (load_file(f"{name}.safetensors") for name in ("base", *EXPERTS))
    return base, dict(zip(EXPERTS, experts, strict=True))


def literal(coefficient: float) -> Tensor:
    base, experts = states()
    deltas = np.stack([(state["body.weight"] - base["body.weight"]).numpy() for state in experts.values()])
    return base["body.weight"] + coefficient * torch.from_numpy(np.median(deltas, axis=0))


@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_is_the_median(median: Method, experts: int) -> None:
    vectors = conformance.vectors(0, experts)
    merged = median.function(vectors, coefficient=0.7)
    for name in conformance.NAMES:
        expected = 0.7 * np.median(np.stack([v[name].numpy() for v in vectors]), axis=0)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_in_python(folder: Path, median: Method) -> None:
    base, experts = states()
    merged = merge_state_dicts(median, base, experts, coefficient=0.5)
    torch.testing.assert_close(merged["body.weight"], literal(0.5))
    merged = merge_state_dicts(median, base, experts, rules=[Rule("body.*", {"coefficient": 0.9})])
    torch.testing.assert_close(merged["body.weight"], literal(0.9))
    without_base = merge_state_dicts(median, None, experts)
    torch.testing.assert_close(without_base["body.weight"], literal(1.0))
    with pytest.raises(MethodError, match="outside its domain"):
        merge_state_dicts(median, base, experts, coefficient="high")


def test_the_guides_command(folder: Path) -> None:
    (command,) = re.findall(r"```sh\n(mergebound merge .*)\n```", PAGE)
    words = [word.replace("docs/examples/own_method.py", str(FILE)) for word in shlex.split(command)]
    assert words[0] == "mergebound"
    with contextlib.suppress(SystemExit):
        main(words[1:])
    torch.testing.assert_close(load_file("merged.safetensors")["body.weight"], literal(0.9))


BY_NAME = """
import json, sys
from merging.registry import get, methods
from merging.merge import merge_state_dicts
from safetensors.torch import load_file, save_file

base, *experts = (load_file(f"{name}.safetensors") for name in ("base", "a", "b", "c"))
merged = merge_state_dicts("median", base, dict(zip("abc", experts)), coefficient=0.9)
save_file(merged, "merged.safetensors")
print(json.dumps([list(methods()), get("median").name]), flush=True)
import pytest, os
os.chdir(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def announced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """In one process for which a distribution that announces the method is installed: a merge, and the conformance."""
    (table,) = re.findall(r'```toml\n\[project.entry-points."(.*)"\]\n(.*)\n```', PAGE)
    (command,) = re.findall(r"```sh\n(pytest .*)\n```", PAGE)
    place = tmp_path_factory.mktemp("announced")
    write_states(place)
    site = place / "site"
    metadata = site / "own_merging-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "own_method.py").write_text(FILE.read_text())
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-merging\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{table[0]}]\n{table[1].replace(chr(34), '')}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", BY_NAME, str(ROOT), *shlex.split(command)[1:], "-q", "-p", "no:cacheprovider"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return place, done


def test_by_entry_point(announced: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    place, done = announced
    assert done.stdout, done.stderr
    monkeypatch.chdir(place)
    listed, name = json.loads(done.stdout.splitlines()[0])
    assert {"median", "ties", "average"} <= set(listed)
    assert name == "median"
    torch.testing.assert_close(load_file("merged.safetensors")["body.weight"], literal(0.9))


def test_conformance(announced: tuple[Path, Any]) -> None:
    _, done = announced
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= sum(name.startswith("test_") for name in vars(conformance)) >= 14


def test_the_guide_shows_the_file_and_it_is_short() -> None:
    code = FILE.read_text()
    assert f"```python\n{code}```" in PAGE
    tree = ast.parse(code)
    documentation: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            documentation |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    lines = [line for number, line in enumerate(code.splitlines(), 1) if line.strip() and number not in documentation]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(lines) - len(imports) <= 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.py:METHOD", "there is no file"),
        (f"{FILE}:METHODS", "has no 'METHODS'"),
        (f"{FILE}:median", "not a merging.method.Method"),
        ("no.such.module:METHOD", "cannot be imported"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        get(text)


def test_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))
    found: Any = get("own_method:METHOD")
    assert found.name == "median"
