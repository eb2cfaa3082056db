"""Any order of adding, leasing, expiring, committing, forgetting, collecting and reopening, against a plain model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from experiments.bases.base import tensors_digest
from experiments.grid.result import Cohort, Plan
from experiments.store import Store, StoreConflict, leases
from tests.experiments.store.samples import BASE, result, specs

RUNS = specs(6)
NAMES = list(RUNS)
OWNERS = st.sampled_from(["a", "b"])


class Machine(RuleBasedStateMachine):
    @initialize()
    def make(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.clock = 1e9
        self.true_clock = leases.now
        leases.now = lambda: self.clock  # type: ignore[assignment]
        self.store = Store.create(self.folder / "s", durable=False)
        self.store.add_base(BASE)
        self.planned = 0
        self.done: dict[str, int] = {}
        self.held: dict[str, tuple[str, float]] = {}

    @precondition(lambda self: self.planned < len(NAMES))
    @rule()
    def add(self) -> None:
        pair = NAMES[self.planned : self.planned + 2]
        assert self.store.add_runs({name: RUNS[name] for name in pair}, BASE.digest, "s") == 2
        self.store.freeze(Plan((Cohort(f"c{self.planned}", tuple(pair)),)))
        self.planned += 2

    @rule(owner=OWNERS, seconds=st.sampled_from([10.0, 50.0]))
    def lease(self, owner: str, seconds: float) -> None:
        free = [
            f"c{k}"
            for k in range(0, self.planned, 2)
            if any(name not in self.done for name in NAMES[k : k + 2])
            and self.held.get(f"c{k}", ("", 0.0))[1] <= self.clock
        ]
        found = self.store.lease(owner, seconds)
        assert (None if found is None else found.name) == (free[0] if free else None)
        if found is not None:
            self.held[found.name] = (owner, self.clock + seconds)

    @rule(owner=OWNERS, number=st.sampled_from([0, 2, 4]), keep=st.booleans())
    def renew_or_release(self, owner: str, number: int, keep: bool) -> None:
        name = f"c{number}"
        mine = self.held.get(name, ("", 0.0))[0] == owner
        if keep:
            assert self.store.renew(owner, name, 20.0) == mine
            if mine:
                self.held[name] = (owner, self.clock + 20.0)
        else:
            assert self.store.release(owner, name) == mine
            if mine:
                del self.held[name]

    @rule(seconds=st.sampled_from([5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock += seconds

    @precondition(lambda self: self.planned)
    @rule(data=st.data(), owner=OWNERS, bits=st.sampled_from([0, 0, 1]))
    def commit(self, data: st.DataObject, owner: str, bits: int) -> None:
        number = data.draw(st.integers(0, self.planned - 1))
        name = NAMES[number]
        try:
            new = self.store.commit(name, result(number, bits=bits), owner=owner)
        except StoreConflict:
            assert self.done[name] != bits
            return
        assert new == (name not in self.done)
        assert self.done.setdefault(name, bits) == bits

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.done)))
        assert self.store.forget([name]) == 1
        del self.done[name]

    @rule(dry=st.booleans())
    def gc(self, dry: bool) -> None:
        self.store.gc(dry_run=dry, older_than=0)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.folder / "s")

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "store"):
            return
        assert set(self.store.missing()) == set(NAMES[: self.planned]) - set(self.done)
        status = self.store.status()
        assert (status.runs, status.finished) == (self.planned, len(self.done))
        for name, bits in self.done.items():
            wanted = result(NAMES.index(name), bits=bits).states[4]
            assert tensors_digest(self.store.state(name)) == tensors_digest(wanted)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.verify(deep=True).good
            self.store.close()
            leases.now = self.true_clock
            shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=7, stateful_step_count=12, deadline=None)
