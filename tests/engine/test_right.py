"""An engine is right for all that it takes, and says what it does not take."""

import random
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import act, engine
from rarefy.engine import binding, compiler, verify
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Conv
from tests.engine.layers import lowered
from tests.engine.test_capture import f

pytestmark = pytest.mark.slow

IMAGE = torch.randn(2, 3, 8, 8)


def agrees(model, compiled, *inputs):
    """Assert that the engine gives what the model does."""
    got = compiled(*inputs)
    with torch.no_grad():
        expected = model(*(x.clone() for x in inputs))
    if isinstance(expected, torch.Tensor):
        got, expected = (got,), (expected,)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def deviation(conv, x):
    y = conv(x)
    return y - y.mean(0) if x.shape[0] > 1 else y


@pytest.mark.slow
@pytest.mark.parametrize(
    "forward",
    [
        deviation,
        lambda conv, x: conv(x) * 2 if x.shape[0] == 1 else conv(x),
        lambda conv, x: conv(x).squeeze(0).flatten(-2),
        lambda conv, x: conv(x).mean((2, 3)).squeeze(),
        lambda conv, x: torch.stack([conv(each[None])[0] for each in x]),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_one_is_what_the_model_makes_of_it(forward, batch):
    model = f(forward, nn.Conv2d(3, 4, 3)).eval()
    compiled = engine.compile(model, torch.randn(batch, 3, 8, 8), choose="native")
    for samples in (1, 2, 3, 4):
        x = torch.randn(samples, 3, 8, 8)
        if compiled.batch in (None, samples):
            agrees(model, compiled, x)
        else:
            with pytest.raises(ValueError, match="the model takes one batch size alone"):
                compiled(x)


STRIDED = [
    lambda conv, x: torch.view_as_complex(conv(x).permute(0, 2, 3, 1)[..., :2].contiguous()).abs(),
    lambda conv, x: conv(x).permute(0, 2, 3, 1).contiguous().view(torch.float64).float(),
    lambda conv, x: conv(x).permute(0, 2, 3, 1).contiguous().as_strided((2, 50), (128, 1)),
    lambda conv, x: conv(x).permute(0, 2, 3, 1).as_strided((2, 50), (128, 1)),
    lambda conv, x: conv(x).flatten(1).clone().as_strided((x.shape[0], 7, 20), (256, 10, 1)),
]


def test_what_depends_on_strides_gets_those_of_the_model():
    model = f(lambda conv, x: tuple(each(conv, x) for each in STRIDED), nn.Conv2d(3, 4, 3, padding=1)).eval()
    for choose in ("native", "torch"):
        agrees(model, engine.compile(model, IMAGE, choose=choose), IMAGE)


def test_reading_beyond_an_operand_is_refused():
    model = f(lambda conv, x: conv(x)[1:].as_strided((2, 8), (1, 16)), nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(engine.CaptureError, match=r"as_strided.* give it a contiguous tensor"):
        engine.compile(model, IMAGE)


@pytest.mark.parametrize("axes", [1, 2])
def test_nearest_upsampling_takes_the_pixels_of_pytorch(axes):
    scales = [{"scale_factor": scale} for scale in (2, 2.05, 2.1, 3.3, 49)]
    scales += [{"size": 20}, {"scale_factor": 2.1, "recompute_scale_factor": True}]
    scales += [{"scale_factor": (2, 3.2)}, {"size": (20, 30)}] if axes == 2 else []
    conv = (nn.Conv1d, nn.Conv2d)[axes - 1](2, 3, 1)
    model = f(lambda conv, x: tuple(F.interpolate(conv(x), **scale) for scale in scales), conv).eval()
    x = torch.randn(2, 2, *(10,) * axes)
    agrees(model, engine.compile(model, x, choose="native"), x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda a, b, x: (a(x[:, :9].reshape(-1, 16)), b(x[:, 9:].reshape(-1, 16))),
        lambda a, b, x: (a(x[:, :3].reshape(-1, 16)), b(x[:, 3:].reshape(-1, 16)).relu()),
        lambda a, b, x: (a(x.transpose(0, 1)), b(x.flatten(0, 1))),
        lambda a, b, x: F.scaled_dot_product_attention(a(x[:, :4]), b(x[:, 4:]), b(x[:, 4:])),
        lambda a, b, x: a(x.reshape(-1, 16)) + b(x[:, :1].expand(-1, 13, -1).reshape(-1, 16)),
    ],
)
def test_linear_layers_on_other_numbers_of_rows(forward):
    model = f(forward, nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    compiled = engine.compile(model, torch.randn(2, 13, 16), choose="native")
    for batch in (1, 2, 5):
        agrees(model, compiled, torch.randn(batch, 13, 16))


@pytest.mark.skipif(not binding.available(), reason="needs native programs")
def test_a_program_refuses_inputs_of_other_rows():
    model = f(lambda a, b, x, y: (a(x), b(y)), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    inputs = (torch.zeros(3, 4), torch.zeros(3, 4))
    (segment,) = lowered(optimize(capture(model, inputs)), *inputs).items
    with pytest.raises(ValueError, match="must have the same axes before the last 1"):
        segment.run(1, torch.zeros(3, 4), torch.zeros(2, 4))


@pytest.mark.parametrize("choose", ["native", "torch"])
def test_an_engine_owns_its_weights_and_its_outputs_are_apart(choose):
    weight = nn.Parameter(torch.randn(4))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.weight = nn.Linear(4, 4), weight
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x):
            y = self.fc(x)
            z = self.norm(y)
            return y, y.clone(), y.T, y[:1], z, z.T, self.weight, self.weight[None], x, x.view(-1), self.fc.weight.t()

    model, x = Net().eval(), torch.randn(3, 4)
    compiled = engine.compile(model, x, choose=choose)
    given, first = x.clone(), [y.clone() for y in compiled(x)]
    for index in range(len(first)):
        outputs = compiled(x)
        outputs[index].add_(1)
        assert torch.equal(x, given)
        assert all(torch.equal(y, z) for i, (y, z) in enumerate(zip(outputs, first, strict=True)) if i != index)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert all(torch.equal(y, z) for y, z in zip(compiled(x), first, strict=True))


def test_a_constant_that_two_steps_read_is_kept_once():
    model = f(lambda table, x: table.weight[x] + table.weight[x + 1], nn.Embedding(9, 4)).eval()
    compiled = engine.compile(model, torch.randint(0, 8, (2, 5)), choose="torch")
    assert sum(each.numel() for each in compiled._constants.values()) == 36


def beside_a_jump():
    """The last number before K-TanH's widest jump above 1/2."""
    x = torch.arange(0x3F00, 0x4000, dtype=torch.int16).view(torch.bfloat16).float()
    before = x.nextafter(torch.zeros(()))
    y = act.tanh(torch.stack([before, x]), mode="ktanh").diff(dim=0)[0].abs()
    assert y.max() > 2**-8
    return before[y.argmax()].item()


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (lambda x: act.tanh(x, mode="ktanh"), beside_a_jump()),
        (torch.round, 0.49999997),
        (lambda x: (x > 0.75) * x, 0.75),
        (lambda x: x.argmax(1), 4.0),
    ],
)
@pytest.mark.parametrize("choose", ["native", "torch"])
def test_what_rounding_takes_over_a_jump_is_no_error(monkeypatch, function, number, choose):
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8).eval().requires_grad_(False), torch.randn(16, 8)
    model.weight.copy_(torch.eye(8)), model.bias.zero_()
    x[0, :2] = number
    parts, build, factor = f(lambda fc, x: function(fc(x)), model).eval(), compiler.build, 1 + 2**-21

    def other(plan, *arguments):
        first, *rest = plan.steps
        weight = first.weight.clone()
        weight[1] *= factor
        return build(replace(plan, steps=(replace(first, weight=weight), *rest)), *arguments)

    monkeypatch.setattr(compiler, "build", other)
    compiled = engine.compile(parts, x, choose=choose)
    assert not torch.equal(compiled(x), parts(x))
    assert (compiled(x) - parts(x)).abs().max() > 2**-8
    factor = 2.0
    if parts(x).is_floating_point():
        with pytest.raises(engine.EngineError, match="does not compute what the model does"):
            engine.compile(parts, x, choose=choose)


