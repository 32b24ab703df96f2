"""Who is alive, as the papers say it: SWIM (Das, Gupta, Motivala 2002) and Lifeguard (Dadgar et al. 2018).

Small worlds of two to four nodes with real clocks' troubles; the sweeps of ``simulations`` do the rest.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from fieldmesh.core.events import Note, Received, Send, Tick
from fieldmesh.core.joining import HintSource, JoinConfig, Joining
from fieldmesh.core.membership import Membership
from fieldmesh.core.messages import (
    Goodbye,
    Heartbeat,
    Hello,
    Introduction,
    Mark,
    PeerHint,
    ProbeReply,
    ProbeRequest,
    Refused,
    Rumor,
    Rumored,
    Welcome,
)
from fieldmesh.core.model import Address, EngineState, Load, NodeId, NodeState
from fieldmesh.core.peers import JoinHint, LeaveRequested, LinkFailed, LoadChanged, MembershipConfig


def node(number: int) -> NodeId:
    return NodeId(f"{number:032x}")


def at(number: int) -> Address:
    return Address(host="10.0.0.1", port=7000 + number)


class Trio:
    """Memberships joined back to back: no network but ``cut`` (a set of directed pairs), no delay."""

    def __init__(self, count: int, **config: Any) -> None:
        self.now = 100.0
        self.cut: set[tuple[int, int]] = set()
        self.down: set[int] = set()
        self.notes: list[tuple[int, str]] = []
        self.sent: list[tuple[int, Send[Any]]] = []
        self.nodes = {
            number: Membership(
                local=node(number),
                name=f"n{number}",
                mesh="m",
                addresses=(at(number),),
                incarnation=1,
                rng=Random(number),
                config=MembershipConfig(**config),
            )
            for number in range(1, count + 1)
        }
        for number in self.nodes:
            self.give(number, JoinHint(address=at(1), source=HintSource.SEED))

    def give(self, number: int, event: Any) -> None:
        pending = [(number, event)]
        while pending:
            to, what = pending.pop(0)
            for effect in self.nodes[to].handle(what, self.now):
                if isinstance(effect, Note):
                    self.notes.append((to, effect.event))
                    continue
                self.sent.append((to, effect))
                other = effect.address.port - 7000
                if other in self.nodes and other not in self.down and (to, other) not in self.cut:
                    pending.append((other, Received(sender=node(to), message=effect.message)))
            self.nodes[to].check()

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            due = {
                n: m.deadline for n, m in self.nodes.items() if n not in self.down and m.deadline is not None
            }
            number = min(due, key=lambda n: due[n], default=None)
            if number is None or due[number] > until:
                break
            self.now = max(self.now, due[number])
            self.give(number, Tick())
        self.now = until

    def state(self, observer: int, of: int) -> NodeState | None:
        peer = self.nodes[observer].peers.get(node(of))
        return peer.state if peer is not None else None

    def noticed_after(self, observer: int, of: int, within_s: float = 10.0) -> float:
        start = self.now
        while self.state(observer, of) is NodeState.ALIVE:
            assert self.now - start < within_s, f"n{observer} still takes n{of} for alive"
            self.run(0.05)
        return self.now - start


def joined(count: int, **config: Any) -> Trio:
    mesh = Trio(count, **config)
    mesh.run(5.0)
    for one in mesh.nodes:
        for other in mesh.nodes:
            assert one == other or mesh.state(one, other) is NodeState.ALIVE
    return mesh


# --- joining -----------------------------------------------------------------------------


def test_a_node_that_knows_one_seed_is_known_by_all_within_a_second() -> None:
    mesh = Trio(4)
    mesh.run(1.0)
    assert all(mesh.state(a, b) is NodeState.ALIVE for a in mesh.nodes for b in mesh.nodes if a != b)


def test_a_seed_that_is_not_up_yet_is_tried_until_it_is() -> None:
    mesh = Trio(2)
    mesh.down.add(1)
    mesh.run(60.0)
    tries = sum(isinstance(effect.message, Hello) for _, effect in mesh.sent)
    assert 10 <= tries <= 40, "the backoff is bounded on both sides"
    mesh.down.clear()
    mesh.run(JoinConfig().retry_s_max + 1.0)
    assert mesh.state(2, 1) is NodeState.ALIVE


def introduction(**changes: Any) -> Introduction:
    facts: dict[str, Any] = {
        "mesh": "m",
        "name": "x",
        "incarnation": 1,
        "refutations": 0,
        "sequence": 1,
        "nonce": 7,
        "addresses": (at(9),),
        "directory": Mark(),
    }
    return Introduction(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"mesh": "other"}, "MESH_MISMATCH", "mesh 'm', not 'other'"),
        ({"protocol_min": 9, "protocol_max": 9}, "PROTOCOL_MISMATCH", "the peer 9 to 9"),
    ],
)
def test_strangers_are_refused_with_a_code_and_a_sentence(
    changes: dict[str, Any], code: str, says: str
) -> None:
    mesh = Trio(1)
    mesh.give(1, Received(sender=node(9), message=Hello(who=introduction(**changes), dialed=at(1))))
    [refusal] = [e.message for _, e in mesh.sent if isinstance(e.message, Refused)]
    assert refusal.code == code and says in refusal.message
    assert mesh.state(1, 9) is None and (1, "peer_refused") in mesh.notes


def test_a_refused_node_is_told_so_once_and_does_not_knock_in_haste() -> None:
    mesh = Trio(2)
    mesh.nodes[2].mesh = "other"
    mesh.run(29.0)
    hellos = [n for n, e in mesh.sent if n == 2 and isinstance(e.message, Hello)]
    assert len(hellos) == 1
    assert mesh.notes.count((2, "join_refused")) == 1


def test_the_list_of_peers_is_bounded_and_forgets_the_longest_gone_first() -> None:
    mesh = Trio(1, peers_max=2)
    one = mesh.nodes[1]
    for number in (8, 9):
        mesh.give(
            1, Received(sender=node(number), message=Hello(who=introduction(name=f"x{number}"), dialed=at(1)))
        )
    mesh.give(1, Received(sender=node(10), message=Hello(who=introduction(), dialed=at(1))))
    assert [e.message.code for _, e in mesh.sent if isinstance(e.message, Refused)] == ["PEERS_FULL"]
    mesh.give(1, Received(sender=node(8), message=Goodbye(incarnation=1, sequence=2)))
    mesh.give(1, Received(sender=node(10), message=Hello(who=introduction(), dialed=at(1))))
    assert set(one.peers) == {node(9), node(10)}


def test_two_live_nodes_of_one_name_are_told_to_the_operator_and_both_usable() -> None:
    mesh = Trio(3)
    mesh.nodes[3].name = mesh.nodes[2].name = "same"
    mesh.run(3.0)
    assert (1, "duplicate_name") in mesh.notes
    assert mesh.state(1, 2) is mesh.state(1, 3) is NodeState.ALIVE


def test_a_node_recognises_its_own_echo_and_stops_dialing_itself() -> None:
    mesh = Trio(1)
    mesh.give(1, JoinHint(address=at(5), source=HintSource.MDNS))
    hello = next(e.message for _, e in self_dial(mesh))
    mesh.give(1, Received(sender=node(1), message=hello))
    assert not mesh.nodes[1].peers and (1, "own_id_seen_elsewhere") not in mesh.notes


def self_dial(mesh: Trio) -> list[tuple[int, Send[Any]]]:
    mesh.run(1.0)
    return [(n, e) for n, e in mesh.sent if isinstance(e.message, Hello) and e.address == at(5)]


def test_a_second_life_under_our_key_is_told_to_the_operator() -> None:
    mesh = Trio(1)
    mesh.give(1, Received(sender=node(1), message=Hello(who=introduction(incarnation=4), dialed=at(1))))
    assert (1, "own_id_seen_elsewhere") in mesh.notes
    assert mesh.nodes[1].own_incarnation_seen == 4


def test_an_address_goes_to_whoever_proves_to_live_there() -> None:
    mesh = joined(3)
    mesh.down.add(3)
    mesh.run(8.0)
    assert mesh.state(1, 3) is NodeState.DEAD
    newcomer = introduction(name="new", addresses=(at(3),), sequence=5)
    mesh.give(1, Received(sender=node(77), message=Hello(who=newcomer, dialed=at(1))))
    assert mesh.nodes[1].peers[node(3)].addresses == ()


# --- failure detection (SWIM 3) ----------------------------------------------------------


def test_swim_3_1_silence_is_noticed_in_time_and_ends_in_death() -> None:
    mesh = joined(3)
    mesh.down.add(3)
    assert mesh.noticed_after(1, 3) <= 1.6
    assert mesh.state(1, 3) is NodeState.SUSPECT
    mesh.run(7.0)
    assert mesh.state(1, 3) is NodeState.DEAD


def test_a_refused_connection_hurries_the_notice_but_does_not_prove_a_death() -> None:
    mesh = joined(3)
    mesh.give(1, LinkFailed(address=at(3), to=node(3)))
    mesh.run(3.0)
    assert mesh.state(1, 3) is NodeState.ALIVE, "it answered the probe"
    mesh.down.add(3)
    mesh.give(1, LinkFailed(address=at(3), to=node(3)))
    assert mesh.noticed_after(1, 3) <= 0.5


def test_swim_3_1_others_are_asked_and_their_word_makes_a_cut_an_unreachable_peer() -> None:
    mesh = joined(3)
    mesh.cut |= {(3, 1), (1, 3)}
    assert mesh.noticed_after(1, 3) <= 1.6
    assert mesh.state(1, 3) is NodeState.UNREACHABLE
    mesh.run(30.0)
    assert mesh.state(1, 3) is NodeState.UNREACHABLE and mesh.state(2, 3) is NodeState.ALIVE
    assert any(isinstance(e.message, ProbeRequest) for _, e in mesh.sent)
    assert any(isinstance(e.message, ProbeReply) for _, e in mesh.sent)
    mesh.cut.clear()
    mesh.run(2.0)
    assert mesh.state(1, 3) is NodeState.ALIVE


@pytest.mark.parametrize("count", [2, 3])
def test_a_one_way_link_is_known_on_both_sides(count: int) -> None:
    mesh = joined(count)
    mesh.cut.add((2, 1))
    assert mesh.noticed_after(1, 2) <= 1.6
    assert mesh.noticed_after(2, 1) <= 0.5
    assert mesh.state(2, 1) is NodeState.UNREACHABLE
    mesh.run(20.0)
    assert mesh.state(1, 2) is not NodeState.ALIVE and mesh.state(2, 1) is not NodeState.ALIVE
    mesh.cut.clear()
    mesh.run(6.0)
    assert mesh.state(1, 2) is mesh.state(2, 1) is NodeState.ALIVE


def test_a_lost_node_that_knocks_but_cannot_hear_is_never_taken_for_alive() -> None:
    mesh = joined(2)
    mesh.cut |= {(1, 2), (2, 1)}
    mesh.run(60.0)
    assert mesh.state(1, 2) is NodeState.DEAD
    mesh.cut.remove((2, 1))
    for _ in range(600):
        mesh.run(0.05)
        assert mesh.state(1, 2) is not NodeState.ALIVE
    mesh.cut.clear()
    mesh.run(JoinConfig().retry_s_max + 1.5)
    assert mesh.state(1, 2) is mesh.state(2, 1) is NodeState.ALIVE


def test_who_tells_a_node_that_its_life_is_stale_is_not_taken_for_deaf() -> None:
    mesh = joined(2)
    one = mesh.nodes[1]
    stale = Rumor(
        about=node(1), says=Rumored.DEAD, incarnation=2, refutations=0, accuser=node(2), name="n1",
        addresses=(at(1),),
    )  # fmt: skip
    who = mesh.nodes[2]._voice.introduction()
    hello = Received(sender=node(2), message=Hello(who=who, dialed=at(1), rumors=(stale,)))
    one.handle(hello, mesh.now)
    assert mesh.state(1, 2) is NodeState.ALIVE
    assert one.own_incarnation_seen == 2


def test_a_second_life_under_one_incarnation_is_told_so_even_while_it_is_probed() -> None:
    mesh = joined(2)
    peer = mesh.nodes[1].peers[node(2)]
    peer.probe_at = mesh.now + 5.0
    mesh.nodes[2].nonce += 1
    who = mesh.nodes[2]._voice.introduction()
    effects = mesh.nodes[1].handle(Received(sender=node(2), message=Hello(who=who, dialed=at(1))), mesh.now)
    told = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Hello)]
    assert [(rumor.about, rumor.incarnation) for hello in told for rumor in hello.rumors] == [(node(2), 2)]


def test_halves_that_took_each_other_for_dead_find_each_other_again() -> None:
    mesh = joined(4)
    halves = [(a, b) for a in (1, 2) for b in (3, 4)]
    mesh.cut |= set(halves) | {(b, a) for a, b in halves}
    mesh.run(120.0)
    assert mesh.state(1, 3) is mesh.state(4, 2) is NodeState.DEAD
    mesh.cut.clear()
    mesh.run(JoinConfig().retry_s_max + 1.5)
    assert all(mesh.state(a, b) is NodeState.ALIVE for a in mesh.nodes for b in mesh.nodes if a != b)


def test_a_goodbye_is_believed_at_once_and_not_disturbed() -> None:
    mesh = joined(3)
    mesh.give(3, LeaveRequested())
    assert mesh.state(1, 3) is mesh.state(2, 3) is NodeState.LEFT
    mesh.sent.clear()
    mesh.run(30.0)
    assert not [e for n, e in mesh.sent if e.address == at(3) and n == 2]
    assert mesh.nodes[3].deadline is None and mesh.nodes[3].handle(Tick(), mesh.now) == []


# --- standing and rumors (SWIM 4.2) ------------------------------------------------------


def rumor(
    about: int, says: Rumored, *, refutations: int = 0, incarnation: int = 1, accuser: int = 9
) -> Rumor:
    return Rumor(
        about=node(about), says=says, incarnation=incarnation, refutations=refutations, accuser=node(accuser)
    )


def tell(mesh: Trio, to: int, sender: int, *rumors: Rumor, sequence: int = 10_000, **changes: Any) -> None:
    facts: dict[str, Any] = {
        "to": node(to),
        "incarnation": 1,
        "refutations": 0,
        "sequence": sequence,
        "sent_s": 1.0,
        "load": Load(),
        "directory": Mark(),
    }
    mesh.give(to, Received(sender=node(sender), message=Heartbeat(**{**facts, **changes}, rumors=rumors)))


def test_swim_4_2_a_node_refutes_what_is_said_against_it() -> None:
    mesh = joined(3)
    tell(mesh, 1, 2, rumor(1, Rumored.SUSPECT))
    assert mesh.nodes[1].standing == (1, 1) and (1, "refuted") in mesh.notes
    tell(mesh, 1, 2, rumor(1, Rumored.SUSPECT), sequence=10_001)
    assert mesh.nodes[1].standing == (1, 1), "an accusation that was refuted already"


def test_a_rumor_about_a_peer_that_is_heard_is_passed_to_it_and_not_believed() -> None:
    mesh = joined(3)
    tell(mesh, 1, 2, rumor(3, Rumored.DEAD))
    assert mesh.state(1, 3) is NodeState.ALIVE
    mesh.run(1.0)
    assert mesh.nodes[3].refutations == 1


def test_a_rumor_of_lower_standing_is_ignored() -> None:
    mesh = joined(3)
    mesh.nodes[1].peers[node(3)].refutations = 2
    mesh.down.add(3)
    mesh.run(1.6)
    assert mesh.state(1, 3) is NodeState.SUSPECT
    tell(mesh, 1, 2, rumor(3, Rumored.DEAD, refutations=1))
    assert mesh.state(1, 3) is NodeState.SUSPECT


def test_lifeguard_3_2_independent_accusers_shorten_a_suspicion() -> None:
    def death_after(accusers: int) -> float:
        mesh = joined(5)
        mesh.down |= {2, 3, 4, 5}  # nobody else speaks: the accusations are ours to place
        mesh.run(1.6)
        start = mesh.now
        for accuser in range(accusers):
            tell(mesh, 1, 5, rumor(2, Rumored.SUSPECT, accuser=20 + accuser), sequence=20_000 + accuser)
        while mesh.state(1, 2) is NodeState.SUSPECT:
            mesh.run(0.1)
        return mesh.now - start

    alone, confirmed = death_after(0), death_after(2)
    config = MembershipConfig()
    assert alone == pytest.approx(config.suspicion_s_max, abs=0.7)
    assert confirmed < alone - 1.0


def test_a_node_speaking_under_a_lower_incarnation_is_told_to_rise() -> None:
    mesh = joined(2)
    mesh.nodes[1].peers[node(2)].incarnation = 6
    mesh.run(4.0)
    assert mesh.nodes[2].own_incarnation_seen == 6
    mesh.nodes[2].raise_incarnation(7)
    mesh.run(6.0)
    assert mesh.state(1, 2) is NodeState.ALIVE and mesh.nodes[1].peers[node(2)].incarnation == 7


# --- our own lateness (Lifeguard 3.1) ----------------------------------------------------


def test_lifeguard_3_1_a_node_that_was_frozen_accuses_nobody() -> None:
    mesh = joined(3)
    mesh.sent.clear()
    mesh.now += 20.0  # nobody's timer was served
    mesh.give(1, Tick())
    assert mesh.state(1, 2) is mesh.state(1, 3) is NodeState.ALIVE
    mesh.run(3.0)
    assert mesh.state(1, 2) is mesh.state(1, 3) is NodeState.ALIVE
    assert mesh.nodes[1].counts["frozen"] == 1
    assert not any(note in ("peer_suspect", "peer_dead") for _, note in mesh.notes)


def test_a_loop_that_is_always_late_by_some_hundred_ms_accuses_nobody() -> None:
    mesh = joined(3)
    rng = Random(5)
    for _ in range(400):
        number = rng.choice([1, 2, 3])
        due = mesh.nodes[number].deadline
        assert due is not None
        mesh.now = max(mesh.now, min(m.deadline or 0.0 for m in mesh.nodes.values()) + rng.uniform(0.0, 0.4))
        for n, member in mesh.nodes.items():
            if member.deadline is not None and member.deadline <= mesh.now:
                mesh.give(n, Tick())
    assert not any(note.startswith("peer_") and note != "peer_alive" for _, note in mesh.notes)


# --- remote misuse is survived, local misuse raises --------------------------------------


def test_stale_misaddressed_and_unknown_messages_are_dropped_and_counted() -> None:
    mesh = joined(2)
    tell(mesh, 1, 2, sequence=1)
    mesh.nodes[1].local = node(5)  # as if the address had been another node's
    tell(mesh, 1, 2)
    mesh.nodes[1].local = node(1)
    tell(mesh, 1, 40)
    counts = mesh.nodes[1].counts
    assert (counts["stale_message"], counts["misaddressed"], counts["unknown_sender"]) == (1, 1, 1)


def test_probe_requests_for_strangers_or_from_strangers_are_not_served() -> None:
    mesh = joined(2)
    for sender, target in ((2, 50), (50, 2)):
        request = ProbeRequest(target=node(target), address=at(target), nonce=1)
        mesh.give(1, Received(sender=node(sender), message=request))
    assert mesh.nodes[1].counts["cannot_help"] == 2


def test_an_incarnation_never_goes_down() -> None:
    with pytest.raises(ValueError, match="must rise above 1"):
        Trio(1).nodes[1].raise_incarnation(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beat_s": 1.0},
        {"suspicion_s_min": 9.0},
        {"vouch_s": 0.5},
        {"gossip_per_heartbeat": 99},
    ],
)
def test_contradictory_configurations_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|required"):
        MembershipConfig(**wrong)  # type: ignore[arg-type]


# --- load, round trips, large meshes -----------------------------------------------------


def test_load_travels_with_the_beats_and_a_lost_engine_at_once() -> None:
    mesh = joined(2)
    mesh.give(1, LoadChanged(load=Load(engine=EngineState.READY, slots=4, queue_max=8)))
    mesh.run(0.02)
    assert mesh.nodes[2].peers[node(1)].load.slots == 4
    mesh.give(1, LoadChanged(load=Load(engine=EngineState.LOST)))
    mesh.run(0.02)
    assert mesh.nodes[2].peers[node(1)].load.engine is EngineState.LOST


def test_beyond_direct_max_a_node_beats_to_a_few_at_random_who_must_answer() -> None:
    mesh = Trio(9, direct_max=4, random_probes=2)
    mesh.run(20.0)
    assert all(mesh.state(a, b) is NodeState.ALIVE for a in mesh.nodes for b in mesh.nodes if a != b)
    mesh.sent.clear()
    mesh.run(10.0)
    asked = [e for _, e in mesh.sent if isinstance(e.message, Heartbeat) and e.message.wants_answer]
    assert len(asked) <= 9 * 2 * 22
    mesh.down.add(9)
    mesh.run(25.0)
    assert {mesh.state(a, 9) for a in range(1, 9)} == {NodeState.DEAD}


def test_beyond_direct_max_a_one_way_link_is_known_on_both_sides() -> None:
    mesh = Trio(9, direct_max=4, random_probes=2)
    mesh.run(20.0)
    mesh.cut.add((2, 1))
    mesh.run(7.0)
    for _ in range(100):
        mesh.run(0.1)
        assert mesh.state(1, 2) is not NodeState.ALIVE and mesh.state(2, 1) is not NodeState.ALIVE
    assert all(mesh.state(a, b) is NodeState.ALIVE for a in (1, 2) for b in range(3, 10))
    mesh.cut.clear()
    mesh.run(8.0)
    assert mesh.state(1, 2) is mesh.state(2, 1) is NodeState.ALIVE


def test_beyond_direct_max_word_that_a_peer_lives_is_no_word_of_the_way_there() -> None:
    mesh = Trio(9, direct_max=4, random_probes=2)
    mesh.run(20.0)
    mesh.cut |= {(1, 2), (2, 1)}
    mesh.run(7.0)
    assert mesh.state(1, 2) is NodeState.UNREACHABLE
    refutations = mesh.nodes[1].peers[node(2)].refutations + 1
    tell(mesh, 1, 3, rumor(2, Rumored.ALIVE, refutations=refutations))
    assert mesh.state(1, 2) is NodeState.UNREACHABLE
    assert mesh.nodes[1].peers[node(2)].refutations == refutations


def test_beyond_direct_max_a_hello_answers_no_beat() -> None:
    mesh = Trio(9, direct_max=4, random_probes=2)
    mesh.run(20.0)
    mesh.cut.add((1, 2))
    mesh.run(2.5)
    waiting_since = mesh.nodes[1].peers[node(2)].waiting_since
    assert waiting_since is not None
    who = mesh.nodes[2]._voice.introduction()
    mesh.give(1, Received(sender=node(2), message=Hello(who=who, dialed=at(1))))
    assert mesh.nodes[1].peers[node(2)].waiting_since == waiting_since


def test_hints_are_bounded_and_only_seeds_are_kept_for_ever() -> None:
    joining = Joining(Random(1), JoinConfig(hints_max=2, tries_without_seed_max=3))
    assert joining.add(at(1), HintSource.MDNS, 0.0) and joining.add(at(2), HintSource.MDNS, 0.0)
    assert not joining.add(at(3), HintSource.MDNS, 0.0)
    assert joining.add(at(4), HintSource.SEED, 0.0)
    for step in range(200):
        joining.due(step * 10.0)
    assert joining.due(10_000.0) == [at(4)]


def test_a_peer_that_another_node_vouches_for_is_not_alive_before_it_was_heard() -> None:
    mesh = Trio(1)
    hint = PeerHint(id=node(5), name="x", incarnation=1, refutations=0, addresses=(at(5),))
    mesh.nodes[1].learn(hint, mesh.now, vouched=True)
    assert mesh.state(1, 5) is NodeState.UNREACHABLE
    mesh.run(0.1)
    assert any(isinstance(e.message, Hello) and e.address == at(5) for _, e in mesh.sent)
    welcome = Welcome(who=introduction(addresses=(at(5),)), dialed=at(5))
    mesh.give(1, Received(sender=node(5), message=welcome))
    assert mesh.state(1, 5) is NodeState.ALIVE
