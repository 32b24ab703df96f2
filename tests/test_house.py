"""The habits that keep the house in order, held by a test.

Goal: what ARCHITECTURE.md promises about the tree stays true. Method: read every file with ``ast``, so that
an import inside a function counts and nothing is run. Which room may import which is import-linter's subject
(``make check``); here is what it cannot see.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "node" / "fieldmesh"

# Who alone may import a foreign library: modules, or rooms (ending in a slash), below node/fieldmesh.
FOREIGN = {
    "pycrdt": ("core/replica",),
    "llama_cpp": ("engine/llama", "engine/encoder"),
    "llguidance": ("engine/grammars",),
    "zeroconf": ("runtime/discovery", "client/discovery"),
    "grpc": ("runtime/", "client/", "v1/"),
    "grpc_health": ("runtime/", "client/"),
    "grpc_reflection": ("runtime/",),
    "cryptography": ("runtime/",),
    "prometheus_client": ("runtime/metrics",),
    "structlog": ("runtime/",),
    "starlette": (
        *("runtime/http_door", "runtime/http_openai", "runtime/http_responses", "runtime/http_ollama"),
        "runtime/http_page",
    ),
    "uvicorn": ("runtime/http_server", "runtime/http_protocol"),
    "opentelemetry": ("runtime/otlp",),
    "h11": ("runtime/http_protocol",),
    "typer": ("cli/", "__main__"),
    "rich": ("cli/", "__main__"),
}
# What the base install does not bring.
NODE_ONLY = (
    *("cryptography", "grpc_health", "grpc_reflection", "llama_cpp", "llguidance", "numpy"),
    *("opentelemetry", "prometheus_client", "pycrdt", "starlette", "structlog", "uvicorn"),
)
# What the core must not touch: it performs no I/O, has no clock and draws no randomness of its own.
CORE_BANNED = frozenset(
    {
        *("asyncio", "concurrent", "multiprocessing", "queue", "threading", "subprocess", "signal", "select"),
        *("datetime", "time", "secrets", "uuid", "contextvars", "weakref"),
        *("fcntl", "io", "os", "pathlib", "platform", "shutil", "sys", "tempfile", "logging"),
        *("http", "socket", "ssl", "urllib"),
    }
)
CORE_BANNED_CALLS = frozenset({"open", "print", "input", "exec", "eval", "id"})


def _files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every absolute import; the name is empty for ``import module``."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)


def _calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name of what is called, as it is written."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node, ast.unparse(node.func)


def _own_modules() -> list[Path]:
    return [path for path in _files(PACKAGE) if path.parent.name != "v1"]


def _core() -> list[Path]:
    return _files(PACKAGE / "core")


def test_every_module_says_what_it_is() -> None:
    everything = [
        *_own_modules(),
        *_files(*(ROOT / f for f in ("simulations", "tests", "benchmarks", "deploy"))),
    ]
    silent = [
        _name(path) for path in everything if path.stat().st_size and not ast.get_docstring(_tree(path))
    ]
    assert silent == []


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./]+", page))
    missing = []
    for path in _own_modules():
        room_and_stem = path.relative_to(PACKAGE).with_suffix("").as_posix()
        stem = path.stem
        if stem != "__init__" and not {stem, f"{stem}.py", room_and_stem, f"{room_and_stem}.py"} & named:
            missing.append(room_and_stem)
    assert missing == []


def test_foreign_libraries_come_in_by_one_door() -> None:
    strays = []
    for path in _files(PACKAGE):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        for line, imported, _ in _imports(path):
            doors = FOREIGN.get(imported.partition(".")[0])
            if doors and not any(module == d or (d.endswith("/") and module.startswith(d)) for d in doors):
                strays.append(f"{_name(path)}:{line} imports {imported}")
    assert strays == []


def test_the_core_imports_nothing_that_acts_or_tells_the_time() -> None:
    acting = [
        f"{_name(path)}:{line} imports {module}"
        for path in _core()
        for line, module, _ in _imports(path)
        if module.partition(".")[0] in CORE_BANNED
    ]
    assert acting == []


def test_the_core_is_given_its_randomness() -> None:
    own = [
        f"{_name(path)}:{line} takes {name or 'the module'} from random"
        for path in _core()
        for line, module, name in _imports(path)
        if module == "random" and name != "Random"
    ]
    own += [
        f"{_name(path)}:{call.lineno} makes an unseeded Random"
        for path in _core()
        for call, name in _calls(path)
        if name == "Random" and not call.args
    ]
    assert own == []


def test_the_core_waits_for_nothing_and_writes_nothing() -> None:
    found = [
        f"{_name(path)}:{node.lineno} is asynchronous"
        for path in _core()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Await)
    ]
    found += [
        f"{_name(path)}:{call.lineno} calls {name}"
        for path in _core()
        for call, name in _calls(path)
        if name in CORE_BANNED_CALLS
    ]
    assert found == []


def test_every_queue_has_a_maximum() -> None:
    queues = {"Queue", "LifoQueue", "PriorityQueue", "SimpleQueue"}
    unbounded = [
        f"{_name(path)}:{call.lineno} {ast.unparse(call)}"
        for path in _own_modules()
        for call, name in _calls(path)
        if name.rpartition(".")[2] in queues
        and not call.args
        and not any(k.arg == "maxsize" for k in call.keywords)
    ]
    assert unbounded == []


def _sleeps(call: ast.Call, name: str) -> bool:
    """A call that waits for time to pass. ``asyncio.sleep(0)`` waits for a turn, not for time."""
    if name not in {"sleep", "time.sleep", "asyncio.sleep", "anyio.sleep", "trio.sleep"}:
        return False
    return not (call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0)


def test_no_test_sleeps() -> None:
    sleepers = [
        f"{_name(path)}:{call.lineno}"
        for path in _files(ROOT / "tests")
        for call, name in _calls(path)
        if _sleeps(call, name)
    ]
    assert sleepers == []


@pytest.mark.parametrize(
    ("source", "sleeps"),
    [
        ("time.sleep(0.1)", True),
        ("asyncio.sleep(1)", True),
        ("asyncio.sleep(pause)", True),
        ("asyncio.sleep(0)", False),
        ("clock.advance(1)", False),
    ],
)
def test_a_sleep_is_told_from_a_turn(source: str, sleeps: bool) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert _sleeps(call, ast.unparse(call.func)) is sleeps


def test_test_files_have_unique_names() -> None:
    names = Counter(path.name for path in _files(ROOT / "tests") if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_client_and_command_line_start_without_what_only_a_node_installs() -> None:
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({NODE_ONLY!r}))\n"  # None there makes an import fail
        "import fieldmesh.client\n"
        "from fieldmesh.__main__ import main\n"
        "sys.argv[1:] = ['--help']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout


# --- what is installed --------------------------------------------------------------------------------------


def _pins(file: str) -> dict[str, list[str]]:
    """Versions by package name, as the requirements file pins them."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "requirements" / file).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line[:1].isalnum():
            name, _, version = line.split(";")[0].split("--hash")[0].strip().partition("==")
            found.setdefault(canonicalize_name(name), []).append(version.strip())
    return found


