"""The operator ``rarefy::activation`` behind the functions: its result, its gradient, and what watches operators."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rarefy.act import gradients
from rarefy.act.kernels import aten, gpu, launch, plain
from rarefy.act.kernels.aten import FORMAT_OF, given_table
from rarefy.act.spec import reference, subnormals


def check(function: str, x: Tensor, mode: str, table: str) -> None:
    """Raise TypeError or ValueError for what a function does not take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function} takes a tensor, got {type(x).__name__}")
    check_dtype(function, x.dtype, mode, table)
    check_dense(function, x)


def check_dense(function: str, x: Tensor) -> None:
    """Raise TypeError for a tensor that is sparse or nested."""
    if x.layout is not torch.strided or x.is_nested:
        kind, way = f"layout {x.layout}", "use x.to_dense()"
        if x.is_nested:
            kind, way = "a nested tensor", "pad it with torch.nested.to_padded_tensor()"
        raise TypeError(f"{function} takes a dense tensor, got {kind}: {way}")


def check_dtype(function: str, dtype: torch.dtype, mode: str, table: str) -> None:
    """Do the part of :func:`check` that needs no tensor."""
    if dtype not in FORMAT_OF:
        valid = ", ".join(str(each).removeprefix("torch.") for each in FORMAT_OF)
        raise TypeError(f"{function} takes {valid}; got {str(dtype).removeprefix('torch.')}: convert it first")
    reference.check(function, mode, FORMAT_OF[dtype], given_table(table))


def forward(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    """Return the result of real data, without a gradient."""
    x = x.detach()
    kernel = launch.kernel_of(x, function, mode, table)
    if kernel is not None:
        x = x.resolve_neg()
        y = torch.empty_like(x)
        if x.stride() != y.stride():  # overlapping or with gaps; empty_like keeps every other layout
            x, y = x.contiguous(), y.contiguous()
        launch.launch(kernel, x, y)
        return y
    with subnormals.kept():
        if x.dtype == torch.float32 and mode == "ktanh" and function != "tanh":
            core = given_table(table)
            if core is None or core.function == "tanh":
                return aten.derived32(x, function, lambda z: forward(z, "tanh", mode, table))
        return aten.activation(x, function, mode, table)


def backward(upstream: Tensor, saved: Tensor, function: str, mode: str, grad: str) -> Tensor:
    """Return :func:`rarefy.act.gradients.backward`: on a GPU in one launch, but where it is itself differentiated."""
    if (
        not torch.compiler.is_compiling()
        and saved.is_cuda
        and not torch.is_grad_enabled()
        and not gradients.is_one_operator(function, mode, grad, saved.dtype)
        and launch.is_direct(saved)
        and launch.is_direct(upstream)
        and not launch.watched()
        and gpu.runs(saved.device)
    ):
        return gpu.backward(upstream, saved, function, mode, grad)
    return gradients.backward(upstream, saved, function, mode, grad)


@torch.library.custom_op("rarefy::activation", mutates_args=())
def activation(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    """Compute all functions, as one operator; ``table`` is "", the name of a shipped table, or a table's JSON."""
    check(function, x, mode, table)
    result = forward(x, function, mode, table)
    return result.clone() if result is x else result


@activation.register_fake
def _fake(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    return torch.empty_like(x)


@torch._decomp.register_decomposition([torch.ops.rarefy.activation.default])
def _decomposed(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    """Return what a tracer that is given PyTorch's table of decompositions makes of the operator."""
    if torch.onnx.is_in_onnx_export():  # a program's decomposition cannot add constants
        raise RuntimeError(
            "this exported program was made with gradients and holds the operator rarefy::activation, which ONNX has"
            " not: give torch.onnx.export the model itself, or export the model after requires_grad_(False)"
        )
    return plain.activation(x, function, mode, table)


# without it fake tensors of symbolic shapes would run the decomposition
torch._decomp.register_decomposition([torch.ops.rarefy.activation.default], type="meta")(_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.function, ctx.mode, ctx.grad, _ = inputs
    ctx.save_for_backward(output if ctx.grad == "y" else x)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    (saved,) = ctx.saved_tensors
    return backward(upstream, saved, ctx.function, ctx.mode, ctx.grad), None, None, None, None


activation.register_autograd(_backward, setup_context=_setup)


class _Activation(torch.autograd.Function):
    """The function for torch.compile, which traces through it, and for the transforms of torch.func."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
        if torch.compiler.is_compiling():
            return aten.activation(x, function, mode, table)
        return forward(x, function, mode, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, upstream[0])

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: Tensor, function: str, mode: str, grad: str, table: str
    ) -> tuple[Tensor, Any]:
        return apply(x, function, mode, grad, table), dims[0]


class _ForwardMode(_Activation):
    """The same with forward-mode derivatives, which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup(ctx, inputs, output)
        ctx.save_for_forward(output if ctx.grad == "y" else inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (saved,) = ctx.saved_tensors
        return gradients.backward(tangent, saved, ctx.function, ctx.mode, ctx.grad)


def apply(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    """Compute the function as one of autograd's, for torch.compile and for the transforms of torch.func."""
    kind = _Activation if torch.compiler.is_compiling() else _ForwardMode
    result: Tensor = kind.apply(x, function, mode, grad, table)  # type: ignore[no-untyped-call]
    return result


@cache
def register_sharding() -> None:
    """Tell distributed tensors that the operator works on every element by itself; sums that are pending come first."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    @register_sharding(torch.ops.rarefy.activation.default)
    def _(x: Any, *options: str) -> list[tuple[list[Any], list[Any]]]:
        places = [Replicate(), *(Shard(dim) for dim in range(x.ndim))]
        return [([place], [place, *(None for _ in options)]) for place in places]
