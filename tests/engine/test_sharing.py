"""Goal: engines over one file share a process and its weights, and nothing else: what one does is not seen in
the others' answers, and its end leaves them alone. Method: real processes with a tiny model, and the default
model where memory is counted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from fieldmesh.core.errors import EngineLost, ModelFileInvalid
from fieldmesh.core.model import Adapter, EngineState
from fieldmesh.engine.fit import PROCESS_BYTES
from fieldmesh.engine.host import EngineProcess, sharing
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import GREEDY, ask, collect, drain, job, wait_load
from tests.engine.tiny_model import default_model_path, write_tiny_adapter

LONG = replace(GREEDY, max_tokens=3000)
MIB = 1 << 20


class Start(Protocol):
    async def __call__(self, settings: EngineSettings) -> EngineProcess: ...


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts engines that share; they are closed in the end."""
    make = sharing()
    async with AsyncExitStack() as stack:

        async def started(settings: EngineSettings) -> EngineProcess:
            engine = make(settings)
            stack.push_async_callback(engine.close)
            await engine.start()
            return engine

        yield started


@pytest.fixture
def plain(tiny_model: Path) -> EngineSettings:
    return EngineSettings(model_path=str(tiny_model), slots=2, context_tokens=4096, restart_backoff_s=0.01)


@pytest.fixture
def adapted(plain: EngineSettings, tmp_path: Path) -> EngineSettings:
    return replace(plain, adapters=(Adapter(path=str(write_tiny_adapter(tmp_path / "a.gguf"))),))


async def alone(settings: EngineSettings) -> list[int]:
    engine = EngineProcess(settings)
    await engine.start()
    answer = await ask(engine, job("alone"))
    await engine.close()
    return answer.token_ids


def copied(settings: EngineSettings, path: Path) -> Path:
    path.write_bytes(Path(settings.model_path).read_bytes())
    return path


async def test_each_answers_with_its_own_adapter_as_it_does_alone(
    start: Start, plain: EngineSettings, adapted: EngineSettings
) -> None:
    expected = [await alone(plain), await alone(adapted)]
    assert expected[0] != expected[1]
    engines = [await start(plain), await start(adapted)]
    assert engines[0].pid == engines[1].pid
    for _ in range(3):
        answers = await asyncio.gather(*(ask(engine, job("together")) for engine in engines))
        assert [answer.token_ids for answer in answers] == expected


async def test_another_file_has_another_process(start: Start, plain: EngineSettings, tmp_path: Path) -> None:
    copy = copied(plain, tmp_path / "copy.gguf")
    engines = [await start(plain), await start(replace(plain, model_path=str(copy)))]
    assert engines[0].pid != engines[1].pid


async def test_a_file_that_was_replaced_is_read_anew(
    start: Start, plain: EngineSettings, tmp_path: Path
) -> None:
    path = copied(plain, tmp_path / "changing.gguf")
    settings = replace(plain, model_path=str(path))
    first = await start(settings)
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes().replace(b"general.name", b"general.nome"))
    other.replace(path)
    second = await start(settings)
    assert first.info is not None and second.info is not None
    assert first.info.fingerprint != second.info.fingerprint
    assert (await ask(first, job("a"))).token_ids == (await ask(second, job("b"))).token_ids


async def test_the_end_of_one_does_not_disturb_the_stream_of_another(
    start: Start, plain: EngineSettings, adapted: EngineSettings
) -> None:
    stays, goes = await start(plain), await start(adapted)
    expected = (await ask(stays, job("before", sampling=replace(GREEDY, max_tokens=300)))).token_ids
    stream = asyncio.create_task(
        collect(stays.submit(job("during", sampling=replace(GREEDY, max_tokens=300))))
    )
    abandoned = goes.submit(job("abandoned", sampling=LONG))
    await anext(abandoned)
    await goes.close()
    with pytest.raises(EngineLost):
        await drain(abandoned)
    assert (await stream).token_ids == expected
    assert stays.state is EngineState.READY
    again = await start(adapted)
    assert again.pid == stays.pid
    await ask(again, job("again"))


async def test_the_process_ends_with_the_last_of_them(plain: EngineSettings, adapted: EngineSettings) -> None:
    make = sharing()
    engines = [make(plain), make(adapted)]
    await asyncio.gather(*(engine.start() for engine in engines))
    pid = engines[0].pid
    assert pid is not None
    await engines[0].close()
    assert psutil.pid_exists(pid)
    await engines[1].close()
    assert not psutil.pid_exists(pid)


async def test_one_that_is_refused_leaves_the_others_alone(
    start: Start, plain: EngineSettings, tmp_path: Path
) -> None:
    engine = await start(plain)
    pid = engine.pid
    wrong = write_tiny_adapter(tmp_path / "wrong.gguf", up_rank=3)
    with pytest.raises(ModelFileInvalid, match="adapter"):
        await start(replace(plain, adapters=(Adapter(path=str(wrong)),)))
    await ask(engine, job("after"))
    assert (engine.pid, engine.state) == (pid, EngineState.READY)


async def test_a_process_that_dies_is_replaced_for_all_of_them(
    start: Start, plain: EngineSettings, adapted: EngineSettings
) -> None:
    engines = [await start(plain), await start(adapted)]
    streams = [engine.submit(job("lost", sampling=LONG)) for engine in engines]
    for stream in streams:
        await anext(stream)
    pid = engines[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineLost, match="signal 9"):
            await drain(stream)
    for engine in engines:
        await wait_load(engine, lambda load: load.engine is EngineState.READY)
        await ask(engine, job("after"))
    assert engines[0].pid == engines[1].pid != pid


async def test_a_process_that_is_stuck_is_killed_by_whoever_leaves(
    plain: EngineSettings, adapted: EngineSettings
) -> None:
    make = sharing()
    engines = [make(replace(plain, watchdog_s=1)), make(adapted)]
    await asyncio.gather(*(engine.start() for engine in engines))
    pid = engines[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await engines[0].close()
    await wait_load(engines[1], lambda load: load.engine is EngineState.READY and engines[1].pid != pid)
    await engines[1].close()


@pytest.mark.engine
async def test_the_weights_are_in_memory_once_and_a_context_gives_back_its_own(start: Start) -> None:
    settings = EngineSettings(model_path=str(default_model_path()), slots=2, context_tokens=1024)
    first = await start(settings)
    assert first.pid is not None
    process = psutil.Process(first.pid)
    single = process.memory_info().rss
    second = await start(settings)
    both = process.memory_info().rss
    weights = default_model_path().stat().st_size
    assert both - single < single - weights - PROCESS_BYTES // 2
    await second.close()
    assert process.memory_info().rss < single + 24 * MIB
