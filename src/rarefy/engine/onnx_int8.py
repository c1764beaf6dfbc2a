"""A quantised network as ONNX: QuantizeLinear and DequantizeLinear around each step, weights as int8 with their scales.

Any runtime that knows ONNX runs it, in int8 where it fuses such steps; then its own arithmetic counts (onnxruntime's
saturates sums of two products at 16 bits on processors without VNNI, unless ``session.x64quantprecision`` is 1). A
table is a Gather. What PyTorch's operators compute has no form here. ONNX rounds before it adds a zero point, int8 here
after: ties go another way where that is odd.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy._files import write_atomically
from rarefy.engine import arguments, calibrate, int8, reference
from rarefy.engine.capture import capture
from rarefy.engine.compiler import compiling
from rarefy.engine.int8 import Int8, Runnable
from rarefy.engine.passes import optimize
from rarefy.engine.plan import (
    Activation,
    Affine,
    Binary,
    Concat,
    Conv,
    Dequantize,
    Flatten,
    GlobalAverage,
    GRUGates,
    Linear,
    LSTMCell,
    Operator,
    Plan,
    Pool,
    Quantize,
    Quantized,
    Recurrence,
    Step,
    Table,
    Upsample,
    parts,
)
from rarefy.engine.preparing import flattened
from rarefy.engine.quantization import Quantization
from rarefy.engine.quantize import BUDGET, quantize

#: What onnxruntime's answers may differ by from PyTorch's, ||a - b|| / ||b||: it rounds sums in another way, which
#: moves a few bytes by one, and the layers behind make something of that.
TOLERANCE = 0.01
_OPSET, _IR = 21, 10
_CHECKED = 3  # examples
_SIMPLE: dict[Activation, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "hardswish": ("HardSwish", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
}


def save_int8_onnx(
    model: nn.Module,
    example_input: Any,
    calibration: Iterable[Any],
    path: str | Path,
    *,
    error_budget: float = BUDGET,
) -> tuple[Quantization, float | None]:
    """Quantise a model after training and write it as ONNX, checked in onnxruntime where that is installed.

    Args:
        model: in evaluation mode, on the CPU, float32; one that was trained sparse, finalized.
        example_input: as that of :func:`rarefy.engine.compile`, of tensors in float32; the file takes any batch size
            where the model does.
        calibration: some hundred examples of what the model will see, in batches, each like ``example_input``.
        path: the file, by custom NAME.onnx.
        error_budget: as that of :func:`rarefy.engine.compile`.

    Returns:
        What int8 costs, and the difference between onnxruntime's and PyTorch's answers in int8, ||a - b|| / ||b||; None
        where onnxruntime is not installed.

    Raises:
        ImportError: onnx is not installed.
        TypeError: ``model`` is no module, ``example_input`` has no tensors, or ``calibration`` is none.
        ValueError: the model is in training mode or not on the CPU, cannot be traced, or quantised, or has an operator
            without a form here.
        RuntimeError: onnxruntime answers differently; no file is written.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("export to ONNX needs onnx: pip install 'rarefy[export]'")
    flat, inputs = arguments.checked(model, example_input, None, "int8", "native", 0.0)
    arguments.check_calibration("int8", calibration, error_budget, quantized=False)
    with compiling():
        plan = optimize(capture(flat.model if flat.takes.is_plain else flat, inputs))
        batches = calibrate.checked(plan, flattened(calibration, flat.takes))
        plan, report = quantize(plan, batches, budget=error_budget)
        content, found = serialized(plan), list[float | None]()

    def fill(partial: Path) -> None:
        partial.write_bytes(content)
        given = [batches[0] if plan.batch is not None else tuple(x[:_CHECKED] for x in batches[0])]
        found.append(difference(plan, content, given))
        if found[0] is not None and not found[0] <= TOLERANCE:
            raise RuntimeError(
                f"onnxruntime answers differently from PyTorch in int8, by {found[0]:.2g} of the outputs (at most "
                f"{TOLERANCE:g} is rounding): the file was not written"
            )

    write_atomically(Path(path), fill)
    return report, found[0]


