"""The engine's own loop, without its socket: commands in, reports out, one step at a time.

Owns: generations (text, sampler, token index) around the scheduler, and how a prompt becomes tokens.
Must not: wait, read a clock of its own, or know which model computes: the child process runs it over
llama.cpp in real time, the fake over a cost model in any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, assert_never

from msgspec.structs import replace as replace_struct

from fieldmesh.core.batching import Batcher
from fieldmesh.core.errors import (
    ConstraintInvalid,
    DeadlineExceeded,
    FieldmeshError,
    InvalidRequest,
    PromptTooLong,
    StateRefused,
)
from fieldmesh.core.model import (
    Completion,
    Constraint,
    FinishReason,
    Logprobs,
    Prompt,
    Sampling,
    Usage,
)
from fieldmesh.core.reasoning import CLOSE, OPEN, AnswerStream
from fieldmesh.core.steps import Output, Place, Sampled, Slice, StepPlan, Work
from fieldmesh.core.tools import CallStream, merged, tools_constraint
from fieldmesh.engine.chat import ChatTemplate
from fieldmesh.engine.checks import check_constraint, check_token_ids
from fieldmesh.engine.embeddings import EmbeddingQueue, Pooling
from fieldmesh.engine.frames import (
    Accepted,
    Cancel,
    Command,
    Configure,
    Done,
    Embed,
    Export,
    Import,
    Pause,
    Ping,
    Report,
    Resume,
    Statistics,
    StepTiming,
    Submit,
    Tokenize,
    Tokenized,
    Tokens,
    failed,
)
from fieldmesh.engine.generating import Generation
from fieldmesh.engine.moves import Moves, Snapshot, States, make_moves
from fieldmesh.engine.port import Job
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import StateHeader, packed

WARM_UP_PROMPT_TOKENS = 16
WARM_UP_TOKENS = 4
CHARACTERS_PER_TOKEN_MAX = 64
"""Far above what texts have (English about 4), far below what would keep a tokenizer busy for long."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn for one token. ``ends``: the text is complete with it."""

    token_id: int
    ends: bool = False
    logprobs: Logprobs | None = None


class Walk(Protocol):
    """Where a generation stands in its constraint; see ``engine.grammars.Matcher``."""

    @property
    def ended(self) -> bool: ...
    def allowed(self) -> Any: ...
    def take(self, token: int) -> None: ...
    def replay(self, tokens: Sequence[int]) -> None: ...


class Grammars(Protocol):
    """Constraints, compiled beside the loop; see ``engine.grammars.Grammars``."""

    def matcher(self, constraint: Constraint) -> Walk | None: ...
    def want(self, constraint: Constraint) -> None: ...
    def finished(self) -> list[Constraint]: ...


class Draws(Protocol):
    """Draws the tokens of one generation."""

    def draw(self, row: int, index: int, forced: int | None = None) -> Drawn:
        """The token with number ``index`` of the generation, from the last step's ``row``, or the one that it
        must be. Raises ConstraintInvalid where its constraint turns out to be too costly."""
        ...


class Model(Protocol):
    """What the loop needs of a model. ``end_tokens`` end a generation unless it ignores them."""

    @property
    def vocabulary_tokens(self) -> int: ...
    @property
    def end_tokens(self) -> frozenset[int]: ...
    @property
    def cuttable(self) -> bool: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def bos(self) -> str: ...
    @property
    def eos(self) -> str: ...
    @property
    def pooling(self) -> Pooling: ...

    def tokenize(self, text: str, *, add_bos: bool) -> tuple[int, ...]:
        """Token ids of a text."""
        ...

    def piece(self, token: int) -> bytes:
        """A token's bytes."""
        ...

    def embed(self, slices: Sequence[Slice]) -> Any:
        """An array with a row for each token of the slices, in order; not of the running sequences."""
        ...

    def place(self, places: Sequence[Place], fetched: memoryview | None) -> list[int]:
        """Bring slots to the wanted contents; ``fetched`` is the state that a place may name. The slots where
        that failed, which are empty now."""
        ...

    def run(self, slices: Sequence[Slice]) -> Mapping[str, int]:
        """Compute a step; the row of every slice that samples, by id, with those of its draft behind it."""
        ...

    def cut(self, slot: int, keep_tokens: int) -> bool:
        """Keep the first tokens of a slot and no others; False where the cache cannot do that."""
        ...

    def sampler(
        self,
        sampling: Sampling,
        seed: int,
        resumed: Sequence[int],
        prompt: Sequence[int],
        walk: Walk | None = None,
    ) -> Draws:
        """What draws one generation's tokens, after ``resumed`` ones that ``walk`` has seen."""
        ...


