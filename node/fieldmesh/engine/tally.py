"""What one engine has done since its host started, whatever became of its processes.

Owns: sums over reports of steps, prompts and endings. Must not: know who reads them. A step costs one report
and a few additions, a token nothing.
"""

from __future__ import annotations

from fieldmesh.core.model import FinishReason
from fieldmesh.core.tally import Histogram
from fieldmesh.engine.frames import Accepted, Done, StepTiming

STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
INTER_TOKEN_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
QUEUE_BOUNDS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PHASES = ("decode", "prefill", "mixed")


class EngineTally:
    """Sums of one engine. ``restarts`` counts processes that followed a lost one.

    ``prefix_queried_tokens`` and ``prefix_hit_tokens`` are those of completed generations: how much of their
    prompts was looked up in the cache, and how much was found there.
    """

    def __init__(self) -> None:
        self.restarts = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self.finished = dict.fromkeys(FinishReason, 0)
        self.step_s = {phase: Histogram(STEP_BOUNDS_S) for phase in PHASES}
        self.inter_token_s = Histogram(INTER_TOKEN_BOUNDS_S)
        self.queue_s = Histogram(QUEUE_BOUNDS_S)

    def accepted(self, report: Accepted) -> None:
        """A prompt was admitted."""
        self.prompt_tokens += report.prompt_tokens

    def done(self, report: Done) -> None:
        """A generation ended well."""
        usage = report.completion.usage
        self.prefix_queried_tokens += usage.prompt_tokens
        self.prefix_hit_tokens += usage.cached_tokens
        self.finished[report.completion.finish_reason] += 1
        if usage.queue_s is not None:
            self.queue_s.observe(usage.queue_s)

    def stepped(self, timing: StepTiming) -> None:
        """A step was computed."""
        self.generation_tokens += timing.sampled
        phase = "decode" if not timing.prefilled else "mixed" if timing.decoded else "prefill"
        self.step_s[phase].observe(timing.duration_s)
        if timing.decoded:
            self.inter_token_s.observe(timing.interval_s, timing.decoded)
