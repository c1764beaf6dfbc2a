"""From models to plans: what is recognised, what stays an operator, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from rarefy import act, engine
from rarefy.engine import plan as steps
from rarefy.engine import reference
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.tracing import CaptureError


def captured(model, *inputs):
    """The optimized plan; the plan and the optimized one compute what the model does, for another batch, too."""
    model.eval()
    plan = capture(model, inputs)
    better = optimize(plan)
    again = [x if plan.batch else torch.cat([x, x, x.flip(0)]) for x in inputs]
    with torch.no_grad():
        expected = model(*again)
        for each in (plan, better):
            results = reference.run(each, again)
            wanted = [expected] if each.single else list(expected)
            for result, right in zip(results, wanted, strict=True):
                torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-5)
    return better


def kinds(plan):
    return [step.kind for step in plan.steps]


def f(function, *modules):
    """A model whose forward is that function of the modules and the input."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.ModuleList(modules)

        def forward(self, *inputs):
            return function(*self.m, *inputs)

    return Model()


IMAGE = torch.randn(1, 4, 8, 8)


def noisy(norm):
    """A normalisation that has seen something."""
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2.0)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -2, 2)
    return norm


def test_convolution_normalisation_residual_and_activation_become_one_step():
    model = f(
        lambda c, d, b, x: F.relu(b(c(x)) + d(x)),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 1),
        noisy(nn.BatchNorm2d(6)),
    )
    plan = captured(model, IMAGE)
    assert kinds(plan) == ["conv", "conv"]
    first, second = plan.steps
    # of the two operands, the later one takes the sum
    assert (first.name, first.activation, second.name, second.activation) == ("m.0", "none", "m.1", "relu")
    assert second.residual == first.output


#: Modules on images, and the steps that they become.
MODULES = [
    ([noisy(nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 1)], ["affine", "conv"]),
    ([nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU6()], ["conv"]),
    ([nn.Conv2d(4, 4, 4, padding="same")], ["conv"]),
    ([nn.Conv2d(4, 8, 3, groups=4), nn.Hardswish()], ["depthwise"]),
    ([nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")], ["join", "join", "conv"]),
    ([nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)], ["pool", "pool"]),
    ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], ["global average", "flatten"]),
    ([nn.Flatten(), nn.Dropout(), nn.Linear(256, 3)], ["flatten", "linear"]),
    ([nn.Upsample(scale_factor=2), nn.LeakyReLU()], ["upsample", "activation"]),
    ([nn.Upsample(size=7)], ["resize"]),
    ([nn.LeakyReLU(0.2)], ["leaky"]),
    ([nn.LayerNorm(8), nn.Linear(8, 4), nn.Softmax(-1)], ["layer norm", "linear", "softmax"]),
]

#: Functions of images, and the steps that they become.
FUNCTIONS = [
    (lambda x: torch.cat([x, x * 2], 1), ["affine", "concat"]),
    (lambda x: torch.cat([x, x], 2), ["join"]),
    (lambda x: x * torch.sigmoid(x), ["activation", "mul"]),
    (lambda x: x * x.mean((2, 3), keepdim=True), ["global average", "mul"]),
    (lambda x: x.mean(1), ["mean"]),
    (lambda x: F.relu(x + x.flip(1)), ["view", "add"]),
    (lambda x: 3 - x, ["sub"]),
    (lambda x: (x - 1.5) / 2, ["affine"]),
    (lambda x: x + torch.arange(4.0).reshape(4, 1, 1), ["affine"]),
    (lambda x: x * torch.arange(8.0), ["affine"]),
    (lambda x: x.clamp(min=0) + x.clamp(0, 6), ["activation", "activation", "add"]),
    (lambda x: x.clamp(0, 5), ["pointwise"]),
    (lambda x: x + x[:, :1], ["view", "add"]),
    (lambda x: x.transpose(2, 3).contiguous().view(x.shape[0], -1), ["view", "flatten"]),
    (lambda x: F.max_pool2d(x, 3, ceil_mode=True), ["pool"]),
    (lambda x: F.avg_pool2d(x, 2, divisor_override=3), ["avg_pool2d"]),
    (lambda x: x.double().relu().float(), ["_to_copy", "relu", "_to_copy"]),
]


def test_modules():
    chains = [nn.Sequential(*modules) for modules, _ in MODULES]
    plan = captured(f(lambda *given: tuple(chain(given[-1]) for chain in given[:-1]), *chains), IMAGE)
    assert kinds(plan) == [kind for _, expected in MODULES for kind in expected]


def test_functions():
    plan = captured(f(lambda x: tuple(function(x) for function, _ in FUNCTIONS)), IMAGE)
    sizes = ["sym_size"]  # for the view
    assert [kind for kind in kinds(plan) if kind not in sizes] == [kind for _, each in FUNCTIONS for kind in each]


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Sequential(nn.Conv1d(4, 4, 3), noisy(nn.BatchNorm1d(4)), nn.SiLU()), (2, 4, 9), ["conv"]),
        (nn.Sequential(nn.Linear(4, 5), noisy(nn.BatchNorm1d(5)), nn.GELU()), (2, 4), ["linear"]),
        (nn.Sequential(nn.Linear(4, 5), noisy(nn.BatchNorm1d(3))), (2, 3, 4), ["linear", "affine"]),
        (nn.Sequential(nn.Conv3d(2, 2, 1)), (1, 2, 3, 3, 3), ["conv"]),
    ],
)
def test_modules_on_other_shapes(model, shape, expected):
    assert kinds(captured(model, torch.randn(shape))) == expected


