"""Text -> token ids, from the files beside a checkpoint: tokenizer.json, or vocab.json with merges.txt. And chat templates.

BOS is what the files add in front of a text, once; nothing is added behind. In a user's text the names of special tokens are
text; only the markers that a chat template writes are special.
"""

import functools
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as TokenizerFile

from ..files import one_line, read_json
from ..options import InputError

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
REMEDY = "make a tokenizer.json once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
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
PLAIN_ROLES = {
    "user": "Human",
    "human": "Human",
    "prompter": "Human",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "system": "System",
}


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    bos: ids in front of every text. special: {"bos_token": text, ...} as far as named. files: name -> bytes, to save again.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = {
            name: (directory / name).read_bytes()
            for name in TOKENIZER_FILES
            if (directory / name).is_file()
        }
        self.config = (
            read_json(directory / "tokenizer_config.json")
            if "tokenizer_config.json" in self.files
            else {}
        )
        self.mapped = (
            read_json(directory / "special_tokens_map.json")
            if "special_tokens_map.json" in self.files
            else {}
        )
        named = self.config | {
            key: token for key, token in self.mapped.items() if token is not None
        }
        self.special = {
            key: text for key in SPECIAL if (text := _content(named.get(key))) is not None
        }
        extra = named.get("extra_special_tokens")
        self.special |= {
            key: text
            for key, token in (extra.items() if isinstance(extra, dict) else ())
            if (text := _content(token)) is not None
        }
        listed = named.get("additional_special_tokens")
        self.additional = [
            text
            for token in (listed if isinstance(listed, list) else [])
            if (text := _content(token))
        ]
        try:
            self.file = self._open()
            self.file.no_truncation()  # a file may carry both, left by whoever saved it
            self.file.no_padding()
            self._add_named()
            self.bos = self._bos()
            self.size = 1 + max(
                [*self.file.get_vocab(with_added_tokens=True).values(), *self.bos], default=-1
            )
        except InputError:
            raise
        except (
            BaseException
        ) as error:  # the library raises plain Exception, and its Rust panics not even that
            _pass_on(error)
            raise InputError(
                f"{directory / self._name()}: not a usable tokenizer ({one_line(error)})"
            ) from None

    def _name(self):
        return (
            "tokenizer.json"
            if "tokenizer.json" in self.files or "vocab.json" not in self.files
            else "vocab.json"
        )

    def _open(self):
        if "tokenizer.json" in self.files:
            return TokenizerFile.from_str(self.files["tokenizer.json"].decode("utf-8"))
        if "vocab.json" in self.files and "merges.txt" in self.files:
            return self._from_vocabulary()
        if (self.directory / "tokenizer.model").is_file():
            raise InputError(
                f"{self.directory}: has only a SentencePiece tokenizer.model; {REMEDY}"
            )
        raise InputError(
            f"{self.directory / 'tokenizer.json'}: no such file; expected tokenizer.json, or vocab.json and merges.txt"
        )

    def _from_vocabulary(self):
        """GPT-2's kind of byte-level BPE in two files, as OPT has it; other kinds cut texts otherwise before they merge."""
        model = (
            read_json(self.directory / "config.json").get("model_type")
            if (self.directory / "config.json").is_file()
            else None
        )
        kind = self.config.get("tokenizer_class") or (
            f"none, of a {model}" if model in ("gpt_neox", "qwen2", "qwen3") else GPT2[0]
        )
        if kind not in GPT2 or (self.directory / "added_tokens.json").is_file():
            what = "added_tokens.json" if kind in GPT2 else f"tokenizer_class {kind!r}"
            raise InputError(
                f"{self.directory}: vocab.json and merges.txt with {what} cannot be read as they are; {REMEDY}"
            )
        vocabulary = read_json(self.directory / "vocab.json")
        merges = [
            tuple(line.split(" "))
            for line in self.files["merges.txt"].decode("utf-8").replace("\r\n", "\n").split("\n")
            if line and not line.startswith("#version")
        ]
        file = TokenizerFile(models.BPE(vocabulary, merges))
        file.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=bool(self.config.get("add_prefix_space", False))
        )
        file.decoder = decoders.ByteLevel()
        return file

    def _add_named(self):
        """Make special what only the configs call special: `added_tokens_decoder`, named tokens of the vocabulary, additional ones."""
        listed = self.config.get("added_tokens_decoder")
        for key, token in (
            sorted(listed.items(), key=lambda item: int(item[0]))
            if isinstance(listed, dict)
            else ()
        ):
            flags = {
                k: token[k]
                for k in ("single_word", "lstrip", "rstrip", "normalized")
                if type(token.get(k)) is bool
            }
            (self.file.add_special_tokens if token.get("special") else self.file.add_tokens)(
                [AddedToken(token["content"], special=bool(token.get("special")), **flags)]
            )
            if self.file.token_to_id(token["content"]) != int(key):
                raise InputError(
                    f'{self.directory / "tokenizer_config.json"}: "added_tokens_decoder" gives {token["content"]!r} the id {int(key)}, '
                    f"but the vocabulary has {self.file.token_to_id(token['content'])}"
                )
        special = {t.content for t in self.file.get_added_tokens_decoder().values() if t.special}
        named = [
            text
            for text in self.special.values()
            if text and self.file.token_to_id(text) is not None
        ]
        missing = [
            text for text in dict.fromkeys([*named, *self.additional]) if text not in special
        ]
        self.file.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in missing]
        )

    def files_to_save(self, pad: int) -> dict[str, bytes]:
        """The files, changed where another reader of them would not see the texts as this model does.

        The token of id `pad` becomes the pad token; an id without a token (the first free one) gets one. What stands around a text is
        `bos` in front and nothing behind. Without a tokenizer_config.json one is made that reads tokenizer.json as it is.
        """
        files, text = dict(self.files), self.file.id_to_token(pad)
        around = (
            self.file.encode("a", add_special_tokens=True).ids
            != self.bos + self.file.encode("a", add_special_tokens=False).ids
        )
        if text is None or around:
            file = TokenizerFile.from_str(self.file.to_str())
            if text is None:
                text = PAD
                file.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            if around:
                names = [file.id_to_token(i) for i in self.bos]
                file.post_processor = processors.TemplateProcessing(
                    single=[*names, "$A"],
                    pair=[*names, "$A", "$B"],
                    special_tokens=list(zip(names, self.bos)),
                )
            files["tokenizer.json"] = file.to_str(pretty=True).encode("utf-8")
        made = (
            {}
            if "tokenizer_config.json" in files
            else {"tokenizer_class": "PreTrainedTokenizerFast"} | self.special
        )
        for name, given in (
            ("tokenizer_config.json", self.config or made),
            ("special_tokens_map.json", self.mapped),
        ):
            if given and _content(given.get("pad_token")) != text:
                files[name] = (
                    json.dumps(given | {"pad_token": text}, indent=2, ensure_ascii=False) + "\n"
                ).encode("utf-8", "surrogatepass")
        return files

    def _bos(self):
        """What stands in front of a text: as tokenizer_config.json says, else as tokenizer.json's own post-processor does."""
        asked = self.config.get("add_bos_token")
        if asked is False:
            return []
        if asked is True:
            token = self.file.token_to_id(self.special.get("bos_token", ""))
            if token is None:
                raise InputError(
                    f'{self.directory / "tokenizer_config.json"}: "add_bos_token" is true, but "bos_token" names no token of the vocabulary'
                )
            return [token]
        encoded = self.file.encode("a", add_special_tokens=True)
        mask = encoded.special_tokens_mask
        return encoded.ids[: mask.index(0) if 0 in mask else 0]

    def encode(self, texts: Sequence[str], rendered: bool = False) -> list[list[int]]:
        """Ids of each text, BOS in front if the tokenizer adds one, no EOS.

        rendered: the texts come from `render`: markers in them are special tokens, and a BOS that the template wrote is not
        written again.
        """
        self.file.encode_special_tokens = (
            not rendered
        )  # True reads the names of special tokens as text
        try:
            ids = [e.ids for e in self.file.encode_batch(list(texts), add_special_tokens=False)]
        except BaseException as error:  # a vocabulary without a token for unknown text, say
            _pass_on(error)
            raise InputError(
                f"{self.directory / self._name()}: cannot encode these texts ({one_line(error)}); use the model's own tokenizer"
            ) from None
        return [
            i if rendered and self.bos and i[: len(self.bos)] == self.bos else self.bos + i
            for i in ids
        ]

    @property
    def bos_text(self) -> str | None:
        """The BOS that is added in front of every text, as text."""
        return self.file.id_to_token(self.bos[0]) if self.bos else None

    def is_doubled(self, text: str) -> bool:
        """Whether a user's text begins with the very BOS that is added in front of it."""
        return bool(self.bos_text) and text.startswith(self.bos_text)

    def names_special(self, text: str) -> bool:
        """Whether a user's text holds the name of a special token, which `encode` reads as text."""
        return any(marker in text for marker in self.markers)

    # ---- chat ------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def template(self) -> str | None:
        """The chat template, from chat_template.jinja or tokenizer_config.json; of several named ones the default."""
        if "chat_template.jinja" in self.files:
            try:
                return self.files["chat_template.jinja"].decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{self.directory / 'chat_template.jinja'}: not UTF-8 ({one_line(error)})"
                ) from None
        given = self.config.get("chat_template")
        if isinstance(given, list):
            given = next(
                (
                    t.get("template")
                    for t in given
                    if isinstance(t, dict) and t.get("name") == "default"
                ),
                None,
            )
        return given if isinstance(given, str) else None

    @functools.cached_property
    def _compiled(self):
        if "strftime_now" in self.template or "date_string" in self.template:
            print(
                f"{self.directory}: the chat template may write a date, so rewards may change from day to day",
                file=sys.stderr,
            )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime
        return environment.from_string(self.template)

    @functools.cached_property
    def markers(self) -> list[str]:
        """The names of special tokens: read as such in a rendered conversation, as text in a user's text."""
        added = [t for t in self.file.get_added_tokens_decoder().values() if t.content.strip()]
        return [t.content for t in added if t.special or t.content in (self.template or "")]

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """A conversation as text: by the chat template in a sandbox, or plainly, "\\n\\nHuman: ...\\n\\nAssistant: ...".

        prompt: end where the assistant's next turn begins. Raises InputError if the template refuses the messages.
        """
        if self.template is None:
            turns = "".join(
                f"\n\n{PLAIN_ROLES.get(m['role'], m['role'])}: {m['content']}" for m in messages
            )
            return turns + ("\n\nAssistant:" if prompt else "")
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=prompt,
                **{"tools": None, "documents": None} | self.special,
            )
        except Exception as error:  # whatever a template's own code runs into
            raise InputError(
                f"{self.directory}: the chat template refuses these messages ({one_line(error)})"
            ) from None


def _content(token):
    """A token given as a string or as {"content": string}; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return (
        text if isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text) else None
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark what a model wrote: here its content and nothing else."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(["name:endgeneration"], drop_needle=True)
        ).set_lineno(line)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _pass_on(error):
    """What the user or the system asked for is no fault of a file."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
        raise error


def _raise(message):
    raise jinja2.TemplateError(message)


def _strftime(form):
    return datetime.now().strftime(form)
