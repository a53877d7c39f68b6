"""Samples of a policy: n responses to every prompt of a file. The step `minimore align sample`.

Prompts are taken some at a time, always the same ones together, and every such portion is on the
disk before the next one begins. A killed command goes on behind the last one with `--resume`.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checksums import file_checksum, records_written_whole
from ..data.dialogues import prompt_end
from ..data.forms import texts_of
from ..data.messages import is_conversation, messages_of
from ..data.pairs import encode, refuse_doubled_bos
from ..data.prompt_keys import with_prompt
from ..data.records import Record, json_line, read_records
from ..data.values import MOST_RESPONSES, string_of
from ..files import refuse_existing
from ..model.checkpoint import Checkpoint, ids_of_eos
from ..model.tokenizer import Tokenizer
from ..options import COUNT, Range, check_ranges, option, require
from ..reward import ModelOptions, PositionOptions, check_length
from .generate import Sample, Sampling, Stop, generate
from .policy import LanguageModel, open_policy, require_language_model
from .portions import Unfinished, alone, begin_or_continue

LOWEST_TEMPERATURE = 1e-3  # besides 0; below it logits may become infinite


@dataclass(frozen=True, kw_only=True)
class SampleOptions(PositionOptions, ModelOptions):
    """What `align sample` takes."""

    input: str = option(
        value="IN.jsonl",
        help="JSON lines (.gz too) with prompts: strings or messages, with or without responses; "
        "each prompt is taken once",
    )
    output: str = option(value="OUT.jsonl", help="JSON lines file to write; must not exist")
    samples: int = option(
        4, within=Range(least=1, most=MOST_RESPONSES), help="responses to every prompt"
    )
    temperature: float = option(
        1.0, within=Range(least=0), help="the logits are divided by it; 0 takes the likeliest token"
    )
    top_p: float = option(
        1.0,
        within=Range(above=0, most=1),
        help="draw from the fewest tokens that have this share of the probability",
    )
    top_k: int = option(
        0, within=Range(least=0), help="draw from so many tokens, the likeliest ones; 0 is all"
    )
    max_new_tokens: int = option(256, within=COUNT, help="tokens of a response at most")
    max_length: int = option(512, within=COUNT, help="tokens of a prompt, cut on the left")
    stop: tuple[str, ...] = option(
        (), repeat=True, value="TEXT", help="a response ends in front of this text"
    )
    batch_size: int = option(
        64,
        within=COUNT,
        help="samples that are written at a time; each remembers its prompt and what it has"
        " written, which takes 0.5 MB a token of LLaMA2-7B in bfloat16",
    )
    chat: bool = option(False, help="read prompts that are strings as messages of a user")
    resume: bool = option(
        False, help="continue a command that was killed: the same command again, plus this"
    )


class Prompt(NamedTuple):
    """A prompt as it is in the file, "file:line", as text, and as ids.

    has_space: the form of its conversation puts a space between it and what is said next.
    """

    value: Any
    where: str
    text: str
    ids: list[int]
    has_space: bool = False


def sample(options: SampleOptions) -> None:
    """Write {"prompt", "responses", "finished"} for every prompt, in the order of the file.

    finished: whether a response ended by itself. `minimore score` reads such files.
    """
    check_ranges(options)
    require(all(options.stop), '--stop "": is empty; expected some text')
    require(
        options.temperature == 0 or options.temperature >= LOWEST_TEMPERATURE,
        f"--temperature {options.temperature}: expected 0, or at least {LOWEST_TEMPERATURE}",
    )
    refuse_existing(options.output)
    checkpoint = Checkpoint(options.model)
    check_length(
        checkpoint.config,
        options.max_length + options.max_new_tokens,
        Path(options.model),
        "--max-length and --max-new-tokens together",
        options.beyond_positions,
    )
    require_language_model(checkpoint)
    prompts = read_prompts(options, checkpoint.tokenizer)
    path = Path(f"{options.output}.unfinished")
    with alone(path):
        work = written_in_portions(path, prompts, checkpoint, options)
        with records_written_whole(options.output) as file:
            for prompt, record in zip(prompts, work.stored(), strict=True):
                file.write(json_line(record, prompt.where) + "\n")
        work.remove()
    print(f"{options.output}: {options.samples} responses to each of {len(prompts)} prompts")


def written_in_portions(
    path: Path, prompts: Sequence[Prompt], checkpoint: Checkpoint, options: SampleOptions
) -> Unfinished:
    """The unfinished file with the samples of all prompts; what is there already stays."""
    portion = max(1, options.batch_size // options.samples)
    identity = identity_of(options, checkpoint)
    work = begin_or_continue(path, identity, options.resume, portion)
    model = open_policy(checkpoint, options)
    began, tokens = time.monotonic(), 0
    for start in range(work.records, len(prompts), portion):
        part = prompts[start : start + portion]
        records, count = sampled(model, checkpoint, part, start, options)
        work.append(records)
        tokens += count
        speed = tokens / (time.monotonic() - began)
        print(
            f"{start + len(part)} of {len(prompts)} prompts, {speed:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
    return work


def identity_of(options: SampleOptions, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the samples depend on."""
    changes_nothing = ("resume", "beyond_positions")
    named = {key: value for key, value in asdict(options).items() if key not in changes_nothing}
    files = {"model": checkpoint.identity(), "input": file_checksum(Path(options.input))}
    return json.loads(json.dumps(named | {"of": files}))


