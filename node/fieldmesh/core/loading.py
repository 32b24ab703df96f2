"""Which models of one node are in memory: loaded when asked for, the longest unused out, never too many.

Owns: the state of each model, who waits for one, which is loaded next and which must go for it. Must not:
load, measure or wait; the host performs what is decided and tells what came of it.

    COLD ──Load──> LOADING ──loaded──> READY ──Unload──> ENDING ──ended──> COLD
                      └──────────────────failed──────────────────────────────^

- A model takes its bytes from ``Load`` until ``ended``: two never overlap in memory that is not there. What
  several have in common (the weights, where they run one file) is taken once, by whichever is there.
- A model that answers something is not unloaded.
- Who waits is served in the order of arrival. Where idle models are not enough, the longest unused of the
  busy ones is closed: it finishes what it has, and takes nothing new. It keeps at least ``keep_s`` of work
  first, so that two models that are asked for in turn do not spend their time on loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from fieldmesh.core.errors import ModelInUse, ModelTooLarge

KEEP_S = 10.0


class ModelState(Enum):
    """Where a model is."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    ENDING = "ending"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Start this model's process."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """End this model's process; nothing uses it."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """So many of those who wait for this model have it now; each is to be ended with ``release``."""

    name: str
    users: int


Effect = Load | Unload | Admit


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a model takes: ``own_bytes``, and ``common_bytes`` together with all others of this ``base``."""

    own_bytes: int
    base: str = ""
    common_bytes: int = 0

    @property
    def alone_bytes(self) -> int:
        """What it takes where no other of its base is there."""
        return self.own_bytes + self.common_bytes


@dataclass(slots=True)
class _Model:
    size: Size
    state: ModelState = ModelState.COLD
    users: int = 0
    used_at: float = 0.0
    ready_at: float = 0.0
    closing: bool = False


