"""``AdminService`` over a real council, asked by the real client. Goal: what an operator is told is true:
done, not done, or unknown; how old a reading is; who changed what. Method: one voter on a real store and a
real listener; a second store that names a voter who is never there stands for a lost majority.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fieldmesh.client import Client
from fieldmesh.client.admin import Admin, News
from fieldmesh.core.errors import (
    ChangeRefused,
    InvalidRequest,
    KeyNotFound,
    LogNotFounded,
    NodeUnreachable,
    NoQuorum,
    OutcomeUnknown,
    RevisionConflict,
    SessionExpired,
)
from fieldmesh.core.raft_model import Entry, EntryKind, HardState, Members, Stored
from fieldmesh.core.settings import Change
from fieldmesh.rpc.admin import PAGE_BYTES_MAX, Ticket
from fieldmesh.rpc.errors import error_from_call
from fieldmesh.runtime.raft_store import RaftStore
from fieldmesh.v1 import admin_pb2 as pb
from fieldmesh.v1.admin_pb2_grpc import AdminServiceStub
from tests.runtime.agreed_node import ME, OTHER, AgreedNode


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[AgreedNode]:
    made = AgreedNode(tmp_path)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def admin(node: AgreedNode) -> AsyncIterator[Admin]:
    with Client([node.address]) as client:
        yield Admin(client, author="ann@box", timeout_s=3.0)


@pytest.fixture
async def minority(tmp_path: Path) -> AsyncIterator[AgreedNode]:
    """One of two voters; the other is never there."""
    folder = tmp_path / "minority"
    folder.mkdir()
    members = Members(voters=(ME, OTHER))
    entry = Entry(index=1, term=1, kind=EntryKind.MEMBERS, data=members.encode())
    store = RaftStore.open(folder / "log.sqlite3", ME)
    store.found(Stored(hard=HardState(term=1, group="half"), entries=(entry,)))
    store.close()
    made = AgreedNode(folder, found=False)
    await made.start()
    yield made
    await made.close()


async def put(admin: Admin, key: str, text: str, **more: int) -> int:
    return await asyncio.to_thread(admin.write, [Change(key=key, value=text, **more)])


async def test_a_write_is_read_back_and_remembered_with_who_when_and_from_where(admin: Admin) -> None:
    revision = await put(admin, "routing/policy", '"round-robin"')
    found = await asyncio.to_thread(admin.get, "routing/policy")
    assert (found.settings[0].value, found.settings[0].revision) == ("round-robin", revision)
    assert (found.current, found.stale_s) == (True, 0.0)
    record = (await asyncio.to_thread(admin.history)).records[-1]
    assert (record.author, record.origin) == ("ann@box", "alpha from ipv4:127.0.0.1")
    assert record.time_ms > 1_700_000_000_000


async def test_a_conditional_write_that_comes_too_late_changes_nothing(admin: Admin) -> None:
    await put(admin, "app/x", "1")
    with pytest.raises(RevisionConflict) as conflict:
        await put(admin, "app/x", "2", expected_revision=0)
    assert conflict.value.metadata["revision"] == "1"
    assert (await asyncio.to_thread(admin.get, "app/x")).settings[0].value == 1


async def test_the_same_ticket_is_done_once(admin: Admin) -> None:
    ticket = await asyncio.to_thread(admin.ticket)
    change = [Change(key="app/x", value="1")]
    first = await asyncio.to_thread(lambda: admin.write(change, ticket=ticket))
    await put(admin, "app/x", "2")
    again = await asyncio.to_thread(lambda: admin.write(change, ticket=ticket))
    assert first == again
    assert (await asyncio.to_thread(admin.get, "app/x")).settings[0].value == 2


async def test_a_write_without_a_ticket_is_done_too(node: AgreedNode) -> None:
    async with grpc.aio.insecure_channel(str(node.address)) as channel:
        request = pb.WriteConfigRequest(changes=[pb.SettingChange(key="app/x", value="1")])
        answer = await AdminServiceStub(channel).WriteConfig(request)
    assert answer.revision == 1


async def test_a_session_that_nobody_opened_is_refused(admin: Admin) -> None:
    with pytest.raises(SessionExpired):
        await asyncio.to_thread(
            lambda: admin.write([Change(key="app/x", value="1")], ticket=Ticket(session=999, sequence=1))
        )


async def test_what_is_not_there_or_not_acceptable_is_said_by_name(admin: Admin) -> None:
    with pytest.raises(KeyNotFound):
        await asyncio.to_thread(admin.get, "app/nothing")
    with pytest.raises(InvalidRequest) as refused:
        await put(admin, "routing/policy", '"by moonlight"')
    assert refused.value.field == "routing/policy"
    with pytest.raises(InvalidRequest, match="not known"):
        await asyncio.to_thread(admin.diff, 0, 99)


async def test_a_rollback_brings_everything_back_in_one_write(admin: Admin) -> None:
    await put(admin, "app/kept", "0")
    good = await put(admin, "app/a", "1")
    await put(admin, "app/a", "2")
    await put(admin, "app/b", "3")
    _, planned = await asyncio.to_thread(lambda: admin.rollback(good, dry_run=True))
    assert (await asyncio.to_thread(admin.all)).revision == 4
    revision, done = await asyncio.to_thread(admin.rollback, good)
    assert planned == done
    assert [(d.key, d.before, d.after) for d in done] == [("app/a", "2", "1"), ("app/b", "3", None)]
    found = await asyncio.to_thread(admin.all)
    assert {s.key: s.text for s in found.settings} == {"app/kept": "0", "app/a": "1"}
    assert (revision, found.revision) == (5, 5)
    again, nothing = await asyncio.to_thread(admin.rollback, good)
    assert (again, nothing) == (5, ())
    assert [d.key for d in await asyncio.to_thread(admin.diff, good, 4)] == ["app/a", "app/b"]


async def test_large_answers_come_in_pages(admin: Admin) -> None:
    text = '"' + "x" * 60_000 + '"'
    count = PAGE_BYTES_MAX // 60_000 + 3
    for number in range(count):
        await put(admin, f"app/{number:02}", text)
    found = await asyncio.to_thread(admin.all, "app/")
    assert [s.key for s in found.settings] == [f"app/{number:02}" for number in range(count)]
    history = await asyncio.to_thread(admin.history)
    assert [record.revision for record in history.records] == list(range(1, count + 1))
    news = await asyncio.to_thread(lambda: next(admin.watch()))
    assert news.settings is not None
    assert len(news.settings) == count


async def test_a_watch_tells_everything_then_each_change_and_goes_on_after_its_node_was_lost(
    node: AgreedNode, admin: Admin
) -> None:
    await put(admin, "app/x", "1")
    watch = admin.watch("app/")
    seen: list[News] = [await asyncio.to_thread(next, watch)]
    assert seen[0].settings is not None
    await put(admin, "app/x", "2")
    seen.append(await asyncio.to_thread(next, watch))
    await node.close()
    node.founds = False
    following = asyncio.create_task(asyncio.to_thread(next, watch))
    again = AgreedNode(node.folder)
    again.address = node.address
    again.founds = False
    await again.start()
    while not again.council.leading:
        await again.council.wait_changed()
    await put(admin, "app/x", "3")
    seen.append(await following)
    assert [(n.revision, [(c.before, c.after) for c in n.changes]) for n in seen[1:]] == [
        (2, [("1", "2")]),
        (3, [("2", "3")]),
    ]
    await asyncio.to_thread(watch.close)
    await again.close()


async def test_without_a_majority_reads_say_how_old_they_are_and_writes_fail_fast(
    minority: AgreedNode,
) -> None:
    with Client([minority.address]) as client:
        admin = Admin(client, timeout_s=3.0)
        found = await asyncio.to_thread(admin.all)
        assert (found.current, found.stale_s, found.settings) == (False, None, ())
        with pytest.raises(NoQuorum):
            await asyncio.to_thread(lambda: admin.all(level="current"))
        with pytest.raises(NoQuorum):
            await put(admin, "app/x", "1")
        assert (await asyncio.to_thread(admin.status)).role in ("follower", "candidate")


async def test_a_node_without_a_log_says_so(tmp_path: Path) -> None:
    fresh = AgreedNode(tmp_path, found=False)
    await fresh.start()
    try:
        with Client([fresh.address]) as client:
            admin = Admin(client)
            with pytest.raises(LogNotFounded):
                await asyncio.to_thread(admin.all)
            assert (await asyncio.to_thread(admin.status)).role == "none"
    finally:
        await fresh.close()


async def test_a_write_whose_answer_never_comes_is_unknown_and_names_its_ticket(
    node: AgreedNode, admin: Admin
) -> None:
    ticket = await asyncio.to_thread(admin.ticket)
    store = node.council.host._store
    real, stuck = store.save, asyncio.Event()
    loop = asyncio.get_running_loop()

    def never(*saves: object) -> None:
        asyncio.run_coroutine_threadsafe(stuck.wait(), loop).result(10)
        real(*saves)  # type: ignore[arg-type]

    store.save = never  # type: ignore[method-assign]
    with Client([node.address]) as client:
        impatient = Admin(client, timeout_s=0.6)
        change = [Change(key="app/x", value="1")]
        with pytest.raises(OutcomeUnknown) as unknown:
            await asyncio.to_thread(lambda: impatient.write(change, ticket=ticket))
        assert unknown.value.metadata["ticket"] == str(ticket)
        stuck.set()
        assert await asyncio.to_thread(lambda: admin.write(change, ticket=ticket)) == 1
    assert len((await asyncio.to_thread(admin.history)).records) == 1


async def test_a_node_that_is_not_there_is_no_unknown_outcome(tmp_path: Path, node: AgreedNode) -> None:
    address = node.address
    await node.close()
    with Client([address]) as client, pytest.raises(NodeUnreachable):
        await asyncio.to_thread(
            lambda: Admin(client, timeout_s=1.0).write(
                [Change(key="app/x", value="1")], ticket=Ticket(session=1, sequence=1)
            )
        )


async def test_the_status_names_the_leader_the_voters_and_the_revision(admin: Admin) -> None:
    await put(admin, "app/x", "1")
    status = await asyncio.to_thread(admin.status)
    assert (status.role, status.leader_name, status.revision) == ("leader", "alpha", 1)
    assert [(m.name, m.voter, m.here) for m in status.members] == [("alpha", True, True)]
    assert status.advice == "one voter is right"
    assert status.stale_s < 1.0


async def test_members_are_named_by_name_id_or_the_beginning_of_one(admin: Admin) -> None:
    assert await asyncio.to_thread(lambda: admin.add("beta", learner=True)) == OTHER
    assert await asyncio.to_thread(admin.remove, OTHER[:8]) == OTHER
    with pytest.raises(InvalidRequest, match="alpha, beta"):
        await asyncio.to_thread(admin.remove, "gamma")


async def test_a_learner_that_never_answers_does_not_become_a_voter(admin: Admin) -> None:
    with pytest.raises(ChangeRefused) as refused:
        await asyncio.to_thread(admin.add, "beta")
    assert refused.value.metadata["reason"] == "not_caught_up"


async def test_the_office_is_not_handed_to_nobody(admin: Admin) -> None:
    with pytest.raises(ChangeRefused):
        await asyncio.to_thread(admin.transfer)


async def test_a_backup_is_a_store_that_can_be_opened(admin: Admin, node: AgreedNode, tmp_path: Path) -> None:
    await put(admin, "app/x", "1")
    copy = tmp_path / "copy.sqlite3"
    copy.write_bytes(b"".join(await asyncio.to_thread(lambda: list(admin.backup()))))
    store = RaftStore.open(copy, ME)
    assert store.load().entries[-1].data
    store.close()
    assert [path.name for path in node.folder.glob("*.copy")] == []


async def test_a_backup_that_nobody_reads_to_the_end_leaves_nothing_behind(
    admin: Admin, node: AgreedNode
) -> None:
    pieces = admin.backup()
    await asyncio.to_thread(next, pieces)
    await asyncio.to_thread(pieces.close)  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        while list(node.folder.glob("*.copy")):  # noqa: ASYNC110 - a file tells nobody that it is gone
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("WriteConfig", pb.WriteConfigRequest(), "changes"),
        ("WriteConfig", pb.WriteConfigRequest(changes=[pb.SettingChange(key="X")]), "key"),
        ("ReadConfig", pb.ReadConfigRequest(key="x" * 201), "key"),
        ("RollbackConfig", pb.RollbackConfigRequest(revision=2**63), "revision"),
        ("AddVoter", pb.AddVoterRequest(node="x" * 129), "node"),
    ],
)
async def test_a_request_that_is_out_of_bounds_names_its_field(
    node: AgreedNode, method: str, request_: object, field: str
) -> None:
    async with grpc.aio.insecure_channel(str(node.address)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await getattr(AdminServiceStub(channel), method)(request_)
    error = error_from_call(failed.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == field
