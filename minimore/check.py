"""What is in this checkpoint, and does it work here? The `check` verb: one page before hours of training.

A trained language model reads PARAGRAPH with a low perplexity and is lost when its words stand in alphabetical order. A rotary base,
a norm or a window that is not the model's own shows there at once, without any other program to compare with. Where transformers is
installed, token ids, hidden states and rewards are compared with its own.
"""

import importlib.util
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .attention import pack
from .checkpoint import Checkpoint, pad_id
from .families import LANGUAGE_HEADS
from .model import Trunk, rotary_angles
from .options import InputError, one_line, option, refuse_existing, write_json
from .policy import LanguageModel, token_losses
from .reward import ModelOptions, RewardModel, load_reward_model, text_rewards

PARAGRAPH = (
    "When the ferry stopped running, the people of the island had to decide what to do with the old harbour. Some wanted to fill it "
    "with stones and plant a row of trees along the shore. Others said that a harbour without boats is still a place where children "
    "learn to swim and where the wind can be heard before it reaches the village. In the end they did nothing for a year, and during "
    "that year a family of seals moved in. Visitors came to see the animals, a small cafe opened next to the empty ticket office, and "
    "nobody spoke about stones any more. The mayor likes to say that it was the best decision the council never made.")
QUESTION = "There is candle wax on my tablecloth. How do I get it out?"
ANSWERS = {
    "helpful": "Let the wax get hard and lift off what you can with a blunt knife. Then lay kitchen paper over and under the stain and "
               "go over it with a warm iron: the paper soaks up the rest. Wash the cloth as usual.",
    "unhelpful": "Tablecloths are made of cloth. I do not like candles.",
}
AGREE = 1e-3                             # largest relative difference of a hidden state that fp32 rounding explains in a deep model


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ModelOptions):
    """What `check` takes."""
    parity: str = option("auto", choices=("auto", "none"), help="auto compares with transformers if it is installed, in fp32, one model in memory at a time")
    json: str | None = option(None, value="OUT.json", help="write all figures here; must not exist")


def check(options: CheckOptions) -> int:
    """Print the page, line by line; returns 1 if transformers computes something else."""
    refuse_existing(options.json, "--json")
    checkpoint, report = Checkpoint(options.model), {"model": options.model}

    def say(title, figures, line):
        report[title] = figures
        print(f"{title:10} {line}", flush=True)

    say("family", {"model_type": checkpoint.json["model_type"]} | asdict(checkpoint.config), family_line(checkpoint))
    say("weights", *weights(checkpoint))
    say("tokenizer", *tokenizer(checkpoint))
    say("template", *template(checkpoint))
    texts = example_ids(checkpoint)
    model = load_reward_model(checkpoint, options)
    say("memory", *memory(model.trunk, texts["paragraph"], options.micro_tokens))
    say("language", *language(checkpoint, model.trunk, texts))
    say("rewards", *rewards(checkpoint, model, texts))
    say("parity", *parity(checkpoint, model, texts, options.parity))
    if options.json:
        write_json(options.json, report)
    return 1 if report["parity"].get("agrees") is False else 0


# ---- what the files say. Each function returns figures for --json and a line for the reader ----------------------------

def family_line(checkpoint: Checkpoint) -> str:
    """model_type and every field of ModelConfig that is set."""
    fields = asdict(checkpoint.config) | {"windows": sorted({w for w in checkpoint.config.windows if w})}
    return f"{checkpoint.json['model_type']}: " + ", ".join(k if v is True else f"{k} {v}" for k, v in fields.items() if v)


def weights(checkpoint: Checkpoint) -> tuple[dict, str]:
    """Files, bytes, types and heads."""
    keys = checkpoint.tensors.files
    files, kinds = sorted({str(path.name) for path in keys.values()}), checkpoint.tensors.kinds()
    size = sum((checkpoint.directory / name).stat().st_size for name in files)
    heads = [key for key in (*LANGUAGE_HEADS, "score.weight") if key in keys]
    return {"files": files, "bytes": size, "types": kinds, "heads": heads}, \
        f"{files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}, {size / 1e9:.3f} GB, {' and '.join(kinds)}; heads: {', '.join(heads) or 'none'}"


def tokenizer(checkpoint: Checkpoint) -> tuple[dict, str]:
    """Size, BOS, EOS, and the pad id that a saved reward model gets."""
    t = checkpoint.tokenizer
    try:
        pad = pad_id(checkpoint)
    except InputError:
        pad = None
    figures = {"ids": t.size, "bos": t.bos_text, "eos": t.special.get("eos_token"), "pad_id": pad}
    return figures, (f"{t.size:,} ids for {checkpoint.config.vocabulary:,} rows; in front of a text {t.bos_text!r}; EOS {figures['eos']!r}; "
                     + (f"pad id when saved {pad}" if pad is not None else "no id left for padding, so training is refused"))


def template(checkpoint: Checkpoint) -> tuple[str, str]:
    """A short conversation as the model will read it."""
    t, turns = checkpoint.tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = t.render(turns)
    except InputError as error:
        return str(error), str(error)
    return text, ("none; plainly written: " if t.template is None else "") + repr(text)


