"""The log on disk. Owns: one SQLite file (WAL, synchronous=FULL), its transactions, what it refuses to open.

Term, vote, entries and snapshot change in one transaction; when ``save`` returns, they survive a power cut.
Every row carries a checksum and the entries a gapless numbering, because SQLite checks neither: a store that
was damaged, cut short or written for another node is refused with a sentence that says what to do, and is
never repaired by guessing (a voter that forgets is worse than one that is missing). Must not: be called from
two threads at once; calls block on the disk, so a host runs them in one worker thread.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from fieldmesh.core.errors import StateFolderInUse, StateFolderInvalid, StateUnwritable
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_members import recovered
from fieldmesh.core.raft_model import Entry, EntryKind, HardState, Members, Save, Snapshot, Stored

APPLICATION_ID = 0x464D5246
FORMAT_VERSION = 1
LOG_FILE = "consensus.sqlite3"
"""Its name in a state folder."""
BUSY_MS_MAX = 2000
_CHECKSUM_BYTES = 8

_SCHEMA = """
CREATE TABLE hard (id INTEGER PRIMARY KEY CHECK (id = 1), node TEXT NOT NULL, term INTEGER NOT NULL,
  vote TEXT, "group" TEXT NOT NULL, epoch INTEGER NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), last_index INTEGER NOT NULL,
  term INTEGER NOT NULL, members BLOB NOT NULL, data BLOB NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE entries (entry_index INTEGER PRIMARY KEY, term INTEGER NOT NULL, kind INTEGER NOT NULL,
  data BLOB NOT NULL, checksum BLOB NOT NULL);
"""


class RaftStore:
    """One node's log on disk; ``open`` makes or opens it. Holds the file exclusively until ``close``."""

    def __init__(self, path: Path, node: NodeId, connection: sqlite3.Connection) -> None:
        self.path = path
        self.node = node
        self._connection = connection

    @classmethod
    def open(cls, path: Path, node: NodeId) -> Self:
        """Open the store at ``path``, or make an empty one for ``node``.

        Raises StateFolderInvalid (foreign or damaged), StateFolderInUse, StateUnwritable.
        """
        created = not path.exists()
        with _translated(path):
            connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=BUSY_MS_MAX / 1000
            )
        store = cls(path, node, connection)
        try:
            with _translated(path):
                store._prepare(created)
            store.load()
        except BaseException:
            connection.close()
            raise
        return store

    def _prepare(self, created: bool) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode=EXCLUSIVE")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=FULL")
        execute("PRAGMA fullfsync=ON")
        execute("BEGIN IMMEDIATE")
        if created:
            for statement in _SCHEMA.strip().split(";\n"):
                execute(statement)
            execute(f"PRAGMA application_id={APPLICATION_ID}")
            execute(f"PRAGMA user_version={FORMAT_VERSION}")
            self._write_hard(HardState())
            self._write_snapshot(Snapshot())
        execute("COMMIT")
        if created:
            _sync_folder(self.path.parent)
        self._recognise()

    def _recognise(self) -> None:
        application = self._one("PRAGMA application_id")[0]
        version = self._one("PRAGMA user_version")[0]
        if application != APPLICATION_ID:
            raise _refused(self.path, "it is not a log of Fieldmesh", "put the right file back, or remove it")
        if version != FORMAT_VERSION:
            raise _refused(
                self.path,
                f"its format is {version} and this version of Fieldmesh reads {FORMAT_VERSION}",
                "install the version that wrote it",
            )
        if self._one("PRAGMA quick_check")[0] != "ok":
            raise _damaged(self.path, "SQLite finds its structure damaged")

    # --- reading ---

    def load(self) -> Stored:
        """All that is durable. Raises StateFolderInvalid where a row is damaged, missing or another's."""
        with _translated(self.path):
            hard, snapshot = self._read_hard(), self._read_snapshot()
            entries = tuple(self._read_entries(snapshot))
        if entries and entries[-1].term > hard.term:
            raise _damaged(self.path, "its term is older than its last entry")
        if (entries or snapshot.index) and not hard.group:
            raise _damaged(self.path, "it holds a log without a name")
        return Stored(hard=hard, snapshot=snapshot, entries=entries)

    def _read_hard(self) -> HardState:
        row = self._one('SELECT node, term, vote, "group", epoch, checksum FROM hard')
        if not row or _checksum(*row[:-1]) != row[-1]:
            raise _damaged(self.path, "its term and vote do not match their checksum")
        node, term, vote, group, epoch, _ = row
        if node != self.node:
            raise _refused(
                self.path,
                f"it is the log of node {node}, and this is {self.node}",
                "give each node its own state folder; a copied folder must not vote for its original",
            )
        return HardState(term=term, vote=None if vote is None else NodeId(vote), group=group, epoch=epoch)

    def _read_snapshot(self) -> Snapshot:
        row = self._one("SELECT last_index, term, members, data, checksum FROM snapshot")
        if not row or _checksum(*row[:-1]) != row[-1]:
            raise _damaged(self.path, "its snapshot does not match its checksum")
        index, term, members, data, _ = row
        return Snapshot(
            index=index, term=term, members=Members.decode(members) if index else Members(), data=data
        )

    def _read_entries(self, snapshot: Snapshot) -> Iterator[Entry]:
        index, newest = snapshot.index, snapshot.term
        rows = self._connection.execute(
            "SELECT entry_index, term, kind, data, checksum FROM entries ORDER BY entry_index"
        )
        for row in rows:
            index += 1
            if row[0] != index or _checksum(*row[:-1]) != row[-1] or row[1] < newest:
                raise _damaged(self.path, f"entry {index} is missing or does not match its checksum")
            newest = row[1]
            yield Entry(index=index, term=newest, kind=EntryKind(row[2]), data=row[3])

    def _one(self, query: str) -> tuple[Any, ...]:
        """The first row, or an empty tuple."""
        row: tuple[Any, ...] | None = self._connection.execute(query).fetchone()
        return row or ()

    # --- writing ---

    def save(self, *saves: Save) -> None:
        """Make these Saves durable, in order, in one transaction (one fsync for all of them).

        Raises StateUnwritable; then nothing of them is durable, and the caller must stop its machine.
        """
        with _translated(self.path), self._transaction():
            for save in saves:
                self._write(save)

    def found(self, stored: Stored) -> None:
        """Put a founder's (or recovered) log into this store. Raises StateFolderInvalid if it holds another
        log already and ``stored`` is no later epoch of it."""
        present = self.load().hard
        if present.group and (present.group != stored.hard.group or present.epoch >= stored.hard.epoch):
            raise _refused(
                self.path,
                f"it holds the log {present.group!r} already",
                "a node that belongs to a mesh cannot found another; use an empty state folder",
            )
        everything = Save(sequence=0, hard=stored.hard, snapshot=stored.snapshot, entries=stored.entries)
        with _translated(self.path), self._transaction():
            self._connection.execute("DELETE FROM entries")
            self._write(everything)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _write(self, save: Save) -> None:
        if save.hard is not None:
            self._write_hard(save.hard)
        if save.snapshot is not None:
            self._write_snapshot(save.snapshot)
            self._connection.execute("DELETE FROM entries WHERE entry_index <= ?", (save.snapshot.index,))
        if save.truncate_after is not None:
            self._connection.execute("DELETE FROM entries WHERE entry_index > ?", (save.truncate_after,))
        rows = ((entry.index, entry.term, entry.kind.value, entry.data) for entry in save.entries)
        self._connection.executemany(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?)", ((*row, _checksum(*row)) for row in rows)
        )

    def _write_hard(self, hard: HardState) -> None:
        row = (self.node, hard.term, hard.vote, hard.group, hard.epoch)
        self._connection.execute(
            "INSERT OR REPLACE INTO hard VALUES (1, ?, ?, ?, ?, ?, ?)", (*row, _checksum(*row))
        )

    def _write_snapshot(self, snapshot: Snapshot) -> None:
        row = (snapshot.index, snapshot.term, snapshot.members.encode(), snapshot.data)
        self._connection.execute(
            "INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?, ?, ?, ?)", (*row, _checksum(*row))
        )

    # --- copies ---

    def backup(self, target: Path) -> None:
        """Write a consistent copy while the store is in use. Raises StateUnwritable, StateFolderInvalid."""
        if target.exists():
            raise _refused(target, "it exists already", "name a file that does not")
        partial = target.with_name(target.name + ".new")
        partial.unlink(missing_ok=True)
        with _translated(target):
            copy = sqlite3.connect(partial)
            try:
                self._connection.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")
            finally:
                copy.close()
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(target)
            _sync_folder(target.parent)

    def close(self) -> None:
        """Let the file go."""
        self._connection.close()


