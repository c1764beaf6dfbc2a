"""What a plan says beside what is known: parameters, FLOPs that runs recorded, bytes counted by hand."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from rarefy import cost, models, sparse
from rarefy.cli import main
from rarefy.sparse import base
from rarefy.train import Classification, parse, plan
from rarefy.train.expectation import expected
from tests.train.runs import AUTOSPARSE, STEPS, TRAIN, plain, recipe, run, use_model

RECORDED = list(csv.DictReader(Path("results/compare-fashion-mnist.csv").read_text().splitlines()))

#: The schedules that nothing learned moves, and that weights of several layers do not compete in: known to the record.
KNOWN = ["SR-STE, 2:4", "Top-K with GA", "Top-K with GA, ERK", "GMP, uniform", "GMP, ERK", "GMP, ERK, 1x4 blocks"]
KNOWN += ["Top-KAST", "static", "static, uniform", "SET", "SNFS", "MEST EM", "ST-3 sigma"]


@pytest.fixture(autouse=True)
def _as_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ACTIONS", 125)


def recorded(label: str, target: str | None = None) -> tuple[dict[str, Any], list[float]]:
    """One line of the comparison, and the training FLOPs of its seeds."""
    rows = [row for row in RECORDED if row["label"] == label and target in (None, row["target"])]
    rows = [row for row in rows if row["target"] == rows[0]["target"]]
    return rows[0], [float(row["training_flops"]) for row in rows]


def expectation(row: dict[str, Any]) -> tuple[cost.Cost, float]:
    model = models.create("fashion_cnn")
    options = json.loads(row["options"]) | ({"target": float(row["target"])} if row["target"] else {})
    sparsifier = sparse.create(row["method"], model, total_steps=8 * (60000 // 128), **options)
    found = expected(cost.count(model, torch.zeros(1, 1, 28, 28)), sparsifier)
    assert found is not None
    assert sparsifier.steps == 0
    return found


@pytest.mark.parametrize("label", KNOWN)
def test_schedules_come_to_what_their_runs_recorded(label: str) -> None:
    row, shares = recorded(label)
    final, share = expectation(row)
    assert share == pytest.approx(shares[0], rel=0.005, abs=0.001)
    assert final.ratio == pytest.approx(float(row["inference_flops"]), rel=0.02)


@pytest.mark.parametrize("label", ["ST-3, no rescaling", "Feather", "GMP, global", "AC/DC", "Powerpropagation"])
def test_competing_layers_are_taken_to_be_alike(label: str) -> None:
    row, shares = recorded(label, "0.9")
    assert expectation(row)[1] == pytest.approx(shares[0], rel=0.15)


@pytest.mark.parametrize("label", ["AutoSparse, accuracy", "AutoSparse, cost", "STR"])
@pytest.mark.parametrize("target", ["0.9", "0.95"])
def test_what_is_learned_takes_no_more_than_expected(label: str, target: str) -> None:
    row, shares = recorded(label, target)
    assert max(shares) < expectation(row)[1] < 2.0 * min(shares)


def test_nobody_knows_how_sparse_a_method_without_a_target_gets() -> None:
    model = models.create("fashion_cnn")
    counted = cost.count(model, torch.zeros(1, 1, 28, 28))
    assert expected(counted, sparse.create("str", model, total_steps=100)) is None
    assert expected(counted, None) == (counted, 1.0)


def test_a_target_in_flops_is_what_is_expected_of_the_finished_model() -> None:
    model, x = models.create("fashion_cnn"), torch.zeros(1, 1, 28, 28)
    sparsifier = sparse.create("st3", model, total_steps=100, target_flops=0.2, example_input=x)
    found = expected(cost.count(model, x), sparsifier)
    assert found is not None
    assert found[0].ratio == pytest.approx(0.2)


class Photographs(Classification):
    """ResNet-50 as it was published, on noise."""

    def _load_data(self) -> None:
        self.batches = self  # type: ignore[assignment]
        self.classes = 1000
        self.one_image = torch.zeros(1, 3, 32, 32)

    def __len__(self) -> int:
        return 10

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[tuple[Tensor, Tensor]]]:
        for _ in range(first, 10):
            yield [(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]


def test_a_resnet_50(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "WARM", 1)
    monkeypatch.setattr(plan, "measure", lambda run: measured(run, 1))
    measured = plan_measure
    made = recipe(model={"name": "resnet50"}, schedule={"batch_size": 2}, optimizer={"momentum": 0.9}, **AUTOSPARSE)
    whole = Photographs(made, tmp_path / "run")
    found = plan.describe(whole, [(1, whole)], None, plan.BANDWIDTH)
    assert found.parameters == 25_557_032
    assert found.sparse == 25_502_912  # without the norms and the bias of the classifier
    memory = found.scaled[0].memory
    assert memory.gradients == 4 * 25_557_032
    assert memory.optimizer == 4 * 25_557_032
    assert 4 * 25_557_032 < memory.weights < 4.05 * 25_557_032
    assert memory.method > 4 * found.sparse


plan_measure = plan.measure


def test_the_plan_of_a_run_is_what_the_run_comes_to(tmp_path: Path) -> None:
    made = recipe(method={"name": "gmp", "target": 0.8, "distribution": "uniform"})
    found = plan.make(made)
    summary = run(made, tmp_path)
    assert found.steps == summary["steps"] == STEPS
    assert found.dense == summary["dense_flops"]
    assert found.inference == pytest.approx(summary["inference_flops"], rel=0.01)
    assert found.training_ratio == pytest.approx(summary["training_flops_ratio"], rel=0.01)
    assert found.examples == 3 * TRAIN
    assert found.training == 3.0 * summary["dense_flops"] * found.examples


def test_what_is_kept_for_the_backward_pass_is_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.Tanh(), nn.Linear(64, 10))

    use_model(monkeypatch, layers)
    one, four = (
        plan.measure(Classification(recipe(schedule={"accumulate": each}), tmp_path))[1].activations for each in (1, 4)
    )
    # The images, tanh's outputs (kept by two), and of the loss the logarithms, the labels and a weight.
    least = 4 * 32 * (144 + 64 + 10) + 8 * 32
    assert least <= one <= least + 64
    assert four == pytest.approx(one / 4, rel=0.05)


def test_several_devices_take_their_share() -> None:
    found = plan.make(recipe(), [1, 2, 4], price=2.0, bandwidth=0.001)
    one, two, four = found.scaled
    assert (one.exchange, one.memory.gradients) == (0.0, two.memory.gradients)
    assert two.exchange == pytest.approx(two.memory.gradients / 1e6)
    assert four.exchange == pytest.approx(1.5 * two.exchange)
    assert four.memory.activations < 0.3 * one.memory.activations
    for each in found.scaled:
        seconds = each.step.load + each.step.compute + each.exchange
        assert each.hours == pytest.approx(STEPS * seconds / 3600)
        assert each.price == pytest.approx(2.0 * each.devices * each.hours)


def test_shards_divide_what_is_held() -> None:
    made = {"method": {"name": "gmp", "target": 0.8}}
    (one, four), (alone, split), (averaged,), (both,) = (
        plan.make(recipe(**made, **changes), devices, bandwidth=0.001).scaled
        for changes, devices in (
            ({}, [1, 4]),
            ({"shard": True}, [1, 4]),
            ({"optimizer": {"ema": 0.9}}, [4]),
            ({"shard": True, "optimizer": {"ema": 0.9}}, [4]),
        )
    )
    whole = one.memory
    assert alone.memory == whole
    assert alone.exchange == one.exchange == 0.0
    assert split.exchange == pytest.approx(four.exchange * 3 / 2)
    held = (whole.gradients // 4, whole.optimizer // 4, whole.method // 4)
    assert (split.memory.gradients, split.memory.optimizer, split.memory.method) == held
    assert split.memory.activations == four.memory.activations
    # A part and the whole copy that is evaluated; three whole ones; two parts and a whole one.
    assert split.memory.weights == whole.weights + whole.weights // 4
    assert averaged.memory.weights == 3 * whole.weights
    assert both.memory.weights == whole.weights + whole.weights // 2


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        ([0], {}, "devices must be at least 1, got 0"),
        ([3], {}, "batch_size=32 must be divisible by schedule.accumulate=1 times 3 devices"),
        ([1], {"price": 0.0}, "price must be above 0, got 0.0"),
        ([1], {"bandwidth": -1.0}, "bandwidth must be above 0, got -1.0"),
    ],
)
def test_bad_input(devices: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.make(recipe(), devices, **options)  # type: ignore[arg-type]


def test_the_command_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    Path("recipe.yaml").write_text(yaml.safe_dump(plain(**AUTOSPARSE)))
    assert main(["plan", "recipe.yaml", "--devices", "1", "2", "--price", "3"]) == 0
    said = capsys.readouterr().out
    assert "test: fashion_cnn by autosparse" in said
    assert "  2 devices\n" in said
    assert "load + step + 2 (N - 1) / N x gradient bytes / bandwidth" in said
    assert main(["plan", "recipe.yaml", "--set", "method={name: str}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["inference"] is None
    assert told["scaled"][0]["price"] is None
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_a_translator(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            (tmp_path / f"{split}.{language}").write_text("a b c\nb c d e\nc d\nd e a\n" * 4)
    data = {"name": "translation", "folder": str(tmp_path), "vocab_size": 30, "longest": 10}
    model = {"name": "gnmt", "hidden_size": 8, "num_layers": 2}
    schedule = {"epochs": 2, "batch_size": 40}
    found = plan.make(parse({"name": "t", "model": model, "data": data, "schedule": schedule}), [2])
    assert found.examples == 32
    assert found.scaled[0].memory.activations > 0
