"""Kill -9 of nodes and engines under load.

Goal: an ask that had not begun to stream succeeds whatever dies, nothing is garbled, nothing is left behind.
Method: three real nodes with a real model on loopback, eight clients that ask through random nodes, and a
killer that takes a node or an engine in turn whenever at least two asks are in flight, then restarts it.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.cluster import Box, Cluster, node_named, usable, wait_until
from fieldmesh.client import Client
from fieldmesh.core.errors import FieldmeshError, StreamLost

ASKS, ASKS_MAX = 200, 5000
"""At least so many, and as many more as it takes until all are killed: a fast box answers more meanwhile."""
CLIENTS = 8
KILLS = 20
TOKENS = 64
IN_FLIGHT_MIN = 2
PROFILES = ("general", "code", "health")
QUESTIONS = (
    "Write a function that adds two numbers",
    "How do I reverse a list in Python?",
    "What does a segmentation fault mean?",
    "A child has a nosebleed. What should I do?",
    "How should I clean a small cut?",
    "What are the signs of dehydration?",
    "Tell me about the city of Lisbon",
    "Name three uses for a brick",
    "Why is the sky blue?",
    "Write a short note to thank a colleague",
)


@dataclass
class Book:
    """What every client is doing, and what came of it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    state: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    served: dict[int, tuple[str, int]] = field(default_factory=dict)
    errors: dict[int, FieldmeshError] = field(default_factory=dict)

    def counts(self) -> Counter[str]:
        with self.lock:
            return Counter(self.state.values())

    def set(self, number: int, state: str) -> None:
        with self.lock:
            self.state[number] = state

    @property
    def in_flight(self) -> int:
        counts = self.counts()
        return counts["waiting"] + counts["streaming"]

    @property
    def done(self) -> int:
        counts = self.counts()
        return counts["finished"] + counts["lost midway"] + counts["failed"]


def ask(book: Book, number: int, seeds: list[str]) -> None:
    book.set(number, "waiting")
    text = ""
    try:
        with Client(seeds) as client:
            stream = client.chat(QUESTIONS[number % len(QUESTIONS)], temperature=0.0, max_tokens=TOKENS,
                                 ignore_eos=True, timeout_s=120.0)  # fmt: skip
            for chunk in stream:
                book.set(number, "streaming")
                text += chunk.text
            result = stream.result()
        book.served[number] = (result.profile, len(result.attempts))
        assert result.completion_tokens == TOKENS
        book.set(number, "finished")
    except StreamLost:
        book.set(number, "lost midway")
    except FieldmeshError as error:
        book.errors[number] = error
        book.set(number, "failed")
    book.texts[number] = text


def quiet_texts(cluster: Cluster) -> dict[tuple[str, str], str]:
    """What each profile answers when nothing else happens."""
    entry = next(iter(cluster.boxes.values()))
    return {
        (question, profile): cluster.client(entry)
        .chat(question, profile=profile, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        .result()
        .text
        for question in QUESTIONS
        for profile in PROFILES
    }


class Killer:
    """Takes a node or an engine in turn, each time with enough asks in flight, and brings it back."""

    def __init__(self, cluster: Cluster, book: Book) -> None:
        self.cluster, self.book = cluster, book
        self.kills: list[str] = []

    def run(self) -> None:
        boxes = list(self.cluster.boxes.values())
        for number in range(KILLS):
            due = (number + 1) * ASKS // (KILLS + 2)
            wait_until(lambda due=due: self.book.done >= due - CLIENTS, 300, "asks to finish")  # type: ignore[misc]
            wait_until(lambda: self.book.in_flight >= IN_FLIGHT_MIN, 60, "asks in flight")
            self._kill(boxes[number % len(boxes)], engine=number % 2 == 0)

    def _kill(self, box: Box, *, engine: bool) -> None:
        counts = self.book.counts()
        others = [other for other in self.cluster.boxes.values() if other is not box]
        before = node_named(self.cluster.seen_by(others[0]), box.name)
        pid = box.engine_pids()[0] if engine else box.pid
        os.kill(pid, signal.SIGKILL)
        what = f"{'engine' if engine else 'node'} of {box.name}"
        self.kills.append(what)
        print(
            f"kill {len(self.kills):2} {what:18} waiting {counts['waiting']:2} "
            f"streaming {counts['streaming']:2} finished {counts['finished']:3} "
            f"lost midway {counts['lost midway']:2}"
        )
        if not engine:
            assert box.process is not None
            box.process.wait()
            self.cluster.start(box)
        incarnation = before.incarnation if before else 0

        def back() -> bool:
            node = node_named(self.cluster.seen_by(others[0]), box.name)
            engine_alive = any(pid != other for other in box.engine_pids()) or not engine
            fresh = node is not None and (engine or node.incarnation > incarnation)
            return fresh and node is not None and usable(node) and engine_alive

        wait_until(back, 60, f"{what} to come back")


@pytest.mark.mesh
def test_nothing_that_had_not_begun_is_lost_when_nodes_and_engines_are_killed() -> None:
    rng = random.Random(7)
    book = Book()
    with Cluster() as cluster:
        for profile in PROFILES:
            cluster.start(cluster.add(profile, profile))
        cluster.wait_formed()
        quiet = quiet_texts(cluster)
        seeds = [box.client for box in cluster.boxes.values()]
        numbers = iter(range(ASKS_MAX))
        lock, killed = threading.Lock(), threading.Event()

        def worker() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                    if number is None or (number >= ASKS and killed.is_set()):
                        return
                    order = rng.sample(seeds, len(seeds))
                ask(book, number, order)

        workers = [threading.Thread(target=worker) for _ in range(CLIENTS)]
        begun = time.monotonic()
        for thread in workers:
            thread.start()
        killer = Killer(cluster, book)
        try:
            killer.run()
        finally:
            killed.set()
            for thread in workers:
                thread.join()
        print(
            f"{book.done} asks, {len(killer.kills)} kills in {time.monotonic() - begun:.0f} s: "
            f"{dict(book.counts())}"
        )
        mesh, listeners = cluster.mesh, [box.client for box in cluster.boxes.values()]
        listeners += [box.peer for box in cluster.boxes.values()]

    assert not book.errors, f"asks that had not begun failed: {book.errors}"
    assert len(killer.kills) >= KILLS
    undisturbed = [number for number, (_, attempts) in book.served.items() if attempts == 1]
    assert len(undisturbed) >= ASKS // 2
    for number in undisturbed:
        profile, _ = book.served[number]
        assert book.texts[number] == quiet[QUESTIONS[number % len(QUESTIONS)], profile], f"ask {number}"
    for number, text in book.texts.items():
        answers = [quiet[QUESTIONS[number % len(QUESTIONS)], profile] for profile in PROFILES]
        assert any(answer.startswith(text) for answer in answers), f"ask {number} was garbled: {text!r}"
    assert processes_of(mesh) == []
    assert [address for address in listeners if listens(address)] == []


def processes_of(mesh: str) -> list[str]:
    """Command lines of processes that still belong to this mesh."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if mesh in command and folder.name != str(os.getpid()):
                found.append(command)
    return found


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True
