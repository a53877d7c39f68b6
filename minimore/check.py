"""What is in this checkpoint, and does it work here? The `check` verb: one page before long hours.

A trained language model reads PARAGRAPH with a low perplexity and is lost when its words stand in
alphabetical order. A norm or a rotary base that is not the model's own brings the first figure
towards the second. That is seen without any other program to compare with. Where transformers is
installed, token ids and hidden states are compared with its own, which shows smaller mistakes.

Each `check_...` function returns figures, for --json, and a line for the reader.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .alignment.policy import LanguageModel, token_losses
from .engine.choose import is_exact, recipes
from .engine.memory import memory_of
from .engine.recipe import Recipe
from .engine.workload import PairShape, Workload
from .files import one_line, refuse_existing, write_json
from .model.attention import pack
from .model.checkpoint import Checkpoint, pad_id
from .model.families import LANGUAGE_HEADS
from .model.tokenizer import Tokenizer
from .model.trunk import Trunk
from .options import InputError, check_ranges, option, require
from .reward import (
    ModelOptions,
    RewardModel,
    load_reward_model,
    text_rewards,
    was_trained_with_eos,
)
from .units import in_bytes

PARAGRAPH = (
    "When the ferry stopped running, the people of the island had to decide what to do with the "
    "old harbour. Some wanted to fill it with stones and plant a row of trees along the shore. "
    "Others said that a harbour without boats is still a place where children learn to swim and "
    "where the wind can be heard before it reaches the village. In the end they did nothing for a "
    "year, and during that year a family of seals moved in. Visitors came to see the animals, a "
    "small cafe opened next to the empty ticket office, and nobody spoke about stones any more. "
    "The mayor likes to say that it was the best decision the council never made."
)
QUESTION = "There is candle wax on my tablecloth. How do I get it out?"
ANSWERS = {
    "helpful": "Let the wax get hard and lift off what you can with a blunt knife. Then lay "
    "kitchen paper over and under the stain and go over it with a warm iron: the paper soaks up "
    "the rest. Wash the cloth as usual.",
    "unhelpful": "Tablecloths are made of cloth. I do not like candles.",
}
# The largest relative difference of a hidden state that fp32 rounding explains in a deep model.
AGREE = 1e-3

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ModelOptions):
    """What `check` takes."""

    model: str = option(value="MODEL", help="checkpoint directory or hub name", positional=True)
    parity: str = option(
        "auto",
        choices=("auto", "none"),
        help="auto compares with transformers if it is installed, in fp32, one model in memory at "
        "a time",
    )
    json: str | None = option(None, value="OUT.json", help="write all figures here; must not exist")


def check(options: CheckOptions) -> int:
    """Print the page, line by line.

    Returns 1 if transformers reads the texts otherwise, or computes other hidden states.
    """
    check_ranges(options)
    refuse_existing(options.json, "--json")
    checkpoint = Checkpoint(options.model)
    page = Page(options.model)
    page.add("family", check_family(checkpoint))
    page.add("weights", check_weights(checkpoint))
    page.add("tokenizer", check_tokenizer(checkpoint))
    page.add("template", check_template(checkpoint))

    texts = example_ids(checkpoint)
    model = load_reward_model(checkpoint, options, as_stored)
    page.add("memory", check_memory(model.trunk, options.micro_tokens))
    page.add("language", check_language(checkpoint, model.trunk, texts))
    page.add("rewards", check_rewards(checkpoint, model, texts))
    if options.parity == "auto":
        page.add("parity", check_parity(checkpoint, model, texts))
    else:
        page.add("parity", ({}, "not compared: --parity none"))

    if options.json:
        write_json(options.json, page.report)
    if page.report["parity"].get("agrees") is False:
        print(
            "minimore check: transformers reads these texts, or computes this model, otherwise: "
            "see the line parity",
            file=sys.stderr,
        )
        return 1
    return 0


class Page:
    """The report of a checkpoint, of which every part is printed as it is added."""

    def __init__(self, model: str):
        self.report: Figures = {"model": model}

    def add(self, title: str, part: tuple[Any, str]) -> None:
        """Keep the figures of a part and print its line."""
        self.report[title], line = part
        print(f"{title:10} {line}", flush=True)


def as_stored(name: str, value: Tensor) -> Tensor:
    """Hold a parameter in fp32, as it was loaded, because parity is measured in fp32."""
    return value


def example_ids(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Token ids of the paragraph, of its words in alphabetical order, and of the two answers.

    They are cut to what the model can read.
    """
    config = checkpoint.config
    texts = {"paragraph": PARAGRAPH, "alphabetical": " ".join(sorted(PARAGRAPH.split()))}
    for name, answer in ANSWERS.items():
        texts[name] = f"\n\nHuman: {QUESTION}\n\nAssistant: {answer}"
    encoded = checkpoint.tokenizer.encode(list(texts.values()))
    ids = {name: text_ids[: config.longest] for name, text_ids in zip(texts, encoded)}
    require(
        min(map(len, ids.values())) >= 2,
        f"{checkpoint.directory}: an English paragraph becomes fewer than two tokens; expected the"
        " model's own tokenizer, and room for two positions",
    )
    return ids


