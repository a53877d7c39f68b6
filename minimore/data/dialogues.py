"""Dialogues: plain texts in which marks say who speaks, as Anthropic's HH writes them.

\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Bye.\n\nAssistant:
"""

import os
import re
from collections.abc import Sequence

ASSISTANT = ("\n\nAssistant:", "## Assistant:")  # ends the prompt of a dialogue that is given whole
# What begins a turn of the human, in plain dialogues and in those of the template of many models.
HUMAN = re.compile(r"(?:^|\n)[^\S\n]*(?:## )?(?:Human|User):")
NEXT_TURN = re.compile(r"\n\n(?:## )?(?:Human|User|Assistant):")  # within a response


def prompt_end(texts: Sequence[str]) -> int:
    """Where the shared prompt of whole dialogues ends.

    It ends after the last assistant mark inside their common beginning. Without such a mark the
    whole texts are responses. (Which tokens are shared is found later, from the tokens.)

    >>> prompt_end(["\\n\\nHuman: hi\\n\\nAssistant: yes", "\\n\\nHuman: hi\\n\\nAssistant: yo"])
    23
    """
    common = os.path.commonprefix(list(texts))
    return max((common.rfind(mark) + len(mark) for mark in ASSISTANT if mark in common), default=0)


def opening_of(prompt: str) -> str:
    """What the human says first in a dialogue; the whole prompt where it has no turns.

    >>> opening_of("\\n\\nHuman: Hi.\\n\\nAssistant: Hello!\\n\\nHuman: Bye.\\n\\nAssistant:")
    ' Hi.'
    >>> opening_of("Name a colour.")
    'Name a colour.'
    """
    begin = HUMAN.search(prompt)
    if begin is None:
        return prompt
    ends = [prompt.find(mark, begin.end()) for mark in ASSISTANT]
    end = min((end for end in ends if end >= 0), default=len(prompt))
    return prompt[begin.end() : end]
