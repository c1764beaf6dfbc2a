"""Training on pictures: batches that follow from the seed, resuming to the bit, damaged pictures, refusals."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rarefy import engine, models
from rarefy.cli import main
from rarefy.cli import models as cli_models
from rarefy.data import images, loading
from rarefy.train import Recipe, TrainingInterruptedError, parse, prepare
from rarefy.train import image_batches as batches_module
from rarefy.train.image_batches import HeldOut, ImageBatches, normalise
from rarefy.train.images import class_names
from rarefy.train.recipe import Images as Data
from rarefy.train.run import Run
from tests.cli import printed, refused
from tests.images.pictures import encoded, folder, picture, shards
from tests.train.runs import outcome, records, stop_at

BATCH, EPOCHS = 8, 2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "set", train=16, val=7)


def recipe(root: Path, **changes: Any) -> Recipe:
    data = {"name": "images", "folder": str(root), "size": 16, "workers": 0, **changes.pop("data", {})}
    return parse(
        {
            "name": "test",
            "model": {"name": "tests.train.networks:small"},
            "data": data,
            "method": {"name": "autosparse", "target": 0.5},
            "optimizer": {"lr": 0.05},
            "schedule": {"epochs": EPOCHS, "batch_size": BATCH},
            **changes,
        }
    )


def trained(made: Recipe, into: Path, stops: tuple[int, ...] = ()) -> dict[str, Any]:
    for index, step in enumerate(stops):
        with pytest.raises(TrainingInterruptedError):
            prepare(made, into, resume=index > 0).train(stop_at(step))
    return prepare(made, into, resume=bool(stops)).train()


# Batches


def batches(root: Path, data: dict[str, Any] | None = None, **options: Any) -> ImageBatches:
    described = Data(**{"folder": str(root), "size": 16, "workers": 0, **(data or {})})
    return ImageBatches(images.find(root, "train"), described, **{"classes": 3, "batch_size": 8, **options})


def flat(made: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> list[torch.Tensor]:
    return [tensor for step in made for pair in step for tensor in pair]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_epoch_goes_on_from_any_step_to_the_bit(root):
    made = batches(root, {"jitter": 0.3, "mixup": 0.2}, seed=3)
    assert len(made) == 6
    whole = list(made.epoch(1))
    assert [[tuple(x.shape), tuple(y.shape)] for step in whole for x, y in step] == [[(8, 3, 16, 16), (8, 3)]] * 6
    assert_same(flat(whole[4:]), flat(list(batches(root, {"jitter": 0.3, "mixup": 0.2}, seed=3).epoch(1, 4))))
    assert not torch.equal(flat(list(made.epoch(0)))[0], flat(whole)[0])
    assert not torch.equal(flat(list(batches(root, seed=4).epoch(1)))[0], flat(list(batches(root, seed=3).epoch(1)))[0])
    began = made.epoch(1)
    next(began)
    del began
    assert_same(flat(whole), flat(list(made.epoch(1))))


def test_workers_change_no_bit(root):
    options = {"jitter": 0.3, "mixup": 0.2, "photograph": 0.5}
    here = flat(list(batches(root, options).epoch(0)))
    there = batches(root, {**options, "workers": 2})
    assert_same(here, flat(list(there.epoch(0))))
    assert_same(here[-4:], flat(list(there.epoch(0, 4))))


def test_two_processes_cover_every_picture_once(root, monkeypatch):
    asked: list[int] = []
    read = images.FolderImages.read
    monkeypatch.setattr(images.FolderImages, "read", lambda self, i: (asked.append(int(i)), read(self, i))[1])
    whole = [torch.cat(flat([step])[::2]) for step in batches(root).epoch(0)]
    assert sorted(asked) == list(range(48))
    asked.clear()
    halves = []
    for rank in (0, 1):
        before = len(asked)
        halves.append(
            [torch.cat(flat([step])[::2]) for step in batches(root, rank=rank, world=2, accumulate=2).epoch(0)]
        )
        assert len(asked) - before == 24
    assert sorted(asked) == list(range(48))
    for step, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(step, torch.cat(parts))


def test_batches_that_do_not_divide(root):
    with pytest.raises(ValueError, match="schedule.batch_size=49 is more than the 48 training images"):
        batches(root, batch_size=49)
    with pytest.raises(ValueError, match="batch_size=8 must be divisible by schedule.accumulate=3 times 2 processes"):
        batches(root, accumulate=3, world=2)


def test_without_augmentation_training_sees_what_evaluation_sees(root):
    data = Data(folder=str(root), size=16, workers=0, augment="none")
    train = images.find(root, "train")
    made = ImageBatches(train, data, classes=3, batch_size=48)
    ((x, y),) = next(made.epoch(0))
    (pair,) = HeldOut(train, data)
    assert sorted(each.sum().item() for each in x) == pytest.approx(sorted(each.sum().item() for each in pair[0]))
    assert sorted(y.tolist()) == pair[1].tolist()


def test_normalised_pictures_have_the_statistics_of_imagenet():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert normalise(white)[0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)
    some = torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shares = some / 255.0
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (batches_module.MEAN, batches_module.STD))
    torch.testing.assert_close(normalise(some), (shares - mean) / std)
    torch.testing.assert_close(normalise(shares), (shares - mean) / std)


def test_mixed_pictures_have_mixed_labels(root):
    plain, mixed = (batches(root, {"mixup": alpha, "augment": "none"}) for alpha in (0.0, 1.0))
    for ((x, y),), ((mix, shares),) in zip(plain.epoch(0), mixed.epoch(0), strict=True):
        assert shares.sum(1).tolist() == pytest.approx([1.0] * 8)
        truth = nn.functional.one_hot(y, 3).float()
        other = (y != y.flip(0)).nonzero()[0, 0]
        share = 1 - shares[other, y[other]]
        torch.testing.assert_close(shares, truth.lerp(truth.flip(0), share))
        torch.testing.assert_close(mix, x.lerp(x.flip(0), share), atol=1e-5, rtol=1e-5)


def test_evaluation_is_shared_out_and_does_not_depend_on_how(root, monkeypatch):
    monkeypatch.setattr(batches_module, "EVALUATION_BATCH", 4)
    held, data = images.find(root, "val"), Data(folder=str(root), size=16, workers=0, photograph=0.5)
    whole = list(HeldOut(held, data))
    assert [len(y) for _, y in whole] == [4, 4, 4, 4, 4, 1]
    for rank in (0, 1):
        assert_same(flat([whole[rank::2]]), flat([list(HeldOut(held, data, rank=rank, world=2))]))
    assert_same(flat([whole]), flat([list(HeldOut(held, data))]))


def test_photographs_of_a_batch_that_is_damaged_as_a_whole(root, monkeypatch):
    monkeypatch.setattr(batches_module, "EVALUATION_BATCH", 20)  # the last has one picture
    (root / "val" / "red" / "006.jpg").write_bytes(b"")
    told: list[tuple[str, str]] = []
    data = Data(folder=str(root), size=16, workers=0, photograph=0.5)
    made = list(HeldOut(images.find(root, "val"), data, tell=told.extend))
    assert [tuple(x.shape) for x, _ in made] == [(20, 3, 16, 16)]
    assert [path for path, _ in told] == [str(root / "val" / "red" / "006.jpg")]


def test_a_disk_that_is_gone_ends_the_run(root, monkeypatch):
    monkeypatch.setattr(loading, "HOPELESS", 5)
    made = batches(root)
    for path in (root / "train").glob("*/*.jpg"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"pictures in a row cannot be read, the last .*jpg \(No such file or directory\)"
    ):
        next(made.epoch(0))


# Runs


def test_a_run_learns_the_colours(root, tmp_path):
    schedule = {"epochs": 6, "batch_size": 16}
    summary = trained(recipe(root, schedule=schedule, method={"name": "dense"}), tmp_path / "run")
    assert summary["test_accuracy"] > 0.9
    assert "test_top5" not in summary  # of three classes
    assert (summary["data"], summary["model"]) == ("images", "tests.train.networks:small")
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about.pop("classes") == ["blue", "green", "red"]
    assert {name: some["pictures"] for name, some in about.items()} == {"train": 48, "held_out": 21}
    model = models.create("tests.train.networks:small", num_classes=3)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    (pair,) = HeldOut(images.find(root, "val"), Data(folder=str(root), size=16, workers=0))
    with torch.no_grad():
        right = (model.eval()(pair[0]).argmax(1) == pair[1]).double().mean().item()
    assert summary["test_accuracy"] == right


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_resuming_amid_an_epoch_changes_no_bit(root, tmp_path, kind, caplog):
    (root / "train" / "red" / "003.jpg").write_bytes(b"no picture")
    (root / "train" / "blue" / "005.jpg").write_bytes(b"")
    (root / "val" / "blue" / "001.jpg").write_bytes(b"")
    if kind == "shards":
        root = shards(tmp_path / "shards", root)
    made = recipe(root, data={"jitter": 0.2, "mixup": 0.1})
    with caplog.at_level(logging.WARNING, "rarefy"):
        whole = trained(made, tmp_path / "whole")
    assert whole["damaged_pictures"] == 3
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert all("is damaged (no picture of a known format)" in message for message in told)
    trained(made, tmp_path / "pieces", stops=(2, 3, 9))
    other_workers = recipe(root, data={"jitter": 0.2, "mixup": 0.1, "workers": 2})
    with pytest.raises(TrainingInterruptedError):
        prepare(made, tmp_path / "other").train(stop_at(4))
    prepare(other_workers, tmp_path / "other", resume=True).train()
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "pieces") == outcome(tmp_path / "other")


def test_accuracy_leaves_damaged_pictures_out(root, tmp_path):
    made: Run = prepare(recipe(root), tmp_path / "run")
    (tmp_path / "run").mkdir()
    before = made._checked_metrics()
    for path in (root / "val").glob("*/00[0-5].jpg"):
        path.write_bytes(b"")
    after = made._checked_metrics()
    assert after["test_accuracy"] in (0, 1 / 3, 2 / 3, 1)
    assert set(after) == set(before)
    for path in (root / "val").glob("*/*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the pictures that are evaluated on can be read"):
        made._checked_metrics()


def test_the_first_five_of_many_classes(tmp_path):
    for split in ("train", "val"):
        for label in range(12):
            place = tmp_path / "set" / split / f"{label:02}"
            place.mkdir(parents=True)
            (place / "a.png").write_bytes(encoded(picture((20 * label, 90, 100), (16, 16)), "PNG"))
    summary = trained(recipe(tmp_path / "set"), tmp_path / "run")
    assert summary["test_accuracy"] <= summary["test_top5"] <= 1
    last = records(tmp_path / "run")[-1]
    assert last["test_top5"] == summary["test_top5"]
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "among the first five" in (tmp_path / "run" / "report.html").read_text()


def test_other_pictures_are_not_resumed_with(root, tmp_path):
    made = recipe(root)
    with pytest.raises(TrainingInterruptedError):
        prepare(made, tmp_path / "run").train(stop_at(1))
    (root / "train" / "red" / "more.jpg").write_bytes(encoded(picture()))
    with pytest.raises(ValueError, match=r"are not those that the run began with \(.*data.json says what they were\)"):
        prepare(made, tmp_path / "run", resume=True)
    (root / "train" / "red" / "more.jpg").rename(root / "more.jpg")
    root.rename(root.parent / "moved")
    prepare(recipe(root.parent / "moved"), tmp_path / "run", resume=True).train()


def test_half_a_line_of_what_was_damaged(root, tmp_path):
    (root / "train" / "red" / "000.jpg").write_bytes(b"")
    made = recipe(root)
    with pytest.raises(TrainingInterruptedError):
        prepare(made, tmp_path / "run").train(stop_at(1))
    place = tmp_path / "run" / "damaged.jsonl"
    place.write_text('["/a.png", "gone"]\n["/b.png", "cut o')
    assert prepare(made, tmp_path / "run", resume=True).train()["damaged_pictures"] == 2
    assert [json.loads(line)[0] for line in place.read_text().splitlines()] == [
        "/a.png",
        str(root / "train" / "red" / "000.jpg"),
    ]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data.json", "", "data.json: not JSON .*; put the file back, or start a new run"),
        ("data.json", "[" * 100_000, "data.json: not JSON .*; put the file back, or start a new run"),
        ("data.json", "5", "data.json: expected a JSON object, got 5; put the file back"),
        ("damaged.jsonl", "x\n", "damaged.jsonl, line 1: not JSON .*; delete that line"),
        (
            "damaged.jsonl",
            '["/a.png", "gone"]\n5\n',
            "line 2: expected a picture's path and what is wrong, got 5; d",
        ),
        ("damaged.jsonl", "[]\n", "line 1: expected a picture's path and what is wrong, got "),
        ("damaged.jsonl", "{}\n", "line 1: expected a picture's path and what is wrong, got {}"),
        ("damaged.jsonl", '[["/a.png"], "gone"]\n', "line 1: expected a picture's path and what is wrong"),
    ],
    ids=lambda part: part[:20],
)
def test_damaged_files_beside_a_checkpoint_are_named(file, text, message, root, tmp_path):
    made = recipe(root)
    with pytest.raises(TrainingInterruptedError):
        prepare(made, tmp_path / "run").train(stop_at(1))
    (tmp_path / "run" / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(made, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "classes must be a list of texts, got None"),
        ('{"classes": 5}', "classes must be a list of texts, got 5"),
        ('{"classes": [5]}', "classes must be a list of texts, got [5]"),
    ],
)
def test_classes_that_are_none_are_named(text, message, tmp_path):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        class_names(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'data.json'}: ")
    assert str(caught.value).endswith("; put back what the run wrote")


def test_the_run_is_exported_and_measured(root, tmp_path, capsys):
    trained(recipe(root), tmp_path / "run")
    capsys.readouterr()
    source = cli_models.find(tmp_path / "run")
    batches = cli_models.calibration(None, source, torch.zeros(1, 3, 16, 16))
    assert [tuple(batch.shape) for batch in batches] == [(48, 3, 16, 16)]  # all there are
    (tmp_path / "set").rename(tmp_path / "gone")  # the network needs the names of the classes alone
    words = ("export", str(tmp_path / "run"), "--to", "engine", "--output")
    printed(capsys, *words, str(tmp_path / "net.engine"))
    assert engine.load(tmp_path / "net.engine")(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    (tmp_path / "run" / "data.json").unlink()
    assert "data.json is missing" in refused(capsys, *words, str(tmp_path / "other.engine"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": None}, "data.folder must be a folder with train and val, got None"),
        ({"held_out": "train"}, "data.held_out must be a split to evaluate on, such as val, got 'train'"),
        ({"held_out": "../val"}, "data.held_out must be a split"),
        ({"size": 0}, r"data.size must be in \[1, 4096\], got 0"),
        ({"size": 60, "photograph": 1.0}, "data.size must be a multiple of 8 for photographs, got 60"),
        ({"crop": 1.5}, r"data.crop must be in \(0, 1\], got 1.5"),
        ({"augment": "flip"}, "unknown data.augment: 'flip'"),
        ({"scale": [0.5]}, r"data.scale must be two shares such as \[0.08, 1.0\], got \[0.5\]"),
        ({"scale": [0.5, 0.1]}, "data.scale must be two shares"),
        ({"scale": []}, "data.scale must be two shares"),
        ({"jitter": -0.1}, r"data.jitter must be in \[0, 1\], got -0.1"),
        ({"mixup": float("inf")}, "data.mixup must be at least 0, and finite, got inf"),
        ({"photograph": -1}, "data.photograph must be at least 0"),
        ({"workers": -1}, r"data.workers must be in \[0, 1024\], or null, got -1"),
        ({"train_size": 5}, "unknown key in data: 'train_size'"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, data=changes)


def test_models_of_others(root, tmp_path):
    for name in ("tests.train.networks:any_options", "tests.train.networks:small"):
        run = prepare(recipe(root, model={"name": name}), tmp_path / "run")
        assert run.plain_model[-1].out_features == 3
    refusals = {
        "tests.train.networks:two_classes": r"gives \(2,\) numbers an image, but images has 3 classes",
        "tests.train.networks:no_module": "must return a torch.nn.Module, got int",
        "tests.train.networks:Wrapped": r"must give a tensor \(B, classes\), got dict: wrap it in one that does",
        "tests.train.networks:smal": "unknown function in tests.train.networks: 'smal'; did you mean 'small'?",
        "tests.train.networks:not_callable": "must be a function that returns a torch.nn.Module, got Tensor",
    }
    for name, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            prepare(recipe(root, model={"name": name}), tmp_path / "run")
    with pytest.raises(ImportError, match="needs the module nowhere: install it, or put its folder on PYTHONPATH"):
        prepare(recipe(root, model={"name": "nowhere:net"}), tmp_path / "run")
    with pytest.raises(ValueError, match="unknown option of model 'tests.train.networks:small': 'widht'; did you mean"):
        prepare(recipe(root, model={"name": "tests.train.networks:small", "widht": 8}), tmp_path / "run")
    with pytest.raises(ValueError, match="any_options cannot be called with .*'depth': 3"):
        prepare(recipe(root, model={"name": "tests.train.networks:any_options", "depth": 3}), tmp_path / "run")
    for name in ("os.system: x", "a:b c", ":small", "timm:"):
        with pytest.raises(ValueError, match="model.name must be a network of rarefy's, timm:NAME or package.module:f"):
            recipe(root, model={"name": name})


def test_reading_a_recipe_imports_nothing(root):
    assert recipe(root, model={"name": "nowhere.at_all:net", "depth": [1, 2]}).model.options == {"depth": [1, 2]}
