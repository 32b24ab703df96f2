"""The host's side of running jobs: one bounded stream for each.

Owns: keys, buffering between engine and reader, pausing and ending slow readers, the end of every stream.
Must not: know whether the engine is a process or a fake.

A stream is unread tokens (at most ``stream_tokens_max`` plus what one or two steps produce while the pause
is on its way) and how it ended. Tokens that pile up are handed out as one chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TypeAlias

from fieldmesh.core.errors import FieldmeshError, InvalidRequest, QueueFull, SlowReader
from fieldmesh.core.model import Chunk, Completion, Logprobs, ToolCallPart
from fieldmesh.core.tools import merged
from fieldmesh.engine.frames import (
    Accepted,
    Cancel,
    Command,
    Done,
    Failed,
    Pause,
    Resume,
    Submit,
    Tokens,
    rebuilt,
)
from fieldmesh.engine.port import Job, JobEvent, Started

JobReport: TypeAlias = Accepted | Tokens | Done | Failed


class _Stream:
    """What one job has produced and nobody has read yet."""

    def __init__(self, key: int, job: Job) -> None:
        self.key = key
        self.job = job
        self.started: Started | None = None
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.reasonings: list[str] = []
        self.logprobs: list[Logprobs] = []
        self.tool_calls: list[ToolCallPart] = []
        self.next_index = len(job.resume_token_ids)
        self.end: Completion | FieldmeshError | None = None
        self.changed = asyncio.Event()
        self.slow_timer: asyncio.TimerHandle | None = None

    async def next(self) -> JobEvent:
        """The next event in order; raises how the job failed."""
        while True:
            if self.started is not None:
                event, self.started = self.started, None
                return event
            if self.token_ids or self.texts:
                return self._chunk()
            if isinstance(self.end, FieldmeshError):
                raise self.end
            if self.end is not None:
                return self.end
            self.changed.clear()
            await self.changed.wait()

    def _chunk(self) -> Chunk:
        chunk = Chunk(
            generation_id=self.job.generation_id,
            epoch=self.job.epoch,
            first_token_index=self.next_index,
            token_ids=tuple(self.token_ids),
            text="".join(self.texts),
            logprobs=tuple(self.logprobs),
            reasoning="".join(self.reasonings),
            tool_calls=merged(self.tool_calls),
        )
        self.next_index = chunk.next_token_index
        self.token_ids.clear()
        self.texts.clear()
        self.reasonings.clear()
        self.logprobs.clear()
        self.tool_calls.clear()
        return chunk


class Streams:
    """All jobs of one engine. ``send`` hands a command to the engine and never blocks."""

    def __init__(
        self,
        send: Callable[[Command], None],
        *,
        jobs_max: int,
        stream_tokens_max: int,
        slow_reader_timeout_s: float,
    ) -> None:
        self._send = send
        self._jobs_max = jobs_max
        self._stream_tokens_max = stream_tokens_max
        self._slow_reader_timeout_s = slow_reader_timeout_s
        self._streams: dict[int, _Stream] = {}
        self._last_key = 0

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for more of a job."""
        return any(s.slow_timer is None and s.end is None for s in self._streams.values())

    def next_key(self) -> int:
        """A key that was never used before."""
        self._last_key += 1
        return self._last_key

    def key_of(self, generation_id: str) -> int | None:
        """Under which key a job runs."""
        return next((k for k, s in self._streams.items() if s.job.generation_id == generation_id), None)

    async def run(self, job: Job, deadline: float | None) -> AsyncGenerator[JobEvent, None]:
        """Submit ``job`` and yield its events; closing the iterator cancels it."""
        stream = self._open(job)
        self._send(Submit(stream.key, job, deadline))
        try:
            while True:
                event = await stream.next()
                if stream.slow_timer is not None:
                    self._unpause(stream)
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            self._close(stream)

    def _open(self, job: Job) -> _Stream:
        if any(s.job.generation_id == job.generation_id for s in self._streams.values()):
            raise InvalidRequest(
                f"generation_id {job.generation_id!r} runs here already; every generation needs its own",
                field="generation_id",
            )
        if len(self._streams) >= self._jobs_max:
            raise QueueFull(
                f"the engine holds {self._jobs_max} requests and takes no more; ask again later or elsewhere",
                retry_after_s=1.0,
            )
        stream = _Stream(self.next_key(), job)
        self._streams[stream.key] = stream
        return stream

    def _close(self, stream: _Stream) -> None:
        if stream.slow_timer is not None:
            stream.slow_timer.cancel()
        if self._streams.pop(stream.key, None) is not None and stream.end is None:
            self._send(Cancel(stream.key))

    def take(self, report: JobReport) -> None:
        """Put one report where its reader finds it. Reports about closed jobs are dropped."""
        stream = self._streams.get(report.key)
        if stream is None or stream.end is not None:
            return
        match report:
            case Accepted():
                stream.started = Started(prompt_tokens=report.prompt_tokens)
            case Tokens():
                stream.token_ids.extend(report.token_ids)
                stream.texts.append(report.text)
                stream.reasonings.append(report.reasoning)
                stream.logprobs.extend(report.logprobs)
                stream.tool_calls.extend(report.tool_calls)
                if len(stream.token_ids) > self._stream_tokens_max and stream.slow_timer is None:
                    self._pause(stream)
            case Done():
                stream.end = report.completion
            case Failed():
                stream.end = rebuilt(report)
        stream.changed.set()

    def fail_all(self, error: Callable[[], FieldmeshError]) -> None:
        """End every job with an error of its own (after what it has already produced)."""
        for stream in self._streams.values():
            if stream.end is None:
                stream.end = error()
                stream.changed.set()

    def _pause(self, stream: _Stream) -> None:
        self._send(Pause(stream.key))
        stream.slow_timer = asyncio.get_running_loop().call_later(
            self._slow_reader_timeout_s, self._give_up, stream
        )

    def _unpause(self, stream: _Stream) -> None:
        assert stream.slow_timer is not None
        stream.slow_timer.cancel()
        stream.slow_timer = None
        if stream.end is None:
            self._send(Resume(stream.key))

    def _give_up(self, stream: _Stream) -> None:
        """The reader took nothing for too long: free the sequence and what was buffered."""
        if stream.end is not None:
            return  # the sequence is free already; what is left is bounded
        unread = len(stream.token_ids)
        stream.token_ids.clear()
        stream.texts.clear()
        stream.reasonings.clear()
        stream.logprobs.clear()
        stream.tool_calls.clear()
        stream.end = SlowReader(
            f"the stream was not read for {self._slow_reader_timeout_s:g} s with {unread} tokens waiting; "
            "its generation was ended",
            metadata={"tokens_delivered": str(stream.next_index)},
        )
        stream.changed.set()
        self._send(Cancel(stream.key))
