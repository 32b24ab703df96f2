"""The configuration: precedence, refusals that help, and no input that ends in a traceback."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fieldmesh.config import FILE_BYTES_MAX, ListenSlice, NodeConfig, load, options
from fieldmesh.core.errors import ConfigError
from fieldmesh.core.model import Address


@pytest.fixture(autouse=True)
def _no_user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


def write(folder: Path, text: str, name: str = "fieldmesh.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def refusal(
    flags: dict[str, object] | None = None, *, environ: dict[str, str] | None = None, file: Path | None = None
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(flags, environ=environ or {}, file=file, folder=Path("/nonexistent"))
    return caught.value


def test_the_metrics_listener_is_an_address_or_off(tmp_path: Path) -> None:
    assert load(environ={}, folder=tmp_path).values()["listen.metrics"] == "127.0.0.1:7419"
    off = load(environ={"FIELDMESH_LISTEN_METRICS": "off"}, folder=tmp_path)
    assert off.config.listen.metrics is None
    assert off.values()["listen.metrics"] == "off"
    assert "off, or an address" in refusal({"listen.metrics": "x:y:z"}).message
    same = refusal({"listen.metrics": "127.0.0.1:7420"})
    assert same.field == "listen.metrics"


# --- precedence --------------------------------------------------------------------------


def test_nothing_given_is_a_node_on_loopback(tmp_path: Path) -> None:
    loaded = load(environ={}, folder=tmp_path)
    assert loaded.config.listen.client == Address(host="127.0.0.1", port=7420)
    assert loaded.config.listen.peer == Address(host="127.0.0.1", port=7421)
    assert loaded.file is None
    assert set(loaded.sources.values()) == {"default"}


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "[engine]\nthreads = 1\nslots = 1\nqueue_max = 1\n")
    environ = {"FIELDMESH_ENGINE_THREADS": "2", "FIELDMESH_ENGINE_SLOTS": "2"}
    loaded = load({"engine.threads": 3}, environ=environ, folder=tmp_path)
    engine = loaded.config.engine
    assert (engine.threads, engine.slots, engine.queue_max) == (3, 2, 1)
    assert loaded.sources["engine.threads"] == "flag --threads"
    assert loaded.sources["engine.slots"] == "environment FIELDMESH_ENGINE_SLOTS"
    assert loaded.sources["engine.queue_max"] == f"file {path}"
    assert loaded.sources["engine.batch_tokens"] == "default"


def test_files_are_looked_for_in_order_and_only_the_first_is_read(tmp_path: Path) -> None:
    user = write(tmp_path / "xdg" / "fieldmesh", '[node]\nmesh = "user"\nprofile = "code"\n')
    assert load(environ={}, folder=tmp_path).file == user
    project = write(tmp_path, '[node]\nmesh = "project"\n')
    loaded = load(environ={}, folder=tmp_path)
    assert (loaded.file, loaded.config.node.mesh, loaded.config.node.profile) == (
        project,
        "project",
        "general",
    )
    named = write(tmp_path, '[node]\nmesh = "named"\n', "other.toml")
    assert load(environ={"FIELDMESH_CONFIG": str(named)}, folder=tmp_path).config.node.mesh == "named"
    flagged = write(tmp_path, '[node]\nmesh = "flagged"\n', "third.toml")
    assert load(environ={"FIELDMESH_CONFIG": str(named)}, file=flagged).config.node.mesh == "flagged"


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    assert load(environ={"FIELDMESH_ENGINE_THREADS": ""}, folder=tmp_path).config.engine.threads == 0


def test_options_of_the_node_have_short_variables(tmp_path: Path) -> None:
    config = load(environ={"FIELDMESH_NAME": "kitchen", "FIELDMESH_MODEL": "/m.gguf"}, folder=tmp_path).config
    assert (config.node.name, config.node.model) == ("kitchen", "/m.gguf")


def test_the_state_folder_is_one_for_each_mesh_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config = load({"node.mesh": "home", "node.name": "attic"}, environ={}, folder=tmp_path).config
    assert config.state_folder == tmp_path / "fieldmesh" / "home" / "attic"
    chosen = load({"node.state_folder": str(tmp_path / "own")}, environ={}, folder=tmp_path).config
    assert chosen.state_folder == tmp_path / "own"


# --- values ------------------------------------------------------------------------------


def test_a_variable_lists_seeds_with_commas_and_a_file_with_a_list(tmp_path: Path) -> None:
    wanted = (
        Address(host="10.0.0.1", port=7421),
        Address(host="fe80::1", port=9),
        Address(host="box", port=1),
    )
    environ = {"FIELDMESH_DISCOVERY_SEEDS": "10.0.0.1, [fe80::1]:9,box:1"}
    assert load(environ=environ, folder=tmp_path).config.discovery.seeds == wanted
    path = write(tmp_path, '[discovery]\nseeds = ["10.0.0.1:7421", "[fe80::1]:9", "box:1"]\n')
    assert load(environ={}, file=path).config.discovery.seeds == wanted


@pytest.mark.parametrize(("word", "value"), [("true", True), ("0", False), ("Yes", True), ("off", False)])
def test_a_variable_says_yes_and_no_in_the_usual_words(tmp_path: Path, word: str, value: bool) -> None:
    assert load(environ={"FIELDMESH_DISCOVERY_MDNS": word}, folder=tmp_path).config.discovery.mdns is value


def test_effective_values_read_back_as_what_they_were(tmp_path: Path) -> None:
    first = load({"discovery.seeds": "a:1,b:2", "node.name": "x"}, environ={}, folder=tmp_path)
    again = load(first.values(), environ={}, folder=tmp_path)
    assert again.config == first.config


# --- refusals ----------------------------------------------------------------------------


def test_an_unknown_variable_is_refused_with_the_nearest_name() -> None:
    error = refusal(environ={"FIELDMESH_ENGINE_THREAD": "1"})
    assert "FIELDMESH_ENGINE_THREADS" in error.message
    assert "environment" in error.message


def test_variables_that_a_cluster_sets_for_a_service_are_not_options(tmp_path: Path) -> None:
    environ = {
        "FIELDMESH_SERVICE_HOST": "10.0.0.9",
        "FIELDMESH_SERVICE_PORT_GRPC": "7420",
        "FIELDMESH_PORT": "tcp://10.0.0.9:7420",
        "FIELDMESH_PORT_7420_TCP_ADDR": "10.0.0.9",
        "FIELDMESH_NODE": "10.0.0.9:7420",
    }
    assert set(load(environ=environ, folder=tmp_path).sources.values()) == {"default"}
    assert refusal(environ={"FIELDMESH_PORT": "7420"}).code == "CONFIG_INVALID"


def test_an_unknown_key_is_refused_with_its_file_and_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, "[limits]\nhops = 1\n")
    error = refusal(file=path)
    assert "limits.hops_max" in error.message
    assert str(path) in error.message
    moved = refusal(file=write(tmp_path, "[node]\nqueue_max = 1\n"))
    assert "engine.queue_max" in moved.message
    assert "did you mean engine?" in refusal(file=write(tmp_path, "[engines]\n")).message


def test_a_value_at_the_top_of_the_file_is_no_table(tmp_path: Path) -> None:
    assert "must be a table" in refusal(file=write(tmp_path, "node = 1\n")).message


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("engine.threads", -1, "a whole number from 0 to 1024"),
        ("engine.threads", 1.5, "a whole number from 0 to 1024"),
        ("engine.threads", True, "a whole number from 0 to 1024"),
        ("engine.threads", "many", "a whole number from 0 to 1024"),
        ("limits.request_timeout_s", float("nan"), "a number from 1 to 86400 seconds"),
        ("limits.request_timeout_s", "inf", "a number from 1 to 86400 seconds"),
        ("limits.message_bytes_max", 1, "a whole number from 65536 to 67108864 bytes"),
        ("node.name", "two words", "1 to 63 letters"),
        ("node.name", "../up", "1 to 63 letters"),
        ("node.mesh", "", "1 to 63 letters"),
        ("node.profile", "a\0b", "names of profiles"),
        ("discovery.mdns", "perhaps", "true or false"),
        ("discovery.mdns", 1, "true or false"),
        ("routing.policy", "best", "one of expected-time, round-robin, least-loaded, random"),
        ("log.level", ["info"], "one of debug, info, warning, error"),
        ("listen.client", "127.0.0.1:70000", "a port from 0 to 65535"),
        ("listen.client", "::1", "an address such as"),
        ("listen.client", "[nonsense]:1", "an address such as"),
        ("listen.client", 7420, "an address such as"),
        ("discovery.seeds", ["a:0"], "a port from 1 to 65535"),
        ("discovery.seeds", ["a"] * 65, "at most 64 addresses"),
        ("discovery.seeds", [["a"]], "an address such as"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_what_is_accepted(
    key: str, value: object, accepted: str
) -> None:
    error = refusal({key: value})
    assert error.message.startswith(f"{key} is ")
    assert accepted in error.message
    assert "(flag --" in error.message
    assert error.field == key


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "[::]", "box"])
def test_a_listener_that_others_reach_needs_the_word_insecure(tmp_path: Path, host: str) -> None:
    error = refusal({"listen.client": f"{host}:7420"})
    assert "--insecure" in error.message
    flags = {"listen.client": f"{host}:7420", "listen.insecure": True}
    assert load(flags, environ={}, folder=tmp_path).config.listen.insecure


@pytest.mark.parametrize("host", ["localhost", "127.8.8.8", "[::1]"])
def test_a_loopback_listener_needs_no_word(tmp_path: Path, host: str) -> None:
    load({"listen.client": f"{host}:0", "listen.peer": f"{host}:0"}, environ={}, folder=tmp_path)


def test_one_port_cannot_be_both_listeners() -> None:
    config = NodeConfig(
        listen=replace(ListenSlice(), peer=Address(host="127.0.0.1", port=7420)),
    )
    with pytest.raises(ConfigError, match="two ports"):
        config.validate()


def test_a_chunk_of_a_prompt_fits_a_batch_and_a_prompt_a_message() -> None:
    assert "batch_tokens" in refusal({"engine.batch_tokens": 500, "engine.prefill_chunk_tokens": 600}).message
    assert "0 or at least 32" in refusal({"engine.batch_tokens": 31}).message
    assert "message_bytes_max" in refusal({"limits.prompt_bytes_max": 5_000_000}).message


def test_an_unknown_home_folder_is_refused() -> None:
    assert "home folder" in refusal({"node.state_folder": "~nobody-of-that-name/x"}).message


@pytest.mark.parametrize(
    "content", [b"[node", b"\xff\xfe", b"a = " + b"[" * 100_000, b"#" * (FILE_BYTES_MAX + 1)]
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert str(path) in refusal(file=path).message


def test_a_file_that_was_named_must_be_readable(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(file=tmp_path / "missing.toml").message
    assert "cannot be read" in refusal(environ={"FIELDMESH_CONFIG": str(tmp_path)}).message


def test_every_option_has_a_default_within_its_own_bounds(tmp_path: Path) -> None:
    defaults = load(environ={}, folder=tmp_path)
    for key, value in defaults.values().items():
        assert load({key: value}, environ={}, folder=tmp_path).values()[key] == value


# --- noise -------------------------------------------------------------------------------

_variables = st.sampled_from([option.variable for option in options().values()])
_texts = st.text(
    st.characters(exclude_characters="\0", exclude_categories=()), max_size=40
) | st.sampled_from(["0", "-1", "1e999", "nan", "true", "a:1", "[::1]:1", "~", "~x/y", "9" * 5000])


@given(environ=st.dictionaries(_variables, _texts, max_size=4))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_environment_makes_anything_but_a_configuration_or_a_refusal(environ: dict[str, str]) -> None:
    try:
        load(environ=environ, folder=Path("/nonexistent"))
    except ConfigError as error:
        assert len(error.message) < 2000


_keys = st.sampled_from([option.name for option in options().values()]) | st.text(
    string.ascii_lowercase + "_-", min_size=1, max_size=12
)
_sections = st.sampled_from(["node", "listen", "discovery", "engine", "limits", "routing", "log", "other"])
_literals = st.sampled_from(
    [
        "1",
        "-1",
        "1.5",
        "nan",
        "inf",
        '"x"',
        "true",
        "[]",
        "[1]",
        '["a:1"]',
        "{a=1}",
        "1979-05-27",
        "0x" + "f" * 9000,
    ]
)


@given(lines=st.lists(st.tuples(_sections, _keys, _literals), max_size=4), junk=st.text(max_size=20))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_makes_anything_but_a_configuration_or_a_refusal(
    tmp_path: Path, lines: list[tuple[str, str, str]], junk: str
) -> None:
    path = tmp_path / "noise.toml"
    text = "".join(f"{section}.{key} = {value}\n" for section, key, value in lines) + f"# {junk}\n"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        load(environ={}, file=path)
    except ConfigError as error:
        assert len(error.message) < 2000
