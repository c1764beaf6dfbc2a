"""What the README shows runs, and what it claims is in results/."""

import csv
import re
from pathlib import Path

import torch

from rarefy.data import FashionMNIST, fashion_mnist

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_it_stands(monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(example.splitlines()) <= 26
    images = torch.randint(0, 256, (512, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (512,))
    small = FashionMNIST(images, labels, images, labels)
    monkeypatch.setattr(fashion_mnist, "load", lambda *a, **k: small)
    names = {"__name__": "__main__"}
    exec(compile(example, "README.md", "exec"), names)
    assert re.search(r"90\.0 % zeros", capsys.readouterr().out)
    assert type(names["model"].conv1) is torch.nn.Conv2d


def test_every_file_and_command_named_is_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets
    for script in re.findall(r"python (benchmarks/\S+\.py)", README):
        assert (ROOT / script).exists(), script


def test_the_table_is_the_one_in_results():
    with (ROOT / "results" / "fashion-mnist.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"dense", "AutoSparse, accuracy", "AutoSparse, cost", "STR"} <= {row["method"] for row in rows}
    for method in {row["method"] for row in rows}:
        for target in {row["target"] for row in rows if row["method"] == method}:
            accuracies = [float(r["test_accuracy"]) for r in rows if (r["method"], r["target"]) == (method, target)]
            assert len(accuracies) >= 3
            mean = f"{sum(accuracies) / len(accuracies):.2f}"
            assert re.search(rf"^\| {re.escape(method)} \| {target} ?\| {mean} ", README, re.M), (method, target, mean)
