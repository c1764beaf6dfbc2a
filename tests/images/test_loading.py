"""Batches of pictures: the same bits whatever the workers, damaged pictures named, and every picture once."""

import os
from pathlib import Path

import pytest
import torch
from PIL import UnidentifiedImageError

from rarefy.data import loading
from rarefy.data.images import find
from rarefy.data.loading import Batch, Loader, Pictures, Request, cores, reason
from rarefy.data.pictures import Augmentation
from tests.images.pictures import encoded, folder, picture, shards

SIZE = 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "set", train=5, val=3)


def training(root: Path) -> Pictures:
    return Pictures(find(root, "train"), SIZE, augmentation=Augmentation(jitter=0.3))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.damaged == b.damaged


def test_a_batch(root):
    made = training(root)[Request([0, 7, 14, 7], [1, 2, 3, 4])]
    assert (made.images.dtype, tuple(made.images.shape)) == (torch.uint8, (4, 3, SIZE, SIZE))
    assert (made.labels.dtype, made.labels.tolist(), made.damaged) == (torch.int64, [0, 1, 2, 1], [])
    assert not torch.equal(made.images[1], made.images[3])  # one picture by two seeds
    alone = training(root)[Request([7], [4])]
    assert torch.equal(alone.images[0], made.images[3])


def test_without_seeds_or_augmentation_it_is_evaluation(root):
    found = find(root, "train")
    seen = Pictures(found, SIZE)[Request([3, 4])]
    assert torch.equal(training(root)[Request([3, 4])].images, seen.images)
    assert torch.equal(Pictures(found, SIZE)[Request([3, 4], [5, 6])].images, seen.images)
    assert not torch.equal(Pictures(found, SIZE, crop=0.4)[Request([3, 4])].images, seen.images)


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_workers_change_no_bit(root, tmp_path, kind):
    (root / "train" / "green" / "002.jpg").write_bytes(b"")
    (root / "train" / "red" / "004.jpg").write_bytes(encoded(picture())[:200])
    if kind == "shards":
        root = shards(tmp_path / "packed", root, each=6)
    requests = [Request(list(range(n, n + 5)), list(range(n + 1, n + 6))) for n in (0, 5, 10)]
    requests += [Request(list(range(15)))]
    here = list(Loader(training(root), 0)(requests))
    workers = Loader(training(root), 2)
    for _ in range(2):  # they stay for a second epoch
        assert_same(here, list(workers(requests)))
    assert sum(len(batch.damaged) for batch in here[:3]) == 2
    assert len(here[3].labels) == 13


def test_a_loader_draws_from_nobody(root):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(Loader(training(root), workers)([Request([0], [1])]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seeded", [True, False])
def test_two_ranks_cover_every_picture_once(root, workers, seeded):
    everything = list(range(15))
    pieces = [everything[begin : begin + 4] for begin in range(0, 15, 4)]
    whole = training(root)[Request(everything, everything if seeded else None)]
    got = {}
    for rank in (0, 1):
        mine = pieces[rank::2]
        loader = Loader(training(root), workers)
        batches = loader(Request(some, some if seeded else None) for some in mine)
        for some, batch in zip(mine, batches, strict=True):
            got.update({index: batch.images[row] for row, index in enumerate(some) if index not in got})
            assert batch.labels.tolist() == [index // 5 for index in some]
    assert sorted(got) == everything
    assert torch.equal(torch.stack([got[index] for index in everything]), whole.images)


# Damage


def test_in_training_the_next_takes_its_place(root):
    bad = [root / "train" / "green" / f"00{n}.jpg" for n in (1, 2)]
    whole = training(root)
    expected = whole[Request([5, 8, 8, 8], [1, 2, 3, 4])]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(encoded(picture())[:300])
    made = training(root)[Request([5, 6, 7, 8], [1, 2, 3, 4])]
    assert torch.equal(made.images, expected.images)
    assert made.labels.tolist() == [1] * 4
    assert [path for path, _ in made.damaged] == [str(bad[0]), str(bad[1]), str(bad[1])]
    assert made.damaged[0][1] == "no picture of a known format"
    assert "truncated" in made.damaged[1][1].lower()


def test_after_the_last_comes_the_first(root):
    expected = training(root)[Request([0], [9])]
    (root / "train" / "red" / "004.jpg").write_bytes(b"")
    made = training(root)[Request([14], [9])]
    assert torch.equal(made.images, expected.images)
    assert made.labels.tolist() == [0]


def test_in_evaluation_it_is_left_out(root):
    expected = training(root)[Request([0, 2])]
    gone = root / "train" / "blue" / "001.jpg"
    made_of = training(root)
    gone.unlink()
    made = made_of[Request([0, 1, 2])]
    assert torch.equal(made.images, expected.images)
    assert made.labels.tolist() == [0, 0]
    assert made.damaged == [(str(gone), "No such file or directory")]


def test_a_batch_of_nothing(root, monkeypatch):
    monkeypatch.setattr(loading, "HOPELESS", 4)
    made_of = training(root)
    for path in (root / "train").glob("*/*.jpg"):
        path.write_bytes(b"none")
    made = made_of[Request([0, 1], [2, 3])]
    assert (tuple(made.images.shape), tuple(made.labels.shape)) == ((0, 3, SIZE, SIZE), (0,))
    assert len(made.damaged) == 2 * 4


def test_reasons_have_one_line():
    assert reason(UnidentifiedImageError("<_io.BytesIO object at 0x7f>")) == "no picture of a known format"
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(OSError("broken\n  data stream")) == "broken data stream"
    assert reason(MemoryError()) == "MemoryError"
    assert len(reason(ValueError("long " * 1000))) <= 200


def test_cores_are_shared_out():
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert cores() == available
    assert cores(2) == max(1, available // 2)
    assert cores(10**6) == 1
