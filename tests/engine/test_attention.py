"""Attention, products of two values and softmax at places, natively and in PyTorch, against float64."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import engine
from rarefy.engine import reference
from rarefy.engine.assembling import build
from rarefy.engine.binding import CHANNELS_FIRST, NativeError, available
from rarefy.engine.builder import Builder, bits
from rarefy.engine.building import NativeSegment
from rarefy.engine.capture import capture
from rarefy.engine.engine import Engine
from rarefy.engine.passes import optimize
from rarefy.engine.places import contiguous
from rarefy.engine.plan import Attention, Linear, MatMul, Placed, Places, Plan, Softmax, Step, Value, View

BATCH = 3
native = pytest.mark.skipif(not available(), reason="there is no native library")


def plan_of(*steps: Step, outputs: tuple[str, ...] | None = None, **shapes: tuple[int, ...]) -> Plan:
    """A plan of steps; the shapes of samples of the inputs come first, then those of what the steps make."""
    made = {step.output for step in steps}
    return Plan(
        inputs=tuple(name for name in shapes if name not in made),
        outputs=outputs or (steps[-1].output,),
        single=outputs is None,
        steps=steps,
        values={name: Value(shape, torch.float32, str(("batch", *shape[:-1]))) for name, shape in shapes.items()},
        constants={},
        batch=None,
    )


def inputs_of(plan: Plan, batch: int = BATCH) -> tuple[Tensor, ...]:
    shapes = [plan.values[name].shape or () for name in plan.inputs]
    return tuple(torch.randn(batch, *shape) for shape in shapes)


def compiled(plan: Plan, threads: int | None = None) -> Engine:
    """The engine of a plan, whose steps must all be native."""
    made = build(plan, inputs_of(plan), threads, "float32", "native", 0.0)
    assert all(isinstance(item, NativeSegment) for item in made._items), made._reasons
    return made


def projected(name: str, tokens: int, width: int, at: int, heads: int, size: int, axes: tuple[int, ...]) -> Places:
    """Heads side by side in features `at` and on of a value (tokens, width); axes: its heads, tokens, features of 5."""
    strides = [0] * 5
    for axis, stride in zip(axes, (size if heads > 1 else 0, width, 1), strict=True):
        strides[axis] = stride
    return Places(name, tokens * width, tuple(strides), at)


def attention(
    heads: int, queries: int, keys: int, size: int, results: int, **options: object
) -> tuple[Attention, Plan]:
    """Queries (queries, 2 heads size) in their second half, keys and values as one: as layers make them."""
    widths = 2 * heads * size, heads * (size + results)
    step = Attention(
        name="attention",
        output="y",
        sizes=(heads, queries, keys, size, results),
        query=projected("x", queries, widths[0], heads * size, heads, size, (0, 1, 3)),
        key=projected("z", keys, widths[1], 0, heads, size, (0, 2, 3)),
        value=projected("z", keys, widths[1], heads * size, heads, results, (0, 2, 4)),
        result=projected("y", queries, heads * results, 0, heads, results, (0, 1, 4)),
        shape=(queries, heads * results),
        **{"scale": size**-0.5, **options},  # type: ignore[arg-type]
    )
    return step, plan_of(step, x=(queries, widths[0]), z=(keys, widths[1]), y=step.shape)


def expected(step: Attention, x: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same by the formula, of float64."""
    heads, queries, keys, size, results = step.sizes
    q = x.double()[..., heads * size :].reshape(-1, queries, heads, size).transpose(1, 2)
    k = z.double()[..., : heads * size].reshape(-1, keys, heads, size).transpose(1, 2)
    v = z.double()[..., heads * size :].reshape(-1, keys, heads, results).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * step.scale
    for added in (step.bias, mask):
        scores = scores if added is None else scores + added.double()
    if step.causal:
        scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -math.inf)
    y = scores.softmax(-1)
    if step.empty_is_zero:
        y = y.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return (y @ v).transpose(1, 2).reshape(-1, queries, heads * results)


def check(made: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(made.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True)


SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 9, 8, 4),
    (3, 64, 64, 16, 16),
    (2, 50, 17, 7, 5),
    (1, 197, 70, 33, 12),
    (2, 25, 300, 8, 9),
]


@native
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_right(sizes: tuple[int, ...], causal: bool) -> None:
    step, plan = attention(*sizes, causal=causal)
    made = compiled(plan)
    for batch in (1, BATCH):
        x, z = inputs_of(plan, batch)
        check(made(x, z), expected(step, x, z))
        check(reference.run(plan, (x, z))[0], expected(step, x, z))


