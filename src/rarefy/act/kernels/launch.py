"""Native kernels on tensors: which kernel a function has, what tensors it may read and write, and the call."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rarefy import kernels
from rarefy.act.kernels import gpu, native
from rarefy.act.kernels.aten import FORMAT_OF, given_table
from rarefy.act.spec import reference
from rarefy.act.spec.quartic import tanh as quartic_tanh
from rarefy.kernels._memory import address

_THREADED = 1 << 17  # elements from which a kernel may use more than one thread; it knows its own bound

#: A ctypes function and the address of the table that it reads; on a GPU, a kernel of Triton.
Kernel: TypeAlias = tuple[Any, int] | gpu.Kernel

_steps: dict[tuple[str, str, torch.dtype, str], native.KernelSteps | None] = {}
#: The kernels that ran, by function, mode, dtype, device and instruction set; of tables of one's own none.
ready: dict[tuple[str, str, torch.dtype, torch.device, str | None], Kernel] = {}


def steps_of(function: str, mode: str, dtype: torch.dtype, table: str = "") -> native.KernelSteps | None:
    """Return the kernels of a function, made when they are first needed; None for what has no kernel of its own."""
    key = (function, mode, dtype, table)
    if key not in _steps:
        _steps[key] = _choose(function, mode, dtype, table)
    return _steps[key]


def _choose(function: str, mode: str, dtype: torch.dtype, table: str) -> native.KernelSteps | None:
    fmt, given = FORMAT_OF[dtype], given_table(table)
    direct = reference.table_for(function, mode, fmt, given)
    if fmt.bits > 16:
        if direct is not None:
            return native.for_table(direct)
        if mode in ("exact", "fast"):
            return native.quartic(quartic_tanh()) if function == "tanh" else native.float32(function, mode)
        return None
    answers = reference.answers(function, mode, fmt, given)
    if (function, mode) == ("tanh", "hard") and fmt.bits == 16:
        return native.hard(fmt.name, answers)
    if mode in ("exact", "fast") and fmt.name == "bf16" and function != "tanh":
        return native.gate(function, answers)
    return native.lookup(fmt.name, answers) if direct is None else native.for_table(direct, answers)


def kernel_of(x: Tensor, function: str, mode: str, table: str) -> Kernel | None:
    """Return the kernel that may run here and read ``x``, laid out as it is or not; None where there is none."""
    if not is_direct(x) or watched():
        return None
    kernel: Kernel | None
    if x.is_cuda:
        kernel = gpu.forward(x, function, mode, table)
    else:
        steps = steps_of(function, mode, x.dtype, table)
        kernel = None if steps is None else steps.kernel()
    if kernel is not None and not table:
        ready[function, mode, x.dtype, x.device, kernels.isa()] = kernel
    return kernel


def launch(kernel: Kernel, x: Tensor, y: Tensor) -> None:
    """Run a kernel from one tensor to another; both have the same layout, without gaps."""
    if not isinstance(kernel, tuple):
        kernel(x, y)
        return
    n = x.numel()
    kernel[0](address(x), address(y), n, kernel[1], 1 if n < _THREADED else torch.get_num_threads())


def launch_into(kernel: Kernel, x: Tensor, out: Tensor) -> None:
    """Run a kernel into a tensor of the user's: autograd is told that it was written to."""
    launch(kernel, x, out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def is_plain(x: Tensor) -> bool:
    """Tell whether the numbers lie in memory by strides, as tensors mostly do."""
    return (
        x.layout is torch.strided
        and not x.is_nested
        and not x._is_zerotensor()
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_readable(x: Tensor) -> bool:
    """Tell whether a native kernel may read ``x``."""
    return x.device.type == "cpu" and is_direct(x)


def is_direct(x: Tensor) -> bool:
    """Tell whether a kernel may read ``x``: a plain tensor or a parameter, on a device that has kernels."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type in ("cpu", "cuda") and is_plain(x)


def fits(x: Tensor, out: Tensor) -> bool:
    """Tell whether a kernel may write the result of contiguous ``x`` to ``out`` as it lies, which may be ``x``."""
    if not (
        type(out) is Tensor
        and is_plain(out)
        and out.dtype is x.dtype
        and out.shape == x.shape
        and out.device == x.device
        and out.is_contiguous()
        and not out.is_neg()
        and not (out.requires_grad and torch.is_grad_enabled())
    ):
        return False
    # tensors of one size that share memory must be the same; of memory that was freed the launch tells
    a, b, size = x.data_ptr(), out.data_ptr(), x.numel() * x.element_size()
    return a == b or a >= b + size or b >= a + size


def watched() -> bool:
    """Tell whether a transform of PyTorch (vmap, functional gradients, fake or tracing modes) watches operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def in_forward_mode() -> bool:
    """Tell whether tensors may carry tangents of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def exporting() -> bool:
    """Tell whether torch.export traces.

    ``torch.compiler.is_exporting`` is not what torch.compile reads: before PyTorch 2.13 it says yes there, too.
    """
    return torch.compiler._is_exporting_flag
