"""The functions that a plan names: operators of PyTorch and of rarefy, and Python's own on sizes."""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

#: The functions on numbers (sizes) that a graph may hold beside operators.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"python.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "getitem")
    },
    **{f"python.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")},
    **{f"python.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    "python.sym_max": torch.sym_max,
    "python.sym_min": torch.sym_min,
    "python.sym_not": torch.sym_not,
    "python.sym_float": torch.sym_float,
    "python.sym_int": torch.sym_int,
}


@functools.cache
def resolve(target: str) -> Callable[..., Any]:
    """The function that an :class:`Operator` names. Raises ValueError for one that is not there."""
    if target in FUNCTIONS:
        return FUNCTIONS[target]
    found: Any = torch.ops
    if target.startswith("rarefy."):
        importlib.import_module("rarefy.act.functional")  # registers them
    try:
        namespace, name, overload = target.split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"PyTorch {torch.__version__} has no operator {target!r}") from error
    result: Callable[..., Any] = found
    return result


#: Operators that PyTorch's own Python functions reach in half the time that ``torch.ops`` takes; the arguments are the
#: same, those of the schema in its order.
_BINDINGS: dict[str, Callable[..., Any]] = {
    **{
        f"aten.{name}": getattr(torch._C._VariableFunctions, name.partition(".")[0])  # torch.split is a Python function
        for name in (
            *("abs.default", "add.Tensor", "addcmul.default", "addmm.default", "amax.default", "argmax.default"),
            *("baddbmm.default", "bitwise_and.Tensor", "bitwise_not.default", "bmm.default", "cat.default"),
            *("chunk.default", "clamp.default", "clamp_min.default", "cos.default", "cumsum.default", "div.Tensor"),
            *("embedding.default", "eq.Scalar", "eq.Tensor", "erf.default", "exp.default", "flatten.using_ints"),
            *("flip.default", "gather.default", "ge.Scalar", "gt.Scalar", "index_select.default", "le.Tensor"),
            *("layer_norm.default", "log.default", "log1p.default", "logical_and.default", "logical_not.default"),
            *("lt.Scalar", "lt.Tensor", "masked_fill.Scalar", "matmul.default", "mean.dim", "mm.default"),
            *("mul.Tensor", "ne.Scalar", "neg.default", "permute.default", "pow.Tensor_Scalar", "reciprocal.default"),
            *("relu.default", "reshape.default", "roll.default", "rsqrt.default", "rsub.Scalar", "select.int"),
            *("sigmoid.default", "sin.default", "softmax.int", "split.Tensor", "split_with_sizes.default"),
            *("sqrt.default", "squeeze.dim"),
            *("stack.default", "sub.Tensor", "sum.dim_IntList", "tanh.default", "transpose.int", "unbind.int"),
            *("unsqueeze.default", "where.self"),
        )
    },
    **{
        f"aten.{name}.default": getattr(torch._C._nn, name)
        for name in ("gelu", "linear", "pad", "scaled_dot_product_attention", "silu", "softplus")
    },
    "aten.expand.default": torch.Tensor.expand,
}


def binding(target: str) -> Callable[..., Any]:
    """The fastest function that computes what :func:`resolve` names, called with the same arguments."""
    return _BINDINGS.get(target) or resolve(target)
