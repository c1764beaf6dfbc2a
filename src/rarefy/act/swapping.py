"""Compute the activations of a model that somebody else wrote by ours, and put everything back."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from rarefy.act import mlp
from rarefy.act.interception import CALLS, Watch
from rarefy.act.modules import Tanh
from rarefy.act.reading import Reader, is_foreign
from rarefy.act.roles import FUSED, RECURRENT, Role, agrees, class_of, entry_of, function_of, unit_of
from rarefy.act.spec.table import Table

#: Modules of PyTorch that compute activations which are not replaced.
_KEPT = (nn.RNNBase, nn.RNNCellBase, nn.GLU, nn.Tanhshrink)
#: The frames in which a module runs its own code.
_ENTRIES = ("forward", "_call_impl", "_wrapped_call_impl")
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
#: Modules of one call of PyTorch, for which shielding costs what a watch does.
_CHEAP = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.Identity, nn.Flatten)


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
    _changed: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)
    checking: bool = field(default=False, repr=False)

    def restore(self) -> None:
        """Put everything back as it was; the model keeps its parameters and buffers as they are now."""
        while self._changed:
            module, kind = self._changed.pop()
            if "_rarefy_role" in vars(type(module)):  # a lazy module has changed its class itself
                object.__setattr__(module, "__class__", kind)
            del module.__dict__["_rarefy"]
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
                if frame.f_code.co_name in (*_ENTRIES, *role.methods):
                    if role.kind in ("", "shielded"):
                        fresh = Watch(self._names[id(owner)], watch.mode, watch.grad, watch.table, self)
                        _change(owner, Role("watched", (entry_of(owner),)), fresh, self)
                    own: Watch = owner.__dict__["_rarefy"]
                    return own
            frame = frame.f_back
        return watch


def swap(model: nn.Module, mode: str = "exact", *, grad: str | None = None, table: Table | str | None = None) -> Swap:
    """Compute the activations of a model by the functions of :mod:`rarefy.act`, and tell where.

    Nothing of the model is rewritten, and no attribute changes: modules change their class for one of the same name
    that derives from it.

    * A module that is an activation as a whole (``nn.GELU``, ``transformers``' ``NewGELUActivation``, ...) is one call
      of ours, ``nn.LSTM``, ``nn.GRU`` and their cells are ours, and ``down(act(gate(x)) * up(x))`` is a gated unit.
    * A module whose code can call an activation, by whatever way (partials, helpers, lambdas, containers, methods, in
      place), is watched: while it runs, calls of PyTorch's functions are made by ours. A call of PyTorch under it costs
      some microseconds more; its children that cannot call one are not watched. What can is found by reading the code,
      and checked while the model runs for the first time, in training and in evaluation.
    * A call that ours does not take (float64, sparse, ...) or takes longer for (float32 in mode "exact") is left to
      PyTorch, and named in ``kept``.

    Modules that are put in later are not seen: swap again, which leaves alone what was swapped. What is recomputed
    outside of its module (a function inside a forward, under ``torch.utils.checkpoint``) is PyTorch's. Copies and
    pickles of the model stay swapped and have no report.

    Args:
        model: any module, changed in place; :meth:`Swap.restore` is the way back.
        mode: "exact", "ktanh" or "hard", as for :func:`rarefy.act.tanh`.
        grad: goes to the functions that have such a form, tanh and sigmoid.
        table: for mode "ktanh", used for the functions and dtypes that it fits.

    Raises ValueError for options that :func:`rarefy.act.tanh` does not take, before anything is changed.

    """
    options = Tanh(mode, table=table)  # checks them
    modules = dict(model.named_modules())
    for module in modules.values():
        if "_rarefy_role" in vars(type(module)) and "_rarefy" not in module.__dict__:
            module.__class__ = type(module).__mro__[1]  # made of a swapped class, such as by its from_pretrained
    report = Swap(_names={id(module): name for name, module in modules.items()})
    reader = Reader(modules.values())
    lazy = Reader(modules.values(), skipped=("eager_attention_forward",))
    plan = {name: _role(name, module, reader, lazy, report) for name, module in modules.items()}
    for name, role in list(plan.items()):
        watched = role is not None and role.kind in ("watched", "attention")
        if role is not None and watched and not {"forward", "__call__"}.isdisjoint(role.methods):
            _shield(modules[name], report, plan)
    for name, module in modules.items():
        if plan[name] is None and type(module) in FUSED and _is_ordinary(module):
            plan[name] = Role("shielded")
    checked = _is_ordinary(model) and not all(is_foreign(type(module)) for module in modules.values())
    checked = checked and entry_of(model) == "forward" and (plan[""] is None or "__call__" not in plan[""].methods)
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
    try:
        for name, role in plan.items():
            if role is not None:
                watch = Watch(name, mode, grad, options.table, report)
                _change(modules[name], role, watch, report)
                if role.kind in ("whole", "recurrent"):
                    _announce(modules[name], watch, example)
    except BaseException:  # such as of a class that does not let others derive from it
        report.restore()
        raise
    if checked:
        model.__dict__["_rarefy"].unchecked.update((True, False))
    return report


def _role(name: str, module: nn.Module, reader: Reader, lazy: Reader, report: Swap) -> Role | None:
    """Choose what a module becomes; tell the report why it stays."""
    kind = type(module)
    whole = function_of(kind)
    if "_rarefy" in module.__dict__:
        report.kept.append((name, "swapped before: restore() that first"))
    elif isinstance(module, torch.jit.ScriptModule):
        report.kept.append((name, "compiled by TorchScript, which cannot be looked into"))
    elif "forward" in module.__dict__:
        if whole is not None or reader.value(module.__dict__["forward"]) or reader.methods(module):
            return Role("watched", ("__call__",))
    elif entry_of(module) == "__call__":
        if reader.value(kind.forward):
            return Role("watched", ("__call__",))
    elif whole is not None and not whole(module):
        report.kept.append((name, f"there is no {kind.__name__} with these arguments here"))
    elif whole is not None and (is_foreign(kind) or agrees(module, whole(module))):
        return Role("whole")
    elif kind in RECURRENT:
        return Role("recurrent")
    elif isinstance(module, _KEPT) and getattr(module, "nonlinearity", "") != "relu":
        report.kept.append((name, f"{kind.__name__} computes its activations inside PyTorch"))
    elif isinstance(module, _LAYERS) and is_foreign(kind):
        activation = module.activation
        if isinstance(activation, nn.Module):
            return Role("layer")
        if reader.value(activation):
            return Role("layer") if isinstance(activation, Hashable) and activation in CALLS else Role("watched")
    else:
        methods = reader.methods(module)
        if isinstance(module, fx.GraphModule):
            targets = [getattr(Tensor, str(n.target), n.target) for n in module.graph.nodes if n.op.startswith("call_")]
            if any(isinstance(target, Hashable) and target in CALLS for target in targets):
                report.kept.append(
                    (name, "a graph of torch.fx, whose code is generated: swap the model, then trace it")
                )
            return None
        if methods:
            only_eager = methods == ("forward",) and hasattr(module, "config") and not lazy.methods(module)
            return Role("attention" if only_eager else "watched", methods)
        form = mlp.read(module)
        act = module._modules[form.act] if form is not None else None
        if act is not None and unit_of(act, function_of(type(act))):
            return Role("gated")
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
        elif plan[name] is None and type(child) not in _CHEAP and _is_ordinary(child):
            plan[name] = Role("shielded")


def _is_ordinary(module: nn.Module) -> bool:
    mine = "forward" in module.__dict__ or "_rarefy" in module.__dict__
    return not mine and not isinstance(module, torch.jit.ScriptModule | fx.GraphModule | LazyModuleMixin)


def _change(module: nn.Module, role: Role, watch: Watch, report: Swap) -> None:
    """Give a module the class of a role; ``restore`` gives the one back that it had when it was swapped."""
    kind = type(module)
    if "_rarefy" in module.__dict__:
        kind = kind.__mro__[1]
    else:
        report._changed.append((module, kind))
    module.__dict__["_rarefy"] = watch
    object.__setattr__(module, "__class__", class_of(kind, role))
    if role.kind in ("watched", "attention"):
        report.watched.append(watch.name)
    elif role.kind in ("whole", "recurrent"):
        watch.what = kind.__name__
    elif role.kind == "gated":
        watch.what = "gated unit"


def _announce(module: Any, watch: Watch, example: Tensor | None) -> None:
    """Tell of a module that is replaced as a whole, as far as the model's parameters say what it will be given."""
    of = function_of(type(module))
    function = watch.what if of is None else of(module)
    if example is None:
        watch.note(function, "")
    else:
        watch.takes(function, example, many=True)
