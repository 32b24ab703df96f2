"""Several models in one node. Goal: each is there when it is asked for, never more than fit, none leaves
while it answers, and the node never looks idle or dead for what is merely not loaded.

Method: whole nodes whose budget holds one of two models, with fake engines; one test with real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fieldmesh.config import EngineSlice
from fieldmesh.core.errors import (
    FieldmeshError,
    ModelFileInvalid,
    ModelInUse,
    ModelTooLarge,
    ProfileNotFound,
    StreamLost,
)
from fieldmesh.core.model import Adapter, EngineState
from fieldmesh.engine.cores import cpu_budget
from fieldmesh.engine.fake import FakeEngine
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.profiles import Profile
from fieldmesh.runtime.models import Models
from fieldmesh.runtime.node import Node, hosted_profile, running
from tests.engine.tiny_model import write_crashing_model, write_tiny_adapter
from tests.runtime.test_node import FAST, Site, new_site, tiny, until

__all__ = ["tiny"]

ROOM_FOR_ONE = EngineSlice(memory_mib_max=74)
ROOM_FOR_BOTH = EngineSlice(memory_mib_max=100)
"""Not twice as much: they run one file, so that they have its weights and a process in common."""


@pytest.fixture
async def site(tmp_path: Path, tiny: Path) -> AsyncIterator[Site]:
    async with new_site(tmp_path, tiny) as made:
        yield made


async def new_node(site: Site, engine: EngineSlice = ROOM_FOR_ONE) -> Node:
    node = await site.start("both", "general,code", engine=engine)
    await site.formed()
    async with asyncio.timeout(10):
        while len(node.models.offers()) < 2:
            await node._driver.wait_view_changed(node.view.revision)
    return node


def states(models: Models) -> dict[str, str]:
    return {status.profile: status.state for status in models.statuses()}


async def until_told(models: Models, holds: Callable[[], bool]) -> None:
    """Return when ``holds`` is true after a change of the models."""
    changed, told = asyncio.Event(), models._on_change

    def tell() -> None:
        told()
        changed.set()

    models._on_change = tell
    async with asyncio.timeout(10):
        while not holds():
            await changed.wait()
            changed.clear()


async def test_a_model_is_loaded_for_its_first_question_and_the_idle_one_goes(site: Site) -> None:
    node = await new_node(site)
    assert states(node.models) == {"general": "ready", "code": "cold"}
    first = node.models.hosted["general"].engine
    async with site.client("both") as client:
        result = await client.chat("hello", profile="code", max_tokens=5).result()
        assert (result.profile, result.served_by) == ("code", "both")
        assert states(node.models) == {"general": "cold", "code": "ready"}
        assert first is not None and first.state is EngineState.LOST, "its engine was closed"
        again = await client.chat("hello", profile="general", max_tokens=5).result()
        assert again.profile == "general"


async def test_the_mesh_hears_which_models_must_be_loaded_first(site: Site) -> None:
    node = await new_node(site)
    asking = await site.start("asking", "general", engine=ROOM_FOR_ONE)
    await site.formed()

    def told() -> list[str]:
        load = next(m.load for m in asking.view.members if m.name == "both")
        return [c.profile for c in load.cold if c.load_s > 0]

    async with asyncio.timeout(10):
        while told() != ["code"]:
            await asking._driver.wait_view_changed(asking.view.revision)
        await node.models.load("code")
        while told() != ["general"]:
            await asking._driver.wait_view_changed(asking.view.revision)
    assert node.models.hosted["code"].loaded_in_s > 0


async def test_both_stay_where_both_fit(site: Site) -> None:
    node = await new_node(site, ROOM_FOR_BOTH)
    async with site.client("both") as client:
        for profile in ("general", "code", "general"):
            await client.chat("hello", profile=profile, max_tokens=5).result()
    assert states(node.models) == {"general": "ready", "code": "ready"}


async def test_a_model_that_answers_stays_until_it_is_done(site: Site) -> None:
    node = await new_node(site)
    async with site.client("both") as client:
        stream = client.chat("hello", profile="general", max_tokens=2000, ignore_eos=True)
        await anext(stream)
        other = asyncio.create_task(client.chat("hello", profile="code", max_tokens=5).result())
        await until_told(node.models, lambda: bool(node.models._waiters["code"]))
        assert states(node.models)["general"] == "ready"
        await stream.close()
        assert (await other).profile == "code"


async def test_a_caller_who_leaves_while_a_model_waits_for_room_is_forgotten(site: Site) -> None:
    node = await new_node(site)
    models = node.models
    async with models.using("general"):
        waiting = asyncio.create_task(models.load("code"))
        await until_told(models, lambda: bool(models._waiters["code"]))
        waiting.cancel()
        await asyncio.wait((waiting,))
        assert not models._waiters["code"]
    assert states(models) == {"general": "ready", "code": "cold"}
    await models.load("code")
    assert states(models) == {"general": "cold", "code": "ready"}


async def test_a_node_is_ready_and_its_profiles_serve_while_their_models_are_cold(site: Site) -> None:
    node = await new_node(site)
    await node.models.unload("general")
    assert states(node.models) == {"general": "cold", "code": "cold"}
    load = node.models.node_load()
    assert load.engine is EngineState.READY and load.accepting
    async with grpc.aio.insecure_channel(str(node.client_address)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for profile in ("general", "code"):
            request = health_pb2.HealthCheckRequest(service=f"fieldmesh.v1.InferenceService/{profile}")
            assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING


async def test_operators_load_and_unload_but_not_under_a_reader(site: Site) -> None:
    node = await new_node(site, ROOM_FOR_BOTH)
    models = node.models
    await models.load("code")
    async with models.using("code"):
        with pytest.raises(ModelInUse):
            await models.unload("code")
    await models.unload("code")
    await models.unload("code")
    assert states(models) == {"general": "ready", "code": "cold"}
    with pytest.raises(ProfileNotFound):
        await models.load("nobody")


async def test_a_file_that_changed_is_told_by_its_digest(site: Site) -> None:
    content = bytearray(site.model.read_bytes())
    site.model = site.folder / "copy.gguf"
    site.model.write_bytes(content)
    node = await new_node(site, ROOM_FOR_BOTH)
    found, known = await node.models.verify("code")
    assert found == known
    content[-1] ^= 1
    site.model.write_bytes(content)
    found, known = await node.models.verify("code")
    assert found != known
    site.model.write_bytes(content[:-100])
    with pytest.raises(ModelFileInvalid):
        await node.models.verify("code")


async def test_models_that_do_not_fit_alone_are_refused_at_the_start(site: Site) -> None:
    with pytest.raises(ModelTooLarge):
        await new_node(site, EngineSlice(memory_mib_max=20))


async def test_what_waits_for_an_engine_that_dies_is_answered_elsewhere(site: Site) -> None:
    one_slot = EngineSlice(slots=1, queue_max=32)
    node = await site.start("a", engine=one_slot)
    await site.start("b", engine=one_slot)
    await site.formed()
    async with site.client("a") as client:
        asked = [client.chat(f"{n}", max_tokens=300, ignore_eos=True).result() for n in range(12)]
        answers = asyncio.gather(*asked, return_exceptions=True)
        await until_told(node.models, lambda: node.models.node_load().queued >= 2)
        site.engines["a"].lose()
        assert states(node.models) == {"general": "lost"}
        assert node.models.node_load().engine is EngineState.LOST
        assert not node.models.able("general")
        ends = await answers
    lost = [end for end in ends if isinstance(end, BaseException)]
    assert all(isinstance(end, StreamLost) for end in lost)
    assert len(lost) <= 1, "only the one whose tokens had come could not be asked elsewhere"
    assert {end.served_by for end in ends if not isinstance(end, BaseException)} >= {"b"}


async def test_an_engine_that_was_given_up_is_told_everywhere_and_can_be_loaded_again(site: Site) -> None:
    node = await site.start("only")
    await site.formed()
    site.engines["only"].lose(EngineState.FAILED)
    await until(node, lambda ready: not ready)
    (status,) = node.models.statuses()
    assert (status.state, bool(status.problem)) == ("failed", True)
    async with site.client("only") as client:
        (told,) = await client.loads()
        assert told.load.engine is EngineState.FAILED
        with pytest.raises(FieldmeshError) as caught:
            await client.chat("hello", timeout_s=2.0).result()
        assert caught.value.code in ("NO_CANDIDATE", "DEADLINE_EXCEEDED")
        async with grpc.aio.insecure_channel(str(node.client_address)) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "fieldmesh.v1.InferenceService/general"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await node.models.load("general")
        await site.formed()
        assert (await client.chat("hello", max_tokens=5).result()).served_by == "only"


class Broken(FakeEngine):
    """An engine whose library refuses the model."""

    async def start(self) -> EngineInfo:
        raise ModelFileInvalid("llama.cpp cannot load it")


async def test_one_profile_that_cannot_be_loaded_does_not_take_the_others_with_it(site: Site) -> None:
    kinds = iter((FakeEngine, Broken, FakeEngine))
    config = site.config("both", "general,code", engine=ROOM_FOR_BOTH)
    async with running(config, lambda settings: next(kinds)(settings, cost=FAST)) as node:
        site.nodes["both"] = node
        await site.formed()
        async with site.client("both") as client:
            with pytest.raises(FieldmeshError):
                await client.chat("hello", profile="code", timeout_s=2.0).result()
            assert states(node.models)["code"] == "failed"
            assert {offer.name for offer in node.models.offers()} == {"general"}
            answer = await client.chat("hello", profile="general", max_tokens=5).result()
            assert answer.served_by == "both"
            await node.models.load("code")
            assert (await client.chat("hello", profile="code", max_tokens=5).result()).profile == "code"


@pytest.mark.engine
async def test_a_model_that_crashes_the_library_costs_a_node_that_model_and_nothing_else(
    site: Site, tiny: Path, tmp_path: Path
) -> None:
    crashing = write_crashing_model(tiny, tmp_path / "crash.gguf")
    config = site.config("both", "general,code", engine=ROOM_FOR_BOTH)

    def make_engine(settings: EngineSettings) -> EngineProcess:
        first = settings.state_folder.endswith("general")
        return EngineProcess(replace(settings, model_path=str(crashing)) if first else settings)

    async with running(config, make_engine) as node:
        site.nodes["both"] = node
        await until_told(node.models, lambda: states(node.models)["general"] == "failed")
        await site.formed()
        assert "no load succeeded" in {s.profile: s.problem for s in node.models.statuses()}["general"]
        async with site.client("both") as client:
            answer = await client.chat("hello", profile="code", max_tokens=5).result()
            assert answer.served_by == "both"
            with pytest.raises(FieldmeshError):
                await client.chat("hello", profile="general", timeout_s=2.0).result()
        assert {offer.name for offer in node.models.offers()} == {"code"}
        async with grpc.aio.insecure_channel(str(node.client_address)) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for profile, serves in (("general", False), ("code", True)):
                service = f"fieldmesh.v1.InferenceService/{profile}"
                told = (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
                assert (told == health_pb2.HealthCheckResponse.SERVING) is serves


@pytest.mark.engine
async def test_the_memory_of_a_model_that_goes_is_really_back(site: Site) -> None:
    config = site.config("both", "general,code", engine=ROOM_FOR_ONE)
    async with running(config) as node:
        site.nodes["both"] = node
        await site.formed()
        before = {s.profile: s for s in node.models.statuses()}
        engine = node.models.hosted["general"].engine
        assert engine is not None and engine.pid is not None
        pid = engine.pid
        assert before["general"].resident_bytes == pytest.approx(
            psutil.Process(pid).memory_info().rss, rel=0.2
        )
        await node.models.load("code")
        assert not psutil.pid_exists(pid)
        after = {s.profile: s for s in node.models.statuses()}
        assert (after["general"].state, after["general"].resident_bytes) == ("cold", 0)
        assert (after["code"].state, after["code"].loaded_share) == ("ready", 1.0)
        assert after["code"].resident_bytes > 0
        assert 1 <= after["code"].threads <= cpu_budget()
        assert "a token" in after["code"].measured, "its settings were measured at its first start"


@pytest.mark.engine
async def test_profiles_over_one_file_live_in_one_process(site: Site) -> None:
    config = site.config("both", "general,code", engine=ROOM_FOR_BOTH)
    async with running(config) as node:
        site.nodes["both"] = node
        await site.formed()
        await node.models.load("code")
        engines = [entry.engine for entry in node.models.hosted.values()]
        assert engines[0] is not None and engines[1] is not None
        assert engines[0].pid == engines[1].pid is not None
        await node.models.unload("general")
        async with site.client("both") as client:
            assert (await client.chat("hello", profile="code", max_tokens=5).result()).text
        assert psutil.pid_exists(engines[1].pid)


# --- adapters ------------------------------------------------------------------------------------


def with_adapter(tiny: Path, adapter: Path) -> Profile:
    return Profile(
        name="vet", model=str(tiny), context_tokens=256, slots=2, adapters=(Adapter(path=str(adapter)),)
    )


def test_a_profile_brings_its_adapter_to_its_own_model_alone(site: Site, tiny: Path, tmp_path: Path) -> None:
    profile = with_adapter(tiny, write_tiny_adapter(tmp_path / "vet.gguf"))
    config = site.config("a")
    own = hosted_profile(replace(config, node=replace(config.node, model="")), profile)
    assert own.settings.adapters == profile.adapters
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny.read_bytes())
    named = hosted_profile(replace(config, node=replace(config.node, model=str(other))), profile)
    assert named.settings.adapters == ()
    assert named.size.own_bytes < own.size.own_bytes


def test_an_adapter_that_does_not_fit_is_refused_before_the_node_starts(
    site: Site, tiny: Path, tmp_path: Path
) -> None:
    profile = with_adapter(tiny, write_tiny_adapter(tmp_path / "vet.gguf", architecture="qwen2"))
    config = site.config("a")
    with pytest.raises(ModelFileInvalid, match="architecture qwen2, not llama"):
        hosted_profile(replace(config, node=replace(config.node, model="")), profile)
