"""A chat template may not fill the memory, run for ever, or roll dice; every other one works."""

import time
from pathlib import Path

import pytest

from minimore.model import sandbox
from minimore.model.template import PLAIN_TEMPLATE, ChatTemplate, render_plainly
from minimore.options import InputError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi 'there'\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "tool", "content": "é"},
]

BOMBS = [
    "{{ 10**1000000000 }}",
    "{{ 10**1000**1000 }}",
    "{{ 'a' * 2 * 10**9 }}",
    "{{ [1] * 10**9 }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('b' * 10**6).join(['a'] * 10**6) }}",
    "{%- set n = namespace(s='ab') -%}"
    "{%- for i in range(60) -%}{%- set n.s = n.s ~ n.s -%}{%- endfor -%}{{ n.s }}",
    "{%- set n = namespace(s='ab') -%}"
    "{%- for i in range(60) -%}{%- set n.s = n.s + n.s -%}{%- endfor -%}{{ n.s }}",
    "{%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}",
    "{%- set n = namespace(n=9) -%}"
    "{%- for i in range(60) -%}{%- set n.n = n.n * n.n -%}{%- endfor -%}{{ n.n }}",
    "{{ lipsum(1000) }}",
    "{{ messages|random }}",
]


@pytest.mark.parametrize("text", BOMBS)
def test_bombs_and_dice_are_refused(text, monkeypatch):
    monkeypatch.setattr(sandbox.within_seconds.__wrapped__, "__defaults__", (0.5,))
    began = time.monotonic()
    with pytest.raises(InputError, match="chat template refuses these messages") as error:
        ChatTemplate(Path("x"), text, {}).render(MESSAGES)
    assert time.monotonic() - began < 5 and str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{{ 20000000 + 1 }}{{ 20000000 * 3 }}", "2000000160000000"),
        ("{{ 1735689600|string }}{{ 'v%d'|format(20241231) }}", "1735689600v20241231"),
        ("{{ '<|id_20241231|>%s' % 'a' }}", "<|id_20241231|>a"),
        ("{{ ('a' * 200000).replace('a' * 5000, '')|length }}", "0"),
        ("{{ ('SYSTEM' ~ ' ' * 80).replace('SYSTEM', 'b' * 200000)|length }}", "200080"),
        ("{{ (['ab'] * 100000)|join(', ' * 17)|length }}", "3599966"),
        ("{{ ['b', 'a']|sort|join }}{{ [1, 2]|sum }}", "ab3"),
    ],
)
def test_large_values_are_no_bombs(text, expected):
    assert ChatTemplate(Path("x"), text, {}).render(MESSAGES) == expected


def test_what_templates_do_still_works():
    text = (
        "{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>' + m['content'] | trim }}"
        "{{- '%s' % m.role }}{{ m.content.replace('e', 'a') }}{{ '-' * 3 }}{{ 2**3 }}"
        "{{- [m.role, 'x'] | join(', ') }}{{ '{} {}'.format(1, 'b') }}{{ m.content | length * 2 }}"
        "{%- endfor -%}"
    )
    rendered = ChatTemplate(Path("x"), text, {}).render(MESSAGES[2:3])
    assert rendered == "<|assistant|>HelloassistantHallo---8assistant, x1 b10"


@pytest.mark.parametrize("prompt", [False, True])
def test_the_plain_template_writes_what_is_written_plainly(prompt):
    rendered = ChatTemplate(Path("x"), PLAIN_TEMPLATE, {}).render(MESSAGES, prompt)
    assert rendered == render_plainly(MESSAGES, prompt)


@pytest.mark.parametrize(
    "text",
    [
        "{{ 2 ** ('x' * 1000) }}",
        "{%- set x = 'a' * 9999999 -%}{% for i in range(1000) %}{{ x }}{% endfor %}",
        "{{ range(1000)|map('string')|map('center', 9999999)|join }}",
        "{{ ('a\n' * 100000)|indent(1000000) }}",
        "{{ ('{0}' * 1000).format('a' * 9999999) }}",
        "{{ '{:>20000000}'.format('x') }}",
        "{{ ('{0}' * 4000).format('x' * 4000) }}",
        "{{ '%*d' % (20000000, 1) }}",
        "{{ ('%(a)s' * 4000) % {'a': 'x' * 4000} }}",
        "{{ ('\t' * 9000).expandtabs(9000) }}",
        "{{ [1, 2]|tojson(indent=20000000) }}",
        "{{ ([1] * 9000)|tojson(indent=9000) }}",
        "{{ ([['a'] * 2500] * 2500)|sum(start=[]) }}",
    ],
)
def test_what_got_through_once_does_not_any_more(text):
    began = time.monotonic()
    with pytest.raises(InputError, match="chat template refuses these messages"):
        ChatTemplate(Path("x"), text, {}).render(MESSAGES)
    assert time.monotonic() - began < 2
