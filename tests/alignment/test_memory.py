"""The logits of a chunk exist at a time: more targets take no more memory for the vocabulary."""

from functools import partial
from itertools import accumulate

import pytest
from conftest import KeepsGradients, write_checkpoint
from reference import reference_model
from torch.profiler import profile

from minimore.alignment import language, policy
from minimore.alignment.language import LanguageObjective, Responses
from minimore.alignment.perplexity import response_losses
from minimore.alignment.policy import LanguageModel
from minimore.engine.recipe import ENGINES, Recipe
from minimore.engine.streamed import open_engine

CHUNK = 32
FEW, MANY = 3 * CHUNK, 12 * CHUNK  # targets
SMALL, LARGE = 300, 6000  # vocabularies


def peak_bytes(work):
    """The most bytes of tensors that exist at a time while work() runs, of those that it makes."""
    with profile(profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()  # in the order of time
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes))


def items(targets):
    """Responses of 16 tokens, so many tokens of them together."""
    return [Responses([5, 6, 7], [list(range(20, 36))])] * (targets // 16)


def step(engine):
    def work(model, targets):
        open_engine(model, KeepsGradients(), Recipe(engine)).step(
            items(targets), [0] * len(items(targets)), LanguageObjective()
        )

    return work


def perplexity(model, targets):
    response_losses(model, items(targets))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("work", [*map(step, ENGINES), perplexity], ids=[*ENGINES, "perplexity"])
def test_more_targets_take_no_more_memory_for_the_vocabulary(
    transformers, tmp_path, monkeypatch, work, tied
):
    for module in (policy, language):
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    growth = []
    for vocabulary in (SMALL, LARGE):
        changes = dict(vocab_size=vocabulary, tie_word_embeddings=tied)
        theirs = reference_model("gpt_neox", head="ForCausalLM", **changes)
        checkpoint = write_checkpoint(theirs, tmp_path / str(vocabulary))
        trunk, _ = checkpoint.load()
        model = LanguageModel(trunk, checkpoint.unembedding(trunk))
        few, many = (peak_bytes(partial(work, model, targets)) for targets in (FEW, MANY))
        growth.append(many - few)
    one_chunk = 4 * CHUNK * LARGE
    assert few > one_chunk  # its logits are seen
    # Whole logits would take (MANY - FEW) / CHUNK = 9 chunks more.
    assert growth[1] - growth[0] < one_chunk / 4
