"""Start workers: one process per run, tools in turn (A B A B ...), with limits of time and memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.merge_speed.agreement import Agreement, compare
from benchmarks.merge_speed.cache import evict, warm
from benchmarks.merge_speed.cases import CASES, FLOOR, OURS, Plan, State
from benchmarks.merge_speed.tools import output_files

ROOT = Path(__file__).resolve().parents[2]
_SLOW = 60.0
"""Seconds above which a tool runs twice in a state and not more often."""


@dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        case, tool, dtype, state, parameters, experts, threads, round: what ran.
        input_bytes, output_bytes: of the files read (each once) and written.
        user, system, wall: seconds of the merge; of the whole process where the state is ``whole``.
        level: bytes of anonymous memory after imports (0 where the state is ``whole``).
        above: largest bytes of anonymous memory above it, of the measured merge.
        resident: share of the inputs in the page cache just before.
        device_read: bytes fetched from the device.
        imports: processor seconds until the tool was imported.
        version: of the tool.
        error: why there are no numbers, empty if there are.
    """

    case: str
    tool: str
    dtype: str
    state: str
    parameters: int
    experts: int
    threads: int
    round: int
    input_bytes: int = 0
    output_bytes: int = 0
    user: float = float("nan")
    system: float = float("nan")
    wall: float = float("nan")
    level: float = float("nan")
    above: float = float("nan")
    resident: float = float("nan")
    device_read: float = float("nan")
    imports: float = float("nan")
    version: str = ""
    error: str = ""

    @property
    def cpu(self) -> float:
        """Processor seconds."""
        return self.user + self.system

    @property
    def rate(self) -> float:
        """Bytes of inputs and output per second of wall time."""
        return (self.input_bytes + self.output_bytes) / self.wall


@dataclass(frozen=True)
class Bench:
    """What all runs of one set of files share.

    Attributes:
        base, experts: the files.
        warm_up: the same for the tiny merge.
        parameters: of one checkpoint.
        dtype: storage type.
        scratch: folder for outputs.
        pythons: interpreter of each tool.
        threads: per tool.
        rounds: how often each tool runs in each state (once in ``whole``).
        limit: seconds that a run may take.
        memory: bytes of writable memory that a run may map, 0 for no limit.
    """

    base: Path
    experts: tuple[Path, ...]
    warm_up: tuple[Path, ...]
    parameters: int
    dtype: str
    scratch: Path
    pythons: Mapping[str, Path]
    threads: int = 1
    rounds: int = 3
    limit: float = 900.0
    memory: int = 0


Tell = Callable[[str], None]


def run_case(
    bench: Bench, name: str, tools: Sequence[str], states: Sequence[State], tell: Tell
) -> tuple[list[Run], list[Agreement]]:
    """Run one merge with every tool that has it, in turn, and compare what they wrote with what ours wrote."""
    case = CASES[name]
    able = [tool for tool in tools if case.has(tool)]
    if not any(tool not in (OURS, FLOOR) for tool in able) and name == "ties_global_4":
        return [], []
    files = bench.experts[: case.experts]
    plan = Plan(
        tool=OURS,
        case=name,
        state="warm",
        base=str(bench.base),
        experts=tuple(map(str, files)),
        out="",
        warm_up=tuple(map(str, bench.warm_up[: 1 + len(files)])),
        dtype=bench.dtype,
        threads=bench.threads,
    )
    runs: list[Run] = []
    kept: dict[str, Path] = {}
    for state, turn, tool in turns(able, states, bench.rounds):
        earlier = [run for run in runs if run.tool == tool]
        if any(run.error for run in earlier):
            continue
        if turn >= 2 and any(run.wall > _SLOW for run in earlier):
            continue
        out = bench.scratch / f"{name}-{tool}"
        shutil.rmtree(out, ignore_errors=True)
        guard = 0 if tool in (OURS, FLOOR) else bench.memory
        run = run_once(bench, replace(plan, tool=tool, state=state, out=str(out), memory=guard), turn)
        runs.append(run)
        tell(_line(run))
        if not run.error and tool != FLOOR and tool not in kept:
            kept[tool] = bench.scratch / f"{name}-{tool}.kept"
            shutil.rmtree(kept[tool], ignore_errors=True)
            out.rename(kept[tool])
        shutil.rmtree(out, ignore_errors=True)
    found = []
    if OURS in kept:
        for tool, folder in kept.items():
            if tool != OURS:
                ours, theirs = output_files(kept[OURS]), output_files(folder)
                found.append(compare(name, tool, bench.dtype, bench.base, ours, theirs, random=case.random))
    for folder in kept.values():
        shutil.rmtree(folder, ignore_errors=True)
    return runs, found


