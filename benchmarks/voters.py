"""One voter in a process of its own, told by lines of JSON what to do: ours, and PySyncObj's.

    python -m benchmarks.voters fieldmesh|pysyncobj --folder DIR --address HOST:PORT …

Owns: running either of them, and doing the same work through either's own interface, inside the leader's
process: so neither pays for a client's connection. Must not: decide what is measured. Ours is the node that
``fieldmesh serve`` runs, with the engine's stand-in: what is measured here is the log, not a model.

A line in is ``{"do": NAME, …}``, a line out its answer: ``status``, ``latency`` (one write after another),
``throughput`` (many writers for a while), ``fill`` (so many writes), ``write`` (one), ``spaced`` (a few),
``grow`` (to so many voters).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fieldmesh.runtime.node import Node

KEYS = 1000
"""Writes go round these many keys, so that a state stays small while its log grows."""


class Voter(Protocol):
    """What either of them does."""

    def status(self) -> dict[str, Any]: ...

    async def write(self, number: int) -> bool:
        """One write, acknowledged or not."""
        ...


class Ours:
    """A node's council."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._council = node.council

    def status(self) -> dict[str, Any]:
        status = self._council.status()
        return {
            "leads": self._council.leading,
            "term": status.term,
            "voters": len(status.voters),
            "client": str(self._node.client_address),
        }

    async def write(self, number: int) -> bool:
        from fieldmesh.core.errors import FieldmeshError
        from fieldmesh.core.settings import Change, Code

        change = Change(key=f"app/bench/{number % KEYS}", value=str(number))
        try:
            outcome, _ = await self._council.write((change,), author="bench", origin="bench", timeout_s=10)
        except FieldmeshError:
            return False
        return outcome.code is Code.DONE

    async def grow(self, voters: int) -> int:
        """Take in and promote nodes of the mesh until there are so many voters; how many there are."""
        from fieldmesh.core.errors import FieldmeshError

        for node in [member.id for member in self._node.view.members]:
            status = self._council.status()
            if len(status.voters) >= voters or node in status.voters:
                continue
            with contextlib.suppress(
                FieldmeshError
            ):  # not caught up, or another change: the next call goes on
                if node not in status.learners:
                    await self._council.add(node)
                await self._council.promote(node)
        return len(self._council.status().voters)

    async def spaced(self, writes: int) -> list[tuple[int, float]]:
        """Some writes a moment apart: revision and (monotonic) time of each acknowledgement."""
        times = []
        for number in range(writes):
            if await self.write(number):
                times.append((self._council.state.revision, time.monotonic()))
            await asyncio.sleep(0.05)
        return times


class PySync:
    """A replicated dictionary of PySyncObj."""

    def __init__(self, address: str, others: list[str], folder: Path) -> None:
        from pysyncobj import SyncObj, SyncObjConf
        from pysyncobj.batteries import ReplDict

        self._values = ReplDict()
        conf = SyncObjConf(
            journalFile=str(folder / "journal"),
            fullDumpFile=str(folder / "dump"),
            appendEntriesUseBatch=True,
            commandsWaitLeader=False,
        )
        self._sync = SyncObj(address, others, conf=conf, consumers=[self._values])
        self._address = address

    def status(self) -> dict[str, Any]:
        status = self._sync.getStatus()
        leader = status["leader"]
        return {
            "leads": leader is not None and str(leader) == self._address,
            "term": status["raft_term"],
            "voters": status["partner_nodes_count"] + 1,
        }

    async def write(self, number: int) -> bool:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()

        def settle(acknowledged: bool) -> None:
            if not done.done():
                done.set_result(acknowledged)

        def told(_: object, error: int) -> None:
            loop.call_soon_threadsafe(settle, error == 0)

        self._values.set(f"app/bench/{number % KEYS}", number, callback=told)
        try:
            return await asyncio.wait_for(done, 10)
        except TimeoutError:
            return False


async def latency(voter: Voter, writes: int) -> dict[str, Any]:
    times = []
    for number in range(writes):
        begun = time.perf_counter()
        if await voter.write(number):
            times.append((time.perf_counter() - begun) * 1000)
    return {"ms": times}


async def throughput(voter: Voter, writers: int, seconds: float) -> dict[str, Any]:
    begun = time.perf_counter()
    over, done = begun + seconds, [0]

    async def writer(number: int) -> None:
        while time.perf_counter() < over:
            acknowledged = await voter.write(number)  # before the sum: others add to it meanwhile
            done[0] += acknowledged
            number += writers

    await asyncio.gather(*(writer(number) for number in range(writers)))
    return {"writes_per_s": done[0] / (time.perf_counter() - begun)}


async def fill(voter: Voter, writes: int) -> dict[str, Any]:
    """So many acknowledged writes, from 64 writers."""
    left, done = [writes], [0]

    async def writer() -> None:
        while left[0] > 0:
            left[0] -= 1
            acknowledged = await voter.write(left[0])
            done[0] += acknowledged

    await asyncio.gather(*(writer() for _ in range(64)))
    return {"done": done[0]}


async def obey(voter: Voter) -> None:
    """Answer every line of standard input until it ends."""
    lines = asyncio.StreamReader()  # reads no further than it is asked to; who writes more waits
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    work: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
        "latency": lambda order: latency(voter, order["writes"]),
        "throughput": lambda order: throughput(voter, order["writers"], order["seconds"]),
        "fill": lambda order: fill(voter, order["writes"]),
    }
    while line := await lines.readline():
        order = json.loads(line)
        match order["do"]:
            case "status":
                answer = voter.status()
            case "write":
                answer = {"done": await voter.write(order["number"])}
            case "grow":
                assert isinstance(voter, Ours)
                answer = {"voters": await voter.grow(order["voters"])}
            case "spaced":
                assert isinstance(voter, Ours)
                answer = {"acknowledged": await voter.spaced(order["writes"])}
            case name:
                answer = await work[name](order)
        print(json.dumps(answer), flush=True)


async def run_ours(arguments: argparse.Namespace) -> None:
    """A node like any other but for its engine."""
    from fieldmesh.config import load
    from fieldmesh.engine.fake import FakeEngine
    from fieldmesh.runtime import log
    from fieldmesh.runtime.node import running

    host, _, port = arguments.address.rpartition(":")
    config = load(
        flags={
            "node.name": f"voter-{port}",
            "node.mesh": arguments.mesh,
            "node.state_folder": str(arguments.folder),
            "listen.client": f"{host}:0",
            "listen.peer": arguments.address,
            "discovery.mdns": False,
            "discovery.seeds": arguments.other,
            "consensus.found": arguments.found,
            "listen.metrics": "off",
        }
    ).config
    sink = log.set_up("json", "warning")
    try:
        async with running(config, FakeEngine) as node:
            await obey(Ours(node))
    finally:
        sink.close()


def main() -> None:
    """Run one voter until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.voters")
    parser.add_argument("kind", choices=("fieldmesh", "pysyncobj"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--other", action="append", default=[])
    parser.add_argument("--mesh", default="bench")
    parser.add_argument("--found", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.kind == "fieldmesh":
        asyncio.run(run_ours(arguments))
    else:
        asyncio.run(obey(PySync(arguments.address, arguments.other, arguments.folder)))


if __name__ == "__main__":
    main()
