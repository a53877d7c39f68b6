"""A chat template may not fill the memory, run for ever, or roll dice; every other one works."""

import os
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
    "{%- macro m(n) -%}{{ m(n - 1) ~ m(n - 1) if n else 'a' }}{%- endmacro -%}{{ m(60) }}",
    "{{ lipsum(1000) }}",
    "{{ messages|random }}",
]


@pytest.mark.parametrize("text", BOMBS)
def test_bombs_and_dice_are_refused(text, monkeypatch):
    monkeypatch.setattr(sandbox.watched.__wrapped__, "__defaults__", (0.5, sandbox.MEMORY))
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


def doubled(start, step):
    """A template that makes n.x of two of itself, sixty times over, and n.y alike."""
    both = "".join("{%- set n.@ = STEP -%}".replace("STEP", step).replace("@", k) for k in "xy")
    return (
        f"{{%- set n = namespace(x={start}, y={start}) -%}}"
        f"{{%- for i in range(60) -%}}{both}{{%- endfor -%}}"
    )


NESTED = {
    "lists": doubled("1", "[n.@, n.@]"),
    "tuples": doubled("1", "(n.@, n.@)"),
    "dictionaries": doubled("1", "{'a': n.@, 'b': n.@}"),
    "keys": doubled("1", "(n.@, n.@)") + "{{ {n.x: 1} }}",
    "made by a call": doubled("1", "dict(a=n.@, b=n.@)"),
    "made by a filter": doubled("1", "[n.@]|list + [n.@]|list"),
    "rows of a filter": doubled("[1]", "([n.@]|batch(2, n.@))|first"),
    "views": doubled("{1: 1}", "{1: n.@.items(), 2: n.@.items()}"),
    "a tuple of names": "{%- set n = namespace(x=1) -%}"
    "{%- for i in range(60) -%}{%- set a, b = n.x, n.x -%}{%- set n.x = a, b -%}{%- endfor -%}",
    "arguments of a macro": "{%- macro f(n) -%}{%- if n -%}{{ f(n - 1, varargs, varargs) }}"
    "{%- else -%}{{ varargs == varargs|list }}{%- endif -%}{%- endmacro -%}{{ f(60, 1) }}",
    "named arguments of a macro": "{%- macro f(n) -%}{%- if n -%}{{ f(n - 1, a=kwargs, b=kwargs) }}"
    "{%- else -%}{{ kwargs }}{%- endif -%}{%- endmacro -%}{{ f(60, a=1) }}",
    "deeply": "{%- set n = namespace(x=1) -%}"
    "{%- for i in range(99999) -%}{%- set n.x = (n.x,) -%}{%- endfor -%}{{ {n.x: 1} }}",
    "texts": "{%- set n = namespace(x=0) -%}{%- for i in range(500) -%}"
    "{%- set n.x = [n.x, 'a' * 9000000 ~ i] -%}{%- endfor -%}",
}
USES = (
    *("{{ n.x == n.y }}", "{{ n.x in [n.y] }}", "{{ n.x < n.y }}", "{{ n.x }}", "{{ n.x ~ '' }}"),
    *("{{ n.x|tojson }}", "{{ [n.x, n.y]|sort }}", "{{ [n.x, n.y]|unique|list }}"),
    *("{{ [{'a': n.x}, {'a': n.y}]|groupby('a') }}", "{{ [n.x]|join }}", "{{ n.x|pprint }}"),
    *(
        "{{ '%s' % n.x }}",
        "{{ '{}'.format(n.x) }}",
        "{{ n.x is eq n.y }}",
        "{{ [n.x].count(n.y) }}",
    ),
    *("{{ [n.x]|map('string')|list }}", "{{ [n.x, n.y]|max }}", "{{ n.x|string|length }}"),
)


def refused_at_once(text):
    began = time.monotonic()
    with pytest.raises(InputError, match="chat template refuses these messages"):
        ChatTemplate(Path("x"), text, {}).render(MESSAGES)
    assert time.monotonic() - began < sandbox.SECONDS


@pytest.mark.parametrize("name", NESTED)
def test_what_would_be_endless_if_it_were_written_out_is_refused(name):
    """C compares, prints, joins and hashes it without a pause in which a clock could stop it."""
    refused_at_once(NESTED[name])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["lists", "tuples", "dictionaries"])