# ---- what the files say --------------------------------------------------------------------------


def check_family(checkpoint: Checkpoint) -> tuple[Figures, str]:
    """model_type, and every field of ModelConfig that is set to something."""
    model_type, values = checkpoint.json["model_type"], asdict(checkpoint.config)
    shown = values | {"windows": sorted({window for window in values["windows"] if window})}
    defaults = {field.name: field.default for field in fields(checkpoint.config)}
    words = [
        name if value is True else f"{name} {value}"
        for name, value in shown.items()
        if value and value != defaults[name]
    ]
    return {"model_type": model_type} | values, f"{model_type}: {', '.join(words)}"


def check_weights(checkpoint: Checkpoint) -> tuple[Figures, str]:
    """Files, bytes, types and heads."""
    keys, types = checkpoint.tensors.files, checkpoint.tensors.kinds()
    files = sorted({path.name for path in keys.values()})
    size = sum((checkpoint.directory / name).stat().st_size for name in files)
    heads = [key for key in (*LANGUAGE_HEADS, "score.weight") if key in keys]
    others = f" and {len(files) - 1} more" if len(files) > 1 else ""
    has_checksums = checkpoint.require_weights_as_written()
    as_written = "as they were written" if has_checksums else "without a checksum"
    return (
        {
            "files": files,
            "bytes": size,
            "types": types,
            "heads": heads,
            "checksums": has_checksums,
        },
        f"{files[0]}{others}, {in_bytes(size)}, {' and '.join(types)}, {as_written};"
        f" heads stored: {', '.join(heads) or 'none'}",
    )


def check_tokenizer(checkpoint: Checkpoint) -> tuple[Figures, str]:
    """Size, BOS, EOS, and the pad id that a saved reward model gets."""
    tokenizer = checkpoint.tokenizer
    eos = tokenizer.special.get("eos_token")
    try:
        pad: int | None = pad_id(checkpoint)
        padding = f"a saved reward model pads with id {pad}"
    except InputError:
        pad = None
        padding = "no id is left for padding, so training is refused"
    return (
        {"ids": tokenizer.size, "bos": tokenizer.bos_text, "eos": eos, "pad_id": pad},
        f"{tokenizer.size:,} ids for {checkpoint.config.vocabulary:,} rows;"
        f" in front of a text: {quoted(tokenizer.bos_text)}; named EOS: {quoted(eos)}; {padding}",
    )


def quoted(text: str | None) -> str:
    """A text in quotes; "nothing" if there is none."""
    return "nothing" if text is None else repr(text)


