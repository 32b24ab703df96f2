"""The nouns: ids and frozen records that cross rooms. Owns no behaviour beyond derived values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import NewType

NodeId = NewType("NodeId", str)
"""32 lower-case hex digits: the head of SHA-256 over the node's public key (DER)."""

RequestId = NewType("RequestId", str)
"""Made by the client; 1 to 64 characters of ``[A-Za-z0-9._:-]``. A repeat is answered, not done again."""

CHOICES_MAX = 16
"""Completions that one request may ask for."""

PROTOCOL_VERSION_MIN = 1
PROTOCOL_VERSION_MAX = 1


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Address:
    """Where a listener can be reached. ``host`` is a name or a bare IP literal (IPv6 without brackets)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class NodeState(Enum):
    """What this node believes of a member.

    ``UNREACHABLE``: others hear it, we do not (a cut or one-way link); never routed to.
    """

    ALIVE = "alive"
    SUSPECT = "suspect"
    UNREACHABLE = "unreachable"
    DEAD = "dead"
    LEFT = "left"


class EngineState(Enum):
    """What the engine's process is doing; anything but READY takes no work."""

    LOADING = "loading"
    READY = "ready"
    LOST = "lost"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdProfile:
    """A profile whose model is not in memory, and about how long it takes to be there."""

    profile: str
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy one node is, as it says itself. Speeds are measured; 0 means not yet known.

    ``decode_tokens_per_s`` is one stream's speed at the present batch size.
    ``pending_prefill_tokens`` and ``pending_decode_tokens`` bound the work admitted and queued. ``cold``
    profiles are served after a load.
    """

    engine: EngineState = EngineState.LOADING
    slots: int = 0
    running: int = 0
    queued: int = 0
    queue_max: int = 0
    kv_cells_used: int = 0
    kv_cells_total: int = 0
    pending_prefill_tokens: int = 0
    pending_decode_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    draining: bool = False
    cold: tuple[ColdProfile, ...] = ()

    def load_s(self, profile: str) -> float:
        """Seconds until the model of a profile is in memory; 0 where it is."""
        return next((c.load_s for c in self.cold if c.profile == profile), 0.0)

    @property
    def slots_free(self) -> int:
        return max(0, self.slots - self.running)

    @property
    def kv_pressure(self) -> float:
        """Share of KV cells in use, 0 to 1."""
        return self.kv_cells_used / self.kv_cells_total if self.kv_cells_total else 0.0

    @property
    def accepting(self) -> bool:
        """Whether one more request could be queued here."""
        return (
            self.engine is EngineState.READY
            and not self.draining
            and (self.slots_free > 0 or self.queued < self.queue_max)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter's file and how strongly it is applied (1: as it was trained)."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What a profile is good at, in the words that the classifier learns from."""

    name: str
    description: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOffer:
    """One profile that a node serves. ``model`` is the model's name, ``fingerprint`` its content's hash.

    A profile without domains is a generalist: it answers what no specialist owns.
    """

    name: str
    model: str
    fingerprint: str
    domains: tuple[Domain, ...] = ()
    tier: int = 1
    context_tokens: int = 2048

    @property
    def generalist(self) -> bool:
        return not self.domains


class SeatKind(Enum):
    """What a node is to a replicated log: it votes, it is being made ready to, or it follows."""

    VOTER = "voter"
    LEARNER = "learner"
    OBSERVER = "observer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which replicated log a node belongs to or follows (``log`` names it for ever), and as what."""

    log: str
    epoch: int
    kind: SeatKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one node says of itself in the directory: slow facts, one signed row a node.

    ``addresses`` lists the peer listener's addresses, ``client_addresses`` those that clients can reach,
    ``http_addresses`` those of its web page and of the APIs over HTTP, where it has them.
    """

    id: NodeId
    name: str
    mesh: str
    incarnation: int
    sequence: int
    addresses: tuple[Address, ...]
    client_addresses: tuple[Address, ...]
    http_addresses: tuple[Address, ...] = ()
    profiles: tuple[ProfileOffer, ...] = ()
    seat: Seat | None = None
    version: str = ""
    protocol_min: int = PROTOCOL_VERSION_MIN
    protocol_max: int = PROTOCOL_VERSION_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node as another sees it: liveness and load from heartbeats, offers from the directory.

    ``address`` is the peer address that works for us; ``rtt_s`` is 0 while unmeasured.
    """

    id: NodeId
    name: str
    address: Address
    state: NodeState
    incarnation: int
    load: Load = field(default_factory=Load)
    rtt_s: float = 0.0
    row: Row | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshView:
    """The mesh as one node sees it now: immutable, ordered by node id, the local node included."""

    local: NodeId
    members: tuple[Member, ...]
    revision: int = 0


