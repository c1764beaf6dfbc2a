"""Compute the activations of a model that somebody else wrote by ours, and put everything back."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode, _pop_mode, _push_mode

from rarefy.act.interception import CALLS, PYTORCH, Watch, activation, is_plain, left
from rarefy.act.modules import LSTMCell, Tanh
from rarefy.act.reading import Reader, is_foreign
from rarefy.act.spec.table import Table


def _gelu(module: Any) -> str:
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


#: Modules that are one function as a whole: which one, by the qualified name of the class.
_WHOLE: dict[str, Callable[[Any], str]] = {
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
#: Modules of PyTorch that compute activations which are not replaced.
_KEPT = (nn.RNNBase, nn.RNNCellBase, nn.GLU, nn.Tanhshrink)
#: Modules of PyTorch that are replaced by one of ours with the same parameters.
_RECURRENT: dict[type[nn.Module], type[nn.Module]] = {nn.LSTMCell: LSTMCell}
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
#: Modules that take other paths under a mode, with other last places.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class Role(NamedTuple):
    """What a module becomes: a kind ("" for none), the methods that change with it, and whether it is the whole."""

    kind: str
    methods: tuple[str, ...] = ("forward",)
    checked: bool = False


@dataclass
class Swap:
    """What :func:`swap` did, and the way back.

    What is known at once is here at once: modules that are an activation as a whole. Calls in other code are seen when
    they are made: ``replaced`` and ``kept`` grow while the model runs (not inside ``torch.compile``).

    Attributes:
        replaced: (name in the model, what was replaced) for every place.
        kept: (name in the model, why it was not replaced) for every place where an activation was seen and left.
        watched: names of the modules whose code can call an activation; such calls are replaced when they are made.

    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict, repr=False)
    _changed: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = field(default_factory=list, repr=False)
    checking: bool = field(default=False, repr=False)

    def restore(self) -> None:
        """Put everything back as it was; the model keeps its parameters and buffers as they are now."""
        while self._changed:
            module, kind, before = self._changed.pop()
            module.__class__ = kind
            for key in ("_rarefy", "mode", "table"):
                module.__dict__.pop(key, None)
            module.__dict__.update(before)
        self.replaced.clear()
        self.watched.clear()

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, kept {len(self.kept)}"]
        if self.watched:
            lines[0] += f", watched {len(self.watched)}: what these call is told when it was called"
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.replaced]
        lines += [f"  {name or '(the model)'}: kept, {why}" for name, why in self.kept]
        lines += [f"  {name or '(the model)'}: watched" for name in self.watched]
        return "\n".join(lines)

    def note(self, name: str, what: str, reason: str) -> None:
        """Add a place to ``replaced``, or with a reason to ``kept``, once."""
        places, entry = (self.kept, (name, reason)) if reason else (self.replaced, (name, what))
        if entry not in places:
            places.append(entry)

    def caller(self, watch: Watch) -> Watch:
        """Return the watch of the module whose code runs, which it gets where reading the code said it needs none."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            first = frame.f_code.co_varnames[:1]
            owner = frame.f_locals.get(first[0]) if first else None
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                role = getattr(type(owner), "_rarefy_role", Role(""))
                if role.kind in ("", "shielded"):
                    entry = "__call__" if "forward" in owner.__dict__ else "forward"
                    fresh = Watch(self._names[id(owner)], watch.mode, watch.grad, watch.table, self)
                    _change(owner, Role("watched", (entry,)), fresh, self)
                own: Watch = owner.__dict__["_rarefy"]
                return own
            frame = frame.f_back
        return watch


def swap(model: nn.Module, mode: str = "exact", *, grad: str | None = None, table: Table | str | None = None) -> Swap:
    """Compute tanh, sigmoid, silu and gelu of a model by those of :mod:`rarefy.act`, and tell where.

    Nothing of the model is rewritten, no parameter and no attribute changes: modules change their class for one of the
    same name that derives from it.

    * A module that is an activation as a whole (``nn.GELU``, ``transformers``' ``NewGELUActivation``, ...) computes it
      by one call of ours; so does ``nn.LSTMCell``.
    * A module whose code can call an activation, by whatever way (partials, helpers, lambdas, containers, methods, in
      place), is watched: while it runs, calls of PyTorch's functions are made by ours. Each call of PyTorch under it
      costs about 1.4 us more; its children that cannot are not watched. What can is found by reading the code, and
      checked while the model runs for the first time, in training and in evaluation.
    * A call that ours does not take (float64, sparse, ...) or takes longer for (in float32 some, in mode "exact") is
      left to PyTorch, and named in ``kept``.

    Modules that are put in later are not seen: swap again, which leaves alone what was swapped. What is recomputed
    outside of its module (a function inside a forward, under ``torch.utils.checkpoint``) is PyTorch's. Copies and
    pickles of the model stay swapped and have no report.

    ``grad`` goes to the functions that have such a form. Raises ValueError for options that :func:`rarefy.act.tanh`
    does not take, before anything is changed.
    """
    options = Tanh(mode, table=table)  # checks them
    modules = dict(model.named_modules())
    report = Swap(_names={id(module): name for name, module in modules.items()})
    reader = Reader(modules.values())
    plan = {name: _role(name, module, reader, report) for name, module in modules.items()}
    for name, role in list(plan.items()):
        if role is not None and role.kind == "watched" and not {"forward", "__call__"}.isdisjoint(role.methods):
            _shield(modules[name], report, plan)
    for name, module in modules.items():
        if plan[name] is None and type(module) in _FUSED and _is_ordinary(module):
            plan[name] = Role("shielded")
    checked = _is_ordinary(model) and not all(is_foreign(type(module)) for module in modules.values())
    if checked:
        plan[""] = (plan[""] or Role("", ()))._replace(checked=True)
    if reader.saw_scripted:
        scripted = Reader(modules.values(), scripted=True)
        report.kept += [
            (name, "calls an activation in a function of TorchScript, which cannot be looked into")
            for name, module in modules.items()
            if scripted.methods(module)
        ]
    example = next((p for p in model.parameters() if p.is_floating_point()), None)
    for name, role in plan.items():
        if role is not None:
            watch = Watch(name, mode, grad, options.table, report)
            _change(modules[name], role, watch, report)
            if watch.what:
                _announce(modules[name], watch, example)
    if checked:
        model.__dict__["_rarefy"].unchecked.update((True, False))
    return report


def _role(name: str, module: nn.Module, reader: Reader, report: Swap) -> Role | None:
    """Choose what a module becomes; tell the report why it stays."""
    kind = type(module)
    whole = _function_of(kind)
    if "_rarefy" in module.__dict__:
        report.kept.append((name, "swapped before: restore() that first"))
    elif isinstance(module, torch.jit.ScriptModule):
        report.kept.append((name, "compiled by TorchScript, which cannot be looked into"))
    elif "forward" in module.__dict__:
        if whole is not None or reader.value(module.__dict__["forward"]) or reader.methods(module):
            return Role("watched", ("__call__",))
    elif whole is not None and not whole(module):
        report.kept.append((name, f"there is no {kind.__name__} with these arguments here"))
    elif whole is not None and (is_foreign(kind) or _agrees(module, whole(module))):
        return Role("whole")
    elif kind in _RECURRENT:
        return Role("recurrent")
    elif isinstance(module, _KEPT) and getattr(module, "nonlinearity", "") != "relu":
        report.kept.append((name, f"{kind.__name__} computes its activations inside PyTorch"))
    elif isinstance(module, _LAYERS) and is_foreign(kind):
        activation = module.activation
        if isinstance(activation, nn.Module):
            return Role("layer")
        if reader.value(activation):
            return Role("layer") if activation in CALLS else Role("watched")
    else:
        methods = reader.methods(module)
        if methods and isinstance(module, fx.GraphModule):
            report.kept.append((name, "a graph of torch.fx, whose code is generated: swap the model, then trace it"))
        elif methods:
            return Role("watched", methods)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(reader.value(hook) for hook in hooks):
            report.kept.append((name, "a hook calls an activation"))
    return None


def _shield(module: nn.Module, report: Swap, plan: dict[str, Role | None]) -> None:
    """Let the children of a watched module that need no watching run without it."""
    for child in module.children():
        name = report._names[id(child)]
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            _shield(child, report, plan)
        elif plan[name] is None and next(child.children(), None) is not None and _is_ordinary(child):
            plan[name] = Role("shielded")


def _is_ordinary(module: nn.Module) -> bool:
    mine = "forward" in module.__dict__ or "_rarefy" in module.__dict__
    return not mine and not isinstance(module, torch.jit.ScriptModule | fx.GraphModule)


def _function_of(kind: type[nn.Module]) -> Callable[[Any], str] | None:
    """Return what tells the function that modules of a class are as a whole; None where they are none."""
    each: Any
    for each in kind.__mro__:
        of = _WHOLE.get(f"{each.__module__}.{each.__qualname__}")
        if of is not None:
            return of if "_rarefy_role" in vars(kind) or each.forward is kind.forward else None
    return None


@torch.no_grad()
def _agrees(module: nn.Module, function: str) -> bool:
    """Tell whether a module computes a function, by trying it: another class may have the name."""
    if next(module.children(), None) is not None or any(True for _ in module.parameters()):
        return False
    probe = torch.linspace(-9.0, 9.0, 257)
    try:
        given = type(module).forward(module, probe.clone())
    except Exception:  # whatever a stranger's forward does: then it is no activation of one argument
        return False
    same = isinstance(given, Tensor) and given.shape == probe.shape
    return same and torch.allclose(given, PYTORCH[function](probe), rtol=0.0, atol=1e-5)


def _change(module: nn.Module, role: Role, watch: Watch, report: Swap) -> None:
    """Give a module the class of a role; ``restore`` gives the one back that it had when it was swapped."""
    kind, own = type(module), ("mode", "table") if role.kind == "recurrent" else ()
    if "_rarefy" in module.__dict__:
        kind = kind.__mro__[1]
    else:
        before = {key: module.__dict__[key] for key in own if key in module.__dict__}
        report._changed.append((module, kind, before))
    module.__dict__.update(_rarefy=watch, **{key: getattr(watch, key) for key in own})
    module.__class__ = _class_of(kind, role)
    if role.kind == "watched":
        report.watched.append(watch.name)
    elif role.kind in ("whole", "recurrent"):
        watch.what = kind.__name__


def _announce(module: Any, watch: Watch, example: Tensor | None) -> None:
    """Tell of a module that is replaced as a whole, as far as the model's parameters say what it will be given."""
    of = _function_of(type(module))
    function = watch.what if of is None else of(module)
    if example is None:
        watch.note(function, "")
    else:
        watch.takes(function, example)


_classes: dict[tuple[type[nn.Module], Role], type[nn.Module]] = {}


def _class_of(kind: type[nn.Module], role: Role) -> type[nn.Module]:
    """Return the class, of the same name, that modules of a class become in a role."""
    if (kind, role) not in _classes:
        made: dict[str, Any] = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
        made["_rarefy_role"], made["__reduce_ex__"] = role, _reduce
        wrap = {"whole": _whole, "recurrent": _recurrent, "shielded": _shielded, "layer": _shielded}
        for name in role.methods:
            method = getattr(kind, name)
            made[name] = functools.wraps(method)(wrap.get(role.kind, _watched)(kind, method))
        if role.checked and "forward" not in made:
            method = kind.forward
            made["forward"] = functools.wraps(method)(_checked(kind, method))
        if role.kind == "layer":
            made["activation"] = property(_layer_activation, functools.partial(_set, "activation"))
            if issubclass(kind, nn.TransformerEncoderLayer):
                made["activation_relu_or_gelu"] = property(
                    _layer_fused, functools.partial(_set, "activation_relu_or_gelu")
                )
        _classes[kind, role] = type(
            kind.__name__, (_RECURRENT.get(kind, kind) if role.kind == "recurrent" else kind,), made
        )
    return _classes[kind, role]


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Let copies and pickles be made of the class that there was, and changed again."""
    kind, role = type(self), type(self)._rarefy_role
    original = next(each for each in kind.__mro__[1:] if "_rarefy_role" not in vars(each))
    if role.kind == "recurrent":
        original = next(theirs for theirs, ours in _RECURRENT.items() if ours is original)
    make, args, *rest = super(kind, self).__reduce_ex__(protocol)
    return _rebuilt, (role, make, *(original if each is kind else each for each in args)), *rest


def _rebuilt(role: Role, make: Callable[..., Any], *args: Any) -> Any:
    module = make(*args)
    module.__class__ = _class_of(type(module), role)
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


def _watched(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = self._rarefy
        if torch.compiler.is_compiling():
            with watch:
                return method(self, *args, **kwargs)
        if fx._symbolic_trace.is_fx_symbolic_tracing():
            with _recorded(watch, (*args, *kwargs.values())):
                return _under(watch, method, self, *args, **kwargs)
        if watch.unchecked:
            with _check(self):
                return _under(watch, method, self, *args, **kwargs)
        return _under(watch, method, self, *args, **kwargs)

    return call


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


def _checked(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.training not in self._rarefy.unchecked:
            return method(self, *args, **kwargs)
        with _check(self):
            return _under(self._rarefy, method, self, *args, **kwargs)

    return call


@contextlib.contextmanager
def _check(module: Any) -> Iterator[None]:
    """Ask in the block where calls come from, when a model runs for the first time in training or in evaluation."""
    watch = module._rarefy
    first = module.training in watch.unchecked and watch.report is not None
    watch.unchecked.discard(module.training)
    if first:
        watch.report.checking = True
    try:
        yield
    finally:
        if first:
            watch.report.checking = False


def _shielded(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or (self._rarefy.checking and kind not in _FUSED):
            return method(self, *args, **kwargs)
        return _under(None, method, self, *args, **kwargs)

    return call


def _whole(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    function_of: Any = _function_of(kind)

    def compute(self: Any, x: Tensor, key: Hashable = None) -> Any:
        watch, function, in_place = self._rarefy, function_of(self), self.__dict__.get("inplace", False)
        taken = bool(function) and watch.takes(function, x)
        if key is not None and function and not in_place:
            watch.remember(key, function, taken)
        return watch.compute(x, function, in_place) if taken else method(self, x)

    def call(self: Any, input: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return compute(self, input)
        if is_plain(input) and not torch._C._len_torch_function_stack() and not self.__dict__.get("inplace", False):
            key = (function_of(self), input.dtype)
            ours = self._rarefy.ready.get(key, compute)
            if ours is compute:
                return compute(self, input, key)
            return method(self, input) if ours is None else ours(input)
        return _under(None, compute, self, input)

    return call


def _recurrent(kind: type[nn.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    ours = _RECURRENT[kind].forward

    def compute(self: Any, input: Any, hx: Any = None) -> Any:
        taken = self._rarefy.takes(kind.__name__, getattr(input, "data", input))  # a packed sequence has data
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
    return value if call is None or call.kept else functools.partial(_layer_call, layer._rarefy, value, call.function)


def _layer_call(watch: Watch, theirs: Callable[..., Tensor], function: str, x: Tensor) -> Tensor:
    return watch.compute(x, function) if watch.takes(function, x) else theirs(x)


def _layer_fused(layer: Any) -> int:
    """Keep a layer out of PyTorch's fused path, which knows PyTorch's GELU alone, where GELU is ours."""
    kind: int = layer.__dict__["activation_relu_or_gelu"]
    reason = left("gelu", layer._rarefy.mode, layer._rarefy.table, layer.linear1.weight)
    if kind == 2 and reason:
        layer._rarefy.note("gelu", reason)
    return 0 if kind == 2 and not reason else kind


def _set(name: str, layer: Any, value: Any) -> None:
    layer.__dict__[name] = value
