"""Methods that keep dense weights and use the best of them: rules by hand, exact counts, limits that must be equal."""

import math

import pytest
import torch
from torch import nn

from rarefy import sparse
from rarefy.sparse.methods import feather
from rarefy.sparse.schedules import cubic_ramp, sigmoid_cosine
from tests.sparse.by_hand import ByHand
from tests.sparse.methods import Run, batch

PROJECTED = ("st3", "band", "st3-sigma", "feather", "topk", "powerprop", "topkast", "topkast-power", "optg")

WEIGHT = torch.tensor([[4.0, -3.0, 2.0, -1.0, 0.5, -0.25, 0.125, 0.0625]])


def layer(method, weight=WEIGHT, **options):
    return ByHand(method, weight, **{"target": 0.75, **options})


@pytest.mark.filterwarnings("ignore:training goes on after total_steps")
@pytest.mark.parametrize("case", PROJECTED)
def test_counts_follow_the_schedule_exactly(case):
    run = Run(case, total_steps=50, update_every=1)
    sparsifier = run.sparsifier
    total = sum(state.weights for state in sparsifier.layers())
    for step in range(51):
        share = 1.0 if sparsifier.end == 0 else cubic_ramp(step / 50, sparsifier.start, sparsifier.end)
        density = 1 - (1 - sparsifier.budget.goal) * share
        assert sparsifier.aim() == pytest.approx(density)
        assert sum(state.live for state in sparsifier.layers()) == math.floor(density * total + 1e-6), step
        for name, mask in sparsifier.live_masks().items():
            weight = run.plain.get_submodule(name).weight
            assert not weight[~mask].any()
            assert int((weight != 0).sum()) == pytest.approx(int(mask.sum()), abs=2)
        run.train(1)


def test_topk_by_hand():
    run = layer("topk", total_steps=100, alpha=0.8, backward_density=0.5)
    assert run.used == [4.0, -3.0, 0, 0, 0, 0, 0, 0]
    assert run.step() == pytest.approx([1, 1, 0.8, 0.8, 0, 0, 0, 0])
    assert torch.equal(run.dense, WEIGHT)
    run.rest(49)
    assert run.step()[2] == pytest.approx(0.8 * sigmoid_cosine(0.5))
    assert run.state.weight_grad_density == 0.5
    run.rest(49)
    assert run.state.alpha == pytest.approx(0.8 * sigmoid_cosine(1.0))


def test_topk_cutoff_makes_the_backward_sparse():
    run = layer("topk", total_steps=100, cutoff=0.5).rest(50)
    assert run.step() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert run.state.weight_grad_density == 0.25


def test_topkast_by_hand():
    run = layer("topkast", superset=2.0, lr=1.0, weight_decay=0.5)
    assert run.used == [4.0, -3.0, 0, 0, 0, 0, 0, 0]
    run.step()
    # W - (gradient + lambda * W * (1 in A, 1/D in B \ A, 0 outside)), gradient = 1 in B, lambda = 0.5, D = 1/4
    expected = [4 - 1 - 2, -3 - 1 + 1.5, 2 - 1 - 4, -1 - 1 + 2, 0.5, -0.25, 0.125, 0.0625]
    run.rest()
    assert run.dense[0].tolist() == pytest.approx(expected)
    assert run.state.weight_grad_density == 0.5


def test_topkast_without_exploration_leaves_the_decay_to_the_optimizer():
    run = layer("topkast", exploration=False, lr=1.0, weight_decay=0.5)
    assert run.step() == [1, 1, 1, 1, 0, 0, 0, 0]
    run.rest()
    assert run.dense[0, 4].item() == 0.25


def test_topkast_of_all_is_topk_straight_through():
    weight = torch.randn(6, 10)
    topkast = layer("topkast", weight, superset=100.0, distribution="uniform")
    topk = layer("topk", weight, alpha=1.0, anneal="constant", backward_density=1.0)
    assert topkast.used == topk.used
    assert topkast.step() == topk.step() == [1.0] * 10


def test_st3_by_hand():
    run = layer("st3", rescale=False, start=0.0, end=0.1)
    assert run.step() == [1] * 8
    # T parts 3 from 2: between, at 2.5, since it was 0
    assert run.state.threshold == 2.5
    assert run.used == [1.5, -0.5, 0, 0, 0, 0, 0, 0]
    assert run.step() == [1] * 8