class EngineLoop:
    """One model's loop. ``new_seed`` chooses a seed for jobs that have none.

    The host calls ``handle`` for each command, then ``plan`` and, if there are slices, ``run``; each returns
    reports to send. A plan without slices means: wait for a command, or until ``deadline``. ``decoding`` says
    whether somebody waits for the next token.
    """

    def __init__(
        self,
        settings: EngineSettings,
        model: Model,
        new_seed: Callable[[], int],
        grammars: Grammars | None = None,
    ) -> None:
        config = settings.batcher_config()
        self.batcher = Batcher(replace(config, cuttable=model.cuttable))
        self._settings = settings
        self._model = model
        self._new_seed = new_seed
        self._generations: dict[str, Generation] = {}
        self._stepped_at = 0.0
        self.decoding = False
        self._grammars = grammars
        self._uncompiled: dict[int, Submit] = {}
        self.embeddings = EmbeddingQueue(model.embed, model.pooling)
        self._moves: Moves | None = None
        source = settings.chat_template or model.chat_template
        self._chat = ChatTemplate(source, bos=model.bos, eos=model.eos) if source else None

    def keep_states(self, model: States, facts: dict[str, object], exchange_fd: int, **more: Any) -> None:
        """Keep states within ``settings.state_bytes_max`` from now on; see ``engine.moves.make_moves``. After
        ``warm_up``, whose sequence tells how large a state is."""
        computed = WARM_UP_PROMPT_TOKENS + WARM_UP_TOKENS - 1
        cell_bytes = -(-model.state_bytes(0) // computed)
        self._moves = make_moves(
            self.batcher, model, self._settings, facts, cell_bytes, exchange_fd, self._snapshot, **more
        )

    def _snapshot(self, key: int) -> Snapshot | None:
        """Where a generation is, for an export."""
        generation = self._generations.get(str(key))
        found = self.batcher.position(str(key))
        if generation is None or found is None:
            return None
        slot, computed, tokens, adapter = found
        header = StateHeader(
            fingerprint="",
            adapter=adapter,
            tokens=packed(tokens),
            computed=computed,
            prompt_tokens=len(tokens) - generation.index,
            sampling=generation.sampling,
            seed=generation.seed,
            state_bytes=0,
        )
        return Snapshot(slot, header)

    def close(self) -> None:
        """End what runs beside the loop."""
        if self._moves is not None:
            self._moves.close()

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    @property
    def deadline(self) -> float | None:
        return self.batcher.deadline

    def warm_up(self, clock: Callable[[], float]) -> None:
        """Run one small generation: the first request then pays for no page faults, and the load tells a
        measured speed from the start."""
        prompt = tuple(range(min(WARM_UP_PROMPT_TOKENS, self._model.vocabulary_tokens)))
        sampling = Sampling(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True)
        job = Job(generation_id="warm-up", prompt=Prompt(token_ids=prompt), sampling=sampling)
        self._submit(Submit(0, job, None), clock())
        while (plan := self.plan(clock())[0]).slices:
            self.run(plan, clock)

    # --- commands ---------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> list[Report]:
        """Take one command. Errors of a job are reports, not exceptions."""
        match command:
            case Submit():
                return self._answer(command.key, lambda: self._submit(_holding_calls(command), now))
            case Tokenize():
                return self._answer(
                    command.key, lambda: [Tokenized(command.key, self._tokenize(command.prompt))]
                )
            case Embed():
                return self._answer(command.key, lambda: self._embed(command))
            case Cancel():
                self.embeddings.cancel(command.key)
                self._uncompiled.pop(command.key, None)
                self.batcher.cancel(str(command.key))
                self._generations.pop(str(command.key), None)
                return [self.statistics()]
            case Pause():
                self.batcher.pause(str(command.key))
            case Resume():
                self.batcher.resume(str(command.key))
            case Export() | Import():
                if self._moves is None:
                    return [failed(command.key, StateRefused("this engine keeps no states"))]
                return self._moves.ask(command)
            case Ping():
                return [self.statistics()]
            case Configure():
                raise AssertionError("an engine is configured once")
            case _:
                assert_never(command)
        return []

    def _answer(self, key: int, work: Callable[[], list[Report]]) -> list[Report]:
        try:
            return work()
        except FieldmeshError as error:
            return [failed(key, error)]

    def _embed(self, command: Embed) -> list[Report]:
        texts = []
        for index, text in enumerate(command.texts):
            field = f"inputs[{index}]"
            self._check_length(text, field)
            texts.append(self._model.tokenize(text, add_bos=True))
            if not 0 < len(texts[-1]) <= self._settings.context_tokens:
                raise PromptTooLong(
                    f"{field} has {len(texts[-1])} tokens; accepted are 1 to {self._settings.context_tokens}",
                    field=field,
                )
        self.embeddings.add(command.key, texts, command.deadline)
        return []

    def embed(self, now: float, *, beside_streams: bool) -> list[Report]:
        """One pass over the texts that wait to be embedded, a small one where streams run."""
        tokens_max = self._settings.mixed_tokens if beside_streams else self._settings.prefill_tokens
        return self.embeddings.step(tokens_max, now)

    def collect(self, now: float) -> list[Report]:
        """Go on with the jobs whose constraints were compiled meanwhile."""
        reports: list[Report] = []
        for constraint in self._grammars.finished() if self._grammars else ():
            ready = [c for c in self._uncompiled.values() if c.job.sampling.constraint == constraint]
            for command in ready:
                reports += self._answer(command.key, partial(self._submit, command, now))
        return reports

    def _walk(self, command: Submit, constraint: Constraint) -> Walk | None:
        """The walk through a job's constraint; None where the job waits for it to be compiled."""
        self._uncompiled.pop(command.key, None)
        if self._grammars is None:
            raise ConstraintInvalid("this engine enforces no constraints", field=constraint.field)
        walk = self._grammars.matcher(constraint)
        if walk is None:
            self._grammars.want(constraint)
            self._uncompiled[command.key] = command
        return walk

    def _submit(self, command: Submit, now: float) -> list[Report]:
        job, walk = command.job, None
        if (constraint := job.sampling.constraint) is not None:
            walk = self._walk(command, constraint)
            if walk is None:
                return []
            job = replace(job, prompt=_answering_at_once(job.prompt, constraint))
        prompt, inside = self._read(job.prompt)
        if inside and constraint is not None:
            raise ConstraintInvalid(
                "this model always reasons before it answers: no constraint can be held",
                field=constraint.field,
            )
        if len(job.resume_token_ids) > self._settings.context_tokens:
            raise PromptTooLong(
                f"{len(job.resume_token_ids)} tokens to resume do not fit {self._settings.context_tokens}",
                field="resume_token_ids",
            )
        check_token_ids(job.resume_token_ids, self._model.vocabulary_tokens, "resume_token_ids")
        check_token_ids(job.sampling.stop_token_ids, self._model.vocabulary_tokens, "stop_token_ids")
        biased = tuple(token for token, _ in job.sampling.logit_bias)
        check_token_ids(biased, self._model.vocabulary_tokens, "sampling_params.logit_bias")
        thinks = walk is None and bool(job.prompt.messages) and self._thinks
        tools = job.prompt.tools
        calls = CallStream(tool.name for tool in tools.offered) if tools else None
        stream = AnswerStream(job.sampling.stop, thinks=thinks, inside=inside, calls=calls)
        stop_tokens = frozenset(job.sampling.stop_token_ids)
        if not job.sampling.ignore_eos:
            stop_tokens |= self._model.end_tokens
        seed = self._new_seed() if job.sampling.seed is None else job.sampling.seed
        for token in job.resume_token_ids:
            if token not in stop_tokens:
                stream.push(self._model.piece(token))  # its text was delivered with it
        if walk is not None:
            walk.replay(job.resume_token_ids)
        single = tools is not None and tools.single
        if ended := _ended_before(job, stream, stop_tokens, walk, single=single):
            return self._nothing_left(command.key, job, stream, ended, len(prompt), seed)
        # An answer may be as long as what the prompt leaves of the context: then it ends with LENGTH.
        context_tokens = self.batcher.config.context_tokens
        room = context_tokens + 1 - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt is too long: it has {len(prompt)} tokens; this profile reads at most "
                f"{context_tokens}",
                field="prompt",
                metadata={"context_tokens": str(context_tokens)},
            )
        self.batcher.submit(
            Work(
                id=str(command.key),
                prompt_token_ids=prompt,
                resume_token_ids=job.resume_token_ids,
                tokens_max=min(job.sampling.max_tokens, room),
                priority=job.priority,
                tenant=job.tenant,
                deadline=command.deadline,
            ),
            now,
        )
        self._generations[str(command.key)] = Generation(
            key=command.key,
            sampling=job.sampling,
            seed=seed,
            stream=stream,
            sampler=self._model.sampler(job.sampling, seed, job.resume_token_ids, prompt, walk),
            stop_tokens=stop_tokens,
            index=len(job.resume_token_ids),
            close_tokens=self._close_tokens() if thinks else (),
            single=single,
        )
        return [Accepted(command.key, len(prompt)), self.statistics()]

    def _nothing_left(
        self, key: int, job: Job, stream: AnswerStream, ended: FinishReason, prompt_tokens: int, seed: int
    ) -> list[Report]:
        """The delivered tokens were all: the interruption came between the last of them and the end."""
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=len(job.resume_token_ids),
            reasoning_tokens=stream.reasoning_tokens,
        )
        reasoning, text, calls = stream.finish()
        completion = Completion(
            finish_reason=_reason(ended, stream), usage=usage, matched_stop=stream.matched_stop, seed=seed
        )
        reports: list[Report] = [Accepted(key, prompt_tokens)]
        if reasoning or text or calls:
            reports.append(Tokens(key, len(job.resume_token_ids), (), text, (), reasoning, calls))
        return [*reports, Done(key, completion)]

    @property
    def _thinks(self) -> bool:
        return self._chat is not None and self._chat.thinks

    def _close_tokens(self) -> tuple[int, ...]:
        return self._model.tokenize(f"\n{CLOSE}\n\n", add_bos=False)

    def _tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        return self._read(prompt)[0]

    def _read(self, prompt: Prompt) -> tuple[tuple[int, ...], bool]:
        """A prompt's token ids, and whether it leaves the model within its reasoning."""
        if prompt.messages:
            if self._chat is None:
                raise InvalidRequest(
                    "the model has no chat template: send text, or set chat_template in the profile",
                    field="messages",
                )
            text = self._chat.render(
                prompt.messages,
                system_prompt=self._settings.system_prompt,
                thinking=prompt.thinking,
                tools=prompt.tools.offered if prompt.tools else (),
            )
            self._check_length(text)
            # Templates write the beginning themselves.
            return self._model.tokenize(text, add_bos=False), text.rstrip().endswith(OPEN)
        if prompt.text is not None:
            self._check_length(prompt.text)
            return self._model.tokenize(prompt.text, add_bos=True), False
        check_token_ids(prompt.token_ids, self._model.vocabulary_tokens, "prompt.token_ids")
        return prompt.token_ids, False

    def _check_length(self, text: str, field: str = "prompt") -> None:
        """Refuse a text that cannot fit before spending the running streams' time on its tokens."""
        characters_max = self._settings.context_tokens * CHARACTERS_PER_TOKEN_MAX
        if len(text) > characters_max:
            raise PromptTooLong(
                f"{field} is too long: it has {len(text)} characters; at most {characters_max} are read for "
                f"a context of {self._settings.context_tokens} tokens",
                field=field,
                metadata={"context_tokens": str(self._settings.context_tokens)},
            )

    # --- steps ------------------------------------------------------------------------------

    def plan(self, now: float, *, beside_streams: bool = False) -> tuple[StepPlan, list[Report]]:
        """Decide the next step, a small one where streams of other loops wait for it; reports are about jobs
        that ran out of time."""
        reports: list[Report] = self._moves.advance() if self._moves else []
        plan = self.batcher.plan(now, beside_streams=beside_streams)
        self.decoding = any(piece.decodes for piece in plan.slices)
        if self._moves:
            self._moves.carry_out(plan)
        for generation_id in plan.expired:
            generation = self._generations.pop(generation_id, None)
            if generation is not None:
                error = DeadlineExceeded(
                    f"the deadline passed after {generation.index} of {generation.sampling.max_tokens} tokens"
                )
                reports.append(failed(generation.key, error))
        if plan.expired:
            reports.append(self.statistics())
        return plan, reports

    def run(self, plan: StepPlan, clock: Callable[[], float]) -> list[Report]:
        """Compute ``plan``, draw, commit. Raises Internal where the model itself fails."""
        began = clock()
        slices = plan.slices
        if unplaced := self._model.place(plan.places, self._moves.loaded if self._moves else None):
            slices = self.batcher.restart(unplaced)
        rows = self._model.run(slices)
        sampled: list[Sampled] = []
        reports: list[Report] = []
        for piece in slices:
            if piece.sample and (generation := self._generations.get(piece.id)):
                try:
                    sampled.append(self._draw(generation, piece, rows[piece.id]))
                except ConstraintInvalid as error:
                    reports.append(failed(generation.key, error))
                    self.batcher.cancel(piece.id)
                    self._generations.pop(piece.id, None)
        now = clock()
        for output in self.batcher.commit(sampled, now):
            reports.extend(self._report(output))
        decoded = sum(s.decodes for s in slices)
        timing = StepTiming(
            duration_s=now - began,
            interval_s=now - self._stepped_at,
            decoded=decoded,
            prefilled=sum(len(s.token_ids) for s in slices) - decoded,
            sampled=sum(len(s.token_ids) for s in sampled),
        )
        self._stepped_at = now
        reports.append(Statistics(self.batcher.load(), self.batcher.steps, timing))
        return reports

    def _draw(self, generation: Generation, piece: Slice, row: int) -> Sampled:
        """Draw the next token, and as many as the draft foresaw; the rest of the draft leaves the slot."""
        generation.begin_step()
        drawn_ids: list[int] = []
        try:
            for offset, expected in enumerate((*piece.draft, None)):
                drawn = generation.sampler.draw(row + offset, generation.index, generation.forced)
                stop = generation.take(drawn, self._model.piece(drawn.token_id))
                drawn_ids.append(drawn.token_id)
                if stop or drawn.token_id != expected:
                    break
        finally:
            if piece.draft:
                kept = len(piece.token_ids) + max(0, len(drawn_ids) - 1)
                self._model.cut(piece.slot, piece.position + kept)
        return Sampled(id=piece.id, token_ids=tuple(drawn_ids), stop=stop)

    def _report(self, output: Output) -> list[Report]:
        generation = self._generations[output.id]
        key, reasoning, text = generation.key, generation.reasoning, generation.text
        tokens, first, calls = output.token_ids, output.first_token_index, generation.tool_calls
        if output.finish is None:
            return [Tokens(key, first, tokens, text, generation.logprobs, reasoning, calls)]
        assert output.usage is not None
        self._generations.pop(output.id, None)
        last_reasoning, last_text, last_calls = generation.stream.finish()
        completion = Completion(
            finish_reason=_reason(output.finish, generation.stream),
            usage=replace(output.usage, reasoning_tokens=generation.stream.reasoning_tokens),
            matched_stop=generation.stream.matched_stop,
            seed=generation.seed,
        )
        reasoning, text, calls = reasoning + last_reasoning, text + last_text, merged((*calls, *last_calls))
        last = Tokens(key, first, tokens, text, generation.logprobs, reasoning, calls)
        return [last, Done(key, completion)]

    def statistics(self) -> Statistics:
        """How busy the engine is."""
        return Statistics(self.batcher.load(), self.batcher.steps)


