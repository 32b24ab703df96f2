"""The codec of inference: requests, chunks, results and loads, to protobuf and back.

Owns: every bound on what a client may send (those of sampling are in ``rpc.sampling``); a request that comes
out of here is valid but for what only the serving node can know (the prompt's length in tokens, the models
that exist). Must not: import grpc.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import (
    Ask,
    Attempt,
    CandidateNote,
    Choice,
    Chunk,
    ColdProfile,
    Completion,
    Embeddings,
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
    Target,
    TokenLogprob,
    Usage,
)
from fieldmesh.rpc.sampling import fill_params, overrides_from_proto, token_ids
from fieldmesh.rpc.tools import (
    calls_from_proto,
    calls_to_proto,
    check_call,
    parts_from_proto,
    parts_to_proto,
    tools_from_proto,
    tools_to_proto,
)
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1 import peer_pb2

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
ROLES: Final = ("system", "user", "assistant", "tool")
NAME_CHARS_MAX: Final = 128
EMBED_TEXTS_MAX: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may hold. ``prompt_bytes_max`` counts the UTF-8 of all its text."""

    prompt_bytes_max: int = 1_000_000
    prompt_tokens_max: int = 131_072
    messages_max: int = 1_000
    max_tokens_max: int = 131_072


# --- requests in -------------------------------------------------------------------------


def ask_from_generate(request: pb.GenerateRequest, limits: RequestLimits) -> Ask:
    """A validated Ask; the request id must be set by now. Raises InvalidRequest."""
    match request.WhichOneof("input"):
        case "prompt":
            prompt = Prompt(text=_text("prompt", request.prompt, limits))
        case "token_ids":
            prompt = Prompt(token_ids=token_ids("token_ids", request.token_ids.ids, limits.prompt_tokens_max))
            if not (request.target.profile or request.target.model):
                raise InvalidRequest(
                    "token_ids mean something only to one model: name it in target.model or target.profile",
                    field="target.model",
                )
        case _:
            raise InvalidRequest(
                "Set prompt (text) or token_ids: there is nothing to continue", field="prompt"
            )
    return _ask(request, prompt, limits)


def ask_from_chat(request: pb.ChatRequest, limits: RequestLimits) -> Ask:
    """A validated Ask; the request id must be set by now. Raises InvalidRequest."""
    thinking = request.enable_thinking if request.HasField("enable_thinking") else None
    tools = tools_from_proto(request.tools, limits.prompt_bytes_max) if request.HasField("tools") else None
    prompt = Prompt(messages=_messages(request.messages, limits), thinking=thinking, tools=tools)
    return _ask(request, prompt, limits)


def prompt_from_tokenize(request: pb.TokenizeRequest, limits: RequestLimits) -> Prompt:
    """What to tokenise. Raises InvalidRequest."""
    if request.prompt and request.messages:
        raise InvalidRequest("Set prompt or messages, not both", field="messages")
    if request.messages:
        return Prompt(messages=_messages(request.messages, limits))
    return Prompt(text=_text("prompt", request.prompt, limits))


def texts_from_embed(request: pb.EmbedRequest, limits: RequestLimits) -> tuple[str, ...]:
    """What to embed. Raises InvalidRequest."""
    texts = tuple(request.inputs)
    if not 1 <= len(texts) <= EMBED_TEXTS_MAX:
        raise InvalidRequest(
            f"inputs has {len(texts)} texts; accepted are 1 to {EMBED_TEXTS_MAX}", field="inputs"
        )
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequest(
                f"inputs[{index}] is empty; send at least one character", field=f"inputs[{index}]"
            )
    if sum(len(text.encode()) for text in texts) > limits.prompt_bytes_max:
        raise InvalidRequest(
            f"inputs are larger than {limits.prompt_bytes_max} bytes of UTF-8 together", field="inputs"
        )
    return texts


def embeddings_to_proto(embeddings: Embeddings) -> list[pb.Embedding]:
    """Vectors."""
    return [pb.Embedding(values=vector) for vector in embeddings.vectors]


def embeddings_from_proto(response: pb.EmbedResponse | peer_pb2.EmbedForwardedResponse) -> Embeddings:
    """Vectors, and how many tokens they are of."""
    return Embeddings(
        vectors=tuple(tuple(embedding.values) for embedding in response.embeddings),
        prompt_tokens=response.prompt_tokens,
    )


def target_from_proto(target: pb.Target) -> Target:
    """Who should answer. Raises InvalidRequest."""
    for name in ("profile", "model", "domain"):
        value = getattr(target, name)
        if len(value) > NAME_CHARS_MAX:
            raise InvalidRequest(
                f"target.{name} has {len(value)} characters; at most {NAME_CHARS_MAX} are accepted",
                field=f"target.{name}",
            )
    return Target(profile=target.profile, model=target.model, domain=target.domain)