def test_in_place_operations_and_what_is_read_twice():
    def forward(conv, x):
        y = conv(x)
        y += 1
        z = F.relu(y)
        y.relu_()
        return y + z, x

    plan = captured(f(forward, nn.Conv2d(4, 4, 1)), IMAGE)
    assert len(plan.outputs) == 2
    assert not plan.single


def test_one_convolution_called_twice_and_a_residual_of_a_broadcast_shape():
    plan = captured(f(lambda c, x: c(c(x)), nn.Conv2d(4, 4, 1)), IMAGE)
    assert [step.name for step in plan.steps] == ["m.0", "m.0"]
    plan = captured(f(lambda c, x: c(x) + x.mean((2, 3), keepdim=True), nn.Conv2d(4, 4, 1)), IMAGE)
    assert sorted(kinds(plan)) == ["add", "conv", "global average"]


def test_attention_keeps_its_linear_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plan = captured(layer, torch.randn(2, 5, 8))
    linear = [step for step in plan.steps if isinstance(step, steps.Linear)]
    assert [step.name for step in linear] == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert linear[2].activation == "relu"
    assert linear[3].residual is not None


def test_activations_of_this_library_keep_their_mode_and_their_bits():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.GELU()).eval()
    act.swap(model, mode="ktanh")
    plan = optimize(capture(model, (IMAGE,)))
    assert [step.activation for step in plan.steps] == ["tanh ktanh", "gelu ktanh"]
    with torch.no_grad():
        assert torch.equal(reference.run(plan, (IMAGE,))[0], model(IMAGE))


def test_weights_that_are_computed_are_computed_once():
    model = parametrizations.weight_norm(nn.Linear(4, 5)).eval()
    plan = captured(model, torch.randn(2, 4))
    assert kinds(plan) == ["linear"]


def test_several_inputs():
    plan = captured(f(lambda fc, a, b: (fc(a) * b, a), nn.Linear(4, 5)), torch.randn(2, 4), torch.randn(2, 5))
    assert plan.inputs == ("inputs_0", "inputs_1")


def test_one_tensor_as_several_inputs():
    x, other = torch.randn(3, 6, 8), torch.randn(2, 6, 8)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    compiled = engine.compile(model, (x, x, x), 1, choose="native")
    for given in ((x, x, x), (other, other, other.flip(1))):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given)[0], model(*given)[0], rtol=1e-5, atol=1e-5)


def test_a_model_of_one_batch_size_says_why():
    plan = captured(f(lambda fc, x: fc(x.reshape(2, -1)), nn.Linear(8, 4)), torch.randn(2, 2, 4))
    assert plan.batch == 2
    assert "batch" in plan.fixed_because
    compiled = engine.compile(f(lambda fc, x: fc(x.reshape(2, -1)), nn.Linear(8, 4)).eval(), torch.randn(2, 2, 4))
    with pytest.raises(
        ValueError, match=r"\(batch of 2, 2, 4\), got \(3, 2, 4\): the model takes one batch size alone"
    ):
        compiled(torch.randn(3, 2, 4))


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


@torch.library.custom_op("rarefy_tests::no_fake", mutates_args=())
def no_fake(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branch(), r"Branch cannot be traced: the operator aten.item .*test_capture.py:\d+: if x.sum\(\) > 0:"),
        (Counter(), r"the model changes 'calls' in its forward; an engine keeps no state"),
        (f(lambda x: {"a": x}), "the model gives back something else than a tensor or a tuple of tensors"),
        (f(no_fake), r"the operator rarefy_tests::no_fake .*test_capture.py:\d+"),
    ],
)
def test_what_cannot_be_traced_is_told_with_its_place(model, message):
    with pytest.raises(CaptureError, match=message):
        capture(model.eval(), (IMAGE,))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Conv2d(3, 4, 3), (2, 4, 8, 8), "Conv2d .*: layer 'convolution' takes 3 channels, and is given 4"),
        (
            nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(4, 2, 1)),
            (1, 3, 9),
            "layer '1' takes 4 channels, and is given 8",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (2, 3, 3, 2), "layer '1' takes 12 features, and is given 18"),
    ],
)
def test_a_layer_that_takes_another_width_is_named(model, shape, message):
    with pytest.raises(CaptureError, match=message):
        capture(model.eval(), (torch.zeros(shape),))


def test_inputs_without_axes_and_outputs_that_nothing_computes():
    model = f(lambda a, x: (x * a, a, torch.ones(2)))
    compiled = engine.compile(model.eval(), (torch.tensor(2.0), torch.ones(3, 2)))
    product, same, ones = compiled(torch.tensor(5.0), torch.ones(3, 2))
    assert torch.equal(product, torch.full((3, 2), 5.0))
    assert same == 5
    assert torch.equal(ones, torch.ones(2))
    assert compiled.profile(rounds=1).batch == 1


class Overwriting(nn.Module):
    """Activations in place, of values that something else reads, or has read, or that are another's memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        a = F.hardswish(self.norm(self.conv(x)), inplace=True)
        b = self.conv(a)
        c = F.leaky_relu(b, 0.1, inplace=True)
        d = self.conv(c)
        e = d.flatten(2)
        F.hardtanh(d, -0.1, 0.2, inplace=True)
        return b + c, e, F.elu(self.norm(d), 0.5, inplace=True), F.gelu(self.conv(d), approximate="tanh")


def test_activations_in_place_are_as_the_model_has_them():
    torch.manual_seed(0)
    model, x = Overwriting().eval(), torch.randn(2, 4, 6, 6)
    plan = capture(model, (x,))
    assert not any(step.kind.endswith("_") for step in plan.steps)
    with torch.no_grad():
        for got, expected in zip(reference.run(plan, (x,)), model(x), strict=True):
            torch.testing.assert_close(got, expected)
