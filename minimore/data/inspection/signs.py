"""Signs: what one pair shows that may be wrong with it, read from its texts alone.

Each is a guess from the form of a text. A single one means little, and thousands mean something.
"""

import re
from collections.abc import Iterator, Sequence

from ...model.tokenizer import Tokenizer
from ..dialogues import NEXT_TURN
from ..forms import Pair
from ..prompts import normalised

SHORTEST_CUT = 80  # characters of a text that may count as cut off
REFUSAL_WITHIN = 120  # characters from the beginning of a response

REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:very |so |really )?(?:sorry|unable|not able)\b"
    r"|\bI (?:can't|cannot|can not|won't|will not|don't feel comfortable)\b"
    r"|\b[Aa]s an AI\b|\bI apologi[sz]e\b"
)

# What begins or ends a turn in the chat templates of families of models.
TEMPLATE_MARKS = (
    *("<|im_start|>", "<|im_end|>"),  # ChatML: Qwen, Yi
    *("[INST]", "[/INST]", "<<SYS>>"),  # Llama 2, Mistral
    *("<|start_header_id|>", "<|eot_id|>"),  # Llama 3
    *("<start_of_turn>", "<end_of_turn>"),  # Gemma
    *("<|user|>", "<|assistant|>", "<|prompter|>"),  # Zephyr, Tulu, Phi-3, OpenAssistant
    *("### Instruction:", "### Response:"),  # Alpaca
    *("GPT4 Correct User:", "GPT4 Correct Assistant:"),  # OpenChat
)
# Names of special tokens in the vocabularies of many models, beside the marks of templates.
SPECIAL_NAMES = (
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "[PAD]", "[CLS]", "[SEP]", "[UNK]"),
    *("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|endofprompt|>"),
)


def signs_of(pair: Pair, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """The names of the signs that a pair shows, each once.

    tokenizer: of the model that is to read the pair, if one is known.
    """
    responses = pair.said or (pair.chosen, pair.rejected)
    if pair.is_blank:
        yield "blank"
    if normalised(responses[0]) == normalised(responses[1]):
        yield "identical"
    if not pair.prompt.strip():
        yield "no prompt"
    elif all(response.strip().startswith(pair.prompt.strip()) for response in responses):
        yield "prompt repeated"
    if any(map(is_refusal, responses)):
        yield "refusals"
    if any(map(is_cut_off, responses)):
        yield "cut off"
    if any(NEXT_TURN.search(response) for response in responses):
        yield "further turns"
    texts = responses if pair.rendered else (pair.prompt, *responses)
    yield from marks_in(texts, tokenizer)


def marks_in(texts: Sequence[str], tokenizer: Tokenizer | None) -> Iterator[str]:
    """Signs of marks that a template or a tokenizer writes, and no human does.

    A mark that the model's own tokenizer knows is the name of a special token, which is read as
    text; any other one belongs to the template of another family.
    """
    text = "\n".join(texts)
    own = tokenizer.markers if tokenizer else []
    if any(mark in text for mark in TEMPLATE_MARKS if mark not in own):
        yield "template marks"
    if any(name in text for name in (*SPECIAL_NAMES, *own)):
        yield "special tokens"


def is_refusal(response: str) -> bool:
    """Whether a response begins by declining.

    >>> is_refusal(" I'm sorry, but I can't help with that."), is_refusal("Sure: first, ...")
    (True, False)
    """
    return REFUSAL.search(response[:REFUSAL_WITHIN].replace("\u2019", "'")) is not None


def is_cut_off(response: str) -> bool:
    """Whether a longer response ends inside a sentence: with a letter, a digit or a comma."""
    text = response.rstrip()
    return len(text) > SHORTEST_CUT and (text[-1].isalnum() or text[-1] == ",")