def _ask(request: pb.GenerateRequest | pb.ChatRequest, prompt: Prompt, limits: RequestLimits) -> Ask:
    return Ask(
        request_id=request_id(request.request_id),
        prompt=prompt,
        target=target_from_proto(request.target),
        sampling=overrides_from_proto(request.sampling_params, limits.max_tokens_max),
        priority=_PRIORITIES.get(request.priority, Priority.NORMAL),
        tenant=tenant(request.tenant),
        explain=request.explain,
    )


def tenant(text: str) -> str:
    """``text`` as the name of whom a request is for. Raises InvalidRequest."""
    if text and not REQUEST_ID.fullmatch(text):
        raise InvalidRequest(
            "tenant must have at most 64 characters of A-Z, a-z, 0-9, '.', '_', ':' and '-'", field="tenant"
        )
    return text


def request_id(text: str) -> RequestId:
    """``text`` as a request id. Raises InvalidRequest."""
    if not REQUEST_ID.fullmatch(text):
        raise InvalidRequest(
            "request_id must have 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', ':' and '-'",
            field="request_id",
        )
    return RequestId(text)


def _text(field: str, text: str, limits: RequestLimits) -> str:
    if not text:
        raise InvalidRequest(f"{field} is empty; send at least one character", field=field)
    # A string has at least as many UTF-8 bytes as characters: the cheap test first.
    if len(text) > limits.prompt_bytes_max or len(text.encode()) > limits.prompt_bytes_max:
        raise InvalidRequest(f"{field} is larger than {limits.prompt_bytes_max} bytes of UTF-8", field=field)
    return text


def _messages(messages: Iterable[pb.ChatMessage], limits: RequestLimits) -> tuple[Message, ...]:
    found = tuple(
        Message(
            role=message.role,
            content=message.content,
            tool_calls=calls_from_proto(message.tool_calls),
            tool_call_id=message.tool_call_id,
        )
        for message in messages
    )
    if not found:
        raise InvalidRequest("messages is empty; send at least one message", field="messages")
    if len(found) > limits.messages_max:
        raise InvalidRequest(
            f"messages has {len(found)} entries; at most {limits.messages_max} are accepted", field="messages"
        )
    bytes_total = 0
    for index, message in enumerate(found):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"messages[{index}].role is {message.role[:40]!r}; accepted are {', '.join(ROLES)}",
                field=f"messages[{index}].role",
            )
        bytes_total += len(message.content.encode()) + len(message.tool_call_id)
        for position, call in enumerate(message.tool_calls):
            bytes_total += len(call.arguments.encode()) + len(call.id)
            check_call(call, message.role, f"messages[{index}].tool_calls[{position}]")
    if bytes_total > limits.prompt_bytes_max:
        raise InvalidRequest(
            f"messages hold {bytes_total} bytes of text; at most {limits.prompt_bytes_max} are accepted",
            field="messages",
        )
    if not any(message.content or message.tool_calls for message in found):
        raise InvalidRequest(
            "messages hold no text; send at least one character", field="messages[0].content"
        )
    return found


_PRIORITIES: Final = {
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_BATCH: Priority.BATCH,
}
_PRIORITIES_OUT: Final = {core: wire for wire, core in _PRIORITIES.items()}


# --- requests out ------------------------------------------------------------------------


def generate_from_ask(ask: Ask) -> pb.GenerateRequest:
    """The Generate request that says ``ask``, whose prompt is text or token ids."""
    request = pb.GenerateRequest()
    _fill(request, ask)
    if ask.prompt.text is not None:
        request.prompt = ask.prompt.text
    else:
        request.token_ids.ids.extend(ask.prompt.token_ids)
    return request


def chat_from_ask(ask: Ask) -> pb.ChatRequest:
    """The Chat request that says ``ask``, whose prompt is messages."""
    request = pb.ChatRequest()
    _fill(request, ask)
    request.messages.extend(messages_to_proto(ask.prompt.messages))
    if ask.prompt.thinking is not None:
        request.enable_thinking = ask.prompt.thinking
    if ask.prompt.tools is not None:
        request.tools.CopyFrom(tools_to_proto(ask.prompt.tools))
    return request


def messages_to_proto(messages: Iterable[Message]) -> list[pb.ChatMessage]:
    """Turns of a conversation."""
    return [
        pb.ChatMessage(
            role=message.role,
            content=message.content,
            tool_calls=calls_to_proto(message.tool_calls),
            tool_call_id=message.tool_call_id,
        )
        for message in messages
    ]


