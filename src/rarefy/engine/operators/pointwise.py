"""What is computed number by number: activations, arithmetic, and expressions of these."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rarefy.engine.functions import whole_table
from rarefy.engine.nodes import is_call, sample_shape
from rarefy.engine.operators.calls import Call, handles
from rarefy.engine.operators.norms import written_out_rms_norm
from rarefy.engine.plan import MODED, Activation, Affine, Binary, Pointwise, Step


def _activation(call: Call, function: Activation) -> Step | None:
    x = call.value("self")
    return None if x is None else Affine(**call.labels, input=x, activation=function)


@handles(
    *("aten.relu.default", "aten.relu6.default", "aten.silu.default", "aten.tanh.default", "aten.sigmoid.default"),
    *("aten.hardswish.default", "aten.hardsigmoid.default"),
)
def _plain_activation(call: Call) -> Step | None:
    return _activation(call, call.operator)


@handles("rarefy.activation.default")
def _of_mode(call: Call) -> Step | None:
    """A function of :mod:`rarefy.act`, in its mode."""
    x, args = call.value("x"), call.args
    if x is None or args["function"] not in MODED:
        return None
    activation = " ".join((args["function"], args["mode"], whole_table(args["table"]))).rstrip()
    return Affine(**call.labels, input=x, activation=activation)


@handles("aten.gelu.default")
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
        while is_call(source, "aten.expand.default", "aten.expand_as.default"):  # what broadcasts does without
            source = source.args[0]
        if source is not given and self.call.computes(source):
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
        return self.constant(torch.tensor(float(number), dtype=torch.float32))

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
            constants=torch.cat([each.reshape(-1) for each in self.constants] or [torch.zeros(0, dtype=torch.float32)]),
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


@handles(
    *("aten.neg.default", "aten.abs.default", "aten.sqrt.default", "aten.rsqrt.default", "aten.exp.default"),
    *("aten.log.default", "aten.mish.default"),
)
def _function(call: Call) -> Step | None:
    return _of_one(call, call.operator)


@handles("aten.minimum.default", "aten.maximum.default")
def _extreme(call: Call) -> Step | None:
    return _of_two(call, {"minimum": "min", "maximum": "max"}[call.operator])


@handles("aten.add.Scalar", "aten.sub.Scalar", "aten.mul.Scalar", "aten.div.Scalar")
def _with_number(call: Call) -> Step | None:
    return _of_two(call, call.operator)


@handles("aten.rsub.Scalar")
def _from_number(call: Call) -> Step | None:
    return _of_two(call, "sub", swapped=True)


@handles("aten.addcmul.default", "aten.addcdiv.default")
def _with_product(call: Call) -> Step | None:
    """``self + value * tensor1 * tensor2``, or the quotient of these."""
    made = _Expression(call)
    x, first, second = (made.term(name) for name in ("self", "tensor1", "tensor2"))
    if x is None or first is None or second is None or not isinstance(call.args["value"], (int, float)):
        return None
    if call.args["value"] != 1:
        first = made.add("mul", first, made.number(call.args["value"]))
    made.add("add", x, made.add("mul" if call.operator == "addcmul" else "div", first, second))
    return made.step()


@handles("aten.softplus.default")
def _softplus(call: Call) -> Step | None:
    plain = call.args["beta"] == 1 and call.args["threshold"] >= 17  # from where on it is x in float32
    return _of_one(call, "softplus") if plain else None


@handles("aten.reciprocal.default", "aten.square.default", "aten.pow.Tensor_Scalar")
def _power(call: Call) -> Step | None:
    exponent = {"reciprocal": -1, "square": 2}.get(call.operator, call.args.get("exponent"))
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


@handles("aten.leaky_relu.default")
def _leaky_relu(call: Call) -> Step | None:
    slope = call.args["negative_slope"]
    return _activation(call, "leaky_relu") if slope == 0.01 else _where_negative(call, "leaky", slope)


@handles("aten.elu.default")
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


@handles("aten.prelu.default")
def _prelu(call: Call) -> Step | None:
    slopes, shape = call.constant("weight"), call.shape("self")
    made = _Expression(call)
    x = made.term("self")
    if slopes is None or shape is None or x is None:
        return None
    made.add("leaky", x, made.constant(slopes.reshape(-1, *(1,) * (len(shape) - 1))))
    return made.step()


@handles("aten.hardtanh.default")
def _hardtanh(call: Call) -> Step | None:
    return _bounded(call, call.args["min_val"], call.args["max_val"])


@handles("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
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


@handles("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor")
def _arithmetic(call: Call) -> Step | None:
    op = call.operator
    if call.args.get("alpha", 1) != 1:
        return None
    if op == "mul" and (norm := written_out_rms_norm(call)) is not None:
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
        return torch.full((shape[0],), float(given), dtype=torch.float32)
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
