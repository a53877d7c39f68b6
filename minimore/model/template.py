"""Chat templates: a conversation as the text that a checkpoint was trained on.

A template is a program in jinja2 that comes with the checkpoint. It runs in a sandbox, which bounds
what it may compute (sandbox.py).
"""

import functools
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser

from ..files import one_line
from ..options import InputError
from .bounds import LARGEST
from .sandbox import Sandbox, bounded, watched

PLAIN_ROLES = {
    "user": "Human",
    "human": "Human",
    "prompter": "Human",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "system": "System",
}

# `render_plainly` as a template, for whoever else opens a model that was trained without one.
PLAIN_TEMPLATE = (
    f"{{%- set names = {json.dumps(PLAIN_ROLES)} -%}}"
    "{%- for message in messages -%}"
    r"{{- '\n\n' + names.get(message['role'], message['role']) + ': ' + message['content'] -}}"
    "{%- endfor -%}"
    r"{%- if add_generation_prompt -%}{{- '\n\nAssistant:' -}}{%- endif -%}"
)
LONGEST_TEMPLATE = 200_000  # characters; those of known models have at most some 30,000
Message = dict[str, str]  # "role" and "content"


def template_text(
    directory: Path, files: Mapping[str, bytes], config: Mapping[str, Any]
) -> str | None:
    """The chat template, from chat_template.jinja or tokenizer_config.json; None if there is none.

    Of several named ones it is the default. files: name -> bytes, those of the directory that are
    there.
    """
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{directory / 'chat_template.jinja'}: not UTF-8 ({one_line(error)})"
            ) from None
    template = config.get("chat_template")
    if isinstance(template, list):
        defaults = [
            entry.get("template")
            for entry in template
            if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        template = defaults[0] if defaults else None
    return template if isinstance(template, str) else None


def render_plainly(messages: list[Message], prompt: bool = False) -> str:
    """A conversation without a template.

    >>> render_plainly([{"role": "user", "content": "Hi"}], prompt=True)
    '\\n\\nHuman: Hi\\n\\nAssistant:'
    """
    turns = [
        f"\n\n{PLAIN_ROLES.get(message['role'], message['role'])}: {message['content']}"
        for message in messages
    ]
    return "".join(turns) + ("\n\nAssistant:" if prompt else "")


class ChatTemplate:
    """A chat template, compiled when it is first used. special: the names that it may write."""

    def __init__(self, directory: Path, text: str, special: Mapping[str, str]):
        self.directory, self.text, self.special = directory, text, special

    def render(self, messages: list[Message], prompt: bool = False) -> str:
        """The conversation as text; with prompt, it ends where the assistant's next turn begins.

        Raises InputError if the template refuses the messages.
        """
        names: dict[str, Any] = {"tools": None, "documents": None, **self.special}
        try:
            with watched():
                pieces, written = [], 0
                for piece in self._compiled.generate(
                    messages=messages, add_generation_prompt=prompt, **names
                ):
                    pieces.append(piece)
                    written += len(piece)
                    if written > LARGEST:
                        raise ValueError(f"it writes more than {LARGEST:,} characters")
                return "".join(pieces)
        except Exception as error:  # whatever a template's own code runs into
            raise InputError(
                f"{self.directory}: the chat template refuses these messages ({one_line(error)})"
            ) from None

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        if len(self.text) > LONGEST_TEMPLATE:
            raise ValueError(f"it is longer than {LONGEST_TEMPLATE:,} characters")
        if "strftime_now" in self.text or "date_string" in self.text:
            print(
                f"{self.directory}: the chat template may write a date,"
                " so rewards may change from day to day",
                file=sys.stderr,
            )
        environment = Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        environment.filters["tojson"] = bounded("tojson", to_json)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        return environment.from_string(self.text)


# ---- what templates expect to find ---------------------------------------------------------------


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark what a model wrote: here its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """The content of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson as transformers has it, which escapes nothing for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: str) -> NoReturn:
    """How a template refuses a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    """The time in the form that a template asks for."""
    return datetime.now().strftime(form)
