"""The one exception tree. Owns: stable codes, whose fault it is, what to do next.

Every leaf has a ``code`` that never changes once released, the gRPC status it travels as, and
whether asking again can help (``retryable``). The message is a sentence for the person who reads
it: what was wrong, with which field, and what would be accepted. Borders translate foreign
exceptions (grpc, OSError, llama.cpp) into these; nothing above a border catches a foreign one.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class Status(Enum):
    """The gRPC status that an error travels as (values are gRPC's numbers)."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    INTERNAL = 13
    UNAVAILABLE = 14


class FieldmeshError(Exception):
    """Root of everything Fieldmesh raises on purpose.

    ``field`` names the input at fault, ``retry_after_s`` says when asking again is worth while,
    ``metadata`` holds further facts as strings (they travel as ErrorInfo metadata).
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[Status] = Status.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code}: {self.message})"


# --- the caller's input ------------------------------------------------------------------


class InvalidRequest(FieldmeshError):
    """A field of a request is missing, malformed or out of bounds."""

    code = "INVALID_REQUEST"
    status = Status.INVALID_ARGUMENT


class Unsupported(InvalidRequest):
    """A parameter of another API asks for what this mesh cannot do."""

    code = "UNSUPPORTED_PARAMETER"


class PreviousResponseNotFound(InvalidRequest):
    """A response that is to be gone on from is not kept at this node, or not any more."""

    code = "PREVIOUS_RESPONSE_NOT_FOUND"


class PromptTooLong(InvalidRequest):
    """The prompt and the tokens asked for do not fit the context of the profile."""

    code = "PROMPT_TOO_LONG"


class ConstraintInvalid(InvalidRequest):
    """A schema, regex or grammar cannot be enforced, or not at a bearable cost."""

    code = "CONSTRAINT_INVALID"


class RequestIdReused(FieldmeshError):
    """A request id came again with different content."""

    code = "REQUEST_ID_REUSED"
    status = Status.ALREADY_EXISTS


class ModelNotFound(FieldmeshError):
    """No node of the mesh offers the model that was demanded."""

    code = "MODEL_NOT_FOUND"
    status = Status.NOT_FOUND


class ProfileNotFound(FieldmeshError):
    """No node of the mesh offers the profile that was demanded."""

    code = "PROFILE_NOT_FOUND"
    status = Status.NOT_FOUND


class DomainNotFound(FieldmeshError):
    """No node of the mesh has ever declared the domain that was wished for."""

    code = "DOMAIN_NOT_FOUND"
    status = Status.NOT_FOUND


class StateRefused(FieldmeshError):
    """The saved state of a sequence cannot be used or kept here: compute its tokens again."""

    code = "STATE_REFUSED"
    status = Status.FAILED_PRECONDITION


class GenerationNotFound(FieldmeshError):
    """No running generation has this id."""

    code = "GENERATION_NOT_FOUND"
    status = Status.NOT_FOUND


class TraceNotFound(FieldmeshError):
    """No node that answers keeps this trace."""

    code = "TRACE_NOT_FOUND"
    status = Status.NOT_FOUND


# --- capacity and loss -------------------------------------------------------------------


class QueueFull(FieldmeshError):
    """Every node that could serve this has a full queue."""

    code = "QUEUE_FULL"
    status = Status.RESOURCE_EXHAUSTED
    retryable = True


class TooManyStreams(FieldmeshError):
    """This node already holds as many client streams as it may."""

    code = "TOO_MANY_STREAMS"
    status = Status.RESOURCE_EXHAUSTED
    retryable = True


class QuotaExceeded(FieldmeshError):
    """The tenant of a request has asked this node for as much as its quota allows, for now."""

    code = "QUOTA_EXCEEDED"
    status = Status.RESOURCE_EXHAUSTED


class SlowReader(FieldmeshError):
    """The reader of a stream fell too far behind; its generation was ended and freed."""

    code = "SLOW_READER"
    status = Status.RESOURCE_EXHAUSTED


class NoCandidate(FieldmeshError):
    """Nodes that offer this are known, but none can be reached now."""

    code = "NO_CANDIDATE"
    status = Status.UNAVAILABLE
    retryable = True


class EngineLost(FieldmeshError):
    """The engine's process ended while it worked on this."""

    code = "ENGINE_LOST"
    status = Status.UNAVAILABLE
    retryable = True


class EngineNotReady(FieldmeshError):
    """The engine is loading its model, restarting, or was given up."""

    code = "ENGINE_NOT_READY"
    status = Status.UNAVAILABLE
    retryable = True


class NodeUnreachable(FieldmeshError):
    """A peer could not be reached, or vanished during an attempt."""

    code = "NODE_UNREACHABLE"
    status = Status.UNAVAILABLE
    retryable = True


class Draining(FieldmeshError):
    """The node is leaving and takes no new work."""

    code = "DRAINING"
    status = Status.UNAVAILABLE
    retryable = True


class StreamLost(FieldmeshError):
    """The serving node was lost after tokens had been delivered.

    ``metadata["tokens_delivered"]`` says how many.
    """

    code = "STREAM_LOST"
    status = Status.UNAVAILABLE


class DeadlineExceeded(FieldmeshError):
    """The request's deadline passed; the engine stopped working on it."""

    code = "DEADLINE_EXCEEDED"
    status = Status.DEADLINE_EXCEEDED


class Cancelled(FieldmeshError):
    """The caller cancelled or aborted the request."""

    code = "CANCELLED"
    status = Status.CANCELLED


class HopLimit(FieldmeshError):
    """The request was forwarded as often as it may be."""

    code = "HOP_LIMIT"
    status = Status.FAILED_PRECONDITION


# --- peers -------------------------------------------------------------------------------


class ProtocolMismatch(FieldmeshError):
    """The peer speaks no protocol version that this node speaks."""

    code = "PROTOCOL_MISMATCH"
    status = Status.FAILED_PRECONDITION


class MeshMismatch(FieldmeshError):
    """The peer belongs to a mesh of another name."""

    code = "MESH_MISMATCH"
    status = Status.FAILED_PRECONDITION


# --- the replicated configuration --------------------------------------------------------


class LogNotFounded(FieldmeshError):
    """This node knows of no replicated configuration: nobody founded one, or it cannot be seen from here."""

    code = "LOG_NOT_FOUNDED"
    status = Status.FAILED_PRECONDITION


class LogMismatch(FieldmeshError):
    """The caller speaks of another log than this node's: a mesh that was founded twice has two."""

    code = "LOG_MISMATCH"
    status = Status.FAILED_PRECONDITION


class NotLeader(FieldmeshError):
    """Only the leader of the log can do this. ``metadata["leader"]`` is its id, where it is known."""

    code = "NOT_LEADER"
    status = Status.UNAVAILABLE
    retryable = True


class NoQuorum(FieldmeshError):
    """No majority of voters can be reached: nothing was done, and nothing can be until one is."""

    code = "NO_QUORUM"
    status = Status.UNAVAILABLE
    retryable = True


class OutcomeUnknown(FieldmeshError):
    """A write may or may not have been done. Asking again under the same ``metadata["session"]`` and
    ``metadata["sequence"]`` is safe: it is done once."""

    code = "OUTCOME_UNKNOWN"
    status = Status.UNKNOWN
    retryable = True


class ChangeRefused(FieldmeshError):
    """The leader refuses a command or a change of members as things are; ``metadata["reason"]`` says why."""

    code = "CHANGE_REFUSED"
    status = Status.FAILED_PRECONDITION


class KeyNotFound(FieldmeshError):
    """The configuration has no such key."""

    code = "KEY_NOT_FOUND"
    status = Status.NOT_FOUND


class RevisionConflict(FieldmeshError):
    """Somebody changed the key in between: nothing was done. ``metadata["revision"]`` is its last change."""

    code = "REVISION_CONFLICT"
    status = Status.ABORTED


class SessionExpired(FieldmeshError):
    """A write came under a session that is forgotten; whether it was done before, the history says."""

    code = "SESSION_EXPIRED"
    status = Status.FAILED_PRECONDITION


class ConfigurationFull(FieldmeshError):
    """The configuration holds as many keys, or as much text, as it may; nothing was done."""

    code = "CONFIGURATION_FULL"
    status = Status.FAILED_PRECONDITION


class ConsensusStopped(FieldmeshError):
    """This node's part in the log has stopped, because its disk refused; inference goes on."""

    code = "CONSENSUS_STOPPED"
    status = Status.UNAVAILABLE
    retryable = True


# --- the operator's box ------------------------------------------------------------------


class ConfigError(FieldmeshError):
    """A flag, environment variable, configuration file or profile is not acceptable."""

    code = "CONFIG_INVALID"
    status = Status.INVALID_ARGUMENT


class ProfileInvalid(ConfigError):
    """A profile file is not acceptable."""

    code = "PROFILE_INVALID"


class ModelFileInvalid(FieldmeshError):
    """A model file is missing, truncated, or not a GGUF that can be loaded."""

    code = "MODEL_FILE_INVALID"
    status = Status.FAILED_PRECONDITION


class ModelTooLarge(FieldmeshError):
    """A model would take more memory than it may have; the message says what would fit."""

    code = "MODEL_TOO_LARGE"
    status = Status.FAILED_PRECONDITION


class ModelInUse(FieldmeshError):
    """A model cannot be unloaded while it loads or answers."""

    code = "MODEL_IN_USE"
    status = Status.FAILED_PRECONDITION
    retryable = True


class StateFolderInUse(FieldmeshError):
    """Another process holds the lock of this node's state folder."""

    code = "STATE_FOLDER_IN_USE"
    status = Status.FAILED_PRECONDITION


class StateFolderInvalid(FieldmeshError):
    """The state folder is damaged, or was written by a newer version."""

    code = "STATE_FOLDER_INVALID"
    status = Status.FAILED_PRECONDITION


class StateUnwritable(FieldmeshError):
    """The state folder cannot be written now: the disk is full, read-only or failing."""

    code = "STATE_UNWRITABLE"
    status = Status.FAILED_PRECONDITION


class UpgradeNeeded(FieldmeshError):
    """The replicated log holds something that only a newer version of Fieldmesh can apply."""

    code = "UPGRADE_NEEDED"
    status = Status.FAILED_PRECONDITION


class AddressInUse(FieldmeshError):
    """A listener could not be opened: the port is taken."""

    code = "ADDRESS_IN_USE"
    status = Status.FAILED_PRECONDITION


class Internal(FieldmeshError):
    """A defect of Fieldmesh itself; the log has the details under the request id."""

    code = "INTERNAL"


def by_code() -> dict[str, type[FieldmeshError]]:
    """Every leaf by its code, for clients that rebuild a typed error from the wire."""
    found: dict[str, type[FieldmeshError]] = {}
    pending: list[type[FieldmeshError]] = [FieldmeshError]
    while pending:
        kind = pending.pop()
        pending.extend(kind.__subclasses__())
        if "code" in vars(kind) and kind is not FieldmeshError:
            found[kind.code] = kind
    return found