def example_ids(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Token ids of the paragraph, of its words in alphabetical order and of the two answers; no longer than learned positions allow."""
    c = checkpoint.config
    texts = {"paragraph": PARAGRAPH, "alphabetical": " ".join(sorted(PARAGRAPH.split()))} | {
        name: f"\n\nHuman: {QUESTION}\n\nAssistant: {answer}" for name, answer in ANSWERS.items()}
    most = c.learned_positions - c.position_offset if c.learned_positions else 10 ** 6
    ids = dict(zip(texts, (i[:most] for i in checkpoint.tokenizer.encode(list(texts.values())))))
    if min(map(len, ids.values())) < 2:
        raise InputError(f"{checkpoint.directory}: the tokenizer makes fewer than two tokens of an English paragraph; use the model's own tokenizer")
    return ids


# ---- what the model does -----------------------------------------------------------------------------------------------

def memory(trunk: Trunk, tokens: list[int], micro_tokens: int) -> tuple[dict, str]:
    """Bytes by arithmetic, and what one block keeps for backward, counted on these tokens (fewer bytes a token on some routes of attention)."""
    c, width = trunk.c, trunk.compute_dtype.itemsize
    parameters = sum(p.numel() for p in trunk.parameters())
    block = saved_bytes(trunk, tokens) / len(tokens)
    figures = {"parameters": parameters, "scoring": 4 * parameters + micro_tokens * width * (4 * c.width + (3 if c.gated else 2) * c.mlp_width),
               "training": 16 * parameters, "activations": {"none": c.blocks * block * micro_tokens, "full": (c.blocks * c.width * width + block) * micro_tokens}}
    gb = lambda b: f"{b / 1e9:.2f} GB"
    return figures, (f"{parameters:,} parameters without heads; about {gb(figures['scoring'])} to score; to train {gb(figures['training'])} (weights, gradients, two "
                     f"moments), and for {micro_tokens:,} tokens at a time {gb(figures['activations']['none'])}, or {gb(figures['activations']['full'])} with --recompute full")


def saved_bytes(trunk: Trunk, tokens: list[int]) -> int:
    """Bytes that autograd keeps of one block's forward pass, parameters not counted."""
    stream, kept = pack([([], [tokens])]).to(trunk.embedding.weight.device), {}
    own = {p.untyped_storage().data_ptr() for p in trunk.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = trunk.embedding(stream.tokens).detach().to(trunk.compute_dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = trunk.blocks[0](x, rotary_angles(trunk.c, stream.positions), stream)         # alive until all is counted
    return sum(kept.values()) if y.requires_grad else 0


@torch.no_grad()
def language(checkpoint: Checkpoint, trunk: Trunk, texts: dict) -> tuple[dict | None, str]:
    """Perplexity of the paragraph, and of its words in alphabetical order."""
    unembedding = checkpoint.unembedding(trunk)
    if unembedding is None:
        return None, "no language-model head in these files, so no perplexity"
    model = LanguageModel(trunk, unembedding)
    nats = {name: token_losses(model, texts[name]).double().cpu() for name in ("paragraph", "alphabetical")}
    figures = {name: float(n.mean().exp()) for name, n in nats.items()}
    figures["bits_per_byte"] = float(nats["paragraph"].sum()) / math.log(2) / len(PARAGRAPH.encode())
    lost = figures["alphabetical"] < 2 * figures["paragraph"]
    return figures, (f"perplexity of a plain paragraph {figures['paragraph']:.2f} ({figures['bits_per_byte']:.2f} bits a byte), of its words in alphabetical order "
                     f"{figures['alphabetical']:.2f}" + (": order hardly matters to this model; it is untrained, or something here is not its own" if lost else ""))


def rewards(checkpoint: Checkpoint, model: RewardModel, texts: dict) -> tuple[dict, str]:
    """The reward of a helpful and of an unhelpful answer."""
    found = dict(zip(ANSWERS, text_rewards(model, [texts[name] for name in ANSWERS]).tolist()))
    return found, ", ".join(f"{name} answer {r:.4f}" for name, r in found.items()) + ("" if checkpoint.has_head else "; the head is untrained, so this is chance")


# ---- what transformers says --------------------------------------------------------------------------------------------

@torch.no_grad()
def parity(checkpoint: Checkpoint, model: RewardModel, texts: dict, wanted: str) -> tuple[dict, str]:
    """Token ids, and the largest relative difference of a token's final hidden state. The model is given up, to make room for theirs."""
    if wanted == "none" or not importlib.util.find_spec("transformers"):
        return {}, "not compared: " + ("--parity none" if wanted == "none" else "transformers is not installed")
    device, model.trunk.compute_dtype = model.head.device, torch.float32
    ours = LanguageModel(model.trunk, model.trunk.embedding.weight).states(pack([([], [ids]) for ids in texts.values()]))
    model.to("meta")
    try:
        version, theirs, ids = transformers_states(checkpoint.directory, texts, device)
    except Exception as error:                   # whatever another library raises
        return {}, f"not compared: transformers does not open it ({one_line(error)})"
    difference = float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-12)).max())
    same = None if ids is None else ids[:len(texts["paragraph"])] == texts["paragraph"]
    figures = {"transformers": version, "difference": difference, "agrees": difference < AGREE, "same_ids": same}
    return figures, (("" if figures["agrees"] else "FAILED: ") + f"transformers {version}: hidden states differ by at most {difference:.1e} of their length (allowed {AGREE:g}); token ids "
                     + {True: "are the same", False: f"differ: theirs begin {ids and ids[:8]}, ours {texts['paragraph'][:8]}", None: "not compared, it opens no tokenizer"}[same])


def transformers_states(directory, texts: dict, device) -> tuple[str, Tensor, list[int] | None]:
    """Its version, its final hidden states (N, D) of all texts, and its ids of the paragraph if it has a tokenizer for this directory."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False).to(device).eval()
    states = torch.cat([model(torch.tensor([ids], device=device)).last_hidden_state[0] for ids in texts.values()])
    try:
        ids = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)(PARAGRAPH).input_ids
    except Exception:                            # a tokenizer.json without a tokenizer_config.json, say
        ids = None
    return transformers.__version__, states, ids
