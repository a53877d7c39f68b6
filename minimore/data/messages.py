"""Messages: conversations as data files hold them, checked, and in one form.

A message is one of

    {"role": "user", "content": "Hi"}
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    {"from": "human", "value": "Hi"}

and a conversation is a list of them. A single message is a conversation, too, and a string stands
for one message.
"""

from typing import Any

from ..model.template import Message
from ..model.tokenizer import Tokenizer
from ..options import InputError, require
from .values import shown, string_of, value_of

Messages = list[Message]


class PlainTurns(Tokenizer):
    """Stands in the place of a tokenizer where no model reads: messages become plain turns.

    That is how a checkpoint without a chat template writes them, too. It has no files.
    """

    template = None

    def __init__(self) -> None:
        pass


PLAIN_TURNS = PlainTurns()

# The roles of the form with "from", by the names that templates know.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def is_conversation(value: Any) -> bool:
    """Whether a value is meant as messages."""
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    )


def begins_with_system(conversation: Any) -> bool:
    """Whether a conversation has a system message in front."""
    return is_conversation(conversation) and _first_role(conversation) == "system"


def _first_role(conversation: Any) -> Any:
    """Who speaks first in a conversation, under the name that the file has for the role."""
    first = conversation if isinstance(conversation, dict) else conversation[0]
    return first.get("role", first.get("from"))


def is_response(conversation: Any) -> bool:
    """Whether a conversation begins with what the model says."""
    return _first_role(conversation) in ("assistant", "gpt", "chatgpt", "bot", "model")


def messages_of(value: Any, where: str, tokenizer: Tokenizer | None, role: str) -> Messages:
    """A conversation as {"role", "content"}, checked; a string is one message of the given role.

    Where a chat template will render it, a content that holds one of its markers is refused: it
    could end its own turn. tokenizer: whose template that is; None where no model reads them.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not is_conversation(value):
        raise InputError(
            f"{where} is {shown(value)}; expected a string, or messages with role and content"
        )
    messages = [value] if isinstance(value, dict) else value
    return [_message(message, f"{where}[{i}]", tokenizer) for i, message in enumerate(messages)]


def _message(message: Any, where: str, tokenizer: Tokenizer | None) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{where} is {shown(message)}; expected a message with role and content")
    if "from" in message and "role" not in message:
        role = string_of(message["from"], f'{where}: "from"')
        content = message.get("value", message.get("content"))
        message = {"role": ROLES.get(role, role), "content": content}
    for key in ("role", "content"):
        value_of(message, key, where)
    role = string_of(message["role"], f'{where}: "role"')
    checked = {"role": role, "content": _content(message, where)}
    if tokenizer is not None and tokenizer.template:
        for key, text in checked.items():
            for marker in tokenizer.markers:
                require(
                    marker not in text,
                    f"{where}: the {key} holds {marker!r}, a marker of the chat template;"
                    " remove it",
                )
    return checked


def _content(message: dict[str, Any], where: str) -> str:
    """What a message says: a string, or the text of all its parts."""
    content = message["content"]
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        for part, text in zip(content, parts):
            if text is None:
                raise InputError(
                    f'{where}: "content" holds {shown(part)}; expected parts of type "text" only'
                )
        content = "".join(string_of(text, f'{where}: "text"') for text in parts)
    if content is None and message.get("tool_calls"):
        raise InputError(
            f"{where}: calls tools instead of saying something; such messages are not read"
        )
    return string_of(content, f'{where}: "content"')
