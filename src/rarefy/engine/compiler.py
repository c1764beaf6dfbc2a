"""From a model to an engine."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args, overload

import torch
from torch import Tensor, nn

from rarefy import kernels
from rarefy.engine import binding, measure, programs, pt2e, verify
from rarefy.engine.building import NativeSegment, Options, samples
from rarefy.engine.capture import CaptureError, capture, other_dtype
from rarefy.engine.eager import Eager
from rarefy.engine.engine import Engine, Port, Report, plain
from rarefy.engine.execute import torch_threads
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item, lower, uses
from rarefy.engine.onednn import PackedConv
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Conv, Linear, Plan, Recurrence, Step, tensors
from rarefy.engine.quantization import Quantization
from rarefy.engine.quantize import BUDGET, quantize
from rarefy.engine.shapes import Engines
from rarefy.engine.structure import TENSOR, Call, Flat, Node, StructureError, call_of, title

Precision = Literal["float32", "bfloat16", "int8"]
#: Tracing and measuring change state of the process.
COMPILING = threading.Lock()
_Step = TypeVar("_Step", bound=Step)
Choose = Literal["measure", "native", "sparse", "dense", "torch"]


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
    if torch_compile and (precision != "float32" or choose != "measure"):
        raise ValueError('torch_compile is measured beside the others: it needs precision="float32", choose="measure"')
    if shapes is None:
        if calibration is not None:
            calibration = flattened(calibration, flat.takes)
        rest = (error_budget, choose, tune_seconds, torch_compile)
        return _compiled(inputs, flat, threads, precision, calibration, *rest)
    if isinstance(shapes, bool) or not isinstance(shapes, int) or shapes < 1:
        raise ValueError(
            f"shapes must be a whole number of at least 1, or None for the example's alone, got {shapes!r}"
        )
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
    # A step may draw random numbers; what autocast would make of the layers is not the model.
    with COMPILING, torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), _threads_there():
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


def flattened(calibration: Iterable[Any], takes: Call) -> Iterable[Any]:
    """Batches like an example as tuples of tensors."""
    return calibration if takes.is_plain else (takes.of_example(each) for each in calibration)


class Prepared(NamedTuple):
    """A plan as captured, what it was tried on, what is made of it to be run, and what int8 costs."""

    plan: Plan
    trials: list[verify.Trial]
    better: Plan
    quantization: Quantization | None


def prepare(
    model: Flat,
    inputs: tuple[Tensor, ...],
    precision: Precision,
    calibration: Iterable[Tensor | Sequence[Tensor]] | None,
    error_budget: float,
    *,
    later: bool = False,
    fixed_because: str | None = None,
) -> Prepared:
    """Capture, rewrite and quantise; arguments as those of :func:`compile`.

    With ``later`` a plan of any batch size is compared with the model at small ones alone: the engine will be at the
    example's. Where ``fixed_because`` says why, it is for the batch size of the inputs alone.
    """
    quantized = precision == "int8" and pt2e.is_quantized(model.model)
    _check_calibration(precision, calibration, error_budget, quantized)
    plan, trials = _captured(model, inputs, later, fixed_because)
    better, quantization = optimize(plan), None
    if quantized:
        better, quantization = pt2e.read(better)
    elif calibration is not None:
        better, quantization = quantize(better, calibration, budget=error_budget)
    return Prepared(plan, trials, _stored(better, precision), quantization)


def _captured(
    model: Flat, inputs: tuple[Tensor, ...], later: bool, fixed_because: str | None
) -> tuple[Plan, list[verify.Trial]]:
    """The plan, which computes what the model does at the batch sizes tried, and what the engine is to be tried on.

    A batch of one and one of several are both tried where the plan takes any: a model may treat them differently, and
    is traced at one of them. Where they differ the engine takes that of the example alone.
    """
    example, raised = None, None
    try:
        example = verify.trial(model, inputs)
        gives = model.seen.gives
    except StructureError as error:
        raise CaptureError(
            f"what {title(model)} gives back cannot be taken apart: {error}. Leave it out (transformers' caches by "
            "use_cache=False), or wrap the model in one that takes the tensors out of it"
        ) from error
    except Exception as error:  # whatever the model raises: tracing may tell where
        raised = error
    plan = capture(model, inputs, fixed_because)
    if example is not None and model.seen.gives != gives:
        raise _traced_differently(model, "its output is of another structure")
    if example is None:
        why = other_dtype(model, inputs) or f"it raises {type(raised).__name__}: {raised}"
        raise CaptureError(f"{title(model)} does not run on example_input: {why}") from raised
    if plan.batch is None:
        batch = inputs[0].shape[0]
        other = verify.trial(model, inputs, 2 if batch == 1 else 1)
        several = verify.trial(model, inputs, 2) if later and batch > 2 else None
        trials = [example] if other is None else [example, other]
        wrong = next(
            (found for each in (several or example, *trials[1:]) if (found := verify.plan_differs(plan, model, each))),
            None,
        )
        refused = other is None and batch == 1
        if wrong is None and not refused:
            return plan, trials
        because = "refuses a batch of 2" if refused else "does something else for a batch of one than for others"
        plan = capture(model, inputs, f"it {because}")
    wrong = verify.plan_differs(plan, model, example)
    if wrong is not None:
        raise _traced_differently(model, wrong)
    return plan, [example]


def _traced_differently(model: Flat, how: str) -> CaptureError:
    return CaptureError(
        f"{title(model)} does something else when it is traced than when it is called ({how}): its forward may not "
        "depend on the Python around it or on memory that it shares with its inputs"
    )


def build(
    plan: Plan,
    inputs: Sequence[Tensor],
    threads: int | None,
    precision: Precision,
    choose: Choose,
    tune_seconds: float,
    model: nn.Module | None = None,
    native_alone: bool = False,
    torch_compile: bool = False,
) -> Engine:
    """The engine of a plan, and of the model where that may run itself; arguments as those of :func:`compile`.

    With ``native_alone`` what is measured are the native kernels, and not PyTorch beside them.
    """
    begun = time.perf_counter()
    plan = _stored(plan, precision)
    threads_now = threads or torch.get_num_threads()
    with torch_threads(threads_now), torch.no_grad():
        found, shapes = _choose(
            plan, inputs, choose, precision, threads_now, tune_seconds, model, native_alone, torch_compile
        )
    own = _Copies()
    items = tuple(own.item(item) for item in found.lowered.items)
    read = {name for item in items for name in uses(item)[0]} | {*plan.outputs}
    native = [item.program.facts for item in items if isinstance(item, NativeSegment)]
    left = [tensor for item in items for tensor in _weights(item)]
    return Engine(
        items=items,
        inputs=[Port(name, tuple(x.shape), x.dtype) for name, x in zip(plan.inputs, inputs, strict=True)],
        outputs=[Port(name, shapes[name], plan.values[name].dtype) for name in plan.outputs],
        takes=model.takes if isinstance(model, Flat) else Call.plain(len(plan.inputs)),
        gives=model.seen.gives if isinstance(model, Flat) else _given(plan),
        batch=plan.batch,
        fixed_because=plan.fixed_because,
        constants={name: own.tensor(value) for name, value in plan.constants.items() if name in read},
        names={step.output: step.name for step in plan.steps},
        layers=found.layers,
        reasons=found.lowered.reasons,
        threads=threads,
        report=Report(
            seconds=time.perf_counter() - begun,
            measuring_seconds=found.seconds,
            chosen=found.chosen,
            candidates=found.candidates,
            precision=precision,
            weight_bytes=sum(tensor.nbytes for tensor in left) + sum(facts.weight_bytes for facts in native),
            scratch_bytes=max((facts.scratch_bytes for facts in native), default=0),
        ),
    )


def _given(plan: Plan) -> Node:
    """What a plan gives that has no model around it: a tensor, or a tuple."""
    return TENSOR if plan.single else Node("tuple", children=(TENSOR,) * len(plan.outputs))


def _weights(item: Item) -> list[Tensor]:
    """The weights that PyTorch has for an item."""
    match item:
        case NativeSegment():
            return []
        case Eager():
            return [*item.model.state_dict().values()]
        case PackedConv() | Int8():
            return [*tensors(item.step).values()]
    return [*tensors(item).values()]


class _Copies:
    """Copies of the tensors that an engine keeps, one of each: the model's may change later."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Tensor, Tensor]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        """The copy, that which is there where it is the same tensor or another view of the same numbers."""
        if tensor.layout is not torch.strided:
            return tensor.clone()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        if key not in self._known:
            self._known[key] = tensor, tensor.detach().clone()  # the first is kept, so that none takes its address
        return self._known[key][1]

    def item(self, item: Item) -> Item:
        """The item with copies in the place of its tensors."""
        if isinstance(item, (NativeSegment, Eager)):  # which have their own
            return item
        if isinstance(item, PackedConv):
            return replace(item, step=self.step(item.step))
        if isinstance(item, Int8):
            return replace(item, step=self.step(item.step))
        return self.step(item)

    def step(self, step: _Step) -> _Step:
        """The same of a step."""
        copies: dict[str, Any] = {name: self.tensor(value) for name, value in tensors(step).items()}
        return replace(step, **copies)


