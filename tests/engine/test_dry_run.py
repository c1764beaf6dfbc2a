"""What a dry run works out itself is what PyTorch makes."""

import itertools

import pytest
import torch

from rarefy.engine.dry_run import _BY_NUMBER, _by_number, _without_numbers, dry_run, plain_shape
from rarefy.engine.plan import Linear, Norm, Operator, Pointwise, Ref
from rarefy.engine.reference import run_step

SHAPES = [(6,), (4, 6), (1, 6), (2, 4, 6), (2, 1, 6), (4, 1), (6, 4), (2, 4, 5), (), (0, 6)]
ABOUT = {"name": "a", "output": "y"}


def steps():
    """Layers, norms and expressions, of weights that fit some of the shapes."""
    for weight, bias in itertools.product([(5, 6), (6, 4), (5,)], [None, (5,), (6,), (1,)]):
        tensors = {"weight": torch.randn(weight), "bias": None if bias is None else torch.randn(bias)}
        yield Linear(**ABOUT, input="x", activation="relu", **tensors)
        yield Linear(**ABOUT, input="x", residual="z", **tensors)
    for weight, bias, centred in itertools.product([None, (6,), (4,)], [None, (6,), (1,)], [True, False]):
        made = [None if size is None else torch.randn(size) for size in (weight, bias)]
        yield Norm(**ABOUT, input="x", weight=made[0], bias=made[1], eps=1e-5, centred=centred)
    for sizes in ((), ((),), ((4, 1),)):
        constants = torch.randn(4) if sizes == ((4, 1),) else torch.randn(len(sizes))
        code = (("add", 0, 1), ("relu", 2, -1)) if not sizes else (("mul", 0, 2), ("add", 3, 1), ("neg", 4, -1))
        yield Pointwise(**ABOUT, operands=("x", "z"), code=code, constants=constants, sizes=sizes)


@pytest.mark.parametrize("step", list(steps()), ids=lambda step: type(step).__name__)
def test_a_shape_that_is_worked_out_is_that_of_pytorch(step):
    known = 0
    for x, z in itertools.product(SHAPES, SHAPES):
        values = {"x": torch.randn(x), "z": torch.randn(z)}
        try:
            found = plain_shape(step, values)
        except ValueError:  # shapes that do not broadcast
            with pytest.raises(RuntimeError):
                run_step(step, values)
            continue
        if found is not None:
            made = run_step(step, values)
            assert (found, torch.float32) == (tuple(made.shape), made.dtype)
            assert made.is_contiguous()
            known += 1
    fits = isinstance(step, Pointwise) or (step.weight is None and step.bias is None)
    assert known or not fits


def test_other_numbers_are_left_to_pytorch():
    step = Norm(**ABOUT, input="x", weight=None, bias=None, eps=1e-5)
    assert plain_shape(step, {"x": torch.randn(4, 6)}) == (4, 6)
    for x in (torch.randn(4, 6).double(), torch.randn(6, 4).t(), torch.randn(4, 6).to_sparse(), 3):
        assert plain_shape(step, {"x": x}) is None


#: What an operator may be given; the last four are left to PyTorch.
GIVEN = {
    "f": [torch.rand(shape) for shape in ((4, 6), (1, 6), (2, 4, 6), (), (0, 6))],
    "b": [torch.rand(shape) > 0.5 for shape in ((4, 6), (2, 1, 6), ())],
    "d": [0.5, float("inf")],
    "i": [3],
    "?": [torch.rand(6, 4).t(), torch.rand(4, 6).double(), torch.ones(4, 6, dtype=torch.int64), True],
}


@pytest.mark.parametrize("target", _BY_NUMBER)
def test_what_is_worked_out_number_by_number_is_that_of_pytorch(target):
    known = 0
    for args in itertools.product(*[[*itertools.chain(*GIVEN.values())]] * len(_BY_NUMBER[target][0])):
        values = {str(i): x for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
        refs = tuple(Ref(str(i)) if str(i) in values else x for i, x in enumerate(args))
        step = Operator(**ABOUT, target=target, args=refs)
        try:
            found = _by_number(step, values)
        except ValueError:  # shapes that do not broadcast
            with pytest.raises(RuntimeError):
                run_step(step, values)
            continue
        if found is not None:
            made = run_step(step, values)
            assert (found.shape, found.dtype, found.stride()) == (made.shape, made.dtype, made.stride())
            known += 1
    assert known


@pytest.mark.parametrize(
    "kwargs", [{"device": torch.device("cuda")}, {"device": torch.device("meta")}, {"pin_memory": True}], ids=str
)
def test_new_tensors_lie_where_the_engines_numbers_do(kwargs):
    step = Operator(**ABOUT, target="aten.zeros.default", args=([2, 3],), kwargs=kwargs)
    with pytest.raises(ValueError, match=r"aten.zeros.default makes tensors on the CPU, not pinned; got device"):
        _without_numbers(step)
    _without_numbers(Operator(**ABOUT, target="aten.zeros.default", args=([2, 3],), kwargs={"pin_memory": False}))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_normalisation_of_other_channels_is_refused(channels):
    args = (Ref("x"), Ref("w"), None, None, None, True, 0.1, 1e-5, False)
    step = Operator(**ABOUT, target="aten.batch_norm.default", args=args)
    with pytest.raises(ValueError, match=f"weight should contain 8 elements not {channels}"):
        dry_run([step], {"x": torch.zeros(4, 8)}, {"w": torch.ones(channels)})
