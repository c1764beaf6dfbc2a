"""Synthetic photographs: shapes, ranges, a function of the generator, and what each nuisance does."""

import pytest
import torch

from rarefy.data import photograph as module
from rarefy.data.photograph import photograph


def drawings(count: int = 6, side: int = 64) -> torch.Tensor:
    """Crosses, each elsewhere: dark on light."""
    made = torch.full((count, 3, side, side), 255, dtype=torch.uint8)
    for number in range(count):
        at = side // 4 + number * side // (2 * count)
        made[number, :, at : at + side // 10, side // 8 : -side // 8] = 0
        made[number, :, side // 8 : -side // 8, at : at + side // 10] = 0
    return made


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("side", [8, 32, 64, 120])
@pytest.mark.parametrize("strength", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("count", [1, 5])
def test_shapes_and_ranges(side, strength, count):
    given = drawings(count, side)
    before = given.clone()
    made = photograph(given, strength, generator=dice())
    assert (made.dtype, tuple(made.shape)) == (torch.float32, (count, 3, side, side))
    assert made.isfinite().all()
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(given, before)


def test_none():
    made = photograph(drawings()[:0], generator=dice())
    assert (made.dtype, tuple(made.shape)) == (torch.float32, (0, 3, 64, 64))


def test_a_photograph_follows_from_the_generator_alone():
    made = photograph(drawings(), generator=dice(3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(photograph(drawings(), generator=dice(3)), made)
    assert torch.equal(torch.get_rng_state(), before)
    assert (photograph(drawings(), generator=dice(4)) - made).abs().mean() > 0.05
    going_on = dice(3)
    photograph(drawings(), generator=going_on)
    assert not torch.equal(photograph(drawings(), generator=going_on), made)


def test_one_drawing_gives_unlike_photographs():
    made = photograph(drawings(1).expand(8, -1, -1, -1), generator=dice())
    for one in range(8):
        for other in range(one):
            assert (made[one] - made[other]).abs().mean() > 0.02


def explained(strength: float) -> float:
    """The median share of a photograph's variance that its own drawing explains."""
    given = drawings(6).repeat(20, 1, 1, 1)
    made = photograph(given, strength, generator=dice())
    ink = (1 - given.float() / 255).mean(1).flatten(1)
    seen = made.mean(1).flatten(1)
    pairs = zip(ink, seen, strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] ** 2 for pair in pairs]).median().item()


def test_the_stronger_the_less_is_left_of_the_drawing():
    weak, middle, strong = (explained(strength) for strength in (0.05, 0.5, 2.0))
    assert weak > 0.6
    assert weak > 2 * middle > 2 * strong


def test_light_on_dark_in_some():
    given = drawings(6).repeat(30, 1, 1, 1)
    made = photograph(given, 0.02, generator=dice())
    ink = given[:, 0] == 0
    brighter = torch.tensor(
        [one.mean(0)[mask].median() > one.mean(0)[~mask].median() for one, mask in zip(made, ink, strict=True)]
    )
    assert 0.3 < brighter.float().mean() < 0.5


@pytest.mark.parametrize("shape", [(1, 3, 60, 60), (1, 3, 64, 56), (2, 3, 4, 4)])
def test_sides_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"drawings must be square, with a side that 8 divides, got \("):
        photograph(torch.zeros(shape, dtype=torch.uint8), generator=dice())


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_strengths_that_are_none(strength):
    with pytest.raises(ValueError, match="strength must be above 0, and finite, got"):
        photograph(drawings(), strength, generator=dice())


# Parts


def test_thicker_and_thinner_strokes():
    ink = torch.zeros(3, 1, 16, 16)
    ink[:, :, 6:9, 6:9] = 1
    thick, thin, same = module._thickened(ink, torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1))
    assert (thick.sum(), thin.sum()) == (25, 1)
    assert thin[0, 7, 7] == 1
    assert torch.equal(same, ink[2])


def test_blur_is_of_each_picture_and_keeps_its_mean():
    image = torch.zeros(2, 3, 64, 64)
    image[:, :, 32, 32] = 1
    sharp, soft = module._blurred(image, torch.tensor([[0.05], [1.5]]))
    torch.testing.assert_close(sharp, image[0])
    torch.testing.assert_close(soft.sum((1, 2)), torch.ones(3))
    expected = torch.exp(-torch.tensor(1.0) / (2 * 1.5**2))
    torch.testing.assert_close(soft[0, 32, 33] / soft[0, 32, 32], expected)
    assert soft[0, 32, 37] == 0  # four pixels it reaches
    flat = torch.full((2, 3, 64, 64), 0.3)
    torch.testing.assert_close(module._blurred(flat, torch.tensor([[0.5], [2.0]])), flat)


def test_blocks_are_those_of_jpeg():
    image = torch.rand(2, 3, 32, 32, generator=dice())
    torch.testing.assert_close(module._blocks(image, torch.full((2, 1, 1), 1e-6)), image, atol=1e-4, rtol=0)
    coarse = module._blocks(image, torch.full((2, 1, 1), 50.0))
    assert torch.unique((coarse[:, :, 8:16, 16:24] - coarse[:, :, 8:9, 16:17]).abs() < 1e-6).tolist() == [True]
    flat = torch.full((1, 3, 8, 8), 100 / 255)  # 800 in the first coefficient: 16 divides it, at 1 and at 2
    for coarseness in (1.0, 2.0):
        torch.testing.assert_close(module._blocks(flat, torch.full((1, 1, 1), coarseness)), flat, atol=1e-4, rtol=0)
