"""What a newcomer does wrong is told, with what to do; what once went wrong silently goes right."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import sparse
from rarefy.kernels import sparse_layers
from rarefy.sparse import GMP, AutoSparse, Static
from tests.sparse.methods import EVERY, assert_equal, create, network


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 8))


def gmp(model):
    return GMP(model, target=0.5, total_steps=20)


def attached(model):
    return gmp(model).attach(torch.optim.SGD(model.parameters(), lr=0.1))


def task():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 20, generator=generator)
    return x, (x @ torch.randn(20, 5, generator=generator)).argmax(1)


def train(model, sparsifier, steps, lr=5e-3):
    """The accuracy on the task after so many steps."""
    x, y = task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    sparsifier.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return accuracy(model)


def accuracy(model):
    x, y = task()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


OPTIONS = {
    "sparsity": ({"sparsity": 0.9}, r"unknown option of \w+: 'sparsity'.*\(did you mean 'target'\?\)"),
    "steps": ({"target": 0.9, "steps": 20}, r"'steps'.*'total_steps'"),
    "a slip": ({"targt": 0.9}, "'targt'; did you mean 'target'"),
    "per cent": ({"target": 90}, r"target must be in \(0, 1\), got 90; for 90 % write 0.9"),
    "text": ({"target": "0.9"}, r"target must be a number in \(0, 1\), got the text '0.9'"),
    "one for each layer": ({"target": {"0": 0.5}}, "target must be one number.*sparsities by layer: distribution"),
    "two targets": ({"target": 0.5, "target_flops": 0.5}, "one of target .*, not both target and target_flops"),
    "a module": ({"target": 0.5, "include": [nn.Linear(2, 2)]}, "include must be a list of names or shell patterns"),
    "a string": ({"target": 0.5, "exclude": "0"}, r"exclude must be a list of patterns.*write \['0'\]"),
    "no such layer": ({"target": 0.5, "exclude": ["3"]}, "unknown layer in exclude: '3'"),
    "floor": ({"target": 0.5, "floor": "0.1"}, "floor must be a number in .*got the text '0.1'"),
    "floor of a layer": ({"target": 0.5, "floor": {"*": 2}}, "floor must be a density in"),
    "total_steps": ({"target": 0.5, "total_steps": 20.0}, "total_steps must be a positive whole number.*got 20.0"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method", ["autosparse", "gmp", "rigl", "dst"])
def test_options(method, name):
    options, message = OPTIONS[name]
    kind = type(sparse.create(method, mlp(), target=0.5, total_steps=20))
    for make in (kind, lambda model, **options: sparse.create(method, model, **options)):
        model = mlp()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            make(model, **{"total_steps": 20, **options})
        assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("method", sparse.names())
def test_too_few_steps_are_told_alike(method):
    options = {} if method == "nm" else {"target": 0.8}
    if "update_every" in sparse.options(method):
        options["update_every"] = 5
    least = sparse.create(method, mlp(), total_steps=20, **options).least_steps
    if least > 1:
        with pytest.raises(ValueError, match=f"^total_steps=1 is too few for the schedule of .*needs at least {least}"):
            sparse.create(method, mlp(), total_steps=1, **options)
    with pytest.raises(ValueError, match="^total_steps must be a positive whole number of optimizer steps, got None"):
        sparse.create(method, mlp(), total_steps=None, **options)


def test_a_model_that_is_none():
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, got list"):
        gmp([1])
    with pytest.raises(ValueError, match="nothing to sparsify: the model has 0"):
        gmp(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (torch.optim.swa_utils.AveragedModel, "has no parameter '0.weight'; give what it wraps, its .module"),
        (lambda model: nn.Sequential(copy.deepcopy(model)), "has no parameter '0.weight'; give a copy of the trained"),
        (lambda model: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 9)), r"'2.weight'.*shape \(9, 64\)"),
        (lambda model: copy.deepcopy(model).state_dict(), "model must be a torch.nn.Module, got OrderedDict"),
    ],
)
def test_what_finalize_is_given(wrap, hint):
    model = mlp()
    sparsifier = attached(model)
    other = wrap(model)
    before = copy.deepcopy(other.state_dict() if isinstance(other, nn.Module) else other)
    with pytest.raises(ValueError, match=hint):
        sparsifier.finalize(other)
    assert_equal(other.state_dict() if isinstance(other, nn.Module) else other, before)


def test_wrappers_of_the_model_itself_are_looked_through():
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        model = mlp()
        sparsifier = attached(wrap(model))
        assert sparsifier.model is model
        with pytest.warns(UserWarning, match="goes from a density of 1.0000 to 0.5000"):
            sparsifier.finalize(wrap(model))
        assert sparsifier.finalized


@pytest.mark.parametrize(
    "state", ["of the model", "of the optimizer", "nothing", "of another method", "of other options"]
)
def test_what_load_state_dict_is_given(state):
    model = mlp()
    sparsifier = attached(model)
    given, message = {
        "of the model": (model.state_dict(), r"what a sparsifier's state_dict\(\) gave.*got \['0.weight'"),
        "of the optimizer": (
            torch.optim.SGD(model.parameters(), lr=1).state_dict(),
            r"got \['state', 'param_groups'\]",
        ),
        "nothing": (None, "got NoneType"),
        "of another method": (create("rigl", network(), 20).state_dict(), "has method='RigL', this one 'GMP'"),
        "of other options": (
            GMP(mlp(), target=0.6, total_steps=20).state_dict(),
            r"has target=0.6, this one 0.5",
        ),
    }[state]
    before = sparsifier.state_dict()
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict(given)
    assert_equal(sparsifier.state_dict(), before)


def test_a_checkpoint_that_lacks_something_is_refused():
    sparsifier = create("topk", network(), 20)
    state = sparsifier.state_dict()
    del state["layers"]["3"]["mask"]
    with pytest.raises(ValueError, match="the checkpoint has no 'mask' of layer '3'"):
        sparsifier.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"include": ["*"]}, {"exclude": ["0"]}, {"include": ["2"]}])
def test_lazy_layers_are_told_of(options):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ValueError, match="layer '2' is lazy and has no weight yet; call the model once on an example"):
        GMP(model, target=0.5, total_steps=20, **options)
    model(torch.zeros(1, 1, 8, 8))
    assert "2" in [layer.name for layer in GMP(model, target=0.5, total_steps=20, **options).layers()]


@pytest.mark.filterwarnings("ignore:finalize.. after 0 of")
@pytest.mark.parametrize("case", EVERY)
def test_sparsity_after_finalize_is_that_of_the_weights(case):
    model = network()
    sparsifier = create(case, model)
    sparsifier.finalize()
    weights = [model.get_submodule(layer.name).weight for layer in sparsifier.layers()]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert sparsifier.sparsity() == pytest.approx(zeros)
    assert [layer.live for layer in sparsifier.layers()] == [int((weight != 0).sum()) for weight in weights]
    if sparsifier.budget is not None and sparsifier.budget.kind == "sparsity":
        assert zeros == pytest.approx(1 - sparsifier.budget.goal, abs=1e-3)
    with torch.no_grad():
        weights[0].zero_()
    assert sparsifier.layers()[0].live == 0


class Cosine(nn.Module):
    """A head whose weight is read past its forward."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(20, 64), nn.Linear(64, 5, bias=False)

    def forward(self, x):
        return 10 * F.linear(F.normalize(torch.relu(self.body(x))), F.normalize(self.head.weight))


