"""AutoSparse and STR: the rule, the schedules, the landing."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rarefy import cost, sparse
from rarefy.sparse import AutoSparse, schedules
from rarefy.sparse.families.threshold_functions import THRESHOLD_FUNCTIONS
from tests.sparse.by_hand import ByHand
from tests.sparse.methods import EVERY, STEPS, TARGETED, Run, accuracy, latency


def alphas(steps, **options):
    """Alpha before the first step and after each."""
    run = ByHand("autosparse", torch.randn(10, 20), total_steps=100, **options)
    seen = [run.state.alpha]
    for _ in range(steps):
        seen.append(run.rest().state.alpha)
    return seen


def linear_model():
    return nn.Sequential(nn.Linear(20, 10))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_alpha_is_alpha_0_times_the_schedule_and_never_compounds(name):
    seen = alphas(100, alpha=0.6, anneal=name)
    assert seen == pytest.approx([0.6 * schedules.SCHEDULES[name](i / 100) for i in range(101)], abs=1e-7)


def test_alpha_by_the_epoch_is_constant_within_it():
    seen = alphas(99, alpha=0.5, anneal="cosine", steps_per_epoch=10)
    assert seen == pytest.approx([0.5 * schedules.cosine(i // 10 / 10) for i in range(100)], abs=1e-7)


def test_cutoff_holds_from_its_step_to_the_end():
    # an earlier implementation compared the epoch with == and let alpha come back
    assert alphas(100, alpha=0.5, anneal="constant", cutoff=0.7) == [0.5] * 70 + [0.0] * 31


def test_forward_and_backward_by_hand():
    options = {"total_steps": 1000, "alpha": 0.5, "anneal": "constant", "pressure": 0.0, "floor": 0.0}
    run = ByHand("autosparse", [[1.0, -0.75, 0.25, -0.5]], lr=0.125, **options)
    run.put("own.s", 0.0)  # T = 1/2
    assert run.used == [0.5, -0.25, 0.0, 0.0]
    assert run.step(torch.tensor([[1.0, 2.0, 3.0, 4.0]])) == [1.0, 2.0, 1.5, 2.0]
    assert run.dense.tolist() == [[1.0, -0.75, 0.25, -0.5]]
    # dL/ds = -g'(0) * (1 - 2 + .5*3 - .5*4), g'(0) = 1/4
    assert run.kept("own.s").item() == pytest.approx(-0.125 * 0.25 * 1.5)


def test_channels_have_thresholds_of_their_own():
    options = {"total_steps": 1000, "alpha": 0.5, "anneal": "constant", "pressure": 0.0, "floor": 0.0}
    run = ByHand("autosparse", [[1.0, -0.75], [0.25, -0.5]], lr=0.125, granularity="channel", **options)
    s = math.log(0.25 / 0.75)
    run.put("own.s", [0.0, s])  # T = 1/2 and 1/4
    assert run.model[0].weight.tolist() == [[0.5, -0.25], [0.0, -0.25]]
    run.step()
    assert run.gradient.tolist() == [[1.0, 1.0], [0.5, 1.0]]
    # -g' (1 - 1), -g' (.5 - 1), g' = T (1 - T)
    assert run.kept("own.s").tolist() == pytest.approx([0.0, s - 0.125 * (1 / 4 * 3 / 4) * 0.5])


def test_pressure_alone_decays_s_by_its_size():
    # weights out of reach of the threshold, so that the floor does not hold it
    run = ByHand("autosparse", torch.full((10, 20), 2.0), total_steps=500, pressure=2.0).rest(500)
    # the cosine's mean is 1; the sum over steps 1..n misses (w(0) - w(1)) / 2n = 1/500 of it
    assert math.log(run.kept("own.s").item() / -5.0) == pytest.approx(-2.0, rel=3e-3)


@pytest.mark.parametrize("name", THRESHOLD_FUNCTIONS)
def test_threshold_functions_and_their_inverses(name):
    function, inverse, derivative = THRESHOLD_FUNCTIONS[name]
    s = torch.linspace(-9, 3, 200, dtype=torch.float64)
    torch.testing.assert_close(inverse(function(s)), s, rtol=1e-5, atol=1e-6)
    s.requires_grad_()
    (slope,) = torch.autograd.grad(function(s).sum(), s)
    torch.testing.assert_close(derivative(function(s)), slope)
    magnitudes = torch.linspace(0, 3, 1001, dtype=torch.float64)
    assert (inverse(magnitudes).diff() > 0).all(), "order must hold beyond the function's range too"


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("case", [each for each in EVERY if each.values[0] in TARGETED])
def test_lands_on_its_target(case, adam):
    steps = STEPS * (2 if case == "ltp" else 1)  # whose sigmoids take longer to be steep
    run = Run(case, adam=adam, total_steps=steps)
    run.train(steps - 1)
    budget = run.sparsifier.budget
    by_itself = budget.density([layer.live for layer in run.sparsifier.layers()])
    run.train(1)
    landed = budget.density([layer.live for layer in run.sparsifier.layers()])
    names = [layer.name for layer in run.sparsifier.layers()]
    model = run.sparsifier.finalize()
    assert accuracy(model) > 0.8
    assert by_itself == pytest.approx(budget.goal, abs=0.02), "before the exact finish"
    assert landed == pytest.approx(budget.goal, abs=0.002)
    if budget.kind == "sparsity":
        layers = [model.get_submodule(name) for name in names]
        weights = sum(m.weight.numel() for m in layers)
        live = sum(int((m.weight != 0).sum()) for m in layers)
        assert live == math.floor(budget.goal * weights + 1e-9 * weights)
    elif budget.kind == "ms":
        live = {name: int(model.get_submodule(name).weight.count_nonzero()) for name in names}
        assert budget.seconds - budget.dearest <= latency().seconds(live) <= budget.seconds
    else:
        final = cost.count(model, torch.zeros(1, 2, 8, 8))
        dearest = max(layer.dense / layer.parameters for layer in final.layers)
        assert budget.goal * final.dense - dearest <= final.inference <= budget.goal * final.dense


@pytest.mark.slow
@pytest.mark.parametrize("case", ["autosparse-accuracy", "autosparse-cost", "str-target"])
def test_floors_keep_every_layer_alive(case):
    run = Run(case, target=0.95, floor={"0": 0.25}).train(STEPS)
    densities = {layer.name: layer.density for layer in run.sparsifier.layers()}
    model = run.sparsifier.finalize()
    for name, density in densities.items():
        weight = model.get_submodule(name).weight
        assert (weight != 0).float().mean().item() == pytest.approx(density, abs=2e-3)
    assert densities["0"] >= 0.25
    assert min(densities.values()) >= 0.005


def test_a_collapsing_layer_is_brought_back():
    run = ByHand("autosparse", torch.randn(50, 50) / 7, total_steps=1000, pressure=0.0, floor=0.1)
    run.put("own.s", 4.0)  # T = 0.98 masks everything
    assert run.state.live == 0
    assert run.rest(run.sparsifier.interval).state.live >= 250


def test_s_moves_and_falls_no_further_than_its_bounds():
    # a gradient that is a sum over a layer took a threshold from 0.38 to nothing in four steps, for good
    weight = torch.randn(10, 20)
    options = {"total_steps": 1000, "pressure": 0.0, "alpha": 1.0, "anneal": "constant"}
    run = ByHand("autosparse", weight, lr=1e-20, threshold_lr=1e25, **options)
    seen = [run.kept("own.s").item()]
    for _ in range(30):
        run.step(-weight.sign().sum(0, keepdim=True))  # dL/ds = -g'(s) sum of sign(W) dL/dW^, above 0
        seen.append(run.kept("own.s").item())
    assert seen[:6] == pytest.approx([-5.0, -5.2, -5.4, -5.6, -5.8, -6.0])
    assert seen[-1] == pytest.approx(-8.0)
    for _ in range(5):
        run.step(weight.sign().sum(0, keepdim=True))
    assert run.kept("own.s").item() == pytest.approx(-7.0)


def test_pressure_rests_below_the_target():
    run = ByHand("autosparse", torch.randn(50, 50) / 7, total_steps=1000, target=0.5, pressure=1000.0).rest(600)
    assert run.sparsifier.sparsity() < 0.99


def test_sparse_backward_gives_gradients_to_the_asked_share():
    run = ByHand("autosparse", torch.randn(25, 40), backward_density=0.5, pressure=0.0, total_steps=1000)
    run.put("own.s", 1.0)
    run.rest(run.sparsifier.interval)
    live = run.mask
    assert 0 < live.sum() < 500
    run.step(torch.randn(64, 40))
    assert int((run.gradient != 0).sum()) == 500
    assert bool((run.gradient[live] != 0).all())
    assert run.state.weight_grad_density == 0.5
    # the largest |W| - T of those that are masked too
    assert run.dense[run.gradient != 0].abs().min() >= run.dense[run.gradient == 0].abs().max()


@pytest.mark.slow
def test_larger_alpha_keeps_more_weights_and_alpha_0_runs_away():
    ends = []
    for alpha in (0.0, 0.5, 1.0):
        run = Run("autosparse", alpha=alpha, anneal="constant", pressure=3.0).train(STEPS)
        ends.append(run.sparsifier.sparsity())
    assert ends[0] > ends[1] > ends[2]


def test_alpha_0_is_str():
    by_alpha = Run("autosparse", alpha=0.0, pressure=5.0).train(30)
    by_str = Run("str", pressure=5.0).train(30)
    for a, b in zip(by_alpha.plain.parameters(), by_str.plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_thresholds_learn_at_a_multiple_of_the_weights_rate_and_without_decay():
    moved = []
    for threshold_lr in (1.0, 50.0):
        options = {"threshold_lr": threshold_lr, "total_steps": 1000, "pressure": 0.0}
        run = ByHand("autosparse", torch.full((2, 3), 0.5), lr=1e-3, weight_decay=0.1, **options)
        assert run.step() == [1.0] * 3
        moved.append(run.kept("own.s").item() + 5.0)
        run.rest()
        assert run.kept("own.s").item() + 5.0 == moved[-1], "no gradient, no step"
    assert moved[0] > 0
    assert moved[1] == pytest.approx(50.0 * moved[0], rel=2e-2)  # of float32's steps near 5


def test_without_a_target_finalize_keeps_what_training_left():
    run = Run("autosparse").train(50)
    live = [layer.live for layer in run.sparsifier.layers()]
    model = run.sparsifier.finalize()
    found = [int((m.weight != 0).sum()) for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    assert found == live


def test_finalize_before_the_end_warns_and_is_exact():
    run = Run("autosparse-accuracy").train(10)
    with pytest.warns(UserWarning, match=r"finalize\(\) after 10 of 200 steps goes from a density of .* to 0.1000"):
        model = run.sparsifier.finalize()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    total = sum(w.numel() for w in weights)
    assert sum(int((w != 0).sum()) for w in weights) == math.floor(0.1 * total + 1e-9 * total)


MISTAKES = {
    "percent": ({"target": 90}, r"target must be in \(0, 1\), got 90; for 90 % write 0.9"),
    "one": ({"target": 1.0}, r"target must be in \(0, 1\), got 1"),
    "both targets": ({"target": 0.9, "target_flops": 0.1}, "not both"),
    "flops without input": ({"target_flops": 0.1}, "needs example_input"),
    "input without flops": ({"target": 0.9, "example_input": torch.zeros(1, 2, 8, 8)}, "give it with target_flops"),
    "steps": ({"total_steps": 0}, "total_steps must be a positive whole number.*got 0"),
    "steps type": ({"total_steps": 10.5}, "total_steps must be a positive whole number.*got 10.5"),
    "include": ({"include": ["2"]}, r"include: '2'.*there is 0, 1"),
    "misspelt": ({"exclude": ["O"]}, "exclude: 'O'"),
    "include string": ({"include": "0"}, r"must be a list of patterns, got the string '0'; write \['0'\]"),
    "all excluded": ({"exclude": ["*"]}, "nothing to sparsify.*include and exclude leave none"),
    "floor": ({"floor": 2.0}, r"floor must be a density in \[0, 1\], got 2"),
    "floor layer": ({"floor": {"nope": 0.1}}, "floor: 'nope'"),
    "impossible": ({"target": 0.99, "floor": 0.5}, "target=0.99 cannot be reached.*floors.*keep 0.5"),
    "policy": ({"policy": "fast", "target": 0.9}, "policy must be one of accuracy, cost, got 'fast'"),
    "policy without target": ({"policy": "cost"}, "policy='cost' needs a target"),
    "unused": ({"target": 0.9, "anneal": "cosine"}, "policy='accuracy' controls alpha itself"),
    "alpha": ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    "anneal": ({"anneal": "cosin"}, "anneal must be one of.* cosine,.* got 'cosin'"),
    "granularity": ({"granularity": "row"}, "granularity must be one of layer, channel, got 'row'"),
    "g": ({"threshold_function": "relu"}, "threshold_function must be one of"),
    "pressure": ({"pressure": -1.0}, "pressure must be a finite number that is not negative, got -1"),
    "epochs": ({"steps_per_epoch": 0}, "steps_per_epoch must be a positive whole number, got 0"),
    "text": ({"target": "0.9"}, r"target must be a number in \(0, 1\), got the text '0.9'"),
    "init": ({"threshold_init": float("nan")}, "threshold_init must be a finite number, got nan"),
    "backward": ({"backward_density": 2.0}, r"backward_density must be in \[0, 1\], got 2"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_the_model_is_touched(options, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        AutoSparse(model, **{"total_steps": 100, **options})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_pruned_layer_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="weight of layer '0' is not a parameter"):
        AutoSparse(model, total_steps=10)


def test_checkpoints_of_another_run_are_refused():
    state = Run("autosparse-accuracy", total_steps=50).sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"total_steps=50, this one 60"):
        Run("autosparse-accuracy", total_steps=60).sparsifier.load_state_dict(state)
    with pytest.raises(ValueError, match="method='AutoSparse', this one 'STR'"):
        Run("str", total_steps=50).sparsifier.load_state_dict(state)
    with pytest.raises(ValueError, match="has target=0.9, this one 0.5"):
        Run("autosparse-accuracy", total_steps=50, target=0.5).sparsifier.load_state_dict(state)
    state = Run("autosparse-accuracy", total_steps=50, pressure=9.0).sparsifier.state_dict()
    with pytest.raises(ValueError, match="policy='accuracy', this one 'cost'"):
        Run("autosparse-accuracy", total_steps=50, policy="cost", pressure=9.0).sparsifier.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:training goes on after total_steps")
def test_steps_beyond_the_end_move_no_threshold():
    run = Run("autosparse-accuracy", total_steps=20).train(20)
    thresholds = [layer.threshold for layer in run.sparsifier.layers()]
    run.train(5)
    assert [layer.threshold for layer in run.sparsifier.layers()] == thresholds
    assert run.sparsifier.progress == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["autosparse-accuracy", "autosparse-cost", "str-target"])
@pytest.mark.parametrize("target", [0.95, 0.98])
def test_high_targets_in_short_runs_do_not_run_away(case, target):
    # pressure that grew with the target alone drove every threshold to 1 and the weights to hundreds
    run = Run(case, target=target, total_steps=2 * STEPS).train(2 * STEPS)
    assert run.sparsifier.sparsity() == pytest.approx(target, abs=2e-3)
    assert max(layer.threshold for layer in run.sparsifier.layers()) < 0.99
    assert max(latent.abs().max().item() for latent in run.sparsifier.latents()) < 10
    assert accuracy(run.sparsifier.finalize()) > 0.7


def test_weights_beyond_the_reach_of_a_sigmoid_are_refused():
    model = nn.Sequential(nn.Linear(50, 50))
    nn.init.normal_(model[0].weight, std=3.0)
    with pytest.raises(ValueError, match=r"too large for sigmoid thresholds.*target leaves 10.0 %.*softplus"):
        AutoSparse(model, total_steps=10, target=0.9)
    run = ByHand("autosparse", 3.0 * torch.randn(50, 50), target=0.9, threshold_function="softplus").rest(10)
    assert run.sparsifier.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_a_model_without_memory_is_refused_when_it_is_attached():
    model = nn.Sequential(nn.Linear(3, 3, device="meta"))
    sparsifier = AutoSparse(model, total_steps=10)
    with pytest.raises(ValueError, match="weight of layer '0' is on the meta device"):
        sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_cast_after_attaching_is_refused():
    run = ByHand("autosparse", torch.randn(10, 20))
    run.model.bfloat16()
    with pytest.raises(
        RuntimeError, match=r"layer '0' is torch.bfloat16.*was torch.float32.*attach\(optimizer\) again"
    ):
        run.step(torch.ones(1, 20, dtype=torch.bfloat16))


def test_count_sees_the_zeros_while_training():
    run = Run("autosparse-accuracy").train(100)
    counted = cost.count(run.plain, torch.zeros(1, 2, 8, 8))
    assert counted.sparsity == pytest.approx(run.sparsifier.sparsity())


def test_create_names_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'autospars'; did you mean 'autosparse'"):
        sparse.create("autospars", linear_model(), total_steps=1)
    with pytest.raises(ValueError, match="unknown option of AutoSparse: 'targt'; did you mean 'target'"):
        sparse.create("autosparse", linear_model(), total_steps=1, targt=0.9)


def test_a_run_of_one_step_lands():
    run = Run("autosparse-accuracy", total_steps=1).train(1)
    assert run.sparsifier.sparsity() == pytest.approx(0.9, abs=2e-3)
