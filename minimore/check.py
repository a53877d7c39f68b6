"""What is in this checkpoint, and does it work here? The `check` verb: one page before hours of training.

A trained language model reads PARAGRAPH with a low perplexity and is lost when its words stand in alphabetical order; a norm or a
rotary base that is not its own brings the first figure towards the second, without any other program to compare with. Where
transformers is installed, token ids and hidden states are compared with its own, which shows smaller mistakes.

Each `check_...` function returns figures, for --json, and a line for the reader.
"""

import importlib.util
import math
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .alignment.policy import LanguageModel, token_losses
from .engine.cost import PairShape, Workload, in_bytes, memory_of
from .engine.choose import is_exact, recipes
from .engine.recipe import Recipe
from .files import one_line, refuse_existing, write_json
from .model.attention import pack
from .model.checkpoint import Checkpoint, pad_id
from .model.families import LANGUAGE_HEADS
from .model.trunk import Trunk
from .options import InputError, option
from .reward import ModelOptions, RewardModel, load_reward_model, text_rewards

PARAGRAPH = (
    "When the ferry stopped running, the people of the island had to decide what to do with the old harbour. Some wanted to fill it "
    "with stones and plant a row of trees along the shore. Others said that a harbour without boats is still a place where children "
    "learn to swim and where the wind can be heard before it reaches the village. In the end they did nothing for a year, and during "
    "that year a family of seals moved in. Visitors came to see the animals, a small cafe opened next to the empty ticket office, and "
    "nobody spoke about stones any more. The mayor likes to say that it was the best decision the council never made."
)
QUESTION = "There is candle wax on my tablecloth. How do I get it out?"
ANSWERS = {
    "helpful": "Let the wax get hard and lift off what you can with a blunt knife. Then lay kitchen paper over and under the stain and "
    "go over it with a warm iron: the paper soaks up the rest. Wash the cloth as usual.",
    "unhelpful": "Tablecloths are made of cloth. I do not like candles.",
}
AGREE = 1e-3  # largest relative difference of a hidden state that fp32 rounding explains in a deep model


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ModelOptions):
    """What `check` takes."""

    model: str = option(value="MODEL", help="checkpoint directory or hub name", positional=True)
    parity: str = option(
        "auto",
        choices=("auto", "none"),
        help="auto compares with transformers if it is installed, in fp32, one model in memory at a time",
    )
    json: str | None = option(None, value="OUT.json", help="write all figures here; must not exist")


def check(options: CheckOptions) -> int:
    """Print the page, line by line; returns 1 if transformers reads the texts or computes the states otherwise."""
    refuse_existing(options.json, "--json")
    checkpoint, report = Checkpoint(options.model), {"model": options.model}

    def say(title, result):
        report[title], line = result
        print(f"{title:10} {line}", flush=True)

    say("family", check_family(checkpoint))
    say("weights", check_weights(checkpoint))
    say("tokenizer", check_tokenizer(checkpoint))
    say("template", check_template(checkpoint))
    texts = example_ids(checkpoint)
    model = load_reward_model(checkpoint, options, lambda name, value: value)  # fp32, for parity
    say("memory", check_memory(model.trunk, options.micro_tokens))
    say("language", check_language(checkpoint, model.trunk, texts))
    say("rewards", check_rewards(checkpoint, model, texts))
    say(
        "parity",
        check_parity(checkpoint, model, texts)
        if options.parity == "auto"
        else ({}, "not compared: --parity none"),
    )
    if options.json:
        write_json(options.json, report)
    if report["parity"].get("agrees") is False:
        print(
            "minimore check: transformers reads these texts, or computes this model, otherwise: see the line parity",
            file=sys.stderr,
        )
        return 1
    return 0


