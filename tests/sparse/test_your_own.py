"""The class that the documentation shows is run as it stands there."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy import sparse
from rarefy.sparse import registry

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "your-own-method.md"


@pytest.fixture
def page(monkeypatch):
    """What the code of the page defines, by name."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    defined = {"__name__": "page"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), defined)
    return defined


def trained(method, target=0.8, **options):
    """A sparsifier of this method before training, and its end after every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sparse.create(method, model, target=target, total_steps=60, **options).attach(optimizer)
    yield sparsifier
    for _ in range(60):
        optimizer.zero_grad()
        x = torch.randn(16, 40)
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        yield sparsifier
    assert sparsifier.sparsity() == pytest.approx(target, abs=2e-3)
    again = pickle.loads(pickle.dumps(sparsifier.state_dict()))
    sparsifier.load_state_dict(again)
    before = [p.clone() for p in model.parameters()]
    sparsifier.finalize()
    for one, other in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_movers(page):
    for sparsifier in trained("movers", at=0.5):
        assert type(sparsifier) is page["Movers"]
        if sparsifier.steps == 0:
            first = [weight.clone() for weight in sparsifier.weights()]
        if sparsifier.steps == 29:
            assert sparsifier.sparsity() == 0.0
        if sparsifier.steps == 30:
            moved, masks = [], sparsifier.live_masks().values()
            for weight, start, mask in zip(sparsifier.weights(), first, masks, strict=True):
                moved.append((weight - start).abs()[mask].min())
    assert min(moved) > 0
    assert "at: the share of the run after which they are chosen, in (0, 1). Default: 0.25." in page["Movers"].__doc__


def test_even_rows_evens_out_its_rows(page):
    spread = [s.live_masks()["0"].sum(1).float().std() for s in trained("even-rows", drop_fraction=0.5)]
    assert spread[-1] < spread[0]
    assert "even-rows" in sparse.list_methods("even*")
    assert "drop_fraction: p, the share" in page["EvenRows"].__doc__


def test_dpf_trains_what_is_masked_straight_through(page):
    for sparsifier in trained("dpf"):
        if sparsifier.steps == 50:
            masked = [~mask for mask in sparsifier.live_masks().values()]
            before = [latent.clone() for latent in sparsifier.latents()]
        if sparsifier.steps == 51:
            for mask, old, new in zip(masked, before, sparsifier.latents(), strict=True):
                assert (old != new)[mask].float().mean() > 0.5


def test_gained_learns_its_gains(page):
    *_, sparsifier = trained("gained")
    run = sparse.create("gained", sparsifier.model, target=0.9, total_steps=10, include=["0"])
    optimizer = torch.optim.SGD(sparsifier.model.parameters(), lr=0.1)
    run.attach(optimizer)
    weight = run.latents()[0].clone()
    optimizer.zero_grad()
    sparsifier.model[0].weight.sum().backward()
    optimizer.step()
    # dL/da = sum of e^a W M, at a = 0
    gain = run.state_dict()["layers"]["0"]["own.gain"].item()
    assert gain == pytest.approx(-0.1 * weight.sum().item(), rel=1e-4)


def test_names_are_taken_once_and_only_methods_are():
    with pytest.raises(ValueError, match="there is a method 'rigl' already"):
        sparse.register("rigl", sparse.SET)
    with pytest.raises(ValueError, match="a method is a subclass of Sparsifier, got <class 'int'>"):
        sparse.register("mine", int)


def test_the_table_of_methods_in_the_documentation_is_that_of_the_registry():
    text = (PAGE.parent / "methods.md").read_text()
    for name, info in sparse.list_methods(details=True).items():
        assert (
            f"| `{name}` | {info.title} ({info.paper}) | {info.start} | {info.targeted} | {info.training_flops} |"
            in text
        )
