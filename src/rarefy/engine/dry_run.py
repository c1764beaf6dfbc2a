"""A dry run: what the items of an engine make of inputs that have shapes and no numbers.

A file may ask PyTorch for anything that its operators can do. On PyTorch's device "meta" they work out shapes alone:
what does not fit together is found, and what would fill the memory, before a number is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.engine.building import NativeSegment
from rarefy.engine.eager import Eager
from rarefy.engine.expressions import check_pointwise
from rarefy.engine.functions import check_mode
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item, uses
from rarefy.engine.named import resolve
from rarefy.engine.onednn import PackedConv
from rarefy.engine.plan import ACTIVATIONS, Conv, Linear, Norm, Operator, Pointwise, Recurrence, Ref, Step, tensors
from rarefy.engine.reference import run_step

#: Whose operators a file may name.
NAMESPACES = ("aten", "rarefy", "python")
#: The most numbers of one value, and the largest size that a value which is a number may be.
MOST_NUMBERS, LARGEST_INTEGER = 1 << 30, 1 << 40

# Operators that read files or memory, or that trust their arguments: their names say so, or begin with an underscore.
_UNSAFE = ("from_file", "as_strided", "empty", "sparse", "quantize", "fbgemm", "mkldnn", "cudnn", "miopen", "backward")
_INTERNAL = {
    *("_to_copy", "_softmax", "_log_softmax", "_adaptive_avg_pool2d", "_native_batch_norm_legit_no_training"),
    *("__and__", "__or__", "__xor__"),
    *("_assert_scalar", "_assert_tensor_metadata", "_assert_async", "_weight_norm_interface", "_unsafe_view"),
}


def check_target(target: str) -> None:
    """Raise ValueError for an operator that a file may not name."""
    namespace, _, name = target.partition(".")
    name = name.partition(".")[0]
    internal = name.startswith("_") and name not in _INTERNAL
    unsafe = namespace == "aten" and (internal or any(word in name for word in _UNSAFE))
    if namespace not in NAMESPACES or unsafe:
        raise ValueError(
            f"the engine runs {target}, which cannot be saved: a file names operators of PyTorch and rarefy alone, and "
            "none that works on memory as it is. Save the model and compile it where it is used"
        )
    function = resolve(target)
    if namespace != "python" and function._schema.is_mutable:  # type: ignore[attr-defined]
        raise ValueError(f"the engine runs {target}, which changes its arguments: that cannot be saved")


def dry_run(items: Sequence[Item], inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values that the items make of ``inputs``, without their numbers; tensors are on the device "meta".

    Raises ValueError where an item does not fit what it reads, or what it makes is too large.
    """
    values: dict[str, Any] = {name: x.to("meta") for name, x in {**constants, **inputs}.items()}
    for item in items:
        try:
            made = _made(item, values)
        except Exception as error:  # whatever PyTorch says to arguments that do not fit
            _, what = uses(item)
            if isinstance(item, Operator) and _reads_numbers(item, error):
                raise ValueError(
                    f"the engine runs {item.target}, which must read numbers to tell what it makes: it cannot be "
                    "saved, since a file is checked on shapes alone. Save the model and compile it where it is used"
                ) from error
            raise ValueError(f"what makes {', '.join(what)} cannot run: {str(error).splitlines()[:1]}") from error
        for name, value in made.items():
            _check_size(name, value)
        values.update(made)
    return values


def _reads_numbers(step: Operator, error: Exception) -> bool:
    """Whether an operator fails on the device "meta" whatever it is given: it, or what it calls, needs numbers."""
    depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return isinstance(error, NotImplementedError) or not depends.isdisjoint(getattr(resolve(step.target), "tags", ()))


