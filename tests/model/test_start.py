"""The start model: what it finds in a few dozen starts, its densities and its draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mesocosm.model import rng
from mesocosm.model.spec import PartSpec, Spec, TextSpan
from mesocosm.model.start import StartModel
from mesocosm.model.start_fit import StartNumbers, _Slot
from mesocosm.model.tensors import Parts

BIN = 1e-4
KEYS = rng.keys(0, torch.arange(2000), 0, 0)


def numeric(n: int, task: int = 0) -> Spec:
    return Spec(PartSpec(n - task, (BIN,) * (n - task)), PartSpec(), PartSpec(task, (BIN,) * task))


def split(values: Tensor, task: int = 0, categories: Tensor | None = None) -> tuple[Parts, Parts]:
    if categories is None:
        categories = torch.zeros(len(values), 0, dtype=torch.int64)
    return Parts(values[:, :task], categories[:, :0]), Parts(values[:, task:], categories)


def angle(n: int, generator: torch.Generator) -> Tensor:
    theta = 6.283 * torch.rand(n, generator=generator)
    other = torch.randn(n, generator=generator)
    return torch.stack((theta.cos(), other, theta.sin()), 1) / 0.7


def arm(n: int, generator: torch.Generator) -> Tensor:
    """As Reacher-v5's: two small angles, a target, and the way from the fingertip to it."""
    a, b, x, y = (torch.rand(4, n, generator=generator) * 2 - 1) * 0.2
    way_x = 0.1 * a.cos() + 0.11 * (a + b).cos() - x
    way_y = 0.1 * a.sin() + 0.11 * (a + b).sin() - y
    return torch.stack((x, y, a.cos(), b.cos(), a.sin(), b.sin(), way_x, way_y), 1) / 0.5


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 5, generator=generator)


def uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, 4, generator=generator)


DRAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "angle": angle, "arm": arm, "normal": normal, "uniform": uniform,
}  # fmt: skip


def fitted(values: Tensor, task: int = 0) -> StartModel:
    return StartModel(numeric(values.shape[1], task)).fit(*split(values, task))


def drawn(model: StartModel, keys: Tensor = KEYS) -> Tensor:
    task, observation = model.draw(keys)
    return torch.cat((task.numbers, observation.numbers), 1)


def test_two_equal_signs_are_drawn_as_such() -> None:
    """Of a number with two values, its square determines the other as well as it does itself."""
    sign = (torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) > 0.5) * 2.0 - 1
    made = drawn(fitted(sign.repeat(1, 2)))
    assert ((made.abs() - 1).abs() < 0.02).float().mean() > 0.99
    assert torch.equal(made[:, 0] > 0, made[:, 1] > 0)


def test_an_angle_is_drawn_on_its_circle() -> None:
    """13 starts teach that cosine and sine belong together, and both signs of the sine."""
    model = fitted(angle(13, torch.Generator().manual_seed(0)))
    made = drawn(model) * 0.7
    radius = made[:, 0].square() + made[:, 2].square()
    inside = made[:, 0].abs() <= 1
    assert (radius[inside] - 1).abs().median() < 2e-3
    assert 0.2 < (made[:, 2] > 0).float().mean() < 0.8


def test_numbers_that_others_determine() -> None:
    model = fitted(arm(40, torch.Generator().manual_seed(0)), task=2)
    x, y, cos_a, cos_b, sin_a, sin_b, way_x, way_y = (drawn(model) * 0.5).T
    assert (cos_a.square() + sin_a.square() - 1).abs().median() < 1e-3
    assert (cos_b.square() + sin_b.square() - 1).abs().median() < 1e-3
    fingertip = 0.1 * cos_a + 0.11 * (cos_a * cos_b - sin_a * sin_b)
    assert (fingertip - x - way_x).abs().median() < 1e-3
    fingertip = 0.1 * sin_a + 0.11 * (sin_a * cos_b + cos_a * sin_b)
    assert (fingertip - y - way_y).abs().median() < 1e-3