class Loading:
    """The models of one node by name, with what each takes. ``now`` never decreases.

    Raises ModelTooLarge where a model alone exceeds the budget.
    """

    def __init__(self, sizes: Mapping[str, Size], budget_bytes: int, *, keep_s: float = KEEP_S) -> None:
        for name, size in sizes.items():
            if size.alone_bytes > budget_bytes:
                raise ModelTooLarge(
                    f"Model {name} needs {size.alone_bytes >> 20} MiB, more than the "
                    f"{budget_bytes >> 20} MiB that all models of this node may have together",
                    field="engine.memory_mib_max",
                )
        self.budget_bytes = budget_bytes
        self._models = {name: _Model(size) for name, size in sizes.items()}
        self._waiting: dict[str, int] = {}
        self._keep_s = keep_s

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {model.state.value}" for name, model in self._models.items())
        return f"Loading({states}; waiting: {', '.join(self._waiting) or 'none'})"

    def state(self, name: str) -> ModelState:
        """Where the model is."""
        return self._models[name].state

    @property
    def taken_bytes(self) -> int:
        """Bytes of all models that are not cold."""
        return _together(m.size for m in self._models.values() if m.state is not ModelState.COLD)

    @property
    def deadline(self) -> float | None:
        """When ``plan`` may close a busy model for whoever waits; None where time changes nothing."""
        if not self._waiting or self._coming_room():
            return None
        busy = [m for m in self._models.values() if m.state is ModelState.READY and not m.closing]
        return min((m.ready_at + self._keep_s for m in busy), default=None)

    # --- what happens ------------------------------------------------------------------------

    def want(self, name: str, now: float) -> list[Effect]:
        """Somebody wants to use this model; they are told by ``Admit``, perhaps at once."""
        self._waiting[name] = self._waiting.get(name, 0) + 1
        return self.plan(now)

    def forget(self, name: str, now: float) -> list[Effect]:
        """One of those who wait for this model waits no more."""
        self._waiting[name] -= 1
        if not self._waiting[name]:
            del self._waiting[name]
        return self.plan(now)

    def release(self, name: str, now: float) -> list[Effect]:
        """One of those who use this model is done."""
        model = self._models[name]
        assert model.users > 0, f"{name} was released more often than admitted"
        model.users -= 1
        model.used_at = now
        return self.plan(now)

    def loaded(self, name: str, now: float) -> list[Effect]:
        """The model's process is ready."""
        model = self._models[name]
        assert model.state is ModelState.LOADING, f"{name} is {model.state.value}, and was loaded"
        model.state, model.ready_at, model.used_at = ModelState.READY, now, now
        return self.plan(now)

    def ended(self, name: str, now: float) -> list[Effect]:
        """The model's process is gone and its memory is back: told to end, or failed while loading. Who
        waits for it still waits: where it failed, ``forget`` them first."""
        model = self._models[name]
        assert model.state in (ModelState.LOADING, ModelState.ENDING), f"{name} has ended twice"
        model.state = ModelState.COLD
        return self.plan(now)

    def unload(self, name: str) -> list[Effect]:
        """An operator wants the model out. Raises ModelInUse."""
        model = self._models[name]
        if model.users or name in self._waiting or model.state is ModelState.LOADING:
            raise ModelInUse(
                f"Model {name} is loading or answers requests; unload it when it is idle", retry_after_s=1.0
            )
        return [self._end(name)] if model.state is ModelState.READY else []

    # --- what is decided ---------------------------------------------------------------------

    def plan(self, now: float) -> list[Effect]:
        """What is to be done now for whoever has waited longest."""
        models = self._models
        open_now = [n for n in self._waiting if models[n].state is ModelState.READY and not models[n].closing]
        effects: list[Effect] = [self._admit(name, now) for name in open_now]
        for name in list(self._waiting):
            model = models[name]
            if model.state is ModelState.COLD:
                taken = (m.size for m in models.values() if m.state is not ModelState.COLD)
                if _together((model.size, *taken)) > self.budget_bytes:
                    effects += self._make_room(model, now)
                    return effects  # whoever comes later does not take the room of whoever came first
                model.state = ModelState.LOADING
                effects.append(Load(name=name))
            elif model.closing:  # nobody before it needs its room any more
                effects.append(self._admit(name, now))
        return effects

    def _admit(self, name: str, now: float) -> Admit:
        model = self._models[name]
        users = self._waiting.pop(name)
        model.users += users
        model.used_at, model.closing = now, False
        return Admit(name=name, users=users)

    def _end(self, name: str) -> Unload:
        model = self._models[name]
        model.state, model.closing = ModelState.ENDING, False
        return Unload(name=name)

    def _make_room(self, wanted: _Model, now: float) -> list[Effect]:
        """Unload what is idle and close what is busy, the longest unused first, until there will be room."""
        ready = [(name, m) for name, m in self._models.items() if m.state is ModelState.READY]
        effects: list[Effect] = [self._end(name) for name, m in ready if m.closing and not m.users]
        for name, model in sorted(ready, key=lambda found: (found[1].users > 0, found[1].used_at)):
            if self._will_fit(wanted):
                break
            if model.state is not ModelState.READY or model.closing:
                continue
            if not model.users:
                effects.append(self._end(name))
            elif now - model.ready_at >= self._keep_s:
                model.closing = True
        return effects

    def _will_fit(self, wanted: _Model) -> bool:
        """Whether it fits beside those that stay, without anything more being decided."""
        gone = ModelState.COLD, ModelState.ENDING
        stay = (m.size for m in self._models.values() if m.state not in gone and not m.closing)
        return _together((wanted.size, *stay)) <= self.budget_bytes

    def _coming_room(self) -> bool:
        return self._will_fit(self._models[next(iter(self._waiting))])

    def check(self) -> None:
        """Raise AssertionError where the state contradicts itself."""
        assert self.taken_bytes <= self.budget_bytes, "more is in memory than may be"
        for name, model in self._models.items():
            assert not model.users or model.state is ModelState.READY, f"{name} is used and not there"
            assert not model.closing or model.state is ModelState.READY, f"{name} is closing and not there"


def _together(sizes: Iterable[Size]) -> int:
    """Bytes of models that are in memory at the same time."""
    sizes = tuple(sizes)
    common = {size.base: size.common_bytes for size in sizes}
    return sum(size.own_bytes for size in sizes) + sum(common.values())
