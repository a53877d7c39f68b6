"""Trees: the conversations of OpenAssistant (OASST), whose messages have a rank among siblings.

    prompter  What is 2+2?
    ├── assistant  It is 4.   rank 0     ->  prompt = the thread down to here
    ├── assistant  Four.      rank 1         chosen = It is 4., rejected = Four.  (a lower rank is
    └── assistant  Dunno.     no rank        better); two comparisons are left out: no rank

They lie on disk as trees, one a line, or as flat messages that name their parent.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from ...model.template import Message, render_plainly
from ...options import require
from ..records import Record
from ..values import is_number, object_of, shown, string_of, text_at, value_of
from .comparisons import Item, LeftOut, Note, preferred

WRITTEN = ("marks", "messages")  # how a thread becomes a prompt
ROLES = {"prompter": "user", "assistant": "assistant"}


class TreeRules(NamedTuple):
    """What of trees is used.

    languages: all, if there are none. skip_deleted: also messages that were deleted are no part of
    a pair. turns: of WRITTEN.
    """

    languages: tuple[str, ...] = ()
    skip_deleted: bool = False
    turns: str = "marks"


class Node(NamedTuple):
    """One message of a tree."""

    where: str
    id: str
    parent: str | None
    text: str
    role: str
    language: str
    rank: int | None
    is_deleted: bool


Nodes = dict[str, Node]


# ---- from records to messages --------------------------------------------------------------------


def items_of_tree(record: Record, where: str, rules: TreeRules | None = None) -> Iterator[Item]:
    """The comparisons of one tree, which holds its messages in one another."""
    nodes: Nodes = {}
    root = object_of(value_of(record, "prompt", where), f'{where}: "prompt"')
    waiting: list[tuple[Record, str | None]] = [(root, None)]
    while waiting:
        message, parent = waiting.pop()
        _add(nodes, node_of(message, where, parent))
        replies = message.get("replies") or []
        require(
            isinstance(replies, list), f'{where}: "replies" is {shown(replies)}; expected a list'
        )
        for reply in reversed(replies):
            checked = object_of(reply, f'{where}: "replies" of {message["message_id"]}')
            waiting.append((checked, message["message_id"]))
    for _, item in _comparisons(nodes, rules or TreeRules()):
        yield item


def items_of_messages(
    located: Iterable[tuple[str, Record]], rules: TreeRules
) -> Iterator[tuple[str, Item]]:
    """("file:line", comparison) of flat messages; those of a file are in memory together.

    A message whose parent is not in the file is an orphan. Its thread cannot be read, so the
    comparisons below it are left out.
    """
    nodes: Nodes = {}
    for where, record in located:
        parent = value_of(record, "parent_id", where)
        if parent is not None:
            string_of(parent, f'{where}: "parent_id"')
        _add(nodes, node_of(record, where, parent))
    yield from _comparisons(nodes, rules)


def node_of(message: Record, where: str, parent: str | None) -> Node:
    """One message, checked."""
    role = value_of(message, "role", where)
    require(
        isinstance(role, str) and role in ROLES,
        f'{where}: "role" is {shown(role)}; expected {" or ".join(ROLES)}',
    )
    rank = message.get("rank")
    is_rank = rank is None or (is_number(rank) and rank >= 0 and rank % 1 == 0)
    require(is_rank, f'{where}: "rank" is {shown(rank)}; expected null, or a whole number from 0')
    deleted = message.get("deleted")
    require(
        deleted is None or isinstance(deleted, bool),
        f'{where}: "deleted" is {shown(deleted)}; expected true or false',
    )
    language = message.get("lang")
    return Node(
        where=where,
        id=text_at(message, "message_id", where),
        parent=parent,
        text=text_at(message, "text", where),
        role=role,
        language="" if language is None else string_of(language, f'{where}: "lang"'),
        rank=None if rank is None else int(rank),  # tables write 1.0 where some are missing
        is_deleted=bool(deleted),
    )


def _add(nodes: Nodes, node: Node) -> None:
    first = nodes.setdefault(node.id, node)
    require(
        first is node,
        f"{node.where}: message {node.id} is in the file twice, first at {first.where}",
    )


# ---- from messages to comparisons ----------------------------------------------------------------


def _comparisons(nodes: Nodes, rules: TreeRules) -> Iterator[tuple[str, Item]]:
    """Every two assistant replies to the same message, in order of the file."""
    refuse_cycles(nodes)
    replies: dict[str, list[Node]] = {}
    for node in nodes.values():
        if node.parent is None:
            continue
        if node.parent not in nodes:
            yield node.where, Note("messages whose parent is not in the file")
        if node.role == "assistant":
            replies.setdefault(node.parent, []).append(node)
    for parent, siblings in replies.items():
        thread = thread_to(parent, nodes)
        for first, second in combinations(siblings, 2):
            for item in _items_of_two(thread, first, second, rules):
                yield second.where, item


def thread_to(id: str, nodes: Nodes) -> list[Node] | None:
    """The messages from the root of a tree to one of them; None if one of them is missing."""
    thread: list[Node] = []
    parent: str | None = id
    while parent is not None:
        if parent not in nodes:
            return None
        thread.append(nodes[parent])
        parent = nodes[parent].parent
    return thread[::-1]


def refuse_cycles(nodes: Nodes) -> None:
    """Refuse a message that is its own ancestor (InputError)."""
    safe: set[str] = set()  # messages above which there is no cycle
    for node in nodes.values():
        above: dict[str, Node] = {}
        current: Node | None = node
        while current is not None and current.id not in safe:
            require(
                current.id not in above,
                f"{current.where}: message {current.id} is its own ancestor; expected a tree",
            )
            above[current.id] = current
            current = nodes.get(current.parent) if current.parent is not None else None
        safe |= set(above)


def _items_of_two(
    thread: list[Node] | None, first: Node, second: Node, rules: TreeRules
) -> Iterator[Item]:
    """What comes of two replies: a record, or why there is none."""
    reason = _reason_against(thread, first, second, rules)
    if reason or thread is None:
        yield LeftOut(reason)
        return
    if any(node.is_deleted for node in (*thread, first, second)):
        yield Note("comparisons with a deleted message in them, which are used")
    yield _record(thread, first, second, rules.turns)


def _reason_against(thread: list[Node] | None, first: Node, second: Node, rules: TreeRules) -> str:
    """Why two replies make no pair; empty if they do."""
    if thread is None:
        return "below a message whose parent is missing"
    nodes = (*thread, first, second)
    if rules.languages and not all(node.language in rules.languages for node in nodes):
        return "of another language"
    if rules.skip_deleted and any(node.is_deleted for node in nodes):
        return "deleted"
    if first.rank is None or second.rank is None:
        return "no rank"
    return ""


def _record(thread: Sequence[Node], first: Node, second: Node, turns: str) -> Record:
    """Two ranked replies as a house record; equal ranks are a label tie."""
    assert first.rank is not None and second.rank is not None
    prompt: Any = _messages(thread)
    responses: list[Any] = [_messages([first]), _messages([second])]
    if turns == "marks":
        prompt, responses = render_plainly(prompt, True), [first.text, second.text]
    difference = second.rank - first.rank
    if difference == 0:
        return preferred(prompt, responses, None)
    record = preferred(prompt, responses, difference > 0)
    return record | {"margin": abs(difference)}


def _messages(nodes: Sequence[Node]) -> list[Message]:
    return [{"role": ROLES[node.role], "content": node.text} for node in nodes]
