"""Goal: llama.cpp computes what the scheduler asked for, bit for bit the same however steps are cut and
shared. Method: the tiny model in this process, logits compared exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fieldmesh.core.steps import Place, Slice
from fieldmesh.engine.llama import LlamaModel, passes
from fieldmesh.engine.settings import EngineSettings
from tests.engine.tiny_model import write_tiny_model

PROMPT = tuple(3 + (7 * i) % 290 for i in range(150))


def load(path: Path, **more: object) -> LlamaModel:
    settings = EngineSettings(model_path=str(path), context_tokens=256, slots=4, **more)  # type: ignore[arg-type]
    return LlamaModel(settings, lambda _share: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    made = load(write_tiny_model(tmp_path_factory.mktemp("llama") / "tiny.gguf"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _empty(model: LlamaModel) -> None:
    model.place([Place(slot=i, source=i, keep_tokens=0) for i in range(4)])


def piece(name: str, slot: int, start: int, tokens: tuple[int, ...], *, sample: bool = True) -> Slice:
    return Slice(id=name, slot=slot, position=start, token_ids=tokens, sample=sample)


def prefill(model: LlamaModel, slot: int, chunk: int, until: int = len(PROMPT)) -> np.ndarray:
    """Logits after the prompt, computed ``chunk`` tokens at a time."""
    row = 0
    for start in range(0, until, chunk):
        tokens = PROMPT[start : min(start + chunk, until)]
        row = model.run([piece("a", slot, start, tokens)])["a"]
    return model.logits(row).copy()


@pytest.fixture
def whole(model: LlamaModel, _empty: None) -> np.ndarray:
    logits = prefill(model, 0, 150)
    model.place([Place(slot=0, source=0, keep_tokens=0)])
    return logits


@pytest.mark.parametrize("chunk", [1, 7, 32, 63, 64, 100])
def test_chunks_of_any_size_give_the_same_logits(model: LlamaModel, whole: np.ndarray, chunk: int) -> None:
    assert np.array_equal(prefill(model, 2, chunk), whole)


@pytest.mark.parametrize("others", [1, 63, 64, 100])
def test_a_long_prompt_in_the_same_step_changes_no_logits(
    model: LlamaModel, whole: np.ndarray, others: int
) -> None:
    prefill(model, 1, 149, until=149)
    rows = model.run([piece("a", 1, 149, PROMPT[149:]), piece("b", 3, 0, PROMPT[:others], sample=False)])
    assert np.array_equal(model.logits(rows["a"]), whole)


def test_decoders_side_by_side_change_no_logits(model: LlamaModel, whole: np.ndarray) -> None:
    for slot in (3, 0, 1):
        prefill(model, slot, 149 - slot, until=149)
    rows = model.run([piece(str(slot), slot, 149, PROMPT[149:]) for slot in (3, 0, 1)])
    for row in rows.values():
        assert np.array_equal(model.logits(row), whole)


def test_a_copied_prefix_is_as_good_as_a_computed_one(model: LlamaModel, whole: np.ndarray) -> None:
    prefill(model, 0, 150)
    model.place([Place(slot=2, source=0, keep_tokens=100)])
    rows = model.run([piece("b", 2, 100, PROMPT[100:])])
    assert np.array_equal(model.logits(rows["b"]), whole)


def test_a_kept_prefix_is_as_good_as_a_computed_one(model: LlamaModel, whole: np.ndarray) -> None:
    prefill(model, 0, 150)
    model.run([piece("a", 0, 150, (5, 6, 7))])
    model.place([Place(slot=0, source=0, keep_tokens=40)])
    rows = model.run([piece("b", 0, 40, PROMPT[40:])])
    assert np.array_equal(model.logits(rows["b"]), whole)


def test_a_chain_of_copies_in_one_step_holds(model: LlamaModel, whole: np.ndarray) -> None:
    prefill(model, 0, 150)
    places = [
        Place(slot=1, source=0, keep_tokens=120),
        Place(slot=2, source=1, keep_tokens=110),
        Place(slot=0, source=0, keep_tokens=0),
    ]
    model.place(places)
    rows = model.run([piece("c", 2, 110, PROMPT[110:]), piece("d", 0, 0, PROMPT[:9])])
    assert np.array_equal(model.logits(rows["c"]), whole)


def test_what_was_parked_comes_back_as_it_was(model: LlamaModel, whole: np.ndarray) -> None:
    prefill(model, 0, 150, until=100)
    assert (
        model.place([Place(slot=9, source=0, keep_tokens=100), Place(slot=0, source=0, keep_tokens=0)]) == []
    )
    assert model.place([Place(slot=1, source=1, keep_tokens=100, state="it")], saved(model, 9)) == []
    rows = model.run([piece("a", 1, 100, PROMPT[100:])])
    assert np.array_equal(model.logits(rows["a"]), whole)
    assert model.place([Place(slot=3, source=9, keep_tokens=60)]) == []
    rows = model.run([piece("b", 3, 60, PROMPT[60:])])
    assert np.array_equal(model.logits(rows["b"]), whole)


def test_what_comes_from_an_empty_slot_is_not_what_was_there(model: LlamaModel) -> None:
    prefill(model, 2, 150, until=120)
    assert model.place([Place(slot=2, source=1, keep_tokens=60)]) == [2]


def test_a_slot_that_was_brought_right_after_all_is_not_named(model: LlamaModel) -> None:
    prefill(model, 0, 150, until=100)
    places = [Place(slot=3, source=1, keep_tokens=90), Place(slot=3, source=0, keep_tokens=90)]
    assert model.place(places) == []


def test_nothing_is_parked_but_all_of_a_slot(model: LlamaModel) -> None:
    prefill(model, 0, 150, until=100)
    assert model.place([Place(slot=9, source=0, keep_tokens=90)]) == [9]
    assert model.place([Place(slot=9, source=2, keep_tokens=90)]) == [9]
    assert model.place([Place(slot=3, source=9, keep_tokens=60)]) == [3]


def test_a_step_is_computed_in_pieces_as_far_as_answers_are_promised_to_be_exact() -> None:
    """And whatever samples is in the last pass."""
    slices = [
        piece("long", 2, 200, tuple(range(100))),
        piece("new", 1, 0, tuple(range(150))),
        piece("next", 0, 240, (7,)),
    ]
    shape = [
        [(s.id, s.position, len(s.token_ids), s.sample) for s in run] for run in passes(slices, exact=True)
    ]
    assert shape == [
        [("new", 0, 24, False)],
        [("new", 24, 63, False), ("long", 200, 56, False)],
        [("next", 240, 1, True), ("new", 87, 63, True), ("long", 256, 44, True)],
    ]
    assert [len(run) for run in passes(slices, exact=False)] == [3]


def test_a_slot_without_the_tokens_that_it_should_keep_is_emptied_and_named(model: LlamaModel) -> None:
    prefill(model, 0, 150, until=50)
    places = [Place(slot=1, source=0, keep_tokens=60), Place(slot=2, source=0, keep_tokens=50)]
    assert model.place(places) == [1]
    assert model.place([Place(slot=3, source=3, keep_tokens=0, state="gone")]) == [3]


def saved(model: LlamaModel, slot: int) -> memoryview:
    state = memoryview(bytearray(model.state_bytes(slot)))
    model.save_state(slot, state)
    return state


def test_a_saved_state_goes_on_as_if_it_had_never_left(model: LlamaModel, whole: np.ndarray) -> None:
    prefill(model, 0, 100, until=100)
    state = saved(model, 0)
    model.run([piece("x", 0, 100, PROMPT[:20])])
    prefill(model, 3, 100, until=90)
    assert model.place([Place(slot=3, source=3, keep_tokens=100, state="it")], state) == []
    rows = model.run([piece("b", 3, 100, PROMPT[100:])])
    assert np.array_equal(model.logits(rows["b"]), whole)


def test_a_state_that_the_library_refuses_leaves_an_empty_slot(model: LlamaModel) -> None:
    junk = memoryview(bytearray(b"\7" * 4096))
    assert model.place([Place(slot=2, source=2, keep_tokens=10, state="it")], junk) == [2]
    assert model.place([Place(slot=2, source=2, keep_tokens=0)]) == []
    model.run([piece("a", 2, 0, PROMPT)])


@pytest.fixture(scope="module", params=["window", "recurrent"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    """A model whose layers keep less than everything: 16 tokens, or one state."""
    kind = {"window": {"window": 16}, "recurrent": {"recurrent": True}}[request.param]
    path = write_tiny_model(tmp_path_factory.mktemp("other") / "tiny.gguf", **kind)  # type: ignore[arg-type]
    made = load(path)
    assert made.cuttable is (request.param == "window")
    yield made
    made.close()


def test_other_architectures_keep_copy_and_save_whole_sequences(other: LlamaModel) -> None:
    other.place([Place(slot=i, source=i, keep_tokens=0) for i in range(4)])
    prefill(other, 1, 100, until=100)
    cold = other.logits(other.run([piece("a", 1, 100, PROMPT[100:])])["a"]).copy()
    prefill(other, 0, 100, until=100)
    state = saved(other, 0)
    places = [
        Place(slot=2, source=0, keep_tokens=100),
        Place(slot=3, source=3, keep_tokens=100, state="it"),
        Place(slot=0, source=0, keep_tokens=100),
    ]
    assert other.place(places, state) == []
    for slot in (2, 3, 0):
        rows = other.run([piece("b", slot, 100, PROMPT[100:])])
        assert np.array_equal(other.logits(rows["b"]), cold)


def test_a_state_is_not_cut_where_its_windows_would_be_empty(other: LlamaModel) -> None:
    other.place([Place(slot=i, source=i, keep_tokens=0) for i in range(4)])
    prefill(other, 1, 100, until=100)
    assert other.place([Place(slot=2, source=1, keep_tokens=60)]) == [2]
    assert other.place([Place(slot=3, source=1, keep_tokens=100)]) == []
    assert other.place([Place(slot=3, source=3, keep_tokens=60)]) == [3]


def test_a_cache_that_can_be_cut_is_cut_right_and_one_that_cannot_says_so(other: LlamaModel) -> None:
    other.place([Place(slot=i, source=i, keep_tokens=0) for i in range(4)])
    prefill(other, 1, 100, until=100)
    cold = other.logits(other.run([piece("a", 1, 100, PROMPT[100:])])["a"]).copy()
    prefill(other, 0, 130, until=130)
    failed = other.place([Place(slot=0, source=0, keep_tokens=100)])
    assert failed == ([] if other.cuttable else [0])
    start = 100 if other.cuttable else 0
    for end in (100, 150):
        if start < end:
            row = other.run([piece("b", 0, start, PROMPT[start:end])])["b"]
        start = end
    assert np.array_equal(other.logits(row), cold)


# --- text and templates ------------------------------------------------------------------------


def test_text_survives_tokenizing_and_pieces(model: LlamaModel) -> None:
    text = "the field mesh é 中文 🙂\n\ttabs"
    assert b"".join(map(model.piece, model.tokenize(text, add_bos=True))).decode() == text


def test_control_tokens_are_recognised_and_have_no_text(model: LlamaModel) -> None:
    assert model.tokenize("a</s>", add_bos=False)[-1] == 2
    assert model.piece(2) == b""
    assert model.end_tokens == {2}
    assert (model.bos, model.eos) == ("<s>", "</s>")
