"""The discretised mixture is a distribution over bins, exact in the tails, and `sample` draws from
it.
"""

import torch
from torch.nn import functional as F

from mesocosm.model import density


def random_params(rows: int, components: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, density.PARAMS * components, generator=generator)


def log_prob(params: torch.Tensor, width: float, x: torch.Tensor) -> torch.Tensor:
    return density.log_prob(density.mixture(params, torch.tensor(width)), x)


def test_bins_sum_to_one():
    width = 0.05
    centres = (torch.arange(-4000, 4001) * width).expand(20, -1)
    total = log_prob(random_params(20).unsqueeze(1), width, centres).double().exp().sum(1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-4), total


def test_never_positive_and_finite_far_out():
    x = torch.tensor([0.0, 1e-3, 1.0, 50.0, 1e6]).unsqueeze(1).expand(-1, 64)
    for width in (1e-6, 1e-3, 1.0, 100.0):
        values = log_prob(random_params(64) * 4, width, x)
        assert torch.isfinite(values).all() and (values <= 0).all()


def test_agrees_with_the_difference_of_distribution_functions_in_float64():
    params, width = random_params(200), 0.3
    x = torch.linspace(-3, 3, 200)
    mixture = density.mixture(params, torch.tensor(width))
    logits, mu, scale = (part.double() for part in mixture[:3])
    upper, lower = ((x.double().unsqueeze(1) + sign * width / 2 - mu) / scale for sign in (1, -1))
    exact = (logits.softmax(-1) * (torch.sigmoid(upper) - torch.sigmoid(lower))).sum(-1).log()
    assert torch.allclose(log_prob(params, width, x).double(), exact, atol=1e-5)


def test_an_exact_repeat_costs_almost_nothing():
    assert log_prob(torch.tensor([0.0, 0.0, -30.0]), 1e-4, torch.tensor(0.0)) > -1e-3


def test_gradients_are_finite_far_out():
    params = random_params(32).requires_grad_()
    x = torch.tensor([0.0, 1e4]).unsqueeze(1).expand(-1, 32)
    log_prob(params, 1e-3, x).sum().backward()
    assert params.grad is not None and torch.isfinite(params.grad).all()


def test_samples_follow_the_density():
    params, n, width = random_params(1), 200_000, 0.5
    mixture = density.mixture(params.expand(n, -1), torch.tensor(width))
    u = torch.rand(2, n, generator=torch.Generator().manual_seed(1)).clamp(1e-7, 1 - 1e-7)
    drawn = density.sample(mixture, u[0], torch.logit(u[1]))
    centres = torch.arange(-8, 9) * width
    expected = log_prob(params, width, centres.unsqueeze(0)).exp().squeeze(0)
    share = torch.stack([((drawn - c).abs() <= width / 2).float().mean() for c in centres])
    assert ((share - expected).abs() < 5 * (expected / n).sqrt() + 1e-4).all()


def test_categories_follow_their_probabilities_and_never_an_impossible_one():
    logits = torch.tensor([0.3, -torch.inf, 1.2, -torch.inf])
    u = (2 * torch.arange(2**16) + 1) / 2.0**17
    drawn = density.categorical(logits.expand(len(u), -1), u)
    share = torch.bincount(drawn, minlength=4) / len(u)
    assert torch.allclose(share, F.softmax(logits, -1), atol=1e-4)
    edge = torch.tensor([2.0**-24, 1 - 2.0**-24])
    logits = torch.tensor([-torch.inf, 1.0, 2.0, -torch.inf]).expand(2, -1)
    assert density.categorical(logits, edge).tolist() == [1, 2]
