"""The network: sizes, packed rows, members."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mesocosm.model.ladder import HEAD, LANGUAGE_RUNGS, RUNGS, language_dims, nominal
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.shape import rung_shape
from mesocosm.model.mup import init_, param_groups
from model.language.nets import randomised, shape, small


def test_rungs_are_near_their_names_and_counted_exactly() -> None:
    assert list(LANGUAGE_RUNGS) == list(RUNGS)
    for size, rung in LANGUAGE_RUNGS.items():
        assert abs(rung.params / nominal(size) - 1) < 0.15
        assert rung.heads * HEAD == rung.d_model and rung.heads % rung.key_heads == 0
        counted = rung_shape(size, 1000)
        assert counted.params == language_dims(size).params
        with torch.device("meta"):
            network = Llama(counted)
        total = sum(parameter.numel() for parameter in network.parameters())
        assert total == counted.params + counted.embeddings
    for below, above in itertools.pairwise(LANGUAGE_RUNGS.values()):
        assert above.d_model >= below.d_model and above.params > below.params


def test_a_checkpoint_is_counted_exactly() -> None:
    counted = shape(biases=True, head_norms=True, tied=False)
    network = Llama(counted)
    total = sum(parameter.numel() for parameter in network.parameters())
    assert total == counted.params + counted.embeddings


def test_packed_segments_do_not_see_each_other() -> None:
    network = small()
    ids = torch.randint(0, 97, (2, 12))
    position = torch.tensor([[*range(5), *range(4), *range(3)]] * 2)
    segment = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3] * 2)
    packed = network.hidden(ids, position, segment)
    for start, end in ((0, 5), (5, 9), (9, 12)):
        alone = network.hidden(ids[:, start:end], position[:, start:end])
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)


def test_a_row_reads_its_member() -> None:
    network = small(members=3, rank=2)
    ids, member = torch.randint(0, 97, (4, 9)), torch.tensor([2, 0, 1, 2])
    position = torch.arange(9).expand(4, -1)
    together = network.hidden(ids, position, None, member.unsqueeze(1).expand(4, 9))
    for row in range(4):
        only = member[row].expand(1, 9)
        alone = network.hidden(ids[row : row + 1], position[:1], None, only)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert (
        network.hidden(ids[:1], position[:1], None, member[:1].expand(1, 9)) != together[1:2]
    ).any()


def test_new_members_are_the_backbone() -> None:
    plain, members = Llama(rung_shape("30k", 50)), Llama(rung_shape("30k", 50), members=2, rank=2)
    init_(plain, 3)
    init_(members, 4)
    members.load_state_dict(plain.state_dict(), strict=False)
    ids, position = torch.randint(0, 50, (2, 7)), torch.arange(7).expand(2, -1)
    output = members.hidden(ids, position, None, torch.tensor([[0] * 7, [1] * 7]))
    assert torch.equal(output, plain.hidden(ids, position))


@torch.no_grad()
def test_logits_of_a_new_network_are_of_one_scale_at_every_width() -> None:
    for size, most in (("100k", 0.6), ("10m", 0.3)):
        network = Llama(rung_shape(size, 300))
        init_(network, 0)
        hidden = network.hidden(torch.randint(0, 300, (2, 16)), torch.arange(16).expand(2, -1))
        assert 0.05 < float(network.logits(hidden).std()) < most


def test_every_parameter_has_a_group() -> None:
    network = Llama(rung_shape("100k", 50), members=2, rank=2)
    groups = param_groups(network, 1e-3, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


@pytest.mark.parametrize("changes", [{}, {"biases": True, "tied": False}, {"head_norms": True}])
def test_activations_may_be_recomputed(changes: dict[str, bool]) -> None:
    network = randomised(Llama(shape(**changes))).requires_grad_(True)
    ids, position = torch.randint(0, 61, (2, 10)), torch.arange(10).expand(2, -1)
    gradients = []
    for recompute in (False, True):
        network.checkpoint_activations = recompute
        network.zero_grad()
        network.logits(network.hidden(ids, position)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_is_for_training_alone_and_may_be_recomputed() -> None:
    network = randomised(Llama(shape())).requires_grad_(True).train()
    ids, position = torch.randint(0, 61, (2, 10)), torch.arange(10).expand(2, -1)

    def trained(rate: float, seed: int, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        network.drop(rate)
        network.checkpoint_activations = recompute
        network.zero_grad()
        torch.manual_seed(seed)
        hidden = network.hidden(ids, position)
        hidden.square().sum().backward()
        assert network.embed.grad is not None
        return hidden.detach(), network.embed.grad.clone()

    whole = trained(0.0, 0)[0]
    first, again, recomputed = trained(0.5, 0), trained(0.5, 0), trained(0.5, 0, recompute=True)
    assert all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(first, again, recomputed, strict=True)
    )
    assert not torch.equal(first[0], whole) and not torch.equal(first[0], trained(0.5, 1)[0])
    network.eval()
    assert torch.equal(network.hidden(ids, position), whole)


def test_updates_do_not_grow_with_the_width() -> None:
    """A coordinate check of muP: the logits' change in the first steps of AdamW is of one size."""
    ids = torch.randint(0, 40, (4, 24), generator=torch.Generator().manual_seed(0))
    position = torch.arange(24).expand(4, -1)
    changes = []
    for d in (64, 256):
        base = rung_shape("100k", 40)
        ratio = d / base.d_model
        wide = replace(
            base,
            d_model=d,
            heads=d // HEAD,
            d_ff=int(base.d_ff * ratio),
            width=ratio,
            logits_divisor=ratio,
        )
        network = Llama(wide)
        init_(network, 0)
        optimizer = torch.optim.AdamW(param_groups(network, 3e-3, 0.0))
        before = network.logits(network.hidden(ids, position)).detach()
        for _ in range(4):
            optimizer.zero_grad()
            logits = network.logits(network.hidden(ids, position))
            cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
        after = network.logits(network.hidden(ids, position)).detach()
        changes.append(float((after - before).square().mean().sqrt()))
    assert 0.5 < changes[1] / changes[0] < 2.0, changes
