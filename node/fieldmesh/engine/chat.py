"""Conversations as text, by the model's own chat template.

Owns: rendering in a sandbox, the profile's system prompt, telling a model of tools whose template cannot,
errors that say what to do. Must not: tokenise.
A template comes with the model, so it is foreign code: it runs without access to Python's objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fieldmesh.core.errors import ConfigError, InvalidRequest
from fieldmesh.core.model import Message, Tool
from fieldmesh.core.reasoning import CLOSE
from fieldmesh.core.tools import CLOSE as CALL_CLOSE
from fieldmesh.core.tools import OPEN as CALL_OPEN

# What models are told whose template says nothing of tools: the words that most others were trained on.
_TOLD = """You may call functions to help with the question. These are their signatures:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as a JSON object between marks, and nothing else:
{open}
{{"name": <name>, "arguments": <arguments>}}
{close}"""


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
            read = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"the chat template is not valid Jinja: {error}; correct it or remove the override",
                field="chat_template",
            ) from error
        self._bos, self._eos = bos, eos
        self.thinks = CLOSE in source
        self._knows_tools = "tools" in read

    def render(
        self,
        messages: Sequence[Message],
        *,
        system_prompt: str = "",
        thinking: bool | None = None,
        tools: Sequence[Tool] = (),
    ) -> str:
        """The text that the assistant goes on from. Raises InvalidRequest where the template refuses.

        ``thinking`` switches the reasoning of a model that has such a mode; None leaves it to the template.
        """
        if thinking and not self.thinks:
            raise InvalidRequest("this model has no thinking mode: leave it out", field="enable_thinking")
        switch = {} if thinking is None else {"enable_thinking": thinking}
        try:
            turns = [_turn(m) if self._knows_tools else _plain_turn(m) for m in messages]
            if system_prompt and all(m.role != "system" for m in messages):
                turns.insert(0, {"role": "system", "content": system_prompt})
            offered = [_described(tool) for tool in tools]
            if offered and not self._knows_tools:
                _tell(turns, offered)
            return self._template.render(
                messages=turns,
                bos_token=self._bos,
                eos_token=self._eos,
                add_generation_prompt=True,
                raise_exception=_raise_exception,
                strftime_now=lambda form: datetime.now().strftime(form),
                tools=offered or None,
                **switch,
            )
        except (
            *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError),
        ) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error


def _turn(message: Message) -> dict[str, Any]:
    """A turn as templates that know tools read it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _plain_turn(message: Message) -> dict[str, Any]:
    """A turn for templates that know nothing of tools: calls as they are written, results as a user's."""
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    calls = [
        f'{CALL_OPEN}\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n{CALL_CLOSE}'
        for call in message.tool_calls
    ]
    content = [message.content] if message.content or not calls else []
    return {"role": message.role, "content": "\n".join([*content, *calls])}


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as templates read it."""
    parameters = json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _tell(turns: list[dict[str, Any]], offered: Sequence[dict[str, Any]]) -> None:
    """Name the tools in the system's turn, which is made where there is none."""
    tools = "\n".join(_tojson(tool) for tool in offered)
    told = _TOLD.format(tools=tools, open=CALL_OPEN, close=CALL_CLOSE)
    if turns[0]["role"] == "system":
        turns[0]["content"] += f"\n\n{told}"
    else:
        turns.insert(0, {"role": "system", "content": told})


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
