"""What `align finetune` takes, and what its two trainings share.

--loss likelihood      learns responses: finetune.py
--loss dpo and others  learns from preference pairs: preference_training.py
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.trained import HEAD
from ..engine.workload import EPOCHS, Workload
from ..model.checkpoint import Checkpoint
from ..more import MOST_SOURCES, NORMALIZATIONS, WEIGHTINGS
from ..options import COUNT, Range, check_ranges, flag_of, option, parse_sources, require
from ..reward import PositionOptions, check_length
from ..schedule import LoopOptions, Schedule
from ..training import check_recipe_options, open_origin, table_of_options
from .policy import require_language_model
from .preference_losses import LOSSES
from .responses import WHICH

LIKELIHOOD = "likelihood"


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(PositionOptions, LoopOptions):
    """What `align finetune` takes; batch, length, learning rate and schedule are the paper's."""

    loss: str = option(
        LIKELIHOOD,
        choices=(LIKELIHOOD, *LOSSES),
        help="learn the responses of --input, or learn from the preference pairs of --source "
        "without a reward model",
    )
    input: tuple[str, ...] = option(
        (),
        value="FILE.jsonl",
        repeat=True,
        help="likelihood: once per file: prompts with a response or responses, pairs, or messages",
    )
    responses: str = option(
        "chosen",
        choices=WHICH,
        help="likelihood: of preference pairs, learn the chosen responses, or all; of other "
        "records all are learned",
    )
    source: tuple[str, ...] = option(
        (),
        value="NAME=TRAIN.jsonl[,TEST.jsonl]",
        repeat=True,
        help="the other losses: once per source of pairs, as in `train`",
    )
    reference: tuple[str, ...] = option(
        (),
        value="MODEL",
        repeat=True,
        help="the policy beside which the losses of pairs see this one (default: --model as it "
        "is); mrpo takes several",
    )
    beta: float = option(
        0.1,
        within=Range(above=0),
        help="of the implicit reward beta (log policy - log reference) of a response",
    )
    method: str = option(
        "proportional",
        choices=tuple(WEIGHTINGS),
        help="how the losses of sources of pairs are weighted; more looks at their gradients by a "
        "shift of the states in front of the logits",
    )
    normalize: str = option(
        "l2",
        choices=NORMALIZATIONS,
        help="more: scaling of these gradients before the solve (with two sources, l2 makes the "
        "weights uniform)",
    )
    clip: float | None = option(
        None,
        within=Range(least=0, below=1),
        help="mrpo: share by which a log-probability of a further reference may differ from that "
        "of the first",
    )
    base_responses: str | None = option(
        None,
        value="SAMPLES.jsonl",
        help="bapo: what the reference wrote to the training prompts, as `align sample` writes it",
    )
    anchor: float = option(
        0.1, within=Range(least=0), help="bapo: weight of what is forgotten of --base-responses"
    )
    degree: float = option(
        1.0, within=Range(least=0), help="spo: weight of the loss on the degree of preference"
    )
    max_length: int = option(
        512,
        within=COUNT,
        help="tokens of prompt and response; the prompt is cut on the left, a longer response on "
        "the right",
    )
    chat: bool = option(False, help="read prompts and responses that are strings as messages")
    epochs: int = option(1, within=COUNT, help="passes over the responses, or pairs")
    batch_size: int = option(
        64, within=COUNT, help="prompts a step, with their responses; or pairs"
    )
    warmup: float = option(
        0.05,
        within=Range(least=0, most=1),
        help="share of the steps in which the learning rate rises linearly from 0",
    )
    schedule: str = option(
        "cosine",
        choices=("linear", "cosine", "constant"),
        help="learning rate after warmup",
    )


# Options that one loss alone reads. Any other refuses them, unless they have their default.
READ_BY = {
    "input": (LIKELIHOOD,),
    "responses": (LIKELIHOOD,),
    "source": LOSSES,
    "reference": LOSSES,
    "beta": LOSSES,
    "method": LOSSES,
    "normalize": LOSSES,
    "clip": ("mrpo",),
    "base_responses": ("bapo",),
    "anchor": ("bapo",),
    "degree": ("spo",),
}


