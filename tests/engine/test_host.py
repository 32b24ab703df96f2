"""Goal: whatever happens to the engine's process, the host lives, says so, and comes back. Method: real
processes with a tiny model; killing, freezing and starving them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from fieldmesh.core.errors import ConfigError, EngineLost, EngineNotReady, Internal, ModelFileInvalid
from fieldmesh.core.model import EngineState, Prompt
from fieldmesh.engine.frames import Report, Statistics
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import GREEDY, ask, drain, job, wait_load
from tests.engine.tiny_model import write_crashing_model


@pytest.fixture
def settings(tiny_model: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(tiny_model), slots=2, context_tokens=4096, restart_backoff_s=0.01, crashes_max=3
    )


@pytest.fixture
async def engine(settings: EngineSettings) -> AsyncIterator[EngineProcess]:
    made = EngineProcess(settings)
    await made.start()
    yield made
    await made.close()


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def cut_short(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes()[:-100])
    return target


def without_a_tensor(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.9.attn_q.weight"))
    return target


def oom_score_adjustment(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def ready(load: object) -> bool:
    return load.engine is EngineState.READY  # type: ignore[attr-defined]


LONG = replace(GREEDY, max_tokens=4000)


async def paused_job(engine: EngineProcess, name: str) -> AsyncIterator[object]:
    """A job that runs for as long as nobody reads it."""
    events = engine.submit(job(name, sampling=LONG))
    await anext(events)
    return events


async def test_start_says_what_was_loaded(engine: EngineProcess, tiny_model: Path) -> None:
    info = engine.info
    assert info is not None
    assert (info.model, info.architecture, info.slots, info.vocabulary_tokens) == ("tiny", "llama", 2, 297)
    assert info.fingerprint == sha256(tiny_model)


async def test_a_killed_process_ends_its_jobs_and_is_replaced(engine: EngineProcess) -> None:
    streams = [await paused_job(engine, f"j{i}") for i in range(4)]
    old = engine.pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineLost, match="signal 9"):
            await drain(stream)  # type: ignore[arg-type]
    await wait_load(engine, ready)
    assert engine.pid not in (None, old)
    await ask(engine, job("after"))


async def test_an_instruction_that_the_processor_lacks_is_explained(engine: EngineProcess) -> None:
    stream = await paused_job(engine, "j")
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGILL)
    with pytest.raises(EngineLost, match=r"signal 4: .* another processor, .* make install"):
        await drain(stream)  # type: ignore[arg-type]


async def test_a_lost_engine_refuses_and_does_not_look_idle(engine: EngineProcess) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    load = await wait_load(engine, lambda load: load.engine is not EngineState.READY)
    assert not load.accepting
    with pytest.raises(EngineNotReady) as refused:
        await ask(engine, job("a"))
    assert refused.value.retry_after_s


async def test_a_tokenize_request_ends_with_its_process(engine: EngineProcess) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    request = asyncio.create_task(engine.tokenize(Prompt(text="x")))
    await asyncio.wait([request], timeout=0.05)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineLost):
        await request


async def test_an_engine_that_keeps_crashing_is_given_up(engine: EngineProcess) -> None:
    for _ in range(engine.settings.crashes_max):
        await wait_load(engine, ready)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await wait_load(engine, lambda load: load.engine is not EngineState.READY)
    await wait_load(engine, lambda load: load.engine is EngineState.FAILED)
    with pytest.raises(EngineNotReady, match="given up after 3 crashes"):
        await ask(engine, job("a"))


async def test_a_model_that_crashes_the_library_is_given_up_soon(
    settings: EngineSettings, tiny_model: Path, tmp_path: Path
) -> None:
    path = write_crashing_model(tiny_model, tmp_path / "crash.gguf")
    engine = EngineProcess(replace(settings, model_path=str(path), crashes_max=31))
    with pytest.raises(EngineNotReady, match=r"given up after 5 crashes and no load succeeded.*signal 6"):
        await engine.start()
    assert engine.state is EngineState.FAILED and not engine.load().accepting
    assert engine.tally.restarts == 4
    await engine.close()


async def test_a_process_that_is_killed_while_it_loads_is_tried_on(settings: EngineSettings) -> None:
    engine = EngineProcess(replace(settings, crashes_max=31))
    starting = asyncio.create_task(engine.start())
    killed: set[int] = set()
    while len(killed) < 6:
        await wait_load(engine, lambda load: load.engine is EngineState.LOADING)
        while engine.pid is None or engine.pid in killed:  # noqa: ASYNC110
            await asyncio.sleep(0)
        killed.add(engine.pid)
        os.kill(engine.pid, signal.SIGKILL)
    await starting
    await engine.close()


class Stuck(EngineProcess):
    """A process that answers and makes no steps, as far as its host can see."""

    stuck = True

    def _take(self, report: Report) -> None:
        if self.stuck and isinstance(report, Statistics):
            report = msgspec.structs.replace(report, steps=1, load=replace(report.load, running=1))
        super()._take(report)


async def test_a_process_that_answers_but_computes_nothing_is_killed_and_replaced(
    settings: EngineSettings,
) -> None:
    engine = Stuck(replace(settings, watchdog_s=1))
    await engine.start()
    old = engine.pid
    with pytest.raises(EngineLost, match="signal 9"):
        while True:  # ever new work, each of it read
            await ask(engine, job("a", sampling=LONG))
    engine.stuck = False
    await wait_load(engine, ready)
    assert engine.pid != old
    await engine.close()


async def test_a_finished_generation_forgives_earlier_crashes(engine: EngineProcess) -> None:
    for number in range(engine.settings.crashes_max + 1):
        await wait_load(engine, ready)
        await ask(engine, job(f"j{number}"))
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await wait_load(engine, lambda load: load.engine is not EngineState.READY)
    await wait_load(engine, ready)


async def test_a_frozen_process_is_killed_and_replaced(settings: EngineSettings) -> None:
    engine = EngineProcess(replace(settings, watchdog_s=1))
    await engine.start()
    stream = await paused_job(engine, "a")
    old = engine.pid
    assert old is not None
    os.kill(old, signal.SIGSTOP)
    with pytest.raises(EngineLost, match="signal 9"):
        await drain(stream)  # type: ignore[arg-type]
    await wait_load(engine, ready)
    assert engine.pid != old
    await engine.close()


async def test_an_idle_process_is_left_alone_by_the_watchdog(settings: EngineSettings) -> None:
    engine = EngineProcess(replace(settings, watchdog_s=1))
    await engine.start()
    await wait_load(engine, ready)
    with pytest.raises(TimeoutError):
        await wait_load(engine, lambda load: load.engine is not EngineState.READY, timeout_s=1.6)
    await engine.close()


async def test_close_leaves_no_process(settings: EngineSettings) -> None:
    engine = EngineProcess(settings)
    await engine.start()
    pid = engine.pid
    assert pid is not None
    await engine.close()
    assert not psutil.pid_exists(pid)
    await engine.close()


async def test_close_while_loading_ends_start(settings: EngineSettings) -> None:
    engine = EngineProcess(settings)
    starting = asyncio.create_task(engine.start())
    while engine.pid is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineNotReady, match="closed"):
        await starting


async def test_close_before_the_process_is_there_leaves_none(settings: EngineSettings) -> None:
    engine = EngineProcess(settings)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineNotReady, match="closed"):
        await starting
    assert psutil.Process().children() == []


async def test_an_engine_is_started_once(engine: EngineProcess) -> None:
    with pytest.raises(Internal):
        await engine.start()


async def test_the_process_goes_first_for_memory_and_is_deaf_to_ctrl_c(engine: EngineProcess) -> None:
    pid = engine.pid
    assert pid is not None
    assert oom_score_adjustment(pid) == 1000
    os.kill(pid, signal.SIGINT)
    await ask(engine, job("a"))
    assert engine.pid == pid


HOST = """
import asyncio, sys
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.settings import EngineSettings

