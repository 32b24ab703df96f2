"""Which models are in memory. Goal: never too many, none unloaded under a user, nobody waits for ever.

Method: the policy on virtual time, by example and with random workloads against what must hold.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import ModelInUse, ModelTooLarge
from fieldmesh.core.loading import Admit, Effect, Load, Loading, ModelState, Size, Unload

COLD, LOADING, READY, ENDING = ModelState


def new(budget: int = 2, **sizes: int) -> Loading:
    sizes = sizes or {"a": 1, "b": 1, "c": 1}
    return Loading({name: Size(own_bytes=size) for name, size in sizes.items()}, budget, keep_s=10.0)


def admit(name: str, users: int = 1) -> Admit:
    return Admit(name=name, users=users)


def with_a_loaded(models: Loading, *names: str) -> Loading:
    """The models, in this order, loaded and idle at the times 0, 1, 2, …"""
    for now, name in enumerate(names):
        assert models.want(name, now) == [Load(name=name)]
        assert models.loaded(name, now) == [admit(name)]
        assert models.release(name, now) == []
    return models


def test_a_model_is_loaded_once_for_all_who_wait() -> None:
    models = new()
    assert models.want("a", 0.0) == [Load(name="a")]
    assert models.want("a", 0.1) == []
    assert models.loaded("a", 1.0) == [admit("a", 2)]
    assert models.want("a", 2.0) == [admit("a")]


def test_the_longest_unused_goes_first_and_its_memory_is_waited_for() -> None:
    models = with_a_loaded(new(), "a", "b")
    models.want("a", 2.0)
    models.release("a", 3.0)
    assert models.want("c", 4.0) == [Unload(name="b")]
    assert models.state("c") is COLD
    assert models.ended("b", 5.0) == [Load(name="c")]


def test_what_is_busy_keeps_its_time_and_is_then_closed() -> None:
    models = new(budget=1)
    models.want("a", 0.0)
    models.loaded("a", 0.0)
    assert models.want("b", 1.0) == []
    assert models.want("a", 2.0) == [admit("a")]
    assert models.deadline == 10.0
    assert models.plan(10.0) == []
    assert models.deadline is None
    assert models.want("a", 11.0) == [], "it takes nothing new"
    assert models.release("a", 12.0) == []
    assert models.release("a", 12.0) == [Unload(name="a")]
    assert models.ended("a", 13.0) == [Load(name="b")]
    assert models.loaded("b", 14.0) == [admit("b")]


def test_a_closed_model_is_open_again_when_nobody_needs_its_room() -> None:
    models = new(budget=1)
    models.want("a", 0.0)
    models.loaded("a", 0.0)
    models.want("b", 20.0)
    assert models.want("a", 21.0) == []
    assert models.forget("b", 22.0) == [admit("a")]


def test_a_model_just_loaded_is_not_taken_from_those_who_waited_for_it() -> None:
    models = new(budget=1)
    models.want("a", 0.0)
    models.want("b", 0.0)
    assert models.loaded("a", 1.0) == [admit("a")]
    assert models.release("a", 2.0) == [Unload(name="a")]


def test_whoever_comes_later_does_not_take_the_room_of_whoever_came_first() -> None:
    models = new(budget=2, a=1, big=2, c=1)
    models.want("a", 0.0)
    models.loaded("a", 0.0)
    assert models.want("big", 1.0) == []
    assert models.want("c", 2.0) == []


def test_a_model_that_fails_to_load_leaves_its_room() -> None:
    models = new()
    models.want("a", 0.0)
    models.forget("a", 0.5)
    assert models.ended("a", 1.0) == []
    assert models.taken_bytes == 0


def test_unload_refuses_what_is_in_use() -> None:
    models = new()
    models.want("a", 0.0)
    with pytest.raises(ModelInUse):
        models.unload("a")
    models.loaded("a", 1.0)
    with pytest.raises(ModelInUse):
        models.unload("a")
    models.release("a", 3.0)
    assert models.unload("a") == [Unload(name="a")]
    assert models.unload("a") == models.unload("b") == []


def test_a_model_larger_than_the_budget_is_refused_at_once() -> None:
    with pytest.raises(ModelTooLarge):
        new(budget=1, a=2)


_steps = st.lists(
    st.tuples(st.sampled_from(["want", "release", "done", "forget", "unload", "time"]), st.integers(0, 3)),
    max_size=80,
)


def of_a_base(own_bytes: int) -> Size:
    return Size(own_bytes=own_bytes, base="x", common_bytes=4)


def test_what_models_have_in_common_is_taken_once() -> None:
    models = Loading({"a": of_a_base(1), "b": of_a_base(1), "c": Size(own_bytes=5)}, budget_bytes=6)
    with_a_loaded(models, "a", "b")
    assert models.taken_bytes == 6
    assert models.unload("b") == [Unload(name="b")]
    assert models.ended("b", 3) == []
    assert models.taken_bytes == 5


def test_what_models_have_in_common_is_back_with_the_last_of_them() -> None:
    models = Loading({"a": of_a_base(1), "b": of_a_base(1), "c": Size(own_bytes=5)}, budget_bytes=6)
    with_a_loaded(models, "a", "b")
    assert models.want("c", 3) == [Unload(name="a"), Unload(name="b")]
    assert models.ended("a", 4) == []
    assert models.ended("b", 5) == [Load(name="c")]


_sizes = st.one_of(
    st.builds(Size, own_bytes=st.integers(1, 4)),
    st.builds(Size, own_bytes=st.integers(1, 2), base=st.just("x"), common_bytes=st.just(2)),
)


@given(steps=_steps, budget=st.integers(4, 8), sizes=st.lists(_sizes, min_size=4, max_size=4))
def test_whatever_happens_the_budget_holds_and_everyone_is_served(
    steps: list[tuple[str, int]], budget: int, sizes: list[Size]
) -> None:
    names = [f"m{index}" for index in range(4)]
    models = Loading(dict(zip(names, sizes, strict=True)), budget, keep_s=5.0)
    under_way: dict[str, Effect] = {}
    waiting, users = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    now = 0.0

    def take(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Admit):
                waiting[effect.name] -= effect.users
                users[effect.name] += effect.users
                continue
            assert effect.name not in under_way, "one thing at a time happens to a model"
            assert isinstance(effect, Load) or not users[effect.name], "unloaded under its user"
            under_way[effect.name] = effect
        assert min(waiting.values()) >= 0
        models.check()

    def finish(name: str) -> None:
        effect = under_way.pop(name)
        take(models.loaded(name, now) if isinstance(effect, Load) else models.ended(name, now))

    def release(name: str) -> None:
        users[name] -= 1
        take(models.release(name, now))

    for step, index in steps:
        name, now = names[index], now + 0.5
        match step:
            case "want":
                waiting[name] += 1
                take(models.want(name, now))
            case "release" if users[name]:
                release(name)
            case "done" if name in under_way:
                finish(name)
            case "forget" if waiting[name]:
                waiting[name] -= 1
                take(models.forget(name, now))
            case "unload":
                try:
                    take(models.unload(name))
                except ModelInUse:
                    assert users[name] or waiting[name] or models.state(name) is LOADING
            case "time":
                now += 5.0
                take(models.plan(now))
    for _ in range(60):
        for name in names:
            while users[name]:
                release(name)
        for busy in list(under_way):
            finish(busy)
        if models.deadline is not None:
            now = max(now, models.deadline)
            take(models.plan(now))
    assert waiting == dict.fromkeys(names, 0), "whoever waited was served"
