"""Replace the activations of a model that somebody else wrote, and put the old ones back."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from rarefy.act import functional
from rarefy.act.kernels.aten import given_table
from rarefy.act.modules import GELU, Activation, Sigmoid, SiLU, Tanh
from rarefy.act.recurrent import LSTMCell
from rarefy.act.spec.table import Table

_MODULES: dict[type[nn.Module], type[Activation]] = {
    nn.Tanh: Tanh,
    nn.Sigmoid: Sigmoid,
    nn.SiLU: SiLU,
    nn.GELU: GELU,
}
_FUNCTIONS: dict[Any, str] = {
    torch.tanh: "tanh",
    nn.functional.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.special.expit: "sigmoid",
    nn.functional.sigmoid: "sigmoid",
    nn.functional.silu: "silu",
    nn.functional.gelu: "gelu",
}
_METHODS = {"tanh": "tanh", "sigmoid": "sigmoid"}
_FUSED = (nn.LSTM, nn.GRU, nn.RNN, nn.GRUCell, nn.RNNCell)


@dataclass
class Swap:
    """What :func:`swap` did, and the way back.

    Attributes:
        replaced: (name in the model, what was replaced) for every place.
        kept: (name in the model, why it was not replaced) for every place where an activation was seen and left.

    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Put everything back as it was; the model keeps its parameters and buffers as they are now."""
        while self._undo:
            self._undo.pop()()
        self.replaced.clear()

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, kept {len(self.kept)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.replaced]
        lines += [f"  {name or '(the model)'}: kept, {why}" for name, why in self.kept]
        return "\n".join(lines)


def swap(model: nn.Module, mode: str = "exact", *, grad: str | None = None, table: Table | str | None = None) -> Swap:
    """Replace tanh, sigmoid, silu and gelu in a model, in place, by those of :mod:`rarefy.act`.

    Modules (``nn.Tanh``, ``nn.Sigmoid``, ``nn.SiLU``, ``nn.GELU``, ``nn.LSTMCell``) change their class and keep their
    identity, hooks and names. Functions kept as attributes (``self.act = F.gelu``) are exchanged. Calls in a forward
    are rewritten by an fx trace of that module alone, where that is safe: no default or variable arguments, no control
    flow on data, and the same graph in training and evaluation. Everything else is left and told in ``kept``.

    ``grad`` goes to the functions that have such a form. Parameters and ``state_dict`` keys stay what they are.
    Raises ValueError for options that :func:`rarefy.act.tanh` does not take.
    """
    Tanh(mode, table=table)  # checks the options
    result = Swap()
    options: dict[str, Any] = {"mode": mode, "table": table}
    for name, module in list(model.named_modules()):
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            result.kept.append((name, "compiled by TorchScript, which cannot be looked into"))
        elif kind in _MODULES:
            _swap_class(result, name, module, _MODULES[kind], mode, grad, table)
        elif kind is nn.LSTMCell:
            given = given_table(table) if isinstance(table, str) else table
            _assign(result, module, {"__class__": LSTMCell, "mode": mode, "table": given})
            result.replaced.append((name, "LSTMCell"))
        elif isinstance(module, _FUSED):
            result.kept.append((name, f"{kind.__name__} computes its gates inside PyTorch"))
        else:
            if isinstance(module, nn.TransformerEncoderLayer) and type(module.activation) in _MODULES:
                _assign(result, module, {"activation_relu_or_gelu": 0})  # its fused path knows PyTorch's GELU alone
            _swap_attributes(result, name, module, options, grad)
            _swap_calls(result, name, module, options, grad)
    return result


def _assign(result: Swap, module: nn.Module, values: dict[str, Any]) -> None:
    """Set attributes of the instance, remembering the way back."""
    missing = object()
    for key, value in values.items():
        before = type(module) if key == "__class__" else module.__dict__.get(key, missing)
        if before is missing:
            result._undo.append(partial(module.__dict__.pop, key))
        else:
            result._undo.append(partial(object.__setattr__, module, key, before))
        object.__setattr__(module, key, value)


def _gradient(function: str, mode: str, grad: str | None) -> str | None:
    """Return the gradient asked for where the function has it, else its default."""
    return grad if function in ("tanh", "sigmoid") and mode != "hard" else None


def _swap_class(
    result: Swap,
    name: str,
    module: nn.Module,
    kind: type[Activation],
    mode: str,
    grad: str | None,
    table: Table | str | None,
) -> None:
    old = type(module).__name__
    new = kind(mode, grad=_gradient(kind.function, mode, grad), table=table)
    values = {key: new.__dict__[key] for key in ("mode", "grad", "table")}
    _assign(result, module, {"__class__": kind, **values})
    result.replaced.append((name, old))


def _bound(function: str, options: dict[str, Any], grad: str | None) -> Callable[..., Any]:
    """Our function with its options, taking what PyTorch's takes."""
    chosen = {**options, "grad": _gradient(function, options["mode"], grad)}
    ours = getattr(functional, function)

    def call(input: torch.Tensor, inplace: bool = False, **more: Any) -> torch.Tensor:
        if inplace:
            return functional.in_place(ours, input, **chosen, **more)
        result: torch.Tensor = ours(input, **chosen, **more)
        return result

    call.__name__ = call.__qualname__ = f"rarefy_{function}"
    return call