def checked(
    model: nn.Module,
    example_input: Any,
    threads: int | None,
    precision: str,
    choose: str,
    tune_seconds: float,
) -> tuple[Flat, tuple[Tensor, ...]]:
    """The model as one of tensors alone, and the example's; raises for arguments that :func:`compile` does not take."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
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
    most = programs.MOST_THREADS
    if isinstance(threads, Tensor):
        raise TypeError(
            "threads got a tensor: the inputs of a model with several go in one tuple, compile(model, (x, h))"
        )
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most):
        raise ValueError(f"threads must be a whole number from 1 to {most}, or None for PyTorch's, got {threads!r}")
    for name, value, known in (("precision", precision, get_args(Precision)), ("choose", choose, get_args(Choose))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not tune_seconds >= 0:
        raise ValueError(f"tune_seconds must be at least 0, got {tune_seconds}")
    for name, module in model.named_modules():
        where = f"the module {name!r} of the model" if name else "the model"
        if module.training and not pt2e.is_quantized(model):  # whose graph is one of evaluation, and cannot be told so
            raise ValueError(f"{where} is in training mode: call model.eval() first")
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
    return Flat(model, takes), tuple(map(plain, inputs))


def _check_calibration(precision: str, calibration: object, error_budget: float, quantized: bool) -> None:
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


def _stored(plan: Plan, precision: str) -> Plan:
    """The plan with its layers' weights as the native kernels store them."""
    return plan if precision != "bfloat16" else replace(plan, steps=tuple(map(_rounded, plan.steps)))