def _answering_at_once(prompt: Prompt, constraint: Constraint) -> Prompt:
    """The prompt with the reasoning off: a constraint holds from the first token."""
    if prompt.thinking:
        raise InvalidRequest(
            f"{constraint.field} holds from the first token, so that nothing can be thought before it: leave "
            "enable_thinking out",
            field="enable_thinking",
        )
    return replace(prompt, thinking=False) if prompt.messages else prompt


def _holding_calls(command: Submit) -> Submit:
    """The job with its answer held to the calls that it must make, or may where a document is wanted."""
    sampling, tools = command.job.sampling, command.job.prompt.tools
    if tools is None or not (tools.required or sampling.constraint):
        return command
    constraint = tools_constraint(tools, sampling.constraint)
    check_constraint(constraint, sampling)
    held = replace(sampling, constraint=constraint)
    return replace_struct(command, job=replace(command.job, sampling=held))


def _reason(ended: FinishReason, stream: AnswerStream) -> FinishReason:
    return FinishReason.TOOL_CALLS if ended is FinishReason.STOP and stream.called else ended


def _ended_before(
    job: Job, stream: AnswerStream, stop_tokens: frozenset[int], walk: Walk | None, *, single: bool
) -> FinishReason | None:
    """Why a resumed job has nothing left to do; None if it has."""
    resumed = job.resume_token_ids
    stopped = bool(resumed) and resumed[-1] in stop_tokens
    if stream.matched_stop or stopped or (walk is not None and walk.ended) or (single and stream.calls):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(resumed) >= job.sampling.max_tokens else None