async def main():
    engine = EngineProcess(EngineSettings(model_path=sys.argv[1], context_tokens=256))
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_the_process_dies_with_its_host(tiny_model: Path) -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST, str(tiny_model)], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    engine = psutil.Process(int(host.stdout.readline()))
    host.kill()
    host.wait()
    host.stdout.close()
    assert psutil.wait_procs([engine], timeout=5)[1] == []


# --- files that cannot be loaded ---------------------------------------------------------------


async def refusal(path: Path, **settings: object) -> str:
    engine = EngineProcess(EngineSettings(model_path=str(path), context_tokens=256, **settings))  # type: ignore[arg-type]
    with pytest.raises(ModelFileInvalid) as refused:
        await engine.start()
    assert engine.load().engine is EngineState.FAILED
    await engine.close()
    assert refused.value.field == "model_path"
    return refused.value.message


async def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "does not exist" in await refusal(tmp_path / "nothing.gguf")


async def test_a_truncated_file_is_told_from_a_sound_one(tiny_model: Path, tmp_path: Path) -> None:
    assert "download is incomplete" in await refusal(cut_short(tiny_model, tmp_path / "cut.gguf"))


async def test_a_file_that_llama_cpp_refuses_is_told_with_its_words(tiny_model: Path, tmp_path: Path) -> None:
    assert "blk.1.attn_q.weight" in await refusal(without_a_tensor(tiny_model, tmp_path / "odd.gguf"))


async def test_more_context_than_the_model_was_trained_for_is_refused(tiny_model: Path) -> None:
    engine = EngineProcess(EngineSettings(model_path=str(tiny_model), context_tokens=9000))
    with pytest.raises(ConfigError, match="at most 8192"):
        await engine.start()
    await engine.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_path": ""}, "model_path"),
        ({"slots": 0}, "slots"),
        ({"slots": 65}, "slots"),
        ({"threads": 0}, "threads"),
        ({"context_tokens": 8}, "context_tokens"),
        ({"mixed_tokens": 4, "slots": 4}, "mixed_tokens"),
        ({"queue_max": -1}, "queue_max"),
        ({"watchdog_s": float("nan")}, "watchdog_s"),
    ],
)
def test_settings_out_of_bounds_are_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineProcess(replace(EngineSettings(model_path="x"), **change))  # type: ignore[arg-type]
    assert refused.value.field == field
