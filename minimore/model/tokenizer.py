"""Text -> token ids, from the files beside a checkpoint.

These are tokenizer.json, or vocab.json with merges.txt. BOS is what they add in front of a text,
once; nothing is added behind. In a user's text the names of special tokens are text; only the
markers that a chat template writes are special.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as TokenizerFile

from ..files import blame, one_line, read_json
from ..options import InputError, require
from .template import (
    PLAIN_TEMPLATE,
    ChatTemplate,
    Message,
    render_plainly,
    template_text,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
REMEDY = (
    "make a tokenizer.json once with transformers (and sentencepiece, tiktoken and protobuf):"
    " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
)
LARGEST_ID = 10_000_000  # the library counts all ids up to the largest one
MOST_GROWTH = 1000  # how many times as long as a text its normalized form may be
PAD = "<|pad|>"  # the name of a pad token where there was none
SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")

Config = dict[str, Any]


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    bos: ids in front of every text. size: ids that it may give. special: {"bos_token": text, ...}
    as far as named. template: the chat template, or None. files: name -> bytes, to save again.
    longest: tokens of a text in training, at which others are to cut; None: as the files say.
    """

    longest: int | None = None

    def __init__(self, directory: Path):
        self.directory = directory
        self.lock = Lock()  # of a switch that `encode` sets for what it encodes
        self.files = {
            name: (directory / name).read_bytes()
            for name in TOKENIZER_FILES
            if (directory / name).is_file()
        }
        self.config = self._json("tokenizer_config.json")
        self.mapped = self._json("special_tokens_map.json")
        mapped = {key: token for key, token in self.mapped.items() if token is not None}
        self.special, self.additional = special_names(self.config | mapped)
        is_vocabulary = "vocab.json" in self.files and "tokenizer.json" not in self.files
        self.path = directory / ("vocab.json" if is_vocabulary else "tokenizer.json")
        with self._library_errors("not a usable tokenizer ({})"):
            self.file = open_file(directory, self.files, self.config)
            self._refuse_dice_and_bombs()
            self.file.no_truncation()  # a file may carry both, left by whoever saved it
            self.file.no_padding()
            self._make_special()
            self.bos = self._bos()
            vocabulary = self.file.get_vocab(with_added_tokens=True)
            self.size = 1 + max([*vocabulary.values(), *self.bos], default=-1)

    def _json(self, name: str) -> Config:
        return read_json(self.directory / name) if name in self.files else {}

    @contextmanager
    def _library_errors(self, message: str) -> Iterator[None]:
        """What the tokenizers library raises becomes an InputError; {} stands for its text.

        The library raises plain Exception, and its Rust panics are not even that. What the user or
        the system asked for is no fault of a file.
        """
        try:
            with without_panic_messages():
                yield
        except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            blame(error)
            raise InputError(f"{self.path}: {message.format(one_line(error))}") from None

    def _refuse_dice_and_bombs(self) -> None:
        """Refuse a file with which a text is not always the same tokens, or grows without bound."""
        largest = max(self.file.get_vocab(with_added_tokens=True).values(), default=0)
        require(
            largest <= LARGEST_ID,
            f"{self.path}: a token has the id {largest:,}; expected at most {LARGEST_ID:,}",
        )
        described = json.loads(self.file.to_str())
        dropout = described["model"].get("dropout")
        require(
            not dropout,
            f'{self.path}: its model has "dropout" {dropout}, with which the same text becomes'
            " other tokens every time; set it to null",
        )
        growth = math.prod(replacement_lengths(described.get("normalizer")))
        require(
            growth <= MOST_GROWTH,
            f"{self.path}: its normalizer may make a text {growth:,} times as long;"
            f" expected at most {MOST_GROWTH} times",
        )

    # ---- special tokens ----

    def _make_special(self) -> None:
        """Make special what only the configs call special.

        That is `added_tokens_decoder`, named tokens of the vocabulary, and additional ones.
        """
        listed = self.config.get("added_tokens_decoder")
        if isinstance(listed, dict):
            for key, token in sorted(listed.items(), key=lambda item: int(item[0])):
                self._add(int(key), token)
        added = self.file.get_added_tokens_decoder().values()
        known = {token.content for token in added if token.special}
        named = [
            text
            for text in self.special.values()
            if text and self.file.token_to_id(text) is not None
        ]
        unknown = [text for text in dict.fromkeys([*named, *self.additional]) if text not in known]
        self.file.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in unknown]
        )

    def _add(self, id: int, token: Config) -> None:
        """Add one token of `added_tokens_decoder`, which must get the id that is given there."""
        switches = ("single_word", "lstrip", "rstrip", "normalized")
        flags = {name: token[name] for name in switches if type(token.get(name)) is bool}
        content, is_special = token["content"], bool(token.get("special"))
        add = self.file.add_special_tokens if is_special else self.file.add_tokens
        add([AddedToken(content, special=is_special, **flags)])
        own_id = self.file.token_to_id(content)
        require(
            own_id == id,
            f'{self.directory / "tokenizer_config.json"}: "added_tokens_decoder" gives {content!r}'
            f" the id {id}, but the vocabulary has {own_id}",
        )

    def _bos(self) -> list[int]:
        """What stands in front of a text.

        tokenizer_config.json says it, or else tokenizer.json's own post-processor does it.
        """
        adds_bos = self.config.get("add_bos_token")
        if adds_bos is False:
            return []
        if adds_bos is True:
            token = self.file.token_to_id(self.special.get("bos_token", ""))
            if token is None:
                raise InputError(
                    f'{self.directory / "tokenizer_config.json"}: "add_bos_token" is true,'
                    ' but "bos_token" names no token of the vocabulary'
                )
            return [token]
        encoded = self.file.encode("a", add_special_tokens=True)
        mask = encoded.special_tokens_mask
        return encoded.ids[: mask.index(0)] if 0 in mask else []

    @property
    def eos(self) -> int | None:
        """The id of the named EOS token; None if there is none."""
        name = self.special.get("eos_token")
        return None if name is None else self.file.token_to_id(name)

    @property
    def bos_text(self) -> str | None:
        """The BOS that is added in front of every text, as text."""
        return self.file.id_to_token(self.bos[0]) if self.bos else None

    def is_doubled(self, text: str) -> bool:
        """Whether a user's text begins with the very BOS that is added in front of it."""
        # A token that is normalized may have the mark of a space in front of its name.
        names = [self.bos_text, (self.bos_text or "").lstrip("▁")]
        return any(name and text.startswith(name) for name in names)

    @functools.cached_property
    def markers(self) -> list[str]:
        """The names of special tokens.

        They are read as such in a rendered conversation, and as text in a user's text.
        """
        template = self.template or ""
        return [
            token.content
            for token in self.file.get_added_tokens_decoder().values()
            if token.content.strip() and (token.special or token.content in template)
        ]

    def names_special(self, text: str) -> bool:
        """Whether a user's text holds the name of a special token, which `encode` reads as text."""
        return any(marker in text for marker in self.markers)

    # ---- texts and conversations ----

    def encode(self, texts: Sequence[str], rendered: bool = False) -> list[list[int]]:
        """Ids of each text, BOS in front if the tokenizer adds one, no EOS.

        rendered: the texts come from `render`. Markers in them are special tokens, and a BOS that
        the template wrote is not written again.
        """
        message = "cannot encode these texts ({}); use the model's own tokenizer"
        # The library may fail: on a vocabulary without a token for unknown text, say.
        with self.lock, self._library_errors(message):
            self.file.encode_special_tokens = not rendered  # True: their names are read as text
            encodings = self.file.encode_batch(list(texts), add_special_tokens=False)
        return [self._with_bos(encoding.ids, rendered) for encoding in encodings]

    def _with_bos(self, ids: list[int], rendered: bool) -> list[int]:
        has_bos = rendered and self.bos and ids[: len(self.bos)] == self.bos
        return ids if has_bos else self.bos + ids

    @functools.cached_property
    def template(self) -> str | None:
        """The chat template; None if there is none, or only the plain one that we have saved."""
        text = template_text(self.directory, self.files, self.config)
        return None if text and text.endswith(PLAIN_TEMPLATE) else text

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.directory, self.template or "", self.special)

    def render(self, messages: list[Message], prompt: bool = False) -> str:
        """A conversation as text: by the chat template, or plainly if there is none.

        prompt: end where the assistant's next turn begins. Raises InputError if the template
        refuses the messages.
        """
        if self.template is None:
            return render_plainly(messages, prompt)
        return self._chat_template.render(messages, prompt)

    # ---- saving ----

    def files_to_save(self, pad: int | None) -> dict[str, bytes]:
        """The files, changed where another reader would not see the texts as this model does.

        The token of id `pad` becomes the pad token; an id without a token (the first free one) gets
        one. With None the pad token stays as it is. What stands around a text is `bos` in front and
        nothing behind, around a conversation, too. tokenizer.json is read as it is, whatever class
        the model had. A model without a chat template gets one that writes what `render_plainly`
        writes.
        """
        files = dict(self.files)
        files["chat_template.jinja"] = self._template_to_save().encode("utf-8", "surrogatepass")
        adds_pad = pad is not None and self.file.id_to_token(pad) is None
        if adds_pad or self._adds_something_else():
            file = self._as_it_reads(adds_pad)
            files["tokenizer.json"] = file.to_str(pretty=True).encode("utf-8")
        config = self.config or dict(self.special)
        config = {key: value for key, value in config.items() if key != "chat_template"}
        if "tokenizer.json" in files:
            config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        is_named = self.special.get("bos_token") or "bos_token" in (self.template or "")
        if self.longest is not None:  # cut as in training: on the left, behind the BOS
            config |= {"model_max_length": self.longest, "truncation_side": "left"}
        if self.bos and not is_named:
            config |= {"bos_token": self.bos_text}  # others look there whether a text has two
        if pad is not None:
            pad_text = PAD if adds_pad else self.file.id_to_token(pad)
            config |= {"pad_token": pad_text}
            if self.mapped and content_of(self.mapped.get("pad_token")) != pad_text:
                files["special_tokens_map.json"] = json_bytes(self.mapped | {"pad_token": pad_text})
        files["tokenizer_config.json"] = json_bytes(config)
        return files

    def _template_to_save(self) -> str:
        """The chat template, with the BOS in front if it does not write it itself."""
        bos_text = self.special.get("bos_token") or self.bos_text
        writes_bos = not self.bos or bos_text is None
        if self.template is not None and not writes_bos:
            try:
                rendered = self.render([{"role": "user", "content": "a"}])
                writes_bos = rendered.startswith(bos_text or "")
            except InputError:  # it wants other messages than this one
                writes_bos = True
        text = PLAIN_TEMPLATE if self.template is None else self.template
        return text if writes_bos else "{{- " + json.dumps(bos_text) + " -}}" + text

    def _adds_something_else(self) -> bool:
        """Whether tokenizer.json by itself puts something else around a text than `bos`."""
        with_special = self.file.encode("a", add_special_tokens=True).ids
        return with_special != self.bos + self.file.encode("a", add_special_tokens=False).ids

    def _as_it_reads(self, adds_pad: bool) -> TokenizerFile:
        """A copy of the file that puts `bos` in front of a text and nothing behind."""
        adds_something_else = self._adds_something_else()
        file = TokenizerFile.from_str(self.file.to_str())
        if adds_pad:
            file.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
        if adds_something_else:
            names = [file.id_to_token(id) for id in self.bos]
            file.post_processor = processors.TemplateProcessing(
                single=[*names, "$A"],
                pair=[*names, "$A", "$B"],
                special_tokens=list(zip(names, self.bos)),
            )
        return file


