"""The hash: the same bits everywhere, uniform, and without the correlations that would show in
rollouts.
"""

import numpy as np
import torch
from scipy import stats

from mesocosm.model import rng


def test_numpy_and_torch_give_the_same_bits():
    env, step = np.arange(50, dtype=np.int64), np.arange(40, dtype=np.int64)[:, None]
    tensor = torch.from_numpy(env)
    for seed in (0, 1, 2**63 + 5, -7):
        a = rng.keys(seed, env, 3, step)
        b = rng.keys(seed, tensor, 3, torch.from_numpy(step))
        assert a.shape == tuple(b.shape) == (40, 50) and np.array_equal(a, b.numpy())
        for slot in (rng.REWARD, rng.OBSERVATION + 9):
            u, v = rng.uniform(a, slot), rng.uniform(b, slot)
            assert u.dtype == np.float32 and v.dtype == torch.float32
            assert np.array_equal(u, v.numpy())
        members = rng.member_of(seed, env, 2, 4)
        assert np.array_equal(members, rng.member_of(seed, tensor, 2, 4).numpy())


def test_bits_are_pinned():
    """Committed trajectories depend on these values: a change of the hash must be noticed."""
    assert rng.keys(0, 1, 2, 3).item() == 5068905186653613355
    assert rng.mix(torch.tensor([1])).item() == 0x5692161D100B05E5


def test_uniform_is_uniform_and_inside():
    key = rng.keys(11, torch.arange(200), 0, torch.arange(500).unsqueeze(1))
    u = rng.uniform(key.flatten().unsqueeze(1), torch.arange(4) + rng.OBSERVATION)
    assert float(u.min()) > 0.0 and float(u.max()) < 1.0
    for column in u.T:
        counts = np.histogram(column.numpy(), bins=64, range=(0, 1))[0]
        assert stats.chisquare(counts).pvalue > 1e-4
    # Neither slots, nor steps, nor environments are correlated.
    grid = u.view(500, 200, 4)
    for a, b in ((grid[..., 0], grid[..., 1]), (grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.01


def test_member_masks_keep_their_share_and_lose_no_episode():
    episodes = torch.arange(20_000) * 7919
    for members in (1, 2, 4):
        mask = rng.member_mask(episodes, members)
        assert mask.any(0).all()
        share = mask.float().mean(1)
        assert ((share - (0.8 + 0.2 / members)).abs() < 0.02).all(), share
    counts = np.bincount(rng.member_of(0, np.arange(20_000), 0, 4), minlength=4)
    assert stats.chisquare(counts).pvalue > 1e-4
