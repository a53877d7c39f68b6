"""The speed of writing, against transformers' `generate`: same device, weights and prompts, fp32.

    python tests/bench/generation.py [--device cuda] [--clock cpu --threads 1]

16 prompts of unequal lengths, which transformers gets padded on the left, and 128 new tokens each.
Both write in turn within one process, and each round begins with another one. A ratio above 1 says
that ours is the faster one. --clock cpu counts the seconds of the processor instead of the wall's,
which other work on the machine hardly changes. The weights are random, so that the logits are
nearly flat, for which top-p has the most to sort. That both write the same tokens when greedy is
checked.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from minimore.alignment.generate import Sampling, generate
from minimore.alignment.policy import LanguageModel
from minimore.model.checkpoint import Checkpoint
from minimore.tables import Table

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))
from reference import reference_model  # noqa: E402

SHAPES = {
    # Pythia's vocabulary and form, at a width of 256
    "gpt_neox": dict(
        vocab_size=50304,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=1024,
    ),
    "llama": dict(
        vocab_size=32000,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=688,
    ),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(),
    "sampled, top-p 0.9": Sampling(top_p=0.9),
}


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def same_model_twice(family, device):
    """transformers' model, and ours of the same weights."""
    theirs = reference_model(family, head="ForCausalLM", **SHAPES[family])
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        shutil.copy(TESTS / "goldens" / family / "tokenizer.json", directory)
        checkpoint = Checkpoint(directory)
        trunk, _ = checkpoint.load(device=device)
        ours = LanguageModel(trunk, checkpoint.unembedding(trunk).to(device)).eval()
    return theirs.to(device), ours


def random_prompts(count, vocabulary):
    """Ids, 8 to 64 a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 65, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def their_tokens(model, prompts, sampling):
    """New tokens (prompts, new) by transformers."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * empty + prompt for empty, prompt in zip(padding, prompts)]
    is_real = [[0] * empty + [1] * len(prompt) for empty, prompt in zip(padding, prompts)]
    drawn = {}
    if sampling.temperature:
        drawn = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    whole = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(is_real, device=model.device),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=None,
        pad_token_id=0,
        **drawn,
    )
    return whole[:, longest:].tolist()


def our_tokens(model, prompts, sampling):
    """The same by ours."""
    seeds = [[number] for number in range(len(prompts))]
    return [sample.tokens for sample in generate(model, prompts, seeds, sampling)]


def seconds_of(write, options):
    clock = CLOCKS[options.clock]
    began = clock()
    write()
    if options.device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def compared(theirs, ours, prompts, sampling, options):
    """Seconds of both, of every round, the one that begins taking turns."""
    writers = [
        partial(their_tokens, theirs, prompts, sampling),
        partial(our_tokens, ours, prompts, sampling),
    ]
    first, second = (write() for write in writers)  # warms up, too
    if sampling.temperature == 0:
        assert first == second, "the greedy tokens differ"
    seconds = [[], []]
    for turn in range(options.rounds):
        for side in (turn % 2, 1 - turn % 2):
            seconds[side].append(seconds_of(writers[side], options))
    return seconds


def main():
    options = parse_options()
    torch.set_num_threads(options.threads)
    table = Table("model", "tokens", "theirs tokens/s", "ours tokens/s", "ratio", "least", "most")
    count = options.prompts * options.tokens
    for family in SHAPES:
        theirs, ours = same_model_twice(family, options.device)
        prompts = random_prompts(options.prompts, SHAPES[family]["vocab_size"])
        for name, sampling in SAMPLINGS.items():
            sampling = Sampling(
                sampling.temperature, sampling.top_k, sampling.top_p, options.tokens
            )
            their_seconds, our_seconds = compared(theirs, ours, prompts, sampling, options)
            print(f"{family}, {name}: measured", file=sys.stderr, flush=True)
            ratios = [a / b for a, b in zip(their_seconds, our_seconds)]
            their_median, our_median = map(statistics.median, (their_seconds, our_seconds))
            table.add(
                family,
                name,
                f"{count / their_median:,.0f}",
                f"{count / our_median:,.0f}",
                f"{their_median / our_median:.2f}",
                f"{min(ratios):.2f}",
                f"{max(ratios):.2f}",
            )
    print(
        f"{options.device}, torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" {options.clock} seconds"
    )
    print(table)


if __name__ == "__main__":
    main()