@native
@pytest.mark.parametrize("shape", [(2, 30, 19), (30, 19), (2, 1, 19), (1, 30, 1), (19,)])
@pytest.mark.parametrize("empty_is_zero", [False, True])
def test_constant_masks_of_minus_infinity(shape: tuple[int, ...], empty_is_zero: bool) -> None:
    bias = torch.randn(shape)
    bias[torch.rand(shape) < 0.3] = -math.inf
    if len(shape) > 1 and shape[-2] > 1:
        bias[..., 3, :] = -math.inf
    step, plan = attention(2, 30, 19, 8, 8, bias=bias, empty_is_zero=empty_is_zero)
    x, z = inputs_of(plan)
    right = expected(step, x, z)
    check(compiled(plan)(x, z), right)
    check(reference.run(plan, (x, z))[0], right)


@native
@pytest.mark.parametrize("axes", [(0, 1, 2), (None, 1, 2), (None, None, 2), (None, 1, None)])
def test_masks_that_are_values(axes: tuple[int | None, ...]) -> None:
    sizes = 2, 30, 19
    shape = tuple(1 if axis is None else sizes[axis] for axis in axes)
    step, plan = attention(*sizes, 8, 8, mask=contiguous("m", shape, axes, 5))
    plan = plan_of(step, x=(30, 32), z=(19, 32), m=shape, y=step.shape)
    x, z, m = inputs_of(plan)
    m = m.masked_fill(torch.rand(m.shape) < 0.2, -math.inf)
    right = expected(step, x, z, m)
    check(compiled(plan)(x, z, m), right)
    check(reference.run(plan, (x, z, m))[0], right)


@native
def test_what_pytorch_gives_for_a_query_that_sees_no_key() -> None:
    bias = torch.zeros(4, 6)
    bias[2] = -math.inf
    _, plan = attention(1, 4, 6, 8, 8, bias=bias)
    x, z = inputs_of(plan)
    q, k, v = x[..., 8:], z[..., :8], z[..., 8:]
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    assert right[:, 2].eq(0).all()
    torch.testing.assert_close(compiled(plan)(x, z), right)
    _, plan = attention(1, 4, 6, 8, 8, causal=True)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(compiled(plan)(x, z), right)


@native
def test_infinite_and_not_a_number_go_as_in_pytorch() -> None:
    step, plan = attention(1, 20, 6, 8, 8)
    x, z = inputs_of(plan)
    x[0, 3, 8] = math.inf
    x[1, 4, 9] = math.nan
    z[2, 5, 11] = -math.inf
    check(compiled(plan)(x, z), expected(step, x, z))


@native
def test_large_scores_and_far_apart_ones() -> None:
    step, plan = attention(2, 40, 33, 8, 8, scale=30.0)
    x, z = inputs_of(plan)
    torch.testing.assert_close(compiled(plan)(x, z).double(), expected(step, x, z), rtol=1e-3, atol=1e-4)


@native
def test_grouped_queries_and_windows() -> None:
    """Windows of tokens, groups of heads that share keys and values."""
    windows, groups, each, tokens, size = 4, 2, 3, 9, 8
    width = (groups * each + 2 * groups) * size
    sizes = (windows, groups, each, tokens, tokens, size, size)
    row = tokens * width
    keys = groups * each * size
    step = Attention(
        name="a",
        output="y",
        sizes=sizes,
        query=Places("x", windows * row, (row, each * size, size, width, 0, 1, 0)),
        key=Places("x", windows * row, (row, size, 0, 0, width, 1, 0), keys),
        value=Places("x", windows * row, (row, size, 0, 0, width, 0, 1), keys + groups * size),
        result=Places("y", windows * tokens * 48, (tokens * 48, each * size, size, 48, 0, 0, 1)),
        shape=(windows, tokens, 48),
        scale=0.3,
        bias=torch.randn(windows, 1, 1, tokens, tokens),
    )
    plan = plan_of(step, x=(windows, tokens, width), y=(windows, tokens, 48))
    (x,) = inputs_of(plan)
    split = x.double().split([keys, groups * size, groups * size], -1)
    q = split[0].reshape(-1, windows, tokens, groups, each, size).permute(0, 1, 3, 4, 2, 5)
    k, v = (part.reshape(-1, windows, tokens, groups, 1, size).permute(0, 1, 3, 4, 2, 5) for part in split[1:])
    assert step.bias is not None
    y = (q @ k.transpose(-1, -2) * 0.3 + step.bias).softmax(-1) @ v
    right = y.permute(0, 1, 4, 2, 3, 5).reshape(-1, windows, tokens, 48)
    check(compiled(plan)(x), right)
    check(reference.run(plan, (x,))[0], right)