# ---- prompts -------------------------------------------------------------------------------------


def read_prompts(options: SampleOptions, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a file, each once."""
    prompts: dict[str, Prompt] = {}
    for where, record in read_records(options.input):
        value = prompt_of(record, where, options.chat)
        json_line({"prompt": value}, where)  # what cannot be written again is refused now
        is_rendered = has_space = False
        if options.chat or is_conversation(value):
            messages = messages_of(value, f'{where}: "prompt"', tokenizer, "user")
            text = tokenizer.render(messages, prompt=True)
            is_rendered = tokenizer.template is not None
            has_space = not is_rendered
        else:
            text = string_of(value, f'{where}: "prompt"', "a string, or messages")
        refuse_doubled_bos(text, is_rendered, where, tokenizer)
        if text not in prompts:
            (ids,), _ = encode([text], tokenizer, options.max_length, [is_rendered])
            require(len(ids), f"{where}: the prompt is empty; expected some text")
            prompts[text] = Prompt(value, where, text, ids.tolist(), has_space)
    require(prompts, f"{options.input}: is empty; expected at least one prompt")
    return list(prompts.values())


def prompt_of(record: Record, where: str, chat: bool) -> Any:
    """What stands in front of the responses of a record."""
    if "prompt" not in record and ("chosen" in record or "text" in record):
        if "chosen" in record:
            sides = [record["chosen"], record.get("rejected", record["chosen"])]
        else:
            sides = texts_of(record, where)
        if all(isinstance(side, str) for side in sides) and prompt_end(sides):
            return sides[0][: prompt_end(sides)]
    record = with_prompt(record, where, chat)
    require("prompt" in record, f'{where}: "prompt" is missing; found keys: {", ".join(record)}')
    return record["prompt"]


# ---- responses -----------------------------------------------------------------------------------


def sampled(
    model: LanguageModel,
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    start: int,
    options: SampleOptions,
) -> tuple[list[Record], int]:
    """The records of some prompts, of which the first is number `start`; how many tokens they are.

    The seed of a sample is a function of --seed and of the numbers of its prompt and itself.
    """
    tokenizer = checkpoint.tokenizer
    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.max_new_tokens,
        frozenset(ids_of_eos(checkpoint)),
    )
    seeds = [
        [seed_of(options.seed, start + i, j) for j in range(options.samples)]
        for i in range(len(prompts))
    ]

    ids = [prompt.ids for prompt in prompts]
    stop = stop_at(options.stop, tokenizer, ids, sampling.eos) if options.stop else None
    samples: list[Sample] = []
    # More samples of a prompt than --batch-size are written one batch after the other.
    for first in range(0, options.samples, options.batch_size):
        some = [own[first : first + options.batch_size] for own in seeds]
        samples += generate(model, ids, some, sampling, stop, options.micro_tokens)
    records: list[Record] = [
        {"prompt": prompt.value, "responses": [], "finished": []} for prompt in prompts
    ]
    for one in samples:
        text = response_text(tokenizer, prompts[one.prompt].ids, one.tokens, sampling.eos)
        for end in options.stop:
            text = text.split(end)[0]
        if prompts[one.prompt].has_space:
            text = text.removeprefix(" ")
        records[one.prompt]["responses"].append(text)
        records[one.prompt]["finished"].append(one.is_finished)
    return records, sum(len(one.tokens) for one in samples)


def stop_at(
    stops: Sequence[str],
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    eos: frozenset[int],
) -> Stop:
    """Whether one of these texts is in a response that has grown by a token.

    It is then in the text of the last tokens: each is a byte or more, and what stands at the cut
    may come out wrong. So the whole is decoded only where they hold it, not after every token.
    """
    tail = max(len(stop.encode()) for stop in stops) + 8

    def stops_here(one: Sample) -> bool:
        if len(one.tokens) > tail:
            end = tokenizer.file.decode(one.tokens[-tail:])
            if not any(stop in end for stop in stops):
                return False
        text = response_text(tokenizer, prompts[one.prompt], one.tokens, eos)
        return any(stop in text for stop in stops)

    return stops_here


def response_text(
    tokenizer: Tokenizer, prompt: list[int], tokens: list[int], eos: frozenset[int]
) -> str:
    """What the tokens of a response say behind their prompt, without EOS.

    A tokenizer may drop the space in front of a text, so the prompt is decoded, too.
    """
    own = tokens[:-1] if tokens and tokens[-1] in eos else tokens
    before, whole = tokenizer.file.decode(prompt), tokenizer.file.decode(prompt + own)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.file.decode(own)


def seed_of(seed: int, prompt: int, sample_number: int) -> int:
    """A seed of 63 bits."""
    digest = hashlib.sha256(f"{seed} {prompt} {sample_number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
