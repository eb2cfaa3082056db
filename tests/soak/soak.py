"""Kill a grid again and again: 1,000 short runs, SIGKILL at 20 random moments; the bits must be those of a whole one.

    python -m tests.soak.soak [--runs 1000] [--kills 20] [--seed 0] [--only one two disk files]

Four grids are begun with one frozen plan and compared with a grid that nobody disturbed:

``one``   one runner (`mergebound grid resume`, two workers), its whole process group killed at random moments;
``two``   two runners at once on one store, one of them killed at each moment;
``disk``  a disk that is too small (a tmpfs, for which root is needed) until it is made larger;
``files`` a limit on the size of files (as a quota sets it, or a user without root) until it is lifted.

Every run must be there once, with the same bits of every state, log and metric; no file may be left that no run needs,
and no process.  Exit code 1 if any of that fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from experiments.store import Store

LIMIT = 7200.0
"""Seconds that a grid may take."""
SCENARIOS = ("one", "two", "disk", "files")
COMMAND = [sys.executable, "-m", "experiments.cli", "grid"]


def main() -> int:
    """Run the soak test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits-small")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=SCENARIOS)
    args = parser.parse_args()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        place = Path(scratch)
        whole = place / "whole"
        began = time.monotonic()
        prepare(whole, args.preset, args.runs)
        print(f"prepared {args.runs} runs in {time.monotonic() - began:.0f} s", flush=True)
        for name in args.only:
            shutil.copytree(whole, place / name)
        began = time.monotonic()
        finish(start(whole, args.workers))
        seconds = time.monotonic() - began
        expected = contents(whole)
        print(f"whole: {len(expected)} runs in {seconds:.0f} s", flush=True)
        for name in args.only:
            began = time.monotonic()
            rng = np.random.default_rng([args.seed, 0x50AC])
            scenario: Callable[..., int] = {
                "one": one_runner, "two": two_runners, "disk": full_disk, "files": small_files
            }[name]  # fmt: skip
            hits = scenario(place / name, args.workers, args.kills, rng, len(expected))
            found = check(place / name, expected)
            faults += [f"{name}: {fault}" for fault in found]
            word = "; ".join(found) or "equal bits, no orphan"
            print(f"{name}: {hits} hits, {time.monotonic() - began:.0f} s: {word}", flush=True)
    return 1 if faults else 0


def prepare(folder: Path, preset: str, runs: int) -> None:
    """A store with its plan, and nothing done."""
    from experiments.engines.prepare import prepare as make
    from experiments.engines.prepare import spread
    from experiments.grid.yaml_source import read_grid, read_runs

    file = read_grid(preset)
    meta = {"grid": file.spec.content(), "digest": file.spec.digest(), "limit_runs": runs, "device": "cpu"}
    make(folder, spread(read_runs(file).runs, runs), meta)


