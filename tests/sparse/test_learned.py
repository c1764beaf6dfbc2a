"""Methods that learn their masks under a penalty: forward, backward and penalty by hand, the landing, the options."""

import math

import pytest
import torch
from torch import nn

from rarefy import sparse
from rarefy.sparse.methods.dst import long_tail
from tests.sparse.by_hand import ByHand
from tests.sparse.methods import Run


def layer(method, *weight, **options):
    return ByHand(method, [weight], floor=0.0, **options)


def test_the_long_tailed_step():
    x = torch.tensor([-1.5, -1.0, -0.5, -0.4, -0.1, 0.0, 0.1, 0.3, 0.7, 1.2])
    assert long_tail(x).tolist() == pytest.approx([0, 0.4, 0.4, 0.4, 1.6, 2.0, 1.6, 0.8, 0.4, 0])


def test_dst_by_hand():
    run = layer("dst", 0.5, -0.25, penalty=0.0, lr=0.01)
    run.put("own.threshold", 0.3)
    assert run.used == [0.5, 0.0]
    assert run.state.threshold == pytest.approx(0.3)
    # step + |W| step'(|W| - t): 1 + .5 (2 - .8), 0 + .25 (2 - .2)
    assert run.step() == pytest.approx([1 + 0.5 * 1.2, 0.25 * 1.8])
    # t <- t - lr dL/dt, dL/dt = -sum of W step'
    assert run.kept("own.threshold").item() == pytest.approx(0.3 - 0.01 * (-0.5 * 1.2 + 0.25 * 1.8))


def test_dst_compares_every_output_with_a_threshold_of_its_own():
    run = ByHand("dst", [[0.5, -0.25], [0.5, -0.25]], penalty=0.0)
    run.put("own.threshold", [0.3, 0.6])
    assert run.model[0].weight.tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_dsts_penalty_is_that_of_the_loss():
    # t <- t - lr (dL/dt - penalty exp(-t)), from t = 0, no further than its bound in a step and not below 0
    loss = -(0.5 * (2 - 4 * 0.4 if 0.5 <= 0.4 else 0.4) - 0.25 * (2 - 4 * 0.25))
    for penalty in (0.2, 0.02, 10.0):
        run = layer("dst", 0.5, -0.25, penalty=penalty, lr=0.1)
        run.step()
        expected = -0.1 * (loss - penalty)
        assert run.kept("own.threshold").item() == pytest.approx(min(max(expected, 0.0), 0.02))


def test_dst_resets_a_layer_that_is_all_but_gone():
    run = layer("dst", 0.5, -0.25, total_steps=100)
    run.put("own.threshold", 5.0)
    assert run.used == [0.0, 0.0]
    run.rest()
    assert run.kept("own.threshold").item() == 0.0
    assert run.used == [0.5, -0.25]


def test_ltp_by_hand():
    run = layer("ltp", 1.0, -2.0, 3.0, -4.0, temperature=0.5, penalty=0.0, lr=0.01)
    variance = torch.tensor([1.0, -2.0, 3.0, -4.0]).var().item()
    run.put("own.threshold", 0.4)
    soft = [1 / (1 + math.exp(-(w * w / variance - 0.4) / 0.5)) for w in (1, 2, 3, 4)]
    assert run.used == pytest.approx([soft[0], -2 * soft[1], 3 * soft[2], -4 * soft[3]])
    assert run.state.threshold == pytest.approx(math.sqrt(0.4 * variance))
    assert run.step() == pytest.approx(soft)
    slope = [s * (1 - s) / 0.5 for s in soft]
    expected = -sum(w * d for w, d in zip((1, -2, 3, -4), slope, strict=True))
    assert run.kept("own.threshold").item() == pytest.approx(0.4 - 0.01 * expected, abs=1e-7)