def target_to_proto(target: Target) -> pb.Target:
    """Who should answer."""
    return pb.Target(profile=target.profile, model=target.model, domain=target.domain)


def _fill(request: pb.GenerateRequest | pb.ChatRequest, ask: Ask) -> None:
    request.request_id = ask.request_id
    request.target.CopyFrom(target_to_proto(ask.target))
    request.priority = _PRIORITIES_OUT[ask.priority]
    request.tenant = ask.tenant
    request.explain = ask.explain
    fill_params(request.sampling_params, ask.sampling)


# --- streams -----------------------------------------------------------------------------


def chunk_to_proto(chunk: Chunk) -> pb.Chunk:
    """One chunk."""
    return pb.Chunk(
        generation_id=chunk.generation_id,
        epoch=chunk.epoch,
        first_token_index=chunk.first_token_index,
        token_ids=chunk.token_ids,
        text=chunk.text,
        index=chunk.index,
        logprobs=[
            pb.Logprobs(drawn=_logprob_to_proto(entry.drawn), top=map(_logprob_to_proto, entry.top))
            for entry in chunk.logprobs
        ],
        reasoning=chunk.reasoning,
        tool_calls=parts_to_proto(chunk),
    )


def _logprob_to_proto(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=entry.token_id, piece=entry.piece, logprob=entry.logprob)


def _logprob_from_proto(entry: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=entry.token_id, piece=entry.piece, logprob=entry.logprob)


def chunk_from_proto(chunk: pb.Chunk) -> Chunk:
    """One chunk."""
    return Chunk(
        generation_id=chunk.generation_id,
        epoch=chunk.epoch,
        first_token_index=chunk.first_token_index,
        token_ids=tuple(chunk.token_ids),
        text=chunk.text,
        index=chunk.index,
        logprobs=tuple(
            Logprobs(drawn=_logprob_from_proto(entry.drawn), top=tuple(map(_logprob_from_proto, entry.top)))
            for entry in chunk.logprobs
        ),
        reasoning=chunk.reasoning,
        tool_calls=parts_from_proto(chunk.tool_calls),
    )


_FINISH: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
_FINISH_IN: Final = {wire: core for core, wire in _FINISH.items()}


def result_to_proto(result: Result) -> pb.Complete:
    """The end of a stream."""
    complete = pb.Complete(
        generation_id=result.generation_id,
        request_id=result.request_id,
        profile=result.profile,
        model=result.model,
        domain=result.domain,
        fallback=result.fallback,
        entry_node_id=result.entry_node,
        entry_node=result.entry_node_name,
        served_by_id=result.served_by,
        served_by=result.served_by_name,
        attempts=[_attempt_to_proto(attempt) for attempt in result.attempts],
        hops=result.hops,
        ttft_s=result.ttft_s,
        duration_s=result.duration_s,
    )
    fill_completion(complete, result.completion)
    if result.explanation is not None:
        complete.explanation.CopyFrom(_explanation_to_proto(result.explanation))
    return complete


def fill_completion(complete: pb.Complete, completion: Completion) -> None:
    """Write what the engine said into ``complete``."""
    complete.finish_reason = _FINISH[completion.finish_reason]
    complete.matched_stop = completion.matched_stop
    complete.seed = completion.seed
    complete.usage.prompt_tokens = completion.usage.prompt_tokens
    complete.usage.cached_tokens = completion.usage.cached_tokens
    complete.usage.completion_tokens = completion.usage.completion_tokens
    complete.usage.reasoning_tokens = completion.usage.reasoning_tokens
    complete.choices.extend(
        pb.Choice(
            index=choice.index,
            finish_reason=_FINISH[choice.finish_reason],
            matched_stop=choice.matched_stop,
            completion_tokens=choice.completion_tokens,
            seed=choice.seed,
        )
        for choice in completion.choices
    )


def completion_from_proto(complete: pb.Complete) -> Completion:
    """What the engine said."""
    return Completion(
        finish_reason=_FINISH_IN.get(complete.finish_reason, FinishReason.ERROR),
        matched_stop=complete.matched_stop,
        seed=complete.seed,
        usage=Usage(
            prompt_tokens=complete.usage.prompt_tokens,
            cached_tokens=complete.usage.cached_tokens,
            completion_tokens=complete.usage.completion_tokens,
            reasoning_tokens=complete.usage.reasoning_tokens,
        ),
        choices=tuple(
            Choice(
                index=choice.index,
                finish_reason=_FINISH_IN.get(choice.finish_reason, FinishReason.ERROR),
                matched_stop=choice.matched_stop,
                completion_tokens=choice.completion_tokens,
                seed=choice.seed,
            )
            for choice in complete.choices
        ),
    )


