"""What an observer holds. Goal: it is always a state that the log has had, whatever arrives, and goes on by
revision. Method: states made by the real ``apply``, cut into pieces and put together again.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fieldmesh.core import following, settings
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.following import Content, Following, Held, LogView, Piece, kept, pieces
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import Members
from fieldmesh.core.settings import Change, Command, Kind, State

VIEW = LogView(
    log="log",
    epoch=0,
    term=3,
    leader=NodeId("a"),
    members=Members(voters=(NodeId("a"), NodeId("b"), NodeId("c"))),
    commit=9,
    applied=9,
    current_at=1.0,
)


def states(count: int, size: int = 5) -> list[State]:
    """The first state and those after each of so many writes; every third one deletes."""
    state, _ = settings.apply(State(), 1, settings.encode(Command(kind=Kind.OPEN_SESSION, time_ms=1)))
    made = [state]
    for number in range(1, count + 1):
        value = None if number % 3 == 0 else "x" * size + str(number)
        change = Change(key=f"app/k{number % 5}", value=value)
        command = Command(kind=Kind.WRITE, time_ms=number, session=1, sequence=number,
                          acknowledged=number - 1, changes=(change,))  # fmt: skip
        state, _ = settings.apply(state, number + 1, settings.encode(command))
        made.append(state)
    return made


def take_all(observer: Following, state: State, seen: int | None, view: LogView = VIEW) -> Held:
    held = [observer.take(piece) for piece in pieces(view, state, seen)][-1]
    assert held is not None
    return held


def same(one: State, other: State) -> bool:
    return (one.revision, one.values, one.values_characters, one.history) == (
        other.revision,
        other.values,
        other.values_characters,
        other.history,
    )


def test_an_observer_begins_with_everything_and_goes_on_with_changes() -> None:
    made = states(10)
    observer = Following(None)
    assert same(take_all(observer, made[4], None).state, made[4])
    for state in made[5:]:
        assert observer.held is not None
        told = pieces(VIEW, state, observer.held.state.revision)
        assert [piece.content for piece in told] == [Content.RECORDS]
        assert same(take_all(observer, state, observer.held.state.revision).state, state)
    settings.check(observer.held.state)  # type: ignore[union-attr]


def test_several_revisions_are_taken_at_once() -> None:
    made = states(10)
    observer = Following(Held(view=VIEW, state=made[2]))
    assert same(take_all(observer, made[9], 2).state, made[9])


def test_a_large_state_comes_in_pieces_and_counts_only_when_it_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "PIECE_BYTES_MAX", 500)
    state = states(12, size=300)[-1]
    told = pieces(VIEW, state, None)
    assert len(told) > 3
    observer = Following(None)
    assert [observer.take(piece) for piece in told[:-1]] == [None] * (len(told) - 1)
    assert observer.held is None
    held = observer.take(told[-1])
    assert held is not None and same(held.state, state)


def test_pieces_of_a_stream_that_broke_do_not_count_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PIECE_BYTES_MAX", 500)
    state = states(12, size=300)[-1]
    observer = Following(None)
    observer.take(pieces(VIEW, state, None)[0])
    observer.begin()
    assert same(take_all(observer, state, None).state, state)


def test_sessions_stay_with_the_members() -> None:
    state = states(3)[-1]
    assert state.sessions
    assert take_all(Following(None), state, None).state.sessions == {}


def test_who_is_ahead_of_a_voter_is_told_nothing_and_who_is_level_gets_the_view() -> None:
    made = states(5)
    assert pieces(VIEW, made[3], 4) == []
    assert pieces(VIEW, made[3], 3) == [Piece(view=VIEW, revision=3)]


def test_a_history_that_is_forgotten_leads_to_a_snapshot() -> None:
    state = replace(states(5)[-1], history=(), history_characters=0, history_floor=5)
    assert pieces(VIEW, state, 3)[0].content is Content.SNAPSHOT


def test_changes_that_do_not_go_on_from_here_are_refused_and_change_nothing() -> None:
    made = states(10)
    observer = Following(Held(view=VIEW, state=made[2]))
    for piece in pieces(VIEW, made[9], 5):
        with pytest.raises(InvalidRequest):
            observer.take(piece)
    assert observer.held == Held(view=VIEW, state=made[2])


def test_the_same_changes_twice_are_refused() -> None:
    made = states(4)
    observer = Following(Held(view=VIEW, state=made[2]))
    (piece,) = pieces(VIEW, made[4], 2)
    observer.take(piece)
    with pytest.raises(InvalidRequest):
        observer.take(piece)


def test_another_log_and_an_older_epoch_are_refused() -> None:
    observer = Following(Held(view=replace(VIEW, epoch=2), state=states(2)[-1]))
    for view in (replace(VIEW, log="other", epoch=2), replace(VIEW, epoch=1)):
        with pytest.raises(InvalidRequest):
            observer.take(Piece(view=view, revision=2))


def test_a_newer_epoch_begins_with_a_snapshot() -> None:
    made = states(5)
    observer = Following(Held(view=VIEW, state=made[4]))
    newer = replace(VIEW, epoch=1)
    with pytest.raises(InvalidRequest):
        observer.take(Piece(view=newer, revision=4))
    assert take_all(observer, made[2], None, newer).state.revision == 2


def test_what_is_kept_is_read_back_without_a_leader_or_an_age() -> None:
    state = settings.for_observers(states(7)[-1])
    held = kept(following.keep(Held(view=VIEW, state=state)))
    assert held.state == state
    assert (held.view.log, held.view.members, held.view.leader) == ("log", VIEW.members, None)
    assert held.view.current_at == following.NEVER


def test_what_is_kept_has_a_bound_and_the_history_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    state = states(12, size=300)[-1]
    whole = following.keep(Held(view=VIEW, state=state))
    monkeypatch.setattr(following, "KEPT_BYTES_MAX", len(whole) - 1)
    shorter = kept(following.keep(Held(view=VIEW, state=state)))
    assert shorter.state.history == ()
    assert (shorter.state.values, shorter.state.history_floor) == (state.values, 12)


@pytest.mark.parametrize("data", [b"", b"\x01", b"not a state", b"\x80"])
def test_what_was_not_kept_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        kept(data)
