"""Engines that are called like their models, and give what these give, from memory, copies and files."""

import copy
import math
import pickle
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass

import pytest
import torch
from torch import Tensor, nn

from rarefy import engine

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: Tensor
    rows: int
    cache: None = None


@dataclass
class Handle:
    logits: Tensor
    handle: object


class Nested(nn.Module):
    """Takes and gives a bit of everything."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch, scale=1.0, *, mask=None, names=("a", "b")):
        y = self.layer(batch["x"]) * scale + batch["more"][0][1]
        y = y if mask is None else y * mask
        return {
            "list": [y + 1, (y + 2, None, "text")],
            names[0]: Output(y * 2, y.shape[0]),
            names[1]: Pair(y.sum(1), 2.5),
            7: y.max(1),
            "flag": True,
            "order": OrderedDict(z=y, a=y - 1),
        }


def batch(rows, more=list):
    return {"x": torch.randn(rows, 4), "more": ([more((torch.randn(rows, 3), torch.randn(rows, 3)))][0],)}


def same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected)
    elif is_dataclass(expected):
        same(vars(got), vars(expected))
    elif isinstance(expected, Mapping):
        assert list(got) == list(expected)
        same(list(got.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            same(a, b)
    else:
        assert got == expected


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Nested().eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["native", "torch"])
def compiled(model, request):
    torch.manual_seed(0)
    return engine.compile(model, {"batch": batch(2), "scale": 2.0, "mask": torch.rand(2, 3)}, choose=request.param)


def through_file(compiled, folder):
    engine.save(compiled, folder / "nested.engine")
    return engine.load(folder / "nested.engine", classes=[Output, Pair])


@pytest.mark.parametrize(
    "how", [lambda e, _: e, through_file, lambda e, _: copy.deepcopy(e), lambda e, _: pickle.loads(pickle.dumps(e))]
)
def test_an_engine_gives_what_its_model_gives(model, compiled, how, tmp_path):
    made = how(compiled, tmp_path)
    assert [port.name for port in made.inputs] == ["batch_x", "batch_more_0_0", "batch_more_0_1", "mask"]
    for rows in (1, 2, 5):
        x, mask = batch(rows), torch.rand(rows, 3)
        expected = model(x, 2.0, mask=mask)
        same(made(x, 2.0, mask=mask), expected)
        same(made(batch=x, mask=mask), expected)  # what was no tensor may be left out
        same(made(mask=mask, batch=x, scale=2.0), expected)


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((), {"mask": torch.ones(2, 3)}, "takes 'batch', 'scale', 'mask'; 'batch' is missing"),
        ((batch(2),), {}, "'mask' is missing"),
        ((batch(2), 3.0), {"mask": torch.ones(2, 3)}, "'scale' must be 2.0, as it was compiled for, got 3.0"),
        ((batch(2), torch.ones(2)), {"mask": torch.ones(2, 3)}, "'scale' must be 2.0, .* got a Tensor"),
        ((batch(2),), {"mask": torch.ones(2, 3), "names": ("c", "d")}, "and was given 'names' as well"),
        ((batch(2),), {"mask": torch.ones(2, 3), "batch": 1}, "'batch' twice"),
        (([],), {"mask": torch.ones(2, 3)}, r"'batch' must be a dict with x, more, got list 0"),
        (({"x": 1},), {"mask": torch.ones(2, 3)}, r"must be a dict with x, more, got dict \['x'\]"),
        (({**batch(2), "more": ()},), {"mask": torch.ones(2, 3)}, "'batch.more' must be a tuple of 1, got tuple 0"),
        (({**batch(2), "x": [1]},), {"mask": torch.ones(2, 3)}, "'batch_x' must be a tensor, got list"),
    ],
)
def test_a_call_that_is_not_like_the_example(compiled, args, named, message):
    with pytest.raises(TypeError, match=message):
        compiled(*args, **named)


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x, most=math.inf, name=None):
        return self.layer(x).clamp(max=most)


@pytest.mark.parametrize("most", [math.inf, -math.inf, math.nan, 0.0])
def test_constants_of_every_float_are_kept_and_told_apart(most, tmp_path):
    model, x = Clamped().eval(), torch.randn(3, 5)
    compiled = engine.compile(model, (x, most), choose="native")
    engine.save(compiled, tmp_path / "clamped.engine")
    for made in (compiled, engine.load(tmp_path / "clamped.engine")):
        torch.testing.assert_close(made(x, float(most)), model(x, most), equal_nan=True)
        for other in (1.0, -math.inf if most == math.inf else math.inf, -0.0):
            with pytest.raises(TypeError, match=f"'most' must be {most}, as it was compiled for, got {other}"):
                made(x, other)


def test_positions_and_names_are_the_models():
    compiled = engine.compile(nn.Bilinear(2, 3, 4).eval(), (torch.ones(2, 2), torch.ones(2, 3)), choose="torch")
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    expected = compiled(x, y)
    assert torch.equal(compiled(input2=y, input1=x), expected)
    assert torch.equal(compiled(x, input2=y), expected)


def test_a_class_that_is_not_known_comes_back_as_a_dict(model, compiled, tmp_path):
    engine.save(compiled, tmp_path / "nested.engine")
    with pytest.warns(UserWarning, match="tests.engine.test_structure:(Output|Pair), which is not known here"):
        made = engine.load(tmp_path / "nested.engine")
    x, mask = batch(2), torch.rand(2, 3)
    found, expected = made(x, mask=mask), model(x, 2.0, mask=mask)
    same(found["a"], vars(expected["a"]))
    same(found["b"], expected["b"]._asdict())
    other = dataclass(type("Output", (), {"__module__": __name__, "__annotations__": {"x": int}}))
    with pytest.raises(ValueError, match="the class tests.engine.test_structure:Output has no fields logits"):
        engine.load(tmp_path / "nested.engine", classes=[other, Pair])


class Gives(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: {"a": x, "b": {1, 2}}, "'output.b' is a builtins.set"),
        (lambda x: (x, [Handle(x, object())]), "'output.1.0.handle' is a builtins.object"),
        (lambda x: {None: x}, "'output' is a mapping whose keys are no strings"),
    ],
)
def test_what_cannot_be_taken_apart_is_named(what, message):
    with pytest.raises(engine.CaptureError, match=message):
        engine.compile(Gives(what).eval(), torch.ones(2, 3), choose="torch")
    with pytest.raises(TypeError, match="example_input: 'x' is a builtins.object"):
        engine.compile(Gives(what).eval(), (object(),), choose="torch")


def test_sizes_of_the_batch_are_numbers():
    compiled = engine.compile(
        Gives(lambda x: (x.shape[0], x.numel() / 2, x.shape[0] > 4, x + 1)).eval(), torch.ones(2, 3), choose="torch"
    )
    same(compiled(torch.zeros(5, 3)), (5, 7.5, True, torch.ones(5, 3)))


def test_a_structure_that_tracing_changes_is_refused():
    def what(x):
        return [x] * (2 if torch.compiler.is_compiling() else 1)

    with pytest.raises(engine.CaptureError, match="its output is of another structure"):
        engine.compile(Gives(what).eval(), torch.ones(2, 3), choose="torch")


def test_calibration_is_like_the_example():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, pixels, again=True):
            return {"y": self.layer(pixels)}

    x = torch.randn(4, 3, 8, 8)
    given = {"pixels": x, "again": True}
    model = Named().eval()
    compiled = engine.compile(model, given, precision="int8", calibration=[given], choose="native")
    assert (compiled(pixels=x)["y"] - model(x)["y"]).abs().max() < 0.1 * model(x)["y"].abs().max()


def test_networks_of_transformers_need_no_wrapper(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()
    given = {"input_ids": torch.randint(50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    compiled = engine.compile(model, given, choose="native")
    engine.save(compiled, tmp_path / "bert.engine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = engine.load(tmp_path / "bert.engine")
    with torch.no_grad():
        expected = model(**given)
    for made in (compiled, again):
        found = made(**given)
        assert type(found) is type(expected)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)
