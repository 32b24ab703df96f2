"""Goal: a sequence goes on in another process as if it had never left, or is refused in words. Method: two
engine processes over a tiny random model; envelopes changed byte by byte."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from fieldmesh.core.errors import EngineLost, GenerationNotFound, StateRefused
from fieldmesh.core.model import Chunk, Completion, EngineState, Prompt, Sampling
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Job, JobEvent
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import BLOCK_BYTES, SequenceState, blocks, unpacked
from tests.engine.asking import ask, collect, job, wait_load

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = tuple(3 + (7 * i) % 290 for i in range(200))
GREEDY = Sampling(temperature=0.0, max_tokens=400, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=1.5, seed=11)


def settings(model: Path, **more: object) -> EngineSettings:
    made = EngineSettings(model_path=str(model), slots=2, context_tokens=1024, state_bytes_max=1 << 26)
    return replace(made, **more)  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tiny_model: Path) -> AsyncIterator[tuple[EngineProcess, EngineProcess]]:
    made = EngineProcess(settings(tiny_model)), EngineProcess(settings(tiny_model))
    for engine in made:
        await engine.start()
    yield made
    for engine in made:
        await engine.close()


async def tokens(events: AsyncIterator[JobEvent], count: int) -> list[int]:
    """The next tokens of a running job, at least ``count``."""
    found: list[int] = []
    while len(found) < count:
        event = await anext(events)
        assert not isinstance(event, Completion)
        found += event.token_ids if isinstance(event, Chunk) else ()
    return found


async def exported(engine: EngineProcess, sampling: Sampling, name: str) -> SequenceState:
    """The state of a generation of 50 tokens or more, which is then cancelled."""
    running = engine.submit(Job(generation_id=name, prompt=Prompt(token_ids=PROMPT), sampling=sampling))
    await tokens(running, 50)
    state = await engine.export(name)
    await running.aclose()  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("beside_streams", [True, False])
async def test_a_state_is_handled_in_blocks_that_are_all_of_it(beside_streams: bool) -> None:
    data = memoryview(bytes(range(256)) * (BLOCK_BYTES // 100))
    cut = [bytes(block) for block in blocks(data, lambda: beside_streams)]
    assert b"".join(cut) == data
    assert [len(block) for block in cut] == [BLOCK_BYTES, BLOCK_BYTES, len(data) - 2 * BLOCK_BYTES]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_sequence_goes_on_elsewhere_as_it_would_have_gone_on(
    pair: tuple[EngineProcess, EngineProcess], sampling: Sampling
) -> None:
    whole = await ask(pair[0], Job(generation_id="w", prompt=Prompt(token_ids=PROMPT), sampling=sampling))
    state = await exported(pair[0], sampling, "moving")
    header = state.header
    assert header.computed == len(header.token_ids) - 1
    delivered = len(header.token_ids) - header.prompt_tokens
    assert 50 <= delivered < 400
    await pair[1].import_(state)
    before = pair[1].tally.prefix_hit_tokens
    rest = await ask(pair[1], state.job("moving"))
    assert list(header.token_ids[header.prompt_tokens :]) + rest.token_ids == whole.token_ids
    assert pair[1].tally.prefix_hit_tokens - before == len(PROMPT)


async def test_the_exported_generation_itself_goes_on(pair: tuple[EngineProcess, EngineProcess]) -> None:
    running = pair[0].submit(Job(generation_id="a", prompt=Prompt(token_ids=PROMPT), sampling=GREEDY))
    first = await tokens(running, 10)
    exports = await asyncio.gather(*(pair[0].export("a") for _ in range(3)))
    assert len({len(e.header.token_ids) for e in exports}) >= 1
    rest: list[int] = []
    async for event in running:
        rest += event.token_ids if isinstance(event, Chunk) else ()
    assert len(first) + len(rest) == 400


async def test_what_does_not_run_cannot_be_exported(pair: tuple[EngineProcess, EngineProcess]) -> None:
    with pytest.raises(GenerationNotFound):
        await pair[0].export("nobody")


@pytest.mark.parametrize("change", ["state", "token", "seed", "fingerprint", "magic", "cut"])
async def test_a_changed_state_is_refused(pair: tuple[EngineProcess, EngineProcess], change: str) -> None:
    state = await exported(pair[0], GREEDY, f"changed-{change}")
    data = bytearray(state.envelope)
    header, start, *_ = unpacked(data, len(data))
    if change == "state":
        data[start + header.state_bytes // 2] ^= 4
    elif change == "magic":
        data[0] ^= 1
    elif change == "cut":
        del data[-1]
    else:
        other = {
            "token": msgspec.structs.replace(header, tokens=bytes([9]) + header.tokens[1:]),
            "seed": msgspec.structs.replace(header, seed=header.seed + 1),
            "fingerprint": msgspec.structs.replace(header, fingerprint="0" * 64),
        }[change]
        body = msgspec.msgpack.encode(other)
        data = data[:8] + len(body).to_bytes(4, "big") + data[12:44] + body + data[start:]
    with pytest.raises(StateRefused):
        await pair[1].import_(SequenceState(header, data))
    answer = await ask(pair[1], job("after"))
    assert len(answer.token_ids) == 24


async def test_every_single_damaged_byte_of_the_head_is_noticed(
    pair: tuple[EngineProcess, EngineProcess],
) -> None:
    state = await exported(pair[0], GREEDY, "bytes")
    start = unpacked(state.envelope, len(state.envelope)).start
    for position in range(0, start, 37):
        data = bytearray(state.envelope)
        data[position] ^= 0x55
        with pytest.raises(StateRefused):
            await pair[1].import_(SequenceState(state.header, data))


async def test_the_oldest_states_make_room_for_those_that_come(
    pair: tuple[EngineProcess, EngineProcess], tiny_model: Path
) -> None:
    states = [await exported(pair[0], replace(SEEDED, seed=seed), f"seed-{seed}") for seed in range(4)]
    room = max(len(state.envelope) for state in states) * 5 // 2
    engine = EngineProcess(settings(tiny_model, state_bytes_max=room))
    await engine.start()
    try:
        for state in states:
            await engine.import_(state)
        before = engine.tally.prefix_hit_tokens
        await ask(engine, states[-1].job("goes on"))
        assert engine.tally.prefix_hit_tokens - before == len(PROMPT)
    finally:
        await engine.close()


async def test_an_engine_that_keeps_no_states_says_so(tiny_model: Path) -> None:
    engine = EngineProcess(settings(tiny_model, state_bytes_max=0))
    await engine.start()
    running = engine.submit(Job(generation_id="a", prompt=Prompt(token_ids=PROMPT), sampling=GREEDY))
    await tokens(running, 1)
    with pytest.raises(StateRefused, match="keeps no states"):
        await engine.export("a")
    await running.aclose()  # type: ignore[attr-defined]
    await engine.close()


async def test_a_state_made_with_other_arithmetic_is_refused(
    pair: tuple[EngineProcess, EngineProcess], tiny_model: Path
) -> None:
    state = await exported(pair[0], GREEDY, "typed")
    engine = EngineProcess(settings(tiny_model, flash_attention=False))
    await engine.start()
    with pytest.raises(StateRefused, match="settings of its cache"):
        await engine.import_(state)
    await engine.close()


async def test_the_loss_of_the_engine_ends_an_export_and_the_next_one_works(tiny_model: Path) -> None:
    engine = EngineProcess(settings(tiny_model))
    await engine.start()
    running = engine.submit(Job(generation_id="a", prompt=Prompt(token_ids=PROMPT), sampling=GREEDY))
    await tokens(running, 1)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    export = asyncio.create_task(engine.export("a"))
    await asyncio.sleep(0)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineLost):
        await export
    with pytest.raises(EngineLost):
        await collect(running)
    await wait_load(engine, lambda load: load.engine is EngineState.READY)
    assert (await exported(engine, GREEDY, "again")).header.computed > 0
    await engine.close()