def test_a_wrong_engine_names_the_step(monkeypatch):
    def wrong(plan, *arguments):
        *before, last = plan.steps
        assert isinstance(last, Conv)
        return build(replace(plan, steps=(*before, replace(last, weight=last.weight * 1.01))), *arguments)

    build = compiler.build
    monkeypatch.setattr(compiler, "build", wrong)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 3)).eval()
    for choose in ("native", "torch"):
        with pytest.raises(engine.EngineError, match=r"The first step that differs is '2'"):
            engine.compile(model, IMAGE, choose=choose)


def test_a_large_batch_is_compared_by_the_engine(monkeypatch):
    compared = []

    def differs(plan, model, tried):
        compared.append(len(tried.inputs[0]))
        return plan_differs(plan, model, tried)

    plan_differs = verify.plan_differs
    monkeypatch.setattr(verify, "plan_differs", differs)
    model = f(lambda a, x: a(x), nn.Conv2d(3, 4, 3)).eval()
    engine.compile(model, IMAGE[:1].repeat(5, 1, 1, 1), choose="native")
    assert compared == [2, 1]
    # what is traced is another model at a batch of 5, and at no smaller one
    model = f(lambda a, x: a(x) if torch.compiler.is_exporting() or len(x) < 5 else 2 * a(x), nn.Conv2d(3, 4, 3)).eval()
    compared.clear()
    with pytest.raises(engine.CaptureError, match="something else when it is traced"):
        engine.compile(model, IMAGE[:1].repeat(5, 1, 1, 1), choose="native")
    assert compared == [2, 1, 5, 5]
    assert engine.compile(model, IMAGE[:1].repeat(4, 1, 1, 1), choose="native").batch is None


