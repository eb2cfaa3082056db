"""The command line of ``benchmarks/merging.py``."""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks.merge_speed.agreement import Agreement
from benchmarks.merge_speed.cases import CASES, FLOOR, OURS, STATES, TOOLS, State
from benchmarks.merge_speed.data import count, file_bytes, vit_shapes, write_checkpoints
from benchmarks.merge_speed.machine import available_memory, describe
from benchmarks.merge_speed.run import ROOT, Bench, Run, run_case
from benchmarks.merge_speed.tables import Row, agreement_rows, raw_rows, report, summarise, write_csv

_TINY = 30_000
_QUICK = ("linear", "ties_tensor", "ties_global")
_LARGE = ("linear", "ties_tensor", "ties_global")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; tables go to the folder ``--out`` and to the terminal."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a worker is ended as well
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    machine = describe(shlex.join(["python", "benchmarks/merging.py", *without_paths(given)]), options.seed)
    runs: list[Run] = []
    found: list[Agreement] = []
    many: list[Row] = []

    def save() -> None:
        """Write what there is so far, so that an interrupted benchmark leaves its tables."""
        if options.out is not None:
            write(options.out, runs, found, machine, many)

    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-speed-")))
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in options.dtypes:
            _measure(options, folder, options.parameters, dtype, options.cases, options.tools, runs, found, save)
        if options.large:
            kind = large_dtype(free_bytes(folder), options.experts)
            if kind is None:
                tell(f"500M parameters: skipped, {free_bytes(folder) / 1e9:.0f} GB free, too little even in bfloat16")
            else:
                _measure(options, folder, 500_000_000, kind, _LARGE, (OURS, FLOOR), runs, found, save)
    if options.many:
        many += in_memory()
    if not runs and not many:
        tell("nothing ran")
        return 1
    save()
    print(page(runs, found, machine, many))
    wrong = [item for item in found if not item.agrees]
    for item in wrong:
        tell(f"{item.dtype} {item.case}: {item.tool} and ours do not agree, {item}")
    return 1 if wrong or any(run.error and run.tool == OURS for run in runs) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options; ``--quick`` changes defaults."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/merging.py", description="What merging files costs: ours, mergekit, FusionBench and the floor."
    )
    parser.add_argument("--quick", action="store_true", help="1M parameters x 3 experts, three merges, one warm round")
    parser.add_argument("--large", action="store_true", help="also 500M parameters, ours alone")
    parser.add_argument("--many", action="store_true", help="also 10,000 merges in memory (benchmarks/merging_many.py)")
    parser.add_argument("--parameters", type=float, help="of a checkpoint (default 97e6)")
    parser.add_argument("--experts", type=int, help="default 8")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default both (--quick: float32)")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), help="default all")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="default all")
    parser.add_argument("--states", nargs="+", choices=STATES, help="default warm, cold and whole")
    parser.add_argument("--rounds", type=int, help="runs of each tool in each state (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="for every tool (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoints")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that a run may take")
    parser.add_argument("--memory", type=float, help="GB that a peer may map (default: 90 %% of what is available)")
    parser.add_argument("--folder", type=Path, help="for checkpoints and outputs; kept (default: a temporary one)")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="the environment of the peers")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: print only)")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.parameters = int(options.parameters or (1e6 if quick else 97e6))
    options.experts = options.experts or (3 if quick else 8)
    options.dtypes = options.dtypes or (["float32"] if quick else ["float32", "bfloat16"])
    options.cases = options.cases or list(_QUICK if quick else CASES)
    options.states = options.states or (["warm"] if quick else list(STATES))
    options.rounds = options.rounds or (1 if quick else 3)
    return options


def _measure(
    options: argparse.Namespace,
    folder: Path,
    parameters: int,
    dtype: str,
    cases: Sequence[str],
    tools: Sequence[str],
    runs: list[Run],
    found: list[Agreement],
    save: Callable[[], None],
) -> None:
    shapes = vit_shapes(parameters)
    needed = file_bytes(shapes, dtype) * (1 + options.experts + len(TOOLS))
    place = folder / f"{parameters}-{dtype}-{options.seed}"
    ready = (place / f"e{options.experts - 1}.safetensors").exists()
    if not ready and free_bytes(folder) < needed:
        tell(f"{parameters / 1e6:.0f}M, {dtype}: skipped, {needed / 1e9:.0f} GB of disk are needed")
        return
    tell(f"{count(shapes) / 1e6:.1f}M parameters x {options.experts}, {dtype}: writing checkpoints")
    base, *experts = write_checkpoints(place, shapes, options.experts, dtype, options.seed)
    tiny = write_checkpoints(folder / f"tiny-{dtype}", vit_shapes(_TINY), options.experts, dtype, options.seed)
    peers = options.peers.absolute() / "bin" / "python"
    own = Path(sys.executable)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    bench = Bench(
        base=base.resolve(),
        experts=tuple(file.resolve() for file in experts),
        warm_up=tuple(file.resolve() for file in tiny),
        parameters=count(shapes),
        dtype=dtype,
        scratch=scratch.resolve(),
        pythons={"ours": own, "floor": own, "mergekit": peers, "fusionbench": peers},
        threads=options.threads,
        rounds=options.rounds,
        limit=options.limit,
        memory=int(options.memory * 1e9) if options.memory else int(0.9 * available_memory()),
    )
    states: list[State] = options.states
    for name in cases:
        if (CASES[name].experts or 0) < options.experts:
            ran, compared = run_case(bench, name, tools, states, tell)
            runs += ran
            found += compared
            save()
    shutil.rmtree(scratch)
    if options.folder is None:
        shutil.rmtree(place)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder."""
    return shutil.disk_usage(folder).free


def large_dtype(free: int, experts: int) -> str | None:
    """The storage type in which 500M parameters x experts fit with two outputs and a tenth to spare."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        if free > 1.1 * size * 500_000_000 * (experts + 3):
            return dtype
    return None


def without_paths(arguments: Sequence[str]) -> list[str]:
    """The options without folders of this machine."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--folder", "--peers", "--out"):
            skip = True
        elif argument.split("=")[0] not in ("--folder", "--peers", "--out"):
            kept.append(argument)
    return kept


def in_memory() -> list[Row]:
    """Merges per second in memory, one row per task."""
    from benchmarks.merging_many import measure_many

    return [asdict(rate) | {"ratio": rate.ratio} for rate in measure_many(watch=tell)]


def page(runs: Sequence[Run], found: Sequence[Agreement], machine: dict[str, str], many: Sequence[Row] = ()) -> str:
    """The page of all tables."""
    tools = "; ".join(
        f"{tool}: {text}" for tool, text in {run.tool: run.version for run in runs if run.version}.items()
    )
    return report(summarise(runs), found, machine | ({"tools": tools} if tools else {}), many)


def write(
    out: Path, runs: Sequence[Run], found: Sequence[Agreement], machine: dict[str, str], many: Sequence[Row] = ()
) -> None:
    """Write the page as ``tables.md``, and one CSV file per table."""
    out.mkdir(parents=True, exist_ok=True)
    tables = {
        "runs": raw_rows(runs),
        "summary": summarise(runs),
        "agreement": agreement_rows(found),
        "in_memory": many,
    }
    for name, content in tables.items():
        if content:
            write_csv(out / f"{name}.csv", content)
    (out / "tables.md").write_text(page(runs, found, machine, many), encoding="utf-8")


def tell(line: str) -> None:
    """Progress, on the error stream."""
    print(line, file=sys.stderr, flush=True)
