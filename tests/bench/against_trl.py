"""Training steps against trl's RewardTrainer: same weights, ids, order and loss, in one process.

    python tests/bench/against_trl.py --pairs helpful.train.jsonl.gz --tokenizer tokenizer.json \
        [--clock cpu --threads 1]

A GPT-NeoX of width 256 with 6 blocks takes 8 steps of 8 pairs of at most 512 tokens, in fp32, with
the blocks computed again in backward (and once without), without clipping, at a constant learning
rate. trl runs as its users run it: `train()` on pairs that are tokenised already, with fused AdamW
and gradient checkpointing. Each round begins with another side. The losses of every step are
compared. `--memory` measures instead the peak memory of every side in a process of its own.

`share` is how much of the machine's own matrix-product rate the executed FLOPs of a step reach;
that rate is measured on the products of this very step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from cpu_memory import Peak, anonymous
from tokenizers import Tokenizer as TokenizerFile

from minimore.data.pairs import load_source
from minimore.engine.flops import step_flops
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.engine.workload import Workload, shape_of, tokens_of
from minimore.model.checkpoint import Checkpoint
from minimore.more import WEIGHTINGS
from minimore.reward import ModelOptions, open_reward_model
from minimore.tables import Table

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))
from reference import quiet_transformers  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PAIRS_A_STEP, LEARNING_RATE = 8, 1e-4
RECIPES = {
    "plain, full": Recipe(recompute="full"),
    "plain, none": Recipe(),
    "streamed, full": Recipe(engine="streamed", recompute="full"),
    "streamed, none": Recipe(engine="streamed"),
}


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", required=True, help="a file of pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    parser.add_argument("--side", choices=("trl", *RECIPES), help="measure the memory of this one")
    return parser.parse_args()


# ---- the two sides -------------------------------------------------------------------------------


def write_model(directory, options):
    """A random model of Pythia's form and vocabulary, with a reward head."""
    transformers = quiet_transformers()
    rows = max(TokenizerFile.from_file(str(options.tokenizer)).get_vocab().values()) + 1
    config = transformers.GPTNeoXConfig(
        vocab_size=-(-rows // 128) * 128,
        hidden_size=options.width,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.width // 32,
        intermediate_size=4 * options.width,
        max_position_embeddings=2048,
        num_labels=1,
        pad_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForSequenceClassification(config).save_pretrained(directory)
    (Path(directory) / "tokenizer.json").write_bytes(options.tokenizer.read_bytes())


def read_pairs(directory, options):
    """The first pairs of the file, as ids."""
    tokenizer = Checkpoint(str(directory)).tokenizer
    pairs = load_source("pairs", options.pairs, tokenizer, max_length=512).pairs
    return pairs[: options.steps * PAIRS_A_STEP]


def our_side(directory, pairs, recipe):
    """A function that takes all steps, from where it was: clock -> losses, seconds."""
    model, _ = open_reward_model(ModelOptions(model=str(directory)))
    optimizer = AdamW()
    optimizer.adopt_all(model)
    optimizer.learning_rate = LEARNING_RATE
    engine = open_engine(model, optimizer, recipe)
    weigh = WEIGHTINGS["proportional"]
    objective = RewardObjective(1, lambda *seen: weigh(*seen, {}), method="proportional")

    def train(clock):
        losses, began = [], clock()
        for first in range(0, len(pairs), PAIRS_A_STEP):
            items = pairs[first : first + PAIRS_A_STEP]
            result = engine.step(items, [0] * len(items), objective)
            losses.append(result.loss.item())
        return losses, clock() - began

    return train


def their_side(directory, pairs):
    """The same by trl; the making of the trainer is not timed."""
    import datasets
    import transformers
    import trl
    from torch.utils.data import SequentialSampler

    class InOrder(trl.RewardTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **options):
            loss = super().compute_loss(*arguments, **options)
            losses.append(loss.item())
            return loss

    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # names that change within a major version
    losses = []
    rows = [{"chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(directory) / "tokenizer.json"),
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    dataset = datasets.Dataset.from_list(rows)
    settings = trl.RewardConfig(
        output_dir=str(Path(directory) / "trl"),
        per_device_train_batch_size=PAIRS_A_STEP,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    kept = {}

    def train(clock):
        losses.clear()
        trainer = InOrder(
            model, args=settings, train_dataset=dataset, processing_class=tokenizer, **kept
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.create_optimizer()
        kept.setdefault("optimizers", (trainer.optimizer, None))  # its moments go on, as ours do
        began = clock()
        trainer.train()
        return list(losses), clock() - began

    return train


# ---- time ----------------------------------------------------------------------------------------


def product_rate(pairs, options, clock):
    """FLOPs a second of the matrix products of a step: x W, and both products of its gradient."""
    tokens = sum(pair.tokens for pair in pairs) // options.steps
    D = options.width
    shapes = [(D, D)] * 4 + [(D, 4 * D), (4 * D, D)]
    flops = seconds = 0.0
    for n, m in shapes:
        x, w, d = torch.randn(tokens, n), torch.randn(n, m), torch.randn(tokens, m)
        for product in (lambda: x @ w, lambda: d @ w.T, lambda: x.T @ d):  # noqa: B023
            product()
            began = clock()
            for _ in range(10):
                product()
            seconds += clock() - began
            flops += 10 * 2 * tokens * n * m
    return flops / seconds


def executed_flops(config, pairs, recipe):
    """FLOPs that all steps execute."""
    total = 0.0
    for first in range(0, len(pairs), PAIRS_A_STEP):
        shapes = tuple(shape_of(pair) for pair in pairs[first : first + PAIRS_A_STEP])
        work = Workload(shapes, tokens_of(shapes), 1)
        total += step_flops(config, work, recipe)[1]
    return total


def measure_time(directory, pairs, options):
    clock = CLOCKS[options.clock]
    sides = {name: our_side(directory, pairs, recipe) for name, recipe in RECIPES.items()}
    sides = {"trl": their_side(directory, pairs), **sides}
    losses = {name: train(clock)[0] for name, train in sides.items()}  # warms up, too
    apart = max(abs(a - b) / abs(a) for own in losses.values() for a, b in zip(losses["trl"], own))
    print(f"losses of {options.steps} steps: at most {apart:.1e} apart, relatively")
    seconds = {name: [] for name in sides}
    rates = []
    for turn in range(options.rounds):
        rates.append(product_rate(pairs, options, clock))
        names = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in names:
            seconds[name].append(sides[name](clock)[1])
    config = Checkpoint(str(directory)).config
    rate = statistics.median(rates)
    table = Table("side", "pairs/s", "times trl", "least", "most", "GFLOP/s", "share")
    for name in sides:
        ratios = [theirs / own for theirs, own in zip(seconds["trl"], seconds[name])]
        median = statistics.median(seconds[name])
        cells = [name, f"{len(pairs) / median:.2f}", f"{statistics.median(ratios):.2f}"]
        cells += [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]
        if name in RECIPES:
            speed = executed_flops(config, pairs, RECIPES[name]) / median
            cells += [f"{speed / 1e9:.0f}", f"{speed / rate:.0%}"]
        table.add(*cells, *[""] * (7 - len(cells)))
    print(
        f"{options.clock} seconds, {torch.get_num_threads()} threads, torch {torch.__version__};"
        f" matrix products of these shapes: {rate / 1e9:.0f} GFLOP/s"
    )
    print(table)


# ---- memory --------------------------------------------------------------------------------------


def measure_memory(options):
    """Every side in a process of its own."""
    table = Table("side", "peak above the imports, MB", "of trl's")
    peaks = {}
    for side in ("trl", *RECIPES):
        words = [sys.executable, *sys.argv, "--side", side]
        printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        peaks[side] = json.loads(printed.splitlines()[-1])["peak"]
        table.add(side, f"{peaks[side] / 1e6:,.0f}", f"{peaks[side] / peaks['trl']:.2f}")
    print(table)


def print_peak(directory, pairs, options):
    """The peak of one side over all steps, as JSON."""
    if options.side == "trl":
        import trl  # noqa: F401  its imports are not its steps
    before, peak = anonymous(), Peak()
    peak.start()
    is_theirs = options.side == "trl"
    train = (
        their_side(directory, pairs)
        if is_theirs
        else our_side(directory, pairs, RECIPES[options.side])
    )
    train(time.perf_counter)
    print(json.dumps({"side": options.side, "peak": peak.stop() - before}))


def main():
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.memory and not options.side:
        measure_memory(options)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_model(directory, options)
        pairs = read_pairs(directory, options)
        (print_peak if options.side else measure_time)(directory, pairs, options)


if __name__ == "__main__":
    main()
