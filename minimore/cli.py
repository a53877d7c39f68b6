"""The verbs. Every error that a user can cause ends in one line and exit code 2; a failed training ends in 1."""

import os
import sys

import torch

from . import __version__
from .demo import DemoOptions, demo
from .evaluate import EvaluateOptions, evaluate
from .options import InputError, Parser, add_options, from_arguments
from .reward import ScoreOptions, score
from .train import TrainOptions, train

VERBS = {
    "demo": (DemoOptions, demo, "train uniform and MORE on a synthetic world, in two minutes"),
    "train": (TrainOptions, train, "train a reward model on one or more sources of preference pairs"),
    "evaluate": (EvaluateOptions, evaluate, "accuracy and calibration of a reward model, per source"),
    "score": (ScoreOptions, score, "add rewards to every line of a JSON lines file"),
}


def build_parser() -> Parser:
    """One sub-command per verb, its options generated from its dataclass."""
    parser = Parser(prog="minimore", description="Reward models from several sources of human preference (arXiv 2312.07401).")
    parser.add_argument("--version", action="version", version=f"minimore {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (options_class, _, help) in VERBS.items():
        add_options(verbs.add_parser(name, help=help, description=help), options_class)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    given = build_parser().parse_args(arguments)
    options_class, run, _ = VERBS[given.verb]
    prefix = f"minimore {given.verb}:"
    try:
        return run(from_arguments(options_class, given)) or 0
    except InputError as error:
        print(prefix, error, file=sys.stderr)
        return 2
    except BrokenPipeError:                          # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(prefix, error, file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(prefix, error, file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError):
        print(prefix, "out of memory; try a smaller --micro-tokens, or --recompute full when training", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(prefix, "interrupted", file=sys.stderr)
        return 130
