"""What the client hands out. Owns: the records of results and of the mesh, and reading them from the wire.

Must not: import grpc.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from fieldmesh.core.errors import Internal
from fieldmesh.core.model import (
    CHOICES_MAX,
    Address,
    Attempt,
    Chunk,
    Completion,
    Explanation,
    FinishReason,
    Load,
    Logprobs,
    NodeState,
    ToolCall,
)
from fieldmesh.core.model import Choice as ChoiceEnd
from fieldmesh.core.timeline import NodeSpans
from fieldmesh.core.tools import Calls
from fieldmesh.rpc import inference as codec
from fieldmesh.rpc.tracing import spans_from_proto
from fieldmesh.v1 import inference_pb2, mesh_pb2, trace_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of the completions of a request; ``logprobs`` has an entry for each token where asked for,
    ``reasoning`` is what a thinking model said to itself before the ``text``.

    ``tool_calls`` are to be run by who asked: the conversation goes on with a ``Message`` of the assistant
    that holds them, and one of the role ``tool`` with the result of each.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str
    seed: int
    logprobs: tuple[Logprobs, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a request ended. Times are seconds from its arrival at the node that was asked.

    ``domain`` is the one that was asked for or that the mesh chose (empty: none); ``fallback`` says that a
    generalist answered because no owner of that domain could. ``entry_node`` was asked, ``served_by``
    answered (names; the ids are beside them); ``attempts`` lists every try with the code of the error that
    ended it, or ``served``; ``hops`` counts how often the request was forwarded. ``cached_tokens`` of the
    prompt did not have to be computed. ``seed`` repeats the draw. ``explanation`` is there if it was asked
    for. ``choices`` has all completions (one, unless ``n`` asked for more); the fields above are those of the
    first, but for ``completion_tokens`` and, among them, ``reasoning_tokens``: those count the tokens of all.
    ``trace_id`` is what ``Client.trace`` takes.
    """

    text: str
    token_ids: tuple[int, ...]
    model: str
    profile: str
    domain: str
    fallback: bool
    entry_node: str
    served_by: str
    attempts: tuple[Attempt, ...]
    hops: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    ttft_s: float
    duration_s: float
    finish_reason: FinishReason
    matched_stop: str
    seed: int
    request_id: str
    generation_id: str
    entry_node_id: str
    served_by_id: str
    choices: tuple[Choice, ...] = ()
    explanation: Explanation | None = None
    trace_id: str = ""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Those of the first completion."""
        return self.choices[0].tool_calls if self.choices else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One profile at one node. A generalist has no ``domains``; ``available``: it can be asked now."""

    profile: str
    model: str
    fingerprint: str
    domains: tuple[str, ...]
    tier: int
    context_tokens: int
    node_id: str
    node_name: str
    available: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node as the node that was asked sees it.

    ``addresses`` are those of its client listener, best first; ``rtt_s`` is 0 while unmeasured;
    ``incarnation`` rises at each start of the node.
    """

    id: str
    name: str
    addresses: tuple[Address, ...]
    state: NodeState
    offers: tuple[Offer, ...]
    load: Load
    incarnation: int
    rtt_s: float
    peer_address: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The mesh as the node ``local_id`` sees it; ``nodes`` are ordered by id and include that node."""

    name: str
    local_id: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoad:
    """How busy one node says it is."""

    node_id: str
    node_name: str
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids of a prompt under the tokenizer of ``model``."""

    token_ids: tuple[int, ...]
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Vectors of length 1, one for each text; compare only those of one ``model_fingerprint``."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int
    profile: str
    model: str
    model_fingerprint: str
    served_by: str
    served_by_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentNode:
    """A node that did not say what it has of a trace, and why not."""

    node_id: str
    node_name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What the nodes keep of a trace; ``core.timeline`` makes one tree of it."""

    trace_id: str
    nodes: tuple[NodeSpans, ...]
    silent_nodes: tuple[SilentNode, ...]