def check_options(options: FinetuneOptions) -> None:
    """Refuse options that cannot be run (InputError)."""
    check_ranges(options)
    refuse_unread(options)
    require(
        options.train != HEAD,
        "--train head: expected all or last-N; the head alone is trained of a reward model only",
    )
    if options.loss == LIKELIHOOD:
        check_input(options)
    else:
        check_preferences(options)
    check_recipe_options(options)


def refuse_unread(options: FinetuneOptions) -> None:
    """Refuse an option that the loss would not look at (InputError)."""
    defaults = FinetuneOptions(model="", output="")
    for name, losses in READ_BY.items():
        require(
            options.loss in losses or getattr(options, name) == getattr(defaults, name),
            f"{flag_of(name)}: goes with --loss {' or '.join(losses)}, not {options.loss}",
        )


def check_input(options: FinetuneOptions) -> None:
    """Refuse files of responses that are missing or repeated (InputError)."""
    require(options.input, "--input: expected at least one file")
    files = [os.path.realpath(path) for path in options.input]
    for path, file in zip(options.input, files):
        require(
            files.count(file) == 1,
            f"--input {path}: is given twice; for more passes use --epochs",
        )


def check_preferences(options: FinetuneOptions) -> None:
    """Refuse sources, references and weightings that a loss of pairs cannot take (InputError)."""
    sources = len(parse_sources(options.source))
    require(
        options.method != "more" or sources <= MOST_SOURCES,
        f"--method more: {sources} sources, but the exact solver takes at most {MOST_SOURCES};"
        " merge some",
    )
    require(
        options.normalize == "l2" or options.method == "more",
        "--normalize: goes with --method more",
    )
    if options.loss == "mrpo":
        require(
            len(options.reference) > 1,
            "--loss mrpo: expected --reference at least twice; with one reference it is dpo",
        )
    else:
        require(
            len(options.reference) < 2,
            f"--loss {options.loss}: takes one --reference; mrpo several",
        )
    require(
        options.loss != "bapo" or options.base_responses,
        "--loss bapo: needs --base-responses; write them with `minimore align sample --samples 1`",
    )


def open_language_origin(
    options: FinetuneOptions, run: Path
) -> tuple[Checkpoint, dict[str, Any] | None]:
    """The checkpoint and the facts of `open_origin`, of a language model that reads max_length.

    Raises InputError for any other model.
    """
    origin, facts = open_origin(options, run)
    require_language_model(origin)
    check_length(
        origin.config, options.max_length, origin.directory, beyond=options.beyond_positions
    )
    return origin, facts


def workload_of(schedule: Schedule, sources: Sequence[Any], origin: Checkpoint) -> Workload:
    """The shapes of the step with the most tokens, and the tokens of all steps.

    sources: what has items, each a prompt with its responses. At most EPOCHS epochs are counted;
    each later one is taken to be like their mean.
    """
    counted_steps = schedule.steps // schedule.epochs * min(schedule.epochs, EPOCHS)
    largest: list[Any] = []
    most_tokens = tokens = 0
    for step in range(1, counted_steps + 1):
        items = [sources[k].items[i] for k, i in schedule.sampled_at(step)]
        tokens_of_step = sum(item.tokens for item in items)
        tokens += tokens_of_step
        if tokens_of_step > most_tokens:
            largest, most_tokens = items, tokens_of_step
    shapes = tuple((len(prompt), *map(len, responses)) for prompt, responses in largest)
    tokens = tokens * schedule.steps // counted_steps
    return Workload(shapes, schedule.steps, tokens, "tied" if origin.is_tied else "untied")


def model_card(options: FinetuneOptions, data: Sequence[str], results: str = "") -> str:
    """README.md of a finished run: what it is, on which data, with which options, how good.

    data: a line for each file or source. results: the sections that say how good.
    """
    options_table = table_of_options(options, ("input", "source", "output", "resume", "model"))
    counts = "\n".join(f"- {line}" for line in data)
    return f"""---
tags: [minimore]
pipeline_tag: text-generation
---

# Policy fine-tuned with minimore

Made from `{options.model}`; `AutoModelForCausalLM` opens it.

## Data

{counts}
{results}
## Options

{options_table}
"""
