"""llama.cpp behind plain types: the only module that imports llama_cpp.

Owns: the model, the context, its batch, pieces of tokens, the library's log. Must not: schedule,
speak to the host, or know what a generation is. One thread owns a LlamaModel.

The KV cache is one stream a slot (``kv_unified`` off) with flash attention. Up to ``EXACT_TOKENS``, prompt
and answer together, what a sequence says on a CPU is bit-identical whatever shares its steps, however its
tokens were cut into steps, and whether they were drawn here or came with the request. For that, no more than
``PIECE_TOKENS`` of its tokens are computed at once there: from 64 on, llama.cpp's attention takes another
way, and for one lone token with more than 256 behind it a third, which round differently (by up to 0.7 in a
logit of SmolLM2). Beyond, most greedy answers are the same, but none is promised. Nor is it promised for
GPUs, or for weights that are multiplied in another way where several tokens meet: K-quants, 16- and 32-bit
weights on x86, Arm's matrix instructions, adapters whose rank is a multiple of four. The library puts
sequences into one pass only where their ids are consecutive, so rows go in by slot and the scheduler prefers
neighbours.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import llama_cpp
import llama_cpp.llama_cpp as lib
import numpy as np

from fieldmesh.core.errors import ConfigError, Internal, ModelFileInvalid
from fieldmesh.core.model import Adapter, Sampling
from fieldmesh.core.steps import Place, Slice
from fieldmesh.engine.drawing import Sampler
from fieldmesh.engine.embeddings import Pooling
from fieldmesh.engine.encoder import Encoder, Rows, pooling_of
from fieldmesh.engine.grammars import Vocabulary
from fieldmesh.engine.likelihood import Logits
from fieldmesh.engine.loop import Walk
from fieldmesh.engine.memory import give_back_file
from fieldmesh.engine.settings import EngineSettings

LOG_LINES_MAX = 20
PIECE_BYTES_MAX = 512
EXACT_TOKENS = 256
PIECE_TOKENS = 63

LIBRARY_VERSION: str = llama_cpp.__version__

_KV_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}

_log_lines: deque[str] = deque(maxlen=LOG_LINES_MAX)


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _user_data: object) -> None:
    if level in (3, 4):  # warnings and errors
        _log_lines.append(text.decode("utf-8", errors="replace").strip())


class LlamaModel:
    """A loaded model and one context with ``settings.slots`` sequences; ``beside`` is another one over the
    same file, whose weights it takes.

    Raises ModelFileInvalid where llama.cpp refuses the file, ConfigError where the settings do not suit it.
    """

    def __init__(
        self,
        settings: EngineSettings,
        on_progress: Callable[[float], None],
        beside: LlamaModel | None = None,
    ) -> None:
        lib.llama_log_set(_keep_log, None)
        lib.llama_backend_init()
        self._weights: _Weights = beside._weights if beside else _Weights(settings, on_progress)
        with ExitStack() as opened:  # a context that cannot be made leaves nothing behind
            self._model = opened.enter_context(self._weights)
            self._vocab = lib.llama_model_get_vocab(self._model)
            self.vocabulary_tokens = int(lib.llama_vocab_n_tokens(self._vocab))
            self._settings = settings
            self._check(settings)
            adapters = []
            for adapter in settings.adapters:
                adapters.append(_load_adapter(self._model, adapter))
                opened.callback(lib.llama_adapter_lora_free, adapters[-1])
            self._context = _new_context(self._model, settings)
            opened.callback(lib.llama_free, self._context)
            _set_adapters(self._context, adapters, settings.adapters)
            self._opened = opened.pop_all()
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(settings.step_tokens_max, 0, 1)
        self._copy = memoryview(bytearray())
        self._copied = -1
        self._row_type = ctypes.c_float * self.vocabulary_tokens
        self._parked: dict[int, memoryview] = {}
        self._pieces: dict[int, bytes] = {}
        self._settings = settings
        self._exact = settings.flash_attention and not settings.n_gpu_layers
        self._encoder: Encoder | None = None
        self._ends = frozenset(
            t for t in range(self.vocabulary_tokens) if lib.llama_vocab_is_eog(self._vocab, t)
        )

    # --- facts ------------------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        return int(lib.llama_model_n_params(self._model))

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens with which the model says that it is done."""
        return self._ends

    @property
    def cuttable(self) -> bool:
        """Whether the cache can be cut at any token: not so with recurrent layers, which keep one state for
        all that they have read. Sliding windows can be cut, for their layers get a cache of full size."""
        return not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

    @property
    def chat_template(self) -> str:
        found = lib.llama_model_chat_template(self._model, None)
        return found.decode("utf-8", errors="replace") if found else ""

    @property
    def bos(self) -> str:
        return self._token_text(int(lib.llama_vocab_bos(self._vocab)))

    @property
    def eos(self) -> str:
        return self._token_text(int(lib.llama_vocab_eos(self._vocab)))

    def _token_text(self, token: int) -> str:
        text = lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
        return bytes(text or b"").decode("utf-8", errors="replace")

    def _check(self, settings: EngineSettings) -> None:
        if not lib.llama_model_has_decoder(self._model) or lib.llama_model_has_encoder(self._model):
            raise ModelFileInvalid(
                f"the model file {settings.model_path} holds no text generator (decoder-only model)",
                field="model_path",
            )
        trained = int(lib.llama_model_n_ctx_train(self._model))
        if settings.context_tokens > trained:
            raise ConfigError(
                f"context_tokens is {settings.context_tokens}, but the model was trained for {trained}: "
                f"set it to at most {trained}",
                field="context_tokens",
            )

    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""
        self._settings = replace(self._settings, threads=threads)
        lib.llama_set_n_threads(self._context, threads, threads)

    # --- embeddings -------------------------------------------------------------------------

    @property
    def pooling(self) -> Pooling:
        """How texts become vectors."""
        return pooling_of(self._model)

    def embed(self, slices: Sequence[Slice]) -> Rows:
        """A row for each token, from a context of its own that is made for the first text."""
        if self._encoder is None:
            self._encoder = Encoder(self._model, self._settings)
        return self._encoder.embed(slices)

    # --- tokens -----------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_bos: bool) -> tuple[int, ...]:
        """Token ids of ``text``; control tokens written out in it are recognised."""
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, data, len(data), tokens, room, add_bos, True)
        if count < 0:
            raise Internal(f"the tokenizer wants {-count} tokens for {len(data)} bytes")
        return tuple(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens stand for none."""
        found = self._pieces.get(token)
        if found is None:
            buffer = ctypes.create_string_buffer(PIECE_BYTES_MAX)
            length = lib.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES_MAX, 0, False)
            found = self._pieces[token] = buffer.raw[: max(0, length)]
        return found

    def vocabulary(self) -> Vocabulary:
        """All tokens as bytes, control tokens by their names. Touches nothing that a step changes."""
        control = lib.LLAMA_TOKEN_ATTR_CONTROL
        named = lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        pieces, special = [], []
        buffer = ctypes.create_string_buffer(PIECE_BYTES_MAX)
        for token in range(self.vocabulary_tokens):
            length = lib.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES_MAX, 0, True)
            piece = buffer.raw[: max(0, length)]
            kind = lib.llama_vocab_get_attr(self._vocab, token)
            if kind & control or (kind & named and piece.startswith(b"<") and piece.endswith(b">")):
                special.append(token)
            pieces.append(piece)
        return Vocabulary(pieces, special, sorted(self._ends))

    # --- steps ------------------------------------------------------------------------------

    def place(self, places: Sequence[Place], fetched: memoryview | None = None) -> list[int]:
        """Bring slots to the contents that the scheduler wants, in order; ``fetched`` is the state that a
        place may name. Returns the slots that could not be brought there: they are empty now.

        Tokens are copied between slots as states: in proportion to their number, where the library's own copy
        (``llama_memory_seq_cp``) moves the whole stream, however little is in it. From ``settings.slots`` on,
        a slot is memory in which a state lies and nothing is computed.
        """
        self._copied = -1
        done = {place.slot: self._place(place, fetched) for place in places}
        return [slot for slot, there in done.items() if not there]

    def _place(self, place: Place, fetched: memoryview | None) -> bool:
        if place.slot >= self._settings.slots:
            return self._park(place)
        state = None
        if place.state:
            state = fetched or memoryview(b"")
        elif place.source != place.slot and place.keep_tokens:
            state = self._parked.get(place.source) or self._copy_out(place.source)
        if place.slot == self._copied:
            self._copied = -1
        done = True
        if state is not None:
            # A state without tokens is taken, and changes nothing.
            lib.llama_memory_seq_rm(self._memory, place.slot, -1, -1)
            done = bool(state) and self.load_state(place.slot, state)
        if done and self._reaches(place.slot, place.keep_tokens) and self.cut(place.slot, place.keep_tokens):
            return True
        lib.llama_memory_seq_rm(self._memory, place.slot, -1, -1)
        return False

    def _reaches(self, slot: int, keep_tokens: int) -> bool:
        """Whether layers with a sliding window have all of it before ``keep_tokens``: a state brings them the
        last window alone."""
        window = int(lib.llama_model_n_swa(self._model))
        if not window or int(lib.llama_memory_seq_pos_max(self._memory, slot)) + 1 == keep_tokens:
            return True
        return int(lib.llama_memory_seq_pos_min(self._memory, slot)) <= max(0, keep_tokens - window + 1)

    def _park(self, place: Place) -> bool:
        self._parked.pop(place.slot, None)
        if place.keep_tokens == 0:
            return True
        held = int(lib.llama_memory_seq_pos_max(self._memory, place.source)) + 1
        if held != place.keep_tokens:
            return False
        state = memoryview(bytearray(self.state_bytes(place.source)))
        self.save_state(place.source, state)
        self._parked[place.slot] = state
        return True

    def cut(self, slot: int, keep_tokens: int) -> bool:
        """Keep the first tokens of a slot and no others; False where the cache cannot do that."""
        if keep_tokens == 0:
            return bool(lib.llama_memory_seq_rm(self._memory, slot, -1, -1))
        last = int(lib.llama_memory_seq_pos_max(self._memory, slot))
        if last < keep_tokens - 1:
            return False
        return last == keep_tokens - 1 or bool(lib.llama_memory_seq_rm(self._memory, slot, keep_tokens, -1))

    def _copy_out(self, slot: int) -> memoryview:
        """The state of a slot, copied once for all who begin with it."""
        size = self.state_bytes(slot)
        if len(self._copy) < size:
            self._copy = memoryview(bytearray(size))
        if self._copied != slot:
            self.save_state(slot, self._copy[:size])
            self._copied = slot
        return self._copy[:size]

    # --- states -----------------------------------------------------------------------------

    def state_facts(self) -> dict[str, object]:
        """What the bytes of a state depend on, besides the model's file."""
        params = _context_params(self._settings)
        return {
            "library": LIBRARY_VERSION,
            "version": lib.LLAMA_STATE_SEQ_VERSION,
            "kv_types": [params.type_k, params.type_v],
            "flash_attention": params.flash_attn_type,
            "rope": [params.rope_scaling_type, params.rope_freq_base, params.rope_freq_scale],
            "full_windows": params.swa_full,
        }

    def state_bytes(self, slot: int) -> int:
        """Size of the state of all that is computed in ``slot``."""
        if (parked := self._parked.get(slot)) is not None:
            return len(parked)
        return int(lib.llama_state_seq_get_size(self._context, slot))

    def save_state(self, slot: int, into: memoryview) -> None:
        """Write the state of ``slot``. Takes 2 ms for 23 MB into memory that was touched before, and 60 ms
        into fresh memory. Raises Internal where ``into`` is too small."""
        if (parked := self._parked.get(slot)) is not None:
            into[: len(parked)] = parked
            return
        data = (ctypes.c_uint8 * len(into)).from_buffer(into)
        if lib.llama_state_seq_get_data(self._context, data, len(into), slot) == 0:
            raise Internal(f"the state of a sequence does not fit into {len(into)} bytes")

    def load_state(self, slot: int, state: memoryview) -> bool:
        """Put a state into ``slot``; False where the library refuses it. It looks at little: who hands in a
        state has verified it."""
        data = (ctypes.c_uint8 * len(state)).from_buffer(state)
        return bool(lib.llama_state_seq_set_data(self._context, data, len(state), slot))

    def run(self, slices: Sequence[Slice]) -> dict[str, int]:
        """Compute one step. Returns the row of the logits of every slice that samples, by id; those after the
        tokens of its draft follow."""
        rows: dict[str, int] = {}
        for pieces in passes(slices, exact=self._exact):
            rows = self._decode(pieces)
        return rows

    def _decode(self, pieces: Sequence[Slice]) -> dict[str, int]:
        batch, row, rows = self._batch, 0, {}
        for piece in pieces:
            for offset, token in enumerate(piece.token_ids + piece.draft):
                batch.token[row] = token
                batch.pos[row] = piece.position + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = piece.slot
                batch.logits[row] = 0
                row += 1
            if piece.sample:
                rows[piece.id] = row - 1 - len(piece.draft)
                for drawn_from in range(rows[piece.id], row):
                    batch.logits[drawn_from] = 1
        batch.n_tokens = row
        code = lib.llama_decode(self._context, batch)
        if code != 0:
            raise Internal(f"llama_decode returned {code} for {row} tokens: {'; '.join(_log_lines)}")
        return rows

    def sampler(
        self,
        sampling: Sampling,
        seed: int,
        resumed: Sequence[int],
        prompt: Sequence[int],
        walk: Walk | None = None,
    ) -> Sampler:
        """A sampler that continues after ``resumed`` tokens."""
        return Sampler(self, sampling, seed, resumed, prompt, walk)

    def logits(self, row: int) -> Logits:
        """The logits of one row of the last step, in the library's own memory: the next step overwrites them,
        and what draws from them may."""
        address = ctypes.addressof(lib.llama_get_logits_ith(self._context, row).contents)
        memory = memoryview(self._row_type.from_address(address))
        return np.ndarray(self.vocabulary_tokens, np.float32, memory)

    def close(self) -> None:
        """Free everything."""
        if self._encoder is not None:
            self._encoder.close()
        lib.llama_batch_free(self._batch)
        self._opened.close()


class _Weights:
    """A model's file in memory, once for all contexts over it, for as long as there is one."""

    def __init__(self, settings: EngineSettings, on_progress: Callable[[float], None]) -> None:
        self._model = _load_model(settings, on_progress)
        self._contexts = 0

    def __enter__(self) -> lib.llama_model_p:
        self._contexts += 1
        return self._model

    def __exit__(self, *_: object) -> None:
        self._contexts -= 1
        if not self._contexts:
            lib.llama_model_free(self._model)


def passes(slices: Sequence[Slice], *, exact: bool) -> list[list[Slice]]:
    """The passes of a step, each by slot; what samples is in the last. ``exact``: of a sequence's first
    ``EXACT_TOKENS``, none has more than ``PIECE_TOKENS``."""
    step: list[list[Slice]] = []
    for whole in sorted(slices, key=lambda s: s.slot):
        below = EXACT_TOKENS - whole.position if exact else 0
        for number, piece in enumerate(_cut(whole, below)):
            if number == len(step):
                step.append([])
            step[number].append(piece)
    return step[::-1]


def _cut(whole: Slice, below: int) -> list[Slice]:
    """A slice in pieces, the last first: of its first ``below`` tokens, few at once."""
    if below <= 0 or len(whole.token_ids) <= PIECE_TOKENS:
        return [whole]
    pieces, end = [], len(whole.token_ids)
    while end:
        start = below if end > below else max(0, end - PIECE_TOKENS)
        last = end == len(whole.token_ids)
        pieces.append(
            replace(
                whole,
                position=whole.position + start,
                token_ids=whole.token_ids[start:end],
                sample=whole.sample and last,
                draft=whole.draft if last else (),
            )
        )
        end = start
    return pieces


def _load_model(settings: EngineSettings, on_progress: Callable[[float], None]) -> lib.llama_model_p:
    @lib.llama_progress_callback  # type: ignore[untyped-decorator]
    def progress(share: float, _user_data: object) -> bool:
        on_progress(share)
        return True

    params = lib.llama_model_default_params()
    shares = _gpu_params(params, settings)
    params.progress_callback = progress
    model = lib.llama_model_load_from_file(settings.model_path.encode(), params)
    del shares  # the library has read them
    give_back_file(settings.model_path)  # what was rearranged for this processor is read there no more
    if not model:
        raise ModelFileInvalid(
            f"llama.cpp cannot load {settings.model_path}: {'; '.join(_log_lines) or 'no reason given'}; "
            "fetch the file again, or use another model",
            field="model_path",
        )
    return model


def _gpu_params(params: lib.llama_model_params, settings: EngineSettings) -> object:
    """Which layers go to graphics cards; returns what the parameters point to."""
    if settings.n_gpu_layers and not lib.llama_supports_gpu_offload():
        raise ConfigError(
            f"n_gpu_layers is {settings.n_gpu_layers}, but this build of llama.cpp can use no GPU: set it "
            'to 0, or build anew for your card, for example with make install CMAKE_ARGS="-DGGML_CUDA=ON"',
            field="n_gpu_layers",
        )
    params.n_gpu_layers = settings.n_gpu_layers
    params.main_gpu = settings.main_gpu
    shares = (ctypes.c_float * lib.llama_max_devices())(*settings.tensor_split)
    if settings.tensor_split:
        params.tensor_split = shares
    return shares


def _context_params(settings: EngineSettings) -> lib.llama_context_params:
    params = lib.llama_context_default_params()
    params.n_ctx = settings.context_tokens * settings.slots
    params.n_seq_max = settings.slots
    params.n_batch = params.n_ubatch = settings.step_tokens_max
    params.n_threads = params.n_threads_batch = settings.threads
    params.flash_attn_type = int(settings.flash_attention)
    params.type_k, params.type_v = (_KV_TYPES[name] for name in settings.kv_types)
    params.kv_unified = False
    params.no_perf = True
    return params


def _new_context(model: lib.llama_model_p, settings: EngineSettings) -> lib.llama_context_p:
    context = lib.llama_init_from_model(model, _context_params(settings))
    if not context:
        raise ConfigError(
            f"llama.cpp cannot make a context of {settings.slots} x {settings.context_tokens} tokens: "
            f"{'; '.join(_log_lines) or 'no reason given'}; lower slots or context_tokens",
            field="context_tokens",
        )
    return context


def _load_adapter(model: lib.llama_model_p, adapter: Adapter) -> lib.llama_adapter_lora_p:
    found = lib.llama_adapter_lora_init(model, adapter.path.encode())
    if not found:
        raise ModelFileInvalid(
            f"llama.cpp cannot load the adapter {adapter.path}: "
            f"{'; '.join(_log_lines) or 'no reason given'}; use one that was trained on this model",
            field="adapters",
        )
    return found


def _set_adapters(
    context: lib.llama_context_p, loaded: Sequence[lib.llama_adapter_lora_p], adapters: Sequence[Adapter]
) -> None:
    """Apply LoRA files to all that the context computes."""
    if loaded:
        pointers = (lib.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
        scales = (ctypes.c_float * len(loaded))(*(adapter.scale for adapter in adapters))
        if lib.llama_set_adapters_lora(context, pointers, len(loaded), scales):
            raise Internal(f"llama.cpp refuses the adapters: {'; '.join(_log_lines)}")