def as_json(record: object) -> Any:
    """``record`` (or several) as plain JSON: enums by value, bytes as text, no finite number as null."""
    return _finite(msgspec.to_builtins(record, builtin_types=(bytes,), enc_hook=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- from the wire -----------------------------------------------------------------------


class _Part:
    """What has arrived of one completion."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.reasonings: list[str] = []
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return "".join(self._texts)

    def add(self, chunk: Chunk) -> None:
        if chunk.first_token_index != len(self.token_ids):
            raise Internal(
                f"The stream went on at token {chunk.first_token_index} after {len(self.token_ids)} "
                "tokens: some were lost or repeated on the way."
            )
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.reasonings.append(chunk.reasoning)
        if chunk.text:
            self._texts.append(chunk.text)


class Reply:
    """What has arrived of one stream. ``take`` reads a message; ``result`` is set by the last one."""

    def __init__(self, trace_id: str = "") -> None:
        self._trace_id = trace_id
        self._parts: dict[int, _Part] = {0: _Part()}
        self._calls = Calls()
        self.result: Result | None = None

    @property
    def text(self) -> str:
        """The text so far, of the first completion."""
        return self._parts[0].text

    @property
    def tokens(self) -> int:
        """How many tokens have arrived."""
        return sum(len(part.token_ids) for part in self._parts.values())

    @property
    def begun(self) -> bool:
        """Whether something was delivered, so that asking again would repeat it."""
        return any(part.token_ids or part.text for part in self._parts.values())

    def take(self, message: inference_pb2.GenerateResponse | inference_pb2.ChatResponse) -> Chunk | None:
        """The chunk that ``message`` holds; None for the end. Raises Internal where tokens are missing."""
        match message.WhichOneof("response"):
            case "chunk":
                chunk = codec.chunk_from_proto(message.chunk)
                if chunk.index >= CHOICES_MAX:
                    raise Internal(f"The stream held completion {chunk.index}, which nobody asked for.")
                self._parts.setdefault(chunk.index, _Part()).add(chunk)
                self._calls.add(chunk)
                return chunk
            case "complete":
                self.result = self._result(message.complete)
                return None
            case _:
                raise Internal("The stream held a message of a kind that this client does not know.")

    def _choices(self, completion: Completion) -> tuple[Choice, ...]:
        only = ChoiceEnd(
            index=0,
            finish_reason=completion.finish_reason,
            completion_tokens=completion.usage.completion_tokens,
            matched_stop=completion.matched_stop,
            seed=completion.seed,
        )
        made = []
        for end in completion.choices or (only,):
            part = self._parts.get(end.index) or _Part()
            made.append(
                Choice(
                    index=end.index,
                    text=part.text,
                    token_ids=tuple(part.token_ids),
                    finish_reason=end.finish_reason,
                    matched_stop=end.matched_stop,
                    seed=end.seed,
                    logprobs=tuple(part.logprobs),
                    reasoning="".join(part.reasonings),
                    tool_calls=tuple(self._calls.of(end.index)),
                )
            )
        return tuple(made)

    def _result(self, complete: inference_pb2.Complete) -> Result:
        core = codec.result_from_proto(complete)
        return Result(
            text=self.text,
            token_ids=tuple(self._parts[0].token_ids),
            model=core.model,
            profile=core.profile,
            domain=core.domain,
            fallback=core.fallback,
            entry_node=core.entry_node_name,
            served_by=core.served_by_name,
            attempts=core.attempts,
            hops=core.hops,
            prompt_tokens=core.completion.usage.prompt_tokens,
            cached_tokens=core.completion.usage.cached_tokens,
            completion_tokens=core.completion.usage.completion_tokens,
            reasoning_tokens=core.completion.usage.reasoning_tokens,
            ttft_s=core.ttft_s,
            duration_s=core.duration_s,
            finish_reason=core.completion.finish_reason,
            matched_stop=core.completion.matched_stop,
            seed=core.completion.seed,
            request_id=core.request_id,
            generation_id=core.generation_id,
            entry_node_id=core.entry_node,
            served_by_id=core.served_by,
            choices=self._choices(core.completion),
            explanation=core.explanation,
            trace_id=self._trace_id,
        )


def embedded_from_proto(response: inference_pb2.EmbedResponse) -> Embedded:
    """Vectors of texts."""
    made = codec.embeddings_from_proto(response)
    return Embedded(
        vectors=made.vectors,
        prompt_tokens=made.prompt_tokens,
        profile=response.profile,
        model=response.model,
        model_fingerprint=response.model_fingerprint,
        served_by=response.served_by,
        served_by_id=response.served_by_id,
    )


def traced_from_proto(response: trace_pb2.GetTraceResponse) -> Traced:
    """A trace."""
    return Traced(
        trace_id=response.trace_id,
        nodes=tuple(spans_from_proto(node) for node in response.nodes),
        silent_nodes=tuple(
            SilentNode(node_id=node.node_id, node_name=node.node_name, reason=node.reason)
            for node in response.silent_nodes
        ),
    )


def offer_from_proto(entry: inference_pb2.ModelEntry) -> Offer:
    """One profile at one node."""
    return Offer(
        profile=entry.profile,
        model=entry.model,
        fingerprint=entry.fingerprint,
        domains=tuple(entry.domains),
        tier=entry.tier,
        context_tokens=entry.context_tokens,
        node_id=entry.node_id,
        node_name=entry.node_name,
        available=entry.available,
    )


def load_from_proto(entry: inference_pb2.NodeLoad) -> NodeLoad:
    """How busy one node is."""
    return NodeLoad(node_id=entry.node_id, node_name=entry.node_name, load=codec.load_from_proto(entry.load))


_STATES = {
    mesh_pb2.NODE_STATE_ALIVE: NodeState.ALIVE,
    mesh_pb2.NODE_STATE_SUSPECT: NodeState.SUSPECT,
    mesh_pb2.NODE_STATE_UNREACHABLE: NodeState.UNREACHABLE,
    mesh_pb2.NODE_STATE_DEAD: NodeState.DEAD,
    mesh_pb2.NODE_STATE_LEFT: NodeState.LEFT,
}


def mesh_from_proto(response: mesh_pb2.ListNodesResponse) -> Mesh:
    """The mesh as a node sees it."""
    return Mesh(
        name=response.mesh,
        local_id=response.local_id,
        nodes=tuple(_node(entry) for entry in response.nodes),
    )


def _node(entry: mesh_pb2.NodeInfo) -> Node:
    found = (_address(text) for text in entry.addresses)
    return Node(
        id=entry.id,
        name=entry.name,
        addresses=tuple(address for address in found if address is not None),
        state=_STATES.get(entry.state, NodeState.UNREACHABLE),
        offers=tuple(offer_from_proto(offer) for offer in entry.offers),
        load=codec.load_from_proto(entry.load),
        incarnation=entry.incarnation,
        rtt_s=entry.rtt_s,
        peer_address=entry.peer_address,
        version=entry.version,
    )


def _address(text: str) -> Address | None:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 65_536:
        return None
    return Address(host=host.removeprefix("[").removesuffix("]"), port=int(port))