@pytest.mark.parametrize("name", DRAWS)
def test_starts_are_new_and_as_likely_as_held_out_ones(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logged, real = DRAWS[name](60, generator), DRAWS[name](500, generator)
    model = fitted(logged)
    made = drawn(model)
    deviation = logged.std(0)
    of_made, of_real = (
        torch.cdist(x / deviation, logged / deviation).amin(1) for x in (made, real)
    )
    assert 0.3 < (of_made[:, None] < of_real).float().mean() < 0.65, "no copies, and no farther"
    nats_made, nats_real = (-model.log_prob(*split(x)).median() for x in (made, real))
    assert torch.isfinite(nats_made) and abs(float(nats_made - nats_real)) < 1.0


def test_masses_of_all_bins_sum_to_one() -> None:
    wide = Spec(PartSpec(1, (0.05,)), PartSpec())
    for values in (torch.randn(20, 1), torch.rand(20, 1), torch.zeros(20, 1), torch.zeros(1, 1)):
        model = StartModel(wide).fit(*split(values))
        grid = torch.arange(-40, 40, 0.05)[:, None]
        assert model.log_prob(*split(grid)).exp().sum() == pytest.approx(1, abs=0.02)
        assert (model.log_prob(*split(grid)) <= 0).all()


def test_two_kinds_of_starts_stay_two() -> None:
    sides = torch.tensor([[-1.0], [1.0]]).repeat(20, 1) + 0.01 * torch.randn(40, 1)
    model = fitted(torch.cat((sides, -sides + 0.01 * torch.randn(40, 1)), 1))
    made = drawn(model)
    assert ((made.abs() - 1).abs() < 0.2).float().mean() > 0.97
    assert (made.sum(1).abs() < 0.2).float().mean() > 0.97


def test_nats_of_any_start_are_finite() -> None:
    for values in (torch.zeros(30, 3), torch.randn(30, 3), torch.randn(2, 3), torch.randn(0, 3)):
        model = fitted(values)
        far = torch.tensor([[0.0, 0.0, 0.0], [1e3, -1e3, 0.0], [0.1, 0.2, 5.0]])
        log_prob = model.log_prob(*split(far))
        assert torch.isfinite(log_prob).all() and (log_prob <= 0).all()
        assert torch.isfinite(drawn(model)).all()
    surprise = fitted(torch.zeros(30, 3)).log_prob(*split(torch.tensor([[0.0, 0.0, 1.0]])))
    assert -30 < float(surprise) < -10


def test_a_constant_stays() -> None:
    model = fitted(torch.full((13, 2), 0.25))
    made = drawn(model)
    assert ((made - 0.25).abs() < BIN).float().mean() > 0.98
    assert float(model.log_prob(*split(torch.full((1, 2), 0.25)))) > -0.1


CHOICES = Spec(PartSpec(0, (), (3, 3, 5)), PartSpec())


def chosen(categories: Tensor, spec: Spec = CHOICES) -> StartModel:
    nothing = torch.zeros(len(categories), 0)
    return StartModel(spec).fit(*split(nothing, 0, categories))


def test_categories_that_go_together_and_those_that_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = torch.randint(3, (60,), generator=generator), torch.randint(5, (60,))
    model = chosen(torch.stack((first, 2 - first, last), 1))
    made = model.draw(KEYS)[1].categories
    assert (made[:, 0] + made[:, 1] == 2).float().mean() > 0.95
    counts = torch.zeros(3, 5).index_put((made[:, 0], made[:, 2]), torch.ones(2000), True)
    assert (counts > 40).all(), "any first with any last"
    unseen = torch.tensor([[0, 0, 0]])
    assert -15 < float(model.log_prob(*split(torch.zeros(1, 0), 0, unseen))) < -2


def test_texts_end_once() -> None:
    text = TextSpan(0, 4, 1)
    spec = Spec(PartSpec(0, (), (4,) * 4, (text,)), PartSpec())
    logged = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0], [1, 2, 3, 1]]).repeat(5, 1)
    model = chosen(logged, spec)
    made = model.draw(KEYS)[1].categories
    assert (made[:, 0] > 0).all()
    ended = (made == 0).cumsum(1) > 0
    assert (made[ended] == 0).all()
    same = (made[:, None] == logged[:3]).all(2).any(1)
    assert same.float().mean() > 0.9
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    valid = (every[:, 0] > 0) & ~((every[:, :-1] == 0) & (every[:, 1:] > 0)).any(1)
    total = model.log_prob(*split(torch.zeros(int(valid.sum()), 0), 0, every[valid])).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-4)


LETTERS = " abcdefghijklmnopqrstuvwxyz"


def written(texts: list[str], length: int) -> Tensor:
    """The category slots [N, length] of texts."""
    return torch.tensor(
        [[LETTERS.index(c) + 1 for c in t] + [0] * (length - len(t)) for t in texts]
    )


def read(categories: Tensor) -> list[str]:
    return ["".join(LETTERS[c - 1] for c in row if c) for row in categories.tolist()]


def of_texts(*lengths: int, choices: int = 0) -> Spec:
    """`choices` values of one category, if any, then texts of these lengths."""
    first = [int(choices > 0) + sum(lengths[:k]) for k in range(len(lengths))]
    texts = tuple(TextSpan(start, length, 1) for start, length in zip(first, lengths, strict=True))
    sizes = (choices,) * (choices > 0) + (len(LETTERS) + 1,) * sum(lengths)
    return Spec(PartSpec(0, (), sizes, texts), PartSpec())


