"""Weights that somebody else writes or lays out, and states that are not this run's."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from rarefy import sparse
from tests.sparse.methods import EVERY, Run, assert_equal, batch, network

#: An option of each, by which it becomes another run.
OTHERS = {
    "autosparse": {"threshold_init": -4.0},
    "autosparse-accuracy": {"floor": 0.02},
    "nm": {"refinement": 1e-3},
    "static": {"seed": 1},
    "gmp": {"start": 0.1},
    "set": {"drop_fraction": 0.2},
    "rigl": {"stop": 0.5},
    "granet": {"initial_density": 0.7},
    "acdc": {"phase": 0.2},
    "st3": {"alpha": 0.5},
    "band": {"band": 2.0},
    "feather": {"power": 2.0},
    "powerprop": {"power": 3.0},
    "topkast": {"power": 2.0},
    "optg": {"end": 0.7},
    "dst": {"penalty": 1e-3},
    "ltp": {"mask_lr": 2.0},
    "cs": {"initial": 0.2},
}


def masked(run):
    """Whether the method's weights are hard masked, so that a factor on them is no change that it could see."""
    return "latent" not in run.sparsifier._buckets[0].kept


@pytest.mark.parametrize("case", EVERY)
def test_weights_that_are_changed_a_little_stay_in_use_as_they_are(case):
    run = Run(case, total_steps=40, norm=False).train(20)
    with torch.no_grad():
        for p in run.plain.parameters():
            p.mul_(1.02)
    with contextlib.nullcontext() if masked(run) else pytest.warns(UserWarning, match="changed outside"):
        run.sparsifier.state_dict()
        dense = run.sparsifier.dense_weights()
    with run.sparsifier._as_written():
        used = list(dense.values()) if masked(run) else run.sparsifier._by_layer(run.sparsifier._values)
        used = [value.clone() for value in used]
    written = [run.plain.get_submodule(layer.name).weight for layer in run.sparsifier.layers()]
    for now, then in zip(used, written, strict=True):
        assert (now - then).norm() <= (0.06 if case == "ltp" else 0.01) * then.norm()  # its masks become softer


@pytest.mark.parametrize("case", EVERY)
def test_a_step_aside_and_back_changes_nothing(case):
    ends = []
    for aside in (False, True):
        run = Run(case, total_steps=20, norm=False)
        for step in range(20):
            run.train(1)
            if aside:
                generator = torch.Generator().manual_seed(step)
                with torch.no_grad():
                    for layer in run.sparsifier.layers():
                        weight = run.plain.get_submodule(layer.name).weight
                        away = 0.01 * torch.randn(weight.shape, generator=generator) * (weight != 0)
                        weight.add_(away).sub_(away)
        ends.append({name: p.detach() for name, p in run.plain.named_parameters()})
    for name, value in ends[0].items():
        # Steps are taken with the gradients of the rounded weights.
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", OTHERS)
def test_a_state_of_a_run_with_other_options_is_refused(case):
    one, other = Run(case).train(3), Run(case, **OTHERS[case])
    option = next(iter(OTHERS[case]))
    with pytest.raises(ValueError, match=f"the checkpoint's sparsifier has {option}="):
        other.sparsifier.load_state_dict(one.sparsifier.state_dict())


def test_numbers_of_numpy_and_tensors_are_numbers(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for target in (np.float32(0.5), torch.tensor(0.5)):
        sparsifier = sparse.GMP(model, target=target, total_steps=np.int64(20))
        torch.save(sparsifier.state_dict(), tmp_path / "state.pt")
        again = sparse.GMP(model, target=0.5, total_steps=20)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"method": None}, "takes what a sparsifier's state_dict"),
        ({"config": None}, "takes what a sparsifier's state_dict"),
        ({"steps": 3.7}, "takes what a sparsifier's state_dict"),
        ({"steps": -5}, "is broken: it says -5 steps"),
        ({"aside": ["0", "3", "7", "9", "x"]}, "is broken"),
        ({"method": {}}, "state of AutoSparse is not whole"),
        ({"layers": {}}, "has no 'latent' of layer"),
    ],
)
def test_a_broken_state_is_told(broken, message):
    run = Run("autosparse-accuracy").train(2)
    with pytest.raises(ValueError, match=message):
        Run("autosparse-accuracy").sparsifier.load_state_dict({**run.sparsifier.state_dict(), **broken})


def test_a_layer_that_is_frozen_since_is_named():
    run, other = Run("gmp").train(2), Run("gmp", exclude=["3"])
    with pytest.raises(ValueError, match=r"other layers: '3' is \[.*\] there, not there here.*frozen since"):
        other.sparsifier.load_state_dict(run.sparsifier.state_dict())


