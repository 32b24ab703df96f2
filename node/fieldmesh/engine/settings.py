"""How an engine is set up. Owns: EngineSettings, its bounds and their error messages."""

from __future__ import annotations

from dataclasses import dataclass

from fieldmesh.core.errors import ConfigError
from fieldmesh.core.model import Adapter
from fieldmesh.core.steps import BatcherConfig

KV_TYPES = {"f16": 2.0, "q8_0": 34 / 32}
"""Types of cells in the KV cache, with the bytes that a value takes."""

GPUS_MAX = 16
PREFILL_TOKENS = 256
MIXED_TOKENS = 48
MEASURABLE = ("threads", "prefill_tokens", "mixed_tokens")

_BOUNDS: dict[str, tuple[float, float]] = {
    "context_tokens": (16, 1 << 20),
    "slots": (1, 64),
    "threads": (1, 512),
    "prefill_tokens": (16, 8192),
    "mixed_tokens": (2, 8192),
    "draft_tokens_max": (0, 15),
    "queue_max": (0, 10_000),
    "n_gpu_layers": (0, 10_000),
    "main_gpu": (0, GPUS_MAX - 1),
    "state_bytes_max": (0, 1 << 40),
    "ageing_s": (0.1, 3600),
    "watchdog_s": (1, 3600),
    "load_timeout_s": (1, 3600),
    "stream_tokens_max": (1, 1 << 20),
    "slow_reader_timeout_s": (0.01, 3600),
    "crashes_max": (1, 1000),
    "crash_window_s": (1, 86_400),
    "restart_backoff_s": (0.001, 60),
    "restart_backoff_max_s": (0.001, 600),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One engine: a model and how much of the box it may have.

    ``context_tokens`` bounds each sequence, ``slots`` how many run together; KV memory is their product
    times the model's bytes a token. ``prefill_tokens`` bounds a step in which nothing decodes,
    ``mixed_tokens`` one in which something does, ``draft_tokens_max`` what is guessed for a sequence that is
    alone (see core.batching). ``chat_template`` overrides the
    model's own; ``system_prompt`` is put before conversations that have none.

    ``measured`` names those of MEASURABLE that are chosen by measuring at a model's first start on a box, up
    to the values given here (``mixed_tokens`` up to ``prefill_tokens``); the result is kept in
    ``measured_file``. Everything else is promised or asked for, and never measured.

    ``n_gpu_layers`` of the model go to graphics cards, in the shares of ``tensor_split`` or all to
    ``main_gpu``, where the library was built for that.

    ``flash_attention`` is what is fastest on every CPU that was tried; without it, values stay f16 where
    ``kv_type`` q8_0 halves what the cache takes, for llama.cpp has no other way to read quantised ones.

    ``adapters`` are LoRA files, applied together to whatever answers; embeddings are the base model's.

    ``state_bytes_max`` bounds the states of sequences that are kept for later: of those that were preempted,
    of retired ones, of those that came from another engine (0: none). They are files in ``state_folder``,
    where a restarted engine finds them again, or in memory where that is empty.

    Over ``stream_tokens_max`` unread tokens a stream is paused; paused for ``slow_reader_timeout_s``, it
    is ended. ``watchdog_s`` without a finished step while there is work means a stuck process.
    ``crashes_max`` crashes within ``crash_window_s``, with no generation completed between, and the
    engine is given up.
    """

    model_path: str
    model_name: str = ""
    context_tokens: int = 2048
    slots: int = 4
    threads: int = 1
    prefill_tokens: int = PREFILL_TOKENS
    mixed_tokens: int = MIXED_TOKENS
    draft_tokens_max: int = 15
    queue_max: int = 64
    ageing_s: float = 10.0
    chat_template: str = ""
    system_prompt: str = ""
    measured: tuple[str, ...] = ()
    measured_file: str = ""
    n_gpu_layers: int = 0
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()
    flash_attention: bool = True
    kv_type: str = "f16"
    adapters: tuple[Adapter, ...] = ()
    reuse_prefixes: bool = True
    state_bytes_max: int = 0
    state_folder: str = ""
    watchdog_s: float = 60.0
    load_timeout_s: float = 120.0
    stream_tokens_max: int = 256
    slow_reader_timeout_s: float = 30.0
    crashes_max: int = 5
    crash_window_s: float = 60.0
    restart_backoff_s: float = 0.1
    restart_backoff_max_s: float = 10.0

    def validate(self) -> None:
        """Raise ConfigError for the first setting that is out of bounds or at odds with another."""
        if not self.model_path:
            raise ConfigError("model_path is empty; it must be the path of a GGUF file", field="model_path")
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, not {value}", field=name)
        if self.kv_type not in KV_TYPES:
            raise ConfigError(
                f"kv_type must be one of {', '.join(KV_TYPES)}, not {self.kv_type!r}", field="kv_type"
            )
        if unknown := set(self.measured) - set(MEASURABLE):
            raise ConfigError(
                f"measured must name some of {', '.join(MEASURABLE)}, not {', '.join(sorted(unknown))}",
                field="measured",
            )
        shares = self.tensor_split
        if (
            len(shares) > GPUS_MAX
            or not all(0 <= share <= 1000 for share in shares)
            or (shares and not any(shares))
        ):
            raise ConfigError(
                f"tensor_split takes at most {GPUS_MAX} shares from 0 to 1000, not all of them 0",
                field="tensor_split",
            )
        self.batcher_config().validate()

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of all that is loaded."""
        return self.model_path, *(adapter.path for adapter in self.adapters)

    @property
    def kv_types(self) -> tuple[str, str]:
        """Types of the cache's keys and values."""
        return self.kv_type, self.kv_type if self.flash_attention else "f16"

    @property
    def step_tokens_max(self) -> int:
        """Tokens of the largest step."""
        return max(self.prefill_tokens, self.mixed_tokens)

    @property
    def parked_tokens(self) -> int:
        """What may stay in memory of answers whose place in the cache is needed: an eighth of the cache."""
        return self.slots * self.context_tokens // 8 if self.reuse_prefixes else 0

    def batcher_config(self) -> BatcherConfig:
        """The scheduler's share of these settings."""
        return BatcherConfig(
            slots=self.slots,
            context_tokens=self.context_tokens,
            cells_total=self.slots * self.context_tokens,
            prefill_tokens=self.prefill_tokens,
            mixed_tokens=self.mixed_tokens,
            draft_tokens_max=self.draft_tokens_max,
            queue_max=self.queue_max,
            ageing_s=self.ageing_s,
            reuse_prefixes=self.reuse_prefixes,
            parked_cells=self.parked_tokens,
        )
