"""What is kept for a while. Goal: its three bounds hold. Method: hypothesis against a list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.shelf import Shelf

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "get", "drop"]), st.sampled_from("abcd"), st.integers(0, 60), st.floats(0, 9)
    ),
    max_size=30,
)


@given(steps)
def test_what_is_kept_is_the_latest_that_fits(steps: list[tuple[str, str, int, float]]) -> None:
    shelf: Shelf[int] = Shelf(count_max=3, bytes_max=100, age_max_s=20.0)
    model: list[tuple[str, int, float]] = []
    now = 0.0
    for what, name, size, pause in steps:
        now += pause
        model = [entry for entry in model if now - entry[2] <= 20.0]
        there = [entry[1] for entry in model if entry[0] == name]
        if what == "get":
            assert shelf.get(name, now) == (there[0] if there else None)
            continue
        if what == "drop":
            assert shelf.drop(name, now) == bool(there)
        model = [entry for entry in model if entry[0] != name]
        if what == "put":
            shelf.put(name, size, size, now)
            model.append((name, size, now))
            while len(model) > 3 or sum(entry[1] for entry in model) > 100:
                model.pop(0)
        assert (len(shelf), shelf.size_bytes) == (len(model), sum(entry[1] for entry in model))


def test_what_is_too_large_alone_is_not_kept_and_pushes_nothing_out() -> None:
    shelf: Shelf[str] = Shelf(count_max=2, bytes_max=10, age_max_s=1.0)
    shelf.put("small", "kept", 5, 0.0)
    shelf.put("large", "not", 11, 0.0)
    assert (shelf.get("large", 0.0), shelf.get("small", 0.0)) == (None, "kept")
