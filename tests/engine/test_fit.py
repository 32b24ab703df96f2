"""Goal: what a model will take is known before it is loaded. Method: the estimate beside the resident memory
of real processes, and property tests of the refusal's advice. ``-s`` prints the comparison."""

from __future__ import annotations

import re
from dataclasses import replace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import ModelTooLarge
from fieldmesh.core.model import Prompt, Sampling
from fieldmesh.engine.fit import MIB, demand_fit, estimate
from fieldmesh.engine.gguf import GgufHeader, Value, read_header
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Job
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import drain
from tests.engine.tiny_model import default_model_path

SHAPE: dict[str, Value] = {
    "block_count": 30,
    "embedding_length": 576,
    "feed_forward_length": 1536,
    "attention.head_count": 9,
    "attention.head_count_kv": 3,
    "vocab_size": 49152,
}
SETTINGS = EngineSettings(model_path="m.gguf", model_name="m", slots=4, context_tokens=2048)


def header(**changed: Value) -> GgufHeader:
    keys = {f"llama.{name.replace('__', '.')}": value for name, value in (SHAPE | changed).items()}
    return GgufHeader(
        version=3,
        tensors=1,
        file_bytes=100 * MIB,
        weights_bytes=92 * MIB,
        keys={"general.architecture": "llama", **keys},
    )


# --- the estimate ------------------------------------------------------------------------


def test_the_cache_takes_what_llama_cpp_says_that_it_takes() -> None:
    assert estimate(header(), SETTINGS).kv == 180 * MIB
    assert estimate(header(), replace(SETTINGS, kv_type="q8_0")).kv == pytest.approx(95.625 * MIB)
    keys_alone = replace(SETTINGS, kv_type="q8_0", flash_attention=False)
    assert estimate(header(), keys_alone).kv == pytest.approx(137.8125 * MIB)


def test_what_finished_answers_may_keep_beside_the_cache_counts() -> None:
    without = replace(SETTINGS, reuse_prefixes=False)
    assert estimate(header(), SETTINGS).total - estimate(header(), without).total == 22.5 * MIB


def test_an_engine_that_keeps_states_has_room_for_one_on_its_way() -> None:
    keeping = replace(SETTINGS, state_bytes_max=1 << 40)
    assert estimate(header(), keeping).total - estimate(header(), SETTINGS).total == 45 * MIB


def test_layers_may_differ_in_their_heads() -> None:
    every_other = {"attention.head_count_kv": tuple([3.0, 0.0] * 15)}
    assert estimate(header(**every_other), SETTINGS).kv == 90 * MIB


def test_heads_may_be_wider_than_the_embedding_says() -> None:
    wide = {"attention.key_length": 128, "attention.value_length": 64}
    assert estimate(header(**wide), SETTINGS).kv == 270 * MIB


def test_a_recurrent_model_keeps_a_state_for_each_sequence() -> None:
    keys: dict[str, Value] = {
        "attention.head_count": 0,
        "attention.head_count_kv": 0,
        "ssm.inner_size": 1024,
        "ssm.state_size": 16,
        "ssm.conv_kernel": 4,
    }
    assert estimate(header(**keys), SETTINGS).kv == 4 * 30 * (1024 * 16 + 3 * 1024) * 4


@pytest.mark.engine
@pytest.mark.parametrize(
    ("slots", "context_tokens", "kv_type"),
    [(1, 512, "f16"), (4, 2048, "f16"), (4, 2048, "q8_0"), (2, 4096, "f16")],
)
async def test_a_real_process_takes_what_was_estimated(slots: int, context_tokens: int, kv_type: str) -> None:
    path = str(default_model_path())
    settings = EngineSettings(
        model_path=path, slots=slots, context_tokens=context_tokens, kv_type=kv_type, threads=2
    )
    expected = estimate(read_header(path), settings).total
    engine = EngineProcess(settings)
    await engine.start()
    try:
        assert engine.pid is not None
        token_ids = tuple(range(20, 20 + min(context_tokens - 10, 1000)))
        sampling = Sampling(max_tokens=4, ignore_eos=True)
        await drain(
            engine.submit(Job(generation_id="a", prompt=Prompt(token_ids=token_ids), sampling=sampling))
        )
        taken = psutil.Process(engine.pid).memory_info().rss
    finally:
        await engine.close()
    print(f"{slots} x {context_tokens} {kv_type}: {expected // MIB} MiB expected, {taken // MIB} resident")
    assert 0.97 <= expected / taken <= 1.35  # a short context does not touch all that is reserved


# --- the refusal -------------------------------------------------------------------------


def refusal(budget_mib: int, settings: EngineSettings = SETTINGS) -> str:
    with pytest.raises(ModelTooLarge) as caught:
        demand_fit(header(), settings, budget_mib * MIB)
    assert caught.value.field == "context_tokens"
    return caught.value.message


def test_what_fits_is_let_through() -> None:
    assert demand_fit(header(), SETTINGS, 500 * MIB).total < 500 * MIB


def test_a_little_too_much_is_remedied_by_smaller_keys() -> None:
    assert refusal(380).endswith(': kv_type = "q8_0" or context_tokens = 1536 would fit.')


def test_more_is_remedied_by_a_shorter_context() -> None:
    advice = 'context_tokens = 1024 or kv_type = "q8_0" with context_tokens = 1792 would fit.'
    assert refusal(330).endswith(f": {advice}")


def test_much_more_by_a_single_slot() -> None:
    many = replace(SETTINGS, slots=16, mixed_tokens=48)
    assert "slots = 1 with context_tokens = " in refusal(250, many)


def test_where_nothing_helps_that_is_said() -> None:
    assert "a smaller or more quantised model" in refusal(150)


@given(budget_mib=st.integers(100, 600), slots=st.integers(1, 16), blocks=st.integers(1, 16))
def test_what_is_advised_does_fit(budget_mib: int, slots: int, blocks: int) -> None:
    settings = replace(SETTINGS, slots=slots, context_tokens=blocks * 256)
    try:
        demand_fit(header(), settings, budget_mib * MIB)
    except ModelTooLarge as refused:
        advice = refused.message.rpartition(": ")[2]
        for way in advice.split(" or ") if "would fit" in advice and "no context" not in advice else ():
            tried = settings
            if 'kv_type = "q8_0"' in way:
                tried = replace(tried, kv_type="q8_0")
            if tokens := re.search(r"context_tokens = (\d+)", way):
                tried = replace(tried, context_tokens=int(tokens[1]))
            if "slots = 1 " in way:
                tried = replace(tried, slots=1)
            demand_fit(header(), tried, budget_mib * MIB)
