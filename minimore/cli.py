"""The verbs. Every error that a user can cause ends in one line and exit code 2; a failed training ends in 1."""

import os
import signal
import sys

import torch

from . import __version__
from .check import CheckOptions, check
from .engine.plan import PlanOptions, plan
from .evaluate import EvaluateOptions, evaluate
from .lab.demo import DemoOptions, demo
from .lab.features import FeaturesOptions, ProbeOptions, features, probe
from .lab.grid import ReproduceOptions
from .lab.reproduce import reproduce
from .options import InputError, Parser, add_options, from_arguments, printable
from .score import ScoreOptions, score
from .train import TrainOptions, train

VERBS = {
    "demo": (DemoOptions, demo, "train uniform and MORE on a synthetic world, in about a minute"),
    "plan": (
        PlanOptions,
        plan,
        "what a training will take of memory and time, and the recipe that fits, from config.json alone",
    ),
    "train": (
        TrainOptions,
        train,
        "train a reward model on one or more sources of preference pairs",
    ),
    "evaluate": (
        EvaluateOptions,
        evaluate,
        "accuracy and calibration of a reward model, per source",
    ),
    "check": (
        CheckOptions,
        check,
        "what is in a checkpoint, and does it work here: perplexity, rewards, memory, parity with transformers",
    ),
    "features": (FeaturesOptions, features, "store the pooled states of a frozen checkpoint"),
    "probe": (
        ProbeOptions,
        probe,
        "train reward heads on stored states, by any method, over many seeds",
    ),
    "reproduce": (
        ReproduceOptions,
        reproduce,
        "run one of the paper's experiments as a grid, on the built-in ladder or on real checkpoints",
    ),
    "score": (ScoreOptions, score, "add rewards to every line of a JSON lines file"),
}


def build_parser() -> Parser:
    """One sub-command per verb, its options generated from its dataclass."""
    parser = Parser(
        prog="minimore",
        description="Reward models from several sources of human preference (arXiv 2312.07401).",
    )
    parser.add_argument("--version", action="version", version=f"minimore {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (options_class, _, help) in VERBS.items():
        add_options(verbs.add_parser(name, help=help, description=help), options_class)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a name that the terminal cannot show is shown as escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    given = build_parser().parse_args(arguments)
    options_class, run, _ = VERBS[given.verb]
    code, message = 0, None
    asked = [
        s
        for s in (signal.SIGTERM, getattr(signal, "SIGHUP", None))
        if s and signal.getsignal(s) == signal.SIG_DFL
    ]
    for number in asked:  # so that half-written files go
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        for value in vars(given).values():
            if any("\udc80" <= c <= "\udcff" for c in str(value)):
                raise InputError(f"{value}: not UTF-8; expected names that are")
        code = run(from_arguments(options_class, given)) or 0
    except InputError as error:
        code, message = 2, error
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except FloatingPointError as error:
        code, message = 1, error
    except OSError as error:
        about = (
            f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        )
        code, message = 2, f"{about}; check the path, its permissions and the space left"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "can't allocate memory" not in str(error):
            raise
        code, message = (
            2,
            "out of memory; train with --memory, with a smaller --micro-tokens elsewhere, or look for a huge line in the input",
        )
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    finally:
        for number in asked:
            signal.signal(number, signal.SIG_DFL)
    if message is not None:
        print(f"minimore {given.verb}: {printable(str(message))}", file=sys.stderr)
    return code
