"""What modules of a swapped model become: classes of the same name that derive from their own."""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import _get_current_function_mode, _pop_mode, _push_mode

from rarefy.act import gated, mlp
from rarefy.act.interception import CALLS, PYTORCH, Watch, activation, is_plain, key_of, left
from rarefy.act.later import LATER, stepped
from rarefy.act.recurrent import GRU, LSTM, GRUCell, LSTMCell


def _gelu(module: Any) -> str:
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


#: Modules that are one function as a whole: which one, by the qualified name of the class.
WHOLE: dict[str, Callable[[Any], str]] = {
    "torch.nn.modules.activation.Tanh": lambda module: "tanh",
    "torch.nn.modules.activation.Sigmoid": lambda module: "sigmoid",
    "torch.nn.modules.activation.SiLU": lambda module: "silu",
    "torch.nn.modules.activation.GELU": _gelu,
    "torch.nn.modules.activation.Mish": lambda module: "mish",
    "torch.nn.modules.activation.Hardswish": lambda module: "hardswish",
    "torch.nn.modules.activation.ELU": lambda module: "elu" if module.alpha == 1.0 else "",
    "torch.nn.modules.activation.Softplus": lambda module: (
        "softplus" if (module.beta, module.threshold) == (1.0, 20.0) else ""
    ),
    "transformers.activations.GELUActivation": lambda module: "gelu",
    "transformers.activations.GELUTanh": lambda module: "gelu_tanh",
    "transformers.activations.NewGELUActivation": lambda module: "gelu_tanh",
    "transformers.activations.FastGELUActivation": lambda module: "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": lambda module: "gelu_tanh",
    "transformers.activations.SiLUActivation": lambda module: "silu",
    "transformers.activations.QuickGELUActivation": lambda module: "quick_gelu",
    "transformers.activations.MishActivation": lambda module: "mish",
    "transformers.models.bloom.modeling_bloom.BloomGelu": lambda module: "gelu_tanh",
    "timm.layers.activations.GELU": lambda module: "gelu",
    "timm.layers.activations.GELUTanh": lambda module: "gelu_tanh",
    "timm.layers.activations.QuickGELU": lambda module: "quick_gelu",
    "timm.layers.activations.Mish": lambda module: "mish",
    "timm.layers.activations.HardSwish": lambda module: "hardswish",
    "timm.layers.activations.Swish": lambda module: "silu",
    "timm.layers.activations.Sigmoid": lambda module: "sigmoid",
    "timm.layers.activations.Tanh": lambda module: "tanh",
}
#: Modules of PyTorch that are replaced by one of ours with the same parameters.
RECURRENT: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
#: Modules that take other paths under a mode, with other last places.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)

_MANY = 1 << 14  # elements from which a gated unit takes less time than its two halves, which have the same bits


class Role(NamedTuple):
    """What a module becomes: a kind, and the methods that change with it."""

    kind: str
    methods: tuple[str, ...] = ("forward",)


def function_of(kind: type[nn.Module]) -> Callable[[Any], str] | None:
    """Return what tells the function that modules of a class are as a whole; None where they are none."""
    each: Any
    for each in kind.__mro__:
        of = WHOLE.get(f"{each.__module__}.{each.__qualname__}")
        if of is not None:
            return of if "_rarefy_role" in vars(kind) or each.forward is kind.forward else None
    return None


def entry_of(module: nn.Module) -> str:
    """Return the method to change where a module's forward is to change: a forward that is no plain function stays."""
    plain = inspect.isfunction(inspect.getattr_static(type(module), "forward", None))
    return "forward" if plain and "forward" not in module.__dict__ else "__call__"


def unit_of(act: Any, which: Callable[[Any], str] | None) -> str:
    """Return the function of a module whose product with a tensor is one call of ours, or "": its hooks must fire."""
    hooks = (act._forward_hooks, act._forward_pre_hooks, act._backward_hooks, act._backward_pre_hooks)
    if which is None or "forward" in act.__dict__ or any(hooks) or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return ""
    function = which(act)
    return function if function in gated.UNITS else ""


