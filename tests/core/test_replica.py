"""The directory's document: one test for each trap of the library, and convergence under disorder.

Envelopes are the simulator's (a keyed hash): what is tried here is what the replica does with them.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycrdt import Doc, Map

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.messages import ROW_BYTES_MAX, UPDATE_BYTES_MAX, DirectoryPull, DirectoryPush
from fieldmesh.core.model import NodeId
from fieldmesh.core.replica import (
    Replica,
    ReplicaConfig,
    decode_state_vector,
    encode_state_vector,
)
from simulations.node import KeyedSealer, make_key, node_id


def replica(name: str, *, incarnation: int = 1, seed: object = 0, **options: object) -> Replica:
    key = make_key(name)
    return Replica(
        node_id(key),
        KeyedSealer(key),
        Random(f"{name} {incarnation} {seed}"),
        incarnation=incarnation,
        **options,  # type: ignore[arg-type]
    )


def id_of(name: str) -> NodeId:
    return node_id(make_key(name))


def sync(asker: Replica, teller: Replica, now: float = 0.0) -> int:
    """Pull until the last page; returns the number of pages."""
    after, pages = 0, 0
    while True:
        push = teller.answer(asker.pull(after))
        if push is None:
            return pages
        assert len(push.update) <= UPDATE_BYTES_MAX
        asker.apply(push, now)
        asker.check()
        pages += 1
        if not push.next_client:
            return pages
        after = push.next_client


def payload(replica: Replica, name: str) -> bytes:
    return replica.rows[id_of(name)].envelope.payload


def spoil(vandal: Replica, name: str, value: object) -> None:
    """Write under another's key, as a member that breaks the rules could."""
    vandal._map[id_of(name)] = value  # type: ignore[assignment]
    vandal._read(0.0)


def test_two_replicas_agree_and_then_have_nothing_more_to_say() -> None:
    a, b = replica("a"), replica("b")
    a.publish(b"one")
    b.publish(b"two")
    assert a.mark != b.mark
    sync(a, b)
    sync(b, a)
    assert a.mark == b.mark
    assert payload(a, "b") == b"two" and payload(b, "a") == b"one"


def test_every_boot_writes_under_a_client_id_of_its_own() -> None:
    first, second = replica("a", incarnation=1), replica("a", incarnation=2)
    assert first._document.client_id != second._document.client_id
    # And so the row of a node that lost its state reaches a peer that has seen its earlier life.
    peer = replica("b")
    for number in range(5):
        first.publish(f"first life {number}".encode())
    sync(peer, first)
    second.publish(b"second life")
    sync(second, peer, now=10.0)
    sync(peer, second)
    assert payload(peer, "a") == b"second life"


def test_values_come_out_as_bytes_though_the_library_gives_bytearrays() -> None:
    a, b = replica("a"), replica("b")
    a.publish(b"\x00\xff text")
    sync(b, a)
    held = b.rows[id_of("a")]
    assert type(held.sealed) is bytes and type(held.envelope.payload) is bytes


def test_a_conflict_is_won_by_the_later_life_and_not_by_the_larger_client_id() -> None:
    won_by_library = set()
    for seed in range(12):
        old, new = replica("a", incarnation=1, seed=seed), replica("a", incarnation=2, seed=seed)
        old.publish(b"old")
        new.publish(b"new")
        reader = replica("r", seed=seed)
        sync(reader, old)
        sync(reader, new)
        won_by_library.add(reader._raw[id_of("a")] == new.rows[id_of("a")].sealed)
        sync(new, reader)  # where the library chose the old one, its owner sees that
        sync(reader, new)
        assert payload(reader, "a") == b"new"
    assert won_by_library == {True, False}, "these seeds do not try both outcomes of the library"


