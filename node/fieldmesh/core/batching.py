"""Continuous batching: which tokens of which sequences the next step of the model computes.

Owns: the queue, admission (by slots and by KV cells), the order between priorities and tenants, the mix
of decode and prefill in a step, reuse of resident prefixes, pause, cancel, deadlines, and the numbers
that say how busy the engine is. Must not: know llama.cpp, text, tokenizers, a clock or a socket.

Three beats: ``plan`` says what to compute, the host runs it, ``commit`` takes what was sampled::

    submit ──> QUEUED ──plan──> RUNNING ──commit──> finished (stop, length)
                  │                │ ^
                  │             pause, resume (keeps its cells, computes nothing)
                  └──cancel, deadline──> ended (its slot is free at the next plan)

A running sequence is a list of known tokens of which the first ``computed`` are in the KV cache. Several
uncomputed tokens are prefill; exactly one is decode. Every planned slice that reaches the end of the
known tokens asks for one sampled token.

- Decode goes first; prefill gets what is left of ``mixed_tokens`` (``prefill_tokens`` when nothing
  decodes), so that a long prompt slows running streams by a bounded amount.
- A request reserves cells for its prompt and all tokens it may produce before it is admitted: nothing
  that runs can run out of cells.
- A waiting request rises one priority level every ``ageing_s``: whatever else arrives, nothing starves.
- Between tenants of one level, the one that was served least goes first (virtual token counters: Sheng
  et al., Fairness in Serving Large Language Models, OSDI 2024).
- A finished sequence leaves its tokens resident in its slot until the slot or its cells are needed. A
  new request starts from the longest prefix resident anywhere; while a longer one is being computed it
  stands aside, so that many who arrive together with one system prompt pay for it once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fieldmesh.core.errors import InvalidRequest, PromptTooLong, QueueFull
from fieldmesh.core.model import EngineState, FinishReason, Load, Priority, Usage
from fieldmesh.core.pace import Pace
from fieldmesh.core.steps import (
    SLICE_TOKENS_MIN,
    BatcherConfig,
    Output,
    Place,
    Sampled,
    Slice,
    StepPlan,
    Work,
)

ADMISSION_LOOKAHEAD = 16
"""How many waiting requests are looked at for one that need not stand aside: bounds the work of a plan."""


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A running generation. ``tokens`` are known, the first ``computed`` of them are in the KV cache."""

    work: Work
    arrived: float
    order: int
    slot: int
    tokens: list[int]
    computed: int
    cached: int
    paused: bool = False
    ended: bool = False

    @property
    def outstanding(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.work.prompt_token_ids)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.work.prompt_token_ids),
            cached_tokens=self.cached,
            completion_tokens=self.generated,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    work: Work
    arrived: float
    order: int


@dataclass(slots=True, kw_only=True)
class _Slot:
    """``resident``: tokens whose cells are in this slot, of the running sequence or of the last one."""

    sequence: _Sequence | None = None
    resident: list[int] = field(default_factory=list)
    freed_order: int = 0