def restore(backup: Path, target: Path, node: NodeId) -> Stored:
    """Make a store at ``target`` from a backup of the same node, as the lone voter of a new epoch.

    An old copy has forgotten what it has promised since; under a new epoch nobody holds it to that, and the
    other voters are refused until they join again. Raises StateFolderInvalid, StateUnwritable.
    """
    if target.exists():
        raise _refused(target, "it exists already", "move it away before restoring another over it")
    if not backup.exists():
        raise _refused(backup, "it does not exist", "name the file that a backup was written to")
    source = RaftStore.open(backup, node)
    try:
        stored = source.load()
    finally:
        source.close()
    if not stored.hard.group:
        raise _refused(backup, "it holds no log", "start the node without it; it will be sent one")
    stored = recovered(stored, node)
    store = RaftStore.open(target, node)
    try:
        store.found(stored)
    finally:
        store.close()
    return stored


def _checksum(*values: object) -> bytes:
    digest = blake2b(digest_size=_CHECKSUM_BYTES)
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(path: Path, why: str, remedy: str) -> StateFolderInvalid:
    return StateFolderInvalid(f"{path.name} cannot be used: {why}; {remedy}", field=str(path))


def _damaged(path: Path, why: str) -> StateFolderInvalid:
    return _refused(
        path,
        why,
        "remove this node from the voters, move the file away and let the node join again, "
        "or restore a backup",
    )


_FULL_OR_FAILING = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """The border: SQLite's and the system's errors become ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StateFolderInUse(f"{path.name} is held by another process", field=str(path)) from error
        if code in _FULL_OR_FAILING:
            raise StateUnwritable(f"{path.name} cannot be written: {error}", field=str(path)) from error
        raise _damaged(path, f"SQLite reports: {error}") from error
    except OSError as error:
        raise StateUnwritable(f"{path.name} cannot be written: {error}", field=str(path)) from error
    except (ValueError, TypeError) as error:
        raise _damaged(path, f"a row does not mean anything: {error}") from error