@torch.no_grad()
def agrees(module: nn.Module, function: str) -> bool:
    """Tell whether a module computes a function, by trying it: another class may have the name."""
    if next(module.children(), None) is not None or any(True for _ in module.parameters()):
        return False
    probe = torch.linspace(-9.0, 9.0, 257, device="cpu", dtype=torch.float32)
    try:
        given = type(module).forward(module, probe.clone())
    except Exception:  # whatever a stranger's forward does: then it is no activation of one argument
        return False
    same = isinstance(given, Tensor) and given.shape == probe.shape
    return same and torch.allclose(given, PYTORCH[function](probe), rtol=0.0, atol=1e-5)


_classes: dict[tuple[type[nn.Module], Role], type[nn.Module]] = {}


def class_of(kind: type[nn.Module], role: Role) -> type[nn.Module]:
    """Return the class, of the same name, that modules of a class become in a role."""
    if (kind, role) not in _classes:
        made: dict[str, Any] = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
        made["_rarefy_role"], made["__reduce_ex__"] = role, _reduce
        made["__prepare_scriptable__"] = _not_scripted
        made["_rarefy"] = None  # of instances that are made of this class and not swapped
        wrap = {
            "whole": _whole,
            "recurrent": _recurrent,
            "quiet": _quiet,
            "shielded": _shielded,
            "layer": _shielded,
            "attention": _attention,
            "gated": _gated,
        }
        for name in role.methods:
            method = getattr(kind, name)
            made[name] = functools.wraps(method)(wrap.get(role.kind, _watched)(kind, method))
        if role.kind == "whole":
            which: Any = function_of(kind)
            made["_rarefy_which"] = staticmethod(which)
        if role.kind == "recurrent":
            made["mode" if issubclass(kind, nn.RNNCellBase) else "activation_mode"] = property(
                lambda self: self._rarefy.mode
            )
            made["table"] = property(lambda self: self._rarefy.table)
        if role.kind == "layer":
            made["activation"] = property(_layer_activation, _setter("activation"))
            if issubclass(kind, nn.TransformerEncoderLayer):
                made["activation_relu_or_gelu"] = property(_layer_fused, _setter("activation_relu_or_gelu"))
        if issubclass(kind, nn.TransformerEncoder):
            made["use_nested_tensor"] = property(_encoder_nested, _setter("use_nested_tensor"))
        _classes[kind, role] = _derived(RECURRENT.get(kind, kind) if role.kind == "recurrent" else kind, made)
    return _classes[kind, role]


class _Silent:
    """Keeps the ``__init_subclass__`` of other bases from being called."""

    def __init_subclass__(cls) -> None:
        pass


