"""Kills the voters of a real mesh under load, and counts what was lost.

    python -m benchmarks.consensus_kills [--json] [--leader N] [--all N] [--compaction N] [--pause N]

Three real nodes with the built-in model, fsync on, and writers that each own their keys. ``leader``: the
leader is killed (-9); ``all``: all voters at once; ``compaction``: the leader as soon as it begins to write a
snapshot; ``pause``: the leader is stopped, others go on, it is asked for current values and then continued.
A watch that goes on over every kill collects what was changed, and must hold every write that was
acknowledged, once, under its revision; node logs tell who led in which term. Must not: know the core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cluster import Box, Cluster, wait_until
from benchmarks.report import Row, show
from fieldmesh.client import Client
from fieldmesh.client.admin import Admin, Setting
from fieldmesh.core.errors import FieldmeshError, InvalidRequest, SessionExpired
from fieldmesh.core.settings import Change, Record

NAMES = ("a", "b", "c")
WRITERS = 8
PAUSE_S = 0.01
ROUND_ACKNOWLEDGED_MIN = 30
WAIT_S = 60.0
SNAPSHOT_JUMP_BYTES = 1_200_000
"""More than an ordinary Save of the writers' values, less than a snapshot of all of them."""
LARGE_CHARACTERS = 40_000


