"""Learned thresholds where the loss does not answer the pressure, and on networks without normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rarefy import sparse
from rarefy.sparse.families.freedom import is_restored


class Tagger(nn.Module):
    """An LSTM between a layer and another."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32) if norm else nn.Identity()
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.norm(self.embed(x)))
        result: Tensor = self.out(y)
        return result


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, method: str, target: float | None
) -> list[float]:
    """Train on a sum over time; give how much denser than the curve each step was, as a factor."""
    kept = {} if target is None else {"target": target}
    sparsifier = sparse.create(method, model, total_steps=steps, **kept)
    sparsifier.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    factors = []
    for _ in range(steps):
        x = torch.randn(8, 6, 8, generator=generator)
        loss = (model(x) - x.cumsum(1)[..., :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if sparsifier.budget is not None:
            density = sparsifier.budget.density([layer.live for layer in sparsifier.layers()])
            factors.append(density / sparsifier.budget.aim(sparsifier.progress))
    assert not torch.isnan(loss)
    for name, layer in ((layer.name, layer) for layer in sparsifier.layers()):
        assert 0.0 < layer.density < 1.0, name
    return factors


@pytest.mark.parametrize("norm", [False, True])
def test_what_a_normalisation_restores(norm):
    model = Tagger(norm)
    found = {key: is_restored(model, key) for key, value in model.named_parameters() if value.dim() == 2}
    assert found == {
        "embed.weight": norm,
        "lstm.weight_ih_l0": False,
        "lstm.weight_hh_l0": False,
        "out.weight": norm,
    }


@pytest.mark.parametrize("method", ["autosparse", "str"])
def test_without_a_norm_thresholds_take_nothing_from_what_stays(method):
    torch.manual_seed(0)
    model = Tagger(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = sparse.create(method, model, total_steps=50, target=0.5)
    sparsifier.attach(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(8, 6, 8)).square().mean().backward()
        optimizer.step()
    for layer, latent in zip(sparsifier.layers(), sparsifier.dense_weights().values(), strict=True):
        used = model.get_parameter(
            layer.name if layer.name in dict(model.named_parameters()) else f"{layer.name}.weight"
        )
        assert torch.equal(used[used != 0], latent[used != 0])


@pytest.mark.parametrize("norm", [False, True])
def test_with_adam_the_density_keeps_to_the_curve(norm):
    torch.manual_seed(0)
    model = Tagger(norm)
    factors = run(model, torch.optim.AdamW(model.parameters(), 2e-3), 300, "autosparse", 0.8)
    assert min(factors) > 0.85
    assert max(factors[200:]) < 1.2


@pytest.mark.parametrize("method", ["autosparse", "str"])
def test_before_a_network_learns_the_density_keeps_to_the_curve(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = sparse.create(method, model, total_steps=400, target=0.9)
    sparsifier.attach(optimizer)
    for _ in range(200):
        loss = 0.1 * (model(torch.randn(32, 16)) * torch.randn(32, 4)).mean()  # moves the weights, and says nothing
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        density = sparsifier.budget.density([layer.live for layer in sparsifier.layers()])
        assert density > 0.5 * sparsifier.budget.aim(sparsifier.progress)
