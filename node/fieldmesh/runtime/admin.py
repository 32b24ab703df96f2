"""What operators ask on the client listener: ``AdminService`` over the node's council.

Owns: translation between the wire and the council, where a write came from, and names of nodes. Must not:
decide what may be written (``core.settings_schema``) or who should vote (``core.topology``).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from fieldmesh.core import settings
from fieldmesh.core.errors import (
    ChangeRefused,
    ConfigurationFull,
    InvalidRequest,
    KeyNotFound,
    LogNotFounded,
    NoQuorum,
    RevisionConflict,
    SessionExpired,
    TooManyStreams,
)
from fieldmesh.core.model import MeshView, NodeId, NodeState, SeatKind
from fieldmesh.core.raft_model import Refusal, Role
from fieldmesh.core.settings import Change, Code, Command, Kind, Outcome, Record, State
from fieldmesh.rpc import admin as wire
from fieldmesh.runtime import log
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.council_model import Changed, CouncilStatus, Reading, Whole
from fieldmesh.runtime.door import Context, guarded, guarded_stream
from fieldmesh.runtime.electorate import successor
from fieldmesh.runtime.recovery import assess
from fieldmesh.v1 import admin_pb2 as pb
from fieldmesh.v1 import admin_pb2_grpc

logger = log.get()

ADMIN = pb.DESCRIPTOR.services_by_name["AdminService"]
TIMEOUT_S_MAX = 30.0
ANSWER_MARGIN_S = 0.2
"""How long before its caller gives up a call ends, so that the caller hears how."""
WATCHES_MAX = 64
BACKUP_CHUNK_BYTES = 256 * 1024
PROMOTION_PAUSE_S = 0.1
_HERE = (NodeState.ALIVE, NodeState.SUSPECT)
_PASSING = {r.value for r in (Refusal.NOT_CAUGHT_UP, Refusal.CHANGE_PENDING, Refusal.TERM_NOT_COMMITTED)}
_PORT = re.compile(r":\d+$")


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """``AdminService`` at this node. ``advice`` says what the mesh does about its voters."""

    def __init__(
        self, council: Council, *, name: str, view: Callable[[], MeshView], advice: Callable[[], str]
    ) -> None:
        self._council = council
        self._name = name
        self._view = view
        self._advice = advice
        self._watches = 0
        self._copying = asyncio.Lock()

    # --- reading ---------------------------------------------------------------------------

    @guarded
    async def ReadConfig(self, request: pb.ReadConfigRequest, context: Context) -> pb.ReadConfigResponse:
        key, prefix = wire.key(request.key, "key"), wire.key(request.prefix, "prefix")
        after_key = wire.key(request.after_key, "after_key")
        reading = await self._read(request.level, context)
        state = reading.state
        if key and key not in state.values:
            raise KeyNotFound(
                f"The configuration has no key {key!r} (revision {state.revision})", field="key"
            )
        if key:
            found = [pb.Setting(key=key, value=state.values[key].text, revision=state.values[key].revision)]
        else:
            found = wire.settings_to_proto(state, prefix=prefix, after_key=after_key)
        page = next(wire.pages(found))
        return pb.ReadConfigResponse(
            settings=page,
            more=len(page) < len(found),
            revision=state.revision,
            current=reading.stale_s == 0.0,
            stale_s=reading.stale_s,
        )

    async def _read(self, level: int, context: Context) -> Reading:
        if level == pb.READ_LEVEL_LOCAL:
            return await self._council.read()
        try:
            return await self._council.read(linearizable=True, timeout_s=_timeout_s(context))
        except NoQuorum:
            if level == pb.READ_LEVEL_CURRENT:
                raise
            return await self._council.read()

    @guarded_stream
    async def WatchConfig(
        self, request: pb.WatchConfigRequest, context: Context
    ) -> AsyncGenerator[pb.WatchConfigResponse, None]:
        prefix = wire.key(request.prefix, "prefix")
        revision = wire.number(request.after_revision, "after_revision")
        if self._watches >= WATCHES_MAX:
            raise TooManyStreams(
                f"{self._watches} watches are open at this node, its most", retry_after_s=5.0
            )
        self._watches += 1
        try:
            news = self._council.watch(revision if request.HasField("after_revision") else None)
            async with aclosing(news):
                async for item in news:
                    for response in _watch_responses(item, prefix):
                        yield response
        finally:
            self._watches -= 1

    @guarded
    async def ListHistory(self, request: pb.ListHistoryRequest, context: Context) -> pb.ListHistoryResponse:
        prefix = wire.key(request.prefix, "prefix")
        state = (await self._council.read()).state
        revision = max(request.after_revision, state.history_floor)
        records = _with_prefix(settings.changes_since(state, revision) or (), prefix)
        found = [wire.record_to_proto(record) for record in records]
        page = wire.history_page(found)
        return pb.ListHistoryResponse(
            records=page,
            more=len(page) < len(found),
            forgotten_up_to=state.history_floor,
            revision=state.revision,
        )

    @guarded
    async def DiffConfig(self, request: pb.DiffConfigRequest, context: Context) -> pb.DiffConfigResponse:
        state = (await self._council.read()).state
        newer = request.newer or state.revision
        differences = settings.difference(state, request.older, newer)
        return pb.DiffConfigResponse(differences=wire.differences_to_proto(differences), newer=newer)

    # --- writing ---------------------------------------------------------------------------

    @guarded
    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        outcome = await self._council.submit(Command(kind=Kind.OPEN_SESSION), _timeout_s(context))
        return pb.OpenSessionResponse(session=_done(outcome).session)

    @guarded
    async def WriteConfig(self, request: pb.WriteConfigRequest, context: Context) -> pb.WriteConfigResponse:
        changes = wire.changes_from_proto(request.changes)
        return pb.WriteConfigResponse(revision=await self._write(changes, request, context))

    @guarded
    async def RollbackConfig(
        self, request: pb.RollbackConfigRequest, context: Context
    ) -> pb.RollbackConfigResponse:
        reading = await self._council.read(linearizable=True, timeout_s=_timeout_s(context))
        state = reading.state
        changes = settings.rollback(state, wire.number(request.revision, "revision"))
        revision = state.revision
        if changes and not request.dry_run:
            revision = await self._write(changes, request, context)
        return pb.RollbackConfigResponse(
            revision=revision, differences=wire.differences_to_proto(_against(state, changes))
        )

    async def _write(
        self,
        changes: tuple[Change, ...],
        request: pb.WriteConfigRequest | pb.RollbackConfigRequest,
        context: Context,
    ) -> int:
        author, origin = wire.author(request.author), self._origin(context)
        timeout_s = _timeout_s(context)
        if not request.HasField("ticket"):
            outcome, _ = await self._council.write(changes, author=author, origin=origin, timeout_s=timeout_s)
            return _done(outcome).revision
        ticket = wire.ticket_from_proto(request.ticket)
        command = Command(
            kind=Kind.WRITE,
            session=ticket.session,
            sequence=ticket.sequence,
            acknowledged=ticket.acknowledged,
            changes=changes,
            author=author,
            origin=origin,
        )
        return _done(await self._council.submit(command, timeout_s)).revision

    def _origin(self, context: Context) -> str:
        """The node that takes a write, and the address that it came from."""
        return f"{self._name} from {_PORT.sub('', context.peer())}"[: settings.LABEL_CHARACTERS_MAX]

    # --- the log ---------------------------------------------------------------------------

    @guarded
    async def GetRaftStatus(
        self, request: pb.GetRaftStatusRequest, context: Context
    ) -> pb.GetRaftStatusResponse:
        return self.raft_status()

    def raft_status(self) -> pb.GetRaftStatusResponse:
        """What this node knows of the log now."""
        status, view = self._council.status(), self._view()
        names = {member.id: member.name for member in view.members}
        here = {member.id for member in view.members if member.state in _HERE} | {view.local}
        matches = dict(status.matches)
        return pb.GetRaftStatusResponse(
            local_id=view.local,
            role=role_of(status),
            group=status.seat.log if status.seat else "",
            epoch=status.seat.epoch if status.seat else 0,
            term=status.term,
            leader_id=status.leader or "",
            leader_name=names.get(status.leader, "") if status.leader else "",
            members=[
                pb.RaftMember(
                    id=node,
                    name=names.get(node, ""),
                    voter=node in status.voters,
                    here=node in here,
                    match=matches.get(node, 0),
                    lost=node in status.lost_voters,
                )
                for node in sorted((*status.voters, *status.learners))
            ],
            revision=status.revision,
            stale_s=status.stale_s,
            commit=status.commit,
            lag_entries=status.lag_entries,
            advice=self._advice() if self._council.leading else "",
            stopped=status.stopped_why,
            other_logs=[
                pb.OtherLog(group=group, node_ids=nodes) for group, nodes in status.other_logs.items()
            ],
        )

    @guarded
    async def TransferLeadership(
        self, request: pb.TransferLeadershipRequest, context: Context
    ) -> pb.TransferLeadershipResponse:
        status = self._council.status()
        node = self._resolve(request.node) if request.node else successor(status, self._view())
        if node != status.leader:
            await self._council.transfer(node, _timeout_s(context))
        return pb.TransferLeadershipResponse(leader_id=node)

    @guarded
    async def AddVoter(self, request: pb.AddVoterRequest, context: Context) -> pb.AddVoterResponse:
        node, status = self._resolve(request.node), self._council.status()
        if node not in (*status.voters, *status.learners):
            await self._council.add(node, _timeout_s(context))
        if request.learner or node in status.voters:
            return pb.AddVoterResponse(node_id=node, voter=node in status.voters)
        await self._promote(node, _timeout_s(context))
        return pb.AddVoterResponse(node_id=node, voter=True)

    async def _promote(self, node: NodeId, timeout_s: float) -> None:
        """Give a learner its vote as soon as it has caught up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                await self._council.promote(node, deadline - loop.time())
                return
            except ChangeRefused as refused:
                in_vain = refused.metadata.get("reason") not in _PASSING
                if in_vain or loop.time() + PROMOTION_PAUSE_S >= deadline:
                    raise
            await asyncio.sleep(PROMOTION_PAUSE_S)

    @guarded
    async def RemoveVoter(self, request: pb.RemoveVoterRequest, context: Context) -> pb.RemoveVoterResponse:
        node = self._resolve(request.node)
        await self._council.remove(node, _timeout_s(context))
        return pb.RemoveVoterResponse(node_id=node)

    @guarded
    async def RecoverLog(self, request: pb.RecoverLogRequest, context: Context) -> pb.RecoverLogResponse:
        loss = assess(self._council, self._view())
        if request.confirm:
            logger.warning("log_recovered", epoch=loss.epoch, given_up=list(loss.given_up))
            await self._council.host.go_on_alone()
            with suppress(
                TimeoutError
            ):  # its only voter elects itself in a moment, and can then be written to
                async with asyncio.timeout(_timeout_s(context)):
                    while not self._council.leading:
                        await self._council.wait_changed()
        return pb.RecoverLogResponse(
            done=request.confirm,
            epoch=loss.epoch,
            given_up=loss.given_up,
            revision=loss.revision,
            stale_s=loss.stale_s,
            unconfirmed_keys=loss.unconfirmed_keys,
        )

    @guarded_stream
    async def BackupLog(
        self, request: pb.BackupLogRequest, context: Context
    ) -> AsyncGenerator[pb.BackupLogResponse, None]:
        if self._council.status().role is None:
            raise LogNotFounded("This node holds no log to copy; ask a voter (`fieldmesh raft status`)")
        if self._copying.locked():
            raise TooManyStreams("This node's log is being copied already", retry_after_s=5.0)
        async with self._copying:
            copy = await self._council.host.backup()
            try:
                with copy.open("rb") as file:
                    while data := await asyncio.to_thread(file.read, BACKUP_CHUNK_BYTES):
                        yield pb.BackupLogResponse(data=data)
            finally:
                copy.unlink(missing_ok=True)

    def _resolve(self, name: str) -> NodeId:
        """The id of a node by its id, the beginning of one, or its name. Raises InvalidRequest."""
        wire.node(name)
        status = self._council.status()
        known = {member.id: member.name for member in self._view().members}
        known.update({node: "" for node in (*status.voters, *status.learners) if node not in known})
        exact = [node for node, called in known.items() if name in (node, called)]
        found = exact or [node for node in known if len(name) >= 6 and node.startswith(name)]
        if len(found) == 1:
            return found[0]
        how = "several nodes are called so; give the id" if found else "no node of this mesh is called so"
        names = ", ".join(sorted(called or node for node, called in known.items())[:20])
        raise InvalidRequest(f"{name!r}: {how}. Known nodes: {names}", field="node")


