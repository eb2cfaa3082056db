"""Choosing how runs of one kind are trained: ways are probed side by side, few steps each.

Chunks grow by doubling for as long as that pays and memory allows.  No way is taken that is not faster than the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from experiments.finetune.cohort.probe import Candidate, Opened, Probe, Timing, expert_bytes, measure
from experiments.grid.run_spec import RunSpec
from theory.errors import MergeboundError

PAYS = 1.05
"""A way must be so many times as fast as the loop to be taken, and a larger chunk so many times as a smaller one."""
CLEAR = 2.0
"""From so many times the loop on, a way's lead is not timed again."""
LARGEST, LARGEST_ON_GPU = 64, 128
"""Most experts at a time, on a processor and on a GPU."""
_PROBED = 20
"""About as many steps are trained to time a way."""
_SHARE_OF_WORK, _LEAST = 0.15, 1.0
"""A kind of runs is probed for at most this share of the seconds that the loop would take for all of them, but for so
many seconds in any case."""


@dataclass(frozen=True)
class Choice:
    """What is decided about a kind of runs: how they are trained, why, and seconds per step and expert so far measured.

    Attributes:
        candidate, reason: of the plan.
        seconds: of one step of one expert in this way; ``loop_seconds`` in the loop.
    """

    candidate: Candidate
    reason: str
    seconds: float = 0.0
    loop_seconds: float = 0.0

    @property
    def speed_up(self) -> float:
        """Over the loop."""
        return self.loop_seconds / self.seconds if self.seconds > 0 else 1.0


def device_type(network: nn.Module) -> str:
    """``cpu`` or ``cuda``: where a network's weights are."""
    return next(network.parameters()).device.type


def probe_limit(work: float, budget: float = 20.0) -> float:
    """Seconds that a kind of runs is probed for, where the loop would take ``work`` seconds for all of them."""
    return min(budget, max(_LEAST, _SHARE_OF_WORK * work))


def choose(
    run: RunSpec,
    opened: Opened,
    most: int,
    *,
    memory: int | None = None,
    budget: float = 20.0,
    seed: int = 0,
    steps: int | None = None,
) -> Choice:
    """The fastest way for runs like one of them, measured here.

    Args:
        run: whose network, batch size and update are timed.
        opened: of that run.
        most: runs that may be trained together.
        memory: bytes that a cohort may take; ``None`` for no limit.
        budget: seconds, as ``probe_seconds`` of :func:`make_plan`.
        seed: of the probe.
        steps: of all such runs together, which limit the budget too; ``None`` for no such limit.

    Raises:
        MergeboundError: it cannot be trained at all.
    """
    return choose_by(run, opened, most, memory, partial(measure, seed=seed), budget, time.perf_counter, steps)