@pytest.mark.filterwarnings("ignore:training goes on after total_steps")
def test_st3_with_an_annealed_alpha():
    run = layer("st3", rescale=False, start=0.0, end=0.1, alpha=0.8, anneal="linear").rest(5)
    assert run.step() == pytest.approx([1, 1] + [0.4] * 6)
    run.rest(4)
    assert run.step() == [1, 1] + [0] * 6
    assert run.state.weight_grad_density == 0.25
    assert run.state.alpha == 0.0


def test_st3_rescales_each_channel_in_the_forward_alone():
    run = layer("st3", start=0.0, end=0.1).rest()
    share = 2.0 / WEIGHT.abs().sum().item()
    scale = 1.01 / (share + 0.01)
    assert run.used == pytest.approx([1.5 * scale, -0.5 * scale, 0, 0, 0, 0, 0, 0])
    assert run.step() == [1] * 8
    assert torch.equal(run.dense, WEIGHT)
    plain = run.rest(8).sparsifier.finalize()
    assert plain[0].weight[0].tolist() == pytest.approx([1.5 * scale, -0.5 * scale, 0, 0, 0, 0, 0, 0])


def test_each_channel_has_its_own_scale():
    run = layer("st3", [[4.0, 2.0], [1.0, 3.0]], target=0.25, start=0.0, end=0.1).rest()
    threshold = run.state.threshold
    assert threshold == 1.5
    for row, weight in zip(run.model[0].weight, ([4.0, 2.0], [1.0, 3.0]), strict=True):
        shrunk = [max(w - threshold, 0.0) for w in weight]
        scale = 1.01 / (sum(shrunk) / sum(weight) + 0.01)
        assert row.tolist() == pytest.approx([w * scale for w in shrunk])


def test_sigma_compares_in_units_of_the_layers_deviation():
    densities = {}
    for sigma in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
        nn.init.normal_(model[0].weight, std=1.0)
        nn.init.normal_(model[1].weight, std=0.1)
        sparsifier = sparse.create("st3", model, target=0.5, total_steps=10, sigma=sigma, start=0.0, end=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        optimizer.step()
        densities[sigma] = [state.density for state in sparsifier.layers()]
    assert densities[False][0] > 0.8
    assert densities[True] == pytest.approx([0.5, 0.5], abs=0.05)


def test_st3_is_autosparse_with_alpha_1():
    run = layer("st3", rescale=False, start=0.0, end=0.1).rest()
    threshold = run.state.threshold
    options = {"alpha": 1.0, "anneal": "constant", "threshold_function": "exp", "pressure": 0.0}
    other = ByHand("autosparse", WEIGHT, **options)
    other.put("own.s", math.log(threshold))
    assert other.used == pytest.approx(run.used)
    assert other.step() == run.step()


def test_band_by_hand():
    row = [4.0, -3.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
    run = layer("band", [row], target=0.75, start=0.0, end=0.1).rest()
    threshold = run.sparsifier.layers()[0].threshold
    assert 2.0 <= threshold < 3.0
    scale = 1.01 / ((7.0 - 2 * threshold) / sum(map(abs, row)) + 0.01)
    assert run.used == pytest.approx([scale * (4.0 - threshold), scale * (threshold - 3.0), 0, 0, 0, 0, 0, 0])
    assert run.step() == [1, 1, 1, 1, 1, 1, 0, 0]  # three times two
    assert run.sparsifier.weight_grad_density(0.25) == 0.75
    assert run.sparsifier.weight_grad_density(0.5) == 1.0


@pytest.mark.parametrize(
    ("after", "first", "scaled"), [(nn.LayerNorm(4), 1.0, 0), (nn.ReLU(), 1.0, 1), (nn.ReLU(), 0.0, 0)]
)
def test_the_band_gives_back_what_no_normalisation_does(after, first, scaled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), after)
    model[0].weight.data.mul_(first)
    sparsifier = sparse.create("band", model, target=0.5, total_steps=10)
    (bucket,) = sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))._buckets
    assert bucket.kept["rescaled"].tolist() == [scaled]