def _made(item: Item, values: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(item, NativeSegment):
        xs = [values[port.value] for port in item.inputs]
        batches = {port.batch(x.shape) for x, port in zip(xs, item.inputs, strict=True)}
        if any(x.dtype is not port.dtype for x, port in zip(xs, item.inputs, strict=True)) or len(batches) != 1:
            raise ValueError("its inputs have other shapes")
        (batch,) = batches
        return {port.value: torch.empty(port.whole(batch), dtype=port.dtype, device="meta") for port in item.outputs}
    if isinstance(item, Eager):
        raise ValueError("a model is no part of a file")
    step = item.step if isinstance(item, (PackedConv, Int8)) else item
    if isinstance(step, Conv):
        check_conv(step, tuple(values[step.input].shape))
    if isinstance(step, Recurrence):
        check_recurrence(step, [values[name] for name in step.inputs])
    if isinstance(step, Operator) and not step.target.startswith("python."):
        _check_axes(step, values)
        if (made := _by_number(step, values)) is not None:
            return {item.output: made}
    if step is item and (shape := plain_shape(step, values)) is not None:
        return {item.output: torch.empty(shape, dtype=torch.float32, device="meta")}
    bare = _without_numbers(step)
    return {item.output: run_step(replace(item, step=bare) if isinstance(item, Int8) else bare, values)}


#: Operators that compute number by number, and what they may be given: contiguous tensors of float32 (f) and of
#: booleans (b), Python's floats (d) and integers (i). They make what their first argument is; where() what its last is.
_BY_NUMBER = {
    **{f"aten.{name}.Tensor": ("ff", "fd", "fi") for name in ("add", "sub", "mul", "div")},
    **{f"aten.{name}.default": ("f",) for name in ("abs", "cos", "exp", "neg", "rsqrt", "sin", "sqrt", "tanh")},
    **{f"aten.{name}.Tensor": ("bb",) for name in ("__and__", "__or__", "bitwise_and", "bitwise_or")},
    **{f"aten.{name}.default": ("b",) for name in ("bitwise_not", "logical_not")},
    "aten.masked_fill.Scalar": ("fbd", "fbi"),
    "aten.where.self": ("bff",),
}


def _by_number(step: Operator, values: Mapping[str, Any]) -> Tensor | None:
    """What one of these operators makes; None for anything else, as :func:`plain_shape`, and for the same reason."""
    if step.target not in _BY_NUMBER or step.kwargs:
        return None
    given = [values[each.name] if isinstance(each, Ref) else each for each in step.args]
    if "".join(map(_letter, given)) not in _BY_NUMBER[step.target]:
        return None
    dtype = given[-1 if step.target == "aten.where.self" else 0].dtype
    shape = np.broadcast_shapes(*(x.shape for x in given if isinstance(x, Tensor)))
    return torch.empty(shape, dtype=dtype, device="meta")


def _letter(x: Any) -> str:
    """What an argument is, as :data:`_BY_NUMBER` has it; "?" for anything else."""
    if isinstance(x, Tensor):
        kind = {torch.float32: "f", torch.bool: "b"}.get(x.dtype, "?")
        return kind if x.layout is torch.strided and x.is_contiguous() else "?"
    return "d" if type(x) is float else "i" if type(x) is int and abs(x) <= LARGEST_INTEGER else "?"


def plain_shape(step: Step, values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of what a layer, a norm or an expression makes where all it reads is contiguous float32 and fits.

    None for anything else: PyTorch decides, which takes up to a millisecond a step on the device "meta".
    """
    if not isinstance(step, (Linear, Norm, Pointwise)):
        return None
    given = [values[name] for name in step.inputs]
    if not all(_is_plain(x) for x in (*given, *tensors(step).values())):
        return None
    shape = tuple(given[0].shape)
    match step:
        case Linear(weight=weight, bias=bias):
            out = (*shape[:-1], *weight.shape[:1])
            fits = weight.dim() == 2 and shape[-1:] == weight.shape[1:] and step.activation in ACTIVATIONS
            biased = bias is None or bias.shape == weight.shape[:1]
            return out if fits and biased and all(x.shape == out for x in given[1:]) else None
        case Norm(weight=weight, bias=bias):
            fits = bool(shape) and all(each is None or each.shape == shape[-1:] for each in (weight, bias))
            return shape if fits and step.axis == -1 and type(step.eps) is float else None
        case Pointwise():
            check_pointwise(step)
            shapes = [*(tuple(x.shape) for x in given), *(tuple(part.shape) for part in step.split())]
            for _, x, y in step.code:
                shapes.append(shapes[x] if y < 0 else np.broadcast_shapes(shapes[x], shapes[y]))
            return shapes[-1]


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype is torch.float32 and x.layout is torch.strided and x.is_contiguous()


def check_recurrence(step: Recurrence, given: Sequence[Tensor]) -> None:
    """Raise ValueError for a recurrence whose weights and operands do not fit together, or that has no such gates."""
    products, *states = given
    rows, hidden = step.weight.shape if step.weight.dim() == 2 else (0, 0)
    gates = rows // hidden if hidden else 0
    fits = products.dim() == 3 and products.shape[2] == rows == gates * hidden and products.shape[1] > 0
    begins = len(states) in (0, gates - 2) and all(x.shape == (products.shape[0], hidden) for x in states)
    floats = all(x.dtype is torch.float32 for x in (*given, step.weight, *(() if step.bias is None else (step.bias,))))
    biased = step.bias is None or (gates == 3 and tuple(step.bias.shape) == (hidden,))
    if gates not in (3, 4) or not (fits and begins and floats and biased):
        found = [tuple(x.shape) for x in given]
        raise ValueError(f"weights of {tuple(step.weight.shape)} do not fit products and states of {found}")
    if not isinstance(step.reverse, bool) or not isinstance(step.cells, bool) or (step.cells and gates == 3):
        raise ValueError("its direction or what it gives is none")
    check_mode("tanh", step.mode, step.table)


def check_conv(step: Conv, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a convolution that inputs of this shape do not go through."""
    axes = len(step.stride)
    whole = [*step.stride, *step.dilation, step.groups, *(size for pair in step.padding for size in pair), *shape]
    if not all(type(number) is int and 0 <= number <= 1 << 30 for number in whole):
        raise ValueError(f"its sizes are {whole}")
    per_axis = {axes, len(step.dilation), len(step.padding), step.weight.dim() - 2, len(shape) - 2}
    if (
        per_axis not in ({1}, {2}, {3})
        or min(*step.stride, *step.dilation, step.groups) < 1
        or step.weight.numel() == 0
    ):
        raise ValueError("its stride, dilation, padding and groups do not fit its weights")
    out, each = step.weight.shape[:2]
    room = [
        size + sum(pair) - d * (k - 1)
        for size, pair, d, k in zip(shape[2:], step.padding, step.dilation, step.weight.shape[2:], strict=True)
    ]
    if out % step.groups or shape[1] != each * step.groups or min(room) < 1 or math.prod(shape) > MOST_NUMBERS:
        raise ValueError(f"weights of {tuple(step.weight.shape)} do not fit an input of {shape}")
    if step.bias is not None and tuple(step.bias.shape) != (out,):
        raise ValueError(f"its bias has the shape {tuple(step.bias.shape)}")


def _given(step: Operator) -> dict[str, Any]:
    """The arguments of an operator of PyTorch by their names."""
    schema = resolve(step.target)._schema  # type: ignore[attr-defined]
    return dict(zip((argument.name for argument in schema.arguments), step.args, strict=False)) | {**step.kwargs}


def _check_place(step: Operator) -> None:
    """New tensors lie where the engine's numbers do, which the device "meta" does not see."""
    given = _given(step)
    device, pinned = given.get("device"), given.get("pin_memory")
    if device not in (None, torch.device("cpu")) or pinned not in (None, False):
        raise ValueError(
            f"{step.target} makes tensors on the CPU, not pinned; got device={device}, pin_memory={pinned}"
        )


def _check_axes(step: Operator, values: Mapping[str, Any]) -> None:
    """Not every operator looks at its axes on the device "meta": softmax, sort and some others do not."""
    schema = resolve(step.target)._schema  # type: ignore[attr-defined]
    given = _given(step)
    first = next(iter(given.values()), None)
    tensor = values[first.name] if isinstance(first, Ref) else first
    if isinstance(tensor, Tensor):
        axes = max(tensor.dim(), 1) + (schema.name == "aten::unsqueeze")
        for name, axis in given.items():
            if name.startswith("dim") and type(axis) is int and not -axes <= axis < axes:
                raise ValueError(f"{step.target} has no axis {axis}")


def _without_numbers(step: Step) -> Step:
    if isinstance(step, Operator):
        schema = None if step.target.startswith("python.") else resolve(step.target)._schema  # type: ignore[attr-defined]
        args, kwargs = _bare(list(step.args)), {name: _bare(value) for name, value in step.kwargs.items()}
        if step.target.startswith("python."):
            _check_numbers(step.target, args)
        elif schema is not None and any(argument.name == "device" for argument in schema.arguments):
            _check_place(step)
            kwargs["device"] = torch.device("meta")
        return replace(step, args=tuple(args), kwargs=kwargs)
    bare: dict[str, Any] = {name: value.to("meta") for name, value in tensors(step).items()}
    return replace(step, **bare)


def _bare(argument: Any) -> Any:
    """An argument with its tensors on the device "meta"."""
    if isinstance(argument, Tensor):
        return argument.to("meta")
    if isinstance(argument, (list, tuple)):
        return type(argument)(_bare(each) for each in argument)
    return argument


def _check_numbers(target: str, args: Sequence[Any]) -> None:
    """Python's integers have no end, and its strings and lists multiply."""
    for argument in args:
        small = isinstance(argument, (bool, int, float)) and abs(argument) <= LARGEST_INTEGER
        if not small and not isinstance(argument, Ref):
            raise ValueError(f"{target} takes numbers up to {LARGEST_INTEGER}, got {argument!r:.80}")
    if target == "python.pow" and not (type(args[-1]) in (int, float) and abs(args[-1]) <= 8):
        raise ValueError(f"{target} takes exponents up to 8, got {args[-1]!r:.80}")


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        for each in value:
            _check_size(name, each)
    elif isinstance(value, Tensor):
        if value.numel() > MOST_NUMBERS:
            raise ValueError(f"{name} would have {value.numel()} numbers: at most {MOST_NUMBERS} are computed")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"{name} would be a number above {LARGEST_INTEGER}")
