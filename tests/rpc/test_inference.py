"""What clients send. Goal: what comes out of the codec is bounded and valid, and survives a round trip."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import (
    Ask,
    Attempt,
    CandidateNote,
    Choice,
    Chunk,
    ColdProfile,
    Completion,
    Constraint,
    ConstraintKind,
    EngineState,
    Explanation,
    FinishReason,
    Load,
    Logprobs,
    Message,
    NodeId,
    Priority,
    Prompt,
    RequestId,
    Result,
    SamplingOverrides,
    Target,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallPart,
    Tools,
    Usage,
)
from fieldmesh.rpc import inference as wire
from fieldmesh.v1 import inference_pb2 as pb

LIMITS = wire.RequestLimits(prompt_bytes_max=1000, prompt_tokens_max=100, messages_max=10, max_tokens_max=50)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
overrides = st.builds(
    SamplingOverrides,
    temperature=st.none() | st.floats(0, 5, width=32),
    top_k=st.none() | st.integers(0, 1000),
    seed=st.none() | st.integers(0, 2**32 - 1),
    max_tokens=st.none() | st.integers(1, 50),
    stop=st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple),
    stop_token_ids=st.none() | st.lists(st.integers(0, 1000), min_size=1, max_size=3).map(tuple),
    ignore_eos=st.none() | st.booleans(),
    constraint=st.none()
    | st.just(Constraint(kind=ConstraintKind.JSON_OBJECT))
    | st.builds(Constraint, kind=st.sampled_from(list(ConstraintKind)[:3]), source=texts),
    logprobs=st.none() | st.integers(0, 20),
    n=st.none() | st.integers(1, 16),
    reasoning_tokens_max=st.none() | st.integers(0, 50),
    logit_bias=st.none()
    | st.dictionaries(st.integers(0, 1000), st.floats(-100, 100, width=32), min_size=1, max_size=5).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
)
functions = st.from_regex(r"[A-Za-z0-9._:-]{1,64}", fullmatch=True)
objects = st.dictionaries(names, names, max_size=2).map(json.dumps)
calls = st.builds(ToolCall, id=names, name=functions, arguments=objects)
tools = st.builds(Tool, name=functions, description=names, parameters=st.just("") | objects)
asks = st.builds(
    Ask,
    request_id=st.from_regex(r"[A-Za-z0-9._:-]{1,64}", fullmatch=True).map(RequestId),
    prompt=st.one_of(
        st.builds(Prompt, text=texts),
        st.builds(
            Prompt,
            messages=st.lists(
                st.builds(Message, role=st.sampled_from(wire.ROLES), content=texts, tool_call_id=names)
                | st.builds(
                    Message,
                    role=st.just("assistant"),
                    content=names,
                    tool_calls=st.lists(calls, min_size=1, max_size=2).map(tuple),
                ),
                min_size=1,
                max_size=5,
            ).map(tuple),
            thinking=st.none() | st.booleans(),
            tools=st.none()
            | st.builds(
                Tools,
                offered=st.lists(tools, min_size=1, max_size=3, unique_by=lambda tool: tool.name).map(tuple),
                required=st.booleans(),
                single=st.booleans(),
            ),
        ),
    ),
    target=st.builds(Target, profile=names, model=names, domain=names),
    sampling=overrides,
    priority=st.sampled_from(Priority),
    tenant=st.from_regex(r"[A-Za-z0-9._:-]{0,64}", fullmatch=True),
    explain=st.booleans(),
)


@given(asks)
def test_a_request_survives_the_wire(ask: Ask) -> None:
    if ask.prompt.messages:
        chat = pb.ChatRequest.FromString(wire.chat_from_ask(ask).SerializeToString())
        assert wire.ask_from_chat(chat, LIMITS) == ask
    else:
        generate = pb.GenerateRequest.FromString(wire.generate_from_ask(ask).SerializeToString())
        assert wire.ask_from_generate(generate, LIMITS) == ask


def test_token_ids_survive_the_wire() -> None:
    target = Target(model="m")
    ask = Ask(request_id=RequestId("r"), prompt=Prompt(token_ids=(1, 2, 3)), target=target)
    assert wire.ask_from_generate(wire.generate_from_ask(ask), LIMITS) == ask


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_request_or_a_coded_error(data: bytes) -> None:
    try:
        request = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return  # not protobuf: gRPC refuses it before we see it
    try:
        ask = wire.ask_from_generate(request, LIMITS)
    except InvalidRequest as error:
        assert error.field
    else:
        assert ask.sampling.max_tokens is None or 1 <= ask.sampling.max_tokens <= 50


def generate(**fields: object) -> pb.GenerateRequest:
    defaults: dict[str, object] = {"request_id": "r", "prompt": "hello"}
    return pb.GenerateRequest(**{**defaults, **fields})  # type: ignore[arg-type]


def params(**fields: object) -> pb.SamplingParams:
    return pb.SamplingParams(**fields)  # type: ignore[arg-type]


MANY_BIASES = dict.fromkeys(range(301), 1.0)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(request_id="r"), "prompt"),
        (generate(prompt=""), "prompt"),
        (generate(prompt="é" * 501), "prompt"),
        (generate(request_id="no spaces"), "request_id"),
        (generate(request_id="x" * 65), "request_id"),
        (pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[1])), "target.model"),
        (generate(target=pb.Target(domain="d" * 200)), "target.domain"),
        (generate(sampling_params=params(temperature=-0.1)), "sampling_params.temperature"),
        (generate(sampling_params=params(temperature=math.nan)), "sampling_params.temperature"),
        (generate(sampling_params=params(temperature=math.inf)), "sampling_params.temperature"),
        (generate(sampling_params=params(top_p=0.0)), "sampling_params.top_p"),
        (generate(sampling_params=params(top_k=-1)), "sampling_params.top_k"),
        (generate(sampling_params=params(max_tokens=0)), "sampling_params.max_tokens"),
        (generate(sampling_params=params(max_tokens=51)), "sampling_params.max_tokens"),
        (generate(sampling_params=params(repetition_penalty=0.0)), "sampling_params.repetition_penalty"),
        (generate(sampling_params=params(stop=["x"] * 17)), "sampling_params.stop"),
        (generate(sampling_params=params(stop=["ok", ""])), "sampling_params.stop[1]"),
        (generate(sampling_params=params(stop=["x" * 257])), "sampling_params.stop[0]"),
        (generate(sampling_params=params(stop_token_ids=[-1])), "sampling_params.stop_token_ids"),
        (generate(sampling_params=params(regex="")), "sampling_params.regex"),
        (generate(sampling_params=params(logprobs=21)), "sampling_params.logprobs"),
        (generate(sampling_params=params(n=0)), "sampling_params.n"),
        (generate(sampling_params=params(n=17)), "sampling_params.n"),
        (generate(sampling_params=params(logit_bias={1: 101.0})), "sampling_params.logit_bias"),
        (generate(sampling_params=params(logit_bias={1: math.nan})), "sampling_params.logit_bias"),
        (generate(sampling_params=params(logit_bias={-1: 1.0})), "sampling_params.logit_bias"),
        (
            generate(sampling_params=params(logit_bias=MANY_BIASES)),
            "sampling_params.logit_bias",
        ),
        (generate(sampling_params=params(json_schema=" " * 65_537)), "sampling_params.json_schema"),
    ],
)
def test_a_bad_field_is_refused_by_name(request_: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.ask_from_generate(request_, LIMITS)
    assert caught.value.field == field


CALL = pb.ToolCall(id="c", name="f", arguments="{}")
LARGE = pb.ToolCall(name="f", arguments="{}" + " " * 1000)


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        (pb.Tools(), "tools"),
        (pb.Tools(offered=[pb.Tool(name=f"f{index}") for index in range(129)]), "tools"),
        (pb.Tools(offered=[pb.Tool(name="f"), pb.Tool(name="f")]), "tools[1].name"),
        (pb.Tools(offered=[pb.Tool(name="")]), "tools[0].name"),
        (pb.Tools(offered=[pb.Tool(name="f", description="x" * 1001)]), "tools"),
        (pb.Tools(offered=[pb.Tool(name="f", parameters="[" * 100_000)]), "tools[0].parameters"),
        (pb.Tools(offered=[pb.Tool(name="f", parameters='"x"')]), "tools[0].parameters"),
        (pb.Tools(offered=[pb.Tool(name="f")], named="g"), "tools.named"),
    ],
)
def test_bad_tools_are_refused_by_name(tools: pb.Tools, field: str) -> None:
    user = [pb.ChatMessage(role="user", content="x")]
    with pytest.raises(InvalidRequest) as caught:
        wire.ask_from_chat(pb.ChatRequest(request_id="r", messages=user, tools=tools), LIMITS)
    assert caught.value.field == field


def test_a_named_tool_is_a_required_one() -> None:
    user = [pb.ChatMessage(role="user", content="x")]
    named = pb.Tools(offered=[pb.Tool(name="f")], named="f")
    ask = wire.ask_from_chat(pb.ChatRequest(request_id="r", messages=user, tools=named), LIMITS)
    assert ask.prompt.tools == Tools(offered=(Tool(name="f"),), required=True, named="f")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([pb.ChatMessage(role="user", content="x")] * 11, "messages"),
        ([pb.ChatMessage(role="robot", content="x")], "messages[0].role"),
        ([pb.ChatMessage(role="user", content="x" * 1001)], "messages"),
        ([pb.ChatMessage(role="user", content="")], "messages[0].content"),
        ([pb.ChatMessage(role="user", content="x", tool_calls=[CALL])], "messages[0].tool_calls[0]"),
        (
            [pb.ChatMessage(role="assistant", tool_calls=[CALL, pb.ToolCall(name="f", arguments="[]")])],
            "messages[0].tool_calls[1].arguments",
        ),
        (
            [pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f g", arguments="{}")])],
            "messages[0].tool_calls[0].name",
        ),
        (
            [
                pb.ChatMessage(
                    role="assistant", tool_calls=[pb.ToolCall(name="f", arguments="{}" + " " * 1000)]
                )
            ],
            "messages",
        ),
    ],
)
def test_a_bad_conversation_is_refused_by_name(messages: list[pb.ChatMessage], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.ask_from_chat(pb.ChatRequest(request_id="r", messages=messages), LIMITS)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("max_tokens", 2**40, "1 to 2147483647"),
        ("seed", -1, "0 to 4294967295"),
        ("top_k", 2**31, "0 to 1000"),
        ("temperature", "hot", "0 to 5"),
        ("ignore_eos", "sometimes", "true or false"),
    ],
)
def test_what_the_wire_cannot_hold_is_refused_by_name(name: str, value: object, accepted: str) -> None:
    ask = Ask(request_id=RequestId("r"), prompt=Prompt(text="x"), sampling=SamplingOverrides(**{name: value}))
    with pytest.raises(InvalidRequest) as caught:
        wire.generate_from_ask(ask)
    assert caught.value.field == f"sampling_params.{name}"
    assert accepted in caught.value.message


def test_tokenize_takes_a_prompt_or_messages_but_not_both() -> None:
    both = pb.TokenizeRequest(prompt="x", messages=[pb.ChatMessage(role="user", content="y")])
    with pytest.raises(InvalidRequest):
        wire.prompt_from_tokenize(both, LIMITS)
    assert wire.prompt_from_tokenize(pb.TokenizeRequest(prompt="x"), LIMITS) == Prompt(text="x")


def test_a_result_survives_the_wire() -> None:
    node = NodeId("a" * 32)
    result = Result(
        request_id=RequestId("r"),
        generation_id="g",
        completion=Completion(
            finish_reason=FinishReason.LENGTH,
            usage=Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=1, reasoning_tokens=1),
            matched_stop="END",
            seed=7,
            choices=(
                Choice(index=0, finish_reason=FinishReason.LENGTH, completion_tokens=1, seed=7),
                Choice(
                    index=1, finish_reason=FinishReason.STOP, completion_tokens=4, matched_stop="x", seed=8
                ),
            ),
        ),
        profile="p",
        model="m",
        domain="d",
        fallback=True,
        entry_node=node,
        entry_node_name="a",
        served_by=node,
        served_by_name="a",
        attempts=(
            Attempt(
                node=node,
                node_name="a",
                model_fingerprint="f",
                epoch=1,
                first_token_index=0,
                last_token_index=1,
                reason="served",
            ),
        ),
        hops=1,
        ttft_s=0.5,
        duration_s=1.5,
        explanation=Explanation(
            policy="random",
            classified_domain="d",
            classified_confidence=0.5,
            candidates=(
                CandidateNote(node=node, node_name="a", profile="p", score=1.5, eligible=True, reason="why"),
            ),
        ),
    )
    sent = pb.Complete.FromString(wire.result_to_proto(result).SerializeToString())
    assert wire.result_from_proto(sent) == result


likelihoods = st.builds(
    TokenLogprob,
    token_id=st.integers(0, 2**31 - 1),
    piece=st.binary(max_size=4),
    logprob=st.floats(max_value=0, width=32, allow_nan=False),
)
logprobs = st.builds(Logprobs, drawn=likelihoods, top=st.lists(likelihoods, max_size=3).map(tuple))


@given(st.builds(Chunk, generation_id=names, epoch=st.integers(0, 9), first_token_index=st.integers(0, 9999),
                 token_ids=st.lists(st.integers(0, 2**31 - 1)).map(tuple), text=names,
                 index=st.integers(0, 15), reasoning=names,
                 tool_calls=st.lists(st.builds(ToolCallPart, index=st.integers(0, 9), name=names,
                                               arguments=names), max_size=3).map(tuple),
                 logprobs=st.lists(logprobs, max_size=3).map(tuple)))  # fmt: skip
def test_a_chunk_survives_the_wire(chunk: Chunk) -> None:
    sent = pb.Chunk.FromString(wire.chunk_to_proto(chunk).SerializeToString())
    assert wire.chunk_from_proto(sent) == chunk


def test_a_load_survives_the_wire_and_nonsense_reads_as_unknown() -> None:
    load = Load(engine=EngineState.READY, slots=4, running=2, queued=1, queue_max=8, decode_tokens_per_s=10.5)
    load = replace(load, cold=(ColdProfile(profile="code", load_s=2.5),))
    assert wire.load_from_proto(wire.load_to_proto(load)) == load
    too_many = pb.Load(cold=[pb.ColdProfile(profile="x" * 100, load_s=math.inf)] * 20)
    assert wire.load_from_proto(too_many).cold == (ColdProfile(profile="x" * 63, load_s=0.0),) * 16
    nonsense = pb.Load(engine=77, decode_tokens_per_s=math.nan, prefill_tokens_per_s=-1)  # type: ignore[arg-type]
    read = wire.load_from_proto(nonsense)
    assert (read.engine, read.decode_tokens_per_s, read.prefill_tokens_per_s) == (EngineState.LOST, 0.0, 0.0)
