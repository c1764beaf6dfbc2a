"""Compute the activations of a model that somebody else wrote by ours, and put everything back."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from rarefy.act import mlp
from rarefy.act.interception import CALLS, Watch
from rarefy.act.modules import Tanh
from rarefy.act.reading import Reader, compared, is_foreign
from rarefy.act.roles import FUSED, RECURRENT, Role, agrees, class_of, entry_of, function_of, unit_of
from rarefy.act.spec.table import Table

#: Modules of PyTorch that compute activations which are not replaced.
_KEPT = (nn.RNNBase, nn.RNNCellBase, nn.GLU, nn.Tanhshrink)
#: The methods by which a module is called.
_ENTRIES = frozenset(("forward", "__call__"))
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
#: Modules of one call of PyTorch, for which shielding costs what a watch does.
_CHEAP = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.Identity, nn.Flatten)


@dataclass
class Swap:
    """What :func:`swap` did, and the way back.

    What is known at once is here at once: modules that are an activation as a whole. Calls in other code are seen when
    they are made: ``replaced`` and ``kept`` grow while the model runs, or is compiled.

    Attributes:
        replaced: (name in the model, what was replaced) for every place.
        kept: (name in the model, why it was not replaced) for every place where an activation was seen and left.
        watched: names of the modules whose code can call an activation; such calls are replaced when they are made.

    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)
    _modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)
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
        if self._changed:
            kinds = sorted({kind.__name__ for _, kind in self._changed})
            lines.append(
                f"  modules have a class that derives from theirs: {', '.join(kinds)}; isinstance() is true of them,"
                " but code that compares types (type(m) is nn.LSTM) takes them for others"
            )
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.replaced]
        lines += [f"  {name or '(the model)'}: kept, {why}" for name, why in self.kept]
        lines += [f"  {name or '(the model)'}: watched" for name in self.watched]
        return "\n".join(lines)

    def note(self, name: str, what: str, reason: str) -> None:
        """Add a place to ``replaced``, or with a reason to ``kept``, once."""
        places, entry = (self.kept, (name, reason)) if reason else (self.replaced, (name, what))
        if entry not in places:
            places.append(entry)

    def promote(self, name: str) -> None:
        """Watch a module from now on whose code was seen to call an activation, which reading it did not say."""
        module: Any = self._modules[name]
        role = type(module)._rarefy_role
        if role.kind in ("quiet", "shielded", "attention"):
            _change(module, Role("watched", role.methods), module.__dict__["_rarefy"], self)


def swap(
    model: nn.Module, mode: str = "exact", *, grad: str | None = None, table: Table | str | Path | None = None
) -> Swap:
    """Compute the activations of a model by the functions of :mod:`rarefy.act`, and tell where.

    Nothing of the model is rewritten, and no attribute changes: modules change their class for one of the same name
    that derives from it.

    * A module that is an activation as a whole (``nn.GELU``, ``transformers``' ``NewGELUActivation``, ...) is one call
      of ours, ``nn.LSTM``, ``nn.GRU`` and their cells are ours, and ``down(act(gate(x)) * up(x))`` is a gated unit.
    * A module whose code can call an activation, by whatever way (partials, helpers, lambdas, containers, methods, in
      place), is watched: while it runs, calls of PyTorch's functions are made by ours. A call of PyTorch under it costs
      some microseconds more; its children that cannot call one are not watched. What can is found by reading the code,
      and checked when a module first runs, in training and in evaluation, and whenever it is given a function.
    * A call that ours does not take (float64, sparse, ...) or takes longer for (float32 in mode "exact") is left to
      PyTorch, and named in ``kept``.

    Modules and functions that are put in later are not seen: swap again, which leaves alone what was swapped. What is
    recomputed outside of its module (a function inside a forward, under ``torch.utils.checkpoint``) is PyTorch's.
    Copies and pickles of the model stay swapped and have no report.

    Args:
        model: any module, changed in place; :meth:`Swap.restore` is the way back.
        mode: "exact", "fast", "ktanh" or "hard", as for :func:`rarefy.act.tanh`.
        grad: goes to the functions that have such a form, tanh and sigmoid.
        table: for mode "ktanh", used for the functions and dtypes that it fits.

    Raises TypeError for what is no module, ValueError for options that :func:`rarefy.act.tanh` does not take, before
    anything is changed.

    """
    given: Any = model
    if not isinstance(given, nn.Module):
        kind = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"swap takes a model, an instance of torch.nn.Module, got {kind}")
    options = Tanh(mode, grad=grad, table=table)  # checks them
    modules = dict(model.named_modules())
    for module in modules.values():
        if "_rarefy_role" in vars(type(module)) and "_rarefy" not in module.__dict__:
            module.__class__ = type(module).__mro__[1]  # made of a swapped class, such as by its from_pretrained
    report = Swap(_modules=modules)
    reader = Reader(modules.values())
    lazy = Reader(modules.values(), skipped=("eager_attention_forward",))
    plan = {name: _role(name, module, reader, lazy, report) for name, module in modules.items()}
    fixed = compared(modules.values())
    for name, module in modules.items():
        if plan[name] is not None and type(module) in fixed:
            plan[name] = None
            report.kept.append(
                (name, f"code of the model compares types with {type(module).__name__}, which a swap would change")
            )
    shielded = {
        id(child)
        for name, role in plan.items()
        if role is not None and role.kind in ("watched", "attention") and not _ENTRIES.isdisjoint(role.methods)
        for child in _children(modules[name])
    }
    for name, module in modules.items():
        if plan[name] is None and _is_ordinary(module) and type(module) not in fixed:
            if not _is_pytorchs(type(module)):
                plan[name] = Role("quiet", (entry_of(module),))
            elif type(module) in FUSED or (id(module) in shielded and type(module) not in _CHEAP):
                plan[name] = Role("shielded", (entry_of(module),))
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
                elif role.kind in ("watched", "attention", "quiet"):
                    watch.unchecked.update((True, False))
    except BaseException:  # such as KeyboardInterrupt
        report.restore()
        raise
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


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that the code of a module calls: what containers hold that have no forward are among them."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child)
        else:
            yield child


def _is_ordinary(module: nn.Module) -> bool:
    fixed = isinstance(module, torch.jit.ScriptModule | fx.GraphModule | LazyModuleMixin)
    return not fixed and "_rarefy" not in module.__dict__


def _is_pytorchs(kind: type) -> bool:
    return kind.__module__.split(".", 1)[0] in ("torch", "rarefy")


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
