"""``torch.export`` of a model, and what is said where that fails."""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, ShapesCollection

from rarefy import _transformer
from rarefy.engine import contractions, named, rearranged, recurrent
from rarefy.engine.structure import title, unwrapped

_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent), str(Path(_transformer.__file__)))


class CaptureError(ValueError):
    """A model that cannot be traced; the message names the operator and the line of the model's code."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage in the block: a trace is many objects, all of which are still in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class OthersAlone:
    """The standard error of all threads but this one: torch.export prints the graphs that it gives up."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        """Write what another thread says."""
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def export(
    model: nn.Module, inputs: tuple[Tensor, ...], fixed_because: str | None
) -> tuple[ExportedProgram, str | None]:
    """The model as functional operators, and why it takes one batch size alone where it does."""
    because = fixed_because or "the inputs have no common dimension 0"
    if fixed_because is None and all(x.dim() and x.shape[0] == inputs[0].shape[0] for x in inputs):
        # A batch of one would be traced as the constant 1, and one tensor given twice has its shape said twice.
        several = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x.detach() for x in inputs)
        shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
        for x in several:
            shapes[x] = {0: Dim("batch", min=1)}
        try:
            return _functional(torch.export.export(model, several, dynamic_shapes=shapes)), None
        except Exception as error:  # there is no common class of what tracing raises
            because = _first_line(error)
    try:
        return _functional(torch.export.export(model, inputs)), because
    except Exception as error:
        raise CaptureError(_explain(model, inputs, error)) from error


_IN_PLACE = frozenset(
    f"aten.{name}_.default"
    for name in ("relu", "hardswish", "hardtanh", "hardsigmoid", "silu", "gelu", "leaky_relu", "elu", "mish", "sigmoid")
)
#: Operators whose result is new memory.
_FRESH = frozenset(f"aten.{name}.default" for name in ("batch_norm", "conv1d", "conv2d", "conv3d", "linear"))


def _out_of_place(graph: fx.Graph) -> None:
    """Activations that overwrite what a layer made, and what nothing else reads, make something new instead.

    It is the same, and ``run_decompositions`` takes far longer for what is in place.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or not node.args:
            continue
        x, name = node.args[0], str(node.target)
        if name in _IN_PLACE and isinstance(x, fx.Node) and str(x.target) in _FRESH and len(x.users) == 1:
            node.target = named.resolve(name.replace("_.default", ".default"))


def _functional(program: ExportedProgram) -> ExportedProgram:
    _out_of_place(program.graph)
    result: ExportedProgram = program.run_decompositions(
        {**recurrent.decompositions(), **contractions.decompositions(), **rearranged.decompositions()}
    )
    return result


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def other_dtype(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Which input is of another floating dtype than the weights, in words; empty where none is."""
    own = {each.dtype for each in model.parameters() if each.is_floating_point()}
    other = [x.dtype for x in inputs if own and x.is_floating_point() and x.dtype not in own]
    weights = ", ".join(sorted(map(str, own)))
    return f"an input is {other[0]} and the weights are {weights}: convert the example, or the model" if other else ""


def _other_width(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Which layer is given another number of channels or features than it takes, in words; empty where none is."""
    found = list[str]()

    def look(name: str, axis: int, wanted: int, what: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.dim() >= -axis and x.shape[axis] != wanted:
                found.append(f"layer {name!r} takes {wanted} {what}, and is given {x.shape[axis]}")

        return before

    with contextlib.ExitStack() as hooks:
        for name, layer in unwrapped(model).named_modules():
            if isinstance(layer, nn.Linear):
                look_at = look(name or "Linear", -1, layer.in_features, "features")
            elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                look_at = look(name or "convolution", -1 - len(layer.kernel_size), layer.in_channels, "channels")
            else:
                continue
            hooks.enter_context(layer.register_forward_pre_hook(look_at))
        with contextlib.suppress(Exception):  # whatever the model raises: the first layer that it does not fit is known
            model(*inputs)
    return found[0] if found else ""


def _explain(model: nn.Module, inputs: Sequence[Tensor], error: BaseException) -> str:
    """What could not be traced, and where in the model's code."""
    if hint := other_dtype(model, inputs):
        return f"{title(model)} cannot be traced: {hint} ({_first_line(error)})"
    if hint := _other_width(model, inputs):
        return f"{title(model)} does not run on this input: {hint} ({_first_line(error)})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OURS)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    found = re.search(r"\b\w+(::\w+|\.\w+\.\w+)", _first_line(error))
    name = getattr(error, "func", None) or (found and found[0])
    if name is None and getattr(error, "partial_fx_graph", None) is not None:
        name = "aten.item"  # Python reads a value, and decides
    what = f"the operator {name}" if name else "its forward"
    return (
        f"{title(model)} cannot be traced: {what} has no fixed graph{where} ({_first_line(error)}). "
        "A model for the engine computes tensors from tensors without control flow on their values; leave that part "
        "out of the model and run it before or after"
    )
