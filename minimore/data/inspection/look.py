"""Looking at files of pairs before hours are spent on them: the `data look` verb.

survey     one pass over every file: what is counted (survey.py)
findings   which counts are faults, and what to do (findings.py)
summary    a line for every finding, to the screen
page       Markdown, to the screen behind it, or with a figure and every number into a directory
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...figures import plots
from ...files import directory_written_whole, refuse_existing, write_json, write_text
from ...model.tokenizer import Tokenizer
from ...options import Range, check_ranges, option, require
from ...tables import MarkdownTable, number
from .between import Between, all_between
from .findings import FAULTS, Finding, SimpleRules, findings_of, rule_lines, rules_of
from .survey import Survey, survey_of

PAIRS_SHOWN = 3
CHARACTERS_SHOWN = 400  # of a text
WHEN_CUT = ("equal when cut", "prompt cut away")  # faults that need a tokenizer
TOTALS = {"truncated": "longer than --max-length; cut on the left, as in training"}


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """What `data look` takes."""

    file: tuple[str, ...] = option(
        (),
        repeat=True,
        positional=True,
        value="FILE",
        help="files of pairs (JSON lines, .gz too); files that are to be compared, such as training"
        " and test, are given together",
    )
    model: str | None = option(
        None,
        value="DIR",
        help="checkpoint or tokenizer directory: lengths in tokens, and what truncation does",
    )
    max_length: int = option(
        512, within=Range(least=2), help="with --model: tokens a text, cut on the left"
    )
    chat: bool = option(False, help="read prompts and responses that are strings as messages")
    output: str | None = option(
        None, value="DIR", help="write page, figure and numbers here; must not exist"
    )


class Look(NamedTuple):
    """What is said of one file."""

    survey: Survey
    rules: SimpleRules
    findings: list[Finding]


def look(options: LookOptions) -> None:
    """Print a page on some files, or write it with a figure and every number."""
    check_ranges(options)
    refuse_existing(options.output)
    for path in options.file:
        require(options.file.count(path) == 1, f"{path}: is given twice; expected different files")
    tokenizer = tokenizer_of(options)
    looks = [look_at(path, tokenizer, options) for path in options.file]
    between = all_between([file.survey for file in looks])
    page = page_of(looks, between)
    print_summary(looks, between)
    if options.output is None:
        print(f"\n{page}")
        return
    with directory_written_whole(Path(options.output)) as directory:
        write_text(directory / "page.md", page + "\n")
        write_json(directory / "look.json", numbers_of(looks, between))
        if plots.available():
            draw(looks, directory / "look.png")
    figure = "look.png" if plots.available() else "no figure, since matplotlib is not installed"
    print(f"written to {options.output}: page.md, look.json, {figure}")


def tokenizer_of(options: LookOptions) -> Tokenizer | None:
    """The tokenizer of --model, if it is given."""
    if options.model is None:
        return None
    directory = Path(options.model)
    require(directory.is_dir(), f"--model {options.model}: not a directory; expected a local one")
    tokenizer = Tokenizer(directory)
    require(
        options.max_length > len(tokenizer.bos),
        f"--max-length {options.max_length}: expected more than the {len(tokenizer.bos)} tokens"
        " that begin every text",
    )
    return tokenizer


def look_at(path: str, tokenizer: Tokenizer | None, options: LookOptions) -> Look:
    """Survey one file, and judge it."""
    survey = survey_of(path, tokenizer, options.max_length, options.chat)
    require(
        survey.pairs,
        f"{path}: has no pair: {survey.records} records, {survey.label_ties} label ties",
    )
    rules = rules_of(survey)
    return Look(survey, rules, findings_of(survey, rules))


def print_summary(looks: Sequence[Look], between: Sequence[Between]) -> None:
    """One line for every file, and for every finding."""
    for file in looks:
        count = len(file.findings)
        print(f"{file.survey.path}: {file.survey.pairs} pairs, {count} finding{'s' * (count != 1)}")
        for finding in file.findings:
            print(f"  {finding}")
    for finding in findings_of_all(between):
        print(f"between files: {finding}")


# ---- the page ------------------------------------------------------------------------------------


def page_of(looks: Sequence[Look], between: Sequence[Between]) -> str:
    """The whole page, as Markdown: every file, what they share, and last some of their pairs."""
    paragraphs = [paragraph for file in looks for paragraph in section_of(file)]
    if len(looks) > 1:
        paragraphs += between_lines(between)
    for file in looks:
        paragraphs += [f"# Some pairs of {file.survey.path}", *pair_lines(file.survey)]
    return "\n\n".join(paragraphs)


def section_of(file: Look) -> Iterator[str]:
    """The paragraphs on one file."""
    survey = file.survey
    yield f"# {survey.path}"
    yield (
        f"{survey.pairs} pairs of {len(set(survey.prompts))} prompts in {survey.records} records;"
        f" {survey.label_ties} label ties."
    )
    if survey.unlabelled:
        reasons = (f"{count} {reason}" for reason, count in sorted(survey.unlabelled.items()))
        yield f"Comparisons without a label: {', '.join(reasons)}."
    yield "## Findings"
    yield finding_lines(file.findings) or "None."
    yield "## Counts"
    if survey.counts:
        yield str(counts_table(survey))
    absent = [name for name in asked(survey) if name not in survey.counts]
    yield f"No pair shows: {', '.join(absent)}."
    if survey.max_length is None:
        yield "What truncation does was not asked; give --model."
    yield "## Lengths, and what they explain"
    yield str(lengths_table(survey))
    yield "\n".join(rule_lines(file.rules))
    if survey.agreement:
        yield agreement_line(survey)


def between_lines(between: Sequence[Between]) -> Iterator[str]:
    """The paragraphs on what files share."""
    yield "# Between the files"
    findings = findings_of_all(between)
    if findings:
        yield finding_lines(findings)
    table = MarkdownTable("file", "shares with", "prompts")
    for two in between:
        if two.shared:
            table.add(two.one.name, two.other.name, len(two.shared))
    yield str(table) if len(table.rows) > 1 else "No two files share a prompt."


def findings_of_all(between: Sequence[Between]) -> list[Finding]:
    """The findings between all files."""
    return [finding for two in between for finding in two.findings]


def finding_lines(findings: Sequence[Finding]) -> str:
    """A list of findings; empty if there is none."""
    return "\n".join(f"- **{f.name}**: {str(f).partition(': ')[2]}" for f in findings)


def asked(survey: Survey) -> list[str]:
    """What is looked for in every pair of a file."""
    return [name for name in FAULTS if survey.max_length is not None or name not in WHEN_CUT]


def counts_table(survey: Survey) -> MarkdownTable:
    """Every count of a file, findings or not, with the first lines."""
    table = MarkdownTable("pairs that", "count", "share", "finding from", "first lines")
    for name in (*FAULTS, *TOTALS):
        if name not in survey.counts:
            continue
        count = survey.counts[name]
        what = FAULTS[name].what if name in FAULTS else f"are {TOTALS[name]}"
        limit = number(FAULTS[name].share, 2) if name in FAULTS else "-"
        share = number(count.total / survey.pairs)
        table.add(what, count.total, share, limit, ", ".join(map(str, count.lines)))
    return table


def lengths_table(survey: Survey) -> MarkdownTable:
    """How long prompts, chosen and rejected responses are: mean, three quantiles, the longest."""
    table = MarkdownTable(survey.unit, "mean", "5%", "median", "95%", "longest")
    for name, column in zip(("prompt", "chosen", "rejected"), survey.lengths):
        lengths = np.array(column)
        values = (lengths.mean(), *np.quantile(lengths, [0.05, 0.5, 0.95]), lengths.max())
        table.add(name, *(f"{value:.0f}" for value in values))
    return table


def agreement_line(survey: Survey) -> str:
    """How far annotators agree."""
    agreement = np.array(survey.agreement)
    mean = number(agreement.mean())
    return (
        f"{len(agreement)} records have votes: on average {mean} of the annotators of a pair are of"
        f" one opinion, and {number((agreement == 1).mean())} of the pairs are unanimous. Of single"
        f" votes a model can hardly rank more than {mean} right."
    )


def pair_lines(survey: Survey) -> Iterator[str]:
    """A few pairs, evenly spaced in the file."""
    items = survey.sample.items
    places = sorted({round(i * (len(items) - 1) / (PAIRS_SHOWN - 1)) for i in range(PAIRS_SHOWN)})
    for place in places:
        number_of_pair, pair = items[place]
        yield f"Pair {number_of_pair + 1}:"
        for name, text in zip(("prompt", "chosen", "rejected"), pair[:3]):
            yield f"{name}:\n\n{quoted(text, is_end=name == 'prompt')}"


def quoted(text: str, is_end: bool = False) -> str:
    """The beginning of a text, or its end, as a block; control characters are left out."""
    if len(text) > CHARACTERS_SHOWN:
        text = "... " + text[-CHARACTERS_SHOWN:] if is_end else text[:CHARACTERS_SHOWN] + " ..."
    plain = "".join(c for c in text if c.isprintable() or c == "\n")
    return "\n".join(f"    {line}" for line in plain.strip("\n").split("\n"))


# ---- numbers and figure --------------------------------------------------------------------------


def numbers_of(looks: Sequence[Look], between: Sequence[Between]) -> dict[str, Any]:
    """Every number of the page."""
    files = {file.survey.path: numbers_of_file(file) for file in looks}
    return {"files": files, "between": [finding._asdict() for finding in findings_of_all(between)]}


def numbers_of_file(file: Look) -> dict[str, Any]:
    """The numbers of one file; NaN, of too few prompts, is null."""
    survey, words = file.survey, file.rules.words
    return {
        "pairs": survey.pairs,
        "records": survey.records,
        "prompts": len(set(survey.prompts)),
        "label_ties": survey.label_ties,
        "unlabelled": dict(survey.unlabelled),
        "unit": survey.unit,
        "max_length": survey.max_length,
        "counts": {
            name: {"count": count.total, "lines": count.lines}
            for name, count in sorted(survey.counts.items())
        },
        "longer_wins": finite(file.rules.longer),
        "word_rule": None
        if words is None
        else {"accuracy": finite(words.accuracy), "strongest": words.strongest},
        "first_preferred": {"records": survey.records_of_two, "first": survey.first_preferred},
        "agreement": float(np.mean(survey.agreement)) if survey.agreement else None,
        "findings": [finding._asdict() for finding in file.findings],
    }


def finite(values: Sequence[float]) -> list[float | None]:
    """Values as JSON can hold them."""
    return [float(value) if np.isfinite(value) else None for value in values]


def draw(looks: Sequence[Look], path: Path) -> None:
    """The figure of all files."""
    lengths = {
        f"{i}. {file.survey.name}": (
            np.array(file.survey.lengths[1]),
            np.array(file.survey.lengths[2]),
        )
        for i, file in enumerate(looks, 1)
    }
    plots.draw_lengths(lengths, looks[0].survey.unit, path)