def test_ltp_is_hard_after_the_last_step():
    run = layer("ltp", 1.0, -2.0, 3.0, -4.0, temperature=0.5, penalty=0.0)
    variance = torch.tensor([1.0, -2.0, 3.0, -4.0]).var().item()
    run.put("own.threshold", 0.4)
    run.rest(10)
    assert run.used == [w if w * w > 0.4 * variance else 0.0 for w in (1.0, -2.0, 3.0, -4.0)]


def test_ltps_penalty_is_the_soft_l0_norm():
    weight = torch.tensor([1.0, -2.0, 3.0, -4.0])
    moved = {}
    for penalty in (0.0, 0.3):
        run = ByHand("ltp", weight[None], floor=0.0, temperature=0.5, penalty=penalty, lr=0.01)
        run.put("own.threshold", 0.5)
        run.step()
        moved[penalty] = run.kept("own.threshold").item()
    v = torch.tensor(0.5, requires_grad=True)
    norm = 0.3 * torch.sigmoid((weight.square() / weight.var() - v) / 0.5).mean()
    (slope,) = torch.autograd.grad(norm, v)
    assert moved[0.3] - moved[0.0] == pytest.approx(-0.01 * slope.item(), abs=1e-7)


def test_cs_by_hand():
    run = layer("cs", 1.0, -2.0, initial=0.2, final_beta=100.0, penalty=0.1, mask_lr=1.0, lr=0.1)
    assert run.used == pytest.approx([1.0, -2.0])
    assert run.step() == pytest.approx([1.0, 1.0])
    sigma = 1 / (1 + math.exp(-0.2))
    # dW^/ds = W beta sigma (1 - sigma) / sigma(s_0), and the penalty's own slope
    slope = [1 - sigma, -2 * (1 - sigma)]
    s = [0.2 - 0.1 * (d + 0.1 * sigma * (1 - sigma)) for d in slope]
    assert run.kept("own.s")[0].tolist() == pytest.approx(s)
    run.rest(4)
    assert run.sparsifier.beta == pytest.approx(10.0)
    latent = run.sparsifier.latents()[0][0].tolist()
    soft = [w / (1 + math.exp(-10.0 * x)) * (1 + math.exp(-0.2)) for w, x in zip(latent, s, strict=True)]
    assert run.used == pytest.approx(soft)


def test_mask_lr_is_a_multiple_of_the_weights_rate():
    moved = []
    for mask_lr in (1.0, 30.0):
        run = layer("cs", 1.0, -2.0, penalty=0.0, mask_lr=mask_lr, lr=0.001)
        run.step()
        moved.append(run.kept("own.s")[0] - 0.1)
    torch.testing.assert_close(moved[1], 30.0 * moved[0], rtol=1e-3, atol=0.0)


def test_cs_is_hard_after_the_last_step():
    run = layer("cs", 1.0, -2.0, initial=0.2, final_beta=1e6)
    run.put("own.s", [[0.1, -0.1]])
    run.rest(10)
    assert run.used == pytest.approx([1 + math.exp(-0.2), 0.0])
    assert run.state.live == 1


@pytest.mark.slow
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
        ("dst", {"mask_lr": 0.0}, "mask_lr must be a finite number above 0"),
        ("ltp", {"temperature": 0.0}, "temperature must be a finite number above 0"),
        ("cs", {"initial": 0.0}, "initial must be a finite number above 0"),
        ("cs", {"final_beta": 1.0}, "final_beta must be a finite number above 1"),
    ],
)
def test_mistakes(method, options, message):
    with pytest.raises(ValueError, match=message):
        sparse.create(method, nn.Sequential(nn.Linear(20, 10)), total_steps=100, **options)


@pytest.mark.parametrize("method", ["cs", "autosparse"])
def test_an_optimizer_without_a_learning_rate_of_its_own_is_refused(method):
    model = nn.Sequential(nn.Linear(20, 10))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="LBFGS gives no learning rate for what this method learns"):
        sparse.create(method, model, total_steps=100).attach(torch.optim.LBFGS(model.parameters()))
    assert torch.equal(model[0].weight, before)