def test_a_damaged_row_stays_readable_and_its_owner_writes_it_again() -> None:
    owner, reader, vandal = replica("a"), replica("b"), replica("v")
    owner.publish(b"mine")
    for other in (reader, vandal):
        sync(other, owner)
    spoil(vandal, "a", b"rubbish")
    sync(reader, vandal)
    assert payload(reader, "a") == b"mine", "the last good row is kept outside the document"
    sync(owner, vandal, now=10.0)
    assert owner._raw[id_of("a")] == owner.rows[id_of("a")].sealed
    sync(reader, owner)
    assert reader._raw[id_of("a")] == owner.rows[id_of("a")].sealed


def test_the_row_of_a_dead_owner_is_mended_by_whoever_holds_it_after_a_while() -> None:
    owner, reader, vandal = replica("a"), replica("b"), replica("v")
    owner.publish(b"mine")
    for other in (reader, vandal):
        sync(other, owner)
    spoil(vandal, "a", b"rubbish")
    sync(reader, vandal, now=100.0)
    reader.tick(100.0 + reader.config.repair_after_s - 0.1)
    assert reader._raw[id_of("a")] == b"rubbish"
    reader.tick(100.0 + reader.config.repair_after_s)
    late = replica("late")
    sync(late, reader)
    assert payload(late, "a") == b"mine"


def test_a_deletion_takes_no_row_away_and_the_owner_writes_it_again() -> None:
    owner, reader, vandal = replica("a"), replica("b"), replica("v")
    owner.publish(b"mine")
    for other in (reader, vandal):
        sync(other, owner)
    vandal.drop(id_of("a"))
    sync(reader, vandal)
    assert payload(reader, "a") == b"mine"
    sync(owner, vandal, now=10.0)
    sync(reader, owner)
    assert id_of("a") in reader._raw


def test_a_row_under_a_key_that_did_not_sign_it_is_refused() -> None:
    a, b = replica("a"), replica("b")
    a.publish(b"one")
    spoil(a, "victim", a.rows[id_of("a")].sealed)
    sync(b, a)
    assert id_of("victim") not in b.rows and b.rejected


def test_nested_types_under_a_key_are_stepped_over() -> None:
    owner, reader, vandal = replica("a"), replica("b"), replica("v")
    owner.publish(b"mine")
    for other in (reader, vandal):
        sync(other, owner)
    spoil(vandal, "a", Map({"deep": Map({"deeper": 1.0})}))
    spoil(vandal, "z", 3)
    sync(reader, vandal)
    assert payload(reader, "a") == b"mine" and set(reader.rows) == {id_of("a")}


def test_two_lives_with_one_key_do_not_overwrite_each_other_without_end() -> None:
    one, two = replica("a", incarnation=1), replica("a", incarnation=1, seed="copy")
    one.publish(b"one")
    for _ in range(3):
        two.publish(b"two")
    writes = 0
    for step in range(100):
        before = one._map[id_of("a")]
        sync(one, two, now=step * 0.01)
        sync(two, one, now=step * 0.01)
        writes += one._map[id_of("a")] != before
    assert writes <= 5
    assert one.own_incarnation_seen > 1, "it learns that it must rise above its copy"


class PanicException(BaseException):
    """What a panic in Rust looks like from Python: not an Exception."""


@pytest.mark.parametrize("broken", ["apply_update", "get_update"])
def test_a_panic_of_the_library_is_survived_and_the_document_rebuilt(broken: str) -> None:
    a, b = replica("a"), replica("b")
    a.publish(b"one")
    b.publish(b"two")
    sync(b, a)

    class Panicking:
        def __init__(self, document: Doc[Map[bytes]]) -> None:
            self.document = document

        def __getattr__(self, name: str) -> object:
            if name == broken:

                def panic(*arguments: object) -> None:
                    raise PanicException("index out of bounds")

                return panic
            return getattr(self.document, name)

    b._document = Panicking(b._document)  # type: ignore[assignment]
    a.publish(b"three")
    push = a.answer(DirectoryPull(epoch=0, state_vector=b"\0"))
    assert push is not None
    b.apply(push, 50.0)
    assert b.rebuilds == 1 and payload(b, "b") == b"two"
    sync(b, a, now=60.0)
    assert payload(b, "a") == b"three" and a.mark != b.mark
    sync(a, b)
    assert a.mark == b.mark


