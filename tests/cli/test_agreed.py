"""`config get` and its sisters, and `raft`, against a real council of one voter: what a person and a script
are told, and the exit code."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from fieldmesh.cli.agreed import json_text
from fieldmesh.client.admin import Admin
from fieldmesh.core.errors import OutcomeUnknown
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_members import founded
from fieldmesh.core.raft_model import Entry, EntryKind, HardState, Members, Stored
from fieldmesh.core.settings import Change, Command, Kind, encode
from fieldmesh.runtime.identity import Identity
from fieldmesh.runtime.raft_store import LOG_FILE, RaftStore
from fieldmesh.runtime.state import StateFolder
from tests.cli.conftest import Commands
from tests.runtime.agreed_node import ME, OTHER, AgreedNode

Loop = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def agreed(tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgreedNode]:
    folder = tmp_path / "agreed"
    folder.mkdir()
    made = AgreedNode(folder)
    with capture_logs():  # the node's log would stand between what the command prints
        loop(made.start())
        monkeypatch.setenv("FIELDMESH_NODE", str(made.address))
        yield made
        loop(made.close())


def document(cli: Commands, *arguments: str) -> Any:
    assert cli(*arguments, "--json") == 0, cli.err
    return json.loads(cli.out)


@pytest.mark.usefixtures("agreed")
def test_a_value_is_set_read_and_deleted(cli: Commands) -> None:
    assert cli("config", "set", "routing/policy", "round-robin") == 0
    assert (cli.out, cli.err) == ("", "routing/policy is set, revision 1.\n")
    assert cli("config", "get", "routing/policy") == 0
    assert (cli.out, cli.err) == ('"round-robin"\n', "")
    assert cli("config", "delete", "routing/policy", "--if-revision", "1") == 0
    assert cli("config", "get", "routing/policy") == 4
    assert "[KEY_NOT_FOUND]" in cli.err


@pytest.mark.usefixtures("agreed")
def test_what_scripts_read_is_json(cli: Commands) -> None:
    assert document(cli, "config", "set", "limits/hops_max", "3") == {
        "outcome": "done",
        "key": "limits/hops_max",
        "revision": 1,
    }
    one = document(cli, "config", "get", "limits/hops_max")
    assert (one["value"], one["revision"], one["current"]) == (3, 1, True)
    every = document(cli, "config", "get", "--prefix", "limits/")
    assert every["settings"] == {"limits/hops_max": {"value": 3, "revision": 1}}
    change = document(cli, "config", "history")["changes"][0]
    assert (change["key"], change["before"], change["after"]) == ("limits/hops_max", None, 3)
    assert "@" in change["author"]
    assert change["origin"].startswith("alpha from ")


def test_a_watch_tells_changes_until_it_is_interrupted(
    cli: Commands, agreed: AgreedNode, tmp_path: Path
) -> None:
    assert cli("config", "set", "app/x", "1") == 0
    command = [sys.executable, "-m", "fieldmesh", "config", "watch", "--json", "--node", str(agreed.address)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"revision": 1, "key": "app/x", "value": 1}
    assert cli("config", "delete", "app/x") == 0
    told = json.loads(process.stdout.readline())
    assert (told["revision"], told["before"], told["after"]) == (2, 1, None)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")


@pytest.mark.usefixtures("agreed")
def test_history_diff_and_rollback_belong_together(cli: Commands) -> None:
    for value in ("1", "2", "3"):
        assert cli("config", "set", "app/x", value, "--author", "ann") == 0
    assert cli("config", "history") == 0
    assert cli.out.count("ann") == 3
    assert document(cli, "config", "diff", "1")["differences"] == [{"key": "app/x", "before": 1, "after": 3}]
    planned = document(cli, "config", "rollback", "1", "--dry-run")
    assert (planned["dry_run"], planned["revision"]) == (True, 3)
    assert cli("config", "rollback", "1") == 0
    assert "Rolled back to revision 1 by revision 4." in cli.err
    assert document(cli, "config", "get", "app/x")["value"] == 1
    assert cli("config", "rollback", "4") == 0
    assert "Nothing differs." in cli.err


@pytest.mark.usefixtures("agreed")
def test_a_stale_condition_is_refused_with_the_revision_that_is_there(cli: Commands) -> None:
    assert cli("config", "set", "app/x", "1") == 0
    assert cli("config", "set", "app/x", "2", "--if-revision", "0") == 1
    assert "revision 1" in cli.err
    assert "[REVISION_CONFLICT]" in cli.err


@pytest.mark.usefixtures("agreed")
def test_a_value_that_may_not_be_is_a_sentence_that_names_what_may(cli: Commands) -> None:
    assert cli("config", "set", "routing/policy", "fastest") == 2
    assert "expected-time, round-robin, least-loaded, random" in cli.err


@pytest.mark.usefixtures("agreed")
def test_a_value_comes_from_stdin(cli: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"profiles": ["legal"]}\n'))
    assert cli("config", "set", "domains/law", "-") == 0
    assert document(cli, "config", "get", "domains/law")["value"] == {"profiles": ["legal"]}


@pytest.mark.usefixtures("agreed")
def test_nothing_set_is_said_in_words(cli: Commands) -> None:
    assert cli("config", "get") == 0
    assert (cli.out, "Nothing is set" in cli.err) == ("", True)


@pytest.mark.usefixtures("agreed")
def test_an_unknown_write_has_an_exit_code_of_its_own_and_can_be_tried_again(
    cli: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Admin._call

    def loses_the_answer(self: Admin, method: str, request: Any) -> Any:
        answer = real(self, method, request)
        if method == "WriteConfig":
            raise OutcomeUnknown("no answer came")
        return answer

    monkeypatch.setattr(Admin, "_call", loses_the_answer)
    assert cli("config", "set", "app/x", "1", "--json") == 5
    told = json.loads(cli.out)
    assert told["outcome"] == "unknown"
    assert f"--retry {told['ticket']}" in cli.err
    monkeypatch.setattr(Admin, "_call", real)
    assert document(cli, "config", "set", "app/x", "1", "--retry", told["ticket"])["revision"] == 1
    assert len(document(cli, "config", "history")["changes"]) == 1


@pytest.mark.usefixtures("agreed")
def test_what_is_no_ticket_is_wrong_usage(cli: Commands) -> None:
    assert cli("config", "set", "app/x", "1", "--retry", "soon") == 2
    assert "--retry" in cli.err


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("round-robin", '"round-robin"'),
        ('"quoted"', '"quoted"'),
        ("3", "3"),
        ("true", "true"),
        ("NaN", '"NaN"'),
        ('{"a": [1]}', '{"a": [1]}'),
        ("", '""'),
        ("[" * 100_000, json.dumps("[" * 100_000)),
    ],
)
def test_what_is_no_json_is_a_word(typed: str, text: str) -> None:
    assert json_text(typed) == text


@pytest.mark.usefixtures("agreed")
def test_the_log_is_shown_to_people_and_scripts(cli: Commands) -> None:
    assert cli("config", "set", "app/x", "1") == 0
    found = document(cli, "raft", "status")
    assert (found["role"], found["voters"], found["revision"]) == ("leader", [ME], 1)
    assert found["leader"] == {"id": ME, "name": "alpha"}
    assert cli("raft", "status") == 0
    assert "leader alpha, term" in cli.out
    assert "1 voter, revision 1" in cli.out


@pytest.mark.usefixtures("agreed")
def test_members_are_added_and_removed_and_the_mesh_may_differ(cli: Commands) -> None:
    assert cli("raft", "add", "beta", "--learner") == 0
    assert "The mesh chooses its voters itself" in cli.err
    assert cli("config", "set", "voters/policy", '{"automatic": false}') == 0
    assert document(cli, "raft", "remove", "beta")["node"].startswith("b")
    assert cli("raft", "remove", "alpha") == 1
    assert "last voter" in cli.err


@pytest.mark.usefixtures("agreed")
def test_a_backup_is_written_whole_or_not_at_all(cli: Commands, tmp_path: Path) -> None:
    file = tmp_path / "log.backup"
    assert document(cli, "raft", "backup", str(file))["bytes"] == file.stat().st_size
    RaftStore.open(file, ME).close()
    assert cli("raft", "backup", str(file)) == 2
    assert "exists already" in cli.err
    assert cli("raft", "backup", str(tmp_path / "no" / "folder")) == 2


def test_a_node_that_is_not_there_is_said_so(cli: Commands) -> None:
    assert cli("config", "get", "--node", "127.0.0.1:1") == 3
    assert "cannot be reached" in cli.err


@pytest.mark.usefixtures("agreed")
def test_the_status_of_the_mesh_says_who_leads_and_which_revision_counts(cli: Commands) -> None:
    assert cli("config", "set", "app/x", "1") == 0
    assert cli("status") == 0
    assert "configuration: leader alpha, term 2, 1 voter, revision 1; this node is leader" in cli.out
    found = document(cli, "status")["configuration"]
    assert (found["term"], found["revision"], found["lag_entries"]) == (2, 1, 0)


@pytest.mark.usefixtures("agreed")
def test_a_log_with_a_leader_is_not_recovered(cli: Commands) -> None:
    assert cli("raft", "recover", "--yes") == 1
    assert "nothing needs to be recovered" in cli.err


def state_folder(tmp_path: Path) -> tuple[str, Path, NodeId]:
    """A stopped node with a log of its own."""
    folder = tmp_path / "state-of-a-node"
    with StateFolder.open(folder) as opened:
        me = Identity.load(opened).id
    store = RaftStore.open(folder / LOG_FILE, me)
    store.found(founded(me, "its-log"))
    store.close()
    return str(folder), folder / LOG_FILE, me


def test_a_stopped_node_forgets_its_log_and_gets_a_backup_back(cli: Commands, tmp_path: Path) -> None:
    folder, log_file, me = state_folder(tmp_path)
    backup = tmp_path / "backup"
    store = RaftStore.open(log_file, me)
    store.backup(backup)
    store.close()
    assert cli("raft", "restore", str(backup), "--state-folder", folder) == 1
    assert "exists already" in cli.err
    moved = document(cli, "raft", "forget", "--state-folder", folder)["moved"]
    assert (log_file.exists(), Path(moved).exists()) == (False, True)
    assert document(cli, "raft", "restore", str(backup), "--state-folder", folder)["epoch"] == 1
    store = RaftStore.open(log_file, me)
    assert store.load().hard.epoch == 1
    store.close()


def test_a_running_node_is_left_alone(cli: Commands, tmp_path: Path) -> None:
    folder, log_file, _ = state_folder(tmp_path)
    with StateFolder.open(Path(folder)):
        assert cli("raft", "forget", "--state-folder", folder) == 1
    assert "in use by process" in cli.err
    assert log_file.exists()


def test_a_node_without_a_log_has_nothing_to_forget(cli: Commands, tmp_path: Path) -> None:
    with StateFolder.open(tmp_path / "fresh"):
        pass
    assert document(cli, "raft", "forget", "--state-folder", str(tmp_path / "fresh")) == {"moved": None}
    assert cli("raft", "forget", "--state-folder", str(tmp_path / "nowhere")) == 2


def test_a_lone_survivor_is_told_what_may_be_lost_before_it_goes_on(
    cli: Commands, tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry(index=1, term=1, kind=EntryKind.MEMBERS, data=Members(voters=(ME, OTHER)).encode())
    change = Change(key="app/unconfirmed", value="1")
    command = encode(Command(kind=Kind.WRITE, session=1, sequence=1, changes=(change,)))
    write = Entry(index=2, term=1, kind=EntryKind.COMMAND, data=command)
    store = RaftStore.open(tmp_path / "log.sqlite3", ME)
    store.found(Stored(hard=HardState(term=1, group="half"), entries=(entry, write)))
    store.close()
    survivor = AgreedNode(tmp_path, found=False)
    survivor.others = []
    with capture_logs():
        loop(survivor.start())
        try:
            monkeypatch.setenv("FIELDMESH_NODE", str(survivor.address))
            assert cli("raft", "recover") == 0
            assert f"Voters that are given up: {OTHER}." in cli.out
            assert "app/unconfirmed" in cli.out
            assert "--yes" in cli.err
            assert cli("config", "set", "app/x", "1") == 3
            survivor.others = [OTHER]
            assert cli("raft", "recover", "--yes") == 1
            assert "beta" in cli.err
            survivor.others = []
            assert document(cli, "raft", "recover", "--yes")["epoch"] == 1
            assert cli("config", "set", "app/x", "1") == 0
        finally:
            loop(survivor.close())
