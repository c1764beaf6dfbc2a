"""AutoSparse and STR: the rule, the schedules, the landing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rarefy import cost
from rarefy.sparse import AutoSparse, anneal
from rarefy.sparse.thresholded import THRESHOLD_FUNCTIONS, Thresholded
from tests.sparse.methods import STEPS, TARGETED, Run, accuracy


def alphas(sparsifier, steps):
    seen = [sparsifier.layers()[0].alpha]
    for _ in range(steps):
        sparsifier.step()
        seen.append(sparsifier.layers()[0].alpha)
    return seen


def linear_model():
    return nn.Sequential(nn.Linear(20, 10))


@pytest.mark.parametrize("name", anneal.SCHEDULES)
def test_alpha_is_alpha_0_times_the_schedule_and_never_compounds(name):
    seen = alphas(AutoSparse(linear_model(), total_steps=100, alpha=0.6, anneal=name), 100)
    assert seen == pytest.approx([0.6 * anneal.SCHEDULES[name](i / 100) for i in range(101)], abs=1e-7)


def test_alpha_by_the_epoch_is_constant_within_it():
    seen = alphas(AutoSparse(linear_model(), total_steps=100, alpha=0.5, anneal="cosine", steps_per_epoch=10), 99)
    assert seen == pytest.approx([0.5 * anneal.cosine(i // 10 / 10) for i in range(100)], abs=1e-7)


def test_cutoff_holds_from_its_step_to_the_end():
    # an earlier implementation compared the epoch with == and let alpha come back
    seen = alphas(AutoSparse(linear_model(), total_steps=100, alpha=0.5, anneal="constant", cutoff=0.7), 100)
    assert seen == [0.5] * 70 + [0.0] * 31


def test_forward_and_backward_by_hand():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -0.75, 0.25, -0.5]]))
    AutoSparse(model, total_steps=10, alpha=0.5, anneal="constant", threshold_init=0.0)  # T = 1/2
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    output = model(x)
    output.sum().backward()
    assert output.item() == 0.5 * 1 - 0.25 * 2
    assert model[0].weight.grad.tolist() == [[1.0, 2.0, 1.5, 2.0]]
    # dL/ds = -g'(0) * (1 - 2 + .5*3 - .5*4), g'(0) = 1/4
    assert model[0].raw_threshold.grad.item() == 0.25 * 1.5


@pytest.mark.parametrize("name", THRESHOLD_FUNCTIONS)
def test_compiled_and_eager_weights_have_the_same_gradients(name):
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        model = linear_model()
        AutoSparse(model, total_steps=10, threshold_function=name, threshold_init=-2.0)
        layers.append(model)
    x = torch.randn(5, 20)
    layers[0](x).square().sum().backward()
    torch.compile(layers[1], backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_pressure_alone_decays_s_by_its_size():
    model = linear_model()
    nn.init.constant_(model[0].weight, 2.0)  # out of reach of the threshold, so that the floor does not hold it
    sparsifier = AutoSparse(model, total_steps=500, pressure=2.0)
    for _ in range(500):
        sparsifier.step()
    # the cosine's mean is 1; the sum over steps 1..n misses (w(0) - w(1)) / 2n = 1/500 of it
    assert math.log(model[0].raw_threshold.item() / -5.0) == pytest.approx(-2.0, rel=3e-3)


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
@pytest.mark.parametrize("case", TARGETED)
def test_lands_on_its_target(case, adam):
    run = Run(case, adam=adam, total_steps=2 * STEPS)
    run.train(2 * STEPS - 1)
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
    else:
        final = cost.count(model, torch.zeros(1, 2, 8, 8))
        dearest = max(layer.dense / layer.parameters for layer in final.layers)
        assert budget.goal * final.dense - dearest <= final.inference <= budget.goal * final.dense


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
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 10))
    sparsifier = AutoSparse(model, total_steps=1000, pressure=0.0, floor=0.1)
    with torch.no_grad():
        model[0].raw_threshold.fill_(4.0)  # T = 0.98 masks everything
    for _ in range(sparsifier.interval):
        sparsifier.step()
    assert sparsifier.layers()[0].live >= 250


def test_s_moves_and_falls_no_further_than_its_bounds():
    # a gradient that is a sum over a layer took a threshold from 0.38 to nothing in four steps, for good
    model = linear_model()
    sparsifier = AutoSparse(model, total_steps=1000, pressure=0.0)
    with torch.no_grad():
        model[0].raw_threshold.fill_(-40.0)
    sparsifier.step()
    assert model[0].raw_threshold.item() == pytest.approx(-5.2)
    for _ in range(30):
        with torch.no_grad():
            model[0].raw_threshold.sub_(1.0)
        sparsifier.step()
    assert model[0].raw_threshold.item() == pytest.approx(-8.0)


def test_pressure_rests_below_the_target():
    model = nn.Sequential(nn.Linear(50, 50))
    sparsifier = AutoSparse(model, total_steps=1000, target=0.5, pressure=1000.0)
    for _ in range(600):
        sparsifier.step()
    assert sparsifier.sparsity() < 0.99


def test_sparse_backward_gives_gradients_to_the_asked_share():
    model = nn.Sequential(nn.Linear(40, 25, bias=False))
    nn.init.normal_(model[0].weight)
    sparsifier = AutoSparse(model, total_steps=10, threshold_init=1.0, backward_density=0.5)
    model(torch.randn(64, 40)).square().sum().backward()
    moved = (model[0].weight.grad != 0).sum().item()
    assert moved == 500
    live = model[0].weight.detach().abs() > model[0].threshold()
    assert bool((model[0].weight.grad[live] != 0).all())
    assert sparsifier.layers()[0].weight_grad_density == 0.5


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


def test_param_groups_put_thresholds_apart_without_decay():
    model = linear_model()
    sparsifier = AutoSparse(model, total_steps=10, threshold_lr=50.0)
    weights, thresholds = sparsifier.param_groups(lr=1e-3, weight_decay=0.1)
    assert [id(p) for p in weights["params"]] == [id(model[0].weight), id(model[0].bias)]
    assert weights["weight_decay"] == 0.1
    assert [id(p) for p in thresholds["params"]] == [id(model[0].raw_threshold)]
    assert thresholds["weight_decay"] == 0.0
    assert thresholds["lr"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"threshold_lr=50 is a multiple of lr: call param_groups\(lr=...\)"):
        sparsifier.param_groups()


def test_layers_inside_a_transformer_are_thresholded_in_its_fast_path_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.warns(UserWarning, match="50 % of the matrix weights stay dense, self_attn.in_proj_weight"):
        sparsifier = AutoSparse(model, total_steps=10, threshold_init=-1.5)
    assert [layer.name for layer in sparsifier.layers()] == ["linear1", "linear2"]
    x = torch.randn(3, 5, 8)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-6)
    plain = sparsifier.finalize()
    with torch.no_grad():
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


def test_subclasses_and_excluded_layers_are_left_alone():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Mine(4, 4), nn.Conv2d(1, 1, 1), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="33 % of the matrix weights stay dense, 1.weight among them"):
        AutoSparse(copy.deepcopy(model), total_steps=10)
    sparsifier = AutoSparse(model, total_steps=10, exclude=["3"])
    assert [layer.name for layer in sparsifier.layers()] == ["0", "2"]
    assert [isinstance(module, Thresholded) for module in model] == [True, False, True, False]
    assert [layer.name for layer in AutoSparse(linear_model(), total_steps=1, include=["0"]).layers()] == ["0"]


def test_without_a_target_finalize_keeps_what_training_left():
    run = Run("autosparse").train(50)
    live = [layer.live for layer in run.sparsifier.layers()]
    model = run.sparsifier.finalize()
    found = [int((m.weight != 0).sum()) for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    assert found == live


def test_finalize_before_the_end_warns_and_is_exact():
    run = Run("autosparse-accuracy").train(10)
    with pytest.warns(UserWarning, match=r"finalize\(\) after 10 of 200 steps cuts from a density of .* to 0.1000"):
        model = run.sparsifier.finalize()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    total = sum(w.numel() for w in weights)
    assert sum(int((w != 0).sum()) for w in weights) == math.floor(0.1 * total + 1e-9 * total)


SHARED = nn.Linear(4, 4)

MISTAKES = {
    "percent": ({"target": 90}, r"target must be in \(0, 1\), got 90; for 90 % write 0.9"),
    "one": ({"target": 1.0}, r"target must be in \(0, 1\), got 1"),
    "both targets": ({"target": 0.9, "target_flops": 0.1}, "not both"),
    "flops without input": ({"target_flops": 0.1}, "needs example_input"),
    "steps": ({"total_steps": 0}, "total_steps must be a positive whole number.*got 0"),
    "steps type": ({"total_steps": 10.5}, "total_steps must be a positive whole number.*got 10.5"),
    "include": ({"include": ["2"]}, r"include: '2'.*there is 0, 1"),
    "misspelt": ({"exclude": ["O"]}, "exclude: 'O'"),
    "include string": ({"include": "0"}, r"must be a list of patterns, got the string '0'; write \['0'\]"),
    "all excluded": ({"exclude": ["*"]}, "nothing to sparsify.*include and exclude leave none"),
    "floor": ({"floor": 2.0}, r"floor must be a density in \[0, 1\], got 2"),
    "floor layer": ({"floor": {"nope": 0.1}}, "floor: 'nope'"),
    "impossible": ({"target": 0.99, "floor": 0.5}, "target=0.99 cannot be reached.*floors.*keep 0.5"),
    "policy": ({"policy": "fast", "target": 0.9}, "policy must be one of 'accuracy', 'cost', got 'fast'"),
    "policy without target": ({"policy": "cost"}, "policy='cost' needs a target"),
    "unused": ({"target": 0.9, "anneal": "cosine"}, "policy='accuracy' controls alpha itself"),
    "alpha": ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    "anneal": ({"anneal": "cosin"}, "anneal must be one of.*'cosine'.*got 'cosin'"),
    "granularity": ({"granularity": "row"}, "granularity must be one of 'layer', 'channel', got 'row'"),
    "g": ({"threshold_function": "relu"}, "threshold_function must be one of"),
    "pressure": ({"pressure": -1.0}, "pressure must be a finite number that is not negative, got -1"),
    "epochs": ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
    "text": ({"target": "0.9"}, r"target must be a number in \(0, 1\), got the text '0.9'"),
    "init": ({"threshold_init": float("nan")}, "threshold_init must be a finite number, got nan"),
    "backward": ({"backward_density": 2.0}, r"backward_density must be in \[0, 1\], got 2"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_the_model_is_touched(options, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [type(module) for module in model]
    with pytest.raises(ValueError, match=message):
        AutoSparse(model, **{"total_steps": 100, **options})
    assert [type(module) for module in model] == before
    assert len(list(model.parameters())) == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU()), "nothing to sparsify: the model has 0"),
        (nn.Sequential(SHARED, nn.ReLU(), nn.Sequential(SHARED)), None),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "nothing to sparsify"),
        (nn.Sequential(nn.LazyLinear(4)), "nothing to sparsify"),
    ],
    ids=["none", "one module twice", "parametrized", "lazy"],
)
def test_models_that_cannot_be_sparsified(model, message):
    if message is None:
        assert len(AutoSparse(model, total_steps=10).layers()) == 1
    else:
        with pytest.raises(ValueError, match=message):
            AutoSparse(model, total_steps=10)


def test_tied_weights_are_refused_by_name():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "out": nn.Linear(4, 10)})
    model["out"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"'embed' and 'out' share one weight.*exclude=\['out'\]"):
        AutoSparse(model, total_steps=10)


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
    with pytest.raises(ValueError, match=r"target=\['sparsity', 0.09.*this one \['sparsity', 0.5\]"):
        Run("autosparse-accuracy", total_steps=50, target=0.5).sparsifier.load_state_dict(state)
    state = Run("autosparse-accuracy", total_steps=50, pressure=9.0).sparsifier.state_dict()
    with pytest.raises(ValueError, match="policy='accuracy', this one 'cost'"):
        Run("autosparse-accuracy", total_steps=50, policy="cost", pressure=9.0).sparsifier.load_state_dict(state)


def test_steps_beyond_the_end_change_nothing():
    run = Run("autosparse-accuracy", total_steps=20).train(20)
    thresholds = [layer.threshold for layer in run.sparsifier.layers()]
    for _ in range(5):
        run.sparsifier.step()
    assert [layer.threshold for layer in run.sparsifier.layers()] == thresholds
    assert run.sparsifier.progress == 1.0


@pytest.mark.parametrize("case", ["autosparse-accuracy", "autosparse-cost", "str-target"])
@pytest.mark.parametrize("target", [0.95, 0.98])
def test_high_targets_in_short_runs_do_not_run_away(case, target):
    # pressure that grew with the target alone drove every threshold to 1 and the weights to hundreds
    run = Run(case, target=target, total_steps=3 * STEPS).train(3 * STEPS)
    assert run.sparsifier.sparsity() == pytest.approx(target, abs=2e-3)
    assert max(layer.threshold for layer in run.sparsifier.layers()) < 0.9
    assert accuracy(run.sparsifier.finalize()) > 0.7


def test_weights_beyond_the_reach_of_a_sigmoid_are_refused():
    model = nn.Sequential(nn.Linear(50, 50))
    nn.init.normal_(model[0].weight, std=3.0)
    with pytest.raises(ValueError, match=r"too large for sigmoid thresholds.*target leaves 10.0 %.*softplus"):
        AutoSparse(model, total_steps=10, target=0.9)
    sparsifier = AutoSparse(model, total_steps=10, target=0.9, threshold_function="softplus")
    for _ in range(10):
        sparsifier.step()
    assert sparsifier.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_a_sparsifier_comes_before_the_wrapper_and_once():
    model = linear_model()
    with pytest.raises(ValueError, match="wrapped in DataParallel.*make the sparsifier on the plain model, then wrap"):
        AutoSparse(nn.DataParallel(model), total_steps=10)
    AutoSparse(model, total_steps=10)
    with pytest.raises(ValueError, match=r"layer '0' is being sparsified already; finalize\(\)"):
        AutoSparse(model, total_steps=10)
    with pytest.raises(ValueError, match="layer '0' is on the meta device"):
        AutoSparse(nn.Sequential(nn.Linear(3, 3, device="meta")), total_steps=10)


def test_a_cast_after_the_sparsifier_was_made_is_refused():
    model = linear_model()
    sparsifier = AutoSparse(model, total_steps=10)
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"thresholds became torch.bfloat16.*cast the model before"):
        sparsifier.step()
    assert AutoSparse(linear_model().bfloat16(), total_steps=10).model[0].raw_threshold.dtype == torch.float32


def test_count_sees_the_zeros_while_training():
    run = Run("autosparse-accuracy").train(100)
    counted = cost.count(run.plain, torch.zeros(1, 2, 8, 8))
    assert counted.sparsity == pytest.approx(run.sparsifier.sparsity())


def test_create_names_the_nearest():
    from rarefy import sparse

    with pytest.raises(ValueError, match="unknown method 'autospars'; did you mean 'autosparse'"):
        sparse.create("autospars", linear_model(), total_steps=1)
    with pytest.raises(ValueError, match="unknown option of method 'autosparse': 'targt'; did you mean 'target'"):
        sparse.create("autosparse", linear_model(), total_steps=1, targt=0.9)


def test_a_run_of_one_step_lands():
    run = Run("autosparse-accuracy", total_steps=1).train(1)
    assert run.sparsifier.sparsity() == pytest.approx(0.9, abs=2e-3)