@native
def test_threads_and_files_change_no_bit(tmp_path: Path) -> None:
    _, plan = attention(3, 50, 70, 16, 16, bias=torch.randn(50, 70))
    x, z = inputs_of(plan, 1)
    one, two = compiled(plan, 1), compiled(plan, 2)
    assert torch.equal(one(x, z), two(x, z))
    engine.save(one, tmp_path / "a.engine")
    assert torch.equal(engine.load(tmp_path / "a.engine")(x, z), one(x, z))
    left = build(plan, (x, z), None, "float32", "torch", 0.0)
    engine.save(left, tmp_path / "b.engine")
    assert torch.equal(engine.load(tmp_path / "b.engine")(x, z), left(x, z))


def product(m: int, n: int, k: int, turned: bool) -> tuple[MatMul, Plan]:
    """(heads, m, k) x (heads, k, n), all of them features of tokens m and k, to (m, heads n); or to (n, heads m)."""
    heads = 2
    rows, columns = (n, m) if turned else (m, n)
    result = [columns, heads * columns, 1, 0] if not turned else [columns, 1, heads * columns, 0]
    step = MatMul(
        name="p",
        output="y",
        sizes=(heads, m, n, k),
        left=Places("a", m * heads * k, (k, heads * k, 0, 1)),
        right=Places("b", k * heads * n, (n, 0, 1, heads * n)),
        result=Places("y", heads * m * n, tuple(result)),
        shape=(rows, heads * columns),
        scale=0.7,
    )
    return step, plan_of(step, a=(m, heads * k), b=(k, heads * n), y=step.shape)


@native
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 30, 7), (64, 49, 32), (3, 100, 200)])
def test_products_are_right(sizes: tuple[int, int, int], turned: bool) -> None:
    (m, n, k), (_, plan) = sizes, product(*sizes, turned)
    made = compiled(plan)
    for batch in (1, BATCH):
        a, b = inputs_of(plan, batch)
        left, right = a.double().reshape(-1, m, 2, k).transpose(1, 2), b.double().reshape(-1, k, 2, n).transpose(1, 2)
        y = left @ right * 0.7
        y = y.permute(0, 3, 1, 2).flatten(2) if turned else y.permute(0, 2, 1, 3).flatten(2)
        for found in (made(a, b), reference.run(plan, (a, b))[0]):
            torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("shape", [(5,), (1, 7), (30, 17), (4, 9, 33)])
@pytest.mark.parametrize("axis", [-1, 0])
def test_softmax_is_right(shape: tuple[int, ...], axis: int) -> None:
    axes = [*range(len(shape))]
    axes = [*axes[1:], axes[0]] if axis == 0 else axes
    numbers = math.prod(shape)
    strides = [math.prod(shape[i + 1 :]) for i in axes]
    sizes = tuple(shape[i] for i in axes)
    strides = [stride if size > 1 else 0 for stride, size in zip(strides, sizes, strict=True)]
    step = Softmax(
        name="s",
        output="y",
        sizes=sizes,
        x=Places("x", numbers, tuple(strides)),
        result=Places("y", numbers, tuple(strides)),
        shape=shape,
    )
    plan = plan_of(step, x=shape, y=shape)
    (x,) = inputs_of(plan)
    x = x * 20
    x[0].view(-1)[0] = -math.inf if math.prod(shape) > 1 else 0.0
    right = x.double().softmax(1 if axis == 0 else -1)
    for found in (compiled(plan)(x), reference.run(plan, (x,))[0]):
        torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=1e-9, equal_nan=True)


