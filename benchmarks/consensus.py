"""The replicated log beside PySyncObj: processes of this machine, the same work through each one's interface.

    python -m benchmarks.consensus [--json] [--rounds N] [--only NAME …]

What each guarantees is not the same, and the table does not hide it. Ours acknowledges a write when a
majority of voters has it on disk (SQLite, WAL, synchronous=FULL: an fsync on each); PySyncObj 0.3.17 when a
majority has it in memory and in a journal that is never synced, so that a power cut loses it. Ours gives a
write's outcome once however often it is asked for; PySyncObj's callers may see a retried write done twice.
Needs PyPI's ``pysyncobj`` (``make bench``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.cluster import free_port, tail, wait_until
from benchmarks.report import Row, percentile, show
from fieldmesh.v1 import admin_pb2, admin_pb2_grpc

KINDS = ("fieldmesh", "pysyncobj")
START_TIMEOUT_S = 90.0


@dataclass(slots=True, kw_only=True)
class Member:
    """One voter's process."""

    address: str
    folder: Path
    command: list[str]
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def do(self, what: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for its answer. Raises RuntimeError where the process has ended."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **order}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError("\n".join([f"{self.address} has ended:", *tail(self.log, 10)]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Log:
    """Some voters of one kind."""

    def __init__(self, kind: str, folder: Path, voters: int) -> None:
        self.kind = kind
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(voters)]
        self.members = []
        for number, address in enumerate(addresses):
            others = [word for other in addresses if other != address for word in ("--other", other)]
            home = folder / f"{kind}-{number}"
            command = [
                sys.executable, "-m", "benchmarks.voters", kind, "--address", address, "--folder", str(home),
                "--mesh", f"bench-{os.getpid()}", *(("--found",) if number == 0 else ()), *others,
            ]  # fmt: skip
            self.members.append(Member(address=address, folder=home, command=command))

    def start(self) -> None:
        for member in self.members:
            member.start()
        wait_until(self._complete, START_TIMEOUT_S, f"{self.kind} to have {len(self.members)} voters")

    def _complete(self) -> bool:
        leader = self.find_leader()
        if leader is None:
            return False
        if self.kind == "fieldmesh" and leader.do("status")["voters"] < len(self.members):
            leader.do("grow", voters=len(self.members))
        return bool(leader.do("status")["voters"] == len(self.members))

    def find_leader(self) -> Member | None:
        leaders = [m for m in self.members if m.runs and m.do("status")["leads"]]
        return leaders[0] if leaders else None

    def leader(self) -> Member:
        wait_until(lambda: self.find_leader() is not None, 30, f"a leader of {self.kind}")
        leader = self.find_leader()
        assert leader is not None
        return leader


@contextmanager
def logs(voters: int, kinds: Iterable[str] = KINDS) -> Iterator[dict[str, Log]]:
    """Both kinds side by side; leaving the context ends and removes everything."""
    folder = Path(tempfile.mkdtemp(prefix="fieldmesh-consensus-"))
    running = {kind: Log(kind, folder, voters) for kind in kinds}
    try:
        for log in running.values():
            log.start()
        yield running
    finally:
        for log in running.values():
            for member in log.members:
                member.stop()
        shutil.rmtree(folder, ignore_errors=True)


def against(
    measure: str, unit: str, values: dict[str, list[float]], aim: float, *, more: bool = False
) -> Row:
    """The medians of both, side by side."""
    ours, peer = (statistics.median(values[kind]) for kind in KINDS)
    return Row(
        measure=measure,
        unit=unit,
        ours=ours,
        peer="pysyncobj",
        peer_value=peer,
        aim=aim,
        higher_is_better=more,
        note=f"{min(values['fieldmesh']):.4g} to {max(values['fieldmesh']):.4g}",
    )


# --- the measures ------------------------------------------------------------------------


def commits(rounds: int) -> Iterator[Row]:
    """One write after another, and 64 writers together, at the leader."""
    for voters, aim_p50_ms in ((3, 5.0), (5, 8.0)):
        p50: dict[str, list[float]] = {kind: [] for kind in KINDS}
        p99: dict[str, list[float]] = {kind: [] for kind in KINDS}
        speed: dict[str, list[float]] = {kind: [] for kind in KINDS}
        with logs(voters) as both:
            for _ in range(rounds):
                for kind, log in both.items():
                    leader = log.leader()
                    times = leader.do("latency", writes=200)["ms"]
                    p50[kind].append(percentile(times, 50))
                    p99[kind].append(percentile(times, 99))
                    if voters == 3:
                        speed[kind].append(leader.do("throughput", writers=64, seconds=3.0)["writes_per_s"])
        yield against(f"commit_p50_ms_{voters}", "ms", p50, aim_p50_ms)
        if voters == 3:
            yield against("commit_p99_ms_3", "ms", p99, 25.0)
            yield against("writes_per_s_3_64_writers", "writes/s", speed, 1000.0, more=True)


