"""What each ATen operator becomes in the plan; those that are not here stay operators, which PyTorch runs."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx

from rarefy.engine.functions import whole_table
from rarefy.engine.places import contiguous
from rarefy.engine.plan import (
    MODED,
    Activation,
    Affine,
    Binary,
    Concat,
    Conv,
    ConvTranspose,
    Flatten,
    GlobalAverage,
    GroupNorm,
    Join,
    Linear,
    Norm,
    Places,
    Pointwise,
    Pool,
    Reduce,
    Reduction,
    Resize,
    Step,
    Upsample,
)


@dataclass
class Call:
    """One call of an operator in an exported graph.

    Attributes:
        node: of the graph.
        args: by the names of the operator's schema, defaults filled in.
        constants: what is known of the graph's nodes now: parameters, buffers and what was computed from them.
        sources: the names that parameters have in the model, by node.
        batch: how the graph calls the batch size.
        scales: of the output channels of constants that were dequantised from whole numbers, by node.
    """

    node: fx.Node
    args: dict[str, Any]
    constants: dict[str, Tensor]
    sources: dict[str, str]
    batch: str
    scales: dict[str, Tensor] = field(default_factory=dict)
    _labels: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._labels = {"name": self.node.name, "output": self.node.name}

    def value(self, name: str) -> str | None:
        """The float32 value of that argument that the plan computes; None where it is a constant or something else."""
        node = self.args[name]
        known = isinstance(node, fx.Node) and node.name not in self.constants
        return node.name if known and _dtype(node) is torch.float32 else None

    def constant(self, name: str) -> Tensor | None:
        """The constant float32 tensor of that argument; None where it is something else."""
        node = self.args[name]
        found = self.constants.get(node.name) if isinstance(node, fx.Node) else None
        return found if found is not None and found.dtype is torch.float32 else None

    def scale(self, name: str) -> Tensor | None:
        """The scales (out,) of that argument's output channels, where it is a constant that has some."""
        node = self.args[name]
        return self.scales.get(node.name) if isinstance(node, fx.Node) else None

    def given(self, name: str) -> bool:
        """Whether that argument is there at all."""
        return self.args.get(name) is not None

    def sample(self, name: str) -> tuple[tuple[int, ...] | None, bool]:
        """The shape of one sample of that argument, and whether its first size is part of dimension 0."""
        return _whole(self.args[name], self)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of one sample of that argument; see :class:`rarefy.engine.plan.Value`."""
        return sample_shape(self.args[name], self.batch)

    @property
    def labels(self) -> dict[str, Any]:
        """``name`` and ``output`` of the step."""
        return self._labels

    def layer(self, weight: str = "weight") -> dict[str, Any]:
        """The same, with the name of the layer that the weight, one of the arguments, belongs to."""
        for name in (weight, "bias"):
            node = self.args.get(name)
            source = self.sources.get(node.name, "") if isinstance(node, fx.Node) else ""
            if layer := source.removesuffix(name).rstrip("._"):
                return {**self._labels, "name": layer}
        return self._labels


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def sample_shape(node: Any, batch: str) -> tuple[int, ...] | None:
    """The shape of a node's tensor without the batch; None where dimension 0 is not it or others are not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() == 0 or str(value.shape[0]) != batch:
        return None
    rest = tuple(value.shape[1:])
    return rest if all(isinstance(size, int) for size in rest) else None


def sample_shapes(node: Any, batch: str) -> tuple[tuple[int, ...] | None, int, tuple[int, ...] | None]:
    """``shape``, ``fold`` and ``inner`` of a node's tensor: see :class:`rarefy.engine.plan.Value`."""
    shape = sample_shape(node, batch)
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if shape is not None or not isinstance(value, Tensor) or value.dim() < 2:
        return shape, 1, None
    found = re.fullmatch(rf"(\d+)\*{re.escape(batch)}", str(value.shape[0]))
    rest = tuple(value.shape[1:])
    if found is None or not all(isinstance(size, int) for size in rest):
        return None, 1, None
    return None, int(found[1]), rest


Handler = Callable[[Call], Step | None]
_HANDLERS: dict[str, Handler] = {}

#: Operators that give back what they got, when the model is not training.
IDENTITIES = frozenset(
    f"aten.{name}"
    for name in (
        *("alias.default", "detach.default", "contiguous.default", "lift_fresh_copy.default", "dropout.default"),
        *("feature_dropout.default", "alpha_dropout.default", "clone.default", "_assert_tensor_metadata.default"),
    )
)


_RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unsqueeze.default"),
        *("squeeze.default", "squeeze.dim", "squeeze.dims"),
    )
)


def keeps_order(node: fx.Node) -> bool:
    """Whether a node gives all numbers of its first argument, a tensor, in their order, in another shape at most."""
    target, x = str(node.target), node.args[0] if node.args else None
    if target in _RESHAPES:
        return isinstance(x, fx.Node)
    if target not in ("aten.select.int", "aten.transpose.int") or not isinstance(x, fx.Node):
        return False
    single = [str(size) == "1" for size in x.meta["val"].shape]
    axes = [int(cast(int, axis)) % len(single) for axis in node.args[1 : 2 + (target == "aten.transpose.int")]]
    if target == "aten.select.int":
        return single[axes[0]]
    order = list(range(len(single)))
    order[axes[0]], order[axes[1]] = axes[1], axes[0]
    moved = [axis for axis in order if not single[axis]]
    return moved == sorted(moved)


def handler(target: str) -> Handler | None:
    """What makes a step of this operator, if anything does; it gives None where this call of it stays an operator."""
    return _HANDLERS.get(target)


def _handles(*targets: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        _HANDLERS.update({f"aten.{target}": function for target in targets})
        return function

    return register


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """A size an axis, from a size or a list of one or of all."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    return sizes * axes if len(sizes) == 1 else sizes


def _same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


@_handles(*(f"conv{axes}d.{overload}" for axes in (1, 2, 3) for overload in ("default", "padding")))
def _conv(call: Call) -> Step | None:
    weight, bias, x, shape = call.constant("weight"), call.constant("bias"), call.value("input"), call.shape("input")
    if weight is None or x is None or shape is None or len(shape) != weight.dim() - 1:
        return None
    if bias is None and call.given("bias"):
        return None
    axes = weight.dim() - 2
    dilation = _each(call.args["dilation"], axes)
    given = call.args["padding"]
    if given == "same":
        padding = _same_padding(weight.shape[2:], dilation)
    else:
        sizes = (0,) * axes if given == "valid" else _each(given, axes)
        padding = tuple((size, size) for size in sizes)
    return Conv(
        **call.layer(),
        input=x,
        weight=weight,
        bias=bias,
        stride=_each(call.args["stride"], axes),
        padding=padding,
        dilation=dilation,
        groups=call.args["groups"],
        weight_scale=call.scale("weight"),
    )


@_handles("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(call: Call) -> Step | None:
    weight, bias, x, shape = call.constant("weight"), call.constant("bias"), call.value("input"), call.shape("input")
    if weight is None or x is None or shape is None or len(shape) != weight.dim() - 1:
        return None
    if bias is None and call.given("bias"):
        return None
    axes, groups = weight.dim() - 2, call.args["groups"]
    turned = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return ConvTranspose(
        **call.layer(),
        input=x,
        weight=turned.contiguous(),
        bias=bias,
        stride=_each(call.args["stride"], axes),
        padding=_each(call.args["padding"], axes),
        output_padding=_each(call.args["output_padding"], axes),
        dilation=_each(call.args["dilation"], axes),
        groups=groups,
    )


@_handles("linear.default")
def _linear(call: Call) -> Step | None:
    weight, bias, x = call.constant("weight"), call.constant("bias"), call.value("input")
    if weight is None or weight.dim() != 2 or x is None or (bias is None and call.given("bias")):
        return None
    return Linear(**call.layer(), input=x, weight=weight, bias=bias, weight_scale=call.scale("weight"))


@_handles("mm.default", "matmul.default", "bmm.default")
def _product(call: Call) -> Step | None:
    """``x @ w`` is a linear layer of w^T; ``w @ x``, for x (B, in, places), a convolution over the places."""
    left, right = "self", "mat2" if "mat2" in call.args else "other"
    weight, x = _matrix(call, right, left), call.value(left)
    if weight is not None and x is not None and _rank(call, left) > 1:
        return Linear(**call.layer(right), input=x, weight=weight.T.contiguous())
    weight, x, shape = _matrix(call, left, right), call.value(right), call.shape(right)
    if weight is None or x is None or shape is None or len(shape) != 2:
        return None
    return Conv(**call.layer(left), input=x, weight=weight[:, :, None], stride=(1,), padding=((0, 0),), dilation=(1,))


def _matrix(call: Call, name: str, other: str) -> Tensor | None:
    """A constant matrix, which may come again for every sample; None where that argument is something else.

    One of more axes than the other operand has would give the result more axes, too.
    """
    node = call.args[name]
    if isinstance(node, fx.Node) and _rank(call, name) > max(2, _rank(call, other)):
        return None
    while isinstance(node, fx.Node) and str(node.target) in ("aten.expand.default", "aten.unsqueeze.default"):
        node = node.args[0]
    found = call.constants.get(node.name) if isinstance(node, fx.Node) else None
    if found is None or found.dtype is not torch.float32 or found.dim() < 2 or found.shape[:-2].numel() != 1:
        return None
    return found.reshape(found.shape[-2:])


@_handles("addmm.default", "baddbmm.default")
def _addmm(call: Call) -> Step | None:
    """``beta bias + alpha x @ w``: how transformers' Conv1D, all of GPT-2, computes its layers."""
    left, right = ("batch1", "batch2") if "batch1" in call.args else ("mat1", "mat2")
    weight, bias, x = _matrix(call, right, left), call.constant("self"), call.value(left)
    if weight is None or bias is None or x is None or bias.numel() != bias.shape[-1] or bias.numel() != weight.shape[1]:
        return None
    weight, bias = weight * call.args["alpha"], bias.reshape(-1) * call.args["beta"]
    return Linear(**call.layer(right), input=x, weight=weight.T.contiguous(), bias=bias)


def _rank(call: Call, name: str) -> int:
    return int(call.args[name].meta["val"].dim())


@_handles("layer_norm.default")
def _layer_norm(call: Call) -> Step | None:
    x, (shape, _) = call.value("input"), call.sample("input")
    weight, bias = call.constant("weight"), call.constant("bias")
    if x is None or shape is None or tuple(call.args["normalized_shape"]) != shape[-1:]:
        return None
    if (weight is None and call.given("weight")) or (bias is None and call.given("bias")):
        return None
    return Norm(**call.layer(), input=x, weight=weight, bias=bias, eps=call.args["eps"])


@_handles("rms_norm.default")
def _rms_norm(call: Call) -> Step | None:
    x, (shape, _), weight = call.value("input"), call.sample("input"), call.constant("weight")
    if x is None or shape is None or tuple(call.args["normalized_shape"]) != shape[-1:]:
        return None
    if weight is None and call.given("weight"):
        return None
    eps = torch.finfo(torch.float32).eps if call.args["eps"] is None else call.args["eps"]
    return Norm(**call.layer(), input=x, weight=weight, bias=None, eps=eps, centred=False)


def _written_out_rms_norm(call: Call) -> Step | None:
    """``weight * x * rsqrt(mean(x^2) + eps)``: what of it is no product by itself is then read by nothing."""
    left, right = call.args["self"], call.args["other"]
    weight = None
    for constant, value in (("self", right), ("other", left)):
        if (found := call.constant(constant)) is not None and _is_call(value, "mul.Tensor"):
            weight, (left, right) = found, value.args[:2]
    for x, factor in ((left, right), (right, left)):
        if not (isinstance(x, fx.Node) and _is_call(factor, "rsqrt.default")):
            continue
        total = factor.args[0]
        if not (_is_call(total, "add.Tensor", "add.Scalar") and len(total.args) == 2 and not total.kwargs):
            continue
        mean, eps = total.args
        if not (isinstance(eps, (int, float)) and eps >= 0 and _is_call(mean, "mean.dim") and not mean.kwargs):
            continue
        square, axes, *keepdim = mean.args
        powers = [(x, 2), (x, 2.0), (x, x)]
        squared = _is_call(square, "pow.Tensor_Scalar", "mul.Tensor") and tuple(square.args) in powers
        shape = x.meta["val"].shape
        known = _dtype(x) is torch.float32 and x.name not in call.constants and isinstance(shape[-1], int)
        if not squared or keepdim != [True] or [a % len(shape) for a in axes] != [len(shape) - 1] or not known:
            continue
        if weight is not None and (weight.dim() != 1 or weight.shape[0] != shape[-1]):
            return None
        about = call.layer("self") if weight is not None and call.constant("self") is not None else call.layer("other")
        return Norm(**about, input=x.name, weight=weight, bias=None, eps=float(eps), centred=False)
    return None


def _is_call(node: Any, *targets: str) -> bool:
    return isinstance(node, fx.Node) and str(node.target) in [f"aten.{target}" for target in targets]


@_handles("group_norm.default", "instance_norm.default")
def _group_norm(call: Call) -> Step | None:
    x, shape = call.value("input"), call.shape("input")
    weight, bias = call.constant("weight"), call.constant("bias")
    if call.args.get("use_input_stats") is False:
        return _batch_norm(call)
    if x is None or shape is None:
        return None
    if (weight is None and call.given("weight")) or (bias is None and call.given("bias")):
        return None
    groups = call.args.get("num_groups", shape[0])  # a group each is an instance norm
    return GroupNorm(**call.layer(), input=x, groups=groups, weight=weight, bias=bias, eps=call.args["eps"])


@_handles("_native_batch_norm_legit_no_training.default", "batch_norm.default")
def _batch_norm(call: Call) -> Step | None:
    x, (shape, folded) = call.value("input"), call.sample("input")
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if (
        x is None
        or shape is None
        or (folded and len(shape) != 2)
        or mean is None
        or variance is None
        or call.args.get("training")
    ):
        return None
    weight, bias = call.constant("weight"), call.constant("bias")
    # gamma (x - mean) / sqrt(var + eps) + beta
    scale = torch.rsqrt(variance.double() + call.args["eps"])
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    axis: Literal[1, -1] = -1 if folded else 1
    return Affine(**call.layer(), input=x, scale=scale.float(), shift=shift.float(), axis=axis)


def _activation(call: Call, function: Activation) -> Step | None:
    x = call.value("self")
    return None if x is None else Affine(**call.labels, input=x, activation=function)


for _name in ("relu", "relu6", "silu", "tanh", "sigmoid", "hardswish", "hardsigmoid"):
    _HANDLERS[f"aten.{_name}.default"] = partial(_activation, function=_name)


def _of_mode(call: Call) -> Step | None:
    """A function of :mod:`rarefy.act`, in its mode."""
    x, args = call.value("x"), call.args
    if x is None or args["function"] not in MODED:
        return None
    activation = " ".join((args["function"], args["mode"], whole_table(args["table"]))).rstrip()
    return Affine(**call.labels, input=x, activation=activation)


_HANDLERS["rarefy.activation.default"] = _of_mode


@_handles("gelu.default")
def _gelu(call: Call) -> Step | None:
    return _activation(call, "gelu" if call.args["approximate"] == "none" else "gelu_tanh")


class _Expression:
    """What a call computes number by number, on its way to a step."""

    def __init__(self, call: Call) -> None:
        self.call, self.made = call, sample_shape(call.node, call.batch)
        self.operands: list[str] = []
        self.constants: list[Tensor] = []
        self.code: list[tuple[str, Any, Any]] = []

    def term(self, name: str) -> Any:
        """The argument of that name as a term, to be given to :meth:`add`; None where it is none."""
        given = self.call.args[name]
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return self.number(given)
        constant = self.call.constant(name)
        if constant is not None:
            return self.constant(constant)
        value, shape = self.call.value(name), self.call.shape(name)
        source = given
        while _is_call(source, "expand.default", "expand_as.default"):  # what broadcasts does without
            source = source.args[0]
        if source is not given and _dtype(source) is torch.float32 and source.name not in self.call.constants:
            wider = sample_shape(source, self.call.batch)
            if wider is not None and shape is not None and len(wider) == len(shape):
                value, shape = source.name, wider
        if value is None or shape is None or self.made is None or len(shape) != len(self.made):
            return None
        if value not in self.operands:
            self.operands.append(value)
        return ("operand", self.operands.index(value))

    def number(self, number: float) -> Any:
        """A number as a term."""
        return self.constant(torch.tensor(float(number)))

    def constant(self, constant: Tensor) -> Any:
        """A tensor as a term; None where it has more axes than the result, or one of its own for the batch."""
        axes = 0 if self.made is None else len(self.made)
        if constant.dim() == axes + 1 and constant.shape[0] == 1:
            constant = constant[0]
        if constant.dim() > axes:
            return None
        self.constants.append(constant.detach().float())
        return ("constant", len(self.constants) - 1)

    def add(self, operation: str, x: Any, y: Any = None) -> Any:
        """One more instruction; its result as a term."""
        self.code.append((operation, x, y))
        return ("result", len(self.code) - 1)

    def step(self) -> Step | None:
        """The step; None where there is no value in it or its shape is not known."""
        if not self.operands or self.made is None or not 1 <= len(self.made) <= 3:
            return None
        begins = {"operand": 0, "constant": len(self.operands), "result": len(self.operands) + len(self.constants)}

        def place(term: Any) -> int:
            return -1 if term is None else begins[term[0]] + term[1]

        return Pointwise(
            **self.call.layer("self"),
            operands=tuple(self.operands),
            code=tuple((operation, place(x), place(y)) for operation, x, y in self.code),
            constants=torch.cat([each.reshape(-1) for each in self.constants] or [torch.zeros(0)]),
            sizes=tuple(tuple(each.shape) for each in self.constants),
        )


def _of_one(call: Call, operation: str) -> Step | None:
    made = _Expression(call)
    x = made.term("self")
    if x is None:
        return None
    made.add(operation, x)
    return made.step()


def _of_two(call: Call, operation: str, swapped: bool = False) -> Step | None:
    made = _Expression(call)
    x, y = made.term("self"), made.term("other")
    if x is None or y is None or call.args.get("alpha", 1) != 1:
        return None
    made.add(operation, *((y, x) if swapped else (x, y)))
    return made.step()


for _name in ("neg", "abs", "sqrt", "rsqrt", "exp", "log", "mish"):
    _HANDLERS[f"aten.{_name}.default"] = partial(_of_one, operation=_name)
for _name, _operation in (("minimum", "min"), ("maximum", "max")):
    _HANDLERS[f"aten.{_name}.default"] = partial(_of_two, operation=_operation)
for _name in ("add", "sub", "mul", "div"):
    _HANDLERS[f"aten.{_name}.Scalar"] = partial(_of_two, operation=_name)
_HANDLERS["aten.rsub.Scalar"] = partial(_of_two, operation="sub", swapped=True)


@_handles("addcmul.default", "addcdiv.default")
def _with_product(call: Call) -> Step | None:
    """``self + value * tensor1 * tensor2``, or the quotient of these."""
    made = _Expression(call)
    x, first, second = (made.term(name) for name in ("self", "tensor1", "tensor2"))
    if x is None or first is None or second is None or not isinstance(call.args["value"], (int, float)):
        return None
    if call.args["value"] != 1:
        first = made.add("mul", first, made.number(call.args["value"]))
    made.add("add", x, made.add("mul" if "mul" in str(call.node.target) else "div", first, second))
    return made.step()


@_handles("softplus.default")
def _softplus(call: Call) -> Step | None:
    plain = call.args["beta"] == 1 and call.args["threshold"] >= 17  # from where on it is x in float32
    return _of_one(call, "softplus") if plain else None


@_handles("reciprocal.default", "square.default", "pow.Tensor_Scalar")
def _power(call: Call) -> Step | None:
    exponent = {"reciprocal": -1, "square": 2}.get(str(call.node.target).split(".")[1], call.args.get("exponent"))
    made = _Expression(call)
    x = made.term("self")
    if x is None:
        return None
    match exponent:
        case 2 | 3:
            square = made.add("mul", x, x)
            if exponent == 3:
                made.add("mul", square, x)
        case -1:
            made.add("div", made.number(1.0), x)
        case 0.5:
            made.add("sqrt", x)
        case -0.5:
            made.add("rsqrt", x)
        case _:
            return None
    return made.step()


@_handles("leaky_relu.default")
def _leaky_relu(call: Call) -> Step | None:
    slope = call.args["negative_slope"]
    return _activation(call, "leaky_relu") if slope == 0.01 else _where_negative(call, "leaky", slope)


@_handles("elu.default")
def _elu(call: Call) -> Step | None:
    plain = call.args["scale"] == 1 and call.args["input_scale"] == 1
    return _where_negative(call, "elu", call.args["alpha"]) if plain else None


def _where_negative(call: Call, operation: str, number: Any) -> Step | None:
    made = _Expression(call)
    x = made.term("self")
    if x is None or not isinstance(number, (int, float)):
        return None
    made.add(operation, x, made.number(number))
    return made.step()


@_handles("prelu.default")
def _prelu(call: Call) -> Step | None:
    slopes, shape = call.constant("weight"), call.shape("self")
    made = _Expression(call)
    x = made.term("self")
    if slopes is None or shape is None or x is None:
        return None
    made.add("leaky", x, made.constant(slopes.reshape(-1, *(1,) * (len(shape) - 1))))
    return made.step()


@_handles("hardtanh.default")
def _hardtanh(call: Call) -> Step | None:
    return _bounded(call, call.args["min_val"], call.args["max_val"])


@_handles("clamp.default", "clamp_min.default", "clamp_max.default")
def _clamp(call: Call) -> Step | None:
    return _bounded(call, call.args.get("min"), call.args.get("max"))


def _bounded(call: Call, low: Any, high: Any) -> Step | None:
    if (low, high) in ((0, 6), (0, None)):
        return _activation(call, "relu" if high is None else "relu6")
    made = _Expression(call)
    x = made.term("self")
    if x is None or not all(each is None or isinstance(each, (int, float)) for each in (low, high)):
        return None
    x = x if low is None else made.add("max", x, made.number(low))
    if high is not None:
        made.add("min", x, made.number(high))
    return made.step()


@_handles("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor")
def _arithmetic(call: Call) -> Step | None:
    op = call.node.target.__name__.partition(".")[0]  # type: ignore[union-attr]
    if call.args.get("alpha", 1) != 1:
        return None
    if op == "mul" and (norm := _written_out_rms_norm(call)) is not None:
        return norm
    return _simple_arithmetic(call, op) or _of_two(call, op)


def _simple_arithmetic(call: Call, op: str) -> Step | None:
    """A sum or a product of equal values, or of a value and one number a channel: what fuses into layers."""
    x, y, shape = call.value("self"), call.value("other"), call.shape("self")
    if x is not None and y is not None and op in ("add", "mul"):
        if call.sample("self")[0] is not None and call.sample("self") == call.sample("other"):
            return Binary(**call.labels, op=cast(Any, op), x=x, y=y)
        shape_y = call.shape("other")
        if shape is None or shape_y is None:
            return None
        if _is_vector_of(shape_y, shape):
            return Binary(**call.labels, op=cast(Any, op), x=x, y=y)
        return Binary(**call.labels, op=cast(Any, op), x=y, y=x) if _is_vector_of(shape, shape_y) else None
    swapped = x is None
    if swapped and op in ("add", "mul"):
        x, shape = y, call.shape("other")
    axis: Literal[1, -1]
    given, taken = ("self", "other") if swapped else ("other", "self")
    operand, axis = _per_channel(call, given, shape), 1
    if operand is None:
        operand, axis = _per_feature(call, given, call.sample(taken)[0]), -1
    if x is None or operand is None:
        return None
    match op:
        case "add":
            return Affine(**call.labels, input=x, shift=operand, axis=axis)
        case "sub":
            return Affine(**call.labels, input=x, shift=-operand, axis=axis)
        case "mul":
            return Affine(**call.labels, input=x, scale=operand, axis=axis)
        case "div" if not swapped:
            return Affine(**call.labels, input=x, scale=operand.double().reciprocal().float(), axis=axis)
    return None


def _is_vector_of(vector: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether it is one number for every channel of the other."""
    return len(vector) == len(shape) > 1 and vector[0] == shape[0] and math.prod(vector) == vector[0]


def _per_channel(call: Call, name: str, shape: tuple[int, ...] | None) -> Tensor | None:
    """A number or a constant tensor as one float32 for every channel of the other operand, if that is what it is."""
    given = call.args[name]
    if shape is None or not shape:
        return None
    if isinstance(given, (int, float)):
        return torch.full((shape[0],), float(given))
    constant = call.constant(name)
    if constant is None or constant.dim() > len(shape) + 1:
        return None
    if constant.numel() == 1:
        return constant.reshape(1).expand(shape[0]).contiguous()
    axis = constant.dim() - len(shape)  # of the channels, when aligned from the right
    channels = constant.numel() == shape[0] and axis >= 0 and constant.shape[axis] == shape[0]
    return constant.reshape(-1) if channels else None


def _per_feature(call: Call, name: str, sample: tuple[int, ...] | None) -> Tensor | None:
    """A constant tensor as one float32 for every entry of the other operand's last axis, if that is what it is."""
    constant = call.constant(name)
    if sample is None or constant is None or not constant.dim() or constant.dim() > len(sample) + 1:
        return None
    return constant.reshape(-1) if constant.numel() == constant.shape[-1] == sample[-1] else None


@_handles("max_pool1d.default", "max_pool2d.default")
def _max_pool(call: Call) -> Step | None:
    return _pool(call, "max", call.args["dilation"], count_include_pad=False)


@_handles("avg_pool1d.default", "avg_pool2d.default")
def _avg_pool(call: Call) -> Step | None:
    return None if call.given("divisor_override") else _pool(call, "average", 1, call.args["count_include_pad"])


def _pool(call: Call, op: Any, dilation: Any, count_include_pad: bool) -> Step | None:
    axes = int(call.node.target.__name__.partition("_pool")[2][0])  # type: ignore[union-attr]
    x, shape = call.value("self"), call.shape("self")
    if x is None or shape is None or len(shape) != axes + 1:
        return None
    kernel = _each(call.args["kernel_size"], axes)
    return Pool(
        **call.labels,
        input=x,
        op=op,
        kernel=kernel,
        stride=_each(call.args["stride"], axes) if call.args["stride"] else kernel,
        padding=_each(call.args["padding"], axes),
        dilation=_each(dilation, axes),
        ceil_mode=call.args["ceil_mode"],
        count_include_pad=count_include_pad,
    )


@_handles("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default")
def _adaptive_average(call: Call) -> Step | None:
    x, shape, sizes = call.value("self"), call.shape("self"), call.args["output_size"]
    if x is None or shape is None or len(shape) != len(sizes) + 1 or any(size != 1 for size in sizes):
        return None
    return GlobalAverage(**call.labels, input=x, keepdim=True)


@_handles("mean.dim")
def _mean(call: Call) -> Step | None:
    x, shape, axes = call.value("self"), call.shape("self"), call.args["dim"]
    if x is None or shape is None or call.given("dtype"):
        return None
    rank = len(shape) + 1
    if rank not in (3, 4) or not axes or {axis % rank for axis in axes} != set(range(2, rank)):
        return _reduce(call, "mean")
    return GlobalAverage(**call.labels, input=x, keepdim=call.args["keepdim"])


@_handles("sum.dim_IntList", "amax.default", "amin.default", "max.dim", "min.dim")
def _reduction(call: Call) -> Step | None:
    """Those that give back indices, too, where nobody reads them."""
    found = str(call.node.target).split(".")[1].removeprefix("a")
    if any(user.target is operator.getitem and user.args[1] != 0 for user in call.node.users):
        return None
    return None if call.given("dtype") else _reduce(call, cast(Reduction, found))


@_handles("linalg_vector_norm.default", "norm.ScalarOpt_dim")
def _vector_norm(call: Call) -> Step | None:
    plain = call.args.get("ord", call.args.get("p")) in (2, None) and not call.given("dtype")
    return _reduce(call, "norm") if plain else None


def _reduce(call: Call, op: Reduction) -> Step | None:
    x, shape, given = call.value("self"), call.shape("self"), call.args["dim"]
    if x is None or not shape or given is None or given == []:
        return None
    rank = len(shape) + 1
    axes = tuple(sorted({axis % rank - 1 for axis in _each(given, 1)}))
    alone = len(axes) == len(shape) and not call.args["keepdim"]  # a number a sample has no axis to be a plane of
    if axes[0] < 0 or alone or 0 in shape:
        return None
    return Reduce(**call.labels, input=x, op=op, axes=axes, keepdim=call.args["keepdim"])


@_handles("cat.default")
def _concat(call: Call) -> Step | None:
    return _channels(call) or _side_by_side(call, stacked=False)


@_handles("stack.default")
def _stack(call: Call) -> Step | None:
    return _side_by_side(call, stacked=True)


def _side_by_side(call: Call, stacked: bool) -> Step | None:
    """Values one after the other along any axis but the batch's, or along a new one."""
    nodes = call.args["tensors"]
    whole, folded = _whole(call.node, call)
    samples = [_whole(node, call) for node in nodes]
    axis = call.args["dim"] % call.node.meta["val"].dim() - 1 + folded
    if whole is None or axis < folded:
        return None
    parts, shapes, begins, at = list[Places](), list[tuple[int, ...]](), list[tuple[int, ...]](), 0
    for node, (sample, fold) in zip(nodes, samples, strict=True):
        if sample is None or fold != folded or _dtype(node) is not torch.float32 or node.name in call.constants:
            return None
        if 0 in sample:
            return None
        axes: list[int] = [each + (stacked and each >= axis) for each in range(len(sample))]
        parts.append(contiguous(node.name, sample, axes, len(whole)))
        shapes.append((*sample[:axis], 1, *sample[axis:]) if stacked else sample)
        begins.append(tuple(at if each == axis else 0 for each in range(len(whole))))
        at += shapes[-1][axis]
    return Join(
        **call.labels,
        sizes=whole,
        parts=tuple(parts),
        shapes=tuple(shapes),
        begins=tuple(begins),
        folded=folded,
    )


@_handles("roll.default")
def _roll(call: Call) -> Step | None:
    """The two ends along each rolled axis, exchanged."""
    x, (sample, folded), axes = call.value("self"), _whole(call.args["self"], call), call.args["dims"]
    if x is None or sample is None or not axes or not all(isinstance(by, int) for by in call.args["shifts"]):
        return None
    rank, shifts = len(sample) + 1 - folded, [0] * len(sample)
    for axis, by in zip(axes, call.args["shifts"], strict=True):
        if axis % rank == 0:
            return None
        shifts[axis % rank - 1 + folded] += by
    strides = contiguous(x, sample, [*range(len(sample))], len(sample)).strides
    ends = list[list[tuple[int, int, int]]]()  # along each axis: where in the result, where in x, how many
    for size, by in zip(sample, shifts, strict=True):
        first = by % size
        ends.append([(first, 0, size - first), *([(0, size - first, first)] if first else [])])
    parts, shapes, begins = list[Places](), list[tuple[int, ...]](), list[tuple[int, ...]]()
    for corner in itertools.product(*ends):
        offset = sum(start * stride for (_, start, _), stride in zip(corner, strides, strict=True))
        parts.append(Places(x, math.prod(sample), strides, offset))
        shapes.append(tuple(count for _, _, count in corner))
        begins.append(tuple(at for at, _, _ in corner))
    return Join(
        **call.labels,
        sizes=sample,
        parts=tuple(parts),
        shapes=tuple(shapes),
        begins=tuple(begins),
        folded=folded,
    )


def _whole(node: fx.Node, call: Call) -> tuple[tuple[int, ...] | None, bool]:
    """The shape of one sample of a node, and whether its first size is part of dimension 0."""
    shape, fold, inner = sample_shapes(node, call.batch)
    return ((fold, *inner), True) if inner is not None else (shape, False)


def _channels(call: Call) -> Step | None:
    operands = call.args["tensors"]
    shapes = [sample_shape(node, call.batch) for node in operands]
    plain = all(_dtype(node) is torch.float32 and node.name not in call.constants for node in operands)
    if not plain or any(shape is None for shape in shapes) or call.args["dim"] % (len(shapes[0] or ()) + 1) != 1:
        return None
    return Concat(**call.labels, operands=tuple(node.name for node in operands))


@_handles("upsample_nearest1d.vec", "upsample_nearest2d.vec")
def _upsample(call: Call) -> Step | None:
    x, shape, out = call.value("input"), call.shape("input"), sample_shape(call.node, call.batch)
    if x is None or shape is None or out is None:
        return None
    return _repeated(call, x, shape, out) or (_resize(call, "nearest") if len(shape) == 3 else None)


@_handles("upsample_bilinear2d.vec")
def _bilinear(call: Call) -> Step | None:
    return _resize(call, "bilinear")


def _resize(call: Call, mode: Literal["nearest", "bilinear"]) -> Step | None:
    x, shape, out = call.value("input"), call.shape("input"), sample_shape(call.node, call.batch)
    if x is None or shape is None or out is None or len(shape) != 3:
        return None
    factors: tuple[float, float] | None = None
    if call.args["output_size"] is None:
        down, across = call.args["scale_factors"]
        factors = (float(down), float(across))
    aligned = bool(call.args.get("align_corners"))
    return Resize(**call.labels, input=x, mode=mode, sizes=(out[1], out[2]), factors=factors, align_corners=aligned)


def _repeated(call: Call, x: str, shape: tuple[int, ...], out: tuple[int, ...]) -> Step | None:
    """Every pixel so many times, where that is what the call does."""
    sizes, factor = shape[1:], tuple(after // before for before, after in zip(shape[1:], out[1:], strict=True))
    if any(after % before for before, after in zip(sizes, out[1:], strict=True)):
        return None
    # A scale that is no whole number (2.1), or rounds badly (1 / 49), takes other pixels though the sizes divide.
    for axis, (size, times) in enumerate(zip(sizes, factor, strict=True)):
        ramp = torch.arange(float(size)).reshape(-1, *(1,) * (len(sizes) - 1 - axis))
        given = ramp.expand(1, 1, *sizes)
        taken = call.node.target(given, call.args["output_size"], call.args["scale_factors"])  # type: ignore[operator]
        if not torch.equal(taken, ramp.repeat_interleave(times, 0).expand_as(taken)):
            return None
    return Upsample(**call.labels, input=x, factor=factor)


@_handles(
    *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints"),
    *("squeeze.default", "squeeze.dim", "squeeze.dims"),
)
def _flatten(call: Call) -> Step | None:
    x, shape, out = call.value("self"), call.shape("self"), sample_shape(call.node, call.batch)
    if x is None or shape is None or out is None or len(out) != 1 or len(shape) < 2:
        return None
    return Flatten(**call.labels, input=x)
