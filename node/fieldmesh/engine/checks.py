"""Bounds of a job, with errors that name the field. Every engine, real or fake, checks before it works."""

from __future__ import annotations

import math

from fieldmesh.core.errors import ConstraintInvalid, InvalidRequest, PromptTooLong
from fieldmesh.core.model import Constraint, Prompt, Sampling
from fieldmesh.engine.port import Job

GENERATION_ID_CHARACTERS_MAX = 128
PROMPT_BYTES_MAX = 4 << 20
MESSAGES_MAX = 4096
TOKENS_MAX = 1 << 20
EMBED_TEXTS_MAX = 128
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
STOP_TOKEN_IDS_MAX = 64
CONSTRAINT_BYTES_MAX = 65_536
LOGPROBS_MAX = 20
LOGIT_BIAS_MAX = 300
LOGIT_BIAS_VALUE_MAX = 100.0
ROLES = ("system", "user", "assistant", "tool")

_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (0, 1 << 20),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "max_tokens": (1, TOKENS_MAX),
    "min_tokens": (0, TOKENS_MAX),
    "n": (1, 1),  # several completions are several jobs
}


def check_job(job: Job) -> None:
    """Raise InvalidRequest or PromptTooLong for the first field that is out of bounds."""
    if not 1 <= len(job.generation_id) <= GENERATION_ID_CHARACTERS_MAX:
        raise InvalidRequest(
            f"generation_id must have 1 to {GENERATION_ID_CHARACTERS_MAX} characters", field="generation_id"
        )
    check_prompt(job.prompt)
    check_sampling(job.sampling)
    if job.deadline_s is not None and not math.isfinite(job.deadline_s):
        raise InvalidRequest(
            f"deadline_s must be a number of seconds, not {job.deadline_s}", field="deadline_s"
        )
    if len(job.resume_token_ids) >= TOKENS_MAX:
        raise InvalidRequest(f"at most {TOKENS_MAX} tokens can be resumed", field="resume_token_ids")


def check_prompt(prompt: Prompt) -> None:
    """Raise InvalidRequest or PromptTooLong unless exactly one form is set and of a sane size."""
    forms = [prompt.text is not None, bool(prompt.token_ids), bool(prompt.messages)]
    if sum(forms) != 1:
        raise InvalidRequest("exactly one of text, token_ids and messages must be set", field="prompt")
    if prompt.text == "":
        raise InvalidRequest("text is empty; at least one character is needed", field="prompt.text")
    if len(prompt.messages) > MESSAGES_MAX:
        raise InvalidRequest(f"at most {MESSAGES_MAX} messages are accepted", field="messages")
    for index, message in enumerate(prompt.messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"role {message.role!r} is not one of {', '.join(ROLES)}", field=f"messages[{index}].role"
            )
    if not any(m.content.strip() or m.tool_calls for m in prompt.messages) and prompt.messages:
        raise InvalidRequest("all messages are empty; at least one needs content", field="messages")
    size = _utf8_bytes(prompt.text or "", "prompt") + 4 * len(prompt.token_ids)
    size += sum(_utf8_bytes(m.content, "prompt") for m in prompt.messages)
    size += sum(_utf8_bytes(c.arguments, "prompt") for m in prompt.messages for c in m.tool_calls)
    tools = prompt.tools.offered if prompt.tools else ()
    size += sum(_utf8_bytes(tool.description + tool.parameters, "tools") for tool in tools)
    if size > PROMPT_BYTES_MAX:
        raise PromptTooLong(
            f"the prompt has {size} bytes; at most {PROMPT_BYTES_MAX} are read", field="prompt"
        )


def check_texts(texts: tuple[str, ...]) -> None:
    """Raise InvalidRequest or PromptTooLong unless they can be embedded."""
    if not 1 <= len(texts) <= EMBED_TEXTS_MAX:
        raise InvalidRequest(
            f"inputs has {len(texts)} texts; accepted are 1 to {EMBED_TEXTS_MAX}", field="inputs"
        )
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"inputs[{index}] is empty", field=f"inputs[{index}]")
    size = sum(_utf8_bytes(text, "inputs") for text in texts)
    if size > PROMPT_BYTES_MAX:
        raise PromptTooLong(f"inputs have {size} bytes; at most {PROMPT_BYTES_MAX} are read", field="inputs")


def check_sampling(sampling: Sampling) -> None:
    """Raise InvalidRequest for the first parameter that is out of bounds."""
    for name, (low, high) in _BOUNDS.items():
        value = getattr(sampling, name)
        if not low <= value <= high:  # false for NaN too
            raise InvalidRequest(f"{name} must be between {low} and {high}, not {value}", field=name)
    if sampling.seed is not None and not 0 <= sampling.seed < 1 << 64:
        raise InvalidRequest("seed must be between 0 and 2**64 - 1", field="seed")
    sane = all(1 <= len(s) <= STOP_CHARACTERS_MAX and _utf8_bytes(s, "stop") for s in sampling.stop)
    if len(sampling.stop) > STOPS_MAX or not sane:
        raise InvalidRequest(
            f"stop takes at most {STOPS_MAX} strings of 1 to {STOP_CHARACTERS_MAX} characters", field="stop"
        )
    if len(sampling.stop_token_ids) > STOP_TOKEN_IDS_MAX:
        raise InvalidRequest(
            f"at most {STOP_TOKEN_IDS_MAX} stop_token_ids are accepted", field="stop_token_ids"
        )
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= LOGPROBS_MAX:
        raise InvalidRequest(
            f"logprobs must be between 0 and {LOGPROBS_MAX}, not {sampling.logprobs}", field="logprobs"
        )
    most = sampling.reasoning_tokens_max
    if most is not None and not 0 <= most <= TOKENS_MAX:
        raise InvalidRequest(
            f"reasoning_tokens_max must be between 0 and {TOKENS_MAX}, not {most}",
            field="reasoning_tokens_max",
        )
    biases = [value for _, value in sampling.logit_bias]
    if len(biases) > LOGIT_BIAS_MAX or not all(abs(value) <= LOGIT_BIAS_VALUE_MAX for value in biases):
        raise InvalidRequest(
            f"logit_bias takes at most {LOGIT_BIAS_MAX} values between -{LOGIT_BIAS_VALUE_MAX:g} and "
            f"{LOGIT_BIAS_VALUE_MAX:g}",
            field="logit_bias",
        )
    if sampling.constraint is not None:
        check_constraint(sampling.constraint, sampling)


def check_constraint(constraint: Constraint, sampling: Sampling) -> None:
    """Raise ConstraintInvalid or InvalidRequest for one that is too large, or that is to be overrun."""
    size = _utf8_bytes(constraint.source, constraint.field)
    if size > CONSTRAINT_BYTES_MAX:
        raise ConstraintInvalid(
            f"{constraint.field} has {size} bytes; at most {CONSTRAINT_BYTES_MAX} are accepted",
            field=constraint.field,
        )
    if sampling.ignore_eos:
        raise InvalidRequest(
            f"ignore_eos asks for text after the end of what {constraint.field} allows: set one of them",
            field="sampling_params.ignore_eos",
        )


def _utf8_bytes(text: str, field: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field} is not valid Unicode (it has a lone surrogate)", field=field) from None


def check_token_ids(token_ids: tuple[int, ...], vocabulary_tokens: int, field: str) -> None:
    """Raise InvalidRequest for a token id that the vocabulary does not have."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocabulary_tokens):
        raise InvalidRequest(
            f"token ids must be between 0 and {vocabulary_tokens - 1}, the size of the vocabulary",
            field=field,
        )