class Batcher:
    """The scheduler of one loaded context. Not thread-safe; ``now`` is monotonic seconds, never decreasing.

    Illegal use (an unknown id in ``commit``, ``plan`` twice without ``commit``) raises AssertionError.
    """

    def __init__(self, config: BatcherConfig) -> None:
        config.validate()
        self.config = config
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._running: OrderedDict[str, _Sequence] = OrderedDict()
        self._slots = [_Slot() for _ in range(config.slots)]
        self._served: dict[str, int] = {}
        self._pace = Pace(config.slots)
        self._order = 0
        self._planned: StepPlan | None = None
        self._planned_at = 0.0
        self.steps = 0

    def __repr__(self) -> str:
        return f"Batcher(running={len(self._running)}, waiting={len(self._waiting)}, steps={self.steps})"

    # --- commands ---------------------------------------------------------------------------

    def submit(self, work: Work, now: float) -> None:
        """Queue ``work``. Raises QueueFull, PromptTooLong, InvalidRequest."""
        if work.id in self._waiting or work.id in self._running:
            raise InvalidRequest(
                f"generation_id {work.id!r} is already running here; every generation needs its own",
                field="generation_id",
            )
        if not work.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens; at least one is needed", field="prompt")
        if work.tokens_max <= len(work.resume_token_ids):
            raise InvalidRequest(
                f"max_tokens is {work.tokens_max}, but {len(work.resume_token_ids)} tokens were already "
                "delivered; it must be larger",
                field="max_tokens",
            )
        if work.cells > self.config.context_tokens:
            raise PromptTooLong(
                f"the prompt has {len(work.prompt_token_ids)} tokens and max_tokens is {work.tokens_max}: "
                f"together they may be at most {self.config.context_tokens + 1}",
                field="prompt",
                metadata={"context_tokens": str(self.config.context_tokens)},
            )
        if len(self._waiting) >= self.config.queue_max + self._free_slots():
            raise QueueFull(
                f"the queue is full ({self.config.queue_max} waiting); ask again later or elsewhere",
                retry_after_s=self._retry_after_s(),
            )
        self._order += 1
        self._waiting[work.id] = _Waiting(work=work, arrived=now, order=self._order)
        if work.tenant not in self._served:  # joins level with those being served: no credit for absence
            self._served[work.tenant] = min(self._served.values(), default=0)

    def cancel(self, generation_id: str) -> bool:
        """End a generation; False if it is not here. A step under way may still compute it in vain."""
        if self._waiting.pop(generation_id, None) is not None:
            self._forget_idle_tenants()
            return True
        sequence = self._running.get(generation_id)
        if sequence is None or sequence.ended:
            return False
        self._end(sequence)
        return True

    def pause(self, generation_id: str) -> None:
        """Keep a running generation's cells but compute nothing for it (unknown ids are ignored)."""
        if sequence := self._running.get(generation_id):
            sequence.paused = True

    def resume(self, generation_id: str) -> None:
        """Undo ``pause`` (unknown ids are ignored)."""
        if sequence := self._running.get(generation_id):
            sequence.paused = False

    # --- plan -------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """The earliest deadline of any request: ``plan`` should run by then even if nothing else happens."""
        return min((w.deadline for w in self._works() if w.deadline is not None), default=None)

    def plan(self, now: float) -> StepPlan:
        """Drop what is past its deadline, admit what fits, and share out the next step.

        A plan without slices is not committed: nothing can run before a command, or ``deadline``.
        """
        assert self._planned is None, "plan was called twice without commit"
        expired = tuple(w.id for w in self._works() if w.deadline is not None and w.deadline <= now)
        for generation_id in expired:
            self.cancel(generation_id)
        places = self._admit(now)
        plan = StepPlan(expired=expired, places=places, slices=self._share(now))
        if plan.slices:
            self._planned, self._planned_at = plan, now
        return plan

    def _admit(self, now: float) -> tuple[Place, ...]:
        """Admit strictly in order of rank: a large request at the head is not overtaken for ever. Only those
        whose prefix is just being computed stand aside until it is there."""
        places: list[Place] = []
        while self._waiting and self._free_slots():
            ranked = sorted(self._waiting.values(), key=lambda w: self._rank(w, now))
            head = next((w for w in ranked[:ADMISSION_LOOKAHEAD] if not self._prefix_is_coming(w.work)), None)
            if head is None or not self._make_room(head.work.cells):
                break
            del self._waiting[head.work.id]
            places.append(self._place(head))
        return tuple(places)

    def _prefix_is_coming(self, work: Work) -> bool:
        """Whether a running sequence, no less urgent, is computing more of this work's tokens than any slot
        holds."""
        if not self.config.reuse_prefixes:
            return False
        known = [*work.prompt_token_ids, *work.resume_token_ids]
        coming = [
            common_prefix_length(s.tokens, known)
            for s in self._running.values()
            if s.outstanding > 1
            and not s.paused
            and not s.ended
            and s.work.priority.value <= work.priority.value
        ]
        if max(coming, default=0) < self.config.reuse_tokens_min:
            return False
        return max(coming) - self._longest_resident(known)[1] >= self.config.reuse_tokens_min

    def _rank(self, waiting: _Waiting, now: float) -> tuple[int, int, int]:
        return (
            self._level(waiting.work.priority, waiting.arrived, now),
            self._served[waiting.work.tenant],
            waiting.order,
        )

    def _level(self, priority: Priority, arrived: float, now: float) -> int:
        return priority.value - int((now - arrived) / self.config.ageing_s)

    def _make_room(self, cells: int) -> bool:
        """Whether ``cells`` more can be reserved, dropping resident prefixes (oldest first) as needed."""
        reserved = sum(s.work.cells for s in self._running.values())
        if reserved + cells > self.config.cells_total:
            return False
        retired = sorted((s for s in self._slots if s.sequence is None), key=lambda s: s.freed_order)
        excess = reserved + cells + sum(len(s.resident) for s in retired) - self.config.cells_total
        for slot in retired:
            if excess <= 0:
                break
            excess -= len(slot.resident)
            slot.resident = []
        return True

    def _place(self, waiting: _Waiting) -> Place:
        work = waiting.work
        known = [*work.prompt_token_ids, *work.resume_token_ids]
        source, keep = self._longest_resident(known)
        free = [i for i, s in enumerate(self._slots) if s.sequence is None]
        # Continue in the slot that holds the prefix; else stay beside running neighbours (llama.cpp computes
        # neighbouring sequences in one pass) and overwrite what was used least recently.
        index = source if source in free else min(free, key=self._slot_cost)
        slot = self._slots[index]
        slot.resident = known[:keep]
        slot.sequence = _Sequence(
            work=work,
            arrived=waiting.arrived,
            order=waiting.order,
            slot=index,
            tokens=known,
            computed=keep,
            cached=min(keep, len(work.prompt_token_ids)),
        )
        self._running[work.id] = slot.sequence
        self._served[work.tenant] += len(known) - keep
        return Place(slot=index, source=source if keep else index, keep_tokens=keep)

    def _slot_cost(self, index: int) -> tuple[int, bool, int]:
        neighbours = self._slots[max(0, index - 1) : index + 2]
        beside = sum(s.sequence is not None for s in neighbours)
        return -beside, bool(self._slots[index].resident), self._slots[index].freed_order

    def _longest_resident(self, known: list[int]) -> tuple[int, int]:
        """The slot sharing the longest prefix with ``known``, and its length (the last tokens are always
        computed again: their logits are needed, and none is computed alone). Ties prefer a free slot."""
        if not self.config.reuse_prefixes:
            return -1, 0
        source, keep = max(
            ((i, common_prefix_length(s.resident, known)) for i, s in enumerate(self._slots)),
            key=lambda found: (found[1], self._slots[found[0]].sequence is None, -found[0]),
        )
        keep = min(keep, len(known) - SLICE_TOKENS_MIN)
        return (source, keep) if keep >= self.config.reuse_tokens_min else (-1, 0)

    def _share(self, now: float) -> tuple[Slice, ...]:
        """Decode first, then prefill: most urgent level first, within it the nearest to its first token."""
        active = [s for s in self._running.values() if not s.paused and not s.ended]
        decoding = [s for s in active if s.outstanding == 1]
        prefilling = sorted(
            (s for s in active if s.outstanding > 1),
            key=lambda s: (self._level(s.work.priority, s.arrived, now), s.outstanding, s.order),
        )
        slices = [self._slice(s, 1) for s in decoding]
        left = (self.config.mixed_tokens if decoding else self.config.prefill_tokens) - len(slices)
        for sequence in prefilling:
            if left < SLICE_TOKENS_MIN:
                break
            slices.append(self._slice(sequence, left))
            left -= len(slices[-1].token_ids)
        return tuple(slices)

    def _slice(self, sequence: _Sequence, tokens_max: int) -> Slice:
        """The next tokens of one sequence. Delivered tokens go in small chunks of their own: this keeps the
        arithmetic, and so the continuation, equal to what it would have been without the interruption."""
        start, prompt = sequence.computed, len(sequence.work.prompt_token_ids)
        if start < prompt:
            whole = prompt - start
        else:
            whole, tokens_max = len(sequence.tokens) - start, min(tokens_max, self.config.resume_chunk_tokens)
        count = min(tokens_max, whole)
        if whole - count == SLICE_TOKENS_MIN - 1:
            count = whole
        end = start + count
        return Slice(
            id=sequence.work.id,
            slot=sequence.slot,
            position=start,
            token_ids=tuple(sequence.tokens[start:end]),
            sample=end == len(sequence.tokens),
        )

    # --- commit -----------------------------------------------------------------------------

    def commit(self, results: Iterable[Sampled], now: float) -> tuple[Output, ...]:
        """Take what was sampled for the last plan: one result for each slice with ``sample`` (for those
        cancelled meanwhile it is ignored and may be left out)."""
        plan = self._planned
        assert plan is not None, "commit was called without a plan"
        self._planned = None
        self.steps += 1
        sampled = {r.id: r for r in results}
        wanted = {s.id for s in plan.slices if s.sample}
        assert {i for i in wanted if not self._running[i].ended} <= set(sampled) <= wanted, (
            "not what was planned"
        )
        outputs: list[Output] = []
        for piece in plan.slices:
            sequence = self._running[piece.id]
            sequence.computed += len(piece.token_ids)
            self._slots[sequence.slot].resident.extend(piece.token_ids)
            if sequence.ended:
                self._release(sequence)
            elif piece.sample:
                outputs.append(self._append(sequence, sampled[piece.id]))
        decoding = sum(s.position > 0 and len(s.token_ids) == 1 for s in plan.slices)
        self._pace.observe(
            decoding=decoding, prefill_tokens=plan.tokens - decoding, duration_s=now - self._planned_at
        )
        return tuple(outputs)

    def _append(self, sequence: _Sequence, result: Sampled) -> Output:
        sequence.tokens.append(result.token_id)
        # A decoded token keeps the hardware busier than a prefilled one; 2 is the paper's weight.
        self._served[sequence.work.tenant] += 2
        finish = None
        if result.stop:
            finish = FinishReason.STOP
        elif sequence.generated >= sequence.work.tokens_max:
            finish = FinishReason.LENGTH
        if finish is not None:
            self._release(sequence)
        return Output(
            id=sequence.work.id,
            token_id=result.token_id,
            token_index=sequence.generated - 1,
            finish=finish,
            usage=sequence.usage if finish else None,
        )

    # --- endings ----------------------------------------------------------------------------

    def _end(self, sequence: _Sequence) -> None:
        """Free a sequence's slot now, or at commit while a step is computing it."""
        sequence.ended = True
        if self._planned is None or all(s.id != sequence.work.id for s in self._planned.slices):
            self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        del self._running[sequence.work.id]
        slot = self._slots[sequence.slot]
        slot.sequence = None
        self._order += 1
        slot.freed_order = self._order
        self._forget_idle_tenants()

    def _forget_idle_tenants(self) -> None:
        present = {w.tenant for w in self._works()}
        self._served = {t: n for t, n in self._served.items() if t in present}

    # --- numbers ----------------------------------------------------------------------------

    def usage(self, generation_id: str) -> Usage | None:
        """Token counts of a running generation so far; None if it is not running."""
        sequence = self._running.get(generation_id)
        return sequence.usage if sequence else None

    def load(self, *, draining: bool = False) -> Load:
        """Everything that routing wants to know, measured."""
        running = self._running.values()
        waiting = [w.work for w in self._waiting.values()]
        known = sum(len(w.prompt_token_ids) + len(w.resume_token_ids) for w in waiting)
        return Load(
            engine=EngineState.READY,
            slots=self.config.slots,
            running=len(self._running),
            queued=len(waiting),
            queue_max=self.config.queue_max,
            kv_cells_used=sum(s.work.cells for s in running),
            kv_cells_total=self.config.cells_total,
            pending_prefill_tokens=known + sum(s.outstanding for s in running if s.outstanding > 1),
            pending_decode_tokens=sum(w.tokens_max - len(w.resume_token_ids) for w in waiting)
            + sum(s.work.tokens_max - s.generated for s in running),
            prefill_tokens_per_s=self._pace.prefill_tokens_per_s,
            decode_tokens_per_s=self._pace.decode_tokens_per_s(len(self._running)),
            draining=draining,
        )

    def _works(self) -> list[Work]:
        live = [s.work for s in self._running.values() if not s.ended]
        return live + [w.work for w in self._waiting.values()]

    def _free_slots(self) -> int:
        return self.config.slots - len(self._running)

    def _retry_after_s(self) -> float:
        """When a slot is likely to be free: the shortest of what runs, at the present pace."""
        pace = self._pace.decode_tokens_per_s(len(self._running))
        if not pace or not self._running:
            return 1.0
        shortest = min(s.work.tokens_max - s.generated for s in self._running.values())
        return min(30.0, max(0.2, shortest / pace))

    def check(self) -> None:
        """Raise AssertionError where the state contradicts itself."""
        config = self.config
        assert len(self._waiting) <= config.queue_max + config.slots
        assert not set(self._waiting) & set(self._running)
        owners = [s.sequence.work.id for s in self._slots if s.sequence is not None]
        assert sorted(owners) == sorted(self._running), "a running sequence owns exactly one slot"
        assert sum(s.work.cells for s in self._running.values()) <= config.cells_total
        retired = sum(len(s.resident) for s in self._slots if s.sequence is None)
        assert retired + sum(s.work.cells for s in self._running.values()) <= config.cells_total
        for index, slot in enumerate(self._slots):
            if (sequence := slot.sequence) is None:
                assert len(slot.resident) <= config.context_tokens
                continue
            assert sequence.slot == index
            assert len(slot.resident) == sequence.computed < len(sequence.tokens)
            assert slot.resident == sequence.tokens[: sequence.computed]
            assert sequence.computed <= sequence.work.cells
            assert sequence.cached <= len(sequence.work.prompt_token_ids)
            assert not sequence.ended or self._planned is not None
        assert set(self._served) >= {w.tenant for w in self._works()}
        assert len(self._served) <= len(self._waiting) + len(self._running)


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
