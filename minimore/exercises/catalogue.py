"""The exercises, from easy to hard: a function of ours, its check, what it teaches, three hints."""

from collections.abc import Callable
from typing import NamedTuple

from ..calibration import fit_temperature, pair_ece, reliability
from ..engine.optim import adamw_
from ..engine.storage import round_at_random, split
from ..engine.streamed import recomputed_gradients
from ..lab.best_of import weights_of_ranks
from ..model.attention import pack, visible_keys
from ..model.family_configs import gpt2_config
from ..more import (
    group_dro_weights,
    head_gradients,
    min_norm_weights,
    normalize_gradients,
    pair_losses,
)
from ..uncertainty import noise_floor
from .calibration_checks import (
    check_fit_temperature,
    check_noise_floor,
    check_pair_ece,
    check_reliability,
)
from .engine_checks import (
    check_adamw_,
    check_pack,
    check_recomputed_gradients,
    check_round_at_random,
    check_split,
    check_visible_keys,
)
from .learning_checks import (
    check_group_dro_weights,
    check_head_gradients,
    check_min_norm_weights,
    check_normalize_gradients,
    check_pair_losses,
    check_weights_of_ranks,
)
from .model_checks import check_gpt2_config


class Exercise(NamedTuple):
    """A function to write, and all that is said about it.

    instruction: one line in the place of the body. hints: three, from gentle to plain.
    """

    function: Callable
    check: Callable
    title: str
    teaches: str
    instruction: str
    hints: tuple[str, str, str]

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.__name__

    @property
    def file(self) -> str:
        """Where the function is, from the repository's root."""
        return self.function.__module__.replace(".", "/") + ".py"