def _swap_attributes(result: Swap, name: str, module: nn.Module, options: dict[str, Any], grad: str | None) -> None:
    for key, value in list(module.__dict__.items()):
        if callable(value) and not isinstance(value, type) and _hashable(value) and value in _FUNCTIONS:
            _assign(result, module, {key: _bound(_FUNCTIONS[value], options, grad)})
            if "activation_relu_or_gelu" in module.__dict__:  # a fused path of nn.TransformerEncoderLayer
                _assign(result, module, {"activation_relu_or_gelu": 0})
            result.replaced.append((f"{name}.{key}" if name else key, _FUNCTIONS[value]))


def _hashable(value: object) -> bool:
    return getattr(value, "__hash__", None) is not None


class _OneModule(fx.Tracer):
    """Traces a module's own forward; its children stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _swap_calls(result: Swap, name: str, module: nn.Module, options: dict[str, Any], grad: str | None) -> None:
    forward = type(module).forward
    code = getattr(inspect.unwrap(forward), "__code__", None)
    named = {*_METHODS, "silu", "gelu", "expit"} & set(code.co_names if code is not None else ())
    if not named or type(module).__module__.startswith("torch.nn."):
        return
    if "forward" in module.__dict__:
        result.kept.append((name, "its forward was replaced before"))
        return
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        result.kept.append((name, f"{', '.join(sorted(named))} in a forward with default or variable arguments"))
        return
    try:
        graph = _traced(module)
    except Exception as error:  # whatever a stranger's forward does to a proxy
        result.kept.append((name, f"{', '.join(sorted(named))} in a forward that fx cannot trace: {error}"))
        return
    functions = []
    for node in graph.nodes:
        function = _METHODS.get(node.target) if node.op == "call_method" else None
        if node.op == "call_function" and _hashable(node.target):
            function = _FUNCTIONS.get(node.target)
        if function is not None:
            node.op, node.target = "call_function", _bound(function, options, grad)
            functions.append(function)
    if not functions:
        result.kept.append((name, f"{', '.join(sorted(named))} in forward, but no call that can be replaced"))
        return
    source = graph.python_code("self")
    scope = dict(source.globals)
    exec(source.src, scope)
    _assign(result, module, {"forward": types.MethodType(scope["forward"], module)})
    result.replaced.extend((name, f"{function} in forward") for function in functions)


def _traced(module: nn.Module) -> fx.Graph:
    """Return the graph of a forward that does not depend on the training flag; raises ValueError for one that does."""
    training = module.training
    try:
        graphs = []
        for flag in (True, False):
            module.training = flag
            graphs.append(_OneModule().trace(module))
    finally:
        module.training = training
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        raise ValueError("it does other things in training than in evaluation")
    return graphs[0]