@pytest.mark.parametrize("case", ["autosparse-accuracy", "gmp", "topk"])
def test_parameters_that_are_replaced_are_what_is_finalized(case):
    run = Run(case, norm=False).train(20)
    state = {name: value.clone() for name, value in run.plain.state_dict().items()}
    run.plain.load_state_dict(state, assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in the middle of the run
        run.sparsifier.finalize()
    layers = [run.plain.get_submodule(layer.name).weight for layer in run.sparsifier.layers()]
    zeros = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    assert zeros == pytest.approx(1.0 - run.sparsifier.budget.goal, abs=2e-3)


def laid(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    if how == "transposed":
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    elif how == "sliced":
        for layer in (model[0], model[2]):
            wide = torch.zeros(layer.weight.shape[0], 20)
            wide[:, : layer.weight.shape[1]] = layer.weight.detach()
            layer.weight = nn.Parameter(wide[:, : layer.weight.shape[1]])
    return model


@pytest.mark.parametrize("how", ["transposed", "sliced"])
@pytest.mark.parametrize("method", ["autosparse", "str", "gmp", "st3", "dst"])
def test_weights_may_lie_in_memory_in_any_way(method, how):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    ends = []
    for way in ("plain", how):
        model = laid(way)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = sparse.create(method, model, target=0.5, total_steps=20).attach(optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
        sparsifier.finalize()
        ends.append([p.detach().clone() for p in model.parameters()])
    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_a_sparse_backward_asks_for_rows():
    model = laid("transposed")
    sparsifier = sparse.AutoSparse(model, target=0.5, total_steps=20, backward_density=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"takes weights whose elements lie row after row.*contiguous"):
        sparsifier.attach(optimizer)


class Conv1D(nn.Module):
    """As transformers has it: y = x W + b, with W of (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("method", "options"),
    [("nm", {}), ("gmp", {"target": 0.5, "block": 4}), ("autosparse", {"target": 0.5, "block": 4})],
)
@pytest.mark.parametrize("layer", [Conv1D(8, 8), nn.ConvTranspose2d(8, 8, 3)], ids=["Conv1D", "transposed"])
def test_patterns_over_inputs_name_the_layers_whose_inputs_come_first(method, options, layer):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ValueError, match=r"in layer '1'.*inputs first and outputs second; pass exclude=\['1'\]"):
        sparse.create(method, model, total_steps=20, **options)
    assert len(sparse.create(method, model, total_steps=20, exclude=["1"], **options).layers()) == 1


def test_zeros_are_held_beside_a_layer_that_starts_at_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
        model[2].weight.zero_()
    held = model[0].weight.detach() != 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparse.create("static", model, masks="nonzero", total_steps=20).attach(optimizer)
    x = torch.randn(64, 16)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
    sparsifier.finalize()
    assert torch.equal(model[0].weight != 0, held)
    assert (model[2].weight != 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrent_weights_that_are_computed_are_refused(kind):
    model = nn.ModuleDict({"rnn": kind(8, 8), "head": nn.Linear(8, 4)})
    name = "weight_hh" if kind is nn.LSTMCell else "weight_hh_l0"
    parametrizations.weight_norm(model["rnn"], name)
    with pytest.raises(ValueError, match=rf"layer 'rnn.{name}' is not a parameter.*exclude=\['rnn.{name}'\]"):
        sparse.create("gmp", model, target=0.5, total_steps=20)
    layers = sparse.create("gmp", model, target=0.5, total_steps=20, exclude=[f"rnn.{name}"]).layers()
    assert not any("parametrizations" in layer.name for layer in layers)


def test_what_an_error_says_to_exclude_can_be_excluded():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"pass exclude=\['0'\]"):
        sparse.create("gmp", model, target=0.5, total_steps=20)
    assert len(sparse.create("gmp", model, target=0.5, total_steps=20, exclude=["0"]).layers()) == 1


def test_a_linear_layer_whose_weight_is_no_parameter_stays_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    weight = model[1].weight.detach()
    del model[1].weight
    model[1].register_buffer("weight", weight)
    assert [layer.name for layer in sparse.create("gmp", model, target=0.5, total_steps=20).layers()] == ["0"]


@pytest.mark.parametrize("method", ["gmp", "st3", "band", "feather", "powerprop", "optg", "granet"])
def test_named_sparsities_are_reached_along_the_ramp(method):
    torch.manual_seed(1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"initial_density": 0.95} if method == "granet" else {}
    named = {"0": 0.5}
    sparsifier = sparse.create(method, model, target=0.8, total_steps=40, distribution=named, **options)
    sparsifier.attach(optimizer)
    for step in range(40):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    sparsifier.finalize()
    densities = {layer.name: layer.density for layer in sparsifier.layers()}
    assert densities["0"] == pytest.approx(0.5, abs=0.01)


def test_a_decay_that_is_decoupled_stays_outside_the_gradient():
    ends = []
    for make in (
        lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.1, decoupled_weight_decay=True),
    ):
        run = Run("topkast")
        run.optimizer = make(run.plain.parameters())
        run.sparsifier.attach(run.optimizer)
        run.train(20)
        ends.append(run.plain.state_dict())
    assert_equal(*ends)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rigl", {"update_every": "5"}),
        ("rigl", {"update_every": 2.5}),
        ("gmp", {"start": "a"}),
        ("gmp", {"start": None}),
        ("acdc", {"phase": "x"}),
        ("autosparse", {"threshold_init": "x"}),
        ("gmp", {"distribution": {"0": "x"}}),
        ("gmp", {"exclude": 3}),
        ("mest", {"soft": "no"}),
        ("st3", {"sigma": "yes"}),
        ("topkast", {"exploration": 1}),
    ],
)
def test_options_of_another_type_are_told(method, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}.* must be"):
        sparse.create(method, nn.Sequential(nn.Linear(8, 8)), target=0.5, total_steps=50, **options)


def test_names_in_other_letters_are_hinted_at():
    with pytest.raises(ValueError, match="did you mean 'rigl'"):
        sparse.create("RigL", nn.Linear(8, 8), target=0.5, total_steps=50)
    with pytest.raises(ValueError, match="unknown method None"):
        sparse.create(None, nn.Linear(8, 8), total_steps=50)
    with pytest.raises(ValueError, match="name of a method is a text"):
        sparse.register(3, sparse.GMP)


def test_patterns_may_come_from_an_iterator():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    sparsifier = sparse.create("gmp", model, target=0.5, total_steps=20, include=(name for name in ["1"]))
    assert [layer.name for layer in sparsifier.layers()] == ["1"]
