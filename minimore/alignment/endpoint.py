"""A language model behind an address: one question, one answer, and what it may cost.

The server speaks the chat completions protocol of OpenAI, as vLLM, llama.cpp, Ollama and most that
sell answers do. Whatever has been answered is in a file (answers.py) and is not asked again.

    a server in trouble        is asked again, later and later; then the command ends in one line
    a server that refuses      ends the command at once
    a budget that is spent     ends the command; the same command again goes on behind it

The key comes from the environment and is neither printed nor stored.
"""

import os
import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient
from huggingface_hub.errors import OfflineModeIsEnabled

from ..data.messages import Messages
from ..files import one_line
from ..options import InputError, printable, require
from .answers import Answers, question_hash

KEY = "MINIMORE_API_KEY"  # the environment variable with the key
ADDRESS = "MINIMORE_BASE_URL"  # the one with the address
# What is sent where there is no key. Without any, the client would send the user's Hugging Face
# token to whatever address this is.
NO_KEY = "none"
SHORTEST_SECRET = 8  # characters; a local server's key may be a single letter

TRIES = 5  # to get one answer of a server in trouble
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try; it doubles
TIMEOUT = 120.0  # seconds
ANSWER_TOKENS = 16
IN_TROUBLE = (408, 409, 425, 429)  # and 500 upwards: a status that may pass


@dataclass
class Endpoint:
    """One model of one server.

    key: the user's secret. max_calls: requests that may be sent, those that fail included. calls:
    sent so far. reused: answers that came from the file.
    """

    model: str
    client: InferenceClient
    address: str
    key: str
    answers: Answers
    max_calls: int
    calls: int = 0
    reused: int = 0

    @classmethod
    def open(
        cls, model: str, base_url: str | None, answers_path: str, max_calls: int
    ) -> "Endpoint":
        """Check address and key and open the file of answers; nothing is sent yet."""
        address = address_of(base_url or os.environ.get(ADDRESS))
        key = os.environ.get(KEY) or NO_KEY
        require(
            key.isascii() and key.isprintable() and " " not in key,
            f"{KEY}: holds spaces or characters that no key has; set it anew",
        )
        answers = Answers.open(answers_path)
        client = InferenceClient(base_url=address, api_key=key, timeout=TIMEOUT)
        return cls(model, client, address, key, answers, max_calls)

    def answer(self, messages: Messages) -> str:
        """What the model says, from the file if it has been asked before."""
        question = question_hash(self.model, messages)
        if question in self.answers.stored:
            self.reused += 1
            return self.answers.stored[question]
        text = self._asked(messages)
        self.answers.add(question, self.model, text)
        return text

    def _asked(self, messages: Messages) -> str:
        """The answer of the server, which is asked again while it is in trouble."""
        for tries in range(1, TRIES + 1):
            self._count_call()
            try:
                return self._call(messages)
            except Exception as error:  # the client's libraries have no error in common
                reason = self._reason(error)
                refuse_unless_in_trouble(error, f"{self.address}: {reason}", self.model)
                wait = wait_before_next(tries, error)
            if tries < TRIES:
                line = f"{printable(reason)}; asked again in {wait:g} s"
                print(line, file=sys.stderr, flush=True)
                time.sleep(wait)
        raise InputError(
            f"{self.address}: no answer after {TRIES} tries ({reason}); all answers before are in"
            f" {self.answers.path}: see that the server is up, and give the same command again"
        )

    def _count_call(self) -> None:
        """Count a request before it is sent. Raises InputError if the budget is spent."""
        require(
            self.calls < self.max_calls,
            f"--max-calls {self.max_calls}: so many requests were sent, and all answers are in"
            f" {self.answers.path}; give the same command again to go on",
        )
        self.calls += 1

    def _call(self, messages: Messages) -> str:
        """The answer to one request. Raises whatever the client raises, and TypeError."""
        reply = self.client.chat_completion(
            messages, model=self.model, temperature=0, max_tokens=ANSWER_TOKENS
        )
        text = reply.choices[0].message.content or ""
        if not isinstance(text, str):
            raise TypeError(f"an answer that is {type(text).__name__}")
        return self._without_key(text)

    def _reason(self, error: Exception) -> str:
        """Why there was no answer, on one line: what the server says, or what the client does."""
        status = status_of(error)
        text = str(error) or type(error).__name__
        if status is not None:
            text = f"status {status} {getattr(error, 'server_message', None) or ''}"
        return one_line(Exception(self._without_key(text)))

    def _without_key(self, text: str) -> str:
        """A text of the server without the key, which it may repeat."""
        is_secret = len(self.key) >= SHORTEST_SECRET
        return text.replace(self.key, "...") if is_secret else text


def address_of(base_url: str | None) -> str:
    """The address to which questions are sent. Raises InputError for one that is not plain.

    >>> address_of("http://localhost:8000"), address_of("https://host/v1beta/openai/")
    ('http://localhost:8000/v1/chat/completions', 'https://host/v1beta/openai/chat/completions')
    """
    if not base_url:
        raise InputError(f"--base-url is missing: expected it, or an address in {ADDRESS}")
    try:
        parts = urlsplit(base_url)
        is_plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_plain = False
    may_hold_key = "@" in base_url or "?" in base_url  # then it is not printed
    require(
        is_plain and not may_hold_key and "#" not in base_url and base_url.isprintable(),
        f"--base-url {'...' if may_hold_key else base_url}: expected an address such as"
        f" http://localhost:8000/v1, without a key, which belongs in {KEY}",
    )
    path = base_url.rstrip("/")
    if path.endswith("/chat/completions"):
        return path
    return path + ("" if parts.path.strip("/") else "/v1") + "/chat/completions"


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of a reply that is an error; None if there was no such reply.

    The client itself stumbles over some of these replies, such as a list.
    """
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__context__
    return None


def refuse_unless_in_trouble(error: Exception, reason: str, model: str) -> None:
    """Raise InputError for an error that another try does not cure. reason: what is said of it."""
    status = status_of(error)
    if status is not None:
        require(
            status >= 500 or status in IN_TROUBLE,
            f"{reason}; check --base-url, the model's name {model!r} and the key in {KEY}",
        )
        return
    is_offline = isinstance(error, OfflineModeIsEnabled)
    is_reply = isinstance(error, (ValueError, TypeError, AttributeError, IndexError))
    require(not is_offline, reason)
    require(not is_reply, f"{reason}; expected a chat completion, so check --base-url")


def wait_before_next(tries: int, error: Exception) -> float:
    """Seconds to wait after so many tries: what the server asks for, or else ever twice as many."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked_for = str(headers.get("Retry-After", ""))
    wait = float(asked_for) if asked_for.isdecimal() else FIRST_WAIT * 2 ** (tries - 1)
    return min(wait, LONGEST_WAIT)