@native
def test_random_strides_are_right() -> None:
    """Values whose axes lie in any order, some of them parts of a larger value."""
    picked = random.Random(0)
    for _ in range(20):
        sizes = tuple(picked.choice([1, 2, 5, 9, 20]) for _ in range(5))

        def placed(name: str, axes: tuple[int, ...], sizes: tuple[int, ...] = sizes) -> tuple[Places, tuple[int, ...]]:
            order = picked.sample(axes, len(axes))
            shape = tuple(sizes[axis] for axis in order)
            return contiguous(name, shape, order, 5), shape

        given = {"q": (0, 1, 3), "k": (0, 2, 3), "v": (0, 2, 4), "y": (0, 1, 4)}
        places, shapes = zip(*(placed(name, axes) for name, axes in given.items()), strict=True)
        step = Attention(
            name="a",
            output="y",
            sizes=sizes,
            **dict(zip(("query", "key", "value", "result"), places, strict=True)),
            shape=shapes[-1],
            scale=0.5,
        )
        plan = plan_of(step, **dict(zip(given, shapes, strict=True)))
        values = inputs_of(plan)
        right = reference.run(plan, [x.double() for x in values])[0]
        check(compiled(plan)(*values), right)


@native
def test_numbers_outside_of_a_value_are_refused() -> None:
    """Every number of a description changed a little: it is refused, or lies inside."""
    builder = Builder()
    x = builder.input((8, 1, 10), CHANNELS_FIRST, "x")
    result = [0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    key, value = [0, 0, 0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 1, 0]
    place = [0, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    whole = [4, 10, 10, 8, 8, 8, 1, 10, *place, *key, *value, *result, bits(0.5), 0, 1]
    builder.tensor("attention", [x, x, x], whole, name="a")
    refused = 0
    for at, change in itertools.product(range(len(whole) - 3), (-1, 1, 10, 2**31, 2**62)):
        numbers = [*whole]
        numbers[at] += change
        try:
            builder.tensor("attention", [x, x, x], numbers, name="a")
        except NativeError:
            refused += 1
    assert refused > 0.75 * 5 * (len(whole) - 3)
    for wrong in ([], [4], whole[:-1], [*whole, 0], [*whole[:-1], 2], [13, *whole[1:]]):
        with pytest.raises(NativeError, match="axes|must be 0 or 1"):
            builder.tensor("attention", [x, x, x], wrong, name="a")
    with pytest.raises(NativeError, match="a query, keys, values"):
        builder.tensor("attention", [x, x], whole, name="a")


def test_places_outside_of_a_value_are_refused() -> None:
    with pytest.raises(ValueError, match="no part of axes"):
        Softmax(name="s", output="y", sizes=(3,), x=Places("x", 2, (1,)), result=Places("y", 3, (1,)), shape=(3,))
    with pytest.raises(ValueError, match="is not the result"):
        Softmax(name="s", output="y", sizes=(3,), x=Places("x", 3, (1,)), result=Places("y", 3, (1,)), shape=(4,))
    assert issubclass(Softmax, Placed)


def view(output: str, source: str, base: tuple[int, ...], order: tuple[int, ...], folded: bool = False) -> View:
    """A permutation of a value of that shape."""
    strides = [math.prod(base[axis + 1 :]) for axis in order]
    sizes = tuple(base[axis] for axis in order)
    return View(
        name=output,
        output=output,
        input=source,
        numbers=math.prod(base),
        sizes=sizes,
        strides=tuple(strides),
        folded=folded,
    )


@native
def test_views_around_attention_are_absorbed() -> None:
    """One layer makes queries, keys and values; another reads the heads side by side."""
    heads, tokens, size = 3, 10, 8
    width = heads * size
    parts = [
        replace(view(name, "qkv", (tokens, 3, heads, size), (2, 0, 3)), offset=at * width)
        for at, name in enumerate(("q", "k", "v"))
    ]
    axes = {"query": (0, 1, 3), "key": (0, 2, 3), "value": (0, 2, 4)}
    shape = heads, tokens, size
    step = Attention(
        name="a",
        output="a",
        sizes=(heads, tokens, tokens, size, size),
        **{field: contiguous(field[0], shape, axes[field], 5) for field in axes},  # type: ignore[arg-type]
        result=contiguous("a", shape, (0, 1, 4), 5),
        shape=shape,
        scale=0.4,
    )
    weights = torch.randn(3 * width, width) / 5, torch.randn(width, width)
    flat = view("t", "a", shape, (1, 0, 2))
    plan = plan_of(
        Linear(name="in", output="qkv", input="x", weight=weights[0]),
        *parts,
        step,
        flat,
        View(name="u", output="u", input="t", numbers=tokens * width, sizes=(tokens, width), strides=(width, 1)),
        Linear(name="out", output="y", input="u", weight=weights[1]),
        x=(tokens, width),
        qkv=(tokens, 3 * width),
        q=shape,
        k=shape,
        v=shape,
        a=shape,
        t=(tokens, heads, size),
        u=(tokens, width),
        y=(tokens, width),
    )
    better = optimize(plan)
    assert [type(each) for each in better.steps] == [Linear, Attention, Linear]
    made = compiled(better)
    assert len(made._items) == 1
    (x,) = inputs_of(plan)
    right = reference.run(plan, (x,))[0]
    torch.testing.assert_close(made(x), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.run(better, (x,))[0], right, rtol=1e-5, atol=1e-5)


def test_a_view_that_cannot_be_absorbed_stays() -> None:
    """Pairs of tokens as one: a head's features are no even steps of what was made."""
    step, plan = attention(1, 4, 6, 6, 8)
    odd = View(name="o", output="z", input="w", numbers=48, sizes=(3, 2, 16), strides=(16, 0, 1))
    plan = plan_of(odd, step, x=(4, 12), w=(3, 16), z=(6, 14), y=step.shape)
    assert [type(each) for each in optimize(plan).steps] == [View, Attention]


class Attends(nn.Module):
    """The operator with some of its options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        for name in [name for name, value in options.items() if isinstance(value, Tensor)]:
            self.register_buffer(name, options.pop(name))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = getattr(self, "bias", mask)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


@native
@pytest.mark.parametrize(
    ("options", "heads", "mask"),
    [
        ({}, (4, 4), None),
        ({"scale": 0.2}, (4, 4), None),
        ({"is_causal": True}, (4, 4), None),
        ({"enable_gqa": True}, (4, 2), None),
        ({"enable_gqa": True, "is_causal": True}, (4, 1), None),
        ({"bias": torch.randn(5, 7)}, (4, 4), None),
        ({"bias": torch.rand(1, 4, 5, 7) < 0.8}, (4, 4), None),
        ({"bias": torch.randn(4, 5, 7), "enable_gqa": True}, (4, 2), None),
        ({}, (4, 4), torch.randn(2, 1, 5, 7)),
        ({}, (4, 4), torch.rand(2, 4, 5, 7) < 0.7),
        ({"enable_gqa": True}, (4, 2), torch.randn(2, 4, 5, 7)),
        ({"enable_gqa": True}, (4, 2), torch.rand(2, 1, 1, 7) < 0.7),
    ],
)
def test_the_operator_becomes_a_step(options: dict[str, Any], heads: tuple[int, int], mask: Tensor | None) -> None:
    model = Attends(**options).eval()
    q, k, v = (torch.randn(2, n, tokens, 8) for n, tokens in ((heads[0], 5), (heads[1], 7), (heads[1], 7)))
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    plan = capture(model, inputs)
    assert [type(step) for step in plan.steps] == [Attention]
    right = model(*inputs)
    torch.testing.assert_close(reference.run(plan, inputs)[0], right, rtol=1e-5, atol=1e-5)
    better = optimize(plan)
    torch.testing.assert_close(reference.run(better, inputs)[0], right, rtol=1e-5, atol=1e-5)
    made = build(better, inputs, None, "float32", "native", 0.0)
    assert any(isinstance(item, NativeSegment) for item in made._items)
    torch.testing.assert_close(made(*inputs), right, rtol=1e-5, atol=1e-5)


class Eager(nn.Module):
    """Attention in its parts, of q, k and v with heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("bias", torch.randn(1, 4, 5, 7).masked_fill(torch.rand(1, 4, 5, 7) < 0.2, -math.inf))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        match self.how:
            case "bert":
                scores = torch.matmul(q, k.transpose(-1, -2)) / 3.0 + mask
            case "query first":
                scores = (q * 0.3) @ (k * 0.5).transpose(-2, -1) + self.bias
            case "after":
                scores = (q @ k.transpose(-2, -1)) * 0.3 + self.bias
            case "none":
                scores = q @ k.transpose(-2, -1)
            case "mask scaled":
                scores = (q @ k.transpose(-2, -1) + mask) * 0.3
            case _:
                scores = (q @ k.transpose(-2, -1)).relu()
        weights = scores.softmax(-1)
        return weights @ v


@native
@pytest.mark.parametrize(
    ("how", "joined"),
    [("bert", True), ("query first", True), ("after", True), ("none", True), ("mask scaled", False), ("relu", False)],
)
def test_attention_in_parts_is_joined(how: str, joined: bool) -> None:
    model = Eager(how).eval()
    q, k, v = (torch.randn(2, 4, tokens, 8) for tokens in (5, 7, 7))
    inputs = (q, k, v, torch.randn(2, 1, 1, 7))
    plan = capture(model, inputs)
    better = optimize(plan)
    kinds = [type(step) for step in better.steps]
    assert (Attention in kinds) == joined
    assert (Softmax in kinds and kinds.count(MatMul) == 2) == (not joined)
    right = model(*inputs)
    for found in (reference.run(plan, inputs)[0], reference.run(better, inputs)[0]):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5, equal_nan=True)
    made = build(better, inputs, None, "float32", "native", 0.0)
    torch.testing.assert_close(made(*inputs), right, rtol=1e-5, atol=1e-5, equal_nan=True)


class Windows(nn.Module):
    """Attention of windows, which are part of dimension 0, with a bias and with a mask of its own for each window."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.shifted, self.layer, self.back = shifted, nn.Linear(8, 48), nn.Linear(16, 8)
        self.register_buffer("bias", torch.randn(2, 4, 4))
        self.register_buffer("seen", torch.zeros(3, 4, 4).masked_fill(torch.rand(3, 4, 4) < 0.3, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.reshape(-1, 4, 8)).reshape(-1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k, v = x.unbind(0)
        scores = (q * 0.3) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
        if self.shifted:
            scores = scores.view(-1, 3, 2, 4, 4) + self.seen.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, 2, 4, 4)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 16)
        return self.back(y).reshape(-1, 3, 4, 8)


@native
@pytest.mark.parametrize("shifted", [False, True])
def test_attention_of_windows_with_constant_masks_is_joined(shifted: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Windows(shifted).eval()
    x = torch.randn(2, 3, 4, 8)
    plan = optimize(capture(model, (x,)))
    assert [type(step) for step in plan.steps if isinstance(step, Placed)] == [Attention]
    made = build(plan, (x,), None, "float32", "native", 0.0)
    engine.save(made, tmp_path / "windows.rarefy")
    again = engine.load(tmp_path / "windows.rarefy")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 4, 8)
        torch.testing.assert_close(reference.run(plan, (x,))[0], model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(again(x), made(x))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_softmax_of_images_and_linear_attention(axis: int) -> None:
    class Linear(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q.softmax(axis) @ (k.transpose(-1, -2) @ v)

    inputs = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 9)
    plan = optimize(capture(Linear().eval(), inputs))
    assert sorted(type(step).__name__ for step in plan.steps if type(step) in (MatMul, Softmax)) == [
        *("MatMul", "MatMul", "Softmax")
    ]
    right = Linear()(*inputs)
    torch.testing.assert_close(reference.run(plan, inputs)[0], right, rtol=1e-5, atol=1e-5)
    made = build(plan, inputs, None, "float32", "native", 0.0)
    torch.testing.assert_close(made(*inputs), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choose", ["native", "torch"])
def test_attention_of_one_sequence(choose):
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(5, 5)

        def forward(self, x, mask):
            first = F.scaled_dot_product_attention(self.q(x), self.q(x), x)
            return first, F.scaled_dot_product_attention(first, x, x, attn_mask=mask)

    model, x, mask = Alone().eval(), torch.randn(3, 5), torch.eye(3, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(engine.compile(model, (x, mask), choose=choose)(x, mask), model(x, mask))


def test_a_softmax_is_read_through_a_view_of_it():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(12, 36)

        def forward(self, x):
            batch, tokens, _ = x.shape
            parts = self.qkv(x).view(batch, tokens, 3, 2, 6).permute(2, 0, 3, 1, 4).reshape(3, batch * 2, tokens, 6)
            scores = torch.bmm(parts[0], parts[1].transpose(1, 2)).view(batch, 2, tokens, tokens)
            scores = scores.masked_fill(x[:, None, :, :1] > 1, -3.0).softmax(-1)
            y = torch.bmm(scores.view(-1, tokens, tokens), parts[2])
            return y.view(batch, 2, tokens, 6).transpose(1, 2).reshape(batch, tokens, 12)

    model, x = Folded().eval(), torch.randn(2, 5, 12)
    compiled = engine.compile(model, x, choose="native")
    for batch in (1, 3):
        given = torch.randn(batch, 5, 12)
        with torch.no_grad():
            torch.testing.assert_close(compiled(given), model(given), rtol=1e-5, atol=1e-5)