def test_one_logged_start_is_drawn_again() -> None:
    text = "go to the kitchen"
    logged = torch.cat((torch.tensor([[7]]), written([text], 20)), 1)
    model = chosen(logged, of_texts(20, choices=16))
    made = model.draw(KEYS)[1].categories
    assert (made == logged).all(1).float().mean() > 0.98
    assert -0.02 < float(model.log_prob(*split(torch.zeros(1, 0), 0, logged))) < 0
    unseen = logged + 1
    assert torch.isfinite(model.log_prob(*split(torch.zeros(1, 0), 0, unseen))).all()


OBJECTS = ("apple", "pear", "plum", "mug", "plate", "bowl")
PLACES = ("shelf", "table", "sink", "drawer")


@pytest.mark.parametrize("count", [2, 12, 24])
def test_texts_that_all_differ_are_drawn_whole(count: int) -> None:
    every = [f"put the {thing} in the {place}" for thing in OBJECTS for place in PLACES]
    texts = every[:: len(every) // count]
    model = chosen(written(texts, 32), of_texts(32))
    made = read(model.draw(KEYS)[1].categories)
    assert set(texts) <= set(made)
    assert sum(text in texts for text in made) / len(made) > 0.98
    nats = -model.log_prob(*split(torch.zeros(count, 0), 0, written(texts, 32)))
    assert torch.allclose(nats, torch.full((count,), count).log(), atol=0.05), "all are as likely"


def test_a_second_text_is_whole_and_goes_with_the_first() -> None:
    """Of two texts and a category: the first decides the second, the category goes with neither."""
    rows = [(k % 2, t, f"you see {t.rsplit()[-1]}") for k, t in enumerate(
        f"put the {OBJECTS[k % 6]} in the {PLACES[k % 4]}" for k in range(36)
    )]  # fmt: skip
    choice = torch.tensor([[row[0]] for row in rows])
    first, second = written([r[1] for r in rows], 28), written([r[2] for r in rows], 20)
    model = chosen(torch.cat((choice, first, second), 1), of_texts(28, 20, choices=2))
    made = model.draw(KEYS)[1].categories
    pairs = list(zip(read(made[:, 1:29]), read(made[:, 29:]), strict=True))
    assert sum(p in {row[1:] for row in rows} for p in pairs) / len(pairs) > 0.97


def test_nats_of_texts_are_those_of_their_draws() -> None:
    """The frequency of each draw is its probability, where the texts are short enough to count."""
    text = TextSpan(1, 3, 0)
    spec = Spec(PartSpec(0, (), (2, 3, 3, 3), (text,)), PartSpec())
    logged = torch.tensor([[0, 1, 2, 0], [0, 2, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 2, 2]])
    model = chosen(logged, spec)
    model.epsilon[:] = 0.2
    model.category_mismatch[:] = torch.tensor([0.0, 1.0, 2.0, 2.0])
    every = torch.cartesian_prod(*[torch.arange(k) for k in (2, 3, 3, 3)])
    every = every[~((every[:, 1:-1] == 0) & (every[:, 2:] > 0)).any(1)]
    p = model.log_prob(*split(torch.zeros(len(every), 0), 0, every)).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    made = model.draw(rng.keys(0, torch.arange(20000), 0, 0))[1].categories
    drawn_share = (made[:, None] == every).all(2).float().mean(0)
    assert float(drawn_share.sum()) == 1
    assert (drawn_share - p).abs().max() < 0.01


def test_the_fit_holds_no_matrix_of_starts_for_each_number() -> None:
    z = torch.randn(64, 2, dtype=torch.float64)
    slot = _Slot(StartNumbers.blank(64, 2), 0, z, torch.tensor(1e-4).double(), [], None)
    slot_tensors = [value for value in vars(slot).values() if isinstance(value, Tensor)]
    assert max(value.untyped_storage().nbytes() for value in slot_tensors) <= z.nbytes


def test_a_number_that_a_category_decides() -> None:
    spec = Spec(PartSpec(1, (BIN,), (2,)), PartSpec())
    side = torch.arange(40)[:, None] % 2
    model = StartModel(spec).fit(*split(side * 2 - 1 + 0.05 * torch.randn(40, 1), 0, side))
    made = model.draw(KEYS)[1]
    assert ((made.numbers > 0) == (made.categories == 1)).float().mean() > 0.97


def test_the_same_bits_again_and_after_loading(tmp_path: Path) -> None:
    logged = arm(40, torch.Generator().manual_seed(0))
    model, again = fitted(logged, task=2), fitted(logged, task=2)
    loaded = StartModel(numeric(8, 2))
    loaded.load_state_dict(model.state_dict())
    made = drawn(model)
    for other in (again, loaded):
        assert torch.equal(drawn(other), made)
        assert torch.equal(other.log_prob(*split(made, 2)), model.log_prob(*split(made, 2)))
    assert torch.allclose(drawn(model, KEYS.flip(0)), made.flip(0), atol=1e-5)
    with pytest.raises(RuntimeError, match="logged"):
        StartModel(numeric(7)).load_state_dict(model.state_dict())
