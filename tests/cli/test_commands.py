"""Commands against a scripted node: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fieldmesh import __version__
from fieldmesh.cli import profiling, serving
from fieldmesh.cli.looking import mesh_table
from fieldmesh.cli.terminal import printable
from fieldmesh.client import Mesh, Node, Offer
from fieldmesh.config import NodeConfig
from fieldmesh.core.errors import (
    Draining,
    FieldmeshError,
    HopLimit,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    QueueFull,
)
from fieldmesh.core.model import Address, EngineState, Load, NodeState
from fieldmesh.profile_checks import Confusion, Misrouted
from tests.cli.conftest import Commands
from tests.client.scripted import ScriptedNode, answers, hangs, refuses

ASK_KEYS = [
    "text",
    "model",
    "profile",
    "domain",
    "fallback",
    "entry_node",
    "served_by",
    "attempts",
    "hops",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "ttft_s",
    "duration_s",
    "finish_reason",
]
STATUS_KEYS = [
    "id",
    "name",
    "address",
    "state",
    "profile",
    "domains",
    "models",
    "tier",
    "load",
    "incarnation",
]


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# --- ask ---------------------------------------------------------------------------------


def test_an_answer_goes_to_stdout_and_who_served_it_to_stderr(cli: Commands, node: ScriptedNode) -> None:
    node.script.append(answers("one ", "two"))
    assert cli("ask", "--node", str(node.address), "hello") == 0
    assert cli.out == "one two\n"
    assert cli.err.startswith("served by alpha (profile general)")
    assert len(cli.err.splitlines()) == 1


def test_quiet_leaves_only_the_answer(cli: Commands, node: ScriptedNode) -> None:
    assert cli("-q", "ask", "--node", str(node.address), "hello") == 0
    assert (cli.out, cli.err) == ("alpha\n", "")


def test_json_is_one_object_with_all_that_is_known(cli: Commands, node: ScriptedNode) -> None:
    assert cli("ask", "--node", str(node.address), "--domain", "code", "--json", "hello") == 0
    result = json.loads(cli.out)
    assert [key for key in result if key in ASK_KEYS] == ASK_KEYS
    assert (result["text"], result["served_by"], result["entry_node"]) == ("alpha", "alpha", "alpha")
    assert (result["domain"], result["fallback"], result["finish_reason"]) == ("code", True, "stop")
    assert result["attempts"][0]["reason"] == "served"
    assert "explanation" not in result


def test_options_reach_the_node(cli: Commands, node: ScriptedNode) -> None:
    options = [
        "--profile",
        "p",
        "--model",
        "m",
        "--max-tokens",
        "5",
        "--seed",
        "7",
        "--temperature",
        "0",
        "--timeout-s",
        "9",
    ]
    assert cli("ask", "--node", str(node.address), *options, "hello") == 0
    (sent,) = node.requests
    assert (sent.target.profile, sent.target.model, sent.messages[0].content) == ("p", "m", "hello")
    params = sent.sampling_params
    assert (params.max_tokens, params.seed, params.temperature) == (5, 7, 0.0)
    assert params.HasField("temperature")
    assert not params.HasField("top_k")


def test_a_schema_and_a_regex_reach_the_node(cli: Commands, node: ScriptedNode, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert cli("ask", "--node", str(node.address), "--json-schema", str(schema), "hello") == 0
    assert cli("ask", "--node", str(node.address), "--regex", "(yes|no)", "hello") == 0
    first, second = (request.sampling_params for request in node.requests)
    assert (first.json_schema, second.regex) == ('{"type": "object"}', "(yes|no)")


@pytest.mark.parametrize("content", [None, b"\xff", b" " * 65_537], ids=["missing", "no text", "too large"])
def test_a_schema_that_cannot_be_sent_is_refused_by_the_options_name(
    cli: Commands, node: ScriptedNode, tmp_path: Path, content: bytes | None
) -> None:
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_bytes(content)
    assert cli("ask", "--node", str(node.address), "--json-schema", str(schema), "hello") == 2
    assert str(schema) in cli.err.replace("\n", "")
    assert not node.requests


def test_several_answers_and_their_likelihoods_are_asked_for(cli: Commands, node: ScriptedNode) -> None:
    assert cli("ask", "--node", str(node.address), "--n", "3", "--logprobs", "2", "hello") == 0
    params = node.requests[0].sampling_params
    assert (params.n, params.logprobs) == (3, 2)
    assert cli.out == "alpha\n"
    assert "answer 1 of 1" in cli.err


def test_vectors_are_lines_of_json(cli: Commands, node: ScriptedNode) -> None:
    assert cli("embed", "--node", str(node.address), "one", "two") == 0
    vectors = [json.loads(line) for line in cli.out.splitlines()]
    assert vectors == [pytest.approx([0.6, -0.8])] * 2
    assert "served by alpha" in cli.err
    assert cli("embed", "--node", str(node.address), "--json", "one") == 0
    assert json.loads(cli.out)["prompt_tokens"] == 3


def test_a_dash_reads_the_question_from_stdin(
    cli: Commands, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, "Grüße\nzwei".encode())
    assert cli("ask", "--node", str(node.address), "-") == 0
    assert node.requests[0].messages[0].content == "Grüße\nzwei"


@pytest.mark.parametrize("data", [b"\xff\xfe", b"x" * 1_048_577, b""])
def test_a_question_on_stdin_that_is_none_is_refused(
    cli: Commands, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    node.script.append(refuses(InvalidRequest("messages hold no text")))
    stdin(monkeypatch, data)
    assert cli("ask", "--node", str(node.address), "-") == 2
    assert "Traceback" not in cli.err


def test_explain_shows_the_candidates(cli: Commands, node: ScriptedNode) -> None:
    assert cli("ask", "--node", str(node.address), "--explain", "hello") == 0
    assert "expected-time" in cli.err
    assert "here" in cli.err
    assert cli("ask", "--node", str(node.address), "--explain", "--json", "hello") == 0
    assert json.loads(cli.out)["explanation"]["candidates"][0]["node_name"] == "alpha"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InvalidRequest("bad"), 2, "bad [INVALID_REQUEST]"),
        (QueueFull("full", retry_after_s=60.0), 3, "full (try again in 60 s) [QUEUE_FULL]"),
        (ModelNotFound("none"), 4, "none [MODEL_NOT_FOUND]"),
        (HopLimit("far"), 1, "far [HOP_LIMIT]"),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    cli: Commands, node: ScriptedNode, error: FieldmeshError, code: int, said: str
) -> None:
    node.script.append(refuses(error))
    assert cli("ask", "--node", str(node.address), "hello") == code
    assert cli.out == ""
    assert cli.err == f"fieldmesh: {said}\n"


def test_a_stream_that_breaks_ends_its_line_and_says_so(cli: Commands, node: ScriptedNode) -> None:
    node.script.append(refuses(Draining("leaving"), after=("half",)))
    assert cli("ask", "--node", str(node.address), "hello") == 3
    assert cli.out == "half\n"
    assert "broke after 1 tokens" in cli.err


def test_debug_lets_the_traceback_through(cli: Commands, node: ScriptedNode) -> None:
    node.script.append(refuses(ModelNotFound("none")))
    with pytest.raises(ModelNotFound):
        cli("--debug", "ask", "--node", str(node.address), "hello")


def test_nobody_there_is_a_sentence_that_says_what_to_do(cli: Commands) -> None:
    assert cli("ask", "--node", "127.0.0.1:1", "hello") == 3
    assert "127.0.0.1:1 cannot be reached" in cli.err
    assert "fieldmesh up" in cli.err


def test_the_node_comes_from_the_environment_too(
    cli: Commands, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIELDMESH_NODE", f"127.0.0.1:1,{node.address}")
    assert cli("ask", "hello") == 0


def test_a_node_that_is_no_address_is_refused_by_the_options_name(cli: Commands) -> None:
    assert cli("ask", "--node", "a:b:c", "hello") == 2
    assert "--node is 'a:b:c'" in cli.err


@pytest.mark.parametrize(
    "line", [[], ["ask"], ["ask", "--max-tokens", "many", "x"], ["nonsense"], ["ask", "--no"]]
)
def test_wrong_usage_exits_2(cli: Commands, line: list[str]) -> None:
    assert cli(*line) == 2
    assert "Traceback" not in cli.err


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\n\tc\x9b\u200bü") == "a[31mb\n\tc\u200bü"


def test_a_question_that_is_no_text_is_refused(cli: Commands, node: ScriptedNode) -> None:
    assert cli("ask", "--node", str(node.address), "a\udcffb") == 2
    assert "cannot be sent" in cli.err


# --- chat --------------------------------------------------------------------------------


def test_a_talk_carries_its_turns(cli: Commands, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"first\n/domain code\n\nsecond\n/reset\n/domain\nthird\n/exit\nnever\n")
    assert cli("chat", "--node", str(node.address)) == 0
    said = [[(turn.role, turn.content) for turn in request.messages] for request in node.requests]
    assert said == [
        [("user", "first")],
        [("user", "first"), ("assistant", "alpha"), ("user", "second")],
        [("user", "third")],
    ]
    assert [request.target.domain for request in node.requests] == ["", "code", ""]
    assert cli.out == "alpha\nalpha\nalpha\n"


def test_a_talk_that_grew_too_long_forgets_its_beginning(
    cli: Commands, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.script += [answers("a"), refuses(PromptTooLong("too long")), answers("b")]
    stdin(monkeypatch, b"first\nsecond\n")
    assert cli("chat", "--node", str(node.address)) == 0
    assert [turn.content for turn in node.requests[-1].messages] == ["second"]


def test_an_error_does_not_end_a_talk_but_a_script_learns_of_it(
    cli: Commands, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.script += [refuses(ModelNotFound("none")), answers("b")]
    stdin(monkeypatch, b"first\nsecond\n")
    assert cli("chat", "--node", str(node.address)) == 4
    assert [turn.content for turn in node.requests[-1].messages] == ["second"]
    assert "none [MODEL_NOT_FOUND]" in cli.err


# --- status and health -------------------------------------------------------------------


def test_status_shows_the_mesh(cli: Commands, node: ScriptedNode) -> None:
    assert cli("status", "--node", str(node.address)) == 0
    assert "mesh test: 1 of 1 nodes alive" in cli.out
    assert "alpha *" in cli.out
    assert str(node.address) in cli.out


def test_status_as_json_has_what_scripts_need(cli: Commands, node: ScriptedNode) -> None:
    assert cli("status", "--node", str(node.address), "--json") == 0
    mesh = json.loads(cli.out)
    assert (mesh["mesh"], mesh["local_id"]) == ("test", node.id)
    (entry,) = mesh["nodes"]
    assert [key for key in entry if key in STATUS_KEYS] == STATUS_KEYS
    assert (entry["state"], entry["profile"], entry["domains"], entry["models"]) == (
        "alive",
        "code",
        ["code"],
        ["tiny"],
    )
    assert (entry["tier"], entry["incarnation"], entry["address"]) == (2, 3, str(node.address))
    assert (entry["load"]["engine"], entry["load"]["queued"]) == ("ready", 2)


def test_health_tells_by_its_exit_code(cli: Commands, node: ScriptedNode, loop: Callable[[Any], Any]) -> None:
    assert cli("health", "--node", str(node.address)) == 0
    assert cli.out == "SERVING\n"
    assert cli("health", "--node", str(node.address), "--profile", "code") == 3
    loop(node.tell_health("fieldmesh.v1.InferenceService/code", serves=True))
    assert cli("health", "--node", str(node.address), "--profile", "code", "--json") == 0
    assert json.loads(cli.out)["serving"] is True
    loop(node.tell_health("", serves=False))
    assert cli("health", "--node", str(node.address)) == 3
    assert cli.out == "NOT_SERVING\n"
    assert cli("health", "--node", "127.0.0.1:1") == 3


# --- profiles and configuration ----------------------------------------------------------


def test_shipped_profiles_are_listed_and_shown(cli: Commands) -> None:
    assert cli("profiles", "list", "--json") == 0
    assert {"code", "general", "health"} <= {entry["profile"]["name"] for entry in json.loads(cli.out)}
    assert cli("profiles", "list") == 0
    assert cli("profiles", "show", "code") == 0
    shown = cli.out
    assert cli("profiles", "show", "code", "--json") == 0
    assert f'name = "{json.loads(cli.out)["name"]}"' in shown
    assert cli("profiles", "show", "cod") == 2
    assert "Did you mean code?" in cli.err


def test_an_own_profile_is_written_checked_and_tried(cli: Commands, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(f"How much water does maize need in week {n}?" for n in range(8)))
    new = ("profiles", "new", "--gguf", "builtin", "--domain", "crops", "--examples", str(questions))
    assert cli(*new) == 0
    assert Path(cli.out.strip()).name == "crops.toml"
    assert cli(*new) == 2
    assert "exists already" in cli.err
    assert cli(*new, "--replace") == 0
    assert cli("profiles", "check", "crops", "--json") == 0
    verdict = json.loads(cli.out)
    assert verdict["examples"] >= 8
    assert {entry["profile"] for entry in verdict["misrouted"]} <= {"crops"}
    assert cli("profiles", "try", "--json", "How much water does maize need?") == 0
    assert json.loads(cli.out)["profiles"] == ["crops"]
    elsewhere = tmp_path / "else.toml"
    assert cli(*new, "--name", "fields", "--output", str(elsewhere)) == 0
    assert cli("profiles", "try", "--with", str(elsewhere), "--json", "How much water does maize need?") == 0
    assert json.loads(cli.out)["profiles"] == ["fields", "crops"]
    assert cli("profiles", "try", "Write a Python function") == 0
    assert cli.out.startswith("code (domain programming")
    assert cli("profiles", "try", " ") == 2


def test_confusion_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    miss = Misrouted(
        profile="crops", domain="crops", example="x", to_domain="code", to_profiles=("code",), confidence=0.5
    )
    told = replace(miss, to_profiles=())
    confusion = Confusion(examples=4, misrouted=(miss, told), shared_domains=("crops",), too_few=("rare",))
    profiling._show_confusion(confusion, {"crops"})
    out, err = capsys.readouterr()
    assert out == (
        "2 of 4 examples (50%) reach their own profile.\n  crops → a generalist: 1\n  crops → code: 1\n"
    )
    assert "Domain crops is declared by several" in err
    assert "Domain rare has too few" in err


def test_config_check_tells_values_and_sources(
    cli: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fieldmesh.toml").write_text("[engine]\nslots = 2\n")
    monkeypatch.setenv("FIELDMESH_NAME", "kitchen")
    assert cli("config", "check", "--json") == 0
    found = json.loads(cli.out)
    assert found["values"]["engine.slots"]["value"] == 2
    assert found["values"]["engine.slots"]["source"].startswith("file ")
    assert found["values"]["node.name"]["source"] == "environment FIELDMESH_NAME"
    assert cli("config", "check") == 0
    assert "engine.slots" in cli.out
    assert "FIELDMESH_ENGINE_SLOTS" not in cli.out
    assert cli("-v", "config", "check") == 0
    assert "FIELDMESH_ENGINE_SLOTS" in cli.out
    monkeypatch.setenv("FIELDMESH_PROFILE", "nobody")
    assert cli("config", "check") == 2
    assert "no profile 'nobody'" in cli.err
    (tmp_path / "fieldmesh.toml").write_text("[engine]\nslot = 2\n")
    assert cli("config", "check") == 2
    assert "did you mean engine.slots?" in cli.err


def test_the_version_is_told(cli: Commands) -> None:
    for line in (["--version"], ["version"]):
        assert cli(*line) == 0
        assert cli.out == f"fieldmesh {__version__}\n"
    assert cli("version", "--json") == 0
    assert json.loads(cli.out) == {"version": __version__}


# --- serve -------------------------------------------------------------------------------


def test_flags_of_serve_become_the_configuration(cli: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[NodeConfig] = []

    async def serve(config: NodeConfig) -> None:
        given.append(config)

    monkeypatch.setitem(sys.modules, "fieldmesh.runtime.node", SimpleNamespace(serve=serve))
    line = (
        "serve --name n --mesh m --profile code --model x.gguf --listen 0.0.0.0:1 --peer-listen 0.0.0.0:2 "
        "--insecure --advertise box --seed a:1 --seed b --no-mdns --threads 3 --slots 4 --context-tokens 512 "
        "--queue-max 5 --policy random --state-folder s --drain-timeout-s 1.5 --log-format json "
        "--log-level error"
    )
    assert cli(*line.split()) == 0
    (config,) = given
    assert (config.node.name, config.node.mesh, config.node.profile, config.node.model) == (
        "n",
        "m",
        "code",
        "x.gguf",
    )
    assert (str(config.listen.client), str(config.listen.peer), config.listen.insecure) == (
        "0.0.0.0:1",
        "0.0.0.0:2",
        True,
    )
    assert (config.listen.advertise, [str(seed) for seed in config.discovery.seeds]) == (
        "box",
        ["a:1", "b:7421"],
    )
    assert (config.discovery.mdns, config.engine.threads, config.engine.slots) == (False, 3, 4)
    assert (config.engine.context_tokens, config.engine.queue_max, config.routing.policy) == (
        512,
        5,
        "random",
    )
    assert (config.node.state_folder, config.node.drain_timeout_s) == ("s", 1.5)
    assert (config.log.format, config.log.level) == ("json", "error")


def test_a_flag_that_is_wrong_is_named_as_the_flag_it_is(cli: Commands) -> None:
    assert cli("serve", "--listen", "0.0.0.0:99999") == 2
    assert "flag --listen" in cli.err
    assert cli("serve", "--listen", "0.0.0.0:7420") == 2
    assert "--insecure" in cli.err


def test_the_base_install_says_how_to_get_the_rest(cli: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    assert cli("serve") == 2
    assert "pip install 'fieldmesh[node]'" in cli.err


def test_a_node_may_open_as_many_files_as_the_box_lets_it() -> None:
    program = (
        "import resource as r\n"
        "from fieldmesh.cli.serving import FILES_WANTED, raise_files_max\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, r.getrlimit(r.RLIMIT_NOFILE)[1]))\n"
        "raise_files_max()\n"
        "files, most = r.getrlimit(r.RLIMIT_NOFILE)\n"
        "print(files > 64 and files in (most, FILES_WANTED))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


# --- as a process ------------------------------------------------------------------------


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fieldmesh", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def long_mesh() -> Mesh:
    """Two nodes whose names would not fit a terminal."""
    offer = Offer(
        profile="a-profile-with-a-long-name",
        model="SmolLM2-135M-Instruct.Q4_1",
        domains=("clinic", "first-aid"),
        tier=1,
        context_tokens=2048,
        fingerprint="",
        node_id="",
        node_name="",
        available=True,
    )
    node = Node(
        id="a",
        name="clinic-east",
        addresses=(Address(host="192.168.1.20", port=7420),),
        state=NodeState.ALIVE,
        offers=(offer,),
        load=Load(engine=EngineState.READY, slots=4, queue_max=32, decode_tokens_per_s=100.0),
        incarnation=1,
        rtt_s=0.0012,
        peer_address="192.168.1.20:7421",
        version="0.1.0",
    )
    return Mesh(name="m", local_id="a", nodes=(node, replace(node, id="b", name="clinic-west")))


@pytest.mark.parametrize("width", [80, 100, 120, 240])
def test_long_names_lose_their_middle_so_that_no_row_is_folded(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(mesh_table(long_mesh(), width))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if "192.168.1.20:7420" in line]
    assert len(rows) == 2
    assert len([line for line in lines if line.strip()]) == 5  # the mesh, titles, a rule, two nodes
    assert ("SmolLM2-135M-Instruct.Q4_1" in rows[0]) is (width == 240)
    assert re.search(r"Smol\S*…\S*Q4_1", rows[0]) or width == 240


def test_help_loads_nothing_slow() -> None:
    code = (
        "import sys; from fieldmesh.cli.app import run; code = run(['--help']); "
        "slow = {'grpc', 'rich', 'zeroconf', 'google.protobuf', 'platformdirs', 'msgspec', 'asyncio'}; "
        "print(sorted(slow & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize("line", ["profiles list", "version --json", "--help"])
def test_a_full_disk_behind_stdout_ends_in_a_sentence(line: str) -> None:
    command = [sys.executable, "-m", "fieldmesh", *line.split()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "fieldmesh: The output could not be written: No space left on device.\n"


def test_a_reader_that_leaves_is_no_error_worth_words() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fieldmesh", "profiles", "list"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_stops_the_answer_at_the_node_and_exits_130(
    node: ScriptedNode, loop: Callable[[Any], Any]
) -> None:
    node.script.append(hangs(after=("a",)))
    process = start("ask", "--node", str(node.address), "hello")
    loop(asyncio.wait_for(node.hanging.wait(), 20))
    assert process.stdout is not None
    assert process.stdout.read(1) == "a"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    loop(asyncio.wait_for(node.cancelled.wait(), 20))


def test_a_watched_status_is_one_line_of_json_after_the_other(node: ScriptedNode) -> None:
    process = start("status", "--node", str(node.address), "--watch", "--json")
    assert process.stdout is not None
    for _ in range(2):
        assert json.loads(process.stdout.readline())["mesh"] == "test"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")


def test_ctrl_c_in_a_talk_stops_the_answer_and_keeps_what_was_said(
    node: ScriptedNode, loop: Callable[[Any], Any]
) -> None:
    node.script.append(hangs(after=("half",)))
    process = start("chat", "--node", str(node.address), stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("first\n")
    process.stdin.flush()
    assert process.stdout.read(4) == "half"
    process.send_signal(signal.SIGINT)
    loop(asyncio.wait_for(node.cancelled.wait(), 20))
    out, err = process.communicate("second\n", timeout=20)
    assert (process.returncode, out) == (0, "\nalpha\n")
    assert "stopped" in err
    assert [turn.content for turn in node.requests[-1].messages] == ["first", "half", "second"]


def test_an_encoding_that_lacks_a_character_is_no_failure(node: ScriptedNode) -> None:
    node.script.append(answers("grüß → dich"))
    process = start(
        "ask", "--node", str(node.address), "hello", env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "gr?? ? dich\n")
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_reason_to_complain(node: ScriptedNode) -> None:
    node.script.append(answers(*["word " * 1000] * 50))
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "fieldmesh", "ask", "--node", str(node.address), "hello"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert os.read(reader, 4) == b"word"
    os.close(reader)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err == ""
