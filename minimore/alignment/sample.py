"""Samples of a policy: n responses to every prompt of a file. The step `minimore align sample`.

Prompts are taken some at a time, always the same ones together, and every such portion is on the
disk before the next one begins. A killed command goes on behind the last one with `--resume`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..checksums import checksum, file_checksum
from ..data.forms import MOST_RESPONSES, prompt_end, with_prompt
from ..data.messages import is_conversation, messages_of, string_of
from ..data.pairs import encode, refuse_doubled_bos
from ..data.records import Record, read_records
from ..files import refuse_existing, to_disk, written_whole
from ..model.checkpoint import Checkpoint, ids_of_eos
from ..model.tokenizer import Tokenizer
from ..options import COUNT, InputError, Range, check_ranges, option, require
from ..reward import ModelOptions, check_length, compute_type, device_of
from .generate import Sample, Sampling, Stop, generate
from .policy import LanguageModel

LOWEST_TEMPERATURE = 1e-3  # besides 0; below it logits may become infinite


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ModelOptions):
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
    """A prompt as it is in the file, as text, and as ids."""

    given: Any
    text: str
    ids: list[int]


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
    )
    prompts = read_prompts(options, checkpoint.tokenizer)
    work = Path(f"{options.output}.unfinished")
    done = begin_or_continue(work, identity_of(options, checkpoint), options.resume)
    model = open_policy(checkpoint, options)
    portion = max(1, options.batch_size // options.samples)
    done -= done % portion  # a portion that was cut short is written again, as a whole
    keep_lines(work, 1 + done)
    began, tokens = time.monotonic(), 0
    for start in range(done, len(prompts), portion):
        part = prompts[start : start + portion]
        records, count = sampled(model, checkpoint, part, start, options)
        append(work, records)
        tokens += count
        speed = tokens / (time.monotonic() - began)
        print(
            f"{start + len(part)} of {len(prompts)} prompts, {speed:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
    with (
        written_whole(options.output) as unfinished,
        open(unfinished, "x", encoding="utf-8") as file,
    ):
        for record in islice(stored_lines(work), 1, None):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    work.unlink()
    print(f"{options.output}: {options.samples} responses to each of {len(prompts)} prompts")


def open_policy(checkpoint: Checkpoint, options: ModelOptions) -> LanguageModel:
    """The language model of a checkpoint; InputError if it has none."""
    trunk, _ = checkpoint.load(device=device_of(options))
    trunk.compute_dtype = compute_type(options)
    unembedding = checkpoint.unembedding(trunk)
    if unembedding is None:
        raise InputError(
            f"{options.model}: has no language-model head, so it cannot write; expected the"
            " checkpoint of a causal language model"
        )
    return LanguageModel(trunk, unembedding).eval()


# ---- prompts -------------------------------------------------------------------------------------


def read_prompts(options: SampleOptions, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a file, each once."""
    prompts: dict[str, Prompt] = {}
    for where, record in read_records(options.input):
        given = prompt_of(record, where, options.chat)
        is_rendered = False
        if options.chat or is_conversation(given):
            messages = messages_of(given, f'{where}: "prompt"', tokenizer, "user")
            text = tokenizer.render(messages, prompt=True)
            is_rendered = tokenizer.template is not None
        else:
            text = string_of(given, f'{where}: "prompt"', "a string, or messages")
        refuse_doubled_bos(text, is_rendered, where, tokenizer)
        if text not in prompts:
            (ids,), _ = encode([text], tokenizer, options.max_length, [is_rendered])
            require(len(ids), f"{where}: the prompt is empty; expected some text")
            prompts[text] = Prompt(given, text, ids.tolist())
    require(prompts, f"{options.input}: is empty; expected at least one prompt")
    return list(prompts.values())


def prompt_of(record: Record, where: str, chat: bool) -> Any:
    """What stands in front of the responses of a record."""
    if "chosen" in record and "prompt" not in record:
        sides = [record["chosen"], record.get("rejected", record["chosen"])]
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
        {"prompt": prompt.given, "responses": [], "finished": []} for prompt in prompts
    ]
    for one in samples:
        text = response_text(tokenizer, prompts[one.prompt].ids, one.tokens, sampling.eos)
        for end in options.stop:
            text = text.split(end)[0]
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


# ---- what survives a kill ------------------------------------------------------------------------


def identity_of(options: SampleOptions, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the samples depend on."""
    named = {key: value for key, value in asdict(options).items() if key != "resume"}
    files = {"model": checkpoint.identity(), "input": file_checksum(Path(options.input))}
    return json.loads(json.dumps(named | {"of": files}))


def begin_or_continue(work: Path, identity: dict[str, Any], resume: bool) -> int:
    """Begin the file of what is done, or continue it; returns how many records it holds."""
    is_begun = work.exists() and b"\n" in work.read_bytes()
    if not is_begun:  # it is not there, or was cut short before its first line was on the disk
        work.unlink(missing_ok=True)
        append(work, [identity])
        to_disk(work.absolute().parent)
        return 0
    require(resume, f"{work}: is unfinished; continue it with --resume, or remove it to begin anew")
    lines = list(stored_lines(work))
    require(
        lines[:1] == [identity],
        f"{work}: was begun with other options, another model or another input;"
        " give the same command again, or remove it",
    )
    return len(lines) - 1


def append(work: Path, records: Sequence[Record]) -> None:
    """Add records, each with the checksum of all so far, and bring them to the disk."""
    so_far = checksum(b"")
    if work.exists():
        *_, last = [b"", *work.read_bytes().splitlines()]
        so_far = last.decode("utf-8", "replace")[:8] or so_far
    with open(work, "a", encoding="utf-8") as file:
        for record in records:
            text = json.dumps(record)
            so_far = checksum(text.encode(), so_far)
            file.write(f"{so_far} {text}\n")
        file.flush()
        os.fsync(file.fileno())


def stored_lines(work: Path) -> Iterator[dict[str, Any]]:
    """What `append` wrote, up to the first line that is damaged, cut short or in another place.

    The first line is the identity; each of the others is a record.
    """
    with open(work, encoding="utf-8", errors="replace") as file:
        so_far = checksum(b"")
        for line in file:
            line_checksum, _, text = line.partition(" ")
            so_far = checksum(text[:-1].encode(), so_far)
            is_whole = text.endswith("\n") and line_checksum == so_far
            if not is_whole:
                return
            yield json.loads(text)


def keep_lines(work: Path, count: int) -> None:
    """Cut the file behind so many lines."""
    lines = work.read_bytes().splitlines(keepends=True)[:count]
    with written_whole(work) as unfinished:
        unfinished.write_bytes(b"".join(lines))
