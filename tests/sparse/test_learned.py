"""Methods that learn their masks under a penalty: forward, backward and penalty by hand, the landing, the options."""

import math

import pytest
import torch
from torch import nn

from rarefy import sparse
from rarefy.sparse.dst import long_tailed_step
from tests.sparse.methods import Run


def layer(method, weight, *, total_steps=10, **options):
    """One output of these weights; with inputs of 1 the gradient of W^ is 1 throughout."""
    model = nn.Sequential(nn.Linear(len(weight), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weight]))
    sparsifier = sparse.create(method, model, total_steps=total_steps, floor=0.0, **options)
    groups = sparsifier.param_groups(lr=0.1)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def backward(model):
    model.zero_grad()
    model(torch.ones(1, model[0].weight.shape[1])).sum().backward()
    return model[0].weight.grad[0].tolist()


def test_the_long_tailed_step():
    x = torch.tensor([-1.5, -1.0, -0.5, -0.4, -0.1, 0.0, 0.1, 0.3, 0.7, 1.2], requires_grad=True)
    y = long_tailed_step(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert x.grad.tolist() == pytest.approx([0, 0.4, 0.4, 0.4, 1.6, 2.0, 1.6, 0.8, 0.4, 0])


def test_dst_by_hand():
    model, sparsifier, _ = layer("dst", [0.5, -0.25], penalty=0.0)
    with torch.no_grad():
        model[0].reparam.learned.fill_(0.3)
    assert model[0].sparse_weight().tolist() == [[0.5, 0.0]]
    # step + |W| step'(|W| - t): 1 + .5 (2 - .8), 0 + .25 (2 - .2)
    assert backward(model) == pytest.approx([1 + 0.5 * 1.2, 0.25 * 1.8])
    # -W step'
    assert model[0].reparam.learned.grad.item() == pytest.approx(-0.5 * 1.2 + 0.25 * 1.8)
    assert sparsifier.layers()[0].threshold == pytest.approx(0.3)


def test_dsts_penalty_is_that_of_the_loss():
    model, _, optimizer = layer("dst", [0.5, -0.25], penalty=0.2)
    backward(model)
    loss = model[0].reparam.learned.grad.item()
    optimizer.step()
    # t <- t - lr (dL/dt - penalty exp(-t)), from t = 0, no further than its bound in a step and not below 0
    expected = -0.1 * (loss - 0.2)
    assert model[0].reparam.learned.item() == pytest.approx(min(max(expected, 0.0), 0.02))


def test_dst_resets_a_layer_that_is_all_but_gone():
    model, sparsifier, _ = layer("dst", [0.5, -0.25], total_steps=100)
    with torch.no_grad():
        model[0].reparam.learned.fill_(5.0)
    sparsifier.step()
    assert model[0].reparam.learned.item() == 0.0


def test_ltp_by_hand():
    model, sparsifier, _ = layer("ltp", [1.0, -2.0, 3.0, -4.0], temperature=0.5, penalty=0.0)
    variance = torch.tensor([1.0, -2.0, 3.0, -4.0]).var().item()
    with torch.no_grad():
        model[0].reparam.learned.fill_(0.4)
    soft = [1 / (1 + math.exp(-(w * w / variance - 0.4) / 0.5)) for w in (1, 2, 3, 4)]
    assert model[0].sparse_weight()[0].tolist() == pytest.approx([soft[0], -2 * soft[1], 3 * soft[2], -4 * soft[3]])
    assert backward(model) == pytest.approx(soft)
    slope = [s * (1 - s) / 0.5 for s in soft]
    expected = -sum(w * d for w, d in zip((1, -2, 3, -4), slope, strict=True))
    assert model[0].reparam.learned.grad.item() == pytest.approx(expected, abs=1e-5)
    model.eval()
    live = [w if w * w > 0.4 * variance else 0.0 for w in (1.0, -2.0, 3.0, -4.0)]
    assert model[0].sparse_weight()[0].tolist() == live
    assert sparsifier.layers()[0].threshold == pytest.approx(math.sqrt(0.4 * variance))


def test_ltps_penalty_is_the_soft_l0_norm():
    model, _, optimizer = layer("ltp", [1.0, -2.0, 3.0, -4.0], temperature=0.5, penalty=0.3)
    backward(model)
    before = model[0].reparam.learned.grad.item()
    reparam = model[0].reparam
    norm = 0.3 * torch.sigmoid((model[0].weight.detach().square() / reparam.variance - reparam.learned) / 0.5).mean()
    (expected,) = torch.autograd.grad(norm, reparam.learned)
    optimizer.step()
    assert reparam.learned.grad.item() == pytest.approx(before + expected.item())


def test_cs_by_hand():
    model, sparsifier, optimizer = layer("cs", [1.0, -2.0], initial=0.2, final_beta=100.0, penalty=0.1, mask_lr=1.0)
    assert model[0].sparse_weight()[0].tolist() == pytest.approx([1.0, -2.0])
    assert backward(model) == pytest.approx([1.0, 1.0])
    sigma = 1 / (1 + math.exp(-0.2))
    # dW^/ds = W beta sigma (1 - sigma) / sigma(s_0), and the penalty's own slope at the step
    slope = [1 - sigma, -2 * (1 - sigma)]
    assert model[0].reparam.learned.grad[0].tolist() == pytest.approx(slope)
    optimizer.step()
    expected = [0.2 - 0.1 * (s + 0.1 * sigma * (1 - sigma)) for s in slope]
    assert model[0].reparam.learned[0].tolist() == pytest.approx(expected)
    for _ in range(5):
        sparsifier.step()
    assert model[0].reparam.beta.item() == pytest.approx(10.0)


def test_cs_evaluates_with_the_hard_mask():
    model, sparsifier, _ = layer("cs", [1.0, -2.0], initial=0.2, final_beta=1e6)
    with torch.no_grad():
        model[0].reparam.learned.copy_(torch.tensor([[0.1, -0.1]]))
    for _ in range(10):
        sparsifier.step()
    scale = (1 + math.exp(-0.2)) / 1
    model.eval()
    assert model[0].sparse_weight()[0].tolist() == pytest.approx([scale, 0.0])
    assert sparsifier.layers()[0].live == 1


def test_optg_scores_add_up_what_each_weight_gains():
    model, sparsifier, optimizer = layer("optg", [4.0, -3.0, 0.5, 0.25], target=0.5, start=0.0, end=0.1)
    with torch.no_grad():
        model[0].reparam.score.copy_(torch.tensor([[0.0, 3.0, 2.0, 1.0]]))
    sparsifier.step()
    assert model[0].sparse_weight()[0].tolist() == [0, -3.0, 0.5, 0]
    assert backward(model) == [0, 1, 1, 0]
    assert model[0].reparam.score.grad[0].tolist() == [4.0, -3.0, 0.5, 0.25]
    optimizer.step()
    assert model[0].reparam.score[0].tolist() == pytest.approx([-0.4, 3.3, 1.95, 0.975])


@pytest.mark.parametrize("case", ["dst", "ltp", "cs"])
def test_floors_hold(case):
    run = Run(case, target=0.95, floor={"0": 0.3}).train(200)
    densities = {state.name: state.density for state in run.sparsifier.layers()}
    assert densities["0"] >= 0.3
    assert min(densities.values()) >= 0.005


def test_a_larger_penalty_makes_dst_sparser():
    ends = [Run("dst-free", penalty=penalty).train(150).sparsifier.sparsity() for penalty in (1e-4, 5e-3)]
    assert ends[0] < ends[1]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dst", {"penalty": -1.0}, "penalty must be a finite number that is not negative"),
        ("dst", {"mask_lr": 0.0}, "mask_lr must be above 0"),
        ("ltp", {"temperature": 0.0}, "temperature must be above 0"),
        ("cs", {"initial": 0.0}, "initial must be above 0"),
        ("cs", {"final_beta": 1.0}, "final_beta must be above 1"),
        ("optg", {}, "OptG needs a target"),
    ],
)
def test_mistakes_leave_the_model_alone(method, options, message):
    model = nn.Sequential(nn.Linear(20, 10))
    with pytest.raises(ValueError, match=message):
        sparse.create(method, model, total_steps=100, **options)
    assert type(model[0]) is nn.Linear
    assert len(list(model.parameters())) == 2


def test_a_multiple_of_the_learning_rate_needs_one():
    sparsifier = sparse.create("cs", nn.Sequential(nn.Linear(20, 10)), total_steps=100)
    with pytest.raises(ValueError, match=r"mask_lr=30 is a multiple of lr: call param_groups\(lr=...\)"):
        sparsifier.param_groups()