def check_template(checkpoint: Checkpoint) -> tuple[str, str]:
    """A short conversation as the model will read it."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = checkpoint.tokenizer.render(turns)
    except InputError as error:
        return str(error), str(error)
    shown = repr(text)
    if len(text) >= 600:
        shown = f"{text[:600]!r} ... ({len(text):,} characters)"
    if checkpoint.tokenizer.template is None:
        shown = f"none; plainly written: {shown}"
    return text[:100_000], shown


# ---- what the model does -------------------------------------------------------------------------


def check_memory(trunk: Trunk, micro_tokens: int) -> tuple[Figures, str]:
    """Bytes by arithmetic (memory.py) of a step of 80 pairs of 342 tokens; `plan` says more."""
    config, itemsize = trunk.c, trunk.compute_dtype.itemsize
    parameters = sum(p.numel() for p in trunk.parameters())
    is_flash = trunk.embedding.weight.is_cuda and itemsize == 2
    work = Workload((PairShape(140, 101, 101),) * 80, 1, 27_360)

    def peak(recipe: Recipe) -> float:
        return memory_of(config, work, recipe, itemsize, is_flash).peak

    # Numbers a token in the widest place of a forward pass, the MLP.
    numbers = 4 * config.width + (3 if config.gated else 2) * config.mlp_width
    scoring = itemsize * parameters + micro_tokens * itemsize * numbers
    training = peak(Recipe(micro_tokens=micro_tokens))
    exact = [
        recipe for recipe in recipes({"micro_tokens": micro_tokens}) if is_exact(recipe, itemsize)
    ]
    leanest = min(exact, key=peak)
    figures = {
        "parameters": parameters,
        "scoring": scoring,
        "training": training,
        "leanest": peak(leanest),
        "recipe": str(leanest),
    }
    return figures, (
        f"{parameters:,} parameters without heads; about {in_bytes(scoring)} to score"
        f" ({micro_tokens:,} tokens at a time); to train (80 pairs a step) {in_bytes(training)}"
        f" plainly, {in_bytes(peak(leanest))} with {leanest}; see minimore plan"
    )


@torch.no_grad()
def check_language(
    checkpoint: Checkpoint, trunk: Trunk, texts: Mapping[str, list[int]]
) -> tuple[Figures | None, str]:
    """Perplexity of the paragraph, and of its words in alphabetical order."""
    unembedding = checkpoint.unembedding(trunk)
    if unembedding is None:
        line = "not measured: these files hold no language-model head"
        return None, line + (", as a reward model's do not" if checkpoint.has_head else "")
    model = LanguageModel(trunk, unembedding)
    ordered = token_losses(model, texts["paragraph"]).double().cpu()  # nats
    alphabetical = token_losses(model, texts["alphabetical"]).double().cpu()
    figures: Figures = {
        "paragraph": float(ordered.mean().exp()),
        "alphabetical": float(alphabetical.mean().exp()),
    }
    if not all(map(math.isfinite, figures.values())):
        raise FloatingPointError(
            f"{checkpoint.directory}: the perplexity of a plain paragraph is not finite;"
            " these weights or their config.json are damaged"
        )
    is_whole = len(texts["paragraph"]) == len(checkpoint.tokenizer.encode([PARAGRAPH])[0])
    if is_whole:
        bits = float(ordered.sum()) / math.log(2) / len(PARAGRAPH.encode())
        figures["bits_per_byte"], length = bits, f"{bits:.2f} bits a byte"
    else:
        figures["bits_per_byte"] = None
        length = f"its first {len(texts['paragraph'])} tokens"
    line = (
        f"perplexity of a plain paragraph {figures['paragraph']:.2f} ({length}),"
        f" of its words in alphabetical order {figures['alphabetical']:.2f}"
    )
    if figures["alphabetical"] < 1.25 * figures["paragraph"]:
        line += (
            ": order hardly matters to this model;"
            " it is untrained, or something here is not its own"
        )
    return figures, line


def check_rewards(
    checkpoint: Checkpoint, model: RewardModel, texts: Mapping[str, list[int]]
) -> tuple[Figures, str]:
    """The reward of a helpful and of an unhelpful answer."""
    eos = checkpoint.tokenizer.eos
    end = [eos] if eos is not None and was_trained_with_eos(checkpoint) else []
    rewards = text_rewards(model, [texts[name] + end for name in ANSWERS]).tolist()
    figures = dict(zip(ANSWERS, rewards))
    line = ", ".join(f"{name} answer {reward:.4f}" for name, reward in figures.items())
    if end:
        line += "; read at an EOS token behind them, as the model was trained"
    if not checkpoint.has_head:
        line += "; the head is untrained, so their order is chance"
    return figures, line


# ---- what transformers says ----------------------------------------------------------------------


@torch.no_grad()
def check_parity(
    checkpoint: Checkpoint, model: RewardModel, texts: Mapping[str, list[int]]
) -> tuple[Figures, str]:
    """Token ids of the paragraph, and the largest relative difference of a hidden state, in fp32.

    This comes last: our model is given up to make room for theirs.
    """
    if not importlib.util.find_spec("transformers"):
        return {}, "not compared: transformers is not installed"
    device, model.trunk.compute_dtype = model.head.device, torch.float32
    ours = model.trunk.states(pack([([], [ids]) for ids in texts.values()]).to(device))
    model.to("meta")
    try:
        version, theirs, their_ids = transformers_states(checkpoint.directory, texts, device)
    except Exception as error:  # whatever another library raises
        return {}, f"not compared: transformers fails on this directory ({one_line(error)})"
    lengths = theirs.norm(dim=1).clamp(min=1e-12)
    difference = float(((ours - theirs).norm(dim=1) / lengths).max())
    if not math.isfinite(difference):
        raise FloatingPointError(
            f"{checkpoint.directory}: a hidden state is not finite;"
            " these weights or their config.json are damaged"
        )
    same_ids, words = compare_ids(our_ids(checkpoint.tokenizer), their_ids, checkpoint.tokenizer)
    agrees = difference < AGREE and same_ids is not False
    figures = {
        "transformers": version,
        "difference": difference,
        "same_ids": same_ids,
        "agrees": agrees,
    }
    line = (
        f"transformers {version}, fp32: hidden states differ by at most {difference:.1e} of their"
        f" length (allowed {AGREE:g}); {words}"
    )
    return figures, line if agrees else f"FAILED: {line}"


# Texts that tokenizers read differently if they clean, normalize or split differently.
ODD_TEXTS = {
    "paragraph": PARAGRAPH,
    "white space": "  two  spaces,\n\n\ta tab and a line\r\n end ",
    "letters": "Grüße, İstanbul, ﬁn, e\u0301, 你好, ①, 🌱👩‍🚀",
    "code": "if x<1: print('a-b', [1], 0xFF, 1000000)",
}
CONVERSATION = [
    {"role": "user", "content": "What is 2+2? "},
    {"role": "assistant", "content": "It is 4."},
]

Ids = dict[str, list[int]]  # by the name of a text


def our_ids(tokenizer: Tokenizer) -> Ids:
    """Our ids of ODD_TEXTS, and of a conversation by the chat template."""
    ids: Ids = dict(zip(ODD_TEXTS, tokenizer.encode(list(ODD_TEXTS.values()))))
    try:
        rendered = tokenizer.render(CONVERSATION)
    except InputError:  # the template wants other messages
        return ids
    return ids | {"conversation": tokenizer.encode([rendered], rendered=True)[0]}


def compare_ids(ours: Ids, theirs: Ids, tokenizer: Tokenizer) -> tuple[bool | None, str]:
    """Whether two tokenizers read all texts alike (None: nothing to compare), and that in words.

    What theirs adds behind a text, an EOS for example, is no part of it. In front of a conversation
    transformers adds no BOS that the template does not write.
    """
    compared = [name for name in ours if name in theirs]
    if not compared:
        return None, "its tokenizer was not compared: it opens none here"
    remarks = [f"the same token ids of {', '.join(compared)}"]
    for name in compared:
        mine, other = ours[name], theirs[name]
        if name == "conversation" and tokenizer.bos and mine == tokenizer.bos + other:
            remarks.append("in front of a conversation it adds no BOS, as is done here")
        elif other[: len(mine)] != mine:
            return False, f"token ids of the {name} differ{first_difference(mine, other)}"
    added = theirs["paragraph"][len(ours["paragraph"]) :] if "paragraph" in compared else []
    if added:
        remarks.append(f"it adds {added} behind a text")
    return True, "; ".join(remarks)


def first_difference(ours: list[int], theirs: list[int]) -> str:
    """Where two lists of ids begin to differ, in words."""
    place = 0
    while place < min(len(ours), len(theirs)) and ours[place] == theirs[place]:
        place += 1
    return (
        f" from place {place} on: theirs {theirs[place : place + 4]},"
        f" ours {ours[place : place + 4]}"
    )


def transformers_states(
    directory: Path, texts: Mapping[str, list[int]], device: torch.device
) -> tuple[str, Tensor, Ids]:
    """transformers' version, its hidden states and its token ids.

    The states are final ones of all texts, (N, D). The ids are those of ODD_TEXTS and of the
    conversation, as far as transformers has a tokenizer, and a template, for this directory.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32, **local)
    model = model.to(device).eval()
    states = torch.cat([last_states(model, ids, device) for ids in texts.values()])
    ids: Ids = {}
    # Without a tokenizer of a class that it knows, or without a template, it raises what it likes.
    with suppress(Exception):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **local)
        ids |= {name: tokenizer(text).input_ids for name, text in ODD_TEXTS.items()}
        ids["conversation"] = list(
            tokenizer.apply_chat_template(CONVERSATION, return_dict=False)  # type: ignore[arg-type]
        )
    return transformers.__version__, states, ids


def last_states(model: Callable, ids: list[int], device: torch.device) -> Tensor:
    """Final hidden states of one text by a model of transformers: (N, D)."""
    tokens = torch.tensor([ids], device=device)
    return model(tokens, return_dict=True).last_hidden_state[0]
