"""Run every code block and command of the README and the pages, each page in a scratch folder of its own.

``python docs/building/run_pages.py [PAGE ...]``: each page in a process of its own, which ends with an error at the
first block that does not do what the page says.  Commands that a page names without running them must exist, with their
options (:mod:`docs.building.inline`).  Commands of ``mergebound`` run inside that process (importing torch
once), everything else by ``bash``.  Files that pages name come from :mod:`docs.building.fixtures` before a page starts.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from docs.building import fixtures  # noqa: E402
from docs.building.blocks import Block, blocks_of, commands, pages  # noqa: E402
from docs.building.inline import command_line, inline_faults  # noqa: E402


class Failed(Exception):
    """A block did not do what its page says."""


def run_page(page: str, scratch: Path) -> tuple[int, int]:
    """Run one page in this process, with ``scratch`` as working directory; returns (blocks run, blocks marked).

    Raises:
        Failed: a block failed, or did not print what its mark says.
    """
    found = blocks_of(page)
    os.chdir(scratch)
    sys.path.insert(0, str(scratch))  # as in a session of Python that was started there
    fixtures.prepare(page, scratch)
    scope: dict[str, Any] = {"__name__": "__page__", **fixtures.names(page)}
    done = 0
    for block in found:
        if block.runs:
            run_block(block, scratch, scope)
            done += 1
    return done, sum(bool(block.marked("placeholder") or block.marked("elsewhere")) for block in found)


def run_block(block: Block, scratch: Path, scope: dict[str, Any]) -> None:
    """Write, execute or run one block and compare what it prints with its marks."""
    for name in block.marked("file"):
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.code)
    printed = ""
    if block.language == "python" and not block.marked("file"):
        printed = _python(block, scope)
    elif block.language == "sh":
        refused = block.marked("refused")
        for line in commands(block.code):
            printed += _command(block, line, scratch, expect_error=bool(refused))
        for words in refused:
            _expect(block, words, printed)
    for words in block.marked("prints"):
        _expect(block, words, printed)


def _expect(block: Block, words: str, printed: str) -> None:
    if " ".join(words.split()) not in " ".join(printed.split()):
        raise Failed(f"{block.place}: {words!r} was not printed; this was:\n{printed[-4000:]}")


def _python(block: Block, scope: dict[str, Any]) -> str:
    stream = io.StringIO()
    try:
        with contextlib.redirect_stdout(stream):
            exec(compile("\n" * block.line + block.code, str(ROOT / block.page), "exec"), scope)
    except Exception as error:
        raise Failed(f"{block.place}: {type(error).__name__}: {error}\n{stream.getvalue()[-2000:]}") from error
    return stream.getvalue()


def _command(block: Block, line: str, scratch: Path, *, expect_error: bool) -> str:
    words = shlex.split(line, comments=True)
    if words and words[0] == "mergebound" and not {"|", ">", "&&", ";"} & set(words):
        code, text = _inside(words[1:])
    else:
        code, text = _bash(line, scratch)
    if words[:2] == ["mergebound", "diff"] and code == 1:
        code = 0  # like diff(1), it answers "different" by its exit code
    if (code != 0) != expect_error:
        raise Failed(f"{block.place}: exit code {code} of `{line}`:\n{text[-4000:]}")
    return text


def _inside(arguments: list[str]) -> tuple[int, str]:
    """A command of ``mergebound`` in this process: exit code, and what it prints to both streams."""
    from experiments.cli import main

    stream = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code, stream.getvalue()


def _bash(line: str, scratch: Path) -> tuple[int, str]:
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=scratch, env=environment, text=True, timeout=1800,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def main(arguments: list[str]) -> int:
    """Run the pages named (default: all), each in a process and a scratch folder of its own."""
    if arguments[:1] == ["--inside"]:
        try:
            done, marked = run_page(arguments[1], Path(arguments[2]))
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{done} blocks run, {marked} marked")
        return 0
    chosen = arguments or list(pages())
    app = command_line()
    wrong = [fault for page in chosen for fault in inline_faults(page, app)]
    print("\n".join([*wrong, f"commands that pages name: {len(wrong)} wrong"]), flush=True)
    failed = len(wrong)
    with tempfile.TemporaryDirectory(prefix="pages-") as scratch:
        for page in chosen:
            if not blocks_of(page):
                continue
            start = time.monotonic()
            folder = Path(scratch, page.replace("/", "-").removesuffix(".md"))
            folder.mkdir()
            command = [sys.executable, __file__, "--inside", page, str(folder)]
            result = subprocess.run(command, text=True, stdout=subprocess.PIPE, cwd=ROOT, timeout=3600)
            state = result.stdout.strip().rpartition("\n")[2] if result.returncode == 0 else "FAILED"
            print(f"{page}: {state}, {time.monotonic() - start:.0f} s", flush=True)
            failed += result.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
