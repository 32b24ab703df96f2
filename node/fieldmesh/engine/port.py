"""The port behind which every engine stands: the real one in a child process, the fake in simulations.

Owns: what a job is, what comes back, and what may be asked. Must not: know gRPC, llama.cpp or asyncio
beyond the types of its methods. ``tests/contract`` runs one suite over every implementation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fieldmesh.core.model import Chunk, Completion, Embeddings, Load, Priority, Prompt, Sampling

if TYPE_CHECKING:
    from fieldmesh.engine.states import SequenceState


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One generation for an engine.

    ``resume_token_ids`` were delivered by an earlier attempt: they are prefilled after the prompt, not
    sampled, and the first chunk's ``first_token_index`` is their count. ``deadline_s`` is the time left
    when the job is handed over; the engine stops within one step of it.
    """

    generation_id: str
    prompt: Prompt
    sampling: Sampling
    epoch: int = 0
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    deadline_s: float | None = None
    resume_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The job was admitted: its prompt was tokenised and fits. Sent once, before any chunk."""

    prompt_tokens: int


JobEvent = Started | Chunk | Completion
"""What a job yields: one Started, chunks without gaps, one Completion; or it raises a FieldmeshError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What was loaded. ``fingerprint`` is the hex SHA-256 that names the model's content.

    ``threads``, ``prefill_tokens`` and ``mixed_tokens`` are what it runs with; ``measured`` says in words
    what they were chosen by, and is empty where all were fixed. ``state_fingerprint`` names what the bytes
    of a sequence's state depend on; it is empty where no states are kept.
    """

    model: str
    fingerprint: str
    architecture: str
    parameters: int
    context_tokens: int
    slots: int
    vocabulary_tokens: int
    threads: int
    chat_template: bool = True
    prefill_tokens: int = 0
    mixed_tokens: int = 0
    measured: str = ""
    state_fingerprint: str = ""
    settings: dict[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """A running engine. All methods belong to one event loop."""

    async def start(self) -> EngineInfo:
        """Load the model; returns when jobs are taken. Raises ModelFileInvalid, EngineNotReady."""
        ...

    def submit(self, job: Job) -> AsyncIterator[JobEvent]:
        """Run one job. Closing the iterator cancels the job within one step.

        Raises (from the iterator) QueueFull, PromptTooLong, InvalidRequest, EngineLost, EngineNotReady,
        SlowReader, DeadlineExceeded, Cancelled.
        """
        ...

    async def export(self, generation_id: str) -> SequenceState:
        """The state of a running generation between two steps; it goes on as before. Raises
        GenerationNotFound, StateRefused, EngineLost, EngineNotReady."""
        ...

    async def import_(self, state: SequenceState) -> None:
        """Keep a state, so that a job with its tokens need not compute them. Raises StateRefused, EngineLost,
        EngineNotReady."""
        ...

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt (messages pass through the chat template first)."""
        ...

    async def embed(self, texts: tuple[str, ...], *, deadline_s: float | None = None) -> Embeddings:
        """A vector of length 1 for each text, pooled as the model was made for.

        Raises QueueFull, PromptTooLong, InvalidRequest, EngineLost, EngineNotReady, DeadlineExceeded.
        """
        ...

    def load(self) -> Load:
        """The latest statistics; never blocks."""
        ...

    async def wait_load_changed(self) -> Load:
        """Return when ``load`` would say something that routing should know."""
        ...

    async def close(self) -> None:
        """End the process and free everything; running jobs end with EngineLost."""
        ...
