"""Goal: what one process says is what the other hears. Method: round trips, and bytes that are no frame."""

from __future__ import annotations

import pytest

from fieldmesh.core.errors import Internal, PromptTooLong
from fieldmesh.core.model import Message, Prompt, Sampling
from fieldmesh.engine import frames
from fieldmesh.engine.port import Job
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import job


def test_commands_survive_the_trip() -> None:
    full = Job(
        generation_id="g",
        prompt=Prompt(messages=(Message(role="user", content="é🙂"),)),
        sampling=Sampling(stop=("a",), stop_token_ids=(1,), seed=(1 << 64) - 1),
        deadline_s=1.5,
        resume_token_ids=(4, 5),
    )
    commands: list[frames.Command] = [
        frames.Configure(EngineSettings(model_path="m"), ""),
        frames.Submit(1, full, 3.25),
        frames.Submit(2, job("x"), None),
        frames.Cancel(1),
        frames.Pause(1),
        frames.Resume(1),
        frames.Tokenize(3, Prompt(token_ids=(1, 2))),
        frames.Ping(),
    ]
    data = frames.encode(commands)
    assert frames.frame_length(data[:4]) == len(data) - 4
    assert frames.decode_commands(data[4:]) == commands


def test_an_error_arrives_as_what_it_was() -> None:
    error = PromptTooLong("too long", field="prompt", retry_after_s=2.0, metadata={"a": "b"})
    (report,) = frames.decode_reports(frames.encode([frames.failed(7, error)])[4:])
    assert isinstance(report, frames.Failed)
    again = frames.rebuilt(report)
    assert type(again) is PromptTooLong
    assert (again.message, again.field, again.retry_after_s, again.metadata) == (
        "too long",
        "prompt",
        2.0,
        {"a": "b"},
    )


@pytest.mark.parametrize("body", [b"", b"\xff", b"\x91\x92\xa3abc\x01"])
def test_bytes_that_are_no_frame_are_a_defect(body: bytes) -> None:
    with pytest.raises(Internal):
        frames.decode_reports(body)
    with pytest.raises(Internal):
        frames.decode_commands(body)


def test_a_frame_beyond_the_bound_is_not_read() -> None:
    with pytest.raises(Internal, match="at most"):
        frames.frame_length(b"\xff\xff\xff\xff")
