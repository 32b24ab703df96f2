"""Consensus on an ordered log. Owns: terms, votes and roles; what a follower accepts; the order of effects.

A sans-I/O machine in the manner of etcd's raft and of Ongaro's dissertation (sections § are cited where a
rule comes from; see ``core.raft_model``). Must not: know what a command means, read a clock, or draw
randomness of its own. The roles:

                 timeout                majority would vote            majority voted
    FOLLOWER  ------------> PRE_CANDIDATE ------------> CANDIDATE ------------> LEADER
        ^                       |   ^                       |                      |
        |   leader or higher    |   +------ timeout --------+                      |
        +------- term ----------+---------------------------+----------------------+
                                              higher term, no majority in touch, or no longer a voter

- The term is raised only after a majority has said that it would vote (pre-vote, §9.6), and nobody would
  who has heard of a leader within an election timeout (§4.2.3): a node that comes back, or that a one-way
  cut keeps from hearing the leader, disturbs nobody. Where the host doubts that the leader is there
  (``Doubt``), a heartbeat takes the place of that timeout.
- A leader that has not heard from a majority for an election timeout steps down (check-quorum, §6.2).
- Neither rests on clocks for safety: reads are proved by a round of messages (ReadIndex, §6.4).
- A leader's Appends go out before its own Save, so both disks work at once (§10.2.1); its own entry counts
  only when the host reports it ``Saved``. All that a follower says comes after its Save.
- A node without a log (nobody founded one on it, and no leader has sent it one) never votes nor campaigns,
  and a leader does not fill the empty log of a *voter*: that one has lost what it had promised, and must be
  removed and taken in again as a learner.

Remote nonsense is dropped and counted (``dropped``); local misuse raises ValueError.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from random import Random
from typing import assert_never

from fieldmesh.core.events import Note, Received, Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_checks import plausible
from fieldmesh.core.raft_follower import Follower
from fieldmesh.core.raft_leader import Leadership, Posts, changed
from fieldmesh.core.raft_log import Log
from fieldmesh.core.raft_model import (
    AddLearner,
    Append,
    AppendReply,
    Apply,
    Body,
    Change,
    Chunk,
    ChunkReply,
    Compact,
    Company,
    Doubt,
    Entry,
    EntryKind,
    Members,
    MembersChanged,
    Message,
    Post,
    PreVote,
    PreVoteReply,
    Promote,
    Propose,
    Proposed,
    RaftConfig,
    RaftEffect,
    RaftEvent,
    Read,
    ReadFailed,
    ReadReady,
    Refusal,
    Refused,
    Remove,
    Restore,
    Role,
    RoleChanged,
    Saved,
    Stored,
    TimeoutNow,
    Transfer,
    Vote,
    VoteReply,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftStatus:
    """One node's view of the log, for people and for the sweep."""

    role: Role
    term: int
    leader: NodeId | None
    members: Members
    members_index: int
    commit: int
    applied: int
    first_index: int
    last_index: int
    snapshot_index: int
    log_bytes: int
    group: str
    epoch: int
    matches: tuple[tuple[NodeId, int], ...]
    lost_voters: tuple[NodeId, ...]
    dropped: tuple[tuple[str, int], ...]


