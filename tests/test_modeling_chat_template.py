"""Chat templates: the library's text for sound ones, and an end in seconds for all others."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from subspec_cli.errors import PromptRefusedError, ResourceError
from subspec_cli.modeling import chat_template
from subspec_cli.modeling.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("This model only supports single tool-calls at once!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"""
QWEN_3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + ('' if loop.index0 > ns.last_query_index else '!') }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GENERATION = """{% macro said(text) %}[{{ text }}]{% endmacro %}
{% for message in messages %}
  {% if message.role == 'system' %}{% continue %}{% endif %}
  {% if message.role == 'assistant' %}
    {% generation %}{% set text = message.content %}{{ said(text) }}{{ eos_token }}{% endgeneration %}
  {% else %}{{ message.content }}{% endif %}
  {% if loop.index > 8 %}{% break %}{% endif %}
{% endfor %}
{{ text is defined }}"""
DATA = """{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}
{{ dict(a=1, **{'b': '<é>'}) | tojson(ensure_ascii=true) }}{{ dict.fromkeys(['x'], 2) }}
{{ tools }}{{ documents }}{{ additional_special_tokens }}{{ "<b>" }}"""
SOUND = {
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "qwen 3": QWEN_3,
    "generation": GENERATION,
    "data": DATA,
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<a>", "<b>"]}
USER = [{"role": "user", "content": "  Naïve 🙂 <tool_response> \n"}]
TURNS = [
    *USER,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes, <|im_end|>"},
    {"role": "user", "content": "\ud800 and 'quotes' \"too\""},
]
SYSTEM = [{"role": "system", "content": " Be brief. "}, *TURNS]


def by_the_library(template: str, messages: list[dict[str, str]]) -> str:
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **VARIABLES
    )
    return texts[0]


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_template_gives_the_librarys_text(name: str) -> None:
    template = ChatTemplate(SOUND[name], VARIABLES)
    for messages in (USER, TURNS, SYSTEM):
        if name == "mistral" and messages is SYSTEM:
            continue
        day = datetime.now().day
        expected = by_the_library(SOUND[name], messages)
        if datetime.now().day == day:
            assert template.render(messages) == expected


def test_the_reason_of_a_refusal_is_the_templates_own() -> None:
    with pytest.raises(
        PromptRefusedError, match=r"refuses this conversation: Conversation roles must alt"
    ) as caught:
        ChatTemplate(MISTRAL, VARIABLES).render(SYSTEM)
    assert "--raw" in caught.value.hint


BROKEN = {
    "{% if %}": "is broken: line 1: Expected an expression",
    "\n{{ messages": "is broken: line 2: unexpected end of template",
    "{{ nobody.content }}": "is broken: 'nobody' is undefined",
    "{{ messages | shout }}": "is broken: line 1: No filter named 'shout'",
    "{{ 1 + messages[0].content }}": "is broken: unsupported operand type",
    "{{ ''.__class__.__mro__ }}": "is broken: access to attribute '__class__'",
    "{{ namespace(_x=1) }}": "is broken: a namespace has no name '_x'",
    "{{ range(10 ** 9) }}": "is broken: Range too big",
    "{{ " + "(" * 20_000: "is broken: ",
    "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000: "is broken: ",
    "": "gives an empty text",
    "{% if false %}{{ messages }}{% endif %}\n": "gives an empty text",
    "{{ raise_exception() }}": "is broken: ",
    "{{ raise_exception('\x1b[2J') }}": r"refuses this conversation: \\x1b",
}


@pytest.mark.parametrize("template", BROKEN, ids=lambda text: repr(text[:20]))
def test_a_template_that_cannot_be_used_says_why(template: str) -> None:
    with pytest.raises(PromptRefusedError, match=f"^the chat template {BROKEN[template]}") as caught:
        ChatTemplate(template, {}).render(USER)
    assert "--raw" in caught.value.hint


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 99999999 }}",
    "{{ ([[0]] * 1000000) | sum(start=[]) }}",
)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_takes_too_long_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a native loop too, where no signal is looked at."""
    monkeypatch.setattr(chat_template, "_MOST_CPU_S", 1)
    with pytest.raises(PromptRefusedError, match="takes too long: more than 1 s"):
        ChatTemplate(template, {}).render(USER)


def test_the_clock_on_the_wall_ends_what_takes_no_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MOST_WALL_S", 0.5)
    with pytest.raises(PromptRefusedError, match="takes too long"):
        ChatTemplate(ENDLESS[0], {}).render(USER)


HUGE = (
    "{{ ('a' * 3000000000) | length }}",
    "{{ ([0] * 200000000) | length }}",
    "{{ 'a' * 300000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a' | center(3000000000) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
)


@pytest.mark.parametrize("template", HUGE)
def test_a_template_that_takes_too_much_memory_is_stopped(template: str) -> None:
    with pytest.raises(PromptRefusedError, match=r"takes too much memory: more than 128\.0 MiB"):
        ChatTemplate(template, {}).render(USER)


@pytest.mark.parametrize("template", ["{{ 'a' * 17000000 }}", "{{ 'é' * 9000000 }}"])
def test_a_text_that_no_pipe_could_bring_is_refused(template: str) -> None:
    with pytest.raises(PromptRefusedError, match=r"gives a text of more than 16\.0 MiB"):
        ChatTemplate(template, {}).render(USER)


def test_a_long_prompt_is_rendered_whole() -> None:
    said = "🙂" + "long " * 3_000_000
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": said}]) == said


def test_one_process_renders_all_conversations_and_is_replaced_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Counted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **how: Any) -> None:
            started.append(self)
            super().__init__(*args, **how)

    monkeypatch.setattr(subprocess, "Popen", Counted)
    template = ChatTemplate(
        "{% if messages[0].content == 'big' %}{{ 'a' * 10 ** 10 }}{% endif %}{{ messages }}", {}
    )
    assert not started, "it starts with the first conversation"
    expected = template.render(USER)
    with pytest.raises(PromptRefusedError, match="memory"):
        template.render([{"role": "user", "content": "big"}])
    assert template.render(USER) == expected
    assert len(started) == 1
    os.kill(started[0].pid, signal.SIGINT)  # Ctrl-C in the terminal reaches it too
    assert template.render(USER) == expected
    assert len(started) == 1
    started[0].kill()
    started[0].wait()
    assert template.render(USER) == expected
    assert len(started) == 2
    del template
    gc.collect()
    assert started[1].poll() is not None, "it ends with its template"


def test_a_system_without_room_for_a_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **how: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(ResourceError, match="gets no process: Resource temporarily unavailable") as caught:
        ChatTemplate("{{ messages }}", {}).render(USER)
    assert "--raw" in caught.value.hint
