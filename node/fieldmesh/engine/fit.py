"""How much memory a model will take, from its file's header alone, and what to change where that is too much.

Owns: the estimate and the words of the refusal. Must not: read files, or load anything.

What is estimated: the weights (mapped, so they count while they are in use); the KV cache, which llama.cpp
fills with zeros at once; the largest of the graph's intermediate results, which it reserves for a whole batch
(the logits, or a score for every head, cell and token where attention is computed without the flash kernel);
and the process with its vocabulary. The constants were fitted to llama-cpp-python 0.3.36 with SmolLM2-135M
(``tests/engine/test_fit.py`` prints estimate and measurement).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fieldmesh.core.errors import ModelTooLarge
from fieldmesh.engine.gguf import GgufHeader
from fieldmesh.engine.settings import KV_TYPES, EngineSettings

CONTEXT_MULTIPLE_TOKENS = 256
"""llama.cpp rounds each sequence's context up to a multiple of this."""
PROCESS_BYTES = 64 << 20
"""Python, NumPy and the library without a model."""
VOCABULARY_ENTRY_BYTES = 400
"""A token's text, its merges and the tables that find them."""
CONTEXT_TOKENS_WORTH_HAVING = 512
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Bytes that one engine's process will hold at most, by what they hold."""

    weights: int
    kv: int
    compute: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.process


def estimate(header: GgufHeader, settings: EngineSettings) -> Fit:
    """What a model with this header will take under these settings."""
    shape = _Shape.of(header)
    context = -(-settings.context_tokens // CONTEXT_MULTIPLE_TOKENS) * CONTEXT_MULTIPLE_TOKENS
    k_type, v_type = settings.kv_types
    a_token = shape.k_values * KV_TYPES[k_type] + shape.v_values * KV_TYPES[v_type]
    scores = 0 if settings.flash_attention else shape.heads * context
    widest = max(
        shape.vocabulary + 3 * shape.embedding,
        scores + context + 6 * shape.embedding,
        2 * shape.feed_forward + 3 * shape.embedding,
    )
    logits = settings.slots * shape.vocabulary * 4
    sequence = int(a_token * context + 4 * shape.state_values)
    moving = min(sequence, settings.state_bytes_max)  # the buffer through which saved states pass
    parked = 0  # finished answers, beside the cache
    if settings.parked_tokens:
        parked = int(a_token * settings.parked_tokens + 2 * settings.slots * 4 * shape.state_values)
    return Fit(
        weights=header.weights_bytes,
        kv=sequence * settings.slots,
        compute=settings.step_tokens_max * 4 * widest + 2 * logits,
        process=PROCESS_BYTES + moving + parked + VOCABULARY_ENTRY_BYTES * shape.vocabulary,
    )


def demand_fit(header: GgufHeader, settings: EngineSettings, budget_bytes: int) -> Fit:
    """The estimate. Raises ModelTooLarge where it exceeds the budget, with what would fit."""
    fit = estimate(header, settings)
    if fit.total <= budget_bytes:
        return fit
    name = settings.model_name or header.name or settings.model_path
    raise ModelTooLarge(
        f"{name} needs about {fit.total // MIB} MiB (weights {fit.weights // MIB}, KV cache {fit.kv // MIB}, "
        f"computing {fit.compute // MIB}, process {fit.process // MIB}) and may have {budget_bytes // MIB}: "
        f"{_remedy(header, settings, budget_bytes)}",
        field="context_tokens",
        metadata={"needed_mib": str(fit.total // MIB), "budget_mib": str(budget_bytes // MIB)},
    )


def _remedy(header: GgufHeader, settings: EngineSettings, budget_bytes: int) -> str:
    """What would fit, the least loss first."""
    smaller = replace(settings, kv_type="q8_0")
    single = replace(settings, slots=1)
    tokens = _context_that_fits(header, settings, budget_bytes)
    tokens_smaller = _context_that_fits(header, smaller, budget_bytes)
    ways = [f"context_tokens = {tokens}"] if tokens else []
    if estimate(header, smaller).total <= budget_bytes:
        ways.insert(0, 'kv_type = "q8_0"')
    elif tokens_smaller > tokens:
        ways.append(f'kv_type = "q8_0" with context_tokens = {tokens_smaller}')
    if not ways and (tokens := _context_that_fits(header, single, budget_bytes)):
        ways.append(f"slots = 1 with context_tokens = {tokens}")
    if ways:
        return f"{' or '.join(ways)} would fit."
    return "no context would fit; take a smaller or more quantised model, or a box with more memory."


def _context_that_fits(header: GgufHeader, settings: EngineSettings, budget_bytes: int) -> int:
    """The most context tokens, in the library's steps, that fit; 0 where too few would be left."""
    low, high = 0, settings.context_tokens // CONTEXT_MULTIPLE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        tried = replace(settings, context_tokens=middle * CONTEXT_MULTIPLE_TOKENS)
        low, high = (middle, high) if estimate(header, tried).total <= budget_bytes else (low, middle - 1)
    tokens = low * CONTEXT_MULTIPLE_TOKENS
    return tokens if tokens >= CONTEXT_TOKENS_WORTH_HAVING else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The sizes that matter. ``k_values`` and ``v_values`` are per token, over all layers; ``state_values``
    per sequence, of recurrent layers."""

    vocabulary: int
    embedding: int
    feed_forward: int
    heads: int
    k_values: int
    v_values: int
    state_values: int

    @classmethod
    def of(cls, header: GgufHeader) -> _Shape:
        layers, embedding = header.number("block_count"), header.number("embedding_length")
        heads = header.number("attention.head_count")
        # One number for all layers, or one for each: layers without attention have none.
        kv_heads = header.numbers("attention.head_count_kv", layers) or [heads] * layers
        head_values = embedding // heads if heads else 0
        k_head = header.number("attention.key_length", head_values)
        v_head = header.number("attention.value_length", head_values)
        inner, state = header.number("ssm.inner_size"), header.number("ssm.state_size")
        groups, kernel = header.number("ssm.group_count"), header.number("ssm.conv_kernel")
        recurrent = layers - sum(1 for n in kv_heads if n) if sum(kv_heads) else layers
        vocabulary = header.number("vocab_size") or header.vocabulary
        return cls(
            vocabulary=vocabulary,
            embedding=embedding,
            feed_forward=header.number("feed_forward_length"),
            heads=heads,
            k_values=k_head * sum(kv_heads),
            v_values=v_head * sum(kv_heads),
            state_values=recurrent * (inner * state + max(0, kernel - 1) * (inner + 2 * groups * state))
            if inner
            else 0,
        )
