"""The life of one request. Goal: one end, one continuous stream, and another node where that helps.

Method: drive the machine by hand through each story, then by random events against what must always hold.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core import errors
from fieldmesh.core.dispatch import (
    Arrived,
    Cancel,
    Deliver,
    Dispatch,
    DispatchConfig,
    DispatchEffect,
    DispatchEvent,
    Ended,
    Entry,
    Fail,
    Failed,
    Finish,
    Phase,
    Resumption,
    Start,
    Stop,
    ViewMoved,
    Wake,
)
from fieldmesh.core.model import (
    Address,
    Ask,
    Chunk,
    Completion,
    EngineState,
    FinishReason,
    Load,
    Member,
    NodeId,
    NodeState,
    ProfileOffer,
    Prompt,
    RequestId,
    SamplingOverrides,
    Usage,
)
from fieldmesh.core.routing import Candidate, Decision, Policy

HERE, THERE, ELSEWHERE = NodeId("a" * 32), NodeId("b" * 32), NodeId("c" * 32)


def candidate(node: NodeId, fingerprint: str = "f", running: int = 0) -> Candidate:
    member = Member(
        id=node,
        name=node[0],
        address=Address(host="127.0.0.1", port=1),
        state=NodeState.ALIVE,
        incarnation=1,
        load=Load(engine=EngineState.READY, slots=1, running=running, queue_max=1),
    )
    return Candidate(
        member=member, offer=ProfileOffer(name="p", model="m", fingerprint=fingerprint), score=0.0
    )


class Mesh:
    """A routing function over a fixed list of nodes, in order of preference."""

    def __init__(self, *nodes: NodeId) -> None:
        self.nodes = list(nodes)
        self.fingerprints: dict[NodeId, str] = {}
        self.running: dict[NodeId, int] = {}
        self.refusal: errors.FieldmeshError = errors.NoCandidate("nobody")

    def route(self, failed: frozenset[NodeId], full: frozenset[NodeId]) -> Decision:
        left = [node for node in self.nodes if node not in failed | full]
        if not left:
            raise self.refusal
        return Decision(
            policy=Policy.RANDOM,
            candidates=tuple(
                candidate(node, self.fingerprints.get(node, "f"), self.running.get(node, 0)) for node in left
            ),
        )


def dispatch(
    mesh: Mesh,
    *,
    deadline_at: float | None = None,
    settled_at: float = 0.0,
    ask: Ask | None = None,
    **config: float,
) -> Dispatch:
    return Dispatch(
        ask or Ask(request_id=RequestId("r"), prompt=Prompt(text="hello")),
        generation_id="g",
        entry=Entry(node=HERE, name="here", settled_at=settled_at),
        route=mesh.route,
        config=DispatchConfig(**config),  # type: ignore[arg-type]
        rng=Random(1),
        now=0.0,
        deadline_at=deadline_at,
    )


def chunk(first: int, count: int, epoch: int = 0) -> Chunk:
    ids = tuple(range(first, first + count))
    return Chunk(generation_id="x", epoch=epoch, first_token_index=first, token_ids=ids, text="t" * count)


DONE = Completion(finish_reason=FinishReason.STOP, usage=Usage(prompt_tokens=1, completion_tokens=2))
LOST = errors.EngineLost("the engine was killed")
GONE = errors.NodeUnreachable("the node does not answer")


def started(effects: list[DispatchEffect]) -> list[NodeId]:
    return [effect.candidate.member.id for effect in effects if isinstance(effect, Start)]


def failure(effects: list[DispatchEffect]) -> errors.FieldmeshError:
    (fail,) = [effect for effect in effects if isinstance(effect, Fail)]
    return fail.error


def test_a_request_that_goes_well_delivers_its_chunks_and_finishes_once() -> None:
    life = dispatch(Mesh(THERE))
    assert started(life.begin(0.0)) == [THERE]
    (delivered,) = life.handle(Arrived(epoch=0, chunk=chunk(0, 2)), 0.5)
    assert isinstance(delivered, Deliver)
    assert delivered.chunk.generation_id == "g"
    (finish,) = life.handle(Ended(epoch=0, completion=DONE), 2.0)
    assert isinstance(finish, Finish)
    assert (finish.result.served_by, finish.result.hops) == (THERE, 1)
    assert (finish.result.ttft_s, finish.result.duration_s) == (0.5, 2.0)
    (attempt,) = finish.result.attempts
    assert (attempt.reason, attempt.first_token_index, attempt.last_token_index) == ("served", 0, 2)
    assert life.handle(Failed(epoch=0, error=LOST), 3.0) == []


def test_an_answer_by_the_entry_node_took_no_hop() -> None:
    life = dispatch(Mesh(HERE))
    life.begin(0.0)
    (finish,) = life.handle(Ended(epoch=0, completion=DONE), 1.0)
    assert isinstance(finish, Finish)
    assert finish.result.hops == 0


def test_before_the_first_token_a_failed_attempt_moves_on_to_another_node() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE))
    life.begin(0.0)
    assert started(life.handle(Failed(epoch=0, error=LOST), 1.0)) == [ELSEWHERE]
    (finish,) = life.handle(Ended(epoch=1, completion=DONE), 2.0)
    assert isinstance(finish, Finish)
    assert [attempt.reason for attempt in finish.result.attempts] == ["ENGINE_LOST", "served"]


def test_a_full_node_spills_to_another_before_the_request_is_refused() -> None:
    mesh = Mesh(THERE, ELSEWHERE)
    mesh.refusal = errors.QueueFull("all full", retry_after_s=1.0)
    life = dispatch(mesh, patience_s=0.0)
    life.begin(0.0)
    assert started(life.handle(Failed(epoch=0, error=errors.QueueFull("full")), 0.1)) == [ELSEWHERE]
    assert failure(life.handle(Failed(epoch=1, error=errors.QueueFull("full")), 0.2)) is mesh.refusal


def test_a_mesh_that_is_full_from_the_start_refuses_at_once() -> None:
    mesh = Mesh()
    mesh.refusal = errors.QueueFull("all full")
    assert failure(dispatch(mesh).begin(0.0)) is mesh.refusal


def test_after_the_first_token_a_loss_ends_the_stream_with_the_count_of_tokens() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE))
    life.begin(0.0)
    life.handle(Arrived(epoch=0, chunk=chunk(0, 3)), 0.5)
    error = failure(life.handle(Failed(epoch=0, error=LOST), 1.0))
    assert isinstance(error, errors.StreamLost)
    assert error.metadata == {"tokens_delivered": "3", "cause": "ENGINE_LOST"}


def test_the_callers_own_mistake_is_not_tried_elsewhere() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE))
    life.begin(0.0)
    mistake = errors.PromptTooLong("too long")
    assert failure(life.handle(Failed(epoch=0, error=mistake), 1.0)) is mistake


def test_while_nobody_can_serve_a_request_waits_for_a_node_to_come_back() -> None:
    mesh = Mesh()
    life = dispatch(mesh)
    assert life.begin(0.0) == []
    assert life.phase is Phase.WAITING
    mesh.nodes.append(THERE)
    assert started(life.handle(ViewMoved(states={THERE: NodeState.ALIVE}), 1.0)) == [THERE]


def test_a_wait_also_ends_by_its_own_clock() -> None:
    mesh = Mesh()
    life = dispatch(mesh)
    life.begin(0.0)
    due = life.deadline
    assert due is not None
    assert 0.0 < due <= 0.1
    mesh.nodes.append(THERE)
    assert started(life.handle(Wake(), due)) == [THERE]


def test_an_owner_between_two_lives_is_waited_for_once_it_was_tried() -> None:
    mesh = Mesh(THERE)
    life = dispatch(mesh)
    life.begin(0.0)
    mesh.nodes.clear()
    mesh.refusal = errors.ProfileNotFound("it has not said yet what it offers")
    assert life.handle(Failed(epoch=0, error=LOST), 0.1) == []
    mesh.nodes.append(THERE)
    assert started(life.handle(ViewMoved(states={THERE: NodeState.ALIVE}), 1.0)) == [THERE]


def test_a_pause_after_a_failure_is_not_cut_short_by_changes_of_load() -> None:
    mesh = Mesh(THERE)
    life = dispatch(mesh)
    life.begin(0.0)
    assert life.handle(Failed(epoch=0, error=LOST), 0.1) == []
    assert life.handle(ViewMoved(states={}), 0.11) == []
    assert life.phase is Phase.WAITING


def test_patience_ends_in_the_reason_why_nobody_could_serve() -> None:
    life = dispatch(Mesh(), patience_s=2.0)
    effects = life.begin(0.0)
    for _ in range(100):
        if life.phase is Phase.ENDED:
            break
        assert life.deadline is not None
        effects = life.handle(Wake(), life.deadline)
    assert isinstance(failure(effects), errors.NoCandidate)


def test_what_nobody_ever_offered_is_refused_without_waiting() -> None:
    mesh = Mesh()
    mesh.refusal = errors.ModelNotFound("no such model")
    assert failure(dispatch(mesh).begin(0.0)) is mesh.refusal


def test_a_node_that_has_just_started_waits_for_the_owner_of_a_name_it_does_not_know() -> None:
    mesh = Mesh()
    mesh.refusal = errors.DomainNotFound("never heard of it")
    machine = dispatch(mesh, settled_at=5.0)
    assert machine.begin(now=4.0) == []
    mesh.nodes = [THERE]
    assert started(machine.handle(ViewMoved(states={}), now=4.5)) == [THERE]


def test_a_name_that_is_still_unknown_when_the_node_has_settled_is_refused() -> None:
    mesh = Mesh()
    mesh.refusal = errors.DomainNotFound("never heard of it")
    machine = dispatch(mesh, settled_at=5.0)
    effects = machine.begin(now=4.0)
    while not effects:
        now = machine.deadline
        assert now is not None
        effects = machine.handle(Wake(), now)
    assert isinstance(failure(effects), errors.DomainNotFound)
    assert now == 5.0


def test_attempts_are_bounded() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE), attempts_max=3)
    effects = life.begin(0.0)
    now, attempts = 0.0, 0
    while life.phase is not Phase.ENDED:
        now += 0.01
        if life.phase is Phase.RUNNING:
            attempts += 1
            effects = life.handle(Failed(epoch=attempts - 1, error=GONE), now)
        else:
            assert life.deadline is not None
            now = life.deadline
            effects = life.handle(Wake(), now)
    assert attempts == 3
    assert failure(effects) is GONE


def test_a_request_over_which_engine_after_engine_ends_is_not_given_to_a_fourth() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE, HERE))
    life.begin(0.0)
    life.handle(Failed(epoch=0, error=LOST), 0.1)
    life.handle(Failed(epoch=1, error=LOST), 0.2)
    assert failure(life.handle(Failed(epoch=2, error=LOST), 0.3)) is LOST


def test_the_deadline_stops_the_attempt_and_ends_the_request() -> None:
    life = dispatch(Mesh(THERE), deadline_at=5.0)
    life.begin(0.0)
    effects = life.handle(Wake(), 5.0)
    assert effects[0] == Cancel(epoch=0)
    assert isinstance(failure(effects), errors.DeadlineExceeded)


def test_a_caller_who_leaves_stops_the_attempt() -> None:
    life = dispatch(Mesh(THERE))
    life.begin(0.0)
    gone = errors.Cancelled("gone")
    assert life.handle(Stop(error=gone), 1.0) == [Cancel(epoch=0), Fail(error=gone)]


def test_a_node_that_stops_says_how_much_it_has_delivered() -> None:
    life = dispatch(Mesh(THERE))
    life.begin(0.0)
    life.handle(Arrived(epoch=0, chunk=chunk(0, 3)), 0.5)
    error = failure(life.handle(Stop(error=errors.Draining("leaving")), 1.0))
    assert isinstance(error, errors.StreamLost)
    assert error.metadata["tokens_delivered"] == "3"


@pytest.mark.parametrize("state", [NodeState.SUSPECT, NodeState.DEAD, NodeState.UNREACHABLE, NodeState.LEFT])
def test_a_silent_attempt_is_given_up_when_its_node_is_no_longer_trusted(state: NodeState) -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE))
    life.begin(0.0)
    effects = life.handle(ViewMoved(states={THERE: state}), 1.0)
    assert effects[0] == Cancel(epoch=0)
    assert started(effects) == [ELSEWHERE]


def test_a_stream_that_flows_survives_suspicion_but_not_death() -> None:
    life = dispatch(Mesh(THERE))
    life.begin(0.0)
    life.handle(Arrived(epoch=0, chunk=chunk(0, 1)), 0.5)
    assert life.handle(ViewMoved(states={THERE: NodeState.SUSPECT}), 1.0) == []
    effects = life.handle(ViewMoved(states={THERE: NodeState.DEAD}), 2.0)
    assert isinstance(failure(effects), errors.StreamLost)


# --- a node that leaves ------------------------------------------------------------------

LEAVES = ViewMoved(states={}, draining=frozenset({THERE}))


def moving(mesh: Mesh | None = None, ask: Ask | None = None) -> tuple[Dispatch, list[DispatchEffect]]:
    """A request that has three tokens when its node begins to leave; what comes of that."""
    life = dispatch(mesh or Mesh(THERE, ELSEWHERE), ask=ask)
    life.begin(0.0)
    life.handle(Arrived(epoch=0, chunk=chunk(0, 3)), 0.5)
    return life, life.handle(LEAVES, 1.0)


def test_a_stream_goes_on_at_another_node_when_its_own_begins_to_leave() -> None:
    life, effects = moving()
    (start,) = effects
    assert isinstance(start, Start)
    assert (start.candidate.member.id, start.epoch) == (ELSEWHERE, 1)
    assert start.resumption == Resumption(token_ids=(0, 1, 2), node=THERE, epoch=0)
    assert life.handle(Arrived(epoch=0, chunk=chunk(3, 2)), 1.1) == [], "held back"
    cancelled, delivered = life.handle(Arrived(epoch=1, chunk=chunk(3, 4)), 1.2)
    assert cancelled == Cancel(epoch=0), "it is needed for as long as its state is"
    assert isinstance(delivered, Deliver)
    assert life.handle(Failed(epoch=0, error=GONE), 1.3) == []
    (finish,) = life.handle(Ended(epoch=1, completion=DONE), 2.0)
    assert isinstance(finish, Finish)
    assert finish.result.served_by == ELSEWHERE
    assert [(a.node, a.reason, a.first_token_index, a.last_token_index) for a in finish.result.attempts] == [
        (THERE, "moved", 0, 3),
        (ELSEWHERE, "served", 3, 7),
    ]


def test_a_stream_goes_on_where_it_was_when_the_other_node_refuses() -> None:
    life, _ = moving()
    life.handle(Arrived(epoch=0, chunk=chunk(3, 2)), 1.1)
    (delivered,) = life.handle(Failed(epoch=1, error=errors.QueueFull("full")), 1.2)
    assert isinstance(delivered, Deliver)
    assert (delivered.chunk.token_ids, delivered.chunk.epoch) == ((3, 4), 0)
    (finish,) = life.handle(Ended(epoch=0, completion=DONE), 2.0)
    assert isinstance(finish, Finish)
    assert [attempt.reason for attempt in finish.result.attempts] == ["QUEUE_FULL", "served"]


def test_a_node_that_starts_anew_instead_of_going_on_is_not_believed() -> None:
    life, _ = moving()
    effects = life.handle(Arrived(epoch=1, chunk=chunk(0, 2)), 1.1)
    assert effects == [Cancel(epoch=1)]
    assert isinstance(life.handle(Arrived(epoch=0, chunk=chunk(3, 1)), 1.2)[0], Deliver)


def test_a_leaving_node_that_finishes_first_has_answered() -> None:
    life, _ = moving()
    life.handle(Arrived(epoch=0, chunk=chunk(3, 2)), 1.1)
    cancelled, delivered, finish = life.handle(Ended(epoch=0, completion=DONE), 1.2)
    assert cancelled == Cancel(epoch=1)
    assert isinstance(delivered, Deliver)
    assert isinstance(finish, Finish)
    assert finish.result.served_by == THERE


def test_a_move_goes_on_when_the_leaving_node_is_gone_before_its_end() -> None:
    life, _ = moving()
    assert life.handle(Failed(epoch=0, error=GONE), 1.1) == []
    assert isinstance(life.handle(Arrived(epoch=1, chunk=chunk(3, 1)), 1.2)[-1], Deliver)


def test_a_stream_that_loses_both_nodes_is_lost() -> None:
    life, _ = moving()
    life.handle(Failed(epoch=0, error=GONE), 1.1)
    error = failure(life.handle(Failed(epoch=1, error=LOST), 1.2))
    assert isinstance(error, errors.StreamLost)
    assert error.metadata["tokens_delivered"] == "3"


@pytest.mark.parametrize(
    "event", [Stop(error=errors.Cancelled("gone")), Wake()], ids=["caller leaves", "deadline passes"]
)
def test_an_end_in_the_middle_of_a_move_stops_both_nodes(event: DispatchEvent) -> None:
    life, _ = moving()
    effects = life.handle(event, 1e6)
    assert [e for e in effects if isinstance(e, Cancel)] == [Cancel(epoch=1), Cancel(epoch=0)]
    failure(effects)


def test_a_stream_stays_where_nobody_else_has_its_model() -> None:
    assert moving(Mesh(THERE))[1] == []
    other = Mesh(THERE, ELSEWHERE)
    other.fingerprints[ELSEWHERE] = "another"
    assert moving(other)[1] == []


def test_a_stream_moves_to_where_it_need_not_wait() -> None:
    mesh = Mesh(THERE, HERE, ELSEWHERE)
    mesh.running[HERE] = 1
    assert started(moving(mesh)[1]) == [ELSEWHERE]
    mesh.running[ELSEWHERE] = 1
    assert started(moving(mesh)[1]) == [HERE], "a queue is better than nowhere"


def test_several_answers_stay_together() -> None:
    ask = Ask(
        request_id=RequestId("r"), prompt=Prompt(text="hello"), sampling=SamplingOverrides(n=2, max_tokens=9)
    )
    assert moving(ask=ask)[1] == []


def test_what_runs_at_the_node_that_was_asked_does_not_move() -> None:
    life = dispatch(Mesh(HERE, ELSEWHERE))
    life.begin(0.0)
    life.handle(Arrived(epoch=0, chunk=chunk(0, 3)), 0.5)
    assert life.handle(ViewMoved(states={}, draining=frozenset({HERE})), 1.0) == []


def test_a_request_without_a_token_does_not_move() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE))
    life.begin(0.0)
    assert life.handle(LEAVES, 1.0) == []


def test_a_node_that_restarted_has_forgotten_its_streams() -> None:
    life = dispatch(Mesh(THERE))
    life.begin(0.0)
    life.handle(Arrived(epoch=0, chunk=chunk(0, 1)), 0.5)
    assert life.handle(ViewMoved(states={}, restarted={THERE: 1}), 1.0) == []  # the life that serves us
    effects = life.handle(ViewMoved(states={}, restarted={THERE: 2}), 2.0)
    assert effects[0] == Cancel(epoch=0)
    assert isinstance(failure(effects), errors.StreamLost)


def test_a_gap_in_the_tokens_is_not_passed_on() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE))
    life.begin(0.0)
    effects = life.handle(Arrived(epoch=0, chunk=chunk(1, 1)), 0.5)
    assert effects[0] == Cancel(epoch=0)
    assert started(effects) == [ELSEWHERE]


def test_what_an_abandoned_attempt_still_says_is_ignored() -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE))
    life.begin(0.0)
    life.handle(Failed(epoch=0, error=LOST), 0.1)
    assert life.handle(Arrived(epoch=0, chunk=chunk(0, 1)), 0.2) == []
    assert life.handle(Ended(epoch=0, completion=DONE), 0.3) == []


def test_begin_is_called_once() -> None:
    life = dispatch(Mesh(THERE))
    life.begin(0.0)
    with pytest.raises(RuntimeError):
        life.begin(0.0)


def test_a_config_that_contradicts_itself_is_refused() -> None:
    for bad in (
        DispatchConfig(attempts_max=0),
        DispatchConfig(retry_delay_s=2.0, retry_delay_s_max=1.0),
        DispatchConfig(patience_s=-1.0),
        DispatchConfig(timeout_s=0.0),
    ):
        with pytest.raises(ValueError, match="must"):
            bad.validate()


epochs = st.integers(min_value=0, max_value=4)
random_events = st.one_of(
    st.builds(Arrived, epoch=epochs, chunk=st.builds(chunk, st.integers(0, 6), st.integers(0, 3))),
    st.builds(Ended, epoch=epochs, completion=st.just(DONE)),
    st.builds(
        Failed,
        epoch=epochs,
        error=st.sampled_from(
            [LOST, errors.QueueFull("full"), errors.PromptTooLong("long"), errors.Internal("?")]
        ),
    ),
    st.builds(
        ViewMoved,
        states=st.dictionaries(st.sampled_from([HERE, THERE, ELSEWHERE]), st.sampled_from(list(NodeState))),
        draining=st.frozensets(st.sampled_from([HERE, THERE, ELSEWHERE])),
    ),
    st.just(Wake()),
    st.just(Stop(error=errors.Cancelled("gone"))),
)


@given(st.lists(st.tuples(random_events, st.floats(0, 2)), max_size=40))
def test_whatever_happens_there_is_one_continuous_stream_and_one_end(
    events: list[tuple[DispatchEvent, float]],
) -> None:
    life = dispatch(Mesh(THERE, ELSEWHERE, HERE), deadline_at=30.0)
    now, effects = 0.0, life.begin(0.0)
    running: set[int] = set()
    next_index = ends = 0

    def see(seen: list[DispatchEffect]) -> None:
        nonlocal next_index, ends
        for effect in seen:
            assert ends == 0, "nothing follows the end"
            match effect:
                case Start():
                    assert len(running) <= (effect.resumption is not None), "one attempt at a time"
                    running.add(effect.epoch)
                case Cancel():
                    running.discard(effect.epoch)
                case Deliver():
                    assert effect.chunk.first_token_index == next_index
                    next_index = effect.chunk.next_token_index
                case Finish() | Fail():
                    ends += 1

    see(effects)
    for event, delay_s in events:
        now += delay_s
        if isinstance(event, Ended | Failed):
            running.discard(event.epoch)
        see(life.handle(event, now))
        life.check()
    while life.phase is not Phase.ENDED:
        assert life.deadline is not None
        now = max(now, life.deadline)
        see(life.handle(Wake(), now))
        life.check()
    assert ends == 1
    assert life.deadline is None