def _rounded(step: Step) -> Step:
    """The step with its weights rounded to bfloat16."""
    if not isinstance(step, (Conv, Linear, Recurrence)):
        return step
    return replace(step, weight=step.weight.bfloat16().float())


def _choose(
    plan: Plan,
    inputs: Sequence[Tensor],
    choose: str,
    precision: str,
    threads: int,
    tune_seconds: float,
    model: nn.Module | None,
    native_alone: bool,
    torch_compile: bool,
) -> tuple[measure.Decision, dict[str, tuple[int, ...]]]:
    """What runs the plan, and the shapes of its values on the inputs."""
    begun = time.perf_counter()
    usable = binding.available()
    quantized = any(value.quantized is not None for value in plan.values.values())
    timed = choose == "measure" and usable
    native_alone = native_alone or quantized  # PyTorch has no int8 that is any match
    with torch_threads(1):
        shapes, layers = measure.walk(plan, inputs, timed=timed and not native_alone)
    options = Options(
        choice=choose if choose in ("sparse", "dense") else "measure",
        storage="bfloat16" if precision == "bfloat16" else "float32",
        threads=threads,
        tune_seconds=tune_seconds if timed else 0.0,
        shapes=shapes,
        samples=samples(inputs[0].shape),
    )
    if timed:
        eager = model if precision == "float32" else None
        found = measure.choose(plan, inputs, options, layers, eager, native_alone, torch_compile)
        return replace(found, seconds=time.perf_counter() - begun), shapes
    if choose == "torch" or not usable:
        why = "choose='torch'" if choose == "torch" else "there is no native engine"
        return measure.Decision(measure.in_torch(plan, why), {}, "PyTorch", layers, 0.0), shapes
    return measure.Decision(lower(plan, options), {}, "native", layers, 0.0), shapes
