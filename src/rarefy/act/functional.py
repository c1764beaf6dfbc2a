"""tanh, sigmoid, silu, gelu and their kin on tensors: native kernels on the CPU, Triton's on a GPU, else PyTorch.

The bits are the same on each.

Formats: bfloat16, float16, float32, float8_e4m3fn, float8_e5m2. Modes: see :mod:`rarefy.act.spec.reference`. Error of
``mode="exact"``: none beyond correct rounding in formats of at most 16 bits; in float32 tanh is within 6 units of the
last place and 1.3e-7, sigmoid, silu and gelu within 1 unit, all others within 0.51 units.

Under torch.compile the functions are traced as plain operators, which Inductor fuses with what stands around them
(but float32, where the fused form is slow or rounds otherwise, is one operator that runs the kernel).
So they are in ONNX, and in a graph of ``torch.export`` where no gradient is needed, which then needs no rarefy to run:
in a form of their own, :mod:`rarefy.act.kernels.plain`. Otherwise they are one operator in what is exported or traced,
``rarefy::activation``.

The way of a call, the first of these that fits (:func:`_call`; below ``out`` they are those of :func:`_result`):

====================================================  ==================================================================
who calls                                             what computes
====================================================  ==================================================================
torch.compile, torch.export (``_traced``)             plain operators; float32 and gradients of an export: our operator
a plain tensor of a kind that was computed before     the kernel, at once
a subclass or proxy with ``__torch_function__``       what that makes of the public function (``_overridden``)
``out=`` (``_into``)                                  the kernel into ``out``, or a copy of what follows
vmap, grad, jvp; tangents of forward mode             ``operator.apply``, a function of autograd with both derivatives
torch.onnx.export by tracing                          plain operators that ONNX has (``plain.activation``)
a plain tensor without a gradient                     ``operator.forward``: the kernel, or plain operators
all others: a gradient, fake tensors, DTensor         ``rarefy::activation``, which calls ``operator.forward``
====================================================  ==================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from rarefy import kernels
from rarefy.act import gradients, operator
from rarefy.act.kernels import aten, launch, plain
from rarefy.act.spec.table import Table
from rarefy.kernels._memory import address


def tanh(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return the hyperbolic tangent of every element, in [-1, 1], odd.

    Args:
        x: a floating-point tensor of any shape and layout.
        mode: "exact", "fast" (float32 to a few units of the last place, the other formats as "exact"), "ktanh"
            (K-TanH, arXiv 1909.07729, or ``table``) or "hard" (HardTanh). ``mish``, ``softplus``, ``hardswish``,
            ``elu`` and ``exp`` have "exact" alone.
        grad: "y" (1 - y^2, as PyTorch; the default) or "x" (from the input); in mode "hard" only "x".
        out: where to put the result, of the same shape and dtype; ``x`` itself computes in place. No gradient then.
        table: for mode "ktanh": a :class:`Table` of the input's format, the name of a shipped one, or a ``.json`` file,
            which is read in every call (under torch.compile when the graph is made).

    Raises TypeError for integers, complex numbers and float64; ValueError for an unknown mode or gradient, for a table
    of another format or function, for a file that holds none, and for an ``out`` that does not match.

    """
    return _call("tanh", x, mode, grad, out, table)