def role_of(status: CouncilStatus) -> str:
    """What a node is to the log, in a word: leader, follower, candidate, learner, observer or none."""
    if status.seat is None:
        return "none"
    if status.seat.kind is not SeatKind.VOTER or status.role is None:
        return status.seat.kind.value
    return "candidate" if status.role is Role.PRE_CANDIDATE else status.role.value


def _timeout_s(context: Context) -> float:
    """How long the council may take for this call."""
    return _within(context.time_remaining())


def _within(left_s: float | None) -> float:
    """A call without a deadline has the longest."""
    return TIMEOUT_S_MAX if left_s is None else max(0.05, min(TIMEOUT_S_MAX, left_s - ANSWER_MARGIN_S))


def _with_prefix(records: tuple[Record, ...], prefix: str) -> list[Record]:
    return [record for record in records if record.key.startswith(prefix)]


def _against(state: State, changes: tuple[Change, ...]) -> list[tuple[str, str | None, str | None]]:
    """The changes beside what is there now."""
    now = {key: value.text for key, value in state.values.items()}
    return [(change.key, now.get(change.key), change.value) for change in changes]


def _watch_responses(item: Whole | Changed, prefix: str) -> list[pb.WatchConfigResponse]:
    """One piece of a watch as messages: a large one in several."""
    if isinstance(item, Changed):
        found = [wire.record_to_proto(record) for record in _with_prefix(item.records, prefix)]
        responses = [
            pb.WatchConfigResponse(revision=item.revision, changes=page, more=True)
            for page in wire.pages(found)
        ]
    else:
        state = item.state
        responses = [
            pb.WatchConfigResponse(revision=state.revision, snapshot=True, settings=page, more=True)
            for page in wire.pages(wire.settings_to_proto(state, prefix=prefix))
        ]
        for response in responses[1:]:
            response.snapshot = False
    responses[-1].more = False
    return responses


