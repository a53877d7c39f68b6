"""Losses of votes: single votes and autograd as oracles; what a trained head comes to believe."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDENS, open_model
from runs import content, options

from minimore.calibration import majority, probability
from minimore.cli import main
from minimore.data.forms import record_pairs
from minimore.data.labels import Label, LabelRules
from minimore.data.pairs import TokenPair
from minimore.data.records import read_records
from minimore.data.world import WORDS, World
from minimore.engine.objective import RewardObjective, StepResult, labels_of
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.metrics import step_metrics
from minimore.more import WEIGHTINGS, bradley_terry_losses, head_gradients, pair_losses
from minimore.options import InputError
from minimore.train import train
from minimore.uncertainty import intervals, noise_floor
from minimore.votes import Labels, labelled_losses, labelled_slopes

RANDOM = np.random.default_rng(0)


def random_labels(count, random=RANDOM):
    return [
        Label(share, 4.0, margin, weight)
        for share, margin, weight in zip(
            random.integers(0, 5, count) / 4, random.random(count), 0.5 + random.random(count)
        )
    ]


def batch(pairs=24, width=5, sources=3, seed=0):
    """head, z_chosen, z_rejected, source: in float64."""
    generator = torch.Generator().manual_seed(seed)
    head, z_chosen, z_rejected = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((width,), (pairs, width), (pairs, width))
    )
    return head, z_chosen, z_rejected, torch.arange(pairs) % sources


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_share_is_the_mean_loss_of_its_votes(smoothing):
    m = torch.linspace(-3, 3, 7, dtype=torch.float64)
    ones, zeros = torch.ones_like(m), torch.zeros_like(m)
    for chosen, rejected in ((3, 1), (2, 2), (0, 5), (1, 0)):
        votes = [pair_losses(m, smoothing)] * chosen + [pair_losses(-m, smoothing)] * rejected
        share = chosen / (chosen + rejected)
        losses = pair_losses(m, smoothing, Labels(share * ones, zeros, ones))
        assert torch.allclose(losses, torch.stack(votes).mean(0), rtol=0, atol=1e-14)


def test_margins_and_weights_are_what_llama_2_and_copies_of_pairs_make():
    m = torch.linspace(-3, 3, 7, dtype=torch.float64)
    ones = torch.ones_like(m)
    losses = labelled_losses(m, Labels(ones, 0.7 * ones, 2 * ones))
    assert torch.allclose(losses, 2 * torch.log1p(torch.exp(-(m - 0.7))), rtol=0, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_slopes_and_head_gradients_equal_autograd(smoothing):
    head, z_chosen, z_rejected, source = batch()
    labels = labels_of(random_labels(24), head)
    m = ((z_chosen - z_rejected) @ head).requires_grad_()
    (by_autograd,) = torch.autograd.grad(labelled_losses(m, labels, smoothing).sum(), m)
    assert torch.allclose(labelled_slopes(m, labels, smoothing), by_autograd, rtol=0, atol=1e-13)
    head.requires_grad_()
    pairs = (head, z_chosen, z_rejected, source, 3, smoothing, labels)
    losses = bradley_terry_losses(*pairs)
    expected = torch.stack(
        [torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in losses]
    )
    assert torch.allclose(head_gradients(*pairs), expected, rtol=0, atol=1e-13)


def test_plain_labels_are_the_losses_of_no_labels():
    pairs = batch()
    assert labels_of([Label()] * 24, pairs[0]) is None
    ones = torch.ones(24, dtype=torch.float64)
    plain = Labels(ones, 0 * ones, ones)
    for function in (bradley_terry_losses, head_gradients):
        for smoothing in (0.0, 0.1):
            expected, found = (function(*pairs, 3, smoothing, labels) for labels in (None, plain))
            assert torch.allclose(expected, found, rtol=0, atol=1e-14)


def test_a_pair_of_weight_two_counts_like_two_pairs():
    head, z_chosen, z_rejected, _ = batch(pairs=4, sources=1)
    labels = labels_of([Label(weight=w) for w in (2.0, 1.0, 1.0, 1.0)], head)
    twice = [0, 0, 1, 2, 3]
    for function in (bradley_terry_losses, head_gradients):
        weighted = function(head, z_chosen, z_rejected, torch.zeros(4, dtype=int), 1, 0.0, labels)
        copied = function(head, z_chosen[twice], z_rejected[twice], torch.zeros(5, dtype=int), 1)
        assert torch.allclose(4 * weighted, 5 * copied, rtol=0, atol=1e-13)


def after_steps(recipe, method, scope, smoothing):
    """Parameters after steps on labelled pairs, in float64, and the last result."""
    model = open_model(GOLDENS / "llama").double()
    model.trunk.compute_dtype = torch.float64
    optimizer = AdamW(recipe.parameters, recipe.moments)
    optimizer.adopt_all(model)
    optimizer.learning_rate = 1e-2
    engine = open_engine(model, optimizer, recipe)
    objective = RewardObjective(
        3, partial(WEIGHTINGS[method], state={}), method, scope, "equal", smoothing
    )
    random = np.random.default_rng(1)
    for _ in range(2):
        labels = random_labels(9, random)
        labels[4] = Label()
        pairs = []
        for label in labels:
            ids = random.integers(2, 280, (2, 9)).astype(np.int32)
            ids[1, :4] = ids[0, :4]
            pairs.append(TokenPair(ids[0], ids[1], 4, 0, label=label))
        result = engine.step(pairs, [0, 1, 2] * 3, objective)
    values = [optimizer.value(name, p).flatten() for name, p in model.named_parameters()]
    return torch.cat(values), result


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, scope",
    [("more", "step"), ("more", "group"), ("proportional", "step"), ("uniform", "step")],
)
def test_streamed_steps_on_votes_are_plain_steps(method, scope):
    plain = after_steps(Recipe(), method, scope, 0.1)
    for recipe in (
        Recipe(micro_tokens=30),
        Recipe("streamed", recompute="full", micro_tokens=30),
    ):
        vector, result = after_steps(recipe, method, scope, 0.1)
        assert (vector - plain[0]).abs().max() < 1e-9
        for ours, theirs in zip(result, plain[1]):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_the_log_counts_evenly_split_votes_as_half_right():
    z_chosen = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    labels = labels_of([Label(share, 4) for share in (0.75, 0.5, 0.5, 1.0)], torch.ones(1))
    result = StepResult(
        torch.ones(1), z_chosen, torch.zeros(4, 1), torch.ones(1), torch.tensor(0.0)
    )
    figures = step_metrics(result, torch.zeros(4, dtype=int), ["ana"], labels)["sources"]["ana"]
    assert figures["accuracy"] == 0.5
    assert figures["loss"] == pytest.approx(float(pair_losses(z_chosen[:, 0], 0, labels).mean()))


# ---- in the world --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Pairs on which four annotators of one taste voted: their votes, word counts, true margins."""
    world = World(annotators=("ana",), conflict=0.0, train_pairs=(1500,), test_pairs=0, votes=4)
    path, _ = world.write(tmp_path_factory.mktemp("crowd"))["ana"]
    pairs = [
        record_pairs(record, where, rules=LabelRules())[0][0]
        for where, record in read_records(str(path))
    ]
    margins = 2.0 * world.true_margins(pairs)[:, 0]  # the annotators' decisiveness is 2
    counts = [
        [(p.chosen.split().count(w) - p.rejected.split().count(w)) for w in WORDS] for p in pairs
    ]
    shares = np.array([pair.label.share for pair in pairs])
    return torch.tensor(counts, dtype=torch.float64), shares, margins


