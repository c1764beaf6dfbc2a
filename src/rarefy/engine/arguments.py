"""What :func:`rarefy.engine.compile` takes, checked before anything is done."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from rarefy import _checks, kernels
from rarefy.engine import programs
from rarefy.engine.engine import plain
from rarefy.engine.quantize import BUDGET
from rarefy.engine.structure import Flat, call_of

Precision = Literal["float32", "bfloat16", "int8"]
Choose = Literal["measure", "native", "sparse", "dense", "torch"]


def checked(
    model: nn.Module,
    example_input: Any,
    threads: int | None,
    precision: str,
    choose: str,
    tune_seconds: float,
) -> tuple[Flat, tuple[Tensor, ...]]:
    """The model as one of tensors alone, and the example's; raises for arguments that :func:`compile` does not take."""
    if isinstance(model, ExportedProgram):
        raise TypeError("model is an ExportedProgram of torch.export: compile its module, program.module()")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{_which(name)} is TorchScript, of which torch.export makes no graph: compile the nn.Module that it "
                "was traced or scripted from"
            )
    try:
        takes, inputs = call_of(model, example_input)
    except TypeError as error:
        raise TypeError(f"example_input: {error}") from None
    if not inputs:
        raise TypeError(
            "example_input must be a tensor, a tuple of arguments or a dict of keyword arguments, with a tensor among "
            f"them, got {type(example_input).__name__}"
        )
    for x in inputs:
        if x.device.type != "cpu":
            raise ValueError(f"example_input must be on the CPU, got {x.device}: call it with x.cpu()")
        if x.numel() == 0:
            raise ValueError(f"example_input must not be empty, got the shape {tuple(x.shape)}")
    if isinstance(threads, Tensor):
        raise TypeError(
            "threads got a tensor: the inputs of a model with several go in one tuple, compile(model, (x, h))"
        )
    if threads is not None:
        _checks.whole("threads", threads, 1, programs.MOST_THREADS, or_else="None for PyTorch's")
    _checks.one_of("precision", precision, get_args(Precision))
    _checks.one_of("choose", choose, get_args(Choose))
    if isinstance(tune_seconds, bool) or not isinstance(tune_seconds, (int, float)):
        raise TypeError(f"tune_seconds must be a number of seconds, got {tune_seconds!r}")
    if not tune_seconds >= 0:
        raise ValueError(f"tune_seconds must be at least 0, got {tune_seconds}")
    exported = [f"{name}." if name else "" for name, module in model.named_modules() if _is_exported(module)]
    for name, module in model.named_modules():
        fixed = any(f"{name}.".startswith(prefix) for prefix in exported)
        if module.training and not fixed:
            raise ValueError(f"{_which(name)} is in training mode: call model.eval() first")
    for name, weight in model.named_parameters():
        if precision == "int8" and weight.is_floating_point() and weight.dtype is not torch.float32:
            raise ValueError(
                f'precision="int8" takes models in float32, and {name!r} is {weight.dtype}: call model.float() first'
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(f"the model must be on the CPU, {name!r} is on {tensor.device}: call model.cpu() first")
        try:
            kernels.address(tensor)
        except ValueError as error:
            raise ValueError(f"{name!r} of the model: {error}") from None
    for x in inputs:
        try:
            kernels.address(plain(x))
        except ValueError as error:
            raise ValueError(f"example_input: {error}") from None
    if any(x.is_inference() for x in (*model.parameters(), *model.buffers())):
        model = deepcopy(model)  # tracing takes no tensors of torch.inference_mode(), and copies of them are none
    return Flat(model, takes), tuple(map(plain, inputs))


def _which(name: str) -> str:
    return f"the module {name!r} of the model" if name else "the model"


def _is_exported(module: nn.Module) -> bool:
    """Whether it is a graph of operators, as of ``torch.export`` and PT2E: it has one mode, whatever it is told."""
    if not isinstance(module, fx.GraphModule):
        return False
    modules = any(node.op == "call_module" and node.target != "_guards_fn" for node in module.graph.nodes)
    return not modules and any(isinstance(node.target, OpOverload) for node in module.graph.nodes)


def check_calibration(precision: str, calibration: object, error_budget: float, quantized: bool) -> None:
    """Raise ValueError where int8 has nothing to be calibrated with, and where what is not int8 has."""
    if quantized and calibration is not None:
        raise ValueError("the model is quantised, by PT2E: leave calibration out")
    if precision == "int8" and calibration is None and not quantized:
        raise ValueError(
            'precision="int8" needs calibration=, some hundred examples of what the model will see, in batches: [x] is '
            "one batch"
        )
    if precision != "int8" and calibration is not None:
        raise ValueError(f'calibration is for precision="int8", and precision is {precision!r}')
    if isinstance(error_budget, bool) or not isinstance(error_budget, (int, float)):
        raise TypeError(f"error_budget must be a number, got {type(error_budget).__name__}")
    if not error_budget >= 0:
        raise ValueError(f"error_budget must be at least 0, got {error_budget}; 0.1 lets the outputs be a tenth off")
    if precision != "int8" and error_budget != BUDGET:
        raise ValueError(f'error_budget is for precision="int8", and precision is {precision!r}')