EXERCISES = (
    Exercise(
        pair_losses,
        check_pair_losses,
        "the loss of a pair",
        "Bradley-Terry, Eq. 1",
        "return the loss of every pair; the check passes margins and smoothing, and no labels",
        (
            "The probability of the label as it stands is σ(margin). What is its negative "
            "logarithm? And that of the label the wrong way round?",
            "log(sigmoid(m)) is -inf where sigmoid(m) rounds to 0. torch.nn.functional.logsigmoid "
            "computes both at once.",
            "(1 - s) times -logsigmoid(m), plus s times -logsigmoid(-m), with s = smoothing.",
        ),
    ),
    Exercise(
        pair_ece,
        check_pair_ece,
        "calibration error",
        "ECE of both orders",
        "return the ECE as a float: the mean gap of the bins, weighted by their counts",
        (
            "Every pair enters twice: as (p, y) and as (1 - p, 1 - y). pair_reliability does that "
            "and sorts both into bins.",
            "The gap of a bin is |accuracy - confidence|. It is NaN for an empty bin, which is to "
            "count nothing; _gaps returns 0 there.",
            "Multiply the gaps by the counts, sum, and divide by the sum of the counts.",
        ),
    ),
    Exercise(
        head_gradients,
        check_head_gradients,
        "gradients without backward",
        "Eq. 8 in closed form",
        "return one gradient a source, in closed form; the check passes no labels",
        (
            "Use the chain rule: the margin is head · (z_chosen - z_rejected). What is its "
            "gradient with respect to the head, and what is the slope of the loss in the margin?",
            "The slope of -log σ(m) is -σ(-m). With smoothing s it is s - σ(-m). Source k takes "
            "the mean over its own pairs alone.",
            "per_pair = slope[:, None] * difference; row k is per_pair[source == k].mean(0), for "
            "k in range(_count(source, sources)). Detach the head and the difference first.",
        ),
    ),
    Exercise(
        normalize_gradients,
        check_normalize_gradients,
        "gradients of one length",
        "what scale does to weights",
        "return the scaled gradients in float64, by the formula that `normalize` names",
        (
            "A source without any error has a gradient of 0, and 0 / 0 is NaN. What should its "
            "row be?",
            "The squares of 1e-200 are 0 in float64. Divide a row by its largest entry before you "
            "take its norm.",
            "scaled = G / G.abs().amax(1, keepdim=True).clamp_min(tiny), with the tiny of "
            "torch.finfo; then divide by its norm, clamped as well. 'loss+' divides that by the "
            "losses.",
        ),
    ),
    Exercise(
        group_dro_weights,
        check_group_dro_weights,
        "the worst source first",
        "state from step to step",
        "return the weights of this step, and keep in `state` what the next step needs",
        (
            "q is a product of exponentials over all steps so far. Where is it between two steps?",
            "exp(50,000) overflows. Keep log q in `state`: the product becomes a sum, and "
            "log_softmax normalises it.",
            "Add rate * losses.detach() to log_q for the sources with pairs > 0. Store its "
            "log_softmax. For the weights put -inf in the place of absent sources, then softmax.",
        ),
    ),
    Exercise(
        reliability,
        check_reliability,
        "bins of predictions",
        "a reliability diagram",
        "return Reliability(count, confidence, accuracy, edges), with NaN means for empty bins",
        (
            "Which bin does a prediction belong to that lies on an edge? The docstring says: "
            "right-closed.",
            "np.searchsorted(inner_edges, p, side='left') counts the edges below p. "
            "np.bincount with weights sums a bin.",
            "For quantile bins sort first: order = np.argsort(p, kind='stable'), and "
            "np.array_split(order, bins) has the members of every bin.",
        ),
    ),
    Exercise(
        adamw_,
        check_adamw_,
        "a step of AdamW",
        "moments and weight decay",
        "change value, m and v in place; nothing is returned",
        (
            "The docstring has three lines, and so may the function. Which of torch's operations "
            "change a tensor in place?",
            "Those whose name ends in _, such as mul_ and add_; `value = value * 2` makes a new "
            "tensor. sqrt(v) is divided by root before eps is added.",
            "m.mul_(b1).add_(g, alpha=1 - b1); v.mul_(b2).addcmul_(g, g, value=1 - b2); "
            "value.mul_(keep).sub_(rate * m / (v.sqrt() / root + eps)).",
        ),
    ),
    Exercise(
        fit_temperature,
        check_fit_temperature,
        "one temperature",
        "a convex fit, and its ends",
        "return T as a float; 0 and infinity are answers, too",
        (
            "Take t = 1 / T. The loss is convex in t, so its slope crosses 0 at most once. Where "
            "is the slope at t = 0, and where as t grows?",
            "The slope in t of the mean loss is -mean(m σ(-t m)), for one vote a pair. If mean(m) "
            "is 0 or less, T is infinite; if no margin is against its vote, T is 0.",
            "Divide the margins by the largest first. Double t until the slope changes its sign, "
            "then halve the interval until it has no middle, and multiply by the largest again.",
        ),
    ),
    Exercise(
        weights_of_ranks,
        check_weights_of_ranks,
        "the best of n, exactly",
        "order statistics",
        "return a weight for each rank, from the smallest sample to the largest",
        (
            "If the i-th smallest is the best of n, where do the other n - 1 come from?",
            "From the i - 1 below it: C(i - 1, n - 1) of all C(N, n) subsets. Such numbers do not "
            "fit a float for N = 2000.",
            "Start with the largest, n / N, and go down by the docstring's ratio; or divide the "
            "whole numbers of math.comb by each other, which Python does exactly.",
        ),
    ),
    Exercise(
        visible_keys,
        check_visible_keys,
        "who sees whom",
        "causal masks by position",
        "return the mask; with a window, a query that would see no key sees the last one",
        (
            "Make a matrix of distances: the position of the query minus that of the key.",
            "A key is visible if its distance is 0 or more, less than the window, and the key is "
            "no padding.",
            "queries[:, :, None] - keys[:, None, :] is (T, Q, L); key_is_padding[:, None, :] fits "
            "it. visible[..., -1] |= ~visible.any(-1), if there is a window.",
        ),
    ),
    Exercise(
        pack,
        check_pack,
        "texts in one line",
        "a prefix is stored once",
        "return a Stream of int64 tensors and segments; an empty continuation is a ValueError",
        (
            "Draw the example at the top of attention.py: every continuation starts at the "
            "position where its prefix ends.",
            "The first segment of an item has the prefix among its own queries, so it sees no keys "
            "in front: Segment(start, end, start, start). Without a prefix all are so.",
            "The others are Segment(first, len(tokens), start, start + len(prefix)). `last` is "
            "len(tokens) - 1 after a continuation was added.",
        ),
    ),
    Exercise(
        round_at_random,
        check_round_at_random,
        "rounding at random",
        "unbiased bf16",
        "return bf16: the upper neighbour with the probability of the 16 bits that are lost",
        (
            "bf16 is the upper half of an fp32 number. Read as an integer, what is its lower half?",
            "Add a random number of 16 bits to the integer: it carries into the upper half as "
            "often as it should. Use the lower 16 bits of `bits` alone.",
            "x.view(torch.int32) + (bits & 0xFFFF), then & -0x10000, view(torch.float32) and "
            ".bfloat16().",
        ),
    ),
    Exercise(
        split,
        check_split,
        "two halves of a number",
        "fp32 in 2 + 2 bytes, exact",
        "return the nearest bf16 number, and the rest of the bits as int16",
        (
            "An int16 reaches from -32768 to 32767. Cutting the lower half off leaves a rest of 0 "
            "to 65535; what does rounding leave?",
            "Add 0x8000 to the integer before shifting it right by 16: that rounds to the nearest, "
            "and ties away from zero. torch's own cast does something else at ties.",
            "high = (bits + 0x8000) >> 16; low = bits - (high << 16). Return "
            "(high << 16).view(torch.float32).bfloat16() and low.to(torch.int16).",
        ),
    ),
    Exercise(
        noise_floor,
        check_noise_floor,
        "the noise floor",
        "what a perfect model shows",
        "return Floor(mean, high) for independent pairs; the check passes no prompts",
        (
            "Suppose that the model is right: an outcome is 1 with the model's own probability. "
            "Draw outcomes, compute the ECE, and do that `replicates` times.",
            "Let p be the probability of the side that the model prefers. A pair adds outcome - p "
            "to the bin of p, and p - outcome to the bin of 1 - p.",
            "gap = _drawn(p, votes, random) - p; np.bincount(_bins(p, bins), gap, bins) sums; the "
            "ECE is the sum of the bins' absolute values over 2 N. Then np.mean, and np.quantile "
            "at .95.",
        ),
    ),
    Exercise(
        min_norm_weights,
        check_min_norm_weights,
        "the shortest vector",
        "MORE's quadratic problem",
        "return the weights in float64; a zero row takes all the weight",
        (
            "Which sources have a weight above 0? If you knew, the rest would be linear algebra. "
            "There are only 2^K - 1 such sets.",
            "Inside a set S all products g_k · v are equal. So solve M_S x = (1, ..., 1), with "
            "M = G Gᵀ, and divide x by its sum; a negative entry means that S was wrong.",
            "Of all candidates without a negative entry, return the one whose sum of weighted "
            "gradients has the least norm. _checked scales the gradients; lstsq or a tiny diagonal "
            "helps where M_S is singular.",
        ),
    ),
    Exercise(
        recomputed_gradients,
        check_recomputed_gradients,
        "one block of backward",
        "backward without a graph",
        "return d_x, and a gradient for the name of every parameter of the block",
        (
            "With a fresh leaf of x, torch.autograd.grad on the block's output has everything. The "
            "last product alone can do without its output: which four gradients does it have?",
            "y = residual + hidden Wᵀ + b. Backward enters the rest of the block at two places: "
            "the residual with d_y, and the hidden layer with d_y W.",
            "d_x, *others = torch.autograd.grad([residual, hidden], [x, *parameters], [d_y, d_y @ "
            "W]); the weight's own is d_y.T @ hidden, the bias's d_y.sum(0). With norm_after "
            "compute the block to its end.",
        ),
    ),
    Exercise(
        gpt2_config,
        check_gpt2_config,
        "a family of models",
        "GPT-2 in numbers",
        "return the ModelConfig of GPT-2; refuse what no published GPT-2 has",
        (
            "Read opt_config in model/family_configs.py: the nearest family. Which of its numbers "
            "and switches differ? GPT-2 has no two rows before position 0.",
            "j.sizes(mlp_key=..., plain=True, keys=(width, heads, blocks), mlp_width=...) reads "
            "the sizes under their own names; j.activation and j.get read the rest.",
            "ModelConfig(**sizes, activation, gated=False, norm='layer', norm_eps, qkv_bias=True, "
            "attention_output_bias=True, mlp_bias=True, parallel_residual=False, rotary_width=0, "
            "rope_base=1.0, learned_positions). require(not j.values.get(key), ...) refuses.",
        ),
    ),
)
