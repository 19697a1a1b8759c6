"""What Stage II makes of tried choices: the better policy, and the rows that follow it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bases import config, tied

from vismem_core.training.choices import RIDGE, Choices
from vismem_core.training.processes import Processes

NOTHING = float("nan")


def choices(temperature: float = 0.1, *, trials: bool = False) -> Choices:
    return Choices(tied().attach(config()), Processes(), temperature, trials=trials)


def test_the_better_policy_prefers_what_was_worth_more() -> None:
    own = choices()
    worth = torch.tensor([[0.0, 0.1, -0.1], [NOTHING, 0.5, 0.5], [0.3, 0.3, 0.3]])
    own.add(torch.eye(3, own.memory.backbone.width), worth)
    hidden, better = own.better()
    assert hidden.argmax(1).tolist() == [0, 2]  # what was not tried to the end says nothing
    e = np.e
    expected = [[1 / (1 + e + 1 / e), e / (1 + e + 1 / e), 1 / e / (1 + e + 1 / e)], [1 / 3] * 3]
    torch.testing.assert_close(better, torch.tensor(expected))


def test_a_few_noisy_trials_are_read_together() -> None:
    """Two sorts of states; in one long memory is worth more, in one nothing is. Trials of either come as 0 or 1."""
    own, rng = choices(trials=True), np.random.default_rng(0)
    width, count = own.memory.backbone.width, 400
    sort = np.arange(count) % 2
    states = rng.normal(0, 0.1, (count, width)).astype(np.float32) + 5.0
    states[:, 0] += sort
    chances = np.where(sort[:, None] == 1, [[0.2, 0.2, 0.7]], [[0.6, 0.3, 0.3]])
    worth = (rng.random((count, 3)) < chances).astype(np.float32)
    own.add(torch.from_numpy(states), torch.from_numpy(worth))
    assert (worth.argmax(1) == np.where(sort, 2, 0)).mean() < 0.8  # each alone says little
    _, better = own.better()
    assert (better.argmax(1).numpy() == np.where(sort, 2, 0)).mean() > 0.95
    centred = (states - states.mean(0)).astype(np.float64)
    covariance = centred.T @ centred
    ridge = RIDGE * np.trace(covariance) / (count * width) * np.eye(width)
    fitted = centred @ np.linalg.inv(covariance + ridge) @ centred.T @ (worth - worth.mean(0)) + worth.mean(0)
    torch.testing.assert_close(better, torch.from_numpy(fitted / 0.1).softmax(-1).float(), atol=1e-4, rtol=1e-3)


def test_the_fitted_rows_choose_as_the_better_policy_does() -> None:
    own = choices()
    width = own.memory.backbone.width
    states = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    worth = torch.tensor([[0.0, 0.2, -0.2], [0.1, -0.3, 0.3]]).repeat(width // 2, 1)
    own.add(states, worth)
    before = own.loss().item()
    own.fit()
    hidden, better = own.better()
    least = -(better * better.log()).sum(1).mean().item()
    assert before > least + 0.5 and own.loss().item() == pytest.approx(least, abs=0.01)
    torch.testing.assert_close(own.logprobs(hidden).exp(), better, atol=0.05, rtol=0)


@pytest.mark.parametrize("trials", [False, True])
def test_a_mistake_counts_for_what_it_costs(trials: bool) -> None:
    """States that rows cannot tell apart: short mostly helps a little there, and else harms much."""
    own = choices(trials=trials)
    worth = torch.tensor([[0.0, 0.3, -0.5]] * 7 + [[0.0, -1.0, -0.5]] * 3)
    own.add(torch.ones(10, own.memory.backbone.width), worth)
    own.fit()
    expected = (torch.tensor([0.0, 0.7 * 0.3 - 0.3 * 1.0, -0.5]) / 0.1).softmax(0)
    torch.testing.assert_close(own.logprobs(own.hidden[:1])[0].exp(), expected, atol=0.01, rtol=0)


def test_only_the_latest_states_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vismem_core.training.choices.REMEMBERED", 3)
    own = choices()
    for number in range(5):
        own.add(torch.full((1, own.memory.backbone.width), float(number)), torch.zeros(1, 3))
    assert own.hidden[:, 0].tolist() == [2.0, 3.0, 4.0]
    other = choices()
    other.restore(own.state())
    assert other.hidden.equal(own.hidden) and other.worth.equal(own.worth)