def test_rounding_that_a_network_magnifies_is_no_error():
    # a difference of nearly equal numbers, a thousand times as large
    model = f(lambda a, x: (a(x) + 1e4 - 1e4) * 1e3, nn.Conv2d(3, 4, 3)).eval()
    engine.compile(model, IMAGE, choose="native")
    model = f(lambda a, x: F.dropout(a(x)), nn.Conv2d(3, 4, 3)).eval()  # as random as the model
    state = torch.get_rng_state()
    engine.compile(model, IMAGE, choose="native")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(0)  # no two channels alike, no sum near 0, where its logarithm is steep
    image = torch.randn(IMAGE.shape)
    model = f(lambda a, x: (a(x).log(), a(x).argmax(1), a(x).bfloat16()), nn.Conv2d(3, 4, 3)).eval()
    log, index, rounded = engine.compile(model, image, choose="native")(image)
    with torch.no_grad():
        expected = model(image)
    assert torch.equal(index, expected[1])
    # Where a sum lies between two numbers of bfloat16 either is right.
    torch.testing.assert_close(rounded, expected[2], rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(log, expected[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    engine.compile(model, IMAGE, choose="native", precision="bfloat16")


def test_distances():
    nan, inf = float("nan"), float("inf")
    for a, b, expected in (
        ([1.0, nan], [1.0, nan], 0),
        ([1.0, nan], [nan, 1.0], inf),
        ([inf, 3.0], [inf, 4.0], 0.25),
        ([inf], [-inf], inf),
        ([0.0], [0.0], 0),
    ):
        assert verify._distance(torch.tensor(a), torch.tensor(b)) == expected


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda fc, x: fc(x.add_(1)), "changes its input 'argument_0' in place"),
        (lambda fc, x: fc(x) if x.sum() > 0 else x, "aten.item has no fixed graph"),
    ],
)
def test_what_a_model_does_that_an_engine_does_not(forward, message, capfd):
    with pytest.raises(engine.CaptureError, match=message):
        engine.compile(f(forward, nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    assert "def forward" not in capfd.readouterr().err  # the graphs that torch.export prints


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.Sequential(nn.Conv1d(4, 4, 1))])
def test_an_example_of_another_dtype(module):
    with pytest.raises(engine.CaptureError, match=r"an input is torch.float16 and the weights are torch.float32"):
        engine.compile(module.eval(), torch.randn(2, 4, 4).half())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_tensors_without_plain_memory():
    layer, x = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    compiled = engine.compile(layer, x, choose="native")
    with pytest.raises(ValueError, match=r"input 'input\w*': .*torch.sparse_coo: call it with to_dense\(\)"):
        compiled(x.to_sparse())
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x, x[:2]], layout=layout)
        for call in (compiled, lambda given: engine.compile(layer, given)):
            with pytest.raises(ValueError, match=r"got a nested one: pad it with torch.nested.to_padded_tensor\(\)"):
                call(nested)
    with pytest.raises(ValueError, match="inside a transform of torch.func"):
        torch.func.vmap(compiled)(torch.randn(2, 3, 4))
    numbers = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    agrees(layer, compiled, numbers)
    agrees(layer, compiled, x[:1].expand(3, 4))
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    with pytest.raises(ValueError, match=r"'weight' of the model: .*call it with to_dense\(\)"):
        engine.compile(layer, x)