def _derived(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """Return a class of the same name that derives from one, without running code of its own for classes.

    Registries have the name already, and a class that none may derive from means other people's classes.
    """
    kind: Any = type(base)
    make: Any = abc.ABCMeta.__new__ if issubclass(kind, abc.ABCMeta) else type.__new__
    derived: type[nn.Module] = make(kind, base.__name__, (_Silent, base), members)
    type.__setattr__(derived, "__bases__", (base,))
    return derived


def _not_scripted(self: Any) -> Any:
    raise RuntimeError(
        f"{type(self).__name__} is swapped by rarefy.act.swap and cannot be scripted: use torch.jit.trace, or restore()"
        " the model first"
    )


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Let copies and pickles be made of the class that there was, and changed again."""
    kind, role = type(self), type(self)._rarefy_role
    original = next(each for each in kind.__mro__[1:] if "_rarefy_role" not in vars(each))
    if role.kind == "recurrent":
        original = next(theirs for theirs, ours in RECURRENT.items() if ours is original)
    make, args, *rest = super(kind, self).__reduce_ex__(protocol)
    return _rebuilt, (role, make, *(original if each is kind else each for each in args)), *rest


def _rebuilt(role: Role, make: Callable[..., Any], *args: Any) -> Any:
    module = make(*args)
    module.__class__ = class_of(type(module), role)
    return module


def _under(watch: Watch | None, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a method under a watch, or under none, in the place of one that a caller is under."""
    mode = _get_current_function_mode()  # type: ignore[no-untyped-call]
    outer = mode if isinstance(mode, Watch) else None
    if outer is watch:
        return method(*args, **kwargs)
    if outer is not None:
        _pop_mode()  # type: ignore[no-untyped-call]
    if watch is not None:
        _push_mode(watch)  # type: ignore[no-untyped-call]
    try:
        return method(*args, **kwargs)
    finally:
        if watch is not None:
            _pop_mode()  # type: ignore[no-untyped-call]
        if outer is not None:
            _push_mode(outer)  # type: ignore[no-untyped-call]


def _watched(
    kind: type[nn.Module],
    method: Callable[..., Any],
    needed: Callable[[Any], bool] = lambda self: True,
    quiet: bool = False,
) -> Callable[..., Any]:
    """Run a method under its watch where that is needed, and always when the module runs first."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = self._rarefy
        if watch is None:
            return method(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return _under(watch, method, self, *args, **kwargs)
        functions = _has_functions(args) or (kwargs and _has_functions(kwargs.values()))
        training = self.training
        if quiet and not (functions or training in watch.unchecked or torch._C._len_torch_function_stack()):
            return method(self, *args, **kwargs)
        if fx._symbolic_trace.is_fx_symbolic_tracing():
            with _recorded(watch, (*args, *kwargs.values())):
                return _under(watch, method, self, *args, **kwargs)
        new = (functions or training in watch.unchecked) and not torch._C._is_tracing()
        if not (new or watch.checking or needed(self)):
            return _under(None, method, self, *args, **kwargs)
        run = functools.partial(_checking if new else _under, watch)
        result = run(method, self, *args, **kwargs)
        if isinstance(result, LATER):
            return stepped(result, run, functools.partial(watch.unchecked.discard, training))
        if isinstance(result, types.FunctionType | types.MethodType | functools.partial) and needed(self):
            watch.note("", "gives back a function, which computes outside of it: that is left")
        watch.unchecked.discard(training)  # a run that failed has not shown all
        return result

    return call


_DATA = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))


def _has_functions(values: Iterable[Any]) -> bool:
    """Tell whether functions come as arguments, which the code that is read says nothing of."""
    for value in values:
        if type(value) in _DATA:
            continue
        if callable(value):
            return True
        if isinstance(value, list | tuple | dict) and _has_functions(
            value.values() if isinstance(value, dict) else value
        ):
            return True
    return False


def _checking(watch: Watch, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a method under a watch, and everything under it under watches of its own, to see what they call."""
    report = watch.report
    if report is None:
        return _under(watch, method, *args, **kwargs)
    outer, report.checking = report.checking, True
    try:
        return _under(watch, method, *args, **kwargs)
    finally:
        report.checking = outer


def _attention(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    """Watch an attention of ``transformers`` that calls tanh in its eager form alone, while it has that form."""
    return _watched(kind, method, lambda self: getattr(self.config, "_attn_implementation", None) in (None, "eager"))


def _quiet(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a module alone whose code was not seen to call an activation, once it has run."""
    return _watched(kind, method, lambda self: False, quiet=True)


@contextlib.contextmanager
def _recorded(watch: Watch, args: tuple[Any, ...]) -> Iterator[None]:
    """Make activations of what ``torch.fx`` records in the block as methods of tensors: no mode is told of them."""
    graph = next((arg.node.graph for arg in args if isinstance(arg, fx.Proxy)), None)
    before = 0 if graph is None else len(graph.nodes)
    yield
    for node in [] if graph is None else list(graph.nodes)[before:]:
        call = CALLS.get(getattr(Tensor, str(node.target), None)) if node.op == "call_method" else None
        if call is not None:
            node.op, node.target = "call_function", activation
            table = watch.table and watch.table.text
            node.args = (node.args[0], call.function, watch.mode, watch.gradient(call.function), table, call.in_place)


def _shielded(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a module of PyTorch without a watch; under one, some take other paths, with other last places."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = self._rarefy
        if watch is None or torch.compiler.is_compiling() or (watch.checking and kind not in FUSED):
            return method(self, *args, **kwargs)
        return _under(None, method, self, *args, **kwargs)

    return call


def _whole(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    which: Any = function_of(kind)

    def compute(self: Any, x: Tensor, key: Hashable = None) -> Any:
        watch, function, in_place = self._rarefy, which(self), self.__dict__.get("inplace", False)
        taken = bool(function) and watch.takes(function, x)
        if key is not None and function and not in_place:
            watch.remember(key, function, taken)
        return watch.compute(x, function, in_place) if taken else method(self, x)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = self._rarefy
        if watch is None or len(args) + len(kwargs) != 1:
            return method(self, *args, **kwargs)
        (input,) = args or kwargs.values()  # whatever its name is
        if torch.compiler.is_compiling():
            return compute(self, input)
        if is_plain(input) and not torch._C._len_torch_function_stack() and not self.__dict__.get("inplace", False):
            key = key_of(which(self), input)
            ours = watch.ready.get(key, compute)
            if ours is compute:
                return compute(self, input, key)
            return method(self, input) if ours is None else ours(input)
        return _under(None, compute, self, input)

    return call


def _gated(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    form: Any = mlp.form_of(method)

    def compute(self: Any, x: Any) -> Any:
        watch, children = self._rarefy, self._modules
        tracing = not torch.compiler.is_compiling() and torch._C._is_tracing()  # shapes are tensors there
        if watch is None or tracing or not isinstance(x, Tensor):
            return method(self, x)
        act = children[form.act]
        function = unit_of(act, getattr(type(act), "_rarefy_which", None))
        if not function:
            return method(self, x)
        up = children[form.up](x) if form.up_first else None
        gate = children[form.gate](x)
        up = children[form.up](x) if form.up and not form.up_first else up
        alike = gate.dtype in gated.DTYPES and (up is None or (up.shape == gate.shape and up.dtype == gate.dtype))
        many = torch.compiler.is_compiling() or gate.numel() >= _MANY
        if alike and many and not left(function, watch.mode, watch.table, gate):
            watch.note(function, "")
            return children[form.down](gated.UNITS[function](gate, up, watch.mode, table=watch.table))
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        return children[form.down](act(gate) * up)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and list(kwargs) == [form.argument]:
            args, kwargs = tuple(kwargs.values()), {}
        run = compute if len(args) == 1 and not kwargs else method
        if torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        return _under(None, run, self, *args, **kwargs)

    return call


def _recurrent(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    ours = RECURRENT[kind].forward

    def compute(self: Any, input: Any, hx: Any = None) -> Any:
        watch, tensor = self._rarefy, input.data if isinstance(input, PackedSequence) else input
        taken = watch is not None and watch.takes(kind.__name__, tensor)
        return (ours if taken else method)(self, input, hx)

    def call(self: Any, input: Any, hx: Any = None) -> Any:
        return compute(self, input, hx) if torch.compiler.is_compiling() else _under(None, compute, self, input, hx)

    return call


def _layer_activation(layer: Any) -> Any:
    """Return the activation of a layer of PyTorch's transformers: a function as ours, a module as it is."""
    if "activation" not in layer.__dict__:
        return nn.Module.__getattr__(layer, "activation")
    value = layer.__dict__["activation"]
    call = CALLS.get(value)
    if call is None or call.kept or layer._rarefy is None:
        return value
    return functools.partial(_layer_call, layer._rarefy, value, call.function)


def _layer_call(watch: Watch, theirs: Callable[..., Tensor], function: str, x: Tensor) -> Tensor:
    return watch.compute(x, function) if watch.takes(function, x) else theirs(x)


def _layer_fused(layer: Any) -> int:
    """Keep a layer out of PyTorch's fused path, which knows PyTorch's GELU alone, where GELU is ours."""
    kind: int = layer.__dict__["activation_relu_or_gelu"]
    if kind != 2 or layer._rarefy is None:
        return kind
    reason = left("gelu", layer._rarefy.mode, layer._rarefy.table, layer.linear1.weight, True)
    if reason:
        layer._rarefy.note("gelu", reason)
    return kind if reason else 0


def _encoder_nested(encoder: Any) -> bool:
    """Keep nested tensors, which PyTorch's fused path is for, from layers that do not take it."""
    wanted: bool = encoder.__dict__["use_nested_tensor"]
    return wanted and all(getattr(layer, "activation_relu_or_gelu", 1) for layer in encoder.layers)


def _setter(name: str) -> Callable[[Any, Any], None]:
    return lambda module, value: module.__dict__.__setitem__(name, value)
