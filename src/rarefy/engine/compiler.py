"""From a model to an engine."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from rarefy import _checks
from rarefy.engine import verify
from rarefy.engine.arguments import Choose, Precision, checked
from rarefy.engine.assembling import build
from rarefy.engine.engine import Engine, plain
from rarefy.engine.execute import torch_threads
from rarefy.engine.explicit import on_cpu
from rarefy.engine.preparing import Prepared, flattened, prepare
from rarefy.engine.quantize import BUDGET
from rarefy.engine.shapes import Engines
from rarefy.engine.structure import Flat

_COMPILING = threading.Lock()


@contextmanager
def compiling() -> Iterator[None]:
    """One thread at a time is within the block: tracing and measuring change state of the process.

    A step may draw random numbers; what autocast or a default device would make of the layers is not the model.
    """
    with _COMPILING, torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), on_cpu():
        yield


@overload
def compile(
    model: nn.Module,
    example_input: Any,
    threads: int | None = None,
    *,
    precision: Precision = "float32",
    calibration: Iterable[Any] | None = None,
    error_budget: float = BUDGET,
    choose: Choose = "measure",
    tune_seconds: float = 8.0,
    torch_compile: bool = False,
    shapes: None = None,
) -> Engine: ...


@overload
def compile(
    model: nn.Module,
    example_input: Any,
    threads: int | None = None,
    *,
    precision: Precision = "float32",
    calibration: Iterable[Any] | None = None,
    error_budget: float = BUDGET,
    choose: Choose = "measure",
    tune_seconds: float = 8.0,
    torch_compile: bool = False,
    shapes: int,
) -> Engines: ...


def compile(
    model: nn.Module,
    example_input: Any,
    threads: int | None = None,
    *,
    precision: Precision = "float32",
    calibration: Iterable[Any] | None = None,
    error_budget: float = BUDGET,
    choose: Choose = "measure",
    tune_seconds: float = 8.0,
    torch_compile: bool = False,
    shapes: int | None = None,
) -> Engine | Engines:
    """Compile a model for this CPU: its zeros are skipped where that is measured to be faster.

    What comes out is compared with the model on the example and, where it takes any batch size, at another one. Threads
    that compile take turns.

    Args:
        model: in evaluation mode, on the CPU; one that was trained sparse, finalized. It is not changed.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments; in these, tensors in lists,
            tuples, dicts, dataclasses. What is no tensor (None, a number, a string) is part of what is compiled. The
            tensors' size beyond the batch is that which the engine takes; their batch size is what the kernels are
            chosen for, any other runs, too. The engine is called like the model, and gives what the model gives.
        threads: how many threads a call uses, in native kernels and in PyTorch's steps; None takes
            ``torch.get_num_threads()`` at each call. In a forked process PyTorch's steps run on one thread.
        precision: "float32"; "bfloat16": weights rounded to half the memory, sums stay float32; "int8": weights and
            what goes between layers are bytes, by :func:`rarefy.engine.quantize.quantize`.
        calibration: what the network will see, for "int8" alone: some hundred examples, in batches, each like
            ``example_input``. A model that PT2E (``torchao``'s ``convert_pt2e``) quantised has its own.
        error_budget: how far the outputs in "int8" may be from those in float32 on examples, ||y_int8 - y|| / ||y||:
            layers stay float32 until it holds. ``report.quantization`` says which, and what each costs.
        choose: "measure" takes the fastest of sparse kernels, dense kernels and PyTorch, layer by layer, and the model
            as it is where all of that is slower (such an engine holds a copy of it, and cannot be saved). Without
            measuring, and so with the same result every time: "native" (native kernels by rule), "sparse" or "dense"
            (these kernels alone in the native layers), "torch" (PyTorch alone).
        tune_seconds: at most about so much time to measure native kernels for.
        torch_compile: let ``torch.compile``'s form of the model take part in measuring. It needs a compiler for C++ and
            some time, compiles again where a batch size is new, and cannot be saved where it is the fastest.
        shapes: how many sizes to keep engines for: what comes back is then an :class:`rarefy.engine.Engines`, which
            has a copy of the model and compiles for another size when it comes. None takes that of the example alone.

    Raises:
        TypeError: ``model`` is no module, ``example_input`` has no tensors, or what is not known; ``error_budget`` is
            no number.
        ValueError: the model is in training mode or is not on the CPU; an option out of its range, or calibration that
            the model does not take; as :class:`rarefy.engine.CaptureError`, the model cannot be traced; as
            :class:`rarefy.engine.EngineError`, the engine does not compute what the model does on the example, or in
            bfloat16 and int8 what PyTorch does with the same rounding.
    """
    flat, inputs = checked(model, example_input, threads, precision, choose, tune_seconds)
    threads = None if threads is None else int(threads)
    if torch_compile and (precision != "float32" or choose != "measure"):
        raise ValueError('torch_compile is measured beside the others: it needs precision="float32", choose="measure"')
    if shapes is None:
        if calibration is not None:
            calibration = flattened(calibration, flat.takes)
        rest = (error_budget, choose, tune_seconds, torch_compile)
        return _compiled(inputs, flat, threads, precision, calibration, *rest)
    shapes = _checks.whole("shapes", shapes, or_else="None for the example's alone")
    if calibration is not None:
        raise ValueError("shapes is for models that are not calibrated: compile for each size, with batches of it")
    flat = deepcopy(flat)
    options = (flat, threads, precision, None, error_budget, choose, tune_seconds, torch_compile)
    make = functools.partial(_of_size, options)
    return Engines([make(inputs)], shapes=shapes, make=make)


def _of_size(options: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> Engine:
    """The engine for tensors of another size; raises as :func:`compile`."""
    return _compiled(tuple(map(plain, inputs)), *options)


def _compiled(
    inputs: tuple[Tensor, ...],
    flat: Flat,
    threads: int | None,
    precision: Precision,
    calibration: Iterable[Any] | None,
    error_budget: float,
    choose: Choose,
    tune_seconds: float,
    torch_compile: bool,
) -> Engine:
    begun = time.perf_counter()
    with compiling(), _threads_there():
        prepared = prepare(flat, inputs, precision, calibration, error_budget, later=precision == "float32")
        how = (threads, precision, choose, tune_seconds, flat, False, torch_compile)
        engine = build(prepared.better, inputs, *how)
        try:
            _check(engine, prepared, flat, precision)
        except verify.PlanError as error:
            prepared = prepare(flat, inputs, precision, calibration, error_budget, fixed_because=str(error))
            engine = build(prepared.better, inputs, *how)
            _check(engine, prepared, flat, precision)
    engine.report = replace(engine.report, seconds=time.perf_counter() - begun, quantization=prepared.quantization)
    return engine


def _threads_there() -> AbstractContextManager[None]:
    """Within it PyTorch uses the threads that it has, where a forked process has less."""
    return torch_threads(torch.get_num_threads())


def _check(engine: Engine, prepared: Prepared, model: Flat, precision: Precision) -> None:
    """Raise EngineError for an engine that is wrong, PlanError for one whose plan is."""
    for tried in prepared.trials:
        if precision == "float32":
            verify.check(engine, prepared.plan, model, tried)
        else:  # rounded numbers do not give the model's results: PyTorch's with the same rounding
            verify.check(engine, prepared.better, None, verify.plan_trial(prepared.better, tried.inputs))
