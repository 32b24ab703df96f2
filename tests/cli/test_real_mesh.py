"""The whole thing by its command line: `up` with real nodes and the real model, asked, hurt and ended."""

from __future__ import annotations

import codecs
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.cli.conftest import Commands

pytestmark = pytest.mark.mesh

FIRST_PORT = 28_420
NODES = {"general": FIRST_PORT, "code": FIRST_PORT + 2, "health": FIRST_PORT + 4}
QUESTION = "Write a Python function that adds two numbers"


def address(name: str) -> str:
    return f"127.0.0.1:{NODES[name]}"


@pytest.fixture
def mesh(_home: None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fieldmesh", "up", "--no-chat", "--first-port", str(FIRST_PORT)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "Ctrl-C ends the mesh" in line:
            break
    else:
        pytest.fail("".join(said))
    yield process
    everything = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    _, alive = psutil.wait_procs(everything, timeout=10)
    assert alive == []


def node_process(mesh: subprocess.Popen[str], name: str) -> psutil.Process:
    (found,) = [
        child
        for child in psutil.Process(mesh.pid).children()
        if name in child.cmdline()[: child.cmdline().index("--listen")]
    ]
    return found


def test_any_node_answers_and_the_loss_of_one_is_survived(cli: Commands, mesh: subprocess.Popen[str]) -> None:
    for name in NODES:
        assert cli("health", "--node", address(name)) == 0
        assert cli("status", "--node", address(name), "--json") == 0
        seen = json.loads(cli.out)
        assert sorted(entry["name"] for entry in seen["nodes"]) == sorted(NODES)
        assert {entry["load"]["engine"] for entry in seen["nodes"]} == {"ready"}

    assert (
        cli("ask", "--node", address("general"), "--max-tokens", "12", "--json", "--explain", QUESTION) == 0
    )
    answer = json.loads(cli.out)
    assert (answer["entry_node"], answer["served_by"], answer["profile"]) == ("general", "code", "code")
    assert (answer["domain"], answer["fallback"], answer["hops"]) == ("programming", False, 1)
    assert answer["completion_tokens"] == 12
    assert answer["text"]
    assert answer["explanation"]["candidates"]

    # A node that had no part in it tells where the time went.
    assert cli("trace", "--node", address("health"), "--json", answer["trace_id"]) == 0
    spans = json.loads(cli.out)["spans"]
    took_s = {f"{entry['node']}: {entry['name']}": entry["ends_s"] - entry["begins_s"] for entry in spans}
    steps = ("code: queue", "code: prefill", "code: decode")
    assert {"general: route", "general: forward code", *steps} <= set(took_s)
    assert took_s["code: prefill"] > took_s["code: queue"]
    assert sum(took_s[step] for step in steps) <= took_s["general: forward code"]

    greedy = ("--temperature", "0", "--max-tokens", "8", "--json", QUESTION)
    assert cli("ask", "--node", address("code"), *greedy) == 0
    direct = json.loads(cli.out)["text"]

    node_process(mesh, "general").kill()
    assert cli("ask", "--node", address("general"), "--node", address("health"), *greedy) == 0
    answer = json.loads(cli.out)
    assert (answer["entry_node"], answer["served_by"], answer["text"]) == ("health", "code", direct)


def test_a_terminal_gets_a_chat_and_leaving_it_ends_the_mesh(_home: None) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fieldmesh", "up", "general", "--first-port", str(FIRST_PORT)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    screen = Screen(controller)
    try:
        assert "Ask anything" in screen.read_until("› ")
        os.write(controller, b"Say hello.\n")
        assert "served by general" in screen.read_until("first after")
        screen.read_until(
            "› "
        )  # a Ctrl-D that comes before the prompt is lost as readline changes the terminal's mode
        os.write(controller, b"\x04")
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        os.close(controller)
    for port in (FIRST_PORT, FIRST_PORT + 1):
        assert not [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]


class Screen:
    """What a terminal shows, read in order: nothing that came with an earlier wait is lost to the next."""

    def __init__(self, controller: int) -> None:
        self._controller = controller
        self._unread = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end inside a character

    def read_until(self, wanted: str, timeout_s: float = 90.0) -> str:
        """What comes up to and with ``wanted``."""
        while wanted not in self._unread:
            ready, _, _ = select.select([self._controller], [], [], timeout_s)
            assert ready, self._unread
            try:
                self._unread += self._decoder.decode(os.read(self._controller, 4096))
            except OSError:  # the other end is closed
                pytest.fail(self._unread)
        said, _, rest = self._unread.partition(wanted)
        self._unread = rest
        return said + wanted