def choose_by(
    run: RunSpec,
    opened: Opened,
    most: int,
    memory: int | None,
    probe: Probe,
    budget: float,
    clock: Callable[[], float],
    steps: int | None = None,
) -> Choice:
    """:func:`choose` with a probe and a clock of one's own."""
    loop = Candidate("loop", 1)
    began = clock()
    most = min(LARGEST if device_type(opened[0]) == "cpu" else LARGEST_ON_GPU, most)
    room = most if memory is None else max(1, memory // max(1, expert_bytes(run, opened)))
    largest = min(most, room)
    best: dict[str, tuple[float, Candidate, Timing]] = {}  # by way and options: times the loop
    failed: dict[str, str] = {}
    alone = probe([loop], run, opened)[loop]
    if alone.seconds is None:
        raise MergeboundError(f"{run.task}, {run.architecture}: it cannot be trained: {alone.reason}")
    if steps is not None:
        budget = probe_limit(alone.seconds * steps, budget)
    late = False
    for start in _candidates(run, opened[0], largest):
        each: Candidate | None = start
        while each is not None:
            grown = each is not start
            if alone.seconds * each.chunk * _PROBED > budget or ((grown or best) and clock() - began > budget):
                late = True
                break
            found = probe([loop, each], run, opened)
            ratio = _ratio(found[loop], found[each])
            if ratio is None:
                failed.setdefault(str(each), found[each].reason)
                break
            known = best.get(str(each))
            better = known is None or ratio > known[0] * PAYS
            if known is None or ratio > known[0]:
                best[str(each)] = (ratio, each, found[each])
            compiled = ("engine", "compiled") in each.options  # one expert after the other: as fast in any number
            each = _larger(each, largest) if better and not compiled else None
    _confirm(run, opened, best, probe)
    chosen = _decide(run, best, failed, largest, most, late)
    known = best.get(str(chosen.candidate))
    return replace(chosen, seconds=alone.seconds / (known[0] if known else 1.0), loop_seconds=alone.seconds)


def _confirm(run: RunSpec, opened: Opened, best: dict[str, tuple[float, Candidate, Timing]], probe: Probe) -> None:
    """Time whoever leads by little once more, and take the worse ratio: the best of several noisy timings flatters."""
    loop = Candidate("loop", 1)
    confirmed: set[str] = set()
    while best:
        name, (ratio, each, timing) = max(best.items(), key=lambda item: item[1][0])
        if name in confirmed or not PAYS <= ratio < CLEAR:
            return
        found = probe([loop, each], run, opened)
        again = _ratio(found[loop], found[each])
        best[name] = (ratio if again is None else min(ratio, again), each, timing)
        confirmed.add(name)


def _decide(
    run: RunSpec,
    best: Mapping[str, tuple[float, Candidate, Timing]],
    failed: Mapping[str, str],
    largest: int,
    most: int,
    late: bool,
) -> Choice:
    ranked = sorted(best.items(), key=lambda item: -item[1][0])
    told = [
        f"{name} {ratio:.1f} times the loop ({each.chunk} expert{'s' * (each.chunk > 1)}, batch {run.batch_size}, "
        f"{timing.steps} steps)"
        for name, (ratio, each, timing) in ranked
    ]
    told += [f"{name} does not work ({reason})" for name, reason in failed.items()]
    if late:
        told.append("the time for the probe was over")
    if largest < most:
        told.append(f"memory for {largest} experts at a time")
    if not ranked or ranked[0][1][0] < PAYS:
        return Choice(
            Candidate("loop", 1), "; ".join(["loop", *told] if told else ["loop: no other way takes these runs"])
        )
    chosen = ranked[0][1][1]
    if ("engine", "compiled") in chosen.options:
        chosen = replace(chosen, chunk=largest)
    return Choice(chosen, "; ".join(told))


def _ratio(loop: Timing, other: Timing) -> float | None:
    if loop.seconds is None or other.seconds is None:
        return None
    return loop.seconds / other.seconds


def _larger(each: Candidate, largest: int) -> Candidate | None:
    return replace(each, chunk=min(2 * each.chunk, largest)) if each.chunk < largest else None


def _candidates(run: RunSpec, network: nn.Module, largest: int) -> list[Candidate]:
    """What to begin with, likely winners first."""
    from experiments.finetune.cohort.folded import supports_folding
    from experiments.finetune.cohort.vmapped import supports_vmap
    from experiments.finetune.cohort.written import supports_written

    on_cpu = device_type(network) == "cpu"
    found: list[Candidate] = []
    few = min(8 if on_cpu else 32, largest)
    if supports_written([run], network) is None:
        if on_cpu:
            found.append(Candidate("written", few, (("engine", "compiled"),)))
        found.append(Candidate("written", min(16, largest), (("engine", "batched"),)))
    if largest < 2:
        return found
    few = min(4 if on_cpu else 32, largest)
    convolves = any(isinstance(module, nn.Conv2d) for module in network.modules())
    if supports_folding(network, prove=False) is None:
        if convolves:
            found.append(Candidate("folded", few, (("channels_last", True),)))
        found.append(Candidate("folded", few))
    if supports_vmap(network) is None:
        found.append(Candidate("vmap", few))
    return found
