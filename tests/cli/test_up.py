"""`up` and the processes it starts: stand-ins for nodes that answer at once, real processes and ports."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fieldmesh.cli import children, up
from fieldmesh.cli.children import HTTP_OFFSET, Children, Plan, free_port_pairs, wait_until_together
from fieldmesh.core.errors import AddressInUse, EngineNotReady, Internal
from fieldmesh.core.model import Address
from tests.cli.conftest import Commands

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in.py"))]
FIRST_PORT = 27_420


@pytest.fixture(autouse=True)
def _signals_and_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    yield
    assert psutil.Process().children(recursive=True) == []


def plans(folder: Path, *names: str) -> list[Plan]:
    pairs = free_port_pairs(len(names), FIRST_PORT)
    return [
        Plan(
            name=name,
            profile="general",
            client=Address(host="127.0.0.1", port=client),
            peer=Address(host="127.0.0.1", port=peer),
            http=Address(host="127.0.0.1", port=client + HTTP_OFFSET),
            state_folder=folder / name,
            log=folder / "log" / f"{name}.log",
        )
        for name, (client, peer) in zip(names, pairs, strict=True)
    ]


def test_ports_that_are_taken_are_passed_over() -> None:
    first = free_port_pairs(1, FIRST_PORT)[0][0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        taken.listen()
        pairs = free_port_pairs(2, first)
    assert [peer - client for client, peer in pairs] == [1, 1]
    assert pairs[0][0] >= first + 2
    with pytest.raises(AddressInUse):
        free_port_pairs(2, 65_533)


def test_nodes_come_up_together_and_end_together(tmp_path: Path) -> None:
    with Children(plans(tmp_path, "a", "b"), STAND_IN) as mesh:
        looks = list(wait_until_together(mesh, 60.0))
        assert all(child.serving and child.seen == 2 for child in looks[-1])
        processes = [child.process for child in mesh.running]
    assert [process.returncode for process in processes] == [0, 0]
    # Leaving ends them; and their ports are free again.
    assert free_port_pairs(1, FIRST_PORT)[0][0] == mesh.plans[0].client.port


def test_a_node_that_will_not_leave_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "STOP_TIMEOUT_S", 0.2)
    with Children(plans(tmp_path, "a"), [*STAND_IN, "--stubborn"]) as mesh:
        list(wait_until_together(mesh, 60.0))
        (child,) = mesh.running
    assert child.exit_code == -signal.SIGKILL


def test_a_node_that_breaks_off_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(Internal) as caught, Children(plans(tmp_path, "a"), [*STAND_IN, "--broken"]) as mesh:
        list(wait_until_together(mesh, 60.0))
    assert (
        "Node a ended with code 1 while it started: This node was never going to start."
        in caught.value.message
    )
    assert str(mesh.plans[0].log) in caught.value.message


def test_an_engine_that_was_given_up_is_not_waited_for(tmp_path: Path) -> None:
    command = [*STAND_IN, "--failed"]
    with pytest.raises(EngineNotReady, match="given up"), Children(plans(tmp_path, "a"), command) as mesh:
        list(wait_until_together(mesh, 60.0))


def test_a_mesh_that_does_not_come_together_in_time_is_given_up(tmp_path: Path) -> None:
    (plan,) = plans(tmp_path, "a")
    sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with pytest.raises(EngineNotReady, match="not complete: a"), Children([plan], sleeper) as mesh:
        list(wait_until_together(mesh, 0.3))


def test_a_node_that_ended_is_told_once(tmp_path: Path) -> None:
    with Children(plans(tmp_path, "a", "b"), STAND_IN) as mesh:
        list(wait_until_together(mesh, 60.0))
        first, _ = mesh.running
        first.process.kill()
        first.process.wait()
        assert [child.plan.name for child in mesh.ended()] == ["a"]
        assert list(mesh.ended()) == []


def test_nothing_outlives_an_up_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1]); import tests.cli.test_up as t\n"
        "with t.Children(t.plans(Path(sys.argv[2]), 'a', 'b'), t.STAND_IN) as mesh:\n"
        "    list(t.wait_until_together(mesh, 60.0)); print('up', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    nodes = psutil.Process(process.pid).children(recursive=True)
    assert len(nodes) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(nodes, timeout=20)
    assert alive == []
    process.stdin.close()
    process.stdout.close()


# --- the command -------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "SERVE", tuple(STAND_IN))


def test_one_question_is_asked_through_a_node_that_does_not_own_it(cli: Commands, stand_ins: None) -> None:
    question = "Write a Python function that adds two numbers"
    assert cli("up", "code", "general", "--first-port", str(FIRST_PORT), "--ask", question) == 0
    assert cli.out == "general\n"
    assert f"Asking through general: {question}" in cli.err
    assert "served by general" in cli.err
    assert "2 nodes are up" in cli.err
    assert "Web page: http://127.0.0.1:" in cli.err


def test_a_general_question_is_asked_through_a_specialist(cli: Commands, stand_ins: None) -> None:
    line = ("up", "general", "code", "--first-port", str(FIRST_PORT), "--ask", "zzz qqq")
    assert cli(*line) == 0
    assert "Asking through code" in cli.err


def test_without_a_terminal_one_question_is_asked(cli: Commands, stand_ins: None) -> None:
    assert cli("up", "general", "code", "--first-port", str(FIRST_PORT)) == 0
    assert f"Asking through general: {up.SAMPLE_QUESTION}" in cli.err
    assert cli.out == "general\n"


def test_a_mesh_of_equal_profiles_has_names_of_its_own(cli: Commands, stand_ins: None) -> None:
    line = ("up", "general", "general", "--first-port", str(FIRST_PORT), "--mesh", "m", "--ask", "hello")
    assert cli(*line) == 0
    assert "general-2" in cli.err
    assert f"m-{FIRST_PORT}" in cli.err


@pytest.mark.parametrize(
    "line", [["nonsense"], ["--threads", "-1"], ["general"] * 33, ["--first-port", "1"], ["--mesh", "../x"]]
)
def test_what_cannot_be_started_is_refused_before_anything_is(
    cli: Commands, stand_ins: None, line: list[str]
) -> None:
    assert cli("up", *line, "--ask", "x") == 2
    assert "Traceback" not in cli.err


def test_a_node_that_cannot_start_fails_the_command(cli: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "SERVE", (*STAND_IN, "--broken"))
    assert cli("up", "general", "--first-port", str(FIRST_PORT), "--ask", "x") == 1
    assert "never going to start" in cli.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_nodes(number: signal.Signals, code: int) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tests.cli.test_up as t\n"
        "t.up.SERVE = tuple(t.STAND_IN)\n"
        "from fieldmesh.cli.app import run\n"
        "sys.exit(run(['up', 'general', 'code', '--no-chat', '--first-port', '27420']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Ctrl-C ends the mesh" in line:
            break
    nodes = psutil.Process(process.pid).children(recursive=True)
    assert len(nodes) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in err
    assert [node for node in nodes if node.is_running()] == []