@pytest.mark.parametrize(("power", "rival"), [(3.0, ("feather", {"theta": 1.0})), (1.0, ("st3", {"start": 0.0}))])
def test_a_wide_band_is_what_it_is_made_of(power, rival):
    name, options = rival
    runs = [Run("band", band=1000.0, power=power).train(40), Run(name, **options).train(40)]
    for a, b in zip(*(run.sparsifier.latents() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_band_beside_a_normalisation_and_in_recurrent_layers_of_one_model():
    torch.manual_seed(0)
    model = nn.ModuleDict({"in": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "cell": nn.LSTMCell(8, 8)})
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"target": 0.5, "total_steps": 10, "start": 0.0, "end": 0.1}
    sparsifier = sparse.create("band", model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    optimizer.step()
    first, recurrent = (layer.threshold for layer in sparsifier.layers()[:2])
    size = dense["in.weight"].abs()
    used = (size**3 - first**3).clamp(min=0.0) ** (1 / 3) * dense["in.weight"].sign()
    torch.testing.assert_close(model["in"].weight.detach(), used)
    size = dense["cell.weight_ih"].abs()
    shrunk = (size - recurrent).clamp(min=0.0)
    scale = 1.01 / (shrunk.sum(1, keepdim=True) / size.sum(1, keepdim=True) + 0.01)
    torch.testing.assert_close(model["cell"].weight_ih.detach(), shrunk * scale * dense["cell.weight_ih"].sign())
    # weights that somebody wrote are taken as those in use, in both kinds
    written = {name: 1.5 * parameter.detach() for name, parameter in model.named_parameters()}
    model.load_state_dict(written)
    with pytest.warns(UserWarning, match="changed"):
        optimizer.step()
    for name in ("in.weight", "cell.weight_ih"):
        live = model.get_parameter(name) != 0
        torch.testing.assert_close(model.get_parameter(name)[live], written[name][live], rtol=1e-4, atol=1e-6)


def test_feather_by_hand():
    run = layer("feather", start=0.0, end=0.1, theta=0.5).rest()
    first, second = (64 - 2.5**3) ** (1 / 3), (27 - 2.5**3) ** (1 / 3)
    assert run.used == pytest.approx([first, -second, 0, 0, 0, 0, 0, 0])
    assert run.step() == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.filterwarnings("ignore:training goes on after total_steps")
@pytest.mark.parametrize(("target", "theta"), [(0.9, 1.0), (0.95, 1.0), (0.98, 0.5)])
def test_feathers_theta_is_the_papers(target, theta):
    run = ByHand("feather", torch.randn(20, 20), target=target).rest(10)
    assert run.state.alpha == theta
    run.step()
    assert run.gradient[~run.mask].unique().tolist() == [theta]


def test_feather_of_power_1_is_the_soft_threshold():
    weight = torch.randn(6, 10)
    soft = layer("st3", weight, rescale=False, start=0.0, end=0.1).rest()
    power = layer("feather", weight, power=1.0, start=0.0, end=0.1).rest()
    assert soft.used == pytest.approx(power.used, abs=1e-6)
    assert soft.step() == power.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("power", [1.0, 1.5, 3.0, 100.0, 1e9])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15])
def test_the_threshold_of_a_power_at_any_size(scale, power, dtype):
    weight = torch.tensor([0.0, -0.5, 1.0, -1.5, 2.0, 1000.0], dtype=dtype) * scale
    assert torch.equal(feather.thresholded(weight, torch.zeros(6), power).to(dtype), weight)
    threshold = torch.full((6,), 0.75 * scale)
    used = feather.thresholded(weight, threshold, power)
    assert (used != 0.0).tolist() == [False, False, True, True, True, True]
    size = weight.double().abs() / scale
    wanted = weight.double().sign() * scale * size * (1.0 - (0.75 / size.clamp(min=0.75)) ** power) ** (1.0 / power)
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-2 * scale} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6 * scale}
    )
    torch.testing.assert_close(used.double(), wanted, **tolerance)
    live = used != 0.0
    torch.testing.assert_close(feather.unthresholded(used, threshold, power)[live].to(dtype), weight[live], **tolerance)
    just_above = torch.nextafter(threshold, torch.tensor(math.inf))
    assert feather.thresholded(just_above, threshold, power).all(), "what lives is not 0"