def fitted(counts, targets):
    """The margins of the head on word counts that fits these targets best: (N,)."""
    head = torch.zeros(counts.shape[1], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(len(counts), dtype=torch.float64)
    labels = Labels(torch.as_tensor(targets), 0 * ones, ones)
    optimizer = torch.optim.LBFGS([head], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = pair_losses(counts @ head, 0.0, labels).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (counts @ head).detach().numpy()


@pytest.mark.slow
def test_soft_targets_recover_known_shares(crowd):
    """Exactly from exact shares; within noise from four votes, where majorities exaggerate."""
    counts, shares, true = crowd
    exact = fitted(counts, probability(true))
    assert np.abs(probability(exact) - probability(true)).max() < 1e-4
    soft = fitted(counts, shares)
    assert np.abs(probability(soft) - probability(true)).mean() < 0.03
    slope = [
        np.mean(m * true) / np.mean(true * true) for m in (soft, fitted(counts, majority(shares)))
    ]
    assert 0.9 < slope[0] < 1.1 and slope[1] > 1.4


@pytest.mark.slow
def test_four_votes_halve_the_interval_of_the_calibration_error(crowd):
    """Half is the limit: what differs from pair to pair stays, where a model is not calibrated."""
    _, _, true = crowd
    random, p = np.random.default_rng(0), probability(true)
    for scale, widest in ((1.0, 0.515), (2.0, 0.55)):
        widths = {1: [], 4: []}
        for seed in range(12):
            for votes, width in widths.items():
                shares = random.binomial(votes, p) / votes
                _, ece = intervals(scale * true, None, 200, seed, outcomes=shares)
                width.append(ece.high - ece.low)
        assert 0.45 < np.mean(widths[4]) / np.mean(widths[1]) < widest


def test_the_floor_of_four_votes_is_half_that_of_one(crowd):
    _, _, true = crowd
    one, four = (
        noise_floor(true, replicates=200, votes=votes and np.full(len(true), votes))
        for votes in (None, 4)
    )
    assert four.mean == pytest.approx(one.mean / 2, rel=0.1)
    assert four.high == pytest.approx(one.high / 2, rel=0.1)
    again = noise_floor(true, replicates=200, votes=np.full(len(true), 1.0))
    assert again.mean == pytest.approx(one.mean, rel=0.1)


# ---- as commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    """A small world with four votes a pair; every line names one of two raters."""
    home = tmp_path_factory.mktemp("voted")
    world = World(annotators=("ana", "ben"), train_pairs=(12,), test_pairs=16, votes=4)
    paths = world.write(home)
    for path in (path for both in paths.values() for path in both):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, line in enumerate(lines):
            line |= {"rater": "mia" if i % 3 else "leo", "margin": 1 + i, "weight": 1 + i}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "checksums.json").unlink()  # the files were changed on purpose
    return home, paths


def test_training_and_evaluation_use_votes(voted, tmp_path, capsys):
    home, _ = voted
    assert train(options(voted, tmp_path / "soft")) == 0
    printed = capsys.readouterr().out
    assert "NLL and ECE are against the share of votes" in printed
    assert "on pairs with several votes: how often" in printed
    assert "NLL: disagreement + model" in printed and "+ -" not in printed
    report = json.loads((tmp_path / "soft" / "evaluation.json").read_text())
    of_votes = report["sources"]["ana"]["votes"]
    assert of_votes["votes"] == 4 and of_votes["model_agrees"] <= of_votes["ceiling"]
    losses = {}
    for name, changes in {
        "soft": {},
        "ignore": {"votes": "ignore"},
        "majority": {"votes": "majority"},
        "margins": {"pair_margins": True},
        "weights": {"pair_weights": True},
    }.items():
        if name != "soft":
            assert train(options(voted, tmp_path / name, **changes)) == 0
        first, *_ = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = json.loads(first)["loss"]
    assert len(set(losses.values())) == 5


@pytest.mark.slow
def test_a_run_on_votes_continues_to_the_same_bytes(voted, tmp_path, monkeypatch):
    run = partial(options, voted, save_steps=2, pair_weights=True, pair_margins=True)
    assert train(run(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("minimore.train.finish", lambda *a: None)
        train(run(tmp_path / "cut"))
    assert train(run(tmp_path / "cut", resume=True)) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "cut")


@pytest.mark.slow
def test_a_field_makes_sources_of_training_plan_and_evaluation(voted, tmp_path, capsys):
    home, paths = voted
    run = options(voted, tmp_path / "run", source_field="rater", batch_size=8)
    assert train(run) == 0
    names = ["ana/leo", "ana/mia", "ben/leo", "ben/mia"]
    assert list(json.loads((tmp_path / "run" / "evaluation.json").read_text())["sources"]) == names
    command = ["evaluate", "--model", str(tmp_path / "run"), "--source-field", "rater"]
    command += [
        word for name, (_, test) in paths.items() for word in ("--source", f"{name}={test}")
    ]
    command += [
        "--allow-overlap",
        "--calibrate",
        f"ana={paths['ana'][0]}",
        "--json",
        str(tmp_path / "report.json"),
    ]
    capsys.readouterr()
    assert main(command) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["sources"]) == names and "ana/mia" in report["temperatures"]["sources"]
    source = f"ana={paths['ana'][0]}"
    plan = ["plan", str(home / "model"), "--source", source, "--max-length", "64"]
    assert main([*plan, "--source-field", "rater", "--batch-size", "4"]) == 0


def test_what_the_data_does_not_hold_is_refused(voted, world, tmp_path):
    for flag in ("pair_margins", "pair_weights"):
        with pytest.raises(InputError, match="--pair-.*: no training pair"):
            train(options(world, tmp_path / "run", **{flag: True}))
    with pytest.raises(InputError, match="--batch-size 6: .* of the 4 sources"):
        train(options(voted, tmp_path / "run", source_field="rater"))
    with pytest.raises(InputError, match='jsonl:1: "who" is missing, which --source-field'):
        train(options(voted, tmp_path / "run", source_field="who"))
    with pytest.raises(InputError, match="takes at most 12; merge some, or leave out --source-f"):
        train(options(voted, tmp_path / "run", source_field="margin"))
    assert not (tmp_path / "run").exists()