def _declared(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chosen = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for group in chosen for line in group]


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("base.txt", ()),
        ("node.txt", ("node",)),
        ("otel.txt", ("node", "otel")),
        ("dev.txt", ("node", "otel", "dev")),
    ],
)
def test_what_the_project_declares_is_pinned(file: str, extras: tuple[str, ...]) -> None:
    pins = _pins(file) | _pins("engine.txt")
    wrong = [
        f"{wanted} against {pins.get(canonicalize_name(wanted.name), 'nothing')}"
        for wanted in _declared(*extras)
        if not any(
            wanted.specifier.contains(version) for version in pins.get(canonicalize_name(wanted.name), ())
        )
    ]
    assert wrong == [], "run: make lock"


def test_one_package_has_one_version_in_all_files() -> None:
    everything = _pins("dev.txt")
    different = [
        f"{file}: {name} {versions} against {everything[name]}"
        for file in ("base.txt", "node.txt", "otel.txt", "build.txt")
        for name, versions in _pins(file).items()
        if versions != everything[name]
    ]
    assert different == [], "run: make lock"


def test_every_pin_has_hashes_and_no_file_names_a_registry() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        assert "://" not in text, path.name
        entries = [entry for entry in text.replace("\\\n", " ").splitlines() if entry[:1].isalnum()]
        assert entries, path.name
        assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == [], path.name