def test_threads_compile_one_after_the_other():
    wrong = []

    def work():
        try:
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
            agrees(model, engine.compile(model, IMAGE, choose="native"), IMAGE)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


#: Operators on (B, 4, 6, 6) that keep the shape; y is another value of it.
OPERATORS = [
    lambda layer, x, y: layer(x),
    lambda layer, x, y: x + y,
    lambda layer, x, y: x * y.sigmoid(),
    lambda layer, x, y: F.relu(x),
    lambda layer, x, y: x.transpose(2, 3),
    lambda layer, x, y: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    lambda layer, x, y: torch.cat(x.chunk(2, 1)[::-1], 1),
    lambda layer, x, y: torch.cat([x[:, :1], y[:, 1:]], 1),
    lambda layer, x, y: x.flatten(1).view(x.shape),
    lambda layer, x, y: x.mean((2, 3), keepdim=True).expand_as(y) + y,
    lambda layer, x, y: x[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3),
    lambda layer, x, y: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
    lambda layer, x, y: F.linear(x, layer.weight[:, :, 0, 0].repeat(2, 2)[:6, :6]),
    lambda layer, x, y: x[:, [3, 1, 0, 2]],
    lambda layer, x, y: x.clone().index_fill_(1, torch.tensor([1]), 0.5),
    lambda layer, x, y: x.reshape(-1, 6).softmax(-1).reshape(x.shape),
    lambda layer, x, y: torch.stack(x.unbind(1), 1),
    lambda layer, x, y: x - x.mean(1, keepdim=True),
    lambda layer, x, y: x.clone().masked_fill_(y > 0, 0.25),
]


def in_place(x, which):
    """The value changed through a view of it."""
    x = x.clone()
    if which == 0:
        x[:, 1:].mul_(0.5)
    elif which == 1:
        x.view(x.shape[0], -1)[:, :5] += 1
    else:
        x.transpose(1, 2)[:, 0].relu_()
    return x


class Random(nn.Module):
    """A graph of operators drawn at random."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.steps = [
            (draw.choice(range(len(OPERATORS) + 3)), draw.random(), draw.random(), draw.choice(range(3)))
            for _ in range(12)
        ]

    def forward(self, x):
        values = [x, self.layers[0](x)]
        for which, a, b, layer in self.steps:
            x, y = values[int(a * len(values))], values[int(b * len(values))]
            made = which - len(OPERATORS)
            values.append(in_place(x, made) if made >= 0 else OPERATORS[which](self.layers[layer], x, y))
        return values[-1], values[-2], sum(values[2:]) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_graphs(seed):
    torch.manual_seed(seed)
    model = Random(seed).eval()
    compiled = engine.compile(model, torch.randn(1 + seed % 3, 4, 6, 6), choose=("native", "sparse", "torch")[seed % 3])
    assert compiled.batch is None
    for batch in (1, 2, 5):
        agrees(model, compiled, torch.randn(batch, 4, 6, 6))
