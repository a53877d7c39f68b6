"""The record of a step, and means of several: reward ties, and sources without a pair."""

import json

import numpy as np
import pytest
import torch

from minimore.engine.objective import StepResult
from minimore.metrics import RecentSteps, final_accuracy, progress_line, step_metrics


def test_a_reward_tie_is_half_right_and_an_absent_source_has_no_figures():
    z_chosen = torch.tensor([[1.0], [0.0], [-1.0]])  # margins 1, 0, -1
    result = StepResult(
        torch.ones(1), z_chosen, torch.zeros(3, 1), torch.tensor([1.0, 0.0]), torch.tensor(0.7)
    )
    source = torch.zeros(3, dtype=torch.int64)
    record = step_metrics(result, source, ["ana", "ben"])
    assert record["sources"]["ana"]["accuracy"] == pytest.approx(0.5)
    first_two = StepResult(
        result.head, z_chosen[:2], torch.zeros(2, 1), result.weights, result.loss
    )
    record = step_metrics(first_two, source[:2], ["ana", "ben"])
    assert record["sources"]["ana"]["accuracy"] == pytest.approx(0.75)
    assert record["sources"]["ben"]["pairs"] == 0
    assert record["sources"]["ben"]["loss"] is record["sources"]["ben"]["accuracy"] is None


def steps_of(figures):
    """Records of steps: pairs, loss and accuracy of source ana in each; source ben is absent."""
    absent = {"pairs": 0, "loss": None, "accuracy": None, "weight": 0.0}
    return [
        {
            "step": step,
            "loss": loss,
            "cosines": {"ana ~ ben": None},
            "sources": {
                "ana": {"pairs": pairs, "loss": loss, "accuracy": accuracy, "weight": 1.0}
                if pairs
                else absent,
                "ben": absent,
            },
        }
        for step, (pairs, loss, accuracy) in enumerate(figures, 1)
    ]


def test_means_are_those_of_all_pairs_of_the_last_steps():
    recent_steps = RecentSteps(3)
    figures = [(2, 9.0, 1.0), (4, 0.5, 0.75), (0, 0.0, None), (1, 1.0, 0.0)]
    for place, record in enumerate(steps_of(figures)):
        recent_steps.append(record)
        assert (recent_steps.means() is None) == (place == 0)
    means = recent_steps.means()
    pairs = [(0.5, 1), (0.5, 1), (0.5, 1), (0.5, 0), (1.0, 0)]  # loss, right: of the last 3 steps
    assert means["loss"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert means["sources"]["ana"]["loss"] == pytest.approx(np.mean([loss for loss, _ in pairs]))
    assert means["sources"]["ana"]["accuracy"] == pytest.approx(np.mean([r for _, r in pairs]))
    assert means["sources"]["ben"] is None
    line = progress_line(recent_steps.records[-1], means, 80, 0)
    assert line == "step 4/80  loss 1.0000 (0.5000)  ana 1.000 (0.600)   0% (60%) w1.00  ben none"
    alone = progress_line(recent_steps.records[-1], None, 80, 0)
    assert alone == "step 4/80  loss 1.0000  ana 1.000   0% w1.00  ben none"


def test_the_final_accuracy_is_that_of_the_last_fifth_of_the_steps(tmp_path):
    log = tmp_path / "metrics.jsonl"
    figures = [(100, 0.1, 1.0)] * 8 + [(0, 0.0, None), (16, 0.7, 0.75)]
    log.write_text("".join(json.dumps(record) + "\n" for record in steps_of(figures)))
    final = final_accuracy(log)
    assert (final.accuracy, final.pairs, final.steps) == (0.75, 16, 2)
    assert final.deviation == (0.75 - 0.5) / np.sqrt(0.25 / 16)  # the binomial one
    log.write_text("")
    assert final_accuracy(log) is None
