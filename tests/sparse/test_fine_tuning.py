"""Trained networks at small rates, wide layers, layers that start at zero, and frozen ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import sparse
from tests.sparse.methods import CASES

pytestmark = pytest.mark.slow

#: What a quick run of every method needs: N:M and powers have tests of their own below.
QUICK = {
    name: case
    for name, case in CASES.items()
    if name not in {"powerprop", "topkast-power"} and "target_ms" not in case[1]  # whose table is of another network
}

SOFT_THRESHOLDS = {
    "autosparse": ("autosparse", {}),
    "autosparse-cost": ("autosparse", {"policy": "cost"}),
    "str": ("str", {}),
}


def task(inputs=32, classes=8, size=4000):
    """Inputs, and the classes that a network of random weights gives them."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))
    x = torch.randn(size, inputs)
    return x, teacher(x).argmax(1)


def mlp():
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))


def train(model, steps, optimizer, x, y):
    for step in range(steps):
        chosen = torch.arange(64 * step, 64 * step + 64) % 3000
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def accuracy(model, x, y):
    return (model(x[3000:]).argmax(1) == y[3000:]).float().mean().item()


@pytest.fixture(scope="module")
def trained():
    x, y = task()
    torch.manual_seed(0)
    model = mlp()
    train(model, 600, torch.optim.AdamW(model.parameters(), lr=2e-3), x, y)
    return model, x, y


def tuned(trained, method, optimizer, steps=300, **options):
    """The accuracy after fine-tuning, and the sparsifier."""
    dense, x, y = trained
    model = copy.deepcopy(dense)
    sparsifier = sparse.create(method, model, total_steps=steps, **options)
    made = optimizer(model.parameters())
    sparsifier.attach(made)
    train(model, steps, made, x, y)
    shrinks = torch.cat([b.kept["shrink"] for b in sparsifier._buckets]) if method != "gmp" else None
    sparsifier.finalize()
    return accuracy(model, x, y), shrinks


RATES = {
    "adamw-1e-4": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "adamw-1e-5": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
    "sgd-1e-3": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


@pytest.fixture(scope="module")
def by_gmp(trained):
    return {rate: tuned(trained, "gmp", optimizer, target=0.7)[0] for rate, optimizer in RATES.items()}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("case", SOFT_THRESHOLDS)
def test_fine_tuning_costs_no_more_than_gmp_does(case, rate, trained, by_gmp):
    method, options = SOFT_THRESHOLDS[case]
    found, shrinks = tuned(trained, method, RATES[rate], target=0.7, **options)
    assert found >= by_gmp[rate] - 0.01
    assert shrinks.max() < 0.05  # all but hard thresholds


@pytest.mark.parametrize("method", ["autosparse", "str"])
def test_pressure_that_nobody_named_leaves_a_network_at_a_small_rate_as_good_as_it_was(method, trained):
    dense, x, y = trained
    found, _ = tuned(trained, method, RATES["adamw-1e-5"])
    assert found >= accuracy(dense, x, y) - 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_thresholds_are_soft_in_training_from_scratch(optimizer):
    x, y = task()
    torch.manual_seed(1)
    model = mlp()
    sparsifier = sparse.create("autosparse", model, target=0.9, total_steps=1000)
    made = (
        torch.optim.AdamW(model.parameters(), lr=3e-3)
        if optimizer == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    )
    sparsifier.attach(made)
    train(model, 16, made, x, y)
    assert [value for bucket in sparsifier._buckets for value in bucket.kept["shrink"].tolist()] == [1.0] * 3


def test_moves_are_seen_of_every_optimizer():
    x, y = task()
    model = mlp()
    sparsifier = sparse.create("autosparse", model, target=0.5, total_steps=100)
    optimizers = [torch.optim.AdamW(model[place].parameters(), lr=1e-5) for place in (0, 2, 4)]
    sparsifier.attach(*optimizers)
    F.cross_entropy(model(x[:64]), y[:64]).backward()
    for optimizer in optimizers:
        optimizer.step()
    for bucket in sparsifier._buckets:
        assert 0.0 < bucket.kept["shrink"].item() < 1e-3


@pytest.mark.parametrize("initialise", [None, lambda weight: nn.init.normal_(weight, std=0.005)])
@pytest.mark.parametrize("width", [512, 4096, 8192])
def test_wide_layers_start_dense(width, initialise):
    for method in ("autosparse", "str"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, 64))
        if initialise is not None:
            initialise(model[0].weight)
        sparsifier = sparse.create(method, model, target=0.5, total_steps=1000)
        assert sparsifier.sparsity() < 0.1
        sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert (model[0].weight == 0).float().mean() < 0.1


def test_the_first_threshold_is_the_usual_one_where_weights_are_large_enough():
    model = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 10, bias=False))
    nn.init.constant_(model[1].weight, 0.01)
    sparsifier = sparse.create("autosparse", model, target=0.5, total_steps=1000)
    usual, small = (layer.threshold for layer in sparsifier.layers())
    assert usual == pytest.approx(torch.sigmoid(torch.tensor(-5.0)).item())
    assert small == pytest.approx(0.12 * 0.01, rel=1e-4)


class Residual(nn.Module):
    """With a branch that starts at zero, as adaLN-zero, zero convolutions and LoRA's B do."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down, self.last = (
            nn.Linear(20, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 4),
        )
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(F.relu(hidden + self.down(F.relu(self.up(hidden)))))


@pytest.mark.parametrize("case", QUICK)
def test_layers_that_start_at_zero_learn(case):
    name, options = QUICK[case]
    options = {key: value for key, value in options.items() if key != "exclude"}
    torch.manual_seed(0)
    model = Residual()
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 4)).argmax(1)
    examples = {"example_input": x} if "target_flops" in options else {}
    sparsifier = sparse.create(name, model, total_steps=50, **examples, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    sparsifier.attach(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert model.down.weight.abs().max() > 1e-3


@pytest.mark.parametrize(("method", "options"), [("powerprop", {}), ("topkast", {"power": 2.0})])
def test_powers_refuse_layers_that_could_never_learn_and_say_the_way_out(method, options):
    with pytest.raises(ValueError, match=r"'down' are all 0.*pass exclude=\['down'\]"):
        sparse.create(method, Residual(), target=0.5, total_steps=50, **options)
    sparse.create(method, Residual(), target=0.5, total_steps=50, exclude=["down"], **options)


@pytest.mark.parametrize("method", ["autosparse", "str", "gmp"])
def test_frozen_layers_stay_out_unless_named(method, trained):
    dense, x, y = trained
    model = copy.deepcopy(dense)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    sparsifier = sparse.create(method, model, target=0.5, total_steps=20)
    assert [layer.name for layer in sparsifier.layers()] == ["0", "4"]
    made = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sparsifier.attach(made)
    train(model, 20, made, x, y)
    sparsifier.finalize()
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("method", ["autosparse", "str"])
def test_frozen_layers_that_are_named_are_cut_and_keep_the_rest_of_their_values(method, held, trained):
    dense, x, y = trained
    model = copy.deepcopy(dense)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    sparsifier = sparse.create(method, model, target=0.5, total_steps=40, include=["*"])
    parameters = [p for p in model.parameters() if held or p.requires_grad]
    made = torch.optim.AdamW(parameters, lr=1e-4)
    sparsifier.attach(made)
    train(model, 40, made, x, y)
    sparsifier.finalize()
    live = model[2].weight != 0
    assert 0.2 < live.float().mean() < 0.8
    assert torch.equal(model[2].weight[live], before[live])
