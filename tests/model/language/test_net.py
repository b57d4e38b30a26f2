"""The losses of a text world."""

from __future__ import annotations

import math

import pytest
import torch

from mesocosm.model.counts import language_flops, language_params, measured_language_flops
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.net import TextNet, blank_rows
from mesocosm.model.language.shape import rung_shape
from mesocosm.model.language.stream import TokenRows, collate, segments
from mesocosm.model.mup import init_, param_groups
from mesocosm.model.spec import PartSpec, Spec
from model.language.nets import Bytes, counting, randomised, shape

SPEC = Spec(PartSpec(), PartSpec(), reward_values=(0.0, 1.0), terminal_rate=0.1)
NUMERIC = Spec(PartSpec(), PartSpec(), reward_mean=0.2, reward_scale=0.5)


def net(members: int = 1, rank: int = 0, spec: Spec = SPEC, size: str = "100k") -> TextNet:
    backbone = Llama(rung_shape(size, Bytes.size), members=members, rank=rank)
    made = TextNet(backbone, spec)
    init_(made, 0)
    return made


def rows(count: int = 4, window: int = 128, spec: Spec = SPEC, members: int = 1) -> TokenRows:
    made = [segments(counting(6, i % 10, i), Bytes(), spec, window)[0] for i in range(count)]
    return collate([[segment] for segment in made], window, members=members)


@pytest.mark.parametrize("spec", [SPEC, NUMERIC], ids=["categories", "numbers"])
def test_packing_changes_no_loss(spec: Spec) -> None:
    model = randomised(net(spec=spec))
    parts = [segments(counting(5, i, i), Bytes(), spec, 512)[0] for i in range(4)]
    apart = model(collate([[part] for part in parts], 128))
    packed = model(collate([parts[:3], parts[3:]], 384))
    for name, nats in apart.nats.items():
        torch.testing.assert_close(packed.nats[name], nats, rtol=1e-4, atol=1e-4)
    assert set(apart.nats) == {"dynamics", "reward", "termination", "task"}
    assert float(apart.transitions) == float(packed.transitions) == 20
    assert float(apart.bytes) == 20 * (len("it is 0") + 1)
    total = sum(float(nats) for nats in apart.nats.values())
    assert float(apart.objective) == pytest.approx(total / (4 * 128), rel=1e-5)
    bits = float(apart.nats["dynamics"]) / 160 / math.log(2)
    assert float(apart.bits_per_byte) == pytest.approx(bits, rel=1e-5)


def test_a_new_network_is_as_uncertain_as_it_should_be() -> None:
    losses = net()(rows(8))
    per_token = float(losses.nats["dynamics"]) / float(losses.bytes)
    assert per_token == pytest.approx(math.log(Bytes.size), rel=0.05)
    assert float(losses.nats["reward"]) == pytest.approx(48 * math.log(2), rel=1e-3)
    never, always = -math.log(0.9), -math.log(0.1)
    assert float(losses.nats["termination"]) == pytest.approx(40 * never + 8 * always, rel=1e-3)


def test_actions_are_read_and_not_scored() -> None:
    """The gradient of the embedding of a byte that only actions contain comes from reading it."""
    model = net()
    with torch.no_grad():
        for block in model.backbone.blocks:  # type: ignore[union-attr]
            block.out.weight.zero_()  # no token reads another
    batch = rows()
    assert model.model.shape.tied
    losses = model(batch)
    losses.objective.backward()
    only_actions = Bytes().encode("d")[0]
    assert (batch.ids == only_actions).any()
    before = float(losses.nats["dynamics"] + losses.nats["task"])
    with torch.no_grad():
        logits = model.model.logits(model.model.hidden(batch.ids, batch.position))
        target = batch.ids.roll(-1, 1)
        nats = -logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    scored = batch.part.roll(-1, 1) > 0
    scored[:, -1] = False
    assert before == pytest.approx(float(nats[scored].sum()), rel=1e-5)
    assert not scored[target == only_actions].any()


def test_large_vocabularies_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for largest in (1 << 25, 50 * Bytes.size):
        monkeypatch.setattr("mesocosm.model.language.net.LARGEST", largest)
        model = net()
        losses = model(rows())
        losses.objective.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([losses.objective.detach(), *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_members_are_mixed_by_transition() -> None:
    model = randomised(net(members=3, rank=2))
    batch = rows(members=3)
    each = [model(batch.read_by(member)) for member in range(3)]
    mixed = model.losses(batch)
    for name, nats in mixed.nats.items():
        of_members = torch.stack([losses.nats[name] for losses in each])
        assert float(of_members.min()) - 1e-3 <= float(nats) <= float(of_members.mean()) + 1e-3
    one = model.losses(batch)
    assert torch.equal(one.nats["task"], mixed.nats["task"])
    # One transition: exactly the mean likelihood.
    single = collate([[segments(counting(1), Bytes(), SPEC, 64)[0]]], 64)
    of_members = torch.stack([model(single.read_by(m)).nats["dynamics"] for m in range(3)])
    expected = math.log(3) - torch.logsumexp(-of_members, 0)
    torch.testing.assert_close(model.losses(single).nats["dynamics"], expected)


@pytest.mark.integration
def test_it_learns_texts_rewards_and_terminations() -> None:
    torch.manual_seed(0)
    model, batch = net(size="30k"), rows(10)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.0))
    before = model(batch)
    for _ in range(40):
        optimizer.zero_grad()
        losses = model(batch)
        losses.objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert float(losses.bits_per_byte) < 0.3 * float(before.bits_per_byte)
    assert float(losses.nats["termination"]) < 0.7 * float(before.nats["termination"])
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("members", "rank"), [(1, 0), (3, 2)])
def test_counts_are_exact(members: int, rank: int) -> None:
    model = net(members, rank)
    counts = language_params(model.model.shape, SPEC, members, rank)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.n == model.model.shape.params
    if not rank:
        assert counts.dynamics == counts.n + counts.embeddings
    flops = language_flops(model.model.shape, SPEC, 2, 32, members, rank)
    assert flops == measured_language_flops(model, blank_rows(2, 32)) > 0
    assert flops > 6 * 64 * (counts.n + counts.embeddings) * 0.95


def test_a_checkpoint_has_heads_of_its_width() -> None:
    model = TextNet(Llama(shape(biases=True)), NUMERIC)
    assert model.reward_states(torch.zeros(5, 48)).shape[:2] == (1, 5)
    assert model.termination_logits(torch.zeros(5, 48)).shape == (1, 5)
