"""One run in a process of its own: ``python -P -m benchmarks.merge_speed.worker PLAN.json RESULT.json``."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.merge_speed.cache import resident, warm
from benchmarks.merge_speed.cases import CASES, Job, Plan
from benchmarks.merge_speed.meter import anonymous, measure, processor
from benchmarks.merge_speed.tools import Run, load, output_files, version


def run(plan: Plan) -> dict[str, Any]:
    """Import the tool, merge tiny files (not for ``whole``), then measure the merge."""
    start = anonymous()
    tool = load(plan.tool, plan.threads)
    user, system = processor()
    result: dict[str, Any] = {"version": version(plan.tool), "imports_cpu": user + system, "start_level": start}
    result["imported_level"] = anonymous()
    out = Path(plan.out)
    if plan.warm_up and plan.state != "whole":
        tiny = out.with_name(out.name + ".tiny")
        _merge(tool, plan, plan.warm_up[0], plan.warm_up[1:], tiny)
        shutil.rmtree(tiny)
    if plan.state == "warm":  # again: a kernel that reclaims idle memory has had seconds to
        warm(plan.inputs)
    gc.collect()
    if plan.state != "whole":
        result["resident"] = resident(plan.inputs)
    reading = measure(lambda: _merge(tool, plan, plan.base, plan.experts, out))
    peak, level = reading.level + reading.above, result["imported_level"]
    result |= asdict(reading) | {"level": level, "above": max(0, peak - level)}  # kernels that warm-up loaded count
    return result | {"written": sum(file.stat().st_size for file in out.rglob("*") if file.is_file())}


def _merge(tool: Run, plan: Plan, base: str, experts: tuple[str, ...], out: Path) -> None:
    """Merge and flush the result to the disk."""
    out.mkdir(parents=True)
    case = CASES[plan.case]
    tool(Job(case, Path(base), tuple(map(Path, experts)), out, plan.dtype, plan.threads))
    for file in output_files(out):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def main(plan_file: str, result_file: str) -> int:
    """Run a plan; whatever happens is written to the result file."""
    plan = Plan.from_json(json.loads(Path(plan_file).read_text(encoding="utf-8")))
    with contextlib.suppress(OSError):  # where memory runs out all the same, this process is to go and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if plan.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (plan.memory, plan.memory))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = run(plan)
    except ImportError as error:
        result = {"error": f"not installed ({error.name or error})", "missing": True}
    except MemoryError as error:
        result = {"error": f"out of memory ({error})"}
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        result = {"error": f"out of memory ({text})" if "allocate" in text else text}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:3]))