def result_from_proto(complete: pb.Complete) -> Result:
    """The end of a stream."""
    return Result(
        request_id=RequestId(complete.request_id),
        generation_id=complete.generation_id,
        completion=completion_from_proto(complete),
        profile=complete.profile,
        model=complete.model,
        domain=complete.domain,
        fallback=complete.fallback,
        entry_node=NodeId(complete.entry_node_id),
        entry_node_name=complete.entry_node,
        served_by=NodeId(complete.served_by_id),
        served_by_name=complete.served_by,
        attempts=tuple(_attempt_from_proto(attempt) for attempt in complete.attempts),
        hops=complete.hops,
        ttft_s=complete.ttft_s,
        duration_s=complete.duration_s,
        explanation=_explanation_from_proto(complete.explanation)
        if complete.HasField("explanation")
        else None,
    )


def _attempt_to_proto(attempt: Attempt) -> pb.Attempt:
    return pb.Attempt(
        node_id=attempt.node,
        node_name=attempt.node_name,
        model_fingerprint=attempt.model_fingerprint,
        epoch=attempt.epoch,
        first_token_index=attempt.first_token_index,
        last_token_index=attempt.last_token_index,
        reason=attempt.reason,
    )


def _attempt_from_proto(attempt: pb.Attempt) -> Attempt:
    return Attempt(
        node=NodeId(attempt.node_id),
        node_name=attempt.node_name,
        model_fingerprint=attempt.model_fingerprint,
        epoch=attempt.epoch,
        first_token_index=attempt.first_token_index,
        last_token_index=attempt.last_token_index,
        reason=attempt.reason,
    )


def _explanation_to_proto(explanation: Explanation) -> pb.Explanation:
    return pb.Explanation(
        policy=explanation.policy,
        classified_domain=explanation.classified_domain,
        classified_confidence=explanation.classified_confidence,
        candidates=[
            pb.Candidate(
                node_id=candidate.node,
                node_name=candidate.node_name,
                profile=candidate.profile,
                score=candidate.score,
                eligible=candidate.eligible,
                reason=candidate.reason,
            )
            for candidate in explanation.candidates
        ],
    )


def _explanation_from_proto(explanation: pb.Explanation) -> Explanation:
    return Explanation(
        policy=explanation.policy,
        classified_domain=explanation.classified_domain,
        classified_confidence=explanation.classified_confidence,
        candidates=tuple(
            CandidateNote(
                node=NodeId(candidate.node_id),
                node_name=candidate.node_name,
                profile=candidate.profile,
                score=candidate.score,
                eligible=candidate.eligible,
                reason=candidate.reason,
            )
            for candidate in explanation.candidates
        ),
    )


# --- load --------------------------------------------------------------------------------

_ENGINE_STATES: Final = {
    EngineState.LOADING: pb.ENGINE_STATE_LOADING,
    EngineState.READY: pb.ENGINE_STATE_READY,
    EngineState.LOST: pb.ENGINE_STATE_LOST,
    EngineState.FAILED: pb.ENGINE_STATE_FAILED,
}
COLD_PROFILES_MAX: Final = 16
PROFILE_CHARS_MAX: Final = 63
_ENGINE_STATES_IN: Final = {wire: core for core, wire in _ENGINE_STATES.items()}
_LOAD_COUNTS: Final = (
    "slots",
    "running",
    "queued",
    "queue_max",
    "kv_cells_used",
    "kv_cells_total",
    "pending_prefill_tokens",
    "pending_decode_tokens",
)


def load_to_proto(load: Load) -> pb.Load:
    """How busy a node is."""
    return pb.Load(
        engine=_ENGINE_STATES[load.engine],
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_tokens_per_s=load.decode_tokens_per_s,
        draining=load.draining,
        cold=[pb.ColdProfile(profile=c.profile, load_s=c.load_s) for c in load.cold],
        **{name: getattr(load, name) for name in _LOAD_COUNTS},
    )


def load_from_proto(load: pb.Load) -> Load:
    """How busy a node is. A peer's nonsense (speeds and times that are none) reads as "not known"."""
    return Load(
        engine=_ENGINE_STATES_IN.get(load.engine, EngineState.LOST),
        prefill_tokens_per_s=_speed(load.prefill_tokens_per_s),
        decode_tokens_per_s=_speed(load.decode_tokens_per_s),
        draining=load.draining,
        cold=tuple(
            ColdProfile(profile=c.profile[:PROFILE_CHARS_MAX], load_s=_speed(c.load_s))
            for c in load.cold[:COLD_PROFILES_MAX]
        ),
        **{name: getattr(load, name) for name in _LOAD_COUNTS},
    )


def _speed(number: float) -> float:
    return number if math.isfinite(number) and number > 0 else 0.0
