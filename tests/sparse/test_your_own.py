"""The class that the documentation shows is run as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy import sparse
from rarefy.sparse.registry import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "your-own-method.md"


@pytest.fixture
def even_rows(monkeypatch):
    for name, method in list(METHODS.items()):
        monkeypatch.setitem(METHODS, name, method)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    yield names["EvenRows"]
    METHODS.pop("even-rows")


def test_the_documented_class_trains_and_evens_out_its_rows(even_rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4))
    sparsifier = sparse.create("even-rows", model, target=0.8, total_steps=60, drop_fraction=0.5)
    assert type(sparsifier) is even_rows
    optimizer = torch.optim.SGD(sparsifier.param_groups(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    spread = sparsifier._masks[0].sum(1).float().std()
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.randn(16, 40)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    assert sparsifier._masks[0].sum(1).float().std() < spread
    assert sparsifier.sparsity() == pytest.approx(0.8, abs=2e-3)
    assert "even-rows" in sparse.list("even*")
    sparsifier.finalize()


def test_names_are_taken_once_and_only_methods_are():
    with pytest.raises(ValueError, match="there is a method 'rigl' already"):
        sparse.register("rigl", sparse.SET)
    with pytest.raises(ValueError, match="a method is a subclass of Sparsifier, got <class 'int'>"):
        sparse.register("mine", int)


def test_the_table_of_methods_in_the_documentation_is_that_of_the_registry():
    text = (PAGE.parent / "methods.md").read_text()
    for name, info in sparse.list(details=True).items():
        assert (
            f"| `{name}` | {info.title} ({info.paper}) | {info.start} | {info.targeted} | {info.training_flops} |"
            in text
        )