def sigmoid(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return the logistic function 1 / (1 + e^-x) of every element, in [0, 1]; arguments and errors as :func:`tanh`."""
    return _call("sigmoid", x, mode, grad, out, table)


def silu(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return SiLU or Swish, x * sigmoid(x); arguments and errors as :func:`tanh`, but ``grad`` is "x" alone."""
    return _call("silu", x, mode, grad, out, table)


def gelu(
    x: Tensor,
    mode: str = "exact",
    *,
    approximate: str = "none",
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return GELU: x Phi(x) for ``approximate="none"``, by tanh for "tanh" (mode "ktanh" always has that form).

    Other arguments and errors as :func:`tanh`, but ``grad`` is "x" alone.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    return _call("gelu" if approximate == "none" else "gelu_tanh", x, mode, grad, out, table)


def quick_gelu(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return x * sigmoid(1.702 x), QuickGELU; arguments and errors as :func:`tanh`, but ``grad`` is "x" alone.

    Mode "ktanh" takes the table of tanh at 0.851 x, mode "hard" is that of :func:`gelu`.
    """
    return _call("quick_gelu", x, mode, grad, out, table)


def mish(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return Mish (arXiv 1908.08681), x * tanh(log(1 + e^x)); as :func:`tanh`, but "exact" and ``grad`` "x" alone."""
    return _call("mish", x, mode, grad, out, table)


def softplus(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return log(1 + e^x), above 0; as :func:`tanh`, but "exact" and ``grad`` "x" alone.

    It is the true function: PyTorch's gives x above its threshold, 20, where the two differ by 2e-9. PyTorch's ``beta``
    is softplus(beta * x) / beta.
    """
    return _call("softplus", x, mode, grad, out, table)


def hardswish(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return x * min(max(x + 3, 0), 6) / 6 (arXiv 1905.02244); as :func:`tanh`, but "exact" and ``grad`` "x" alone."""
    return _call("hardswish", x, mode, grad, out, table)


def elu(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return x where it is positive, else e^x - 1; as :func:`tanh`, but "exact" and ``grad`` "x" alone.

    PyTorch's ``alpha`` is 1 here.
    """
    return _call("elu", x, mode, grad, out, table)


def exp(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | Path | None = None,
) -> Tensor:
    """Return e^x, the exponent of softmax; as :func:`tanh`, but mode "exact" alone.

    What is too large is infinity, or NaN in float8_e4m3fn, which has none.
    """
    return _call("exp", x, mode, grad, out, table)


def _call(
    function: str, x: Tensor, mode: str, grad: str | None, out: Tensor | None, table: Table | str | Path | None
) -> Tensor:
    """Make one call by the first road that it can take; see the table at the top."""
    if torch.compiler.is_compiling():
        return _traced(function, x, mode, grad, out, table)
    plain_call = type(x) is Tensor and type(mode) is str and table is None and grad is None
    if plain_call and not (x.requires_grad and torch.is_grad_enabled()):
        kernel = launch.ready.get((function, mode, x.dtype, x.device, kernels.isa()))
        if kernel is not None and launch.is_plain(x) and x.is_contiguous() and not x.is_neg() and not launch.watched():
            if out is None:
                y = torch.empty_like(x)
                launch.launch(kernel, x, y)
                return y
            if launch.fits(x, out):
                launch.launch_into(kernel, x, out)
                return out
    text = aten.text_of(table)
    if has_torch_function((x, out)):  # a proxy of torch.fx, a subclass with operators of its own
        return _overridden(function, x, mode, grad, out, text)
    operator.check(function, x, mode, text)
    _check_memory(x)
    direction = gradients.resolve(function, mode, grad)
    if out is not None:
        return _into(x, function, mode, direction, text, out)
    return _result(x, function, mode, direction, text)


def _result(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    """Return the result with its gradient, in the form that those who watch operators can take."""
    if torch._C._functorch.peek_interpreter_stack() is not None or launch.in_forward_mode():
        return operator.apply(x, function, mode, grad, table)
    if torch._C._is_tracing() and torch.onnx.is_in_onnx_export():
        return plain.activation(x, function, mode, table)
    if type(x) is Tensor and not x.requires_grad and not launch.watched():
        return operator.forward(x, function, mode, table)
    if type(x).__name__ == "DTensor":
        operator.register_sharding()
    result: Tensor = torch.ops.rarefy.activation(x, function, mode, grad, table)
    return result


def _overridden(function: str, x: Tensor, mode: str, grad: str | None, out: Tensor | None, table: str) -> Tensor:
    """Go through ``__torch_function__`` of the arguments, as a function of PyTorch; a table goes as text."""
    given: dict[str, Any] = {"grad": grad, "out": out, "table": table or None}
    given = {key: value for key, value in given.items() if value is not None}
    if function == "gelu_tanh":
        given["approximate"] = "tanh"
    public: Callable[..., Any] = gelu if function == "gelu_tanh" else globals()[function]
    result: Tensor = handle_torch_function(public, (x, out), x, mode, **given)
    return result


def _check_memory(x: Tensor) -> None:
    """Raise ValueError for a tensor whose memory was freed: PyTorch's own operators would read it."""
    if launch.is_direct(x) and not x.is_neg():
        address(x, x.device.type)


def _check_out(x: Tensor, out: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor like x, got {type(out).__name__}")
    if out.layout is not torch.strided or out.is_nested:
        kind = "a nested tensor" if out.is_nested else f"layout {out.layout}"
        raise TypeError(f"out must be a dense tensor, got {kind}: leave it out, or give torch.empty_like of a dense x")
    if out.dtype != x.dtype or out.shape != x.shape or out.device != x.device:
        raise ValueError(
            f"out must have the shape, dtype and device of x ({tuple(x.shape)}, {x.dtype}, {x.device}),"
            f" got {tuple(out.shape)}, {out.dtype}, {out.device}"
        )


def _into(x: Tensor, function: str, mode: str, grad: str, table: str, out: Tensor) -> Tensor:
    """Return the result in ``out``: by the kernel itself where layouts allow, else copied."""
    _check_out(x, out)
    _check_memory(out)
    tangents = launch.in_forward_mode() and any(
        forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
        for t in (x, out)
    )
    if tangents or (torch.is_grad_enabled() and (x.requires_grad or out.requires_grad)):
        raise RuntimeError("out= does not support gradients; use torch.no_grad() or leave it out")
    if not launch.watched() and launch.is_direct(x) and x.is_contiguous() and not x.is_neg() and launch.fits(x, out):
        kernel = launch.kernel_of(x, function, mode, table)
        if kernel is not None:
            launch.launch_into(kernel, x, out)
            return out
    return out.copy_(_result(x, function, mode, grad, table))


def in_place(call: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """Write ``call``, one of the functions, over ``x``: with a gradient, as PyTorch's functions of ``inplace=True``.

    Raises RuntimeError, PyTorch's own, for a leaf that needs a gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return x.copy_(call(x.clone(), **options))  # the backward needs the input
    return call(x, out=x, **options)


_kept: ContextVar[bool] = ContextVar("kept", default=False)


@contextlib.contextmanager
def kept_operators() -> Iterator[None]:
    """Let ``torch.export`` record our operator and not plain ones in the block: whoever runs the program has it."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def _traced(
    function: str, x: Tensor, mode: str, grad: str | None, out: Tensor | None, table: Table | str | Path | None
) -> Tensor:
    text = aten.text_of(table)
    _validated(function, mode, str(x.dtype), text)
    direction = gradients.resolve(function, mode, grad)
    if out is not None:
        _check_out(x, out)
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    dynamo, exporting = torch.compiler.is_dynamo_compiling(), launch.exporting()
    # of float32 the fused form would cost far more than the kernel; on a GPU it would also round otherwise, since
    # Inductor joins products and sums there
    whole = x.is_cuda or (x.dtype == torch.float32 and mode in ("exact", "fast"))
    result: Tensor
    kept = not dynamo and _kept.get()
    if exporting and not kept and (not needs_gradient or torch.onnx.is_in_onnx_export()):
        result = plain.activation(x, function, mode, text)
    elif exporting or not dynamo or whole:
        result = torch.ops.rarefy.activation(x, function, mode, direction, text)
    elif needs_gradient:
        result = operator.apply(x, function, mode, direction, text)
    else:
        result = aten.activation(x, function, mode, text)
    return result if out is None else out.copy_(result)


@torch.compiler.assume_constant_result
def _validated(function: str, mode: str, dtype: str, table: str) -> bool:
    operator.check_dtype(function, getattr(torch, dtype.removeprefix("torch.")), mode, table)
    return True