def test_interrupts_of_the_process_are_not_swallowed_with_the_panics() -> None:
    a = replica("a")

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    a._document = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        a.apply(DirectoryPush(epoch=0, update=b"x"), 0.0)


@settings(max_examples=150)
@given(st.data())
def test_hostile_updates_never_raise_and_never_cost_a_row(data: st.DataObject) -> None:
    a, b = replica("a"), replica("b")
    a.publish(b"one")
    b.publish(b"two")
    sync(b, a)
    for number in range(3):
        a.publish(f"more {number}".encode())
    push = a.answer(b.pull())
    assert push is not None
    update = bytearray(push.update)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(update) - 1))
        update[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(update)))
    hostile = DirectoryPush(epoch=0, update=bytes(update[:cut] or b"\xff"))
    b.apply(hostile, 1.0)
    b.check()
    assert payload(b, "b") == b"two"
    assert payload(b, "a").startswith((b"one", b"more"))
    assert b.answer(DirectoryPull(epoch=0, state_vector=b"\0")) is not None


def test_updates_over_the_bound_and_absurd_epochs_are_refused_unread() -> None:
    a = replica("a")
    a.publish(b"one")
    before = a.mark
    for push in (
        DirectoryPush(epoch=0, update=b"x" * (UPDATE_BYTES_MAX + 1)),
        DirectoryPush(epoch=2**60, update=b"\0\0"),
    ):
        a.apply(push, 1.0)
    assert a.rejected == 2 and a.mark == before


def filled(rows: int, row_bytes: int) -> Replica:
    """A replica that holds the rows of many nodes."""
    full = replica("full")
    full.publish(b"x")
    for number in range(rows):
        other = replica(f"n{number}")
        other.publish(bytes([number % 251]) * row_bytes)
        sync(full, other)
    return full


def test_a_large_directory_comes_in_pages_within_the_bound() -> None:
    full, empty = filled(60, 10_000), replica("empty")
    assert sync(empty, full) >= 3
    assert len(empty.rows) == 61 and empty.mark == full.mark


def test_a_compacted_directory_can_still_be_cut_in_pages() -> None:
    full, empty = filled(60, 10_000), replica("empty")
    full.compact()
    assert sync(empty, full) >= 3
    assert empty.epoch == full.epoch == 1 and len(empty.rows) == 61 and empty.mark == full.mark


@settings(max_examples=25)
@given(st.data())
def test_no_crafted_state_vector_gets_an_answer_beyond_the_bound(data: st.DataObject) -> None:
    full = _FULL
    clocks = decode_state_vector(full._document.get_state())
    assert clocks is not None
    claimed = {
        client: data.draw(st.sampled_from([0, clock, clock + 7]))
        for client, clock in clocks.items()
        if data.draw(st.booleans())
    }
    pull = DirectoryPull(
        epoch=0,
        state_vector=encode_state_vector(claimed),
        after_client=data.draw(st.sampled_from([0, 1, *clocks])),
    )
    push = full.answer(pull)
    assert push is not None and len(push.update) <= full.config.page_bytes_max


_FULL = filled(40, 10_000)


@given(st.binary(max_size=200))
def test_a_state_vector_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    clocks = decode_state_vector(data)
    a = _SMALL
    push = a.answer(DirectoryPull(epoch=0, state_vector=data))
    assert (push is None) == (clocks is None)


_SMALL = filled(2, 10)


@given(st.dictionaries(st.integers(0, 2**53), st.integers(0, 2**40), max_size=30))
def test_state_vectors_are_written_as_the_library_reads_them(clocks: dict[int, int]) -> None:
    assert decode_state_vector(encode_state_vector(clocks)) == clocks


