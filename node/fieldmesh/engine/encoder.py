"""llama.cpp's second context: texts to vectors. Imports llama_cpp beside ``engine.llama``.

Owns: the context and the batch for embeddings, made when the first text comes. Must not: schedule or pool.
Its memory is one sequence's cache and a pass's buffers; generation has its own context and does not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import llama_cpp.llama_cpp as lib
import numpy as np

from fieldmesh.core.errors import ConfigError, Internal
from fieldmesh.core.steps import Slice
from fieldmesh.engine.embeddings import PASS_TEXTS_MAX, PASS_TOKENS_MAX, Pooling
from fieldmesh.engine.settings import EngineSettings

Rows: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]

# The values of llama.cpp's enum llama_pooling_type, as a GGUF's {architecture}.pooling_type holds them.
_POOLINGS = {1: Pooling.MEAN, 2: Pooling.CLS, 3: Pooling.LAST}
_VALUE_BYTES = 64


def pooling_of(model: lib.llama_model_p) -> Pooling:
    """How the model was made to be pooled; by the mean where its file does not say."""
    architecture = _metadata(model, "general.architecture")
    kind = _metadata(model, f"{architecture}.pooling_type")
    return _POOLINGS.get(int(kind) if kind.isdigit() else 0, Pooling.MEAN)


def _metadata(model: lib.llama_model_p, key: str) -> str:
    buffer = bytes(_VALUE_BYTES)
    found = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer[: max(0, min(found, _VALUE_BYTES - 1))].decode("utf-8", errors="replace")


class Encoder:
    """The context. Raises ConfigError where the box has no memory for it."""

    def __init__(self, model: lib.llama_model_p, settings: EngineSettings) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = settings.context_tokens + PASS_TOKENS_MAX
        params.n_seq_max = PASS_TEXTS_MAX
        params.n_batch = params.n_ubatch = PASS_TOKENS_MAX
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = int(settings.flash_attention)
        params.embeddings = True
        params.pooling_type = lib.LLAMA_POOLING_TYPE_NONE  # long texts come in pieces: we pool
        params.kv_unified = True
        params.no_perf = True
        self._context: Any = lib.llama_init_from_model(model, params)
        if not self._context:
            raise ConfigError("llama.cpp cannot make a context for embeddings; lower context_tokens")
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(PASS_TOKENS_MAX, 0, 1)
        self._width = int(lib.llama_model_n_embd(model))

    def embed(self, slices: Sequence[Slice]) -> Rows:
        """One pass: a row for each token, in order. Texts that do not go on are forgotten."""
        going_on = {piece.slot for piece in slices if piece.position}
        for slot in range(PASS_TEXTS_MAX):
            if slot not in going_on:
                lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
        batch, row = self._batch, 0
        for piece in slices:
            for offset, token in enumerate(piece.token_ids):
                batch.token[row] = token
                batch.pos[row] = piece.position + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = piece.slot
                batch.logits[row] = 1
                row += 1
        batch.n_tokens = row
        code = lib.llama_decode(self._context, batch)
        if code != 0:
            raise Internal(f"llama_decode returned {code} for {row} tokens to embed")
        found = lib.llama_get_embeddings(self._context)
        rows: Rows = np.ctypeslib.as_array(found, (row, self._width)).copy()
        return rows

    def close(self) -> None:
        """Free everything."""
        lib.llama_batch_free(self._batch)
        lib.llama_free(self._context)
