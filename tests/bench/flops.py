"""FLOPs of one training step on real pairs, counted operation by operation, and how full it is.

    python tests/bench/flops.py --pairs helpful.train.jsonl.gz --tokenizer tokenizer.json

16 pairs of at most 512 tokens, a GPT-NeoX of width 256 with 6 blocks, every block computed again
in backward. The padded rows are transformers' model on texts padded to 512 tokens, or to the
longest of the step; `fill` is the share of what is computed that is a token of its own, counting a
prompt once for both of its responses. torch counts two FLOPs for a multiplication with its
addition, and for attention all queries times all keys of a tile; so do the rows here. Where a
kernel leaves half of that out, because attention is causal, that is not seen.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "bench"), str(TESTS)]
from models import NEOX, random_model  # noqa: E402

from minimore.data.pairs import load_source, pack_pairs  # noqa: E402
from minimore.engine.objective import RewardObjective  # noqa: E402
from minimore.engine.optim import AdamW  # noqa: E402
from minimore.engine.plain import PlainEngine  # noqa: E402
from minimore.engine.recipe import Recipe  # noqa: E402
from minimore.model.tokenizer import Tokenizer  # noqa: E402
from minimore.more import WEIGHTINGS  # noqa: E402
from minimore.tables import Table  # noqa: E402

VOCABULARY = 50432
SHAPE = replace(
    NEOX,
    vocabulary=VOCABULARY,
    width=256,
    blocks=6,
    heads=8,
    kv_heads=8,
    head_width=32,
    mlp_width=1024,
    rotary_width=8,
)


def flash_flops(q, k, v, *arguments, out_val=None, **options):
    """Of torch's attention for CPUs, which counts as nothing by itself."""
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def flash_backward_flops(d_out, q, k, v, *arguments, out_val=None, **options):
    """Of its backward pass."""
    return sdpa_backward_flop_count(d_out.shape, q.shape, k.shape, v.shape)


def counted(run):
    """FLOPs of all operations of a function."""
    flash_flops._get_raw = flash_backward_flops._get_raw = True  # they want tensors, not shapes
    ops = torch.ops.aten
    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: flash_flops,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def read_pairs(path, tokenizer, count=16):
    """The first pairs of a file; tokenizer: a directory, or its tokenizer.json."""
    directory = tokenizer if tokenizer.is_dir() else tokenizer.parent
    return load_source("pairs", str(path), Tokenizer(directory), max_length=512).pairs[:count]


def our_flops(pairs, recompute="full", share=True):
    """Of one step of the plain engine; share: the prompt is computed once."""
    optimizer = AdamW()
    model = random_model(SHAPE, optimizer)
    weigh = WEIGHTINGS["proportional"]
    objective = RewardObjective(1, lambda *seen: weigh(*seen, {}), method="proportional")
    if not share:
        objective = Unshared(1, lambda *seen: weigh(*seen, {}), method="proportional")
    engine = PlainEngine(model, optimizer, Recipe(recompute=recompute, micro_tokens=1 << 20))
    return counted(lambda: engine.step(pairs, [0] * len(pairs), objective))


class Unshared(RewardObjective):
    """Both texts of a pair whole, as packing alone would have it."""

    def batches(self, pairs, source, micro_tokens, unit=1):
        return [pack_pairs(pairs, source, share=False)]


def padded_flops(pairs, width):
    """Of transformers' model on texts padded to so many tokens, without computing anything."""
    from reference import quiet_transformers

    transformers = quiet_transformers()
    config = transformers.GPTNeoXConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.width,
        num_hidden_layers=SHAPE.blocks,
        num_attention_heads=SHAPE.heads,
        intermediate_size=SHAPE.mlp_width,
        num_labels=1,
        pad_token_id=0,
        use_cache=False,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
        ids = torch.ones(2 * len(pairs), width, dtype=torch.int64)
        mask = torch.zeros(2 * len(pairs), 1, width, width)  # whole, since its numbers do not exist
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name of this function changes within version 5
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    return counted(lambda: model(ids, attention_mask=mask).last_hidden_state.sum().backward())


def table_of(pairs):
    """Every way of laying the pairs out."""
    own = sum(pair.tokens for pair in pairs)
    texts = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    longest = max(len(side) for pair in pairs for side in (pair.chosen, pair.rejected))
    rows = [
        ("padded to 512", partial(padded_flops, pairs, 512), 2 * len(pairs) * 512),
        ("padded to the longest", partial(padded_flops, pairs, longest), 2 * len(pairs) * longest),
        ("packed", partial(our_flops, pairs, share=False), texts),
        ("packed, prompt shared", partial(our_flops, pairs), own),
        ("the same, nothing recomputed", partial(our_flops, pairs, "none"), own),
    ]
    table = Table("layout", "tokens", "fill", "GFLOPs", "times fewer")
    most = None
    for name, flops_of, tokens in rows:
        flops = flops_of()
        most = most or flops
        cells = f"{tokens:,}", f"{own / tokens:.0%}", f"{flops / 1e9:,.1f}", f"{most / flops:.2f}"
        table.add(name, *cells)
    return table


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--count", type=int, default=16)
    options = parser.parse_args()
    print(table_of(read_pairs(options.pairs, options.tokenizer, options.count)))


if __name__ == "__main__":
    main()