def test_no_use_of_a_nested_value_hangs(name, use):
    refused_at_once(NESTED[name] + use)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "{{ ('a' * 10000000).rfind('ab' ~ 'a' * 5000000) }}",
        "{{ ('a' * 9999999).rsplit('ab' ~ 'a' * 5000000) }}",
        "{{ ('a' * 10000000).strip('b' * 9999999 ~ 'a') }}",
        "{{ ('a' * 9999999)|trim('b' * 9999999 ~ 'a') }}",
        "{{ 1.5|round(100000000, 'floor') }}",
        "{{ ('f' * 9999999)|int(base=16) // 3 }}",
        "{%- set n = namespace(x=9) -%}{%- for i in range(99999) -%}{%- set n.x = n.x + n.x -%}"
        "{%- endfor -%}{{ n.x // (n.x - 1) }}",
        "{{ ('a' * 100000).translate({97: 'b' * 10000}) }}",
        "{{ ('b' * 10000).encode().replace('b'.encode(), ('b' * 100000).encode()) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ '{:{}}'.format('x', 300000000) }}",
        "{{ '{:>{w}}'.format('x', w=300000000) }}",
        "{{ range(10000)|join('b' * 100000) }}",
        "{{ range(10000)|map('string')|join('b' * 100000) }}",
        "{{ ('b' * 100000).join(range(10000)|map('string')) }}",
        "{{ ('a' * 99999)|replace(new='b' * 99999, old='a') }}",
        "{%- set x -%}{%- for i in range(300) -%}{{ 'a' * 9000000 }}{%- endfor -%}{%- endset -%}",
        "{%- macro m() -%}{%- for i in range(300) -%}{{ 'a' * 9000000 }}{%- endfor -%}"
        "{%- endmacro -%}{{ m()|length }}",
        "{%- filter upper -%}{%- for i in range(300) -%}{{ 'a' * 9000000 }}{%- endfor -%}"
        "{%- endfilter -%}",
        "{%- block b -%}{%- for i in range(9) -%}{{ 'a' * 900000 }}{%- endfor -%}{%- endblock -%}"
        "{{ self.b() ~ self.b() }}",
        "{{ {}.fromkeys(range(20000)) }}",
        "{{ dict(range(60000)|batch(2)) }}",
        "{{ messages|tojson(indent=9000)|tojson(separators=('a' * 9999999, 'b')) }}",
        "{{ [1, 2]|tojson(separators=('a' * 99999999, 'b')) }}",
        "x" * 200_001,
    ],
)
def test_one_long_call_is_refused_before_it_begins(text):
    refused_at_once(text)


def resident_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_many_long_texts_take_no_more_than_their_share_of_memory(monkeypatch):
    # Linux brings its counter of the peak up to date now and then.
    assert sandbox.peak_memory() + 8e6 >= resident_memory()
    monkeypatch.setattr(sandbox, "peak_memory", resident_memory)  # earlier tests had their peaks
    monkeypatch.setattr(sandbox.watched.__wrapped__, "__defaults__", (60, 50e6))
    text = "".join(f"{{%- set a{i} = 'x' * 9000000 ~ {i} -%}}" for i in range(300))  # 2.7 GB
    with pytest.raises(InputError, match="more than 50 MB of memory"):
        ChatTemplate(Path("x"), text, {}).render(MESSAGES)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{% for a, b in [(1, 2), (3, 4)] %}{{ a * b }};{% endfor %}", "2;12;"),
        ("{% set a, b = 1, [2] %}{{ a }}{{ b }}{{ {'k': (a, b)} }}", "1[2]{'k': (1, [2])}"),
        ("{{ messages|map(attribute='role')|join(',') }}", "system,user,assistant,tool"),
        ("{{ 'true' if messages|selectattr('role', 'eq', 'x') else 'false' }}", "true"),
        ("{{ (messages|reverse|first).role }}{{ messages|groupby('role')|length }}", "tool4"),
        ("{% for m in messages %}{{ (loop|default(0)).index }}{% endfor %}", "1234"),
        ("{{ dict(messages[0], role='x').role }}{{ ([1] * 100000)|sum }}", "x100000"),
        ("{{ 'aXbX'.rstrip('X').strip() }}{{ ' a '|trim }}{{ 7 // 2 - 1 }}", "aXba2"),
        ("{% set x %}{{ 'a' * 9000000 }}{% endset %}{{ x|length }}", "9000000"),
        ("{{ ('a' * 4000000)|tojson|length }}{{ messages|tojson(indent=4)|length }}", None),
    ],
)
def test_bounds_change_nothing_that_is_small(text, expected):
    rendered = ChatTemplate(Path("x"), text, {}).render(MESSAGES)
    assert rendered == expected or (expected is None and rendered.startswith("4000002"))