def test_an_hour_of_writing_leaves_a_document_of_constant_size() -> None:
    replicas = [replica(f"n{i}") for i in range(5)]
    sizes = []
    for round_number in range(120):
        for writer in replicas:
            writer.publish(b"%06d" % round_number)
        for reader in replicas:
            for teller in replicas:
                sync(reader, teller)
        sizes.append(replicas[0].document_bytes)
    assert sizes[-1] <= sizes[20] + 100


def test_compaction_drops_history_and_everybody_follows_into_the_new_epoch() -> None:
    config = ReplicaConfig(compact_at_bytes=1000)
    a, b = replica("a", config=config), replica("b", config=config)
    for life in range(1, 60):  # every life is another client id, and leaves a trace
        earlier = replica("c", incarnation=life)
        earlier.publish(b"c")
        sync(a, earlier)
    a.publish(b"a")
    b.publish(b"b")
    sync(b, a)
    sync(a, b)
    before = a.document_bytes
    assert a.wants_compaction
    a.compact()
    a.check()
    assert a.document_bytes < before / 3 and not a.wants_compaction
    assert a.answer(b.pull()) is not None and b.answer(a.pull()) is None
    sync(b, a, now=10.0)
    assert (b.epoch, b.mark) == (1, a.mark) and payload(a, "b") == b"b"


def test_two_nodes_that_compact_at_once_still_agree() -> None:
    a, b = replica("a"), replica("b")
    for one, other in ((a, b), (b, a)):
        one.publish(b"x")
        sync(other, one)
    a.compact()
    b.compact()
    a.publish(b"y")
    sync(a, b)
    sync(b, a)
    sync(a, b)
    assert a.mark == b.mark and payload(b, "a") == b"y"


def test_a_row_beyond_the_bound_is_the_callers_error_and_changes_nothing() -> None:
    a = replica("a")
    a.publish(b"fine")
    with pytest.raises(InvalidRequest, match=str(ROW_BYTES_MAX)) as caught:
        a.publish(b"x" * ROW_BYTES_MAX)
    assert caught.value.field == "profiles"
    assert payload(a, "a") == b"fine"
    a.check()


def test_a_snapshot_brings_others_rows_back_and_damage_is_told() -> None:
    a, b = replica("a"), replica("b")
    a.publish(b"one")
    b.publish(b"two")
    sync(a, b)
    snapshot = a.snapshot()
    again = replica("a", incarnation=2, snapshot=snapshot)
    assert payload(again, "b") == b"two" and id_of("a") not in again.rows
    for damaged in (b"", b"rubbish", snapshot[:-1], snapshot[:30] + b"!" + snapshot[31:]):
        empty = replica("a", incarnation=2, snapshot=damaged)
        assert empty.snapshot_damaged and not empty.rows


@settings(max_examples=30)
@given(st.randoms(use_true_random=False), st.integers(2, 5))
def test_replicas_agree_whatever_was_lost_doubled_or_reordered(rng: Random, count: int) -> None:
    replicas = [replica(f"n{i}", seed=rng.random()) for i in range(count)]
    flying: list[tuple[int, DirectoryPush]] = []
    for step in range(40):
        writer = rng.randrange(count)
        if rng.random() < 0.4:
            replicas[writer].publish(str(step).encode())
        asker, teller = rng.sample(range(count), 2)
        push = replicas[teller].answer(replicas[asker].pull())
        if push is not None:
            flying.append((asker, push))
        if flying and rng.random() < 0.7:
            to, push = flying[rng.randrange(len(flying))]  # may come again, in any order, or never
            replicas[to].apply(push, float(step))
        if rng.random() < 0.03:
            replicas[rng.randrange(count)].compact()
    for now in range(100, 100 + 4 * count):
        for asker in range(count):
            for teller in range(count):
                if asker != teller:
                    sync(replicas[asker], replicas[teller], float(now))
    assert len({r.mark for r in replicas}) == 1
    assert len({tuple(sorted((k, h.sealed) for k, h in r.rows.items())) for r in replicas}) == 1