def turns(tools: Sequence[str], states: Sequence[State], rounds: int) -> Iterator[tuple[State, int, str]]:
    """State, round and tool of every run: within a state the tools take turns; ``whole`` has one round."""
    for state in states:
        for turn in range(1 if state == "whole" else rounds):
            for tool in tools:
                yield state, turn, tool


def run_once(bench: Bench, plan: Plan, turn: int) -> Run:
    """One process; the page cache is set up here, before it starts."""
    run = Run(plan.case, plan.tool, plan.dtype, plan.state, bench.parameters, len(plan.experts), plan.threads, turn)
    python = bench.pythons.get(plan.tool)
    if python is None or not python.exists():
        return replace(run, error="not installed: make bench-peers installs it into an environment of its own")
    (evict if plan.state == "cold" else warm)(plan.inputs)
    plan_file, result_file = bench.scratch / "plan.json", bench.scratch / "result.json"
    plan_file.write_text(json.dumps(plan.to_json()), encoding="utf-8")
    result_file.unlink(missing_ok=True)
    one = str(plan.threads)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"), one),
    }
    command = [
        str(python),
        "-P",
        "-m",
        "benchmarks.merge_speed.worker",
        str(plan_file),
        str(result_file),
    ]
    log = bench.scratch / "worker.log"
    with open(log, "wb") as output:
        status, wall, user, system = _wait(command, environment, output.fileno(), bench)
    if status is None:
        return replace(run, error=f"stopped after {bench.limit:.0f} s")
    if not result_file.exists():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return replace(run, error=f"ended with status {status}: {' '.join(last)}"[:200])
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    if "error" in result:
        return replace(run, error=result["error"])
    whole = plan.state == "whole"
    return replace(
        run,
        input_bytes=sum(os.path.getsize(file) for file in plan.inputs),
        output_bytes=result["written"],
        user=user if whole else result["user"],
        system=system if whole else result["system"],
        wall=wall if whole else result["wall"],
        level=0 if whole else result["level"],
        above=result["level"] + result["above"] if whole else result["above"],
        resident=result.get("resident", float("nan")),
        device_read=result["device_read"],
        imports=result["imports_cpu"],
        version=result["version"],
    )


def _wait(
    command: Sequence[str], environment: Mapping[str, str], log: int, bench: Bench
) -> tuple[int | None, float, float, float]:
    """Exit status (``None`` where the time limit ended it), wall, user and system seconds of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=bench.scratch,
        start_new_session=True,
    )
    late = False
    try:
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            if not late and time.perf_counter() - start > bench.limit:
                late = True
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.005)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30.0)
        raise
    wall = time.perf_counter() - start
    return (None if late else process.returncode), wall, usage.ru_utime, usage.ru_stime


def _line(run: Run) -> str:
    head = f"{run.dtype} {run.case} x{run.experts} {run.state} {run.round + 1} {run.tool}: "
    if run.error:
        return head + run.error
    return head + (
        f"CPU {run.cpu:.2f} s, wall {run.wall:.2f} s, {run.rate / 1e9:.2f} GB/s, "
        f"memory +{run.above / 1e9:.3f} GB, resident {run.resident:.2f}"
    )
