"""Goal: templates render as their models expect and can do no harm. Method: examples, hostile ones too."""

from __future__ import annotations

import pytest

from fieldmesh.core.errors import ConfigError, InvalidRequest
from fieldmesh.core.model import Message, Tool, ToolCall
from fieldmesh.engine.chat import ChatTemplate

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"  # noqa: E501
USER = Message(role="user", content="hi")


def render(source: str, *messages: Message, system_prompt: str = "") -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>").render(
        messages or (USER,), system_prompt=system_prompt
    )


def test_messages_render_with_the_start_of_the_answer() -> None:
    assert render(TEMPLATE) == "<s>[user]hi[assistant]"


def test_the_profiles_system_prompt_is_put_first_where_there_is_none() -> None:
    assert render(TEMPLATE, system_prompt="be kind") == "<s>[system]be kind[user]hi[assistant]"


def test_a_conversation_with_its_own_system_prompt_keeps_it() -> None:
    own = Message(role="system", content="own")
    assert render(TEMPLATE, own, USER, system_prompt="be kind") == "<s>[system]own[user]hi[assistant]"


def test_a_template_that_is_no_jinja_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        render("{% for %}")


def test_a_refusal_by_the_template_is_the_callers_error() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_hostile_or_broken_template_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        render(source)


def test_tags_and_filters_that_real_templates_use_are_there() -> None:
    source = (
        "{% generation %}{{ messages[0] | tojson }}{% endgeneration %}"
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    assert render(source) == '{"role": "user", "content": "hi"}4'


@pytest.mark.parametrize(
    ("thinking", "rendered"), [(None, "<think>"), (True, "<think>"), (False, "</think>")]
)
def test_the_reasoning_is_switched_in_the_template(thinking: bool | None, rendered: str) -> None:
    source = "{% if enable_thinking is defined and not enable_thinking %}</think>{% else %}<think>{% endif %}"
    assert ChatTemplate(source, bos="", eos="").render((USER,), thinking=thinking) == rendered


def test_a_model_without_a_thinking_mode_says_so() -> None:
    plain = ChatTemplate(TEMPLATE, bos="", eos="")
    assert plain.render((USER,), thinking=False) == plain.render((USER,))
    with pytest.raises(InvalidRequest) as caught:
        plain.render((USER,), thinking=True)
    assert caught.value.field == "enable_thinking"


WEATHER = Tool(
    name="weather", description="Tells it.", parameters='{"type": "object", "properties": {"city": {}}}'
)
CALL = ToolCall(id="c1", name="weather", arguments='{"city": "Rome"}')
ROUND = (
    USER,
    Message(role="assistant", content="", tool_calls=(CALL,)),
    Message(role="tool", content="sun", tool_call_id="c1"),
)


def test_a_template_that_knows_tools_is_given_them_and_their_calls() -> None:
    source = (
        "{% for t in tools %}{{ t.function.name }}: {{ t | tojson }}{% endfor %}{% for m in messages %}"
        "[{{ m.role }}]{{ m.content }}{{ m.tool_call_id }}{% for c in m.tool_calls %}"
        "{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    )
    told = ChatTemplate(source, bos="", eos="").render(ROUND, tools=(WEATHER,))
    assert told == (
        'weather: {"type": "function", "function": {"name": "weather", "description": "Tells it.", '
        '"parameters": {"type": "object", "properties": {"city": {}}}}}'
        "[user]hi[assistant]weather(Rome)[tool]sunc1"
    )


def test_a_template_that_knows_no_tools_is_told_of_them_in_words() -> None:
    template = ChatTemplate(TEMPLATE, bos="", eos="")
    told = template.render(ROUND, system_prompt="be kind", tools=(WEATHER,))
    assert told.startswith("[system]be kind\n\nYou may call functions")
    assert '"description": "Tells it."' in told
    assert told.endswith(
        '[user]hi[assistant]<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "[user]<tool_response>\nsun\n</tool_response>[assistant]"
    )
    assert template.render((USER,), tools=(WEATHER,)).startswith("[system]You may call functions")
    assert template.render(ROUND).startswith("[user]hi")


@pytest.mark.parametrize("parameters", ['{"a": ' + "1" * 5000 + "}", '{"a":' * 90_000 + "1" + "}" * 90_000])
def test_a_schema_that_cannot_be_read_is_refused(parameters: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        ChatTemplate(TEMPLATE, bos="", eos="").render((USER,), tools=(Tool(name="f", parameters=parameters),))
