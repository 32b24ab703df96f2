"""`init`. Goal: one command begins a mesh's configuration, once. Method: a real state folder."""

from __future__ import annotations

import json
from pathlib import Path

from fieldmesh.core.model import NodeId
from fieldmesh.runtime.identity import Identity
from fieldmesh.runtime.raft_store import LOG_FILE, RaftStore
from fieldmesh.runtime.state import StateFolder
from tests.cli.conftest import Commands


def test_init_makes_the_node_the_only_voter_of_a_new_log(cli: Commands, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert cli("init", "--state-folder", str(folder), "--mesh", "site", "--json") == 0, cli.err
    said = json.loads(cli.out)
    with StateFolder.open(folder) as opened:
        node = Identity.load(opened).id
    store = RaftStore.open(folder / LOG_FILE, node)
    stored = store.load()
    store.close()
    assert said == {"log": stored.hard.group, "node": node, "mesh": "site"}
    assert stored.entries[0].data == f"{NodeId(node)};".encode()


def test_a_node_that_has_a_log_founds_no_second_one(cli: Commands, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    assert cli("init", "--state-folder", folder) == 0
    assert cli("init", "--state-folder", folder) != 0
    assert "already" in cli.err
