"""The log on disk: what was saved is there, whatever happened; what is not ours is refused with a remedy."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fieldmesh.core.consensus import Consensus, Submit
from fieldmesh.core.errors import FieldmeshError, StateFolderInUse, StateFolderInvalid, StateUnwritable
from fieldmesh.core.events import Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_members import founded
from fieldmesh.core.raft_model import (
    Entry,
    EntryKind,
    HardState,
    Members,
    RaftConfig,
    Save,
    Saved,
    Snapshot,
    Stored,
)
from fieldmesh.core.settings import Command, Kind
from fieldmesh.runtime.raft_store import RaftStore, restore

ME = NodeId("a" * 32)
MEMBERS = Members(voters=(ME,))
HARD = HardState(term=3, vote=ME, group="mesh", epoch=1)


def entry(index: int, term: int = 3, data: bytes = b"") -> Entry:
    return Entry(index=index, term=term, kind=EntryKind.COMMAND, data=data or f"{index}/{term}".encode())


def save(**values: object) -> Save:
    return Save(sequence=1, **values)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "raft.sqlite"


def filled(path: Path, count: int = 5) -> None:
    store = RaftStore.open(path, ME)
    store.save(save(hard=HARD, entries=tuple(entry(i) for i in range(1, count + 1))))
    store.close()


def reopened(path: Path) -> Stored:
    store = RaftStore.open(path, ME)
    stored = store.load()
    store.close()
    return stored


class TestSaving:
    def test_a_new_store_is_empty(self, path: Path) -> None:
        assert reopened(path) == Stored()

    def test_everything_comes_back(self, path: Path) -> None:
        filled(path)
        assert reopened(path) == Stored(hard=HARD, entries=tuple(entry(i) for i in range(1, 6)))

    def test_a_conflict_is_replaced_in_the_same_transaction(self, path: Path) -> None:
        filled(path)
        store = RaftStore.open(path, ME)
        store.save(save(hard=HardState(term=4, group="mesh"), truncate_after=2, entries=(entry(3, 4),)))
        store.close()
        assert [e.term for e in reopened(path).entries] == [3, 3, 4]

    def test_a_snapshot_takes_the_place_of_entries(self, path: Path) -> None:
        filled(path)
        snapshot = Snapshot(index=3, term=3, members=MEMBERS, data=b"state")
        store = RaftStore.open(path, ME)
        store.save(save(snapshot=snapshot))
        store.close()
        stored = reopened(path)
        assert (stored.snapshot, [e.index for e in stored.entries]) == (snapshot, [4, 5])

    def test_an_installed_snapshot_takes_the_place_of_everything(self, path: Path) -> None:
        filled(path)
        store = RaftStore.open(path, ME)
        snapshot = Snapshot(index=3, term=2, members=MEMBERS, data=b"state")
        store.save(save(snapshot=snapshot, truncate_after=3))
        store.close()
        assert reopened(path).entries == ()

    def test_several_saves_share_a_transaction(self, path: Path) -> None:
        store = RaftStore.open(path, ME)
        store.save(
            save(hard=HARD, entries=(entry(1), entry(2))), save(truncate_after=1), save(entries=(entry(2),))
        )
        store.close()
        assert [e.index for e in reopened(path).entries] == [1, 2]

    def test_a_save_that_fails_changes_nothing(self, path: Path) -> None:
        filled(path)
        store = RaftStore.open(path, ME)
        with pytest.raises(FieldmeshError):
            store.save(save(hard=HardState(term=9, group="mesh"), entries=(entry(6), entry(5))))
        store.close()
        assert reopened(path) == Stored(hard=HARD, entries=tuple(entry(i) for i in range(1, 6)))

    def test_the_file_stays_small_when_the_log_is_compacted(self, path: Path) -> None:
        store = RaftStore.open(path, ME)
        store.save(save(hard=HARD))
        for start in range(1, 5001, 500):
            store.save(save(entries=tuple(entry(i, data=b"x" * 200) for i in range(start, start + 500))))
            snapshot = Snapshot(index=start + 499, term=3, members=MEMBERS, data=b"s")
            store.save(save(snapshot=snapshot))
        store.close()
        assert path.stat().st_size < 1_000_000

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        steps=st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.binary(max_size=8)), max_size=12
        )
    )
    def test_it_holds_what_a_list_would_hold(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool, bytes]]
    ) -> None:
        path = tmp_path_factory.mktemp("store") / "raft.sqlite"
        store, snapshot, entries = RaftStore.open(path, ME), Snapshot(), list[Entry]()
        store.save(save(hard=HARD))
        for removed, added, compacts, data in steps:
            last = entries[-1].index if entries else snapshot.index
            keep = max(snapshot.index, last - removed)
            new = tuple(entry(i, data=data) for i in range(keep + 1, keep + 1 + added))
            entries = [e for e in entries if e.index <= keep] + list(new)
            changes: dict[str, object] = {"truncate_after": keep, "entries": new}
            store.save(save(**changes))
            if compacts and entries:
                snapshot = Snapshot(index=entries[0].index, term=3, members=MEMBERS, data=data)
                entries = entries[1:]
                store.save(save(snapshot=snapshot))
        assert store.load() == Stored(hard=HARD, snapshot=snapshot, entries=tuple(entries))
        store.close()
        assert reopened(path) == Stored(hard=HARD, snapshot=snapshot, entries=tuple(entries))


class TestRefusing:
    """Every refusal says what to do."""

    def test_another_nodes_store(self, path: Path) -> None:
        filled(path)
        with pytest.raises(StateFolderInvalid, match="its own state folder"):
            RaftStore.open(path, NodeId("b" * 32))

    def test_a_store_that_is_in_use(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fieldmesh.runtime.raft_store.BUSY_MS_MAX", 10)
        store = RaftStore.open(path, ME)
        with pytest.raises(StateFolderInUse):
            RaftStore.open(path, ME)
        store.close()

    def test_a_file_that_is_no_database(self, path: Path) -> None:
        path.write_bytes(b"this is not a database, but it is long enough to look at" * 100)
        with pytest.raises(StateFolderInvalid, match="join again"):
            RaftStore.open(path, ME)

    def test_an_empty_file(self, path: Path) -> None:
        path.touch()
        with pytest.raises(StateFolderInvalid, match="not a log of Fieldmesh"):
            RaftStore.open(path, ME)

    def test_another_programs_database(self, path: Path) -> None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE t (x)")
        other.close()
        with pytest.raises(StateFolderInvalid, match="not a log of Fieldmesh"):
            RaftStore.open(path, ME)

    def test_a_newer_format(self, path: Path) -> None:
        filled(path)
        self.tamper(path, "PRAGMA user_version=2")
        with pytest.raises(StateFolderInvalid, match="install the version"):
            RaftStore.open(path, ME)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE entries SET data = x'00' WHERE entry_index = 3",
            "UPDATE entries SET term = 2 WHERE entry_index = 3",
            "DELETE FROM entries WHERE entry_index = 3",
            "UPDATE hard SET vote = NULL",
            "UPDATE hard SET term = 2",
            "DELETE FROM hard",
            "DELETE FROM snapshot",
            "UPDATE snapshot SET last_index = 2",
            "DROP TABLE entries",
        ],
    )
    def test_a_damaged_row(self, path: Path, statement: str) -> None:
        filled(path)
        self.tamper(path, statement)
        with pytest.raises(StateFolderInvalid, match="join again"):
            RaftStore.open(path, ME)

    @staticmethod
    def tamper(path: Path, statement: str) -> None:
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()

    def test_a_file_cut_short_or_with_flipped_bytes_never_loads_as_something_else(self, path: Path) -> None:
        filled(path, count=300)
        whole, expected = path.read_bytes(), reopened(path)
        chance = random.Random(7)
        refused = 0
        for _ in range(60):
            damaged = bytearray(whole)
            if chance.random() < 0.3:
                del damaged[chance.randrange(len(damaged)) :]
            else:
                for _ in range(chance.randint(1, 64)):
                    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            for leftover in path.parent.glob(path.name + "*"):
                leftover.unlink()
            path.write_bytes(damaged)
            try:
                assert reopened(path) == expected
            except (StateFolderInvalid, StateUnwritable):
                refused += 1
        assert refused > 10

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(StateUnwritable):
            RaftStore.open(tmp_path / "missing" / "raft.sqlite", ME)

    def test_a_full_disk(self, path: Path) -> None:
        filled(path)
        store = RaftStore.open(path, ME)
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StateUnwritable, match="full"):
            store.save(save(entries=(entry(6, data=b"x" * 100_000),)))
        assert store.load().entries[-1].index == 5
        store.close()


class TestFoundingAndCopies:
    def test_a_log_is_founded_once(self, path: Path) -> None:
        store = RaftStore.open(path, ME)
        store.found(founded(ME, "mesh"))
        with pytest.raises(StateFolderInvalid, match="cannot found another"):
            store.found(founded(ME, "other"))
        assert store.load() == founded(ME, "mesh")
        store.close()

    def test_a_backup_is_whole_while_the_store_goes_on(self, path: Path, tmp_path: Path) -> None:
        filled(path)
        store = RaftStore.open(path, ME)
        store.backup(tmp_path / "copy")
        store.save(save(entries=(entry(6),)))
        store.close()
        assert [e.index for e in reopened(tmp_path / "copy").entries] == [1, 2, 3, 4, 5]

    def test_a_backup_overwrites_nothing(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "copy").write_text("precious")
        store = RaftStore.open(path, ME)
        with pytest.raises(StateFolderInvalid, match="exists already"):
            store.backup(tmp_path / "copy")
        store.close()
        assert (tmp_path / "copy").read_text() == "precious"

    def test_a_restored_store_is_the_lone_voter_of_a_new_epoch(self, path: Path, tmp_path: Path) -> None:
        filled(path)
        store = RaftStore.open(path, ME)
        store.backup(tmp_path / "copy")
        store.close()
        restore(tmp_path / "copy", tmp_path / "new", ME)
        stored = reopened(tmp_path / "new")
        assert (stored.hard.epoch, stored.hard.group) == (2, "mesh")
        assert Members.decode(stored.entries[-1].data) == MEMBERS

    def test_a_store_is_not_restored_over_another(self, path: Path, tmp_path: Path) -> None:
        filled(path)
        with pytest.raises(StateFolderInvalid, match="move it away"):
            restore(path, path, ME)

    def test_a_backup_that_is_missing_or_empty_is_refused(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(StateFolderInvalid, match="does not exist"):
            restore(tmp_path / "none", path, ME)
        RaftStore.open(tmp_path / "empty", ME).close()
        with pytest.raises(StateFolderInvalid, match="holds no log"):
            restore(tmp_path / "empty", path, ME)
        assert not path.exists()


def test_a_machine_goes_on_from_what_the_store_kept(path: Path) -> None:
    """The machine over the real store: compactions included, a restart finds the same state."""
    store = RaftStore.open(path, ME)
    store.found(founded(ME, "mesh"))
    config = RaftConfig(compact_entries=20, trailing_entries_max=5)

    def drive(machine: Consensus, event: Any, now: float) -> None:
        pending = list(machine.handle(event, now))
        while pending:
            effect = pending.pop(0)
            if isinstance(effect, Save):
                store.save(effect)
                pending += machine.handle(Saved(sequence=effect.sequence), now)

    machine = Consensus(ME, config, store.load(), random.Random(1), 0.0)
    drive(machine, Tick(), 10.0)
    for number in range(100):
        command = Command(kind=Kind.OPEN_SESSION)
        drive(machine, Submit(requests=((number, command),), time_ms=number), 10.0)
    again = Consensus(ME, config, store.load(), random.Random(2), 10.0)
    assert store.load().snapshot.index > 80
    drive(again, Tick(), 20.0)
    assert again.state == machine.state
    assert len(again.state.sessions) == 100
    store.close()


WRITER = """
import sys
from pathlib import Path
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import Entry, EntryKind, HardState, Members, Save, Snapshot
from fieldmesh.runtime.raft_store import RaftStore
me = NodeId(sys.argv[2])
store = RaftStore.open(Path(sys.argv[1]), me)
stored = store.load()
last = stored.entries[-1].index if stored.entries else stored.snapshot.index
while True:
    last += 1
    hard = HardState(term=last, vote=me, group="mesh")
    entry = Entry(index=last, term=last, kind=EntryKind.COMMAND, data=b"%d" % last)
    store.save(Save(sequence=1, hard=hard, entries=(entry,)))
    if last % 20 == 0:
        members = Members(voters=(me,))
        store.save(Save(sequence=1, snapshot=Snapshot(index=last - 5, term=last - 5, members=members)))
    print(last, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    """A writer acknowledges each Save; it is killed eight times, in compactions too; nothing is forgotten."""
    chance, acknowledged = random.Random(1), 0
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), ME], stdout=subprocess.PIPE, text=True, bufsize=1
        ) as writer:
            assert writer.stdout is not None
            for line in itertools.islice(writer.stdout, chance.randint(5, 60)):
                acknowledged = int(line)
            os.kill(writer.pid, signal.SIGKILL)
            for line in writer.stdout:
                acknowledged = int(line)
        stored = reopened(path)
        last = stored.entries[-1].index
        assert acknowledged <= last <= acknowledged + 1
        assert stored.hard.term == last
        assert all(e.data == b"%d" % e.index for e in stored.entries)