@contextmanager
def without_panic_messages() -> Iterator[None]:
    """Within, nothing is written to the process's own stderr, as Rust does where it panics.

    The text of a panic is also that of the exception that it becomes.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


# ---- opening -------------------------------------------------------------------------------------


def open_file(directory: Path, files: Mapping[str, bytes], config: Config) -> TokenizerFile:
    """The directory's tokenizer, as the library `tokenizers` reads it; InputError if there is none.

    files: name -> bytes. config: that of tokenizer_config.json.
    """
    if "tokenizer.json" in files:
        return TokenizerFile.from_str(files["tokenizer.json"].decode("utf-8"))
    if "vocab.json" in files and "merges.txt" in files:
        return from_vocabulary(directory, files, config)
    if (directory / "tokenizer.model").is_file():
        raise InputError(f"{directory}: has only a SentencePiece tokenizer.model; {REMEDY}")
    raise InputError(
        f"{directory / 'tokenizer.json'}: no such file;"
        " expected tokenizer.json, or vocab.json and merges.txt"
    )


def from_vocabulary(directory: Path, files: Mapping[str, bytes], config: Config) -> TokenizerFile:
    """GPT-2's kind of byte-level BPE in two files, as OPT has it.

    Other kinds cut texts otherwise before they merge, and are refused.
    """
    kind = config.get("tokenizer_class") or kind_by_model(directory)
    has_added = (directory / "added_tokens.json").is_file()
    if kind not in GPT2 or has_added:
        what = "added_tokens.json" if kind in GPT2 else f"tokenizer_class {kind!r}"
        raise InputError(
            f"{directory}: vocab.json and merges.txt with {what} cannot be read as they are;"
            f" {REMEDY}"
        )
    lines = files["merges.txt"].decode("utf-8").replace("\r\n", "\n").split("\n")
    merges: Any = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]
    file = TokenizerFile(models.BPE(read_json(directory / "vocab.json"), merges))
    adds_space = bool(config.get("add_prefix_space", False))
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    file.decoder = decoders.ByteLevel()
    return file


def kind_by_model(directory: Path) -> str:
    """The kind of a tokenizer that does not say it: GPT-2's, unless the model has another."""
    path = directory / "config.json"
    model = read_json(path).get("model_type") if path.is_file() else None
    return f"none, of a {model}" if model in ("gpt_neox", "qwen2", "qwen3") else GPT2[0]


def replacement_lengths(normalizer: Any) -> list[int]:
    """How long the texts are that a normalizer may write in the place of one character."""
    if not isinstance(normalizer, dict):
        return []
    parts = normalizer.get("normalizers")
    if isinstance(parts, list):
        return [length for part in parts for length in replacement_lengths(part)]
    return [max(1, len(normalizer[key])) for key in ("content",) if key in normalizer]


def special_names(named: Config) -> tuple[dict[str, str], list[str]]:
    """{"bos_token": text, ...} as far as named, and the additional special tokens."""
    by_key, listed = named.get("extra_special_tokens"), named.get("additional_special_tokens")
    tokens = [(key, named.get(key)) for key in SPECIAL]
    if isinstance(by_key, dict):
        tokens += by_key.items()
    special = {}
    for key, token in tokens:
        text = content_of(token)
        if text is not None:
            special[key] = text
    contents = [content_of(token) for token in (listed if isinstance(listed, list) else [])]
    return special, [text for text in contents if text]


def content_of(token: Any) -> str | None:
    """A token given as a string or as {"content": string}; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    is_text = isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)
    return text if is_text else None


def json_bytes(values: Config) -> bytes:
    """A JSON file of the tokenizer."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass")
