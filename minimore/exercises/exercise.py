"""The verb: list the exercises, write one, check an answer, give a hint."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..files import make_directory, refuse_existing, write_text
from ..options import Range, check_ranges, option, printable, require
from ..tables import Table
from .blank import blank, cut
from .catalogue import EXERCISES
from .judge import judge

FOLDER = "exercises"


@dataclass(frozen=True, kw_only=True)
class ExerciseOptions:
    """What `exercise` takes."""

    number: str | None = option(
        None,
        value="N",
        positional=True,
        help=f"which exercise, 1 to {len(EXERCISES)}; without it all are listed",
    )
    output: str = option(FOLDER, value="DIR", help="the directory of your answers")
    check: bool = option(False, help="check your answer; the exit code is 1 if it is wrong")
    hint: int | None = option(
        None, within=Range(least=1, most=3), help="print a hint, from 1 (gentle) to 3 (plain)"
    )


def exercise(options: ExerciseOptions) -> int:
    """Do what the options ask for; returns 1 for a wrong answer, else 0."""
    check_ranges(options)
    if options.number is None:
        require(
            not options.check and options.hint is None,
            f"--check and --hint need a number from 1 to {len(EXERCISES)}",
        )
        print(list_of_exercises())
        return 0
    require(not options.check or options.hint is None, "--check and --hint: expected one of them")
    number = number_of(options.number)
    chosen = EXERCISES[number - 1]
    if options.hint is not None:
        print(chosen.hints[options.hint - 1])
        return 0
    path = Path(options.output) / f"{number:02}_{chosen.name}.py"
    if options.check:
        require(path.is_file(), f"{path}: no such file; `{command(number, options)}` writes it")
        verdict = judge(path, chosen.name, chosen.check)
        print(printable(verdict.line))
        return 0 if verdict.is_right else 1
    write_exercise(number, options, path)
    return 0


def number_of(text: str) -> int:
    """The number of an exercise; raises InputError for anything else."""
    is_number = text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= len(EXERCISES)
    require(is_number, f"exercise {text}: expected a number from 1 to {len(EXERCISES)}")
    return int(text)


def list_of_exercises() -> str:
    """One table of all exercises, and how to begin."""
    words = ("exercise", "function", "in", "teaches")
    table = Table("", *words, left=words)
    for number, entry in enumerate(EXERCISES, 1):
        file = Path(entry.file).name
        table.add(f"{number:2}", entry.title, entry.name, file, entry.teaches)
    return f"{table}\n\n`minimore exercise 1` writes the first one to {FOLDER}/."


def write_exercise(number: int, options: ExerciseOptions, path: Path) -> None:
    """Write the file of an exercise, which must not be there yet, and say how to go on."""
    chosen = EXERCISES[number - 1]
    refuse_existing(path)
    make_directory(path.parent)
    docstring = docstring_of(number, options)
    write_text(path, blank(cut(chosen.function), docstring, chosen.instruction))
    print(f"{path}: fill in {chosen.name}, then `{command(number, options)} --check`")


def docstring_of(number: int, options: ExerciseOptions) -> str:
    """What stands at the top of the file of an exercise."""
    chosen = EXERCISES[number - 1]
    return (
        f"Exercise {number}: {chosen.title}.\n\n"
        f"Fill in `{chosen.name}`, which is cut out of {chosen.file}.\n\n"
        f"    {command(number, options)} --check     says whether it is right\n"
        f"    {command(number, options)} --hint 1    gives a hint; there are three\n"
    )


def command(number: int, options: ExerciseOptions) -> str:
    """The command of an exercise, with the directory if it is not the usual one."""
    if options.output == FOLDER:
        return f"minimore exercise {number}"
    return f"minimore exercise {number} --output {shlex.quote(options.output)}"