def start(folder: Path, workers: int, largest_file: int | None = None) -> subprocess.Popen[str]:
    """A runner in a process group of its own."""

    def limited() -> None:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [*COMMAND, "resume", str(folder), "--workers", str(workers)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=limited,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(runner: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end of a runner; what it said."""
    _, said = runner.communicate(timeout=LIMIT)
    if runner.returncode != code:
        raise SystemExit(f"a runner ended with {runner.returncode} instead of {code}: {said}")
    return said


def kill(runner: subprocess.Popen[str]) -> None:
    """SIGKILL for a whole process group; it must be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(runner.pid, signal.SIGKILL)
    runner.communicate(timeout=60)
    until = time.monotonic() + 60
    while members(runner.pid):
        if time.monotonic() > until:
            raise SystemExit(f"processes {members(runner.pid)} of a killed runner are left")
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """Processes of a group that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(path.parent.name))
    return found


def moments(folder: Path, kills: int, rng: np.random.Generator, total: int) -> Iterator[None]:
    """Comes back at each random moment: when a random number of runs is stored, and a random time has passed."""
    for at in sorted(rng.integers(0, int(0.95 * total), kills)):
        until = time.monotonic() + LIMIT
        while done(folder) < at and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(float(rng.uniform(0, 1.5)))
        yield


def done(folder: Path) -> int:
    """Runs that are stored."""
    base = sqlite3.connect(f"file:{folder / 'store.sqlite'}?mode=ro", uri=True, timeout=30)
    try:
        return int(base.execute("SELECT count(*) FROM results").fetchone()[0])
    finally:
        base.close()


def one_runner(folder: Path, workers: int, kills: int, rng: np.random.Generator, total: int) -> int:
    """Kill the only runner."""
    runner = start(folder, workers)
    for _ in moments(folder, kills, rng, total):
        kill(runner)
        runner = start(folder, workers)
    finish(runner)
    return kills


def two_runners(folder: Path, workers: int, kills: int, rng: np.random.Generator, total: int) -> int:
    """Kill one of two runners."""
    runners = [start(folder, max(1, workers // 2)) for _ in range(2)]
    for _ in moments(folder, kills, rng, total):
        which = int(rng.integers(2))
        kill(runners[which])
        runners[which] = start(folder, max(1, workers // 2))
    for runner in runners:
        finish(runner)
    return kills


def full_disk(folder: Path, workers: int, kills: int, rng: np.random.Generator, total: int) -> int:
    """Take the room away while runs are stored, give it a little more, and again, until everything fits.

    A disk that is too small from the start is refused before anything is trained, which is seen to first.
    """
    if os.geteuid() != 0:
        print("  disk: left out, as mounting a small tmpfs needs root", flush=True)
        finish(start(folder, workers))
        return 0
    needed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with small_disk(folder) as grow:
        hits, before = 0, done(folder)
        grow(needed + (1 << 20))
        runner = start(folder, workers)
        said = _said(runner)
        if runner.returncode != 2 or "free" not in said or "Traceback" in said or done(folder) != before:
            raise SystemExit(f"a disk that is too small gave exit code {runner.returncode}: {said}")
        for share in np.sort(rng.uniform(0.05, 0.9, 3)):
            before = done(folder)
            grow(1 << 32)
            runner = start(folder, workers)
            until = time.monotonic() + LIMIT
            while runner.poll() is None and done(folder) == before and time.monotonic() < until:
                time.sleep(0.05)
            used = shutil.disk_usage(folder).used
            grow(max(int(needed + (1 << 20) + share * total * 6000), used + (1 << 18)))
            said = _said(runner)
            if runner.returncode == 0:
                break
            if runner.returncode != 2 or "full" not in said or "Traceback" in said:
                raise SystemExit(f"a full disk gave exit code {runner.returncode}: {said}")
            hits += 1
            print(f"  disk full after {done(folder) - before} more runs", flush=True)
        grow(1 << 32)
        finish(start(folder, workers))
    return hits


def _said(runner: subprocess.Popen[str]) -> str:
    return runner.communicate(timeout=LIMIT)[1]


def small_files(folder: Path, workers: int, kills: int, rng: np.random.Generator, total: int) -> int:
    """No file may be larger than a limit, which grows twice and then goes."""
    hits = 0
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for share in np.sort(rng.uniform(0.05, 0.9, 3)):
        before = done(folder)
        runner = start(folder, workers, int(largest + (1 << 16) + share * total * 600))
        _, said = runner.communicate(timeout=LIMIT)
        if runner.returncode == 0:
            break
        if runner.returncode != 2 or not ("full" in said or "refuses" in said) or "Traceback" in said:
            raise SystemExit(f"a limit on the size of files gave exit code {runner.returncode}: {said}")
        hits += 1
        print(f"  file too large after {done(folder) - before} more runs", flush=True)
    finish(start(folder, workers))
    return hits


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """A folder on a disk of its own, as root; the function sets its size in bytes."""
    aside = folder.with_name(folder.name + "-aside")
    folder.rename(aside)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={1 << 30}", "tmpfs", str(folder)], check=True, timeout=60)
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)

        def grow(size: int) -> None:
            subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True, timeout=60)

        yield grow
        kept = folder.with_name(folder.name + "-kept")
        shutil.copytree(folder, kept)
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=60)
    folder.rmdir()
    kept.rename(folder)


def contents(folder: Path) -> dict[str, str]:
    """By run: a hash of outcome, states, log and metrics."""
    found = {}
    with Store.open(folder, "r") as store:
        for digest in store.runs():
            if store.outcome(digest) is None:
                continue
            result, hashed = store.result(digest), hashlib.sha256()
            hashed.update(result.outcome.encode())
            for step, state in sorted(result.states.items()):
                for name, tensor in sorted(state.items()):
                    hashed.update(f"{step} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    hashed.update(tensor.contiguous().numpy().tobytes())
            for name in ("batch_size", "batch_loss", "gradient_norm_shared", "gradient_norm_head"):
                hashed.update(getattr(result.log, name).tobytes())
            hashed.update(repr(sorted(json.dumps(dict(row), sort_keys=True) for row in result.metrics)).encode())
            found[digest] = hashed.hexdigest()
    return found


def check(folder: Path, expected: dict[str, str]) -> list[str]:
    """What is wrong with a grid that was disturbed."""
    faults = []
    found = contents(folder)
    if missing := len(expected.keys() - found.keys()):
        faults.append(f"{missing} runs are missing")
    if unequal := sum(found[name] != expected[name] for name in found if name in expected):
        faults.append(f"{unequal} runs have other bits")
    with Store.open(folder) as store:
        status = store.status()
        faults += [f"{status.runs} runs instead of {len(expected)}"] * (status.runs != len(expected))
        faults += [f"{status.conflicts} conflicts"] * bool(status.conflicts)
        orphans = store.gc(dry_run=True, older_than=0.0).files
        faults += [f"{len(orphans)} orphan files, such as {orphans[0]}"] if orphans else []
        faults += list(store.verify().problems)
    return faults


if __name__ == "__main__":
    sys.exit(main())
