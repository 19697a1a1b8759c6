"""The arithmetic of GRPO against numbers worked out by hand."""

import math

import pytest
import torch

from vismem_core.training import grpo

# Two prompts, four trajectories each.
SCORES = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])


def test_advantages() -> None:
    """Mean .5 and standard deviation .5 in the first group; nothing to learn in the second."""
    expected = [[0.5 / 0.5001, -0.5 / 0.5001, -0.5 / 0.5001, 0.5 / 0.5001], [0.0] * 4]
    torch.testing.assert_close(grpo.advantages(SCORES), torch.tensor(expected))
    torch.testing.assert_close(grpo.advantages(SCORES, scaled=False)[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    assert grpo.silent(SCORES).tolist() == [False, True]


def test_rounding_is_no_signal() -> None:
    third = torch.tensor([[0.1 + 0.2, 0.3, 0.3]])
    assert grpo.silent(third).all() and not grpo.advantages(third).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 2.0, 2.4),  # a gain is clipped at 1.2
        (1.5, -2.0, -3.0),  # a loss is not: min takes the worse
        (0.5, 2.0, 1.0),
        (0.5, -2.0, -1.6),  # clipped at 0.8
        (1.1, 2.0, 2.2),
    ],
)
def test_clipping(ratio: float, advantage: float, expected: float) -> None:
    value = grpo.clipped(torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([advantage]), 0.2)
    assert value.item() == pytest.approx(expected)


def test_a_clipped_gain_has_no_gradient() -> None:
    logprobs = torch.tensor([[math.log(1.5), math.log(1.1)]], requires_grad=True)
    grpo.clipped(logprobs, torch.zeros(1, 2), torch.tensor([2.0]), 0.2).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 2.2]]))


def test_k3() -> None:
    """Policy .5, reference .25: .25/.5 - ln(.25/.5) - 1 = ln 2 - .5."""
    value = grpo.k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    assert value.item() == pytest.approx(math.log(2) - 0.5)
    assert grpo.k3(torch.zeros(3), torch.zeros(3)).eq(0).all()


def test_k3_is_the_divergence_on_average() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * grpo.k3(policy.log(), reference.log())).sum(), exact)


def test_penalties() -> None:
    """Scores 1 0 0 1 with mean .5; the other kind would have scored 0 1 1 0; the third invoked nothing."""
    invoked = torch.tensor([[True, True, False, True]])
    p_type, p_neg = grpo.penalties(SCORES[:1], torch.tensor([[0.0, 1.0, 1.0, 0.0]]), invoked)
    assert p_type.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert p_neg.tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_weights() -> None:
    counted = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    by_sequence = [[0.25, 0.25, 0.0], [0.0, 0.5, 0.0], [0.0] * 3]
    torch.testing.assert_close(grpo.weights(counted, "sequence"), torch.tensor(by_sequence))
    torch.testing.assert_close(grpo.weights(counted, "token"), counted / 3)
    assert not grpo.weights(counted[2:], "sequence").any() and not grpo.weights(counted[2:], "token").any()


def test_beta_follows_the_divergence() -> None:
    kl = grpo.AdaptiveKL(1.0, target=0.1)
    for seen, expected in ((0.1, 1.0), (0.16, 1.1), (0.05, 1.0), (0.14, 1.0), (0.07, 1.0)):
        kl.update(seen)
        assert kl.beta == pytest.approx(expected)
    for _ in range(1000):
        kl.update(0.0)
    assert kl.beta == 1e-4
    off = grpo.AdaptiveKL(0.0, target=0.1)
    off.update(1.0)
    assert off.beta == 0