def difference(plan: Plan, content: bytes, batches: Iterable[Sequence[Tensor]]) -> float | None:
    """How far onnxruntime's answers are from the plan's, ||a - b|| / ||b||; None where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    noise = signal = 0.0
    for batch in batches:
        for a, b in zip(answers(content, plan, batch), reference.run(plan, batch), strict=True):
            noise += float((a.double() - b.double()).square().sum())
            signal += float(b.double().square().sum())
    return float(np.sqrt(noise / signal)) if signal else float(noise)


def answers(content: bytes, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What onnxruntime makes of inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # As the file says, in float32 between bytes: fused into int8, sums of two products saturate at 16 bits on
    # processors without VNNI, which says nothing of the file.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feeds = {name: x.numpy() for name, x in zip(plan.inputs, inputs, strict=True)}
    return [torch.from_numpy(each) for each in session.run(list(plan.outputs), feeds)]


def serialized(plan: Plan) -> bytes:
    """The bytes of an ONNX file of a plan. Raises ValueError for a step without a form in it."""
    return _Graph(plan).content()


@dataclass
class _Graph:
    """Nodes and constants, as they come."""

    plan: Plan
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    floats: dict[str, str] = field(default_factory=dict)  # the dequantised forms of values that are there

    def content(self) -> bytes:
        """The whole file."""
        from onnx import TensorProto, checker, helper

        for item in reference.items(self.plan):
            self._add(item)

        def port(name: str) -> Any:
            value = self.plan.values[name]
            if value.shape is None or value.dtype is not torch.float32:
                raise ValueError(f"{name} has no form in ONNX here: it is no float32 of a known shape for each sample")
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.plan.batch or "batch", *value.shape])

        inputs, outputs = ([port(name) for name in names] for names in (self.plan.inputs, self.plan.outputs))
        graph = helper.make_graph(self.nodes, "rarefy", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        checker.check_model(model)
        content: bytes = model.SerializeToString()
        return content

    def _add(self, item: Runnable) -> None:
        step = item.step if isinstance(item, Int8) else item
        match step, item:
            case Operator(), _:
                raise ValueError(
                    f"{step.name} runs PyTorch's {step.target}, which has no form in ONNX in int8: save_onnx writes "
                    "the model in float32"
                )
            case LSTMCell() | GRUGates() | Recurrence(), _:
                raise ValueError(
                    f"{step.name} is of a recurrent layer, which has no form in ONNX in int8: save_onnx writes the "
                    "model in float32"
                )
            case Quantize(), Int8(result=Quantized() as of):
                self._node("QuantizeLinear", [step.input, *self._meaning(step.output, of)], step.output)
            case Dequantize(), Int8(operands=(Quantized() as of,)):
                self._node("DequantizeLinear", [step.input, *self._meaning(step.output, of)], step.output)
            case Table(), _:
                index = self._node("Cast", [step.input], f"{step.output}/index", to=6)  # int32
                self._node("Gather", [self._constant(f"{step.output}/table", step.table), index], step.output)
            case _, Int8(operands=operands, result=result):
                xs = [self._float(name, of) for name, of in zip(step.inputs, operands, strict=True)]
                if result is None:
                    self._float32(step, xs, step.output)
                else:
                    y = self._float32(step, xs, f"{step.output}/float")
                    self._node("QuantizeLinear", [y, *self._meaning(step.output, result)], step.output)
            case _:
                self._float32(step, list(step.inputs), step.output)

    def _float(self, name: str, of: Quantized | None) -> str:
        """A quantised value as float32."""
        if of is None:
            return name
        if name not in self.floats:
            made = f"{name}/dequantized"
            self.floats[name] = self._node("DequantizeLinear", [name, *self._meaning(made, of)], made)
        return self.floats[name]

    def _float32(self, step: Step, xs: list[str], output: str) -> str:
        """The step on float32 values."""
        match step:
            case Conv():
                rows = list(zip(*step.padding, strict=True))
                made = self._node(
                    "Conv",
                    [xs[0], self._weight(step, step.weight), *self._bias(step)],
                    f"{output}/sums",
                    kernel_shape=list(step.weight.shape[2:]),
                    strides=list(step.stride),
                    dilations=list(step.dilation),
                    pads=[*rows[0], *rows[1]],
                    group=step.groups,
                )
                return self._ended(made, xs[1:], step.activation, output)
            case Linear():
                made = self._node("MatMul", [xs[0], self._weight(step, step.weight.T)], f"{output}/product")
                if step.bias is not None:
                    made = self._node("Add", [made, *self._bias(step)], f"{output}/sums")
                return self._ended(made, xs[1:], step.activation, output)
            case Affine():
                made, axes = xs[0], len(self.plan.values[step.input].shape or (0,)) - 1
                for kind, factor in (("Mul", step.scale), ("Add", step.shift)):
                    if factor is not None:
                        wide = self._constant(f"{output}/{kind}/factor", factor.reshape(-1, *(1,) * axes))
                        made = self._node(kind, [made, wide], f"{output}/{kind}")
                return self._ended(made, [], step.activation, output)
            case Binary():
                made = self._node("Add" if step.op == "add" else "Mul", xs, f"{output}/both")
                return self._ended(made, [], step.activation, output)
            case Pool():
                options: dict[str, Any] = {"kernel_shape": list(step.kernel), "strides": list(step.stride)}
                options |= {"pads": [*step.padding, *step.padding], "ceil_mode": int(step.ceil_mode)}
                if step.op == "max":
                    return self._node("MaxPool", xs, output, dilations=list(step.dilation), **options)
                return self._node("AveragePool", xs, output, count_include_pad=int(step.count_include_pad), **options)
            case GlobalAverage():
                if step.keepdim:
                    return self._node("GlobalAveragePool", xs, output)
                return self._node("Flatten", [self._node("GlobalAveragePool", xs, f"{output}/mean")], output, axis=1)
            case Concat():
                given = dict(zip(step.inputs, xs, strict=True))
                return self._node("Concat", [given[name] for name in step.operands], output, axis=1)
            case Upsample():
                scales = self._constant(
                    f"{output}/factor", torch.tensor([1.0, 1.0, *map(float, step.factor)], dtype=torch.float32)
                )
                how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
                return self._node("Resize", [xs[0], "", scales], output, **how)
            case Flatten():
                return self._node("Flatten", xs, output, axis=1)
        raise ValueError(
            f"{step.name} is a {step.kind}, which has no form in ONNX in int8: save_onnx writes the model in float32"
        )

    def _weight(self, step: Conv | Linear, weight: Tensor) -> str:
        """The weights, those of a step in int8 as whole numbers and the scales of their channels."""
        name = f"{step.output}/weight"
        if step.weight_scale is None:
            return self._constant(name, weight)
        whole = int8.levels(step).to(torch.int8)
        axis = 0 if isinstance(step, Conv) else 1
        given = [
            self._constant(f"{name}/levels", whole if axis == 0 else whole.T),
            self._constant(f"{name}/scale", step.weight_scale),
            self._constant(f"{name}/zero", torch.zeros(len(whole), dtype=torch.int8)),
        ]
        return self._node("DequantizeLinear", given, name, axis=axis)

    def _bias(self, step: Conv | Linear) -> list[str]:
        return [] if step.bias is None else [self._constant(f"{step.output}/bias", step.bias)]

    def _ended(self, made: str, residual: list[str], activation: Activation, output: str) -> str:
        """The residual added, where there is one, and the activation."""
        if residual:
            made = self._node("Add", [made, *residual], f"{output}/added")
        if activation == "none":
            return self._node("Identity", [made], output)
        if activation == "silu":
            return self._node("Mul", [made, self._node("Sigmoid", [made], f"{output}/gate")], output)
        if activation == "relu6":
            ends = [
                self._constant(f"{output}/{each:g}", torch.tensor(each, dtype=torch.float32)) for each in (0.0, 6.0)
            ]
            return self._node("Clip", [made, *ends], output)
        if activation not in _SIMPLE:
            function, mode, _ = parts(activation)
            raise ValueError(f'{output}: ONNX has no {function} of mode "{mode}": use that of mode "exact" of PyTorch')
        kind, options = _SIMPLE[activation]
        return self._node(kind, [made], output, **options)

    def _meaning(self, name: str, of: Quantized) -> list[str]:
        """Scale and zero point as constants."""
        return [
            self._constant(f"{name}/scale", torch.tensor(of.scale, dtype=torch.float32)),
            self._constant(f"{name}/zero", torch.tensor(of.zero_point, dtype=torch.uint8)),
        ]

    def _constant(self, name: str, tensor: Tensor) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.array(tensor.detach().contiguous().numpy()), name))
        return name

    def _node(self, kind: str, inputs: Sequence[str], output: str, **options: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], **options))
        return output
