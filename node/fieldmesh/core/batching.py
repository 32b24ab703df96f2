"""Continuous batching: which tokens of which sequences the next step of the model computes.

Owns: the queue, admission (by slots and by KV cells), the order between priorities and tenants, the mix
of decode and prefill in a step, preemption, pause, cancel, deadlines, and the numbers that say how busy the
engine is. Must not: know llama.cpp, text, tokenizers, a clock or a socket. ``core.residency`` knows where
computed tokens are.

Three beats: ``plan`` says what to compute, the host runs it, ``commit`` takes what was sampled::

    submit ──> QUEUED ──plan──> RUNNING ──commit──> finished (stop, length)
                  │ ^              │ │ ^
                  │ └──preempted───┘ pause, resume (keeps its cells, computes nothing)
                  └──cancel, deadline──> ended (its slot is free at the next plan)

A running sequence is a list of known tokens of which the first ``computed`` are in the KV cache. Several
uncomputed tokens are prefill; exactly one is decode. Every planned slice that reaches the end of the
known tokens asks for one sampled token.

- Decode goes first; prefill gets what is left of ``mixed_tokens`` (``prefill_tokens`` when nothing
  decodes) and of the measured pace, so that a long prompt slows running streams by a bounded amount.
- A request reserves cells for its prompt and all tokens it may produce before it is admitted: nothing
  that runs can run out of cells.
- A waiting request rises one priority level every ``ageing_s``: whatever else arrives, nothing starves.
- Where slots or cells run out, a request of a higher priority takes the place of a running one of a lower
  that has not risen to its level. The state of the latter is saved; it waits with its tokens, as old as it
  is, and goes on where it was.
- Between tenants of one level, the one that was served least goes first (virtual token counters: Sheng
  et al., Fairness in Serving Large Language Models, OSDI 2024).
- A sequence that is alone gets a guess at its next tokens where its text repeats itself (core.lookup).
- A finished sequence leaves its tokens resident in its slot until the slot or its cells are needed. A
  new request starts from the longest prefix to be had anywhere; while a longer one is being computed or
  loaded it stands aside, so that many who arrive together with one system prompt pay for it once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from fieldmesh.core.errors import InvalidRequest, PromptTooLong, QueueFull
from fieldmesh.core.model import EngineState, FinishReason, Load, Priority, Usage
from fieldmesh.core.pace import Pace
from fieldmesh.core.residency import Residency, Source
from fieldmesh.core.sequences import Running, Waiting
from fieldmesh.core.steps import (
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

STEP_S_MAX = 0.5
"""How long a step should take at most: who arrives, leaves or runs out of time waits for its end."""
PREFILL_TOKENS_MIN = 32
"""What a step may prefill however slow it is: with fewer tokens, prefill itself becomes slow (SmolLM2 on two
cores: 470 tokens/s in slices of 32, 400 in slices of 8, 240 in slices of 2; larger models lose more)."""
TILE_TOKENS = 64
NEARLY_A_TILE_TOKENS = 48
TILED_FROM = 256
"""llama.cpp's attention reads 64 tokens of a sequence at once in a faster way than fewer. Behind
``TILED_FROM`` others, 64 take no longer than 48 (SmolLM2, two cores; behind 500: 97 and 132 ms)."""


class Batcher:
    """The scheduler of one loaded context. Not thread-safe; ``now`` is monotonic seconds, never decreasing.

    Illegal use (an unknown id in ``commit``, ``plan`` twice without ``commit``) raises AssertionError.
    """

    def __init__(self, config: BatcherConfig) -> None:
        config.validate()
        self.config = config
        self._waiting: OrderedDict[str, Waiting] = OrderedDict()
        self._running: OrderedDict[str, Running] = OrderedDict()
        self.cache = Residency(config)
        self._served: dict[str, int] = {}
        self._pace = Pace(config.slots)
        self._order = 0
        self._planned: StepPlan | None = None
        self._planned_at = 0.0
        self._beside_streams = False
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
        tokens = [*work.prompt_token_ids, *work.resume_token_ids]
        self._waiting[work.id] = Waiting(work=work, arrived=now, order=self._order, tokens=tokens)
        if work.tenant not in self._served:  # joins level with those being served: no credit for absence
            self._served[work.tenant] = min(self._served.values(), default=0)

    def cancel(self, generation_id: str) -> bool:
        """End a generation; False if it is not here. A step under way may still compute it in vain."""
        if (waiting := self._waiting.pop(generation_id, None)) is not None:
            self._unpin(waiting)
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

    def plan(self, now: float, *, beside_streams: bool = False) -> StepPlan:
        """Drop what is past its deadline, admit what fits, and share out the next step, a small one where
        streams of another context wait for their turn (``beside_streams``).

        A plan without slices is not committed: nothing can run before a command, or ``deadline``, or the end
        of a transfer.
        """
        assert self._planned is None, "plan was called twice without commit"
        self._beside_streams = beside_streams
        self.cache.begin_plan()
        expired = tuple(w.id for w in self._works() if w.deadline is not None and w.deadline <= now)
        for generation_id in expired:
            self.cancel(generation_id)
        places = self._admit(now)
        if not self._running and not self._waiting:
            self.cache.spill_idle()
        drops, save, fetch = self.cache.take_orders()
        plan = StepPlan(
            expired=expired, drops=drops, save=save, fetch=fetch, places=places, slices=self._share(now)
        )
        if plan.slices:
            self._planned, self._planned_at = plan, now
        return plan

    def _admit(self, now: float) -> tuple[Place, ...]:
        """Admit strictly in order of rank: a large request at the head is not overtaken for ever. Only those
        whose prefix is just being computed or loaded stand aside until it is there."""
        places: list[Place] = []
        while self._waiting and self._room_is_possible():
            found = self._first_that_need_not_wait(now)
            if found is None:
                break
            del self._waiting[found[0].work.id]
            places.extend(self._place(*found, now))
        return tuple(places)

    def _room_is_possible(self) -> bool:
        """Whether it is worth looking: a slot is free, or someone could make way."""
        if self._free_slots() > 0:
            return True
        urgent = min(w.work.priority.value for w in self._waiting.values())
        return any(s.work.priority.value > urgent for s in self._running.values())

    def _first_that_need_not_wait(self, now: float) -> tuple[Waiting, Source] | None:
        """The next to run and what it begins with. Room is kept for those whose state is being loaded."""
        ranked = sorted(self._waiting.values(), key=lambda w: self._rank(w, now))
        kept_slots = kept_cells = 0
        for waiting in ranked[:ADMISSION_LOOKAHEAD]:
            work = waiting.work
            source = self.cache.best(work.adapter, waiting.tokens, waiting.keep_max)
            if self._prefix_is_coming(waiting, source.keep):
                continue
            if not self._fits(work.cells + kept_cells, kept_slots):
                if kept_slots or not self._preempt_for(waiting, now):
                    return None
                source = self.cache.best(work.adapter, waiting.tokens, waiting.keep_max)
            if not source.name or self.cache.fetch(source.name):
                return waiting, source
            kept_slots, kept_cells = kept_slots + 1, kept_cells + work.cells
        return None

    def _prefix_is_coming(self, waiting: Waiting, there: int) -> bool:
        """Whether a running sequence, no less urgent, is computing more of this work's tokens than are to be
        had anywhere."""
        computing = {
            s.slot
            for s in self._running.values()
            if s.outstanding > 1
            and not s.paused
            and not s.ended
            and s.work.priority.value <= waiting.work.priority.value
        }
        if not computing:
            return False
        coming = min(self.cache.coming(waiting.work.adapter, waiting.tokens, computing), waiting.keep_max)
        return coming - there >= self.config.reuse_tokens_min

    def _rank(self, waiting: Waiting, now: float) -> tuple[int, int, int]:
        return (
            self._level(waiting.work.priority, waiting.arrived, now),
            self._served[waiting.work.tenant],
            waiting.order,
        )

    def _level(self, priority: Priority, arrived: float, now: float) -> int:
        return priority.value - int((now - arrived) / self.config.ageing_s)

    def _fits(self, cells: int, kept_slots: int = 0) -> bool:
        reserved = sum(s.work.cells for s in self._running.values())
        return self._free_slots() > kept_slots and reserved + cells <= self.config.cells_total

    def _victim(self, waiting: Waiting, now: float) -> Running | None:
        """The running sequence that should make way: of lower priority, and below the other's level even with
        the time that it has waited; the least urgent, of those the latest to arrive."""
        level = self._level(waiting.work.priority, waiting.arrived, now)
        below = [
            s
            for s in self._running.values()
            if not s.ended
            and s.work.priority.value > waiting.work.priority.value
            and self._level(s.work.priority, s.arrived, now) > level
            and s.work.tokens_max - s.generated >= self.config.preempt_tokens_min
        ]
        return max(below, key=lambda s: (self._level(s.work.priority, s.arrived, now), s.order), default=None)

    def _preempt_for(self, waiting: Waiting, now: float) -> bool:
        """Make way for ``waiting``; False while that has to wait (for the transfer of another state)."""
        while not self._fits(waiting.work.cells):
            victim = self._victim(waiting, now)
            if victim is None or not self._preempt(victim):
                return False
        return True

    def _preempt(self, victim: Running) -> bool:
        """Put a running sequence back into the queue, with its state saved where that is worth it."""
        work, known, state = victim.work, victim.tokens[: victim.computed], ""
        if self.cache.stored.cells_max and victim.computed >= self.config.restore_tokens_min:
            if not self.cache.transfer_free:
                return False
            if state := self.cache.save(victim.slot, work.adapter, known):
                self.cache.stored.pin(state)
        self._waiting[work.id] = Waiting(
            work=work,
            arrived=victim.arrived,
            order=victim.order,
            tokens=victim.tokens,
            cached=victim.cached,
            queue_s=victim.queue_s,
            state=state,
        )
        self._release(victim)
        return True

    def _unpin(self, waiting: Waiting) -> None:
        if waiting.state in self.cache.stored:
            self.cache.stored.unpin(waiting.state)

    def _place(self, waiting: Waiting, source: Source, now: float) -> tuple[Place, ...]:
        work = waiting.work
        source = self._tiled(source, len(waiting.tokens))
        # Continue in the slot that holds the prefix; else stay beside running neighbours (llama.cpp computes
        # neighbouring sequences in one pass).
        running = {s.slot for s in self._running.values()}
        free = [i for i in range(self.config.slots) if i not in running]
        slot = source.slot if source.slot in free else min(free, key=lambda i: self._slot_cost(i, running))
        self._unpin(waiting)
        self._running[work.id] = Running(
            work=work,
            arrived=waiting.arrived,
            order=waiting.order,
            slot=slot,
            tokens=waiting.tokens,
            computed=source.keep,
            cached=min(source.keep, len(work.prompt_token_ids)) if waiting.cached is None else waiting.cached,
            queue_s=now - waiting.arrived if waiting.cached is None else waiting.queue_s,
        )
        self._served[work.tenant] += len(waiting.tokens) - source.keep
        return self.cache.place(slot, work.adapter, waiting.tokens, source, work.cells)

    def _tiled(self, source: Source, tokens: int) -> Source:
        """The source with a few tokens less, where to compute them again takes less time than it saves. What
        a saved state brings is kept: of sliding windows it has the last alone."""
        start = tokens - TILE_TOKENS
        decoding = sum(s.outstanding == 1 for s in self._running.values())
        if (
            not self.config.cuttable
            or source.name
            or not _nearly_a_tile(tokens - source.keep, start)
            or self._prefill_tokens(decoding) < TILE_TOKENS
        ):
            return source
        return replace(source, keep=start)

    def _slot_cost(self, index: int, running: set[int]) -> tuple[bool, int, bool, int]:
        beside = len(running & {index - 1, index + 1})
        return self.cache.stays(index), -beside, index in self.cache.slots, self.cache.freed_order[index]

    def restart(self, slots: Iterable[int]) -> tuple[Slice, ...]:
        """What was to be in these slots is not there: compute their sequences from the beginning. Returns the
        new slices of the planned step."""
        assert self._planned is not None, "there is no plan to mend"
        lost = set(slots)
        for slot in lost:
            self.cache.lose(slot)
        for sequence in self._running.values():
            if sequence.slot in lost:
                sequence.computed = sequence.cached = 0
        self._planned = replace(self._planned, slices=self._share(self._planned_at))
        return self._planned.slices

    def _share(self, now: float) -> tuple[Slice, ...]:
        """Decode first, then prefill: most urgent level first, within it the nearest to its first token."""
        active = [s for s in self._running.values() if not s.paused and not s.ended]
        if len(active) == 1 and active[0].outstanding == 1 and not self._waiting:
            return (self._with_draft(active[0]),)
        decoding = [s for s in active if s.outstanding == 1]
        prefilling = sorted(
            (s for s in active if s.outstanding > 1),
            key=lambda s: (self._level(s.work.priority, s.arrived, now), s.outstanding, s.order),
        )
        slices = [self._slice(s, 1) for s in decoding]
        left = self._prefill_tokens(len(decoding))
        for sequence in prefilling:
            if left <= 0:
                break
            slices.append(self._slice(sequence, self._piece_tokens(sequence, left)))
            left -= len(slices[-1].token_ids)
        return tuple(slices)

    def _prefill_tokens(self, decoding: int) -> int:
        """Tokens of prefill beside so many decoders: as configured, and none that would take too long."""
        mixed = decoding or self._beside_streams
        left = (self.config.mixed_tokens if mixed else self.config.prefill_tokens) - decoding
        if not self._pace.prefill_tokens_per_s:
            return left
        in_time = int(self._pace.prefill_tokens_per_s * STEP_S_MAX) - decoding
        return min(left, max(PREFILL_TOKENS_MIN, in_time))

    def _piece_tokens(self, sequence: Running, tokens_max: int) -> int:
        """How much of a prompt to compute of at most ``tokens_max``: a last piece that would be nearly a tile
        becomes one."""
        tokens = min(tokens_max, sequence.outstanding)
        rest = sequence.outstanding - tokens
        less = tokens - (TILE_TOKENS - rest)
        behind = sequence.computed + less
        return less if _nearly_a_tile(rest, behind) and less >= TILE_TOKENS else tokens

    def _slice(self, sequence: Running, tokens_max: int) -> Slice:
        start = sequence.computed
        end = min(start + tokens_max, len(sequence.tokens))
        return Slice(
            id=sequence.work.id,
            slot=sequence.slot,
            position=start,
            token_ids=tuple(sequence.tokens[start:end]),
            sample=end == len(sequence.tokens),
        )

    def _with_draft(self, sequence: Running) -> Slice:
        """The next token of a sequence that is alone, with a guess at those behind it."""
        rest = min(self.config.draft_tokens_max, sequence.work.tokens_max - sequence.generated - 1)
        draft = sequence.lookup.draft(sequence.tokens, rest) if rest > 0 and self.config.cuttable else ()
        return replace(self._slice(sequence, 1), draft=draft)

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
            drawn = sampled[piece.id].token_ids if piece.id in sampled else ()
            kept = max(0, len(drawn) - 1)
            assert drawn[:-1] == piece.draft[:kept], "what was drawn does not follow the draft"
            sequence.computed += len(piece.token_ids) + kept
            self.cache.computed[sequence.slot] = sequence.computed
            if piece.draft:
                sequence.lookup.judge(len(piece.draft), kept, self._pace.draft_price)
            if sequence.ended:
                self._release(sequence)
            elif piece.sample:
                outputs.append(self._append(sequence, sampled[piece.id]))
        self._observe(plan, now - self._planned_at)
        return tuple(outputs)

    def _observe(self, plan: StepPlan, duration_s: float) -> None:
        """Learn from a step how fast the next ones may be."""
        decoding, drafted = sum(s.decodes for s in plan.slices), sum(len(s.draft) for s in plan.slices)
        if drafted:
            self._pace.observe_draft(drafted=drafted, duration_s=duration_s)
        else:
            self._pace.observe(
                decoding=decoding, prefill_tokens=plan.tokens - decoding, duration_s=duration_s
            )

    def _append(self, sequence: Running, result: Sampled) -> Output:
        first = sequence.generated
        sequence.tokens.extend(result.token_ids)
        # A decoded token keeps the hardware busier than a prefilled one; 2 is the paper's weight.
        self._served[sequence.work.tenant] += 2 * len(result.token_ids)
        finish = None
        if result.stop:
            finish = FinishReason.STOP
        elif sequence.generated >= sequence.work.tokens_max:
            finish = FinishReason.LENGTH
        if finish is not None:
            self._release(sequence)
        return Output(
            id=sequence.work.id,
            token_ids=result.token_ids,
            first_token_index=first,
            finish=finish,
            usage=sequence.usage if finish else None,
        )

    # --- endings ----------------------------------------------------------------------------

    def _end(self, sequence: Running) -> None:
        """Free a sequence's slot now, or at commit while a step is computing it."""
        sequence.ended = True
        if self._planned is None or all(s.id != sequence.work.id for s in self._planned.slices):
            self._release(sequence)

    def _release(self, sequence: Running) -> None:
        del self._running[sequence.work.id]
        self.cache.retire(sequence.slot, sequence.work.adapter, sequence.tokens[: sequence.computed])
        self._forget_idle_tenants()

    def _forget_idle_tenants(self) -> None:
        present = {w.tenant for w in self._works()}
        self._served = {t: n for t, n in self._served.items() if t in present}

    # --- numbers ----------------------------------------------------------------------------

    def usage(self, generation_id: str) -> Usage | None:
        """Token counts of a running generation so far; None if it is not running."""
        sequence = self._running.get(generation_id)
        return sequence.usage if sequence else None

    def position(self, generation_id: str) -> tuple[int, int, list[int], str] | None:
        """Slot of a running generation, how many tokens are computed there, all that are known, and its
        adapter; None where nothing is computed."""
        sequence = self._running.get(generation_id)
        if sequence is None or sequence.ended or not sequence.computed:
            return None
        return sequence.slot, sequence.computed, list(sequence.tokens), sequence.work.adapter

    def load(self, *, draining: bool = False) -> Load:
        """Everything that routing wants to know, measured."""
        running = self._running.values()
        waiting = self._waiting.values()
        return Load(
            engine=EngineState.READY,
            slots=self.config.slots,
            running=len(self._running),
            queued=len(waiting),
            queue_max=self.config.queue_max,
            kv_cells_used=sum(s.work.cells for s in running),
            kv_cells_total=self.config.cells_total,
            pending_prefill_tokens=sum(len(w.tokens) for w in waiting)
            + sum(s.outstanding for s in running if s.outstanding > 1),
            pending_decode_tokens=sum(w.work.cells + 1 - len(w.tokens) for w in waiting)
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
        self.cache.check()
        owners = sorted(s.slot for s in self._running.values())
        assert owners == sorted(i for i in self.cache.slots if self.cache.slots.pinned(i))
        assert len(set(owners)) == len(owners), "a running sequence owns exactly one slot"
        for sequence in self._running.values():
            assert self.cache.computed[sequence.slot] == sequence.computed < len(sequence.tokens)
            known = self.cache.slots.tokens(sequence.slot)
            assert list(known) == sequence.tokens[: len(known)]
            assert sequence.computed <= sequence.work.cells
            assert sequence.cached <= len(sequence.work.prompt_token_ids)
            assert not sequence.ended or self._planned is not None
        for waiting in self._waiting.values():
            assert len(waiting.tokens) <= waiting.work.cells
        assert set(self._served) >= {w.tenant for w in self._works()}
        assert len(self._served) <= len(self._waiting) + len(self._running)


def _nearly_a_tile(tokens: int, behind: int) -> bool:
    """Whether so many tokens would be computed sooner as the last of a tile that is behind ``behind``."""
    return NEARLY_A_TILE_TOKENS <= tokens < TILE_TOKENS and behind >= TILED_FROM
