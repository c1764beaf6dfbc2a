"""Methods that keep dense weights and use the best of them: rules by hand, exact counts, limits that must be equal."""

import math

import pytest
import torch
from torch import nn

from rarefy import sparse
from rarefy.sparse.anneal import cubic_ramp, sigmoid_cosine
from tests.sparse.methods import Run, batch

PROJECTED = ("st3", "st3-sigma", "feather", "topk", "powerprop", "topkast", "topkast-power")

WEIGHT = torch.tensor([[4.0, -3.0, 2.0, -1.0, 0.5, -0.25, 0.125, 0.0625]])


def layer(method, *, target=0.75, total_steps=10, weight=WEIGHT, **options):
    """A linear layer of these weights and its sparsifier; with inputs of 1 the gradient of W^ is 1 throughout."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    sparsifier = sparse.create(method, model, target=target, total_steps=total_steps, **options)
    optimizer = torch.optim.SGD(sparsifier.param_groups(weight_decay=0.5), lr=1.0)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def gradient(model):
    model.zero_grad()
    model(torch.ones(1, model[0].weight.shape[1])).sum().backward()
    return model[0].weight.grad[0].tolist()


def used(model):
    return model[0].sparse_weight()[0].tolist()


@pytest.mark.parametrize("case", PROJECTED)
def test_counts_follow_the_schedule_exactly(case):
    run = Run(case, total_steps=50, update_every=1)
    sparsifier = run.sparsifier
    total = sum(state.weights for state in sparsifier.layers())
    for step in range(51):
        share = 1.0 if sparsifier.end == 0 else cubic_ramp(step / 50, sparsifier.start, sparsifier.end)
        density = 1 - (1 - sparsifier.budget.goal) * share
        assert sum(state.live for state in sparsifier.layers()) == math.floor(density * total + 1e-6), step
        with torch.no_grad():
            weights = [run.plain.get_submodule(state.name).sparse_weight() for state in sparsifier.layers()]
        assert sum(int((w != 0).sum()) for w in weights) == pytest.approx(density * total, abs=2)
        run.train(1)


def test_topk_by_hand():
    model, sparsifier, _ = layer("topk", total_steps=100, alpha=0.8, backward_density=0.5)
    assert used(model) == [4.0, -3.0, 0, 0, 0, 0, 0, 0]
    assert gradient(model) == pytest.approx([1, 1, 0.8, 0.8, 0, 0, 0, 0])
    for _ in range(50):
        sparsifier.step()
    assert gradient(model)[2] == pytest.approx(0.8 * sigmoid_cosine(0.5))
    assert sparsifier.layers()[0].weight_grad_density == 0.5
    for _ in range(50):
        sparsifier.step()
    assert sparsifier.layers()[0].alpha == pytest.approx(0.8 * sigmoid_cosine(1.0))


def test_topk_cutoff_makes_the_backward_sparse():
    model, sparsifier, _ = layer("topk", total_steps=100, cutoff=0.5)
    for _ in range(50):
        sparsifier.step()
    assert gradient(model) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert sparsifier.layers()[0].weight_grad_density == 0.25


def test_topkast_by_hand():
    model, sparsifier, optimizer = layer("topkast", superset=2.0)
    assert used(model) == [4.0, -3.0, 0, 0, 0, 0, 0, 0]
    assert gradient(model) == [1, 1, 1, 1, 0, 0, 0, 0]
    optimizer.step()
    # W - (gradient + lambda * W * (1 in A, 1/D in B \ A, 0 outside)), lambda = 0.5, D = 1/4
    expected = [4 - 1 - 2, -3 - 1 + 1.5, 2 - 1 - 4, -1 - 1 + 2, 0.5, -0.25, 0.125, 0.0625]
    assert model[0].weight[0].tolist() == pytest.approx(expected)
    assert sparsifier.layers()[0].weight_grad_density == 0.5


def test_topkast_without_exploration_leaves_the_decay_to_the_optimizer():
    model, _, optimizer = layer("topkast", exploration=False)
    gradient(model)
    optimizer.step()
    assert model[0].weight[0, 4].item() == 0.25


def test_topkast_of_all_is_topk_straight_through():
    weight = torch.randn(6, 10)
    topkast, *_ = layer("topkast", superset=100.0, weight=weight, distribution="uniform")
    topk, *_ = layer("topk", alpha=1.0, anneal="constant", backward_density=1.0, weight=weight)
    assert used(topkast) == used(topk)
    assert gradient(topkast) == gradient(topk) == [1.0] * 10


def test_st3_by_hand():
    model, sparsifier, _ = layer("st3", rescale=False, start=0.0, end=0.1)
    assert gradient(model) == [1] * 8
    sparsifier.step()
    # T parts 3 from 2: between, at 2.5, since it was 0
    assert used(model) == [1.5, -0.5, 0, 0, 0, 0, 0, 0]
    assert gradient(model) == [1] * 8


def test_st3_with_an_annealed_alpha():
    options = {"rescale": False, "start": 0.0, "end": 0.1, "alpha": 0.8, "anneal": "linear"}
    model, sparsifier, _ = layer("st3", **options)
    for _ in range(5):
        sparsifier.step()
    assert gradient(model) == pytest.approx([1, 1] + [0.4] * 6)
    for _ in range(5):
        sparsifier.step()
    assert gradient(model) == [1, 1] + [0] * 6
    assert sparsifier.layers()[0].weight_grad_density == 0.25


def test_st3_rescales_each_channel_in_the_forward_alone():
    model, sparsifier, _ = layer("st3", start=0.0, end=0.1)
    sparsifier.step()
    share = 2.0 / WEIGHT.abs().sum().item()
    scale = 1.01 / (share + 0.01)
    assert used(model) == pytest.approx([1.5 * scale, -0.5 * scale, 0, 0, 0, 0, 0, 0])
    assert gradient(model) == [1] * 8
    for _ in range(9):
        sparsifier.step()
    plain = sparsifier.finalize()
    assert plain[0].weight[0].tolist() == pytest.approx([1.5 * scale, -0.5 * scale, 0, 0, 0, 0, 0, 0])


def test_sigma_compares_in_units_of_the_layers_deviation():
    torch.manual_seed(0)
    densities = {}
    for sigma in (False, True):
        model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
        nn.init.normal_(model[0].weight, std=1.0)
        nn.init.normal_(model[1].weight, std=0.1)
        sparsifier = sparse.create("st3", model, target=0.5, total_steps=10, sigma=sigma, start=0.0, end=0.1)
        sparsifier.step()
        densities[sigma] = [state.density for state in sparsifier.layers()]
    assert densities[False][0] > 0.8
    assert densities[True] == pytest.approx([0.5, 0.5], abs=0.05)


def test_st3_is_autosparse_with_alpha_1():
    model, sparsifier, _ = layer("st3", rescale=False, start=0.0, end=0.1)
    sparsifier.step()
    threshold = model[0].reparam.threshold.item()
    other = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        other[0].weight.copy_(WEIGHT)
    sparse.create(
        "autosparse",
        other,
        total_steps=10,
        alpha=1.0,
        anneal="constant",
        threshold_function="exp",
        threshold_init=math.log(threshold),
    )
    assert used(other) == pytest.approx(used(model))
    assert gradient(other) == gradient(model)


def test_feather_by_hand():
    model, sparsifier, _ = layer("feather", start=0.0, end=0.1, theta=0.5)
    sparsifier.step()
    first, second = (64 - 2.5**3) ** (1 / 3), (27 - 2.5**3) ** (1 / 3)
    assert used(model) == pytest.approx([first, -second, 0, 0, 0, 0, 0, 0])
    assert gradient(model) == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("target", "theta"), [(0.9, 1.0), (0.95, 1.0), (0.98, 0.5)])
def test_feathers_theta_is_the_papers(target, theta):
    model = nn.Sequential(nn.Linear(20, 20))
    assert sparse.create("feather", model, target=target, total_steps=10).theta == theta


def test_feather_of_power_1_is_the_soft_threshold():
    weight = torch.randn(6, 10)
    soft, one, *_ = layer("st3", rescale=False, start=0.0, end=0.1, weight=weight)
    feather, two, *_ = layer("feather", power=1.0, start=0.0, end=0.1, weight=weight)
    one.step()
    two.step()
    assert used(soft) == pytest.approx(used(feather), abs=1e-6)
    assert gradient(soft) == gradient(feather)


def test_powerprop_by_hand():
    model, sparsifier, _ = layer("powerprop", power=2.0, start=0.0, end=0.1)
    assert used(model) == pytest.approx(WEIGHT[0].tolist())
    assert model[0].weight[0, :2].tolist() == pytest.approx([2.0, -math.sqrt(3)])
    # dW/dphi = a |phi|^(a - 1)
    assert gradient(model)[:2] == pytest.approx([4.0, 2 * math.sqrt(3)])
    sparsifier.step()
    assert used(model) == pytest.approx([4.0, -3.0, 0, 0, 0, 0, 0, 0])
    assert gradient(model)[2:] == [0] * 6
    for _ in range(9):
        sparsifier.step()
    assert sparsifier.finalize()[0].weight[0].tolist() == pytest.approx([4.0, -3.0, 0, 0, 0, 0, 0, 0])


def test_a_power_of_1_changes_nothing():
    model, *_ = layer("powerprop", power=1.0)
    assert torch.equal(model[0].weight, WEIGHT)
    assert gradient(model) == [1.0] * 8


@pytest.mark.parametrize("case", PROJECTED)
def test_masked_weights_keep_their_values_and_can_come_back(case):
    run = Run(case, total_steps=60).train(60)
    state = run.sparsifier.layers()[-1]
    weight = run.plain.get_submodule(state.name).weight
    assert int((weight != 0).sum()) > 2 * state.live


def test_blocks_live_and_die_together():
    model = nn.Sequential(nn.Linear(16, 8))
    sparsifier = sparse.create("topk", model, target=0.75, total_steps=10, block=4)
    assert set(model[0].reparam.mask.view(8, 4, 4).sum(2).flatten().tolist()) == {0, 4}
    assert sparsifier.sparsity() == 0.75


def test_finalize_early_warns_and_lands():
    run = Run("st3", total_steps=100).train(5)
    images, _ = batch(0)
    with pytest.warns(UserWarning, match="after 5 of 100 steps"):
        model = run.sparsifier.finalize()
    weights = [p for p in model.parameters() if p.dim() > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.9, abs=1e-3)
    assert model(images).isfinite().all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("topk", {"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2"),
        ("topk", {"anneal": "never"}, "anneal must be one of"),
        ("topk", {"start": 0.4, "end": 0.2}, "0 <= start < end <= 1"),
        ("topk", {"update_every": 1000}, "update_every must be between 1 and total_steps=100"),
        ("topkast", {"superset": 0.5}, "superset must be at least 1, got 0.5"),
        ("powerprop", {"power": 0.5}, "power must be at least 1, got 0.5"),
        ("feather", {"power": 0.5}, "power must be at least 1, got 0.5"),
        ("feather", {"theta": 2.0}, r"theta must be in \[0, 1\], got 2"),
        ("feather", {"block": 4}, "Feather thresholds single weights"),
        ("st3", {"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2"),
        ("st3", {"anneal": "never"}, "anneal must be one of"),
        ("st3", {"block": 4}, "ST3 thresholds single weights"),
    ],
)
def test_mistakes_leave_the_model_alone(method, options, message):
    model = nn.Sequential(nn.Linear(20, 10))
    with pytest.raises(ValueError, match=message):
        sparse.create(method, model, target=0.9, total_steps=100, **options)
    assert type(model[0]) is nn.Linear
