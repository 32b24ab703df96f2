"""Cuts the network between real voters, and counts what must not happen.

    python -m benchmarks.consensus_cuts [--json] [--seconds N] [--rounds N]

Real nodes with the built-in model on hosts of their own (network namespaces: root and iproute2). ``split``:
four voters are cut in two halves, and nothing may be acknowledged or committed on either side until they meet
again. ``partial``: of three voters the leader and one follower lose each other while the third hears both;
the term may not change, writes go on, and the follower catches up afterwards. Must not: know the core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.cluster import Box, Cluster, wait_until
from benchmarks.consensus_kills import WAIT_S, take_in
from benchmarks.lab import Host, Lab, available
from benchmarks.report import Row, show
from fieldmesh.client import Client
from fieldmesh.client.admin import Admin
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.settings import Change
from fieldmesh.v1 import admin_pb2 as pb

NAMES = ("a", "b", "c", "d")


@dataclass(slots=True, kw_only=True)
class Site:
    """Voters, each on a host of its own, and the network between them."""

    cluster: Cluster
    lab: Lab
    hosts: dict[str, Host]

    def box(self, name: str) -> Box:
        return self.cluster.boxes[name]

    def status(self, name: str) -> pb.GetRaftStatusResponse | None:
        """What a node says of the log; None where it does not answer."""
        try:
            with Client([self.box(name).client]) as client:
                return Admin(client, timeout_s=1.0).status()
        except FieldmeshError:
            return None

    def leader(self) -> str | None:
        """The name of the node that says it leads and is believed by another."""
        said = {name: found for name in self.hosts if (found := self.status(name)) is not None}
        for name, found in said.items():
            believed = sum(other.leader_id == found.local_id for other in said.values())
            if found.leader_id == found.local_id and believed >= 2:
                return name
        return None

    def need_leader(self) -> str:
        wait_until(lambda: self.leader() is not None, WAIT_S, "a leader")
        name = self.leader()
        return name if name is not None else self.need_leader()

    def wait_level(self) -> None:
        """Return when every voter has the newest revision."""

        def level() -> bool:
            revisions = [found.revision if (found := self.status(n)) else -1 for n in self.hosts]
            return len(set(revisions)) == 1 and revisions[0] > 0

        wait_until(level, WAIT_S, "all voters to have the same revision")

    def write(self, name: str, value: str, timeout_s: float = 3.0) -> bool:
        """Write through a node; whether it was acknowledged."""
        try:
            with Client([self.box(name).client]) as client:
                Admin(client, timeout_s=timeout_s).write([Change(key=f"app/cuts/{name}", value=f'"{value}"')])
        except FieldmeshError:
            return False
        return True


@contextmanager
def site(voters: int) -> Iterator[Site]:
    """So many voters; the mesh does not change them by itself."""
    with Lab(voters) as lab, Cluster() as cluster:
        hosts = dict(zip(NAMES, lab.hosts, strict=False))
        for name, host in hosts.items():
            founder = ("--found",) if name == NAMES[0] else ()
            cluster.add(
                name,
                "general",
                host=host.address,
                prefix=host.prefix,
                extra=(*founder, "--metrics-listen", "off"),
            )
        for box in cluster.boxes.values():
            cluster.start(box)
        cluster.wait_formed()
        here = Site(cluster=cluster, lab=lab, hosts=hosts)
        take_in(cluster, list(hosts))
        here.wait_level()
        yield here


@contextmanager
def writing(here: Site, names: tuple[str, ...]) -> Iterator[Callable[[], int]]:
    """Writers at these nodes for as long as the context lasts; gives how many writes were acknowledged."""
    stop, done = threading.Event(), [0] * len(names)

    def write(index: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            done[index] += here.write(names[index], str(number))
            stop.wait(0.02)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(len(names))]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sum(done)
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)


def split(rounds: int, seconds: float) -> Iterator[Row]:
    """Two against two."""
    acknowledged = committed = leaders = 0
    healed_s = []
    with site(4) as here:
        for number in range(rounds):
            here.need_leader()
            here.wait_level()
            before = max(found.revision for name in NAMES if (found := here.status(name)) is not None)
            for one in NAMES[:2]:
                for other in NAMES[2:]:
                    here.lab.cut(here.hosts[one], here.hosts[other])
            with writing(here, NAMES) as count:
                time.sleep(seconds)
                after = [found for name in NAMES if (found := here.status(name)) is not None]
                acknowledged += count()
            committed += sum(found.revision > before for found in after)
            leaders += sum(found.leader_id == found.local_id for found in after)
            begun = time.monotonic()
            here.lab.heal()
            wait_until(lambda: here.write("a", "healed"), WAIT_S, "a write after the halves met")
            healed_s.append(time.monotonic() - begun)
            here.wait_level()
            print(f"split {number + 1}/{rounds}: healed after {healed_s[-1]:.2f} s", file=sys.stderr)
    yield Row(measure="split_2_2_acknowledged", unit="writes", ours=acknowledged, aim=0)
    yield Row(measure="split_2_2_nodes_that_committed", unit="nodes", ours=committed, aim=0)
    yield Row(measure="split_2_2_leaders_left", unit="nodes", ours=leaders, aim=0, note="at the end of a cut")
    yield Row(
        measure="split_2_2_healed_s", unit="s", ours=statistics.median(healed_s), note="to the first write"
    )


def partial(rounds: int, seconds: float) -> Iterator[Row]:
    """The leader and one follower lose each other."""
    changes = acknowledged = 0
    with site(3) as here:
        for number in range(rounds):
            leader = here.need_leader()
            here.wait_level()
            deaf, third = [name for name in here.hosts if name != leader]
            before = here.status(leader)
            here.lab.cut(here.hosts[leader], here.hosts[deaf])
            with writing(here, (leader, third)) as count:
                time.sleep(seconds)
                acknowledged += count()
            after = here.status(leader)
            assert before is not None and after is not None, f"{leader} does not answer"
            changes += after.term != before.term
            here.lab.heal()
            here.wait_level()
            print(f"partial {number + 1}/{rounds}: term {before.term} to {after.term}", file=sys.stderr)
    yield Row(measure="partial_partition_term_changes", unit="terms", ours=changes, aim=0)
    yield Row(
        measure="partial_partition_acknowledged",
        unit="writes",
        ours=acknowledged,
        aim=rounds * 10,
        higher_is_better=True,
    )


def main() -> int:
    """Cut, print, and say by the exit status whether every aim was met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.consensus_cuts", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON rows to standard output")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a cut (default: 15)")
    parser.add_argument("--rounds", type=int, default=5, help="cuts of each kind (default: 5)")
    given = parser.parse_args()
    why = available()
    if why:
        print(f"cannot cut networks here: {why}", file=sys.stderr)
        return 2
    rows = [*split(given.rounds, given.seconds), *partial(given.rounds, given.seconds)]
    return show(rows, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