@dataclass
class Ledger:
    """What writers did and what a watcher saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    acknowledged: dict[tuple[str, str], int] = field(default_factory=dict)
    changed: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    holes: list[tuple[int, int, dict[str, Setting]]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    acknowledged_at: float = 0.0

    def acknowledge(self, key: str, value: str, revision: int) -> None:
        with self.lock:
            self.acknowledged[key, value] = revision
            self.acknowledged_at = time.monotonic()

    def saw(self, record: Record) -> None:
        with self.lock:
            self.changed.setdefault((record.key, record.after or ""), []).append(record.revision)

    def missed(self, after: int, upto: int, settings: Iterable[Setting]) -> None:
        """The watch came too late for the changes in between, and was told what is there now."""
        with self.lock:
            self.holes.append((after, upto, {setting.key: setting for setting in settings}))

    @property
    def count(self) -> int:
        with self.lock:
            return len(self.acknowledged)

    def lost(self) -> list[tuple[str, str, int]]:
        """Acknowledged writes that no change shows under their revision, nor what stood there afterwards."""
        with self.lock:
            return [
                (key, value, revision)
                for (key, value), revision in self.acknowledged.items()
                if revision not in self.changed.get((key, value), ())
                and not self._stood(key, value, revision)
            ]

    def _stood(self, key: str, value: str, revision: int) -> bool:
        """Whether a write that the watch missed was there afterwards, or a later one of its only writer."""
        for after, upto, settings in self.holes:
            if after < revision <= upto and key in settings:
                now = settings[key]
                return now.revision > revision or (now.revision, now.text) == (revision, value)
        return False

    def doubled(self) -> list[tuple[str, str]]:
        """Writes that were done more than once."""
        with self.lock:
            return [written for written, revisions in self.changed.items() if len(revisions) > 1]


class Load:
    """Writers and a watcher over one cluster; leaving the context ends the former, ``settle`` the latter."""

    def __init__(self, cluster: Cluster, *, characters: int = 0) -> None:
        self.ledger = Ledger()
        self._cluster = cluster
        self._characters = characters
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True) for number in range(WRITERS)
        ]
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watched = 0
        self._watching: Client | None = None
        self._over = threading.Event()

    def __enter__(self) -> Load:
        self._watcher.start()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)

    def settle(self) -> None:
        """Return when the watcher has seen the newest revision, and has ended; after the writers have."""
        newest = max(self.ledger.acknowledged.values(), default=0)
        try:
            wait_until(lambda: self._watched >= newest, WAIT_S, "the watch to see the last write")
        finally:
            self._over.set()
            if self._watching is not None:
                self._watching.close()
            self._watcher.join(WAIT_S)

    def _seeds(self) -> list[str]:
        return [box.client for box in self._cluster.boxes.values()]

    def _write(self, number: int) -> None:
        rng, counter = random.Random(number), 0
        while not self._stop.is_set():
            seeds = self._seeds()
            with Client(rng.sample(seeds, len(seeds))) as client:
                admin = Admin(client, author=f"writer-{number}")
                try:
                    while not self._stop.is_set():
                        counter += 1
                        self._once(admin, f"app/w{number}/k{counter % 4}", f"{number}-{counter}")
                        self._stop.wait(PAUSE_S)
                except (FieldmeshError, TimeoutError) as error:
                    self.ledger.errors[type(error).__name__] += 1

    def _once(self, admin: Admin, key: str, value: str) -> None:
        """Write until the outcome is known; under one ticket, so it is done once."""
        text = json.dumps(value.ljust(self._characters, "."))
        ticket = None
        began = time.monotonic()
        while time.monotonic() - began < WAIT_S and not self._stop.is_set():
            try:
                ticket = ticket or admin.ticket()
                revision = admin.write([Change(key=key, value=text)], ticket=ticket)
            except (SessionExpired, InvalidRequest):
                raise
            except FieldmeshError as error:
                self.ledger.errors[error.code] += 1
                self._stop.wait(0.05)
                continue
            self.ledger.acknowledge(key, text, revision)
            return

    def _watch(self) -> None:
        after = 0
        while not self._over.is_set():
            try:
                with Client(self._seeds()) as client:
                    self._watching = client
                    for news in Admin(client).watch(after_revision=after):
                        if news.settings is not None and news.revision > after:
                            self.ledger.missed(after, news.revision, news.settings)
                        for record in news.changes:
                            self.ledger.saw(record)
                        after = self._watched = max(after, news.revision)
            except FieldmeshError:
                time.sleep(0.1)


# --- the cluster -----------------------------------------------------------------------------


def take_in(cluster: Cluster, names: Sequence[str]) -> None:
    """Make voters of these nodes, the first of which founds the log; the mesh leaves them as they are."""
    with Client([cluster.boxes[names[0]].client]) as client:
        admin = Admin(client)
        wait_until(lambda: bool(_leader_of(admin)), WAIT_S, "a log")
        admin.write([Change(key="voters/policy", value='{"automatic": false}')])
        for name in names[1:]:
            admin.add(name)


def _leader_of(admin: Admin) -> str:
    try:
        return admin.status().leader_id
    except FieldmeshError:
        return ""


class Voters:
    """Three nodes that vote, and what can be done to them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        for name in NAMES:
            founder = ("--found",) if name == NAMES[0] else ()
            cluster.add(name, "general", extra=(*founder, "--metrics-listen", "off"))
        for box in cluster.boxes.values():
            cluster.start(box)
        cluster.wait_formed()
        take_in(cluster, NAMES)
        wait_until(lambda: self.whole, WAIT_S, "three voters")

    def status(self, box: Box) -> tuple[str, str, int, int]:
        """(own id, leader's id, members that are near the leader's end, voters); empty where it is silent."""
        try:
            with Client([box.client]) as client:
                found = Admin(client, timeout_s=1.0).status()
        except FieldmeshError:
            return "", "", 0, 0
        near = sum(member.match + 200 >= found.commit for member in found.members if member.match)
        return found.local_id, found.leader_id, near, sum(member.voter for member in found.members)

    @property
    def leader(self) -> Box | None:
        """Who says that it leads, and is believed by another."""
        said = {name: self.status(box) for name, box in self.cluster.boxes.items()}
        for name, (own, leads, _, _) in said.items():
            if own and own == leads and sum(s[1] == own for s in said.values()) >= 2:
                return self.cluster.boxes[name]
        return None

    @property
    def whole(self) -> bool:
        """Whether there are three voters and all of them keep up with the leader."""
        leader = self.leader
        return leader is not None and self.status(leader)[2:] == (2, 3)

    def need_leader(self) -> Box:
        wait_until(lambda: self.whole, WAIT_S, "a leader that all keep up with")
        leader = self.leader
        return leader if leader is not None else self.need_leader()

    def kill(self, *boxes: Box) -> None:
        for box in boxes:
            os.kill(box.pid, signal.SIGKILL)
        for box in boxes:
            assert box.process is not None
            box.process.wait()

    def terms(self) -> dict[int, set[str]]:
        """Who said in its log that it leads, by term."""
        found: dict[int, set[str]] = {}
        for box in self.cluster.boxes.values():
            for line in box.log.read_text(errors="replace").splitlines():
                if '"consensus_role"' in line and '"leader"' in line:
                    said = json.loads(line)
                    if said.get("role") == "leader":
                        found.setdefault(int(said["term"]), set()).add(box.name)
        return found


