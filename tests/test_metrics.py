"""The record of a step: reward ties, and sources without a pair."""

import pytest
import torch

from minimore.engine.objective import StepResult
from minimore.metrics import step_metrics


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