class FinishReason(Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TOOL_CALLS = "tool_calls"


class Priority(Enum):
    """Which queue a request waits in; lower values go first."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class ConstraintKind(Enum):
    """What a constraint is written in; the value is its field in ``fieldmesh.v1.SamplingParams``. TOOLS is
    made by the engine from ``Prompt.tools``, and never sent."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    JSON_OBJECT = "json_object"
    TOOLS = "tools"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What an answer must match from its first character to its last. JSON_OBJECT has no ``source``."""

    kind: ConstraintKind
    source: str = ""

    @property
    def field(self) -> str:
        """Where the request says it."""
        return self.kind.value if self.kind is ConstraintKind.TOOLS else f"sampling_params.{self.kind.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; ``seed`` None lets the engine choose one.

    ``logprobs`` asks for each token's log-probability and for those of as many likeliest ones; ``logit_bias``
    is added to the logits of token ids; ``n`` completions are made of one prompt, with seeds that count up.
    A reasoning of ``reasoning_tokens_max`` tokens is ended there, and the answer begins.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    n: int = 1
    reasoning_tokens_max: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that a model may ask its caller to run. ``parameters`` is the JSON Schema of an object, as
    text; empty: it takes none."""

    name: str
    description: str = ""
    parameters: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The tools on offer, and how they are to be used.

    ``required``: the answer is a call, of the tool ``named`` where one is; ``single``: it ends with its first
    call.
    """

    offered: tuple[Tool, ...]
    required: bool = False
    named: str = ""
    single: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool. ``arguments`` is what the model wrote: the JSON of an object, if it did well."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallPart:
    """A piece of one call; ``index`` counts the calls of an answer. ``name`` is whole in the first piece and
    empty in the others; ``arguments`` are to be joined."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat. ``role`` is system, user, assistant or tool.

    ``tool_calls`` are an assistant's; a tool's turn says in ``tool_call_id`` which of them it answers.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model is to go on from: exactly one of ``text``, ``token_ids`` and ``messages`` is set.

    ``thinking`` switches the reasoning before the answer; None leaves it to the model's chat template.
    """

    text: str | None = None
    token_ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    thinking: bool | None = None
    tools: Tools | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token, the bytes it stands for, and the natural logarithm of its probability."""

    token_id: int
    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """How likely one drawn token was, and the ``top`` tokens at its place, likeliest first.

    By the model alone: before temperature, penalties, bias, and before a constraint.
    """

    drawn: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some tokens of one completion, in order and without gaps.

    ``index`` says of which completion, where there are several. ``logprobs`` has one entry for each token, or
    none where they were not asked for. ``text`` may lag behind ``token_ids``: it is held back while it ends
    inside a character or may be the beginning of a stop string. ``reasoning`` is what a thinking model says
    to itself before it. ``tool_calls`` are pieces of calls, which are no part of the text.
    """

    generation_id: str
    epoch: int
    first_token_index: int
    token_ids: tuple[int, ...]
    text: str
    index: int = 0
    logprobs: tuple[Logprobs, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()

    @property
    def next_token_index(self) -> int:
        return self.first_token_index + len(self.token_ids)

    def call_id(self, part: ToolCallPart) -> str:
        """The id of the call that ``part`` is of: the same in every chunk."""
        return f"call_{self.generation_id}_{self.index}_{part.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request. ``cached_tokens`` of the prompt did not have to be computed;
    ``reasoning_tokens`` are among those of the completion. ``queue_s``: how long it waited for its first
    slot, where the engine itself says it.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    queue_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors of length 1, one a text, and the tokens that the texts had together."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at serving a request. ``reason`` is ``served`` or the code of the error that ended it.

    ``last_token_index`` is exclusive: an attempt that delivered nothing has both indices equal.
    """

    node: NodeId
    node_name: str
    model_fingerprint: str
    epoch: int
    first_token_index: int
    last_token_index: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How one of several completions of a prompt ended."""

    index: int
    finish_reason: FinishReason
    completion_tokens: int
    matched_stop: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How one generation ended at the engine that ran it.

    Of several completions, ``choices`` tells each one's end in order; ``usage`` then counts the prompt once
    and the tokens of all, and the other fields are those of the first.
    """

    finish_reason: FinishReason
    usage: Usage
    matched_stop: str = ""
    seed: int = 0
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOverrides:
    """What a request says about sampling; None leaves the profile's default. Fields as in ``Sampling``."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    constraint: Constraint | None = None
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    n: int | None = None
    reasoning_tokens_max: int | None = None

    def over(self, defaults: Sampling) -> Sampling:
        """The sampling that results when this request meets a profile's defaults."""
        given = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who should answer; empty strings leave it open. A profile or model is a demand, a domain a wish."""

    profile: str = ""
    model: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request as it entered the mesh, validated and bounded."""

    request_id: RequestId
    prompt: Prompt
    target: Target = field(default_factory=Target)
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    explain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateNote:
    """One line of an explained routing decision; see ``fieldmesh.v1.Candidate``."""

    node: NodeId
    node_name: str
    profile: str
    score: float
    eligible: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A routing decision with everything it was made from; candidates are ordered best first."""

    policy: str
    classified_domain: str = ""
    classified_confidence: float = 0.0
    candidates: tuple[CandidateNote, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a request ended well, as the node it entered tells it. Times in seconds from its arrival there."""

    request_id: RequestId
    generation_id: str
    completion: Completion
    profile: str
    model: str
    domain: str
    fallback: bool
    entry_node: NodeId
    entry_node_name: str
    served_by: NodeId
    served_by_name: str
    attempts: tuple[Attempt, ...]
    hops: int
    ttft_s: float
    duration_s: float
    explanation: Explanation | None = None
