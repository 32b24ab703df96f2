"""This node's models: loaded when asked for, out again when others need the memory; a process for each file.

Owns: performing what ``core.loading`` decides, the engines that live now, who waits for which, what each
model is called by (its fingerprint), and the one load that the node tells the mesh. Must not: decide which
model goes, run requests, or know gRPC.

A profile whose model is not loaded is offered all the same: its first question waits for the load. The first
profile is loaded at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fieldmesh.core.errors import EngineNotReady, FieldmeshError, ProfileNotFound
from fieldmesh.core.loading import Admit, Effect, Loading, ModelState, Size, Unload
from fieldmesh.core.loading import Load as LoadModel
from fieldmesh.core.model import ColdProfile, EngineState, Load, ProfileOffer
from fieldmesh.engine.adapters import check_adapters
from fieldmesh.engine.fingerprint import fingerprint, stamp
from fieldmesh.engine.front import EngineFront
from fieldmesh.engine.gguf import read_header
from fieldmesh.engine.memory import resident_bytes
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.tally import EngineTally
from fieldmesh.profiles import Profile
from fieldmesh.runtime import log
from fieldmesh.runtime.state import StateFolder

LOAD_WAIT_S = 60.0
LOAD_BASE_S = 1.0
LOAD_BYTES_PER_S = 200e6
"""How long a model is taken to load before it has been measured (guesses: a process, and a slow disk)."""
STATES = ("cold", "loading", "ready", "ending", "lost", "failed")
FINGERPRINTS_KEY = "fingerprints"

MakeEngine = Callable[[EngineSettings], EngineFront]
"""Protocol tests bring a fake engine; everything else has the real one."""

logger = log.get()


@dataclass(slots=True, kw_only=True)
class Hosted:
    """One profile that this node serves. ``engine`` is None while the model is not in memory; ``info`` until
    it has loaded. ``size`` is the estimate that counts against the budget."""

    profile: Profile
    settings: EngineSettings
    size: Size
    fingerprint: str = ""
    engine: EngineFront | None = None
    info: EngineInfo | None = None
    tally: EngineTally = field(default_factory=EngineTally)
    refused: FieldmeshError | None = None
    loaded_in_s: float = 0.0

    @property
    def load_s(self) -> float:
        """How long loading takes: as the last time, or an estimate."""
        return self.loaded_in_s or LOAD_BASE_S + self.size.alone_bytes / LOAD_BYTES_PER_S

    @property
    def stamp(self) -> str:
        """Changes when the model's file or an adapter does, short of reading them."""
        return stamp(self.settings)

    @property
    def load(self) -> Load:
        """How busy its engine is; of one without engine, nothing but its room."""
        if self.engine is not None:
            return self.engine.load()
        settings = self.settings
        return Load(
            slots=settings.slots,
            queue_max=settings.queue_max,
            kv_cells_total=settings.slots * settings.context_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model as an operator sees it. ``state`` is cold, loading, ready, lost, failed or ending. Its
    ``resident_bytes`` are those of its process, whatever else lives there.

    What it runs with, and from which measurement, is known once it has been loaded (see ``EngineInfo``)."""

    profile: str
    model: str
    state: str
    loaded_share: float
    estimated_bytes: int
    resident_bytes: int
    running: int
    queued: int
    fingerprint: str
    problem: str
    threads: int = 0
    prefill_tokens: int = 0
    mixed_tokens: int = 0
    measured: str = ""


class Models:
    """The models of one node by profile. Belongs to one event loop. ``on_change`` hears of every change."""

    def __init__(
        self,
        hosted: Iterable[Hosted],
        *,
        budget_bytes: int,
        make_engine: MakeEngine,
        folder: StateFolder,
        on_change: Callable[[], None],
    ) -> None:
        self.hosted = {entry.profile.name: entry for entry in hosted}
        sizes = {name: entry.size for name, entry in self.hosted.items()}
        self._loading = Loading(sizes, budget_bytes)
        self._make_engine = make_engine
        self._folder = folder
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        # What a request sets off belongs to the node: its log lines do not carry that request's id.
        self._context = contextvars.copy_context()
        self._waiters: dict[str, deque[asyncio.Future[None]]] = {name: deque() for name in self.hosted}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._settled = False
        self._stamps = self._known_fingerprints()

    @property
    def budget_bytes(self) -> int:
        """What all models together may take."""
        return self._loading.budget_bytes

    # --- use ---------------------------------------------------------------------------------

    def find(self, profile: str) -> Hosted:
        """The hosted profile, loaded or not. Raises ProfileNotFound."""
        found = self.hosted.get(profile)
        if found is None:
            raise ProfileNotFound(
                f"This node does not serve profile {profile!r}; it serves {', '.join(self.hosted)}",
                field="target.profile",
            )
        return found

    @asynccontextmanager
    async def using(self, profile: str) -> AsyncIterator[EngineFront]:
        """The profile's engine, loaded where it is not, and kept while the context lasts.

        Raises ProfileNotFound, EngineNotReady (it cannot be loaded, or takes too long).
        """
        found = self.find(profile)
        if not self._settled:
            raise EngineNotReady("The engine is still loading; ask again shortly", retry_after_s=0.5)
        if found.refused is not None:
            raise EngineNotReady(f"Profile {profile} cannot be served: {found.refused.message}")
        await self._admitted(profile)
        try:
            assert found.engine is not None
            yield found.engine
        finally:
            self._perform(self._loading.release(profile, self._loop.time()))

    async def _admitted(self, profile: str) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters[profile].append(waiter)
        self._perform(self._loading.want(profile, self._loop.time()))
        try:
            await asyncio.wait((waiter,), timeout=LOAD_WAIT_S)
        except asyncio.CancelledError:
            if waiter in self._waiters[profile]:
                self._leave(profile, waiter)
            elif waiter.exception() is None:
                self._perform(self._loading.release(profile, self._loop.time()))
            raise
        if not waiter.done():
            self._leave(profile, waiter)
            raise EngineNotReady(
                f"Profile {profile} waits for memory or for its model to load; ask again later or elsewhere",
                retry_after_s=5.0,
            )
        waiter.result()

    def _leave(self, profile: str, waiter: asyncio.Future[None]) -> None:
        self._waiters[profile].remove(waiter)
        self._perform(self._loading.forget(profile, self._loop.time()))

    # --- operators ---------------------------------------------------------------------------

    async def load(self, profile: str) -> None:
        """Bring a model into memory; also one that was given up. Raises as ``using`` does."""
        found = self.find(profile)
        found.refused = None
        if found.engine is not None and found.engine.state is EngineState.FAILED:
            self._perform(self._loading.unload(profile))
        async with self.using(profile):
            pass

    async def unload(self, profile: str) -> None:
        """Take an idle model out of memory; returns when its process is gone. Raises ModelInUse."""
        self.find(profile)
        self._perform(self._loading.unload(profile))
        while self._loading.state(profile) is ModelState.ENDING:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def verify(self, profile: str) -> tuple[str, str]:
        """The fingerprint of the model as its files are now, and the one by which it was known (or nothing).

        Raises ModelFileInvalid where the file is no sound GGUF.
        """
        found = self.find(profile)
        header = await asyncio.to_thread(read_header, found.settings.model_path)
        await asyncio.to_thread(check_adapters, found.settings, header)
        return await asyncio.to_thread(fingerprint, found.settings), found.fingerprint

    def statuses(self) -> list[ModelStatus]:
        """Every model of this node."""
        return [self.status(name) for name in self.hosted]

    def status(self, profile: str) -> ModelStatus:
        """One model of this node."""
        entry = self.hosted[profile]
        engine, load = entry.engine, entry.load
        problem = entry.refused.message if entry.refused else ""
        if engine is not None and engine.state in (EngineState.LOST, EngineState.FAILED):
            problem = problem or engine.last_loss
        return ModelStatus(
            profile=profile,
            model=entry.settings.model_name,
            state=self.state(profile),
            loaded_share=engine.loaded_share if engine else 0.0,
            estimated_bytes=entry.size.alone_bytes,
            resident_bytes=resident_bytes(engine.pid) if engine and engine.pid else 0,
            running=load.running,
            queued=load.queued + len(self._waiters[profile]),
            fingerprint=entry.fingerprint,
            problem=problem,
            **_settings_told(entry.info),
        )

    # --- what the mesh hears -----------------------------------------------------------------

    def state(self, profile: str) -> str:
        """cold, loading, ready, lost, failed or ending."""
        entry, residence = self.hosted[profile], self._loading.state(profile)
        if entry.refused is not None:
            return EngineState.FAILED.value
        if residence is ModelState.READY and entry.engine is not None:
            return entry.engine.state.value
        return residence.value

    def able(self, profile: str) -> bool:
        """Whether a question for this profile would be answered here, if need be after a load."""
        entry = self.hosted[profile]
        if not self._settled or entry.refused is not None:
            return False
        if self._loading.state(profile) is ModelState.READY and entry.engine is not None:
            return entry.engine.state is EngineState.READY
        return True

    def offers(self) -> tuple[ProfileOffer, ...]:
        """What this node serves, as far as the models' contents are known. One that cannot be loaded is left
        out, unless it is the only one: then the node's load says so."""
        alone = len(self.hosted) == 1
        return tuple(
            entry.profile.offer(entry.settings.model_name, entry.fingerprint)
            for entry in self.hosted.values()
            if entry.fingerprint and (alone or entry.refused is None)
        )

    def _cold(self) -> tuple[ColdProfile, ...]:
        """The profiles that would have to be loaded, tenths of seconds being news to nobody."""
        return tuple(
            ColdProfile(profile=name, load_s=max(0.1, round(entry.load_s, 1)))
            for name, entry in self.hosted.items()
            if entry.refused is None and self._loading.state(name) is not ModelState.READY
        )

    def node_load(self) -> Load:
        """One load for all models. The node is ready while it can answer for any of its profiles."""
        loads = [entry.load for entry in self.hosted.values()]
        first = next(iter(self.hosted.values())).engine
        if first is not None and len(loads) == 1:  # one that is ready is told once it is offered
            return first.load() if self._settled or first.state is not EngineState.READY else Load()
        live = [x for x in loads if x.engine is EngineState.READY] or loads[:1]
        states = [entry.engine.state for entry in self.hosted.values() if entry.engine is not None]
        if any(self.able(name) for name in self.hosted):
            engine = EngineState.READY
        else:
            engine = next((s for s in states if s is not EngineState.FAILED), EngineState.FAILED)
        return Load(
            engine=engine if self._settled else EngineState.LOADING,
            slots=sum(x.slots for x in live),
            running=sum(x.running for x in live),
            queued=sum(x.queued for x in live) + sum(map(len, self._waiters.values())),
            queue_max=sum(x.queue_max for x in live),
            kv_cells_used=sum(x.kv_cells_used for x in live),
            kv_cells_total=sum(x.kv_cells_total for x in live),
            pending_prefill_tokens=sum(x.pending_prefill_tokens for x in live),
            pending_decode_tokens=sum(x.pending_decode_tokens for x in live),
            prefill_tokens_per_s=max(x.prefill_tokens_per_s for x in live),
            decode_tokens_per_s=max(x.decode_tokens_per_s for x in live),
            cold=self._cold(),
        )

    # --- what is decided is done -------------------------------------------------------------

    async def run(self) -> None:
        """Load the first model, and find out what the others are called by. Returns when that is done."""
        first = next(iter(self.hosted))
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters[first].append(waiter)
        self._perform(self._loading.want(first, self._loop.time()))
        await asyncio.wait((waiter,))
        self._settled = True
        if waiter.exception() is None:
            self._perform(self._loading.release(first, self._loop.time()))
        self._on_change()
        for entry in self.hosted.values():
            if entry.fingerprint or entry.refused is not None:
                continue
            try:
                entry.fingerprint = await asyncio.to_thread(fingerprint, entry.settings)
            except OSError as error:
                logger.error("profile_not_offered", profile=entry.profile.name, why=str(error))
            await self._remember()
            self._on_change()

    async def close(self) -> None:
        """End every engine."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(entry.engine.close() for entry in self.hosted.values() if entry.engine))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Admit():
                    for _ in range(effect.users):
                        self._waiters[effect.name].popleft().set_result(None)
                case LoadModel():
                    self._spawn(self._load(self.hosted[effect.name]))
                case Unload():
                    self._spawn(self._unload(self.hosted[effect.name]))
        if self._timer is not None:
            self._timer.cancel()
        due = self._loading.deadline
        self._timer = None if due is None else self._loop.call_at(due, self._tick)
        self._on_change()

    def _tick(self) -> None:
        self._perform(self._loading.plan(self._loop.time()))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, entry: Hosted) -> None:
        name = entry.profile.name
        engine = entry.engine = self._make_engine(entry.settings)
        engine.tally, engine.fingerprint_hint = entry.tally, entry.fingerprint
        self._spawn(self._follow(entry, engine))
        began = self._loop.time()
        logger.info("model_loading", profile=name, estimated_mib=entry.size.alone_bytes >> 20)
        if not engine.fingerprint_hint and self._has_company(entry):
            with contextlib.suppress(OSError):  # the engine will say what is wrong with the file
                engine.fingerprint_hint = await asyncio.to_thread(fingerprint, entry.settings)
        try:
            entry.info = await engine.start()
        except FieldmeshError as error:  # the node lives on: it passes questions to others
            logger.error("profile_not_served", profile=name, code=error.code, error=error.message)
            entry.refused = error
            waiters = self._waiters[name]
            while waiters:
                refused = EngineNotReady(f"Profile {name} cannot be served: {error.message}")
                waiters.popleft().set_exception(refused)
                self._perform(self._loading.forget(name, self._loop.time()))
            self._perform(self._loading.ended(name, self._loop.time()))
            return
        entry.fingerprint = entry.info.fingerprint
        entry.loaded_in_s = self._loop.time() - began
        logger.info(
            "engine_ready",
            profile=name,
            model=entry.info.model,
            threads=entry.info.threads,
            slots=entry.info.slots,
            context_tokens=entry.info.context_tokens,
            prefill_tokens=entry.info.prefill_tokens,
            mixed_tokens=entry.info.mixed_tokens,
            measured=entry.info.measured or "nothing",
        )
        self._perform(self._loading.loaded(name, self._loop.time()))
        await self._remember()

    def _has_company(self, entry: Hosted) -> bool:
        """Whether it moves in with an engine that may be answering: no file is to be read through there."""
        base = entry.settings.model_path
        return any(e.engine and e.settings.model_path == base for e in self.hosted.values() if e is not entry)

    async def _unload(self, entry: Hosted) -> None:
        engine, entry.engine, entry.info = entry.engine, None, None
        assert engine is not None
        await engine.close()
        logger.info("model_unloaded", profile=entry.profile.name)
        self._perform(self._loading.ended(entry.profile.name, self._loop.time()))

    async def _follow(self, entry: Hosted, engine: EngineFront) -> None:
        state = EngineState.LOADING
        while True:
            load = await engine.wait_load_changed()
            if entry.engine is not engine:
                return
            if load.engine is EngineState.FAILED and entry.refused is None:
                entry.refused = EngineNotReady(f"the engine was given up: {engine.last_loss}")
            if load.engine is not state:
                state = load.engine
                logger.info(
                    "engine_state", profile=entry.profile.name, state=state.value, why=engine.last_loss
                )
            self._on_change()

    # --- what models are called by -----------------------------------------------------------

    def _known_fingerprints(self) -> dict[str, str]:
        """Fingerprints by the stamps of files, from earlier starts; those of other files are left out. A
        profile is then offered while its model still loads: the mesh waits for a node that restarts."""
        try:
            kept = json.loads(self._folder.read(FINGERPRINTS_KEY) or b"{}")
        except ValueError:
            kept = {}
        known: dict[str, str] = {}
        for entry in self.hosted.values():
            fingerprint = kept.get(entry.stamp) if isinstance(kept, dict) else None
            if isinstance(fingerprint, str):
                entry.fingerprint = known[entry.stamp] = fingerprint
        return known

    async def _remember(self) -> None:
        try:
            stamps = {e.stamp: e.fingerprint for e in self.hosted.values() if e.fingerprint}
            if stamps != self._stamps:
                await asyncio.to_thread(self._folder.write, FINGERPRINTS_KEY, json.dumps(stamps).encode())
                self._stamps = stamps
        except (OSError, FieldmeshError) as error:  # the next start offers a little later, that is all
            logger.warning("fingerprint_not_kept", why=str(error))


def _settings_told(info: EngineInfo | None) -> dict[str, Any]:
    names = ("threads", "prefill_tokens", "mixed_tokens", "measured")
    return {name: getattr(info, name) for name in names} if info is not None else {}
