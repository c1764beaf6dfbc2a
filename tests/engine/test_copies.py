"""Copies of engines and programs: whole, and the same bits; and what the native side says to wrong lengths."""

import copy
import gc
import io
import pickle

import pytest
import torch

from rarefy import engine
from rarefy.engine.binding import CHANNELS_FIRST, NativeError
from rarefy.engine.builder import Builder
from rarefy.engine.building import NativeSegment
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from tests.engine.layers import lowered
from tests.engine.networks import UNet, thinned


@pytest.fixture(scope="module", params=["native", "dense"])
def compiled(request):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    return engine.compile(thinned(UNet()), x, choose=request.param), x


def through_torch(compiled):
    file = io.BytesIO()
    torch.save(compiled, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), through_torch])
def test_a_copy_outlives_its_engine_and_gives_the_same_bits(compiled, how):
    original, x = compiled
    expected = original(x)
    first = how(original)
    second = how(first)
    del first
    gc.collect()
    assert torch.equal(second(x), expected)


def test_a_builder_refuses_to_be_copied():
    for how in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Builder cannot be copied or pickled"):
            how(Builder())


@pytest.mark.slow
@pytest.mark.parametrize("choose", ["measure", "dense"])
def test_a_program_checks_every_length(choose):
    x = torch.randn(2, 3, 16, 16)
    plan = optimize(capture(thinned(UNet()), (x,)))
    segment = next(item for item in lowered(plan, x, choose=choose).items if isinstance(item, NativeSegment))
    program = segment.program
    shapes = [[port[0] for port in program.ports(outputs=side)] for side in (False, True)]
    inputs, outputs = ([torch.zeros(2, *shape) for shape in side] for side in shapes)
    program.run(inputs, outputs, 2, 1)
    for wrong in (
        ([x[:1].contiguous() for x in inputs], outputs, 2, 1),
        (inputs, [y[:1].contiguous() for y in outputs], 2, 1),
        (inputs, [], 2, 1),
        ([*inputs, *inputs], outputs, 2, 1),
        (inputs, outputs, 3, 1),
        (inputs, outputs, -1, 1),
        (inputs, outputs, 2, 0),
        (inputs, outputs, 2, 1 << 40),
    ):
        with pytest.raises(NativeError):
            program.run(*wrong)


def test_a_builder_checks_weights_and_biases():
    builder = Builder()
    x = builder.input((3, 8, 8), CHANNELS_FIRST, "x")
    options = {"storage": "float32", "choice": "dense", "name": "a"}
    with pytest.raises(NativeError, match="there must be 108 weights, got 72"):
        builder.conv(x, torch.zeros(4, 2, 3, 3), None, **options)
    with pytest.raises(NativeError, match="there must be 4 biases, got 3"):
        builder.conv(x, torch.zeros(4, 3, 3, 3), torch.zeros(3), **options)
    with pytest.raises(NativeError, match="there must be 3 factors and summands, got 2"):
        builder.affine(x, torch.zeros(2), None, "none", name="a")
