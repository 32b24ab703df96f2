"""Conversations as text, by the model's own chat template.

Owns: rendering in a sandbox, the profile's system prompt, errors that say what to do. Must not: tokenise.
A template comes with the model, so it is foreign code: it runs without access to Python's objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fieldmesh.core.errors import ConfigError, InvalidRequest
from fieldmesh.core.model import Message
from fieldmesh.core.reasoning import CLOSE


class _GenerationTags(jinja2.ext.Extension):
    """Hugging Face marks the assistant's part with {% generation %}; it renders as if it were not there."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template; ``thinks``: it knows a reasoning before the answer.

    Raises ConfigError where the template itself is not valid Jinja.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTags, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"the chat template is not valid Jinja: {error}; correct it or remove the override",
                field="chat_template",
            ) from error
        self._bos, self._eos = bos, eos
        self.thinks = CLOSE in source

    def render(
        self, messages: Sequence[Message], *, system_prompt: str = "", thinking: bool | None = None
    ) -> str:
        """The text that the assistant goes on from. Raises InvalidRequest where the template refuses.

        ``thinking`` switches the reasoning of a model that has such a mode; None leaves it to the template.
        """
        if thinking and not self.thinks:
            raise InvalidRequest("this model has no thinking mode: leave it out", field="enable_thinking")
        switch = {} if thinking is None else {"enable_thinking": thinking}
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if system_prompt and all(m.role != "system" for m in messages):
            turns.insert(0, {"role": "system", "content": system_prompt})
        try:
            return self._template.render(
                messages=turns,
                bos_token=self._bos,
                eos_token=self._eos,
                add_generation_prompt=True,
                raise_exception=_raise_exception,
                strftime_now=lambda form: datetime.now().strftime(form),
                tools=None,
                **switch,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