def _done(outcome: Outcome) -> Outcome:
    """The outcome of what was done. Raises the error that says why nothing was."""
    match outcome.code:
        case Code.DONE:
            return outcome
        case Code.REVISION_CONFLICT:
            raise RevisionConflict(
                f"The key was changed in between, its last change is revision {outcome.revision}: nothing "
                "was done. Read it again and decide anew",
                metadata={"revision": str(outcome.revision)},
            )
        case Code.SESSION_EXPIRED:
            raise SessionExpired(
                "The session of this write has expired; if it was sent before, the history says whether it "
                "was done. Send it again without a ticket if it was not"
            )
        case Code.SEQUENCE_PASSED:
            raise InvalidRequest(
                "The outcome of this write was acknowledged, and is forgotten", field="ticket.sequence"
            )
        case Code.TOO_MANY_IN_FLIGHT:
            raise InvalidRequest(
                f"{settings.SESSION_OUTCOMES_MAX} writes of this session are not acknowledged: do that first",
                field="ticket.acknowledged",
            )
        case Code.STATE_FULL:
            raise ConfigurationFull(
                f"The configuration is full: at most {settings.KEYS_MAX} keys and "
                f"{settings.VALUES_CHARACTERS_MAX} characters. Remove something first"
            )
        case Code.COMMAND_INVALID:
            raise InvalidRequest("The write is not acceptable as it is", field="changes")
