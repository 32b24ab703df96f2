"""What committed commands mean: total, pure, deduplicated, bounded; and what may be proposed at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core import settings
from fieldmesh.core.errors import InvalidRequest, UpgradeNeeded
from fieldmesh.core.settings import Change, Code, Command, Kind, Outcome, State, apply, encode
from fieldmesh.core.settings_schema import validate

MS = 1_700_000_000_000


def opened(state: State | None = None, index: int = 1, time_ms: int = MS) -> State:
    state, outcome = apply(state or State(), index, encode(Command(kind=Kind.OPEN_SESSION, time_ms=time_ms)))
    assert outcome.session == index
    return state


def write(
    *changes: Change, sequence: int = 1, session: int = 1, acknowledged: int = 0, time_ms: int = MS
) -> bytes:
    return encode(
        Command(
            kind=Kind.WRITE,
            time_ms=time_ms,
            session=session,
            sequence=sequence,
            acknowledged=acknowledged,
            changes=changes,
            author="ann",
            origin="node-1",
        )
    )


def put(key: str, value: str | None, expected: int | None = None) -> Change:
    return Change(key=key, value=value, expected_revision=expected)


def after(*values: tuple[str, str | None]) -> State:
    """A state after one write each."""
    state = opened()
    for sequence, (key, value) in enumerate(values, start=1):
        state, outcome = apply(state, sequence + 1, write(put(key, value), sequence=sequence))
        assert outcome.code is Code.DONE
    return state


class TestWrites:
    def test_a_write_has_a_revision_and_is_remembered(self) -> None:
        state = after(("app/a", "1"), ("app/a", "2"))
        assert (state.revision, state.values["app/a"]) == (2, settings.Value(text="2", revision=2))
        record = state.history[-1]
        assert (record.before, record.after, record.author, record.origin) == ("1", "2", "ann", "node-1")

    def test_an_old_state_stays_as_it_was(self) -> None:
        old = after(("app/a", "1"))
        apply(old, 9, write(put("app/a", "2"), sequence=2))
        assert old.values["app/a"].text == "1"

    def test_a_stale_expectation_changes_nothing(self) -> None:
        state = after(("app/a", "1"), ("app/a", "2"))
        again, outcome = apply(state, 9, write(put("app/b", "x"), put("app/a", "3", 1), sequence=3))
        assert outcome == Outcome(code=Code.REVISION_CONFLICT, revision=2)
        assert (again.values, again.revision) == (state.values, 2)

    def test_revision_zero_expects_no_such_key(self) -> None:
        state = after(("app/a", "1"))
        assert apply(state, 9, write(put("app/a", "2", 0), sequence=2))[1].code is Code.REVISION_CONFLICT
        assert apply(state, 9, write(put("app/b", "2", 0), sequence=2))[1].code is Code.DONE

    def test_a_key_is_removed(self) -> None:
        state = after(("app/a", "1"), ("app/a", None))
        assert (state.values, state.values_characters) == ({}, 0)
        assert state.history[-1].after is None

    def test_a_full_state_refuses_and_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(settings, "KEYS_MAX", 2)
        state = after(("app/a", "1"), ("app/b", "1"))
        again, outcome = apply(state, 9, write(put("app/c", "1"), sequence=3))
        assert (outcome.code, again.values) == (Code.STATE_FULL, state.values)
        assert apply(state, 9, write(put("app/a", None), put("app/c", "1"), sequence=3))[1].code is Code.DONE

    def test_the_history_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(settings, "HISTORY_RECORDS_MAX", 3)
        state = after(*[("app/a", str(n)) for n in range(10)])
        assert [record.revision for record in state.history] == [8, 9, 10]
        assert settings.changes_since(state, 7) == state.history
        assert settings.changes_since(state, 6) is None
        settings.check(state)


class TestSessions:
    """Dissertation §6.3."""

    def test_a_retry_is_not_done_again(self) -> None:
        command = write(put("app/a", "1"))
        state, first = apply(opened(), 2, command)
        again, second = apply(state, 3, command)
        assert (first, again.revision) == (second, 1)

    def test_a_failed_command_fails_the_same_way_when_it_is_retried(self) -> None:
        state = after(("app/a", "1"))
        state, first = apply(state, 5, write(put("app/a", "2", 9), sequence=2))
        state, _ = apply(state, 6, write(put("app/a", "3"), sequence=3))
        assert apply(state, 7, write(put("app/a", "2", 9), sequence=2))[1] == first

    def test_sequences_may_come_in_any_order(self) -> None:
        state, _ = apply(opened(), 2, write(put("app/a", "2"), sequence=2))
        state, outcome = apply(state, 3, write(put("app/a", "1"), sequence=1))
        assert outcome.code is Code.DONE

    def test_outcomes_are_forgotten_when_the_client_has_them(self) -> None:
        state = after(("app/a", "1"), ("app/a", "2"))
        state, _ = apply(state, 9, write(put("app/a", "3"), sequence=3, acknowledged=2))
        assert list(state.sessions[1].outcomes) == [3]
        assert apply(state, 10, write(put("app/a", "1"), sequence=1))[1].code is Code.SEQUENCE_PASSED

    def test_too_many_outcomes_that_nobody_acknowledges_are_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(settings, "SESSION_OUTCOMES_MAX", 2)
        state = after(("app/a", "1"), ("app/a", "2"))
        assert apply(state, 9, write(put("app/a", "3"), sequence=3))[1].code is Code.TOO_MANY_IN_FLIGHT
        state, outcome = apply(state, 9, write(put("app/a", "3"), sequence=3, acknowledged=1))
        assert outcome.code is Code.DONE

    def test_an_unknown_session_is_expired(self) -> None:
        state, outcome = apply(opened(), 2, write(put("app/a", "1"), session=99))
        assert (outcome.code, state.revision) == (Code.SESSION_EXPIRED, 0)

    def test_a_session_expires_by_the_time_in_the_log(self) -> None:
        later = MS + settings.SESSION_IDLE_MS_MAX + 1
        state = opened(opened(), 2, later)
        assert list(state.sessions) == [2]
        assert apply(state, 3, write(put("app/a", "1")))[1].code is Code.SESSION_EXPIRED

    def test_activity_keeps_a_session(self) -> None:
        half = settings.SESSION_IDLE_MS_MAX * 2 // 3
        state, _ = apply(opened(), 2, write(put("app/a", "1"), time_ms=MS + half))
        state, outcome = apply(state, 3, write(put("app/a", "2"), sequence=2, time_ms=MS + 2 * half))
        assert outcome.code is Code.DONE

    def test_time_never_runs_back(self) -> None:
        state = opened(opened(), 2, 5)
        assert state.time_ms == MS
        settings.check(state)

    def test_the_least_active_session_gives_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(settings, "SESSIONS_MAX", 2)
        state = opened(opened(), 2)
        state, _ = apply(state, 3, write(put("app/a", "1"), session=1))
        assert list(opened(state, 4).sessions) == [1, 4]


class TestTotality:
    @given(st.binary(max_size=200))
    def test_no_bytes_of_a_known_version_raise(self, data: bytes) -> None:
        _, outcome = apply(opened(), 2, b"\x01" + data)
        assert outcome.code in (Code.COMMAND_INVALID, Code.DONE)

    @pytest.mark.parametrize(
        "text", ["[" * 100_000, '{"kind":' + "[" * 100_000, '{"a":{}}', '"\\ud800"', "", "null"]
    )
    def test_hostile_texts_are_invalid(self, text: str) -> None:
        assert apply(opened(), 2, b"\x01" + text.encode())[1].code is Code.COMMAND_INVALID

    def test_half_a_character_in_a_value_is_invalid_or_survives_a_snapshot(self) -> None:
        data = write(put("app/a", "X")).replace(b'"X"', b'"\\ud800"')
        state, _ = apply(opened(), 2, data)
        assert settings.restore(settings.snapshot(state)) == state

    @pytest.mark.parametrize(
        "command",
        [
            Command(kind=Kind.WRITE, session=1, sequence=1),
            Command(kind=Kind.WRITE, session=1, sequence=1, changes=(put("app/a", "1"), put("app/a", "2"))),
            Command(kind=Kind.WRITE, session=1, sequence=1, changes=(put("Bad key", "1"),)),
            Command(kind=Kind.WRITE, session=1, sequence=1, acknowledged=1, changes=(put("app/a", "1"),)),
            Command(kind=Kind.WRITE, session=1, sequence=-1, changes=(put("app/a", "1"),)),
            Command(kind=Kind.WRITE, session=1, sequence=1, changes=(put("app/a", "x" * 70_000),)),
            Command(kind=Kind.WRITE, session=1, sequence=1, changes=(put("app/a", "1"),), author="x" * 300),
            Command(kind=Kind.OPEN_SESSION, changes=(put("app/a", "1"),)),
        ],
    )
    def test_a_command_out_of_bounds_is_invalid_and_changes_nothing(self, command: Command) -> None:
        before = opened()
        state, outcome = apply(before, 2, encode(command))
        assert (outcome.code, state) == (Code.COMMAND_INVALID, before)

    def test_a_newer_version_is_never_skipped(self) -> None:
        with pytest.raises(UpgradeNeeded):
            apply(State(), 1, b"\x02{}")
        with pytest.raises(UpgradeNeeded):
            settings.restore(b"\x02{}")

    @given(
        st.lists(
            st.tuples(
                st.integers(1, 4),
                st.sampled_from(["app/a", "app/b", "app/c"]),
                st.one_of(st.none(), st.text(max_size=5)),
                st.one_of(st.none(), st.integers(0, 5)),
                st.integers(0, 3),
                st.integers(0, 10_000_000),
            ),
            max_size=30,
        )
    )
    def test_replicas_agree_also_through_snapshots(
        self, steps: list[tuple[int, str, str | None, int | None, int, int]]
    ) -> None:
        one = two = opened()
        for index, (sequence, key, value, expected, acknowledged, time_ms) in enumerate(steps, start=2):
            data = write(
                put(key, value, expected), sequence=sequence, acknowledged=acknowledged, time_ms=MS + time_ms
            )
            one, first = apply(one, index, data)
            two, second = apply(settings.restore(settings.snapshot(two)), index, data)
            assert first == second
            settings.check(one)
        assert one == two
        assert settings.snapshot(one) == settings.snapshot(two)


class TestHistory:
    def test_values_at_a_revision(self) -> None:
        state = after(("app/a", "1"), ("app/b", "2"), ("app/a", None), ("app/b", "3"))
        assert [dict(settings.values_at(state, r)) for r in range(5)] == [
            {},
            {"app/a": "1"},
            {"app/a": "1", "app/b": "2"},
            {"app/b": "2"},
            {"app/b": "3"},
        ]

    def test_a_rollback_brings_everything_back(self) -> None:
        state = after(("app/a", "1"), ("app/b", "2"), ("app/a", None), ("app/b", "3"), ("app/c", "4"))
        changes = settings.rollback(state, 2)
        state, outcome = apply(state, 20, write(*changes, sequence=9))
        assert outcome == Outcome(code=Code.DONE, revision=6)
        assert {key: value.text for key, value in state.values.items()} == {"app/a": "1", "app/b": "2"}
        assert settings.difference(state, 2, 6) == ()

    def test_a_rollback_does_not_run_over_a_change_in_between(self) -> None:
        state = after(("app/a", "1"), ("app/a", "2"))
        changes = settings.rollback(state, 1)
        state, _ = apply(state, 20, write(put("app/a", "9"), sequence=8))
        assert apply(state, 21, write(*changes, sequence=9))[1].code is Code.REVISION_CONFLICT

    @pytest.mark.parametrize("revision", [-1, 3])
    def test_a_revision_that_is_not_known_is_refused(self, revision: int) -> None:
        with pytest.raises(InvalidRequest) as caught:
            settings.rollback(after(("app/a", "1"), ("app/a", "2")), revision)
        assert caught.value.field == "revision"

    def test_a_difference_names_what_differs(self) -> None:
        state = after(("app/a", "1"), ("app/b", "2"), ("app/a", "3"))
        assert settings.difference(state, 1, 3) == (("app/a", "1", "3"), ("app/b", None, "2"))


class TestSchema:
    """What may be proposed."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("profiles/medic", '{"model": "m", "fingerprint": "' + "a" * 64 + '", "domains": ["health"]}'),
            ("domains/health", '{"profiles": ["medic", "general"]}'),
            ("routing/policy", '"least-loaded"'),
            ("routing/weights", '{"medic": 2.5}'),
            ("limits/streams_max", "64"),
            ("quotas/team-a", '{"tokens_per_minute": 100000}'),
            ("voters/policy", '{"automatic": true, "target": 5, "stable_s": 30}'),
            ("revocations/" + "0f" * 16, '{"reason": "stolen"}'),
            ("app/anything/at:all", '{"nested": [1, null, "x"]}'),
            ("profiles/medic", None),
        ],
    )
    def test_what_is_accepted(self, key: str, value: str | None) -> None:
        validate([put(key, value)])

    @pytest.mark.parametrize(
        ("key", "value", "field"),
        [
            ("Profiles/x", "1", "key"),
            ("unknown/x", "1", "key"),
            ("app", "1", "key"),
            ("app/x", "{", "app/x"),
            ("app/x", "NaN", "app/x"),
            ("app/x", "[" * 20 + "]" * 20, "app/x"),
            ("app/x", '"' + "x" * 70_000 + '"', "app/x"),
            ("profiles/Bad", "{}", "profiles/Bad"),
            ("profiles/x", "{}", "profiles/x.model"),
            ("profiles/x", '{"model": "m", "fingerprint": "zz"}', "profiles/x.fingerprint"),
            ("profiles/x", '{"model": "m", "fingerprint": "' + "a" * 64 + '", "more": 1}', "profiles/x.more"),
            ("domains/x", '{"profiles": []}', "domains/x.profiles"),
            ("routing/policy", '"fastest"', "routing/policy"),
            ("routing/other", "1", "key"),
            ("routing/weights", '{"medic": -1}', "routing/weights.medic"),
            ("routing/weights", '{"medic": true}', "routing/weights.medic"),
            ("limits/hops_max", "9", "limits/hops_max"),
            ("limits/hops_max", "1.5", "limits/hops_max"),
            ("limits/none_such", "1", "key"),
            ("quotas/team", '{"tokens_per_minute": -1}', "quotas/team.tokens_per_minute"),
            ("voters/policy", '{"automatic": 1}', "voters/policy.automatic"),
            ("voters/policy", '{"automatic": true, "target": 4}', "voters/policy.target"),
            ("revocations/short", '{"reason": "x"}', "key"),
            ("revocations/" + "0f" * 16, '{"reason": ""}', "revocations/" + "0f" * 16 + ".reason"),
        ],
    )
    def test_what_is_refused_names_its_field(self, key: str, value: str, field: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            validate([put(key, value)])
        assert caught.value.field == field

    def test_a_key_is_changed_once_at_a_time(self) -> None:
        with pytest.raises(InvalidRequest, match="twice"):
            validate([put("app/a", "1"), put("app/a", "2")])

    def test_nothing_is_not_a_write(self) -> None:
        with pytest.raises(InvalidRequest):
            validate([])

    def test_what_the_schema_accepts_apply_accepts(self) -> None:
        changes = [put(f"app/k{n}", '"x"') for n in range(settings.CHANGES_MAX)]
        validate(changes)
        assert apply(opened(), 2, write(*changes))[1].code is Code.DONE

    @given(st.text(max_size=60))
    def test_any_text_is_accepted_or_refused_with_a_field(self, text: str) -> None:
        try:
            validate([put("voters/policy", text)])
        except InvalidRequest as error:
            assert error.field
