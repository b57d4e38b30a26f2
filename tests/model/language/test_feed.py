"""`feed`: the same bits however rows are batched and cut into chunks."""

from __future__ import annotations

import pytest
import torch

from mesocosm.errors import UsageError
from mesocosm.model.language.llama import Llama
from model.language.nets import randomised, shape, small

NETWORKS = {
    "100k": lambda: small(),
    "1m": lambda: small("1m", 256),
    "members": lambda: small("300k", members=3, rank=4),
    "one_head": lambda: randomised(Llama(shape(heads=2, key_heads=2, head=64, biases=True))),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Llama:
    return NETWORKS[request.param]()


def alone(network: Llama, ids: torch.Tensor, member: int = 0) -> torch.Tensor:
    """The states of one row, read at once."""
    cache = network.new_cache(1, 1024)
    count = torch.tensor([len(ids)])
    return network.feed(cache, ids[None], count, torch.tensor([member]))[0]


@pytest.mark.integration
def test_ragged_chunks_and_batches_have_the_same_bits(network: Llama) -> None:
    """Rows of up to 300 tokens are read in chunks of 0 to 9 tokens beside others, then each alone
    in one chunk: 0 bits differ. So decoding, prefill and restoring agree.
    """
    generator = torch.Generator().manual_seed(0)
    rows, members = 7, network.members
    ids = torch.randint(0, 61, (rows, 300), generator=generator)
    member = torch.arange(rows) % members
    cache = network.new_cache(rows, 300)
    states = ids.new_zeros(rows, 300, network.shape.d_model, dtype=torch.float32)
    most = torch.tensor([300, 300, 40, 131, 1, 128, 257])
    while bool((cache.length < most).any()):
        count = torch.randint(0, 10, (rows,), generator=generator)
        single = torch.rand((), generator=generator) < 0.3
        count = count.clamp(max=1) if single else count
        count = torch.minimum(count, most - cache.length)
        if not count.any():
            continue
        at = cache.length.unsqueeze(1) + torch.arange(int(count.max()))
        piece = network.feed(cache, ids.gather(1, at.clamp(max=299)), count, member)
        for row in range(rows):
            states[row, at[row, : count[row]]] = piece[row, : count[row]]
    for row in range(rows):
        length = int(most[row])
        expected = alone(network, ids[row, :length], int(member[row]))
        assert torch.equal(states[row, :length], expected)
        assert torch.equal(network.logits(states[row, :1]), network.logits(expected)[:1])


def test_states_are_those_of_training(network: Llama) -> None:
    ids = torch.randint(0, 61, (1, 150))
    expected = network.hidden(ids, torch.arange(150).unsqueeze(0))
    torch.testing.assert_close(alone(network, ids[0])[None], expected, rtol=1e-3, atol=1e-4)


def test_a_row_goes_back_and_is_copied(network: Llama) -> None:
    ids = torch.randint(0, 61, (2, 40))
    cache = network.new_cache(2, 64)
    network.feed(cache, ids, torch.tensor([30, 12]))
    cache.rewind(torch.tensor([10, 99]))
    again = network.feed(cache, ids[:, 10:], torch.tensor([30, 0]))
    assert torch.equal(again[0], alone(network, ids[0])[10:])
    copy = cache.select(torch.tensor([1, 0, 1]))
    assert copy.length.tolist() == [12, 40, 12]
    tail = ids[1, 12:].expand(3, -1)
    states = network.feed(copy, tail, torch.tensor([28, 0, 28]))
    expected = alone(network, ids[1])[12:]
    assert torch.equal(states[0], expected) and torch.equal(states[2], expected)


def test_a_row_does_not_exceed_its_window(network: Llama) -> None:
    cache = network.new_cache(1, 8)
    with pytest.raises(UsageError, match=r"model\.context must be >= 9 tokens, got 8"):
        network.feed(cache, torch.zeros(1, 9, dtype=torch.int64), torch.tensor([9]))