def test_a_row_of_zeros_in_half_precision_is_rescaled():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).half()
    model[0].weight.data[3] = 0.0
    sparse.create("band", model, target=0.5, total_steps=10).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_powerprop_by_hand():
    run = layer("powerprop", power=2.0, start=0.0, end=0.1)
    assert run.used == pytest.approx(WEIGHT[0].tolist())
    # dW/dphi = a |phi|^(a - 1)
    assert run.step()[:2] == pytest.approx([4.0, 2 * math.sqrt(3)])
    assert run.dense[0, :2].tolist() == pytest.approx([2.0, -math.sqrt(3)])
    assert run.used == pytest.approx([4.0, -3.0, 0, 0, 0, 0, 0, 0])
    assert run.step()[2:] == [0] * 6
    assert run.rest(8).sparsifier.finalize()[0].weight[0].tolist() == pytest.approx([4.0, -3.0, 0, 0, 0, 0, 0, 0])


def test_a_power_of_1_changes_nothing():
    run = layer("powerprop", power=1.0)
    assert run.step() == [1.0] * 8
    assert torch.equal(run.dense, WEIGHT)


def test_optg_scores_add_up_what_each_weight_gains():
    run = layer("optg", [[4.0, -3.0, 0.5, 0.25]], target=0.5, start=0.0, end=0.1, lr=0.1)
    run.put("own.score", [[0.0, 3.0, 2.0, 1.0]])
    run.rest()
    assert run.used == [0, -3.0, 0.5, 0]
    assert run.step() == [0, 1, 1, 0]
    # S - lr dL/dW^ W
    assert run.kept("own.score")[0].tolist() == pytest.approx([-0.4, 3.3, 1.95, 0.975])


@pytest.mark.parametrize("case", PROJECTED)
def test_masked_weights_keep_their_values_and_can_come_back(case):
    run = Run(case, total_steps=60)
    rows = zip(run.sparsifier.live_masks().values(), run.sparsifier.latents(), strict=True)
    before = [mask.clone() for mask, _ in rows]
    back = 0
    for _ in range(60):
        run.train(1)
        now = [mask.clone() for mask in run.sparsifier.live_masks().values()]
        back += sum(int((new & ~old).sum()) for new, old in zip(now, before, strict=True))
        before = now
    live = sum(state.live for state in run.sparsifier.layers())
    assert sum(int((latent != 0).sum()) for latent in run.sparsifier.latents()) > 2 * live
    assert back > 0


def test_blocks_live_and_die_together():
    run = ByHand("topk", torch.randn(8, 16), target=0.75, block=4)
    assert set(run.mask.view(8, 4, 4).sum(2).flatten().tolist()) == {0, 4}
    assert run.sparsifier.sparsity() == 0.75


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
        ("topk", {"update_every": 1000}, "update_every must be a whole number of steps between 1 and total_steps=100"),
        ("topkast", {"superset": 0.5}, "superset must be a finite number of at least 1, got 0.5"),
        ("powerprop", {"power": 0.5}, "power must be a finite number of at least 1, got 0.5"),
        ("feather", {"power": 0.5}, "power must be a finite number of at least 1, got 0.5"),
        ("feather", {"theta": 2.0}, r"theta must be in \[0, 1\], got 2"),
        ("feather", {"block": 4}, "Feather thresholds single weights"),
        ("st3", {"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2"),
        ("st3", {"anneal": "never"}, "anneal must be one of"),
        ("band", {"band": 0.5}, "band must be a finite number of at least 1, got 0.5"),
        ("band", {"power": 0.5}, "power must be a finite number of at least 1, got 0.5"),
        ("band", {"block": 4}, "Band thresholds single weights"),
        ("st3", {"block": 4}, "ST3 thresholds single weights"),
        ("optg", {"target": None}, "OptG needs a target"),
    ],
)
def test_mistakes(method, options, message):
    with pytest.raises(ValueError, match=message):
        sparse.create(method, nn.Sequential(nn.Linear(20, 10)), **{"target": 0.9, "total_steps": 100, **options})