class Raft:
    """One member of one log. ``stored`` is what survived; ``rng`` draws election timeouts."""

    def __init__(self, me: NodeId, config: RaftConfig, stored: Stored, rng: Random, now: float) -> None:
        config.validate()
        self.me = me
        self.config = config
        self.log = Log(stored)
        self.follower = Follower(self.log, version=config.command_version)
        self.hard = stored.hard
        self.role = Role.FOLLOWER
        self.leader: NodeId | None = None
        self.leadership: Leadership | None = None
        self.applied = stored.snapshot.index
        self.dropped: Counter[str] = Counter()
        self._rng = rng
        self._now = now
        self._votes: set[NodeId] = set()
        self._foreign: tuple[NodeId, str, int] | None = None
        self._heard = float("-inf")
        self._doubted = False
        self._election_due = now + self._election_timeout()
        self._hard_changed = False
        self._posts: list[Post] = []
        self._effects: list[RaftEffect] = []
        self._reported: tuple[Role, int, NodeId | None] = (self.role, self.term, self.leader)
        self._reported_members = (self.log.members_index, self.log.members)

    # --- views ---

    @property
    def term(self) -> int:
        return self.hard.term

    @property
    def electable(self) -> bool:
        """Whether this node may campaign: its log says that it votes, or did so before a change that is not
        known to be committed. Its vote, or its leadership, may be what commits that change (§4.2.2)."""
        log = self.log
        return self.me in log.members.voters or (
            log.members_index > log.commit and self.me in log.members_at(log.commit).voters
        )

    @property
    def deadline(self) -> float | None:
        """When the next Tick is due."""
        if self.leadership is not None:
            return min(
                self.leadership.heartbeat_due,
                self._office_ends(self.leadership),
                self.leadership.handover.until if self.leadership.handover else float("inf"),
            )
        return self._election_due if self.electable else None

    @property
    def compaction_due(self) -> bool:
        """Whether the applied part of the log has outgrown its limits: hand in a Compact."""
        grown, limit = self.applied - self.log.snapshot.index, self.config.compact_bytes
        if grown >= self.config.compact_entries:
            return True
        return grown > 0 and self.log.bytes >= limit and self.log.bytes - self.log.uncommitted_bytes >= limit

    @property
    def common_version(self) -> int:
        """The newest command version that all members are known to apply (at least 1); 0 if not leading."""
        if self.leadership is None:
            return 0
        return max(1, min((self.config.command_version, *self.leadership.versions().values())))

    def current_at(self, now: float) -> float:
        """Up to when this node knows what was committed: when it last heard from a majority as a leader, or
        from its leader as a follower."""
        return self.leadership.quorum_contact(now) if self.leadership is not None else self._heard

    @property
    def status(self) -> RaftStatus:
        leadership = self.leadership
        matches = {node: p.match for node, p in leadership.progress.items()} if leadership else {}
        return RaftStatus(
            role=self.role,
            term=self.term,
            leader=self.leader,
            members=self.log.members,
            members_index=self.log.members_index,
            commit=self.log.commit,
            applied=self.applied,
            first_index=self.log.first_index,
            last_index=self.log.last_index,
            snapshot_index=self.log.snapshot.index,
            log_bytes=self.log.bytes,
            group=self.hard.group,
            epoch=self.hard.epoch,
            matches=tuple(sorted(matches.items())),
            lost_voters=leadership.lost_voters if leadership else (),
            dropped=tuple(sorted(self.dropped.items())),
        )

    # --- the door ---

    def handle(self, event: RaftEvent, now: float) -> list[RaftEffect]:
        """Take one event; the effects are to be performed in order, each Save durable before what follows.

        Raises ValueError for local misuse (time running backwards, a command over its limit, a Saved or
        Compact that answers nothing).
        """
        if now < self._now:
            raise ValueError(f"time runs backwards: {now} after {self._now}")
        self._now = now
        match event:
            case Tick():
                self._tick()
            case Received(sender=sender, message=message):
                self._receive(sender, message)
            case Propose(commands=commands):
                self._propose(commands)
            case Read(id=read):
                self._read(read)
            case AddLearner() | Promote() | Remove():
                self._change(event)
            case Transfer(to=to):
                self._transfer(to)
            case Company():
                if self.leadership is not None:
                    self._post_all(self.leadership.join_in(self._now))
            case Doubt(node=node):
                self._doubt(node)
            case Saved(sequence=sequence):
                self.log.saved(sequence)
                self._advance()
            case Compact(index=index, data=data):
                self._compact(index, data)
            case _:
                assert_never(event)
        return self._flush()

    def _flush(self) -> list[RaftEffect]:
        """Put what the event caused into the order that keeps its promises."""
        save = self.log.take_save(self.hard if self._hard_changed else None)
        early = self.role is Role.LEADER and not self._hard_changed
        effects: list[RaftEffect] = [*self._posts] if early else []
        if save is not None:
            effects.append(save)
        if not early:
            effects += self._posts
        effects += self._effects
        if self._reported != (self.role, self.term, self.leader):
            self._reported = (self.role, self.term, self.leader)
            effects.append(RoleChanged(role=self.role, term=self.term, leader=self.leader))
        if self._reported_members != (self.log.members_index, self.log.members):
            if self._reported_members[1] != self.log.members:
                effects.append(MembersChanged(members=self.log.members, index=self.log.members_index))
            self._reported_members = (self.log.members_index, self.log.members)
        self._posts, self._effects, self._hard_changed = [], [], False
        return effects

    def _post(self, to: NodeId, body: Body, term: int | None = None) -> None:
        message = Message(
            group=self.hard.group, epoch=self.hard.epoch, term=self.term if term is None else term, body=body
        )
        self._posts.append(Post(to=to, message=message))

    def _post_all(self, posts: Posts) -> None:
        for to, body in posts:
            self._post(to, body)

    def _set_hard(self, **values: object) -> None:
        self.hard = replace(self.hard, **values)  # type: ignore[arg-type]
        self._hard_changed = True

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    # --- roles and elections ---

    def _election_timeout(self) -> float:
        return self.config.election_timeout_s * (1.0 + self._rng.random())

    def _office_ends(self, leadership: Leadership) -> float:
        """When a leader steps down unless a majority is heard from before (§6.2)."""
        return leadership.quorum_contact(self._now) + self.config.election_timeout_s

    def _tick(self) -> None:
        leadership = self.leadership
        if leadership is None:
            if self.electable and self._now >= self._election_due:
                self._ask_around()
            return
        if self._now >= self._office_ends(leadership):
            self._effects.append(Note(event="leader_without_quorum", fields=(("term", self.term),)))
            self._follow(self.term, None)
            return
        if leadership.handover is not None and self._now >= leadership.handover.until:
            leadership.handover = None
        if self._now >= leadership.heartbeat_due:
            self._post_all(leadership.heartbeat(self._now))

    def _follow(self, term: int, leader: NodeId | None) -> None:
        """Be a follower in ``term``. The vote is forgotten only with its term (paper §5.2)."""
        if term > self.term:
            self._set_hard(term=term, vote=None)
            self.follower.forget_chunks()
        if self.leadership is not None:
            self._effects.extend(ReadFailed(id=read) for read in self.leadership.take_reads())
            self.leadership = None
            self._election_due = self._now + self._election_timeout()
        self.role = Role.FOLLOWER
        self.leader = leader
        self._doubted = False
        self._votes = set()

    def _doubt(self, node: NodeId) -> None:
        """Wait for the leader for one more heartbeat only. Both waits are there to spare a working leader
        (§4.2.3); what makes an election safe does not rest on them."""
        if self.role is not Role.FOLLOWER or self.leader != node or self._doubted:
            return
        self._doubted = True
        missed_at = max(self._now, self._heard + self.config.heartbeat_s)
        patience_s = self._rng.random() * self.config.heartbeat_s  # drawn, as election timeouts are (§3.4)
        self._election_due = min(self._election_due, missed_at + patience_s)

    def _ask_around(self) -> None:
        """Begin a pre-vote: the term stays as it is until a majority agrees (§9.6)."""
        self._follow(self.term, None)
        self.role = Role.PRE_CANDIDATE
        self._votes = {self.me}
        self._election_due = self._now + self._election_timeout()
        if self._has_majority(self._votes):
            self._campaign(transfer=False)
            return
        body = PreVote(last_index=self.log.last_index, last_term=self.log.last_term)
        for voter in self._other_voters():
            self._post(voter, body, term=self.term + 1)

    def _campaign(self, *, transfer: bool) -> None:
        """Begin an election in the next term (paper §5.2); the own vote is saved before anyone is asked."""
        self._follow(self.term + 1, None)
        self.role = Role.CANDIDATE
        self._set_hard(vote=self.me)
        self._votes = {self.me}
        self._election_due = self._now + self._election_timeout()
        if self._has_majority(self._votes):
            self._lead()
            return
        body = Vote(last_index=self.log.last_index, last_term=self.log.last_term, transfer=transfer)
        for voter in self._other_voters():
            self._post(voter, body)

    def _lead(self) -> None:
        """Take office, and propose an empty entry: only entries of the own term commit (paper §5.4.2, §8)."""
        self.role, self.leader = Role.LEADER, self.me
        self.leadership = Leadership(
            me=self.me, term=self.term, config=self.config, log=self.log, now=self._now
        )
        self._append_own([(EntryKind.NOOP, b"")])

    def _other_voters(self) -> list[NodeId]:
        return [voter for voter in self.log.members.voters if voter != self.me]

    def _has_majority(self, nodes: set[NodeId]) -> bool:
        voters = self.log.members.voters
        return len(nodes.intersection(voters)) >= self.log.members.quorum

    def _hears_leader(self) -> bool:
        """The lease: a leader was heard within the shortest election timeout, so no other is needed (§4.2.3);
        within a heartbeat, where the host doubts that it is there.

        It only refuses votes. No read rests on it.
        """
        patience_s = self.config.heartbeat_s if self._doubted else self.config.election_timeout_s
        return self.role is Role.LEADER or (self.leader is not None and self._now - self._heard < patience_s)

    # --- messages ---

    def _receive(self, sender: NodeId, message: Message) -> None:
        body, term = message.body, message.term
        if not plausible(message, self.config):
            self._drop("malformed")
            return
        if sender == self.me or not self._same_log(sender, message):
            self._drop("foreign")
            return
        if isinstance(body, PreVote):
            self._on_pre_vote(sender, body, term)
            return
        if isinstance(body, PreVoteReply) and body.granted:
            self._on_pre_vote_granted(sender, term)
            return
        if isinstance(body, Vote) and not body.transfer and self._hears_leader():
            self._drop(
                "vote_under_lease"
            )  # neither granted nor refused, and its term is not taken over (§4.2.3)
            return
        if term < self.term:
            self._answer_stale(sender, body)
            return
        if term > self.term:
            self._follow(term, None)
        self._dispatch(sender, body)

    def _same_log(self, sender: NodeId, message: Message) -> bool:
        """Whether the message is about this node's log. Without one it takes the first that it is sent."""
        hard = self.hard
        if (message.group, message.epoch) == (hard.group, hard.epoch):
            return hard.group != ""
        if hard.group or not message.group or not isinstance(message.body, Append | Chunk):
            self._note_foreign(sender, message)
            return False
        self._set_hard(group=message.group, epoch=message.epoch)
        return True

    def _note_foreign(self, sender: NodeId, message: Message) -> None:
        """Say once, not once a message, that somebody speaks about another log."""
        foreign = (sender, message.group, message.epoch)
        if self.hard.group and foreign != self._foreign:
            self._foreign = foreign
            fields = (("sender", sender), ("group", message.group), ("epoch", message.epoch))
            self._effects.append(Note(event="foreign_log", fields=fields))

    def _answer_stale(self, sender: NodeId, body: Body) -> None:
        """A message of an older term: its sender must learn the newer one, or it asks for ever."""
        self._drop("stale_term")
        if isinstance(body, Append | Chunk):
            self._post(sender, self.follower.refusal())
        elif isinstance(body, Vote):
            self._post(sender, VoteReply(granted=False))

    def _dispatch(self, sender: NodeId, body: Body) -> None:
        """A message of the present term."""
        match body:
            case Vote():
                self._on_vote(sender, body)
            case VoteReply():
                self._on_vote_reply(sender, body)
            case Append() | Chunk():
                self._on_leader(sender, body)
            case AppendReply() | ChunkReply():
                self._on_follower(sender, body)
            case TimeoutNow():
                self._on_timeout_now(sender)
            case PreVote() | PreVoteReply():
                return  # a refusal; it has told us its term, which is all it is for
            case _:
                assert_never(body)

    # --- votes ---

    def _on_pre_vote(self, sender: NodeId, body: PreVote, term: int) -> None:
        """Say whether this node would vote for ``sender`` in ``term``; nothing changes here (§9.6)."""
        granted = (
            term > self.term
            and self.log.last_index > 0
            and not self._hears_leader()
            and self.log.up_to_date(body.last_index, body.last_term)
        )
        self._post(sender, PreVoteReply(granted=granted), term=term if granted else self.term)

    def _on_pre_vote_granted(self, sender: NodeId, term: int) -> None:
        if self.role is not Role.PRE_CANDIDATE or term != self.term + 1:
            self._drop("stale_term")
            return
        self._votes.add(sender)
        if self._has_majority(self._votes):
            self._campaign(transfer=False)

    def _on_vote(self, sender: NodeId, body: Vote) -> None:
        """One vote a term, to a log that holds at least what this one holds (paper §5.2, §5.4.1)."""
        granted = (
            self.hard.vote in (None, sender)
            and self.log.last_index > 0
            and self.log.up_to_date(body.last_index, body.last_term)
        )
        if granted:
            if self.hard.vote is None:
                self._set_hard(vote=sender)
            self._election_due = self._now + self._election_timeout()
        self._post(sender, VoteReply(granted=granted))

    def _on_vote_reply(self, sender: NodeId, body: VoteReply) -> None:
        if self.role is not Role.CANDIDATE or not body.granted:
            return
        self._votes.add(sender)
        if self._has_majority(self._votes):
            self._lead()

    def _on_timeout_now(self, sender: NodeId) -> None:
        if sender == self.leader and self.electable and self.role is Role.FOLLOWER:
            self._campaign(transfer=True)

    # --- as a follower ---

    def _on_leader(self, sender: NodeId, body: Append | Chunk) -> None:
        if self.role is Role.LEADER or self.leader not in (None, sender):
            self._drop("second_leader")
            return
        self._follow(self.term, sender)
        self._heard = self._now
        self._election_due = self._now + self._election_timeout()
        self._accept(sender, body)

    def _accept(self, sender: NodeId, body: Append | Chunk) -> None:
        """Let the log take what the leader sent; the answer leaves after the Save."""
        follower = self.follower
        accepted = follower.on_append(body) if isinstance(body, Append) else follower.on_chunk(body)
        self._post(sender, accepted.reply)
        if accepted.truncated_after is not None:
            fields = (("after", accepted.truncated_after),)
            self._effects.append(Note(event="log_truncated", fields=fields))
        if accepted.restored is not None:
            self.applied = accepted.restored.index
            self._effects.append(Restore(snapshot=accepted.restored))
        self._apply_committed()

    # --- as a leader ---

    def _on_follower(self, sender: NodeId, body: AppendReply | ChunkReply) -> None:
        leadership = self.leadership
        if leadership is None or sender not in leadership.progress:
            self._drop("stranger")
            return
        try:
            if isinstance(body, AppendReply):
                posts = leadership.on_append_reply(sender, body, self._now)
            else:
                posts = leadership.on_chunk_reply(sender, body, self._now)
        except ValueError:
            self._drop("malformed")
            return
        self._post_all(posts)
        self._advance()

    def _advance(self) -> None:
        """See what a majority has made durable, and which reads it has proved."""
        leadership = self.leadership
        if leadership is None:
            return
        self.log.commit_to(leadership.commit_index())
        self._apply_committed()
        self._answer_reads(leadership)
        self._post_all(leadership.announce_commit())
        if self.log.members_index <= self.log.commit and not self.electable:
            self._effects.append(Note(event="leader_removed", fields=(("term", self.term),)))
            self._follow(self.term, None)  # it led until its own removal was committed (§4.2.2)

    def _answer_reads(self, leadership: Leadership) -> None:
        proven = True
        while proven:
            done, posts = leadership.proven_reads()
            self._post_all(posts)
            self._effects.extend(ReadReady(id=read, index=index) for read, index in done)
            proven = bool(done)

    def _apply_committed(self) -> None:
        if self.log.commit > self.applied:
            entries = self.log.entries_between(self.applied, self.log.commit)
            self.applied = self.log.commit
            self._effects.append(Apply(entries=entries))

    def _append_own(self, items: list[tuple[EntryKind, bytes]]) -> None:
        """Append as the leader and send to everyone; a sole voter commits when its Save is durable."""
        leadership = self.leadership
        assert leadership is not None
        first = self.log.last_index + 1
        self.log.append(
            [
                Entry(index=first + position, term=self.term, kind=kind, data=data)
                for position, (kind, data) in enumerate(items)
            ]
        )
        if any(kind is EntryKind.MEMBERS for kind, _ in items):
            leadership.members_changed(self._now)
        self._post_all(leadership.replicate_all())

    # --- what the host asks for ---

    def _refuse(self, reason: Refusal) -> None:
        self._effects.append(Refused(reason=reason, leader=self.leader))

    def _propose(self, commands: tuple[bytes, ...]) -> None:
        if not commands or any(len(command) > self.config.entry_bytes_max for command in commands):
            raise ValueError(
                f"a Propose holds 1 or more commands of at most {self.config.entry_bytes_max} bytes"
            )
        if self.leadership is None:
            self._refuse(Refusal.NOT_LEADER)
        elif self.leadership.handover is not None:
            self._refuse(Refusal.TRANSFERRING)
        elif self.log.uncommitted_bytes >= self.config.uncommitted_bytes_max:
            self._refuse(Refusal.BUSY)
        else:
            self._effects.append(Proposed(first_index=self.log.last_index + 1, term=self.term))
            self._append_own([(EntryKind.COMMAND, command) for command in commands])

    def _read(self, read: int) -> None:
        if self.leadership is None or self.leadership.reads_count >= self.config.reads_max:
            self._effects.append(ReadFailed(id=read))
        else:
            self._post_all(self.leadership.read((read,)))
            self._answer_reads(self.leadership)

    def _change(self, change: Change) -> None:
        if self.leadership is None:
            self._refuse(Refusal.NOT_LEADER)
            return
        if self.leadership.handover is not None:
            self._refuse(Refusal.TRANSFERRING)
            return
        refusal = self.leadership.refusal_of(change, self._now)
        if refusal is not None:
            self._refuse(refusal)
            return
        members = changed(self.log.members, change)
        self._effects.append(Proposed(first_index=self.log.last_index + 1, term=self.term))
        self._append_own([(EntryKind.MEMBERS, members.encode())])

    def _transfer(self, to: NodeId) -> None:
        leadership = self.leadership
        if leadership is None:
            self._refuse(Refusal.NOT_LEADER)
        elif leadership.handover is not None:
            self._refuse(Refusal.TRANSFERRING)
        elif to == self.me or to not in self.log.members.voters:
            self._refuse(Refusal.NOT_MEMBER)
        else:
            self._post_all(leadership.transfer(to, self._now))

    def _compact(self, index: int, data: bytes) -> None:
        if index > self.applied or len(data) > self.config.snapshot_bytes_max:
            raise ValueError(
                f"cannot compact to {index} with {len(data)} bytes: applied up to {self.applied}, "
                f"at most {self.config.snapshot_bytes_max} bytes"
            )
        self.log.compact(
            index,
            data,
            keep_entries_max=self.config.trailing_entries_max,
            keep_bytes_max=self.config.compact_bytes // 4,
        )

    # --- invariants ---

    def check(self) -> None:
        """Raise AssertionError where the state contradicts itself."""
        self.log.check()
        assert self.applied == self.log.commit
        assert (self.leadership is not None) == (self.role is Role.LEADER)
        assert (self.leader == self.me) == (self.role is Role.LEADER)
        assert self.log.last_term <= self.term
        if self.log.last_index:
            assert self.hard.group
        if self.role is Role.CANDIDATE or self.role is Role.LEADER:
            assert self.hard.vote == self.me
        if self.leadership is not None:
            assert self.leadership.term == self.term
            self.leadership.check()
