"""The mesh's configuration from Python. Owns: sessions of writes, and what is done when an answer is lost.

A write goes out under a ticket (session and sequence), so it may be sent again, to any node, without being
done twice. A call is repeated on another node only where the one that was asked has vanished; what a node
answers is final. Must not: interpret a value.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import grpc

from fieldmesh.client import calls
from fieldmesh.client.sync import Client
from fieldmesh.core.errors import DeadlineExceeded, FieldmeshError, NodeUnreachable, OutcomeUnknown
from fieldmesh.core.settings import Change, Record
from fieldmesh.rpc import admin as codec
from fieldmesh.rpc.admin import Ticket
from fieldmesh.v1 import admin_pb2 as pb
from fieldmesh.v1.admin_pb2_grpc import AdminServiceStub

TIMEOUT_S: Final = 8.0
WATCH_PAUSE_S: Final = 0.5

Level = Literal["", "current", "local"]
_LEVELS: Final[dict[str, pb.ReadLevel.ValueType]] = {
    "": pb.READ_LEVEL_UNSPECIFIED,
    "current": pb.READ_LEVEL_CURRENT,
    "local": pb.READ_LEVEL_LOCAL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One key. ``text`` is its value as a JSON text, ``revision`` that of its last change."""

    key: str
    text: str
    revision: int

    @property
    def value(self) -> Any:
        """The value itself."""
        return json.loads(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What was read. ``current``: a majority confirmed it; else it is ``stale_s`` seconds old, or (None) of
    unknown age."""

    settings: tuple[Setting, ...]
    revision: int
    current: bool
    stale_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key with its values (JSON texts) at two revisions; None where there is none."""

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Changes, oldest first. Those up to ``forgotten_up_to`` are not remembered any more."""

    records: tuple[Record, ...]
    forgotten_up_to: int
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """A piece of a watch: everything (``settings``), or what changed since the piece before."""

    revision: int
    settings: tuple[Setting, ...] | None
    changes: tuple[Record, ...]


class Admin:
    """Reads and changes the configuration that a mesh agrees on, through any of its nodes.

    >>> with Client("127.0.0.1:7420") as client:
    ...     admin = Admin(client, author="ann")
    ...     admin.write([Change(key="routing/policy", value='"round-robin"')])
    """

    def __init__(self, client: Client, *, author: str = "", timeout_s: float = TIMEOUT_S) -> None:
        self._client = client
        self._author = author
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._session = 0
        self._sequence = 0

    # --- reading -----------------------------------------------------------------------------

    def get(self, key: str, *, level: Level = "") -> Configuration:
        """One key. Raises KeyNotFound; with ``level="current"`` also NoQuorum."""
        answer = self._call("ReadConfig", pb.ReadConfigRequest(key=key, level=_LEVELS[level]))
        return _configuration(answer, [_setting(setting) for setting in answer.settings])

    def all(self, prefix: str = "", *, level: Level = "") -> Configuration:
        """All keys with a prefix, in their order. Pages are read one by one; a write between two of them may
        show in the later ones only."""
        found: list[Setting] = []
        while True:
            after_key = found[-1].key if found else ""
            request = pb.ReadConfigRequest(prefix=prefix, after_key=after_key, level=_LEVELS[level])
            answer = self._call("ReadConfig", request)
            found += [_setting(setting) for setting in answer.settings]
            if not answer.more:
                return _configuration(answer, found)

    def history(self, prefix: str = "", *, after_revision: int = 0) -> History:
        """Changes after a revision, as far as they are remembered."""
        records: list[Record] = []
        while True:
            request = pb.ListHistoryRequest(prefix=prefix, after_revision=after_revision)
            answer: pb.ListHistoryResponse = self._call("ListHistory", request)
            records += [codec.record_from_proto(record) for record in answer.records]
            if not answer.more:
                return History(
                    records=tuple(records),
                    forgotten_up_to=answer.forgotten_up_to,
                    revision=answer.revision,
                )
            after_revision = records[-1].revision

    def diff(self, older: int, newer: int = 0) -> tuple[Difference, ...]:
        """What differs between two revisions (``newer`` 0: the present one). Raises InvalidRequest."""
        answer = self._call("DiffConfig", pb.DiffConfigRequest(older=older, newer=newer))
        return tuple(_difference(entry) for entry in answer.differences)

    def watch(self, prefix: str = "", *, after_revision: int | None = None) -> Generator[News]:
        """The configuration, then every change to it; goes on at another node when one is lost, without a
        gap. Ends when it is closed."""
        client, seen = self._client, after_revision
        while True:
            attempts = client._begin(None)
            address, _ = client._next(attempts)
            request = pb.WatchConfigRequest(prefix=prefix, after_revision=seen)
            with client._link(address) as link:
                call: Any = AdminServiceStub(link.channel).WatchConfig(request)
                try:
                    for news in _news(call):
                        client._answered(address)
                        yield news
                        seen = news.revision
                    error: FieldmeshError = calls.cut_short(address)
                except grpc.RpcError as failure:
                    error = calls.translated(failure, address)
                finally:
                    call.cancel()
            if not isinstance(error, NodeUnreachable):
                raise error
            client._failed(attempts, address, error)
            time.sleep(WATCH_PAUSE_S)

    # --- writing -----------------------------------------------------------------------------

    def ticket(self) -> Ticket:
        """A ticket for one write, in this object's session."""
        with self._lock:
            if not self._session or self._sequence >= 32:
                answer = self._call("OpenSession", pb.OpenSessionRequest())
                self._session, self._sequence = answer.session, 0
            self._sequence += 1
            return Ticket(session=self._session, sequence=self._sequence)

    def write(self, changes: Iterable[Change], *, ticket: Ticket | None = None) -> int:
        """Do the changes together or not at all; the revision of the write.

        Raises RevisionConflict, InvalidRequest, NoQuorum (nothing was done), or OutcomeUnknown: then the same
        ``ticket`` (``metadata["ticket"]``) and changes may be tried again, and are done once at most.
        """
        request = pb.WriteConfigRequest(changes=codec.changes_to_proto(changes), author=self._author)
        answer = self._write("WriteConfig", request, ticket)
        return int(answer.revision)

    def rollback(
        self, revision: int, *, dry_run: bool = False, ticket: Ticket | None = None
    ) -> tuple[int, tuple[Difference, ...]]:
        """Bring every key back to a revision in one write; the revision of the write, and what it changed.

        Raises as ``write`` does; RevisionConflict where somebody wrote in between.
        """
        request = pb.RollbackConfigRequest(revision=revision, author=self._author, dry_run=dry_run)
        if dry_run:
            answer = self._call("RollbackConfig", request)
        else:
            answer = self._write("RollbackConfig", request, ticket)
        return answer.revision, tuple(_difference(entry) for entry in answer.differences)

    def _write(self, method: str, request: Any, ticket: Ticket | None) -> Any:
        ticket = ticket or self.ticket()
        request.ticket.CopyFrom(codec.ticket_to_proto(ticket))
        try:
            return self._call(method, request)
        except (DeadlineExceeded, NodeUnreachable, OutcomeUnknown) as error:
            if isinstance(error, NodeUnreachable) and not error.metadata.get("maybe_done"):
                raise
            raise OutcomeUnknown(
                f"It is not known whether this write was done: {error.message}. To try again, and have it "
                f"done once at most, send it with the ticket {ticket}",
                metadata={"ticket": str(ticket)},
            ) from error

    # --- the log -----------------------------------------------------------------------------

    def status(self) -> pb.GetRaftStatusResponse:
        """What the asked node knows of the log."""
        answer: pb.GetRaftStatusResponse = self._call("GetRaftStatus", pb.GetRaftStatusRequest())
        return answer

    def transfer(self, node: str = "") -> str:
        """Hand the leader's office to a voter; the new leader's id."""
        return str(self._call("TransferLeadership", pb.TransferLeadershipRequest(node=node)).leader_id)

    def add(self, node: str, *, learner: bool = False) -> str:
        """Make a node a voter (or only a learner); its id."""
        return str(self._call("AddVoter", pb.AddVoterRequest(node=node, learner=learner)).node_id)

    def remove(self, node: str) -> str:
        """Take a voter or learner out; its id."""
        return str(self._call("RemoveVoter", pb.RemoveVoterRequest(node=node)).node_id)

    def recover(self, *, confirm: bool = False) -> pb.RecoverLogResponse:
        """Let the asked node go on alone, or only tell what that would cost. Raises ChangeRefused while
        another voter of the log is there."""
        answer: pb.RecoverLogResponse = self._call("RecoverLog", pb.RecoverLogRequest(confirm=confirm))
        return answer

    def backup(self) -> Iterator[bytes]:
        """A consistent copy of the log of the node that is asked, in pieces."""
        client = self._client
        address, _ = client._next(client._begin(None))
        with client._link(address) as link:
            call: Any = AdminServiceStub(link.channel).BackupLog(pb.BackupLogRequest())
            try:
                for piece in call:
                    yield piece.data
            except grpc.RpcError as failure:
                raise calls.translated(failure, address) from failure
            finally:
                call.cancel()

    # --- calls -------------------------------------------------------------------------------

    def _call(self, method: str, request: Any) -> Any:
        """Ask a node; another one only where the first has vanished."""
        client = self._client
        attempts = client._begin(self._timeout_s)
        maybe_done = False
        while True:
            address, left_s = client._next(attempts)
            try:
                with client._link(address) as link:
                    answer = getattr(AdminServiceStub(link.channel), method)(request, timeout=left_s)
                client._answered(address)
                return answer
            except grpc.RpcError as failure:
                error = calls.translated(failure, address)
                maybe_done = maybe_done or "failed to connect" not in (failure.details() or "")
            if not isinstance(error, NodeUnreachable):
                raise error
            try:
                client._failed(attempts, address, error)
            except NodeUnreachable as given_up:
                if maybe_done:
                    given_up.metadata["maybe_done"] = "true"
                raise


def _setting(setting: pb.Setting) -> Setting:
    return Setting(key=setting.key, text=setting.value, revision=setting.revision)


def _configuration(answer: pb.ReadConfigResponse, settings: Sequence[Setting]) -> Configuration:
    return Configuration(
        settings=tuple(settings),
        revision=answer.revision,
        current=answer.current,
        stale_s=answer.stale_s if answer.HasField("stale_s") else None,
    )


def _difference(entry: pb.SettingDiff) -> Difference:
    return Difference(
        key=entry.key,
        before=codec.optional_text(entry, "before"),
        after=codec.optional_text(entry, "after"),
    )


def _news(messages: Iterable[pb.WatchConfigResponse]) -> Iterator[News]:
    """Messages put together again where one piece came in several."""
    whole, settings, changes = False, list[Setting](), list[Record]()
    for message in messages:
        whole = whole or message.snapshot
        settings += [_setting(setting) for setting in message.settings]
        changes += [codec.record_from_proto(record) for record in message.changes]
        if not message.more:
            yield News(
                revision=message.revision,
                settings=tuple(settings) if whole else None,
                changes=tuple(changes),
            )
            whole, settings, changes = False, [], []