def patched():
    """Layers whose forward is set on the instance, as hooks of accelerate are."""
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    for layer in (model[0], model[2]):
        given = layer.forward
        layer.forward = types.MethodType(lambda self, x, given=given: given(x), layer)
    return model


@pytest.mark.parametrize("make", [Cosine, patched])
@pytest.mark.parametrize("method", ["autosparse", "rigl", "dst", "topk"])
def test_however_a_weight_is_read_it_is_the_sparse_one(make, method):
    torch.manual_seed(0)
    model = make()
    sparsifier = sparse.create(method, model, target=0.8, total_steps=150)
    before = train(model, sparsifier, 150)
    assert before > 0.6
    sparsifier.finalize()
    assert accuracy(model) == before


@pytest.mark.parametrize("method", [*sparse.list_methods()])
def test_layers_that_start_at_zero_learn_or_are_told_of(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 8))
    nn.init.zeros_(model[2].weight)
    options = {} if method == "nm" else {"target": 0.6}
    if method == "powerprop":
        with pytest.raises(ValueError, match=r"weights of layer '2' are all 0.*exclude=\['2'\]"):
            sparse.create(method, model, total_steps=150, **options)
        return
    sparsifier = sparse.create(method, model, total_steps=150, **options)
    train(model, sparsifier, 150)
    sparsifier.finalize()
    assert (model[2].weight.abs() > 1e-30).sum() > 20
    assert accuracy(model) > 0.5


def test_the_zeros_of_a_sparse_model_hold():
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    zeros = {}
    with torch.no_grad():
        for name in ("0", "2"):
            weight = model.get_submodule(name).weight
            weight[weight.abs() < weight.abs().quantile(0.6)] = 0.0
            zeros[name] = weight == 0
    for make in (
        lambda model: Static(model, masks="nonzero", total_steps=40),
        lambda model: Static(model, target=0.6, total_steps=40),
        lambda model: GMP(model, target=0.6, total_steps=40),
        lambda model: GMP(model, target=0.9, total_steps=40),
    ):
        other = copy.deepcopy(model)
        sparsifier = make(other)
        train(other, sparsifier, 20, lr=1e-3)
        for name, known in zeros.items():
            assert not other.get_submodule(name).weight[known].any()


def test_an_embedding_of_sparse_gradients_is_told_of():
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AutoSparse(model, target=0.5, total_steps=20, include=["*", "0"]).attach(optimizer)
    model(torch.arange(4)).sum().backward()
    with pytest.raises(
        ValueError, match="gradient of layer '0' is a sparse tensor; make the embedding with sparse=False"
    ):
        optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", sparse.list_methods())