def example_ids(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Token ids of the paragraph, of its words in alphabetical order and of the two answers; no longer than learned positions allow."""
    c = checkpoint.config
    texts = {"paragraph": PARAGRAPH, "alphabetical": " ".join(sorted(PARAGRAPH.split()))} | {
        name: f"\n\nHuman: {QUESTION}\n\nAssistant: {answer}" for name, answer in ANSWERS.items()
    }
    most = c.learned_positions - c.position_offset if c.learned_positions else None
    ids = {
        name: i[:most] for name, i in zip(texts, checkpoint.tokenizer.encode(list(texts.values())))
    }
    if min(map(len, ids.values())) < 2:
        raise InputError(
            f"{checkpoint.directory}: an English paragraph becomes fewer than two tokens; expected the model's own tokenizer, and room for two positions"
        )
    return ids


# ---- what the files say ------------------------------------------------------------------------------------------------


def check_family(checkpoint: Checkpoint) -> tuple[dict, str]:
    """model_type and every field of ModelConfig that is set."""
    fields = asdict(checkpoint.config)
    shown = fields | {"windows": sorted({w for w in checkpoint.config.windows if w})}
    if shown["rope_factor"] == 1:
        del shown["rope_factor"]
    kind = checkpoint.json["model_type"]
    return {"model_type": kind} | fields, f"{kind}: " + ", ".join(
        k if v is True else f"{k} {v}" for k, v in shown.items() if v
    )


def check_weights(checkpoint: Checkpoint) -> tuple[dict, str]:
    """Files, bytes, types and heads."""
    keys = checkpoint.tensors.files
    files, kinds = sorted({path.name for path in keys.values()}), checkpoint.tensors.kinds()
    size = sum((checkpoint.directory / name).stat().st_size for name in files)
    heads = [key for key in (*LANGUAGE_HEADS, "score.weight") if key in keys]
    more = f" and {len(files) - 1} more" if files[1:] else ""
    return (
        {"files": files, "bytes": size, "types": kinds, "heads": heads},
        f"{files[0]}{more}, {in_bytes(size)}, {' and '.join(kinds)}; heads stored: {', '.join(heads) or 'none'}",
    )


def check_tokenizer(checkpoint: Checkpoint) -> tuple[dict, str]:
    """Size, BOS, EOS, and the pad id that a saved reward model gets."""
    t = checkpoint.tokenizer
    try:
        pad = pad_id(checkpoint)
    except InputError:
        pad = None
    figures = {"ids": t.size, "bos": t.bos_text, "eos": t.special.get("eos_token"), "pad_id": pad}
    quoted = lambda text: "nothing" if text is None else repr(text)
    saved = (
        f"a saved reward model pads with id {pad}"
        if pad is not None
        else "no id is left for padding, so training is refused"
    )
    return (
        figures,
        f"{t.size:,} ids for {checkpoint.config.vocabulary:,} rows; in front of a text: {quoted(t.bos_text)}; named EOS: {quoted(figures['eos'])}; {saved}",
    )


def check_template(checkpoint: Checkpoint) -> tuple[str, str]:
    """A short conversation as the model will read it."""
    t, turns = (
        checkpoint.tokenizer,
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    )
    try:
        text = t.render(turns)
    except InputError as error:
        return str(error), str(error)
    shown = repr(text) if len(text) < 600 else f"{text[:600]!r} ... ({len(text):,} characters)"
    return text[:100_000], ("none; plainly written: " if t.template is None else "") + shown


# ---- what the model does -----------------------------------------------------------------------------------------------


def check_memory(trunk: Trunk, micro_tokens: int) -> tuple[dict, str]:
    """Bytes by arithmetic (cost.py), of a step of 80 pairs of 342 unique tokens; `plan` says more."""
    c, width = trunk.c, trunk.compute_dtype.itemsize
    parameters, flash = (
        sum(p.numel() for p in trunk.parameters()),
        trunk.embedding.weight.is_cuda and width == 2,
    )
    work = Workload((PairShape(140, 101, 101),) * 80, 1, 27_360)
    at_once = (
        4 * c.width + (3 if c.gated else 2) * c.mlp_width
    )  # numbers a token in the widest place of a forward pass, the MLP
    scoring = width * parameters + micro_tokens * width * at_once
    plain = memory_of(c, work, Recipe(micro_tokens=micro_tokens), width, flash).peak
    exact = [r for r in recipes({"micro_tokens": micro_tokens}) if is_exact(r, width)]
    least, recipe = min(
        ((memory_of(c, work, r, width, flash).peak, r) for r in exact), key=lambda pair: pair[0]
    )
    figures = {
        "parameters": parameters,
        "scoring": scoring,
        "training": plain,
        "leanest": least,
        "recipe": str(recipe),
    }
    return figures, (
        f"{parameters:,} parameters without heads; about {in_bytes(scoring)} to score ({micro_tokens:,} tokens at a time); to train (80 pairs a step) {in_bytes(plain)} "
        f"plainly, {in_bytes(least)} with {recipe}; see minimore plan"
    )


@torch.no_grad()
def check_language(checkpoint: Checkpoint, trunk: Trunk, texts: dict) -> tuple[dict | None, str]:
    """Perplexity of the paragraph, and of its words in alphabetical order."""
    unembedding = checkpoint.unembedding(trunk)
    if unembedding is None:
        return None, "not measured: these files hold no language-model head" + (
            ", as a reward model's do not" if checkpoint.has_head else ""
        )
    model = LanguageModel(trunk, unembedding)
    nats = {
        name: token_losses(model, texts[name]).double().cpu()
        for name in ("paragraph", "alphabetical")
    }
    figures = {name: float(n.mean().exp()) for name, n in nats.items()}
    if not all(map(math.isfinite, figures.values())):
        raise FloatingPointError(
            f"{checkpoint.directory}: the perplexity of a plain paragraph is not finite; these weights or their config.json are damaged"
        )
    whole = len(texts["paragraph"]) == len(checkpoint.tokenizer.encode([PARAGRAPH])[0])
    figures["bits_per_byte"] = (
        float(nats["paragraph"].sum()) / math.log(2) / len(PARAGRAPH.encode()) if whole else None
    )
    lost = figures["alphabetical"] < 1.25 * figures["paragraph"]
    bits = (
        f"{figures['bits_per_byte']:.2f} bits a byte"
        if whole
        else f"its first {len(texts['paragraph'])} tokens"
    )
    return figures, (
        f"perplexity of a plain paragraph {figures['paragraph']:.2f} ({bits}), of its words in alphabetical order {figures['alphabetical']:.2f}"
        + (
            ": order hardly matters to this model; it is untrained, or something here is not its own"
            if lost
            else ""
        )
    )


def check_rewards(checkpoint: Checkpoint, model: RewardModel, texts: dict) -> tuple[dict, str]:
    """The reward of a helpful and of an unhelpful answer."""
    found = dict(zip(ANSWERS, text_rewards(model, [texts[name] for name in ANSWERS]).tolist()))
    line = ", ".join(f"{name} answer {reward:.4f}" for name, reward in found.items())
    return found, line + (
        "" if checkpoint.has_head else "; the head is untrained, so their order is chance"
    )


# ---- what transformers says --------------------------------------------------------------------------------------------


@torch.no_grad()
def check_parity(checkpoint: Checkpoint, model: RewardModel, texts: dict) -> tuple[dict, str]:
    """Token ids of the paragraph, and the largest relative difference of a token's final hidden state, in fp32.

    Comes last: our model is given up, to make room for theirs.
    """
    if not importlib.util.find_spec("transformers"):
        return {}, "not compared: transformers is not installed"
    device, model.trunk.compute_dtype = model.head.device, torch.float32
    ours = model.trunk.states(pack([([], [ids]) for ids in texts.values()]).to(device))
    model.to("meta")
    try:
        version, theirs, ids = transformers_states(checkpoint.directory, texts, device)
    except Exception as error:  # whatever another library raises
        return {}, f"not compared: transformers fails on this directory ({one_line(error)})"
    difference = float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-12)).max())
    if not math.isfinite(difference):
        raise FloatingPointError(
            f"{checkpoint.directory}: a hidden state is not finite; these weights or their config.json are damaged"
        )
    same, words = compare_ids(checkpoint, ids)
    agrees = difference < AGREE and same is not False
    return (
        {"transformers": version, "difference": difference, "same_ids": same, "agrees": agrees},
        ("" if agrees else "FAILED: ")
        + f"transformers {version}, fp32: hidden states differ by at most {difference:.1e} of their length (allowed {AGREE:g}); {words}",
    )


def compare_ids(checkpoint: Checkpoint, theirs: list[int] | None) -> tuple[bool | None, str]:
    """Whether two tokenizers read the paragraph alike; what theirs adds behind a text, an EOS say, is no part of it."""
    ours = checkpoint.tokenizer.encode([PARAGRAPH])[0]
    if theirs is None:
        return None, "its tokenizer was not compared: it opens none here"
    if theirs == ours:
        return True, f"the same {len(ours)} token ids"
    if theirs[: len(ours)] == ours:
        return True, f"the same {len(ours)} token ids, behind which it adds {theirs[len(ours) :]}"
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs))
    )
    return (
        False,
        f"token ids differ from place {place} on: theirs {theirs[place : place + 4]}, ours {ours[place : place + 4]}",
    )


def transformers_states(directory, texts: dict, device) -> tuple[str, Tensor, list[int] | None]:
    """Its version, its final hidden states (N, D) of all texts, and its ids of the paragraph if it has a tokenizer for this directory."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = (
        transformers.AutoModel.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        .to(device)
        .eval()
    )
    states = torch.cat(
        [
            model(torch.tensor([ids], device=device), return_dict=True).last_hidden_state[0]
            for ids in texts.values()
        ]
    )
    try:
        ids = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )(PARAGRAPH).input_ids
    except Exception:  # a tokenizer.json that it knows no class for, say
        ids = None
    return transformers.__version__, states, ids
