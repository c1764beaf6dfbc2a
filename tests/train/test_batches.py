"""Order and augmentation are functions of the seed, the epoch and the step, and lose no pixel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.train.batches import MEAN, STD, Batches, crop_flip, mixed_seed, normalise

COUNT = 50


def batches(**changes: Any) -> Batches:
    """The label of an image is its index, and so is its every pixel."""
    labels = torch.arange(COUNT)
    images = labels.to(torch.uint8).view(-1, 1, 1).expand(-1, 6, 6).contiguous()
    return Batches(images, labels, **{"batch_size": 8, **changes})


def labels_of(made: Batches, epoch: int, first: int = 0) -> list[list[int]]:
    return [torch.cat([y for _, y in step]).tolist() for step in made.epoch(epoch, first)]


def test_an_epoch_is_a_permutation_without_its_last_incomplete_batch() -> None:
    made = batches()
    steps = labels_of(made, 0)
    assert len(made) == len(steps) == COUNT // 8
    assert [len(step) for step in steps] == [8] * 6
    seen = [label for step in steps for label in step]
    assert len(set(seen)) == 48
    assert set(seen) <= set(range(COUNT))
    assert seen != sorted(seen)
    # What is left out changes from epoch to epoch.
    assert len({frozenset(label for step in labels_of(made, epoch) for label in step) for epoch in range(5)}) > 1


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert labels_of(batches(), 3) == labels_of(batches(), 3)
    orders = [labels_of(batches(seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_an_epoch_can_begin_in_its_middle() -> None:
    made = batches(augment="crop-flip")
    late = list(made.epoch(2))[4:]
    for one, other in zip(late, made.epoch(2, 4), strict=True):
        assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_images_stay_with_their_labels() -> None:
    for step in batches(accumulate=2).epoch(0):
        for x, y in step:
            assert x.shape == (4, 1, 6, 6)
            assert torch.equal(((x[:, 0, 0, 0] * STD + MEAN) * 255).round().long(), y)


def test_ranks_and_micro_batches_share_out_the_batch() -> None:
    whole = labels_of(batches(), 1)
    ranks = [labels_of(batches(rank=rank, world=2, accumulate=2), 1) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert all(len(step) == 2 for step in batches(rank=0, world=2, accumulate=2).epoch(1))


def test_ranks_are_augmented_apart() -> None:
    images = torch.randint(256, (COUNT, 6, 6), dtype=torch.uint8)
    same = torch.zeros(COUNT, dtype=torch.int64)
    images[:] = images[0]  # all alike, so that what differs is the augmentation
    one, other = (
        next(Batches(images, same, batch_size=16, augment="crop-flip", rank=rank, world=2).epoch(0)) for rank in (0, 1)
    )
    assert not torch.equal(one[0][0], other[0][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 51}, "schedule.batch_size=51 is more than the 50 training images"),
        (
            {"batch_size": 8, "accumulate": 3},
            "batch_size=8 must be divisible by schedule.accumulate=3 times 1 processes",
        ),
        (
            {"batch_size": 8, "accumulate": 4, "world": 4},
            "must be divisible by schedule.accumulate=4 times 4 processes",
        ),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(**changes)


def test_normalise() -> None:
    x = normalise(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert x.shape == (1, 1, 1, 2)
    torch.testing.assert_close(x.flatten(), torch.tensor([-MEAN / STD, (1 - MEAN) / STD]))


def draws(monkeypatch: pytest.MonkeyPatch, shift: int, mirror: bool, images: Tensor) -> Tensor:
    """`crop_flip` with this shift, in [0, 4] where 2 is none, for all images."""
    monkeypatch.setattr(torch, "randint", lambda high, size, generator: torch.full(size, shift))
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.0 if mirror else 0.9))
    return crop_flip(images, torch.Generator())


def test_crop_flip_known_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(1, 256, (3, 5, 6), dtype=torch.uint8)
    assert torch.equal(draws(monkeypatch, 2, False, images), images)
    assert torch.equal(draws(monkeypatch, 2, True, images), images.flip(2))
    moved = draws(monkeypatch, 0, False, images)
    assert torch.equal(moved[:, 2:, 2:], images[:, :-2, :-2])
    assert not moved[:, :2].any()
    assert not moved[:, :, :2].any()


def test_crop_flip_gives_shifted_and_mirrored_originals() -> None:
    images = torch.randint(1, 256, (200, 7, 7), dtype=torch.uint8)
    made = crop_flip(images, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = []
    for image, original in zip(made, padded, strict=True):
        ways = [
            (down, right, mirror)
            for down in range(5)
            for right in range(5)
            for mirror in (False, True)
            if torch.equal(image.flip(1) if mirror else image, original[down : down + 7, right : right + 7])
        ]
        assert len(ways) == 1
        found += ways
    assert {way[:2] for way in found} == {(down, right) for down in range(5) for right in range(5)}
    assert 70 < sum(mirror for _, _, mirror in found) < 130
    assert made.dtype == torch.uint8


def test_mixed_seeds_are_spread_evenly_and_do_not_meet() -> None:
    seeds = [mixed_seed(seed, epoch, step) for seed in range(10) for epoch in range(10) for step in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Each of the 63 bits is set in half of 10,000 of them: 5,000 with a standard deviation of 50.
    for bit in range(63):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 5000) < 250
    assert len({mixed_seed(), mixed_seed(0), mixed_seed(0, 0), mixed_seed(1, 0), mixed_seed(0, 1), mixed_seed(-1)}) == 6