def failover(rounds: int) -> Iterator[Row]:
    """From kill -9 of the leader until another voter has acknowledged a write."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with logs(3) as both:
        for number in range(max(7, rounds)):
            for kind, log in both.items():
                victim = log.leader()
                survivors = [m for m in log.members if m is not victim]
                victim.kill()
                begun = time.perf_counter()
                while not any(
                    m.do("status")["leads"] and m.do("write", number=number)["done"] for m in survivors
                ):
                    if time.perf_counter() - begun > 30:
                        raise TimeoutError(f"{kind} does not go on after its leader's death")
                seconds[kind].append(time.perf_counter() - begun)
                victim.start()
                wait_until(log._complete, START_TIMEOUT_S, f"{kind} to be whole again")
                caught_up(log)
    yield against("failover_s_p50", "s", seconds, 1.5)


def caught_up(log: Log) -> None:
    """Every member answers, and a write is acknowledged: what was killed is back."""
    wait_until(lambda: all(m.do("status")["term"] > 0 for m in log.members), 30, "the members")
    wait_until(lambda: bool(log.leader().do("write", number=0)["done"]), 30, "a write")
    time.sleep(1.0)  # the one that came back hears of the leader; elections are not what is measured here


def idle(rounds: int, seconds: float = 20.0) -> Iterator[Row]:
    """CPU of a voter that nobody writes to; ours is a whole node, with its part in the mesh."""
    used: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with logs(3) as both:
        time.sleep(5.0)
        for _ in range(max(1, rounds // 3)):
            processes = {
                kind: [psutil.Process(m.process.pid) for m in log.members if m.process is not None]
                for kind, log in both.items()
            }
            before = {kind: [cpu_s(p) for p in them] for kind, them in processes.items()}
            time.sleep(seconds)
            for kind, them in processes.items():
                spent = [cpu_s(p) - b for p, b in zip(them, before[kind], strict=True)]
                used[kind].append(max(spent) / seconds * 100)
    yield against("idle_cpu_percent", "%", used, 1.0)


def cpu_s(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


def observers(rounds: int, count: int = 50) -> Iterator[Row]:
    """From a write's acknowledgement until each of 50 watch streams, spread over the voters, shows it."""
    with logs(3, ("fieldmesh",)) as both:
        log = both["fieldmesh"]
        lags = [lag for _ in range(rounds) for lag in asyncio.run(watched(log, count))]
    yield Row(
        measure="observer_lag_ms_p50",
        unit="ms",
        ours=percentile(lags, 50),
        aim=20.0,
        note=f"p99 {percentile(lags, 99):.3g}, {len(lags)} sightings",
    )


async def watched(log: Log, count: int, writes: int = 20) -> list[float]:
    """Milliseconds from acknowledgement to sighting, all streams, all writes."""
    leader = log.leader()
    addresses = [m.do("status")["client"] for m in log.members]
    seen: list[tuple[int, float]] = []
    begun = [asyncio.Event() for _ in range(count)]

    async def watch(number: int) -> None:
        async with grpc.aio.insecure_channel(addresses[number % len(addresses)]) as channel:
            stream = admin_pb2_grpc.AdminServiceStub(channel).WatchConfig(admin_pb2.WatchConfigRequest())
            async for news in stream:
                seen.append((news.revision, time.monotonic()))
                begun[number].set()

    tasks = [asyncio.create_task(watch(number)) for number in range(count)]
    await asyncio.gather(*(event.wait() for event in begun))
    answer = await asyncio.to_thread(leader.do, "spaced", writes=writes)
    acknowledged = dict(answer["acknowledged"])
    await asyncio.sleep(1.0)  # far above any lag: what has not come by then is missing below
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    lags = [(at - acknowledged[revision]) * 1000 for revision, at in seen if revision in acknowledged]
    if len(lags) < count * len(acknowledged):
        raise RuntimeError(f"{count * len(acknowledged) - len(lags)} sightings are missing after a second")
    return lags


def size(rounds: int, writes: int = 100_000) -> Iterator[Row]:
    """The largest voter's files after so many writes."""
    del rounds
    megabytes: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with logs(3) as both:
        for kind, log in both.items():
            done = 0
            while done < writes:
                done += log.leader().do("fill", writes=min(10_000, writes - done))["done"]
            megabytes[kind].append(max(folder_mb(m.folder) for m in log.members))
    yield against("log_mb_after_100k_writes", "MB", megabytes, 20.0)


def folder_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


MEASURES: dict[str, Callable[[int], Iterable[Row]]] = {
    "commits": commits,
    "failover": failover,
    "idle": idle,
    "observers": observers,
    "size": size,
}


def main() -> int:
    """Measure, print, and say by the exit status whether every aim was met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.consensus", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON rows to standard output")
    parser.add_argument("--rounds", type=int, default=5, help="rounds a measure (default: 5)")
    parser.add_argument("--only", nargs="*", choices=[*MEASURES], help="measure these alone")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.only or MEASURES:
        print(f"measuring {name} …", file=sys.stderr)
        rows += MEASURES[name](arguments.rounds)
    return show(rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