def acknowledge_more(load: Load, count: int = ROUND_ACKNOWLEDGED_MIN) -> None:
    """Return when so many more writes were acknowledged."""
    before = load.ledger.count
    wait_until(lambda: load.ledger.count >= before + count, WAIT_S, "writes to be acknowledged")


def until_acknowledged(load: Load, since: float) -> float:
    """Seconds from ``since`` to the next acknowledged write."""
    wait_until(lambda: load.ledger.acknowledged_at > since + 0.05, WAIT_S, "a write after the fault")
    return load.ledger.acknowledged_at - since


# --- the rounds ------------------------------------------------------------------------------


def kill_leaders(voters: Voters, load: Load, rounds: int) -> list[float]:
    """Seconds without an acknowledged write, for each kill of the leader."""
    gaps = []
    for number in range(rounds):
        acknowledge_more(load)
        leader = voters.need_leader()
        began = time.monotonic()
        voters.kill(leader)
        gaps.append(until_acknowledged(load, began))
        voters.cluster.start(leader)
        acknowledged = load.ledger.count
        tell(f"leader {number + 1}/{rounds}: {leader.name}, {gaps[-1]:.2f} s, {acknowledged} acknowledged")
    return gaps


def kill_all(voters: Voters, load: Load, rounds: int) -> list[float]:
    """Seconds from the restart to the next acknowledged write, for each kill of all voters at once."""
    gaps = []
    for number in range(rounds):
        acknowledge_more(load)
        voters.need_leader()
        boxes = list(voters.cluster.boxes.values())
        voters.kill(*boxes)
        began = time.monotonic()
        for box in boxes:
            voters.cluster.start(box)
        gaps.append(until_acknowledged(load, began))
        tell(f"all {number + 1}/{rounds}: {gaps[-1]:.2f} s, {load.ledger.count} acknowledged")
    return gaps


def kill_in_compaction(voters: Voters, load: Load, rounds: int) -> list[float]:
    """Like ``kill_leaders``, each time when the leader begins to write a snapshot."""
    gaps = []
    for number in range(rounds):
        acknowledge_more(load, 5)
        leader = voters.need_leader()
        wait_for_snapshot(leader)
        began = time.monotonic()
        voters.kill(leader)
        gaps.append(until_acknowledged(load, began))
        voters.cluster.start(leader)
        tell(f"compaction {number + 1}/{rounds}: {leader.name}, {gaps[-1]:.2f} s")
    return gaps


def wait_for_snapshot(box: Box) -> None:
    """Return as soon as the process has written much more to files at once than values alone would make."""
    counters = Path(f"/proc/{box.pid}/io")

    def written() -> int:
        return int(counters.read_text().split("wchar:")[1].split()[0])

    deadline, window = time.monotonic() + WAIT_S, [(time.monotonic(), written())]
    while time.monotonic() < deadline:
        now, total = time.monotonic(), written()
        window = [(at, size) for at, size in window if now - at < 0.02] or [(now, total)]
        if total - window[0][1] > SNAPSHOT_JUMP_BYTES:
            return
        window.append((now, total))
        time.sleep(0.0005)
    raise TimeoutError(f"{box.name} wrote no snapshot in {WAIT_S:g} s")