def test_a_weight_that_is_not_finite_is_told_before_anything_is_touched(method, value):
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = value
    before = copy.deepcopy(model.state_dict())
    target = {"target": 0.9} if "target" in sparse.options(method) else {}
    sparsifier = sparse.create(method, model, total_steps=20, **target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layers, '0' first, are not finite.*before attach\(\).*exclude=\['0'\]"):
        sparsifier.attach(optimizer)
    assert all(torch.equal(now.nan_to_num(), before[name].nan_to_num()) for name, now in model.state_dict().items())
    with torch.no_grad():
        model[0].weight[0, 0] = 0.5
    sparsifier.attach(optimizer)


class OwnRate(torch.optim.SGD):
    """Makes its learning rate itself, as the Adafactor of transformers does unless told otherwise."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["lr"] = None


@pytest.mark.parametrize("method", ["autosparse", "str", "dst", "ltp", "cs", "optg"])
def test_an_optimizer_that_makes_its_learning_rate_is_refused_for_what_is_learned(method):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"OwnRate gives no learning rate.*relative_step=False.*not learned \(gmp"):
        sparse.create(method, model, target=0.5, total_steps=20).attach(OwnRate(model.parameters()))
    assert_equal(model.state_dict(), before)
    attached_to = gmp(model).attach(OwnRate(model.parameters()))
    assert attached_to.sparsity() < 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": ["head[0]"]},
        {"include": ["body", "head[[]0]"]},
        {"include": ["head[0]", "body"]},
        {"floor": {"head[0]": 0.25}},
        {"distribution": {"head[0]": 0.25}},
    ],
    ids=str,
)
def test_a_name_with_brackets_names_its_layer(options):
    model = nn.ModuleDict({"head[0]": nn.Linear(8, 8), "body": nn.Linear(8, 8)})
    sparsifier = GMP(model, target=0.5, total_steps=20, **options)
    names = [layer.name for layer in sparsifier.layers()]
    assert names == ["body"] if "exclude" in options else names == ["head[0]", "body"]
    if "floor" in options:
        assert sparsifier._layers[0].least == 16
    if "distribution" in options:
        assert sparsifier.live_counts(0.5)[0] == 48


def test_layers_that_nobody_asks_for_do_not_matter():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 4))
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), normed)
    for options in ({"include": ["0"]}, {"include": ["0"], "exclude": ["2"]}):
        sparsifier = GMP(model, target=0.5, total_steps=20, **options)
        assert [layer.name for layer in sparsifier.layers()] == ["0"]
    for options in ({}, {"include": ["*"]}, {"include": ["0", "2"]}):
        with pytest.raises(ValueError, match="the weight of layer '2' is not a parameter"):
            GMP(model, target=0.5, total_steps=20, **options)


def test_a_convolution_of_the_name_of_transformers_linear_layer():
    class Conv1D(nn.Conv1d):
        """A user's own."""

    model = nn.Sequential(Conv1D(8, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3))
    assert len(sparse.create("nm", model, total_steps=20).layers()) == 2


@pytest.mark.filterwarnings("ignore:weights were changed outside")  # by the rounding
@pytest.mark.parametrize("case", EVERY)
def test_a_state_for_a_model_that_was_cast_since_says_what_to_do(case):
    model = network()
    sparsifier = create(case, model).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    saved = sparsifier.state_dict()
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"bfloat16 .* now, and was torch.float32.*call attach\(optimizer\) again"):
        sparsifier.load_state_dict(saved)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.load_state_dict(saved)


class DPOptimizer(torch.optim.Optimizer):
    """As Opacus's: makes the gradients in its own step, and has the optimizer inside take them."""

    def __init__(self, optimizer):
        self.original_optimizer = optimizer

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = parameter.grad_sample
        self.original_optimizer.step()


DPOptimizer.__module__ = "opacus.optimizers.optimizer"


@pytest.mark.parametrize("method", ["autosparse", "gmp", "cs"])
def test_gradients_that_are_made_inside_the_step_are_seen(method):
    ends = []
    for private in (False, True):
        model, (x, y) = mlp(), task()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = sparse.create(method, model, target=0.5, total_steps=20)
        outer = DPOptimizer(optimizer) if private else optimizer
        sparsifier.attach(outer)
        for _ in range(20):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if private:
                for parameter in model.parameters():
                    parameter.grad_sample, parameter.grad = parameter.grad, None
            outer.step()
        ends.append(sparsifier.finalize().state_dict())
    assert_equal(*ends)


@pytest.fixture
def _swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.filterwarnings("ignore:weights were changed outside")
@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("case", EVERY)
def test_parameters_that_pytorch_swaps(case):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = create(case, model, 20).attach(optimizer)
    acceleration = sparse.accelerate(sparsifier) if sparse_layers.lanes() else None
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 2, 8, 8, generator=generator)), torch.arange(8) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.double()
    model.float()
    if acceleration is not None:
        acceleration.restore()
    sparsifier.attach(optimizer)
    assert sparsifier.steps == 3