def pause_leaders(voters: Voters, load: Load, rounds: int) -> tuple[int, int]:
    """(stale, all) reads that a stopped leader answered as current after it was continued."""
    stale = answered = 0
    for number in range(rounds):
        leader = voters.need_leader()
        key, others = f"app/pause{number}", [b for b in voters.cluster.boxes.values() if b is not leader]
        with Client([box.client for box in others]) as client, ThreadPoolExecutor(8) as pool:
            through_others = Admin(client)
            through_others.write([Change(key=key, value="1")])
            os.kill(leader.pid, signal.SIGSTOP)
            began = time.monotonic()
            until_acknowledged(load, began)
            write_until_done(through_others, key, "2")
            reads = [pool.submit(_read_current, leader, key) for _ in range(8)]
            time.sleep(0.1)
            os.kill(leader.pid, signal.SIGCONT)
            found = [read.result() for read in reads]
        answered += sum(value is not None for value in found)
        stale += sum(value not in (None, "2") for value in found)
        tell(f"pause {number + 1}/{rounds}: {leader.name} said {Counter(map(str, found))}")
    return stale, answered


def write_until_done(admin: Admin, key: str, value: str) -> None:
    ticket = None
    while True:
        try:
            ticket = ticket or admin.ticket()
            admin.write([Change(key=key, value=value)], ticket=ticket)
        except FieldmeshError:
            continue
        return


def _read_current(box: Box, key: str) -> str | None:
    """The value that the node calls current; None where it says that it cannot."""
    try:
        with Client([box.client]) as client:
            found = Admin(client, timeout_s=6.0).get(key, level="current")
        return found.settings[0].text
    except FieldmeshError:
        return None


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the report ------------------------------------------------------------------------------


def rows(*, leader: int, everybody: int, compaction: int, pause: int) -> Iterator[Row]:
    """Run the rounds, each kind on a mesh of its own, and say what came of them."""
    lost = doubled = acknowledged = holes = 0
    split: dict[int, set[str]] = {}
    kinds = (("leader", kill_leaders, leader, 0), ("all voters", kill_all, everybody, 0),
             ("leader in compaction", kill_in_compaction, compaction, LARGE_CHARACTERS))  # fmt: skip
    for name, kill, rounds, characters in kinds:
        if not rounds:
            continue
        with Cluster() as cluster:
            voters = Voters(cluster)
            with Load(cluster, characters=characters) as load:
                gaps = kill(voters, load, rounds)
                acknowledge_more(load)
            load.settle()
            gone, twice, terms = load.ledger.lost(), load.ledger.doubled(), voters.terms()
        tell(f"{name}: lost {gone[:5]}, doubled {twice[:5]}, {dict(load.ledger.errors)}")
        lost, doubled, holes = lost + len(gone), doubled + len(twice), holes + len(load.ledger.holes)
        acknowledged += load.ledger.count
        split |= {term: who for term, who in terms.items() if len(who) > 1}
        yield Row(
            measure=f"gap_s_p50 {name} killed",
            unit="s",
            ours=statistics.median(gaps),
            note=f"{rounds} kills, worst {max(gaps):.2f}, {len(terms)} terms",
        )
    if pause:
        with Cluster() as cluster:
            voters = Voters(cluster)
            with Load(cluster) as load:
                stale, answered = pause_leaders(voters, load, pause)
            load.settle()
            split |= {term: who for term, who in voters.terms().items() if len(who) > 1}
        note = f"{answered} answered as current after {pause} pauses"
        yield Row(measure="stale_reads", unit="", ours=stale, aim=0, note=note)
    if leader or everybody or compaction:
        note = f"of {acknowledged} acknowledged, {holes} holes in the watch"
        yield Row(measure="writes_lost", unit="", ours=lost, aim=0, note=note)
        yield Row(measure="writes_doubled", unit="", ours=doubled, aim=0)
    yield Row(measure="terms_with_two_leaders", unit="", ours=len(split), aim=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--leader", type=int, default=100)
    parser.add_argument("--all", type=int, default=20, dest="everybody")
    parser.add_argument("--compaction", type=int, default=20)
    parser.add_argument("--pause", type=int, default=10)
    given = parser.parse_args()
    found = list(
        rows(
            leader=given.leader,
            everybody=given.everybody,
            compaction=given.compaction,
            pause=given.pause,
        )
    )
    return show(found, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
