"""Tells, by reading its code, whether a function can reach one of PyTorch's activation functions.

Code is followed from name to name: globals, closures, default arguments, attributes of ``self``, what partials, bound
methods, containers and decorators hold, the methods of parents. A name that leads nowhere counts by how it is spelled.
What errs errs towards yes, which costs time and no answer: code that picks by a computed name, or out of a module of
PyTorch as a whole, or evaluates text, may call anything. Not followed: functions that come as arguments or out of
libraries that are not read.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from rarefy.act.interception import CALLS, NAMES

_MODULE_NAMES = frozenset(
    ("Tanh", "Sigmoid", "SiLU", "GELU", "LSTMCell", "GLU", "Mish", "Softplus", "Hardswish", "ELU")
)
#: PyTorch's modules that call an activation.
MODULES = (*(getattr(nn, name) for name in _MODULE_NAMES), nn.Tanhshrink, nn.RNNBase, nn.RNNCellBase)
#: Modules of PyTorch, out of which code that uses them as values may pick a function by a computed name.
_SPACES = (torch, torch.special, nn.functional, torch._C._nn, torch.ops, torch.ops.aten)
# what evaluates text
_EVALUATING = (eval, exec)
# libraries that are not read, and what of them is
_OPAQUE = ("torch", "numpy", "rarefy", "transformers", "accelerate", "huggingface_hub", "diffusers")
_READ = (
    *("transformers.models", "transformers.activations", "transformers.modeling_layers", "transformers.pytorch_utils"),
    *("diffusers.models", "diffusers.pipelines", "torch.distributions"),
)
_KINDS = frozenset(type(each) for each in CALLS)
_MISSING = object()


class _Reference(NamedTuple):
    """A name that code loads and the attributes that it takes of it."""

    kind: str  # "global", "cell", "self", "import" or "other"
    name: str
    chain: tuple[str, ...]


class _Code(NamedTuple):
    references: tuple[_Reference, ...]
    asked: frozenset[_Reference]  # those that are arguments of isinstance, and nothing else
    computed: bool  # whether a getattr takes a name that is no text in the code
    strings: frozenset[str]
    inner: tuple[types.CodeType, ...]


def is_foreign(value: Any) -> bool:
    """Tell whether a function or class is of a library whose code is not read."""
    module = (getattr(value, "__module__", None) or "") + "."
    top = module.split(".", 1)[0]
    return top in sys.stdlib_module_names or (
        top in _OPAQUE and not any(module.startswith(name + ".") for name in _READ)
    )


_LOADS = {"LOAD_GLOBAL": "global", "LOAD_NAME": "global", "LOAD_DEREF": "cell", "LOAD_CLOSURE": "cell"}
_SILENT = ("CACHE", "PRECALL", "PUSH_NULL", "NOP", "EXTENDED_ARG")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_ASKING = ("isinstance", "issubclass", "getattr")


@cache
def _parse(code: types.CodeType) -> _Code:
    """List what code refers to; of loads that follow each other an attribute belongs to the last."""
    first = code.co_varnames[0] if code.co_argcount else None
    found: list[tuple[_Reference, bool]] = []
    current, imported = _Reference("other", "", ()), ""
    depth = 0  # of the stack since isinstance or getattr was loaded: it is 1 again when the answer lies there
    asking = named = computed = False
    for each in dis.get_instructions(code):
        op, name = each.opname, each.argval
        effect = dis.stack_effect(each.opcode, each.arg, jump=False)
        depth = max(depth + effect, 0) if depth and "JUMP" not in op else 0
        if op in _SILENT:
            continue
        if op in _ATTRIBUTES:
            current = current._replace(chain=(*current.chain, name))
            continue
        found.append((current, asking and depth > 0))
        current = _Reference("other", "", ())
        if depth == 1 and op.startswith("CALL"):
            depth = 0
            computed |= not (asking or named)
        if op in _LOADS:
            current = _Reference(_LOADS[op], name, ())
            if name in _ASKING and not depth:
                depth, asking, named = effect, name != "getattr", False
        elif op == "LOAD_CONST":
            named |= isinstance(name, str)
        elif op.startswith(("FORMAT", "BUILD_STRING", "BINARY")):
            named = False
        elif op.startswith("LOAD_FAST"):
            name = name[-1] if isinstance(name, tuple) else name
            current = _Reference("self", name, ()) if name == first else current
        elif op == "IMPORT_NAME":
            imported = name
        elif op == "IMPORT_FROM":
            current = _Reference("import", imported, (name,))
    used = {reference for reference, asked in found if not asked}
    return _Code(
        tuple(dict.fromkeys(reference for reference, _ in found if reference.name or reference.chain)),
        frozenset(reference for reference, _ in found if reference not in used),
        computed,
        frozenset(each for each in code.co_consts if isinstance(each, str)),
        tuple(each for each in code.co_consts if isinstance(each, types.CodeType)),
    )


class Reader:
    """Reads the code of one model; ``own`` are its modules, each of which is read for itself.

    With ``scripted`` it looks for functions of TorchScript that compute activations instead, which nobody can watch.
    ``skipped`` are names of global functions that are not followed.
    """

    def __init__(self, own: Iterable[nn.Module], scripted: bool = False, skipped: tuple[str, ...] = ()) -> None:
        self._skipped = skipped
        self._own = {id(module) for module in own}
        self._scripted = scripted
        self._names = frozenset() if scripted else NAMES
        self.saw_scripted = False
        self._known: dict[tuple[int, int], bool] = {}
        self._held: list[Any] = []  # keeps what was read alive, and with it its id

    def methods(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of a module's methods from which an activation can be reached."""
        return tuple(
            name
            for name, value in _members(type(module))
            if inspect.isfunction(value) and (name == "__call__" or not name.startswith("__"))
            if self.value(value, module)
        )

    def value(self, value: Any, owner: Any = None) -> bool:
        """Tell whether calling, or picking out of, a value can reach an activation; ``owner`` is what ``self`` is."""
        key = (id(value), id(owner) if isinstance(value, types.FunctionType) else 0)
        if key not in self._known:
            self._known[key] = False  # what leads back to itself says nothing
            self._held += [value, owner]
            self._known[key] = self._read(value, owner)
        return self._known[key]

    def _read(self, value: Any, owner: Any) -> bool:
        if isinstance(value, torch.jit.ScriptFunction):
            self.saw_scripted = True
            return self._scripted and any(f"aten::{name}(" in str(value.inlined_graph) for name in NAMES)
        if (type(value) in _KINDS and value in CALLS) or any(value is each for each in _EVALUATING):
            return not self._scripted
        if isinstance(value, types.FunctionType):
            return self._wrapped(value) if is_foreign(value) else self._function(value, owner)
        if isinstance(value, staticmethod | classmethod):
            return self.value(value.__func__)
        if isinstance(value, property):
            return value.fget is not None and self.value(value.fget, owner)
        if isinstance(value, types.MethodType):
            return self.value(value.__func__, value.__self__)
        if isinstance(value, partial):
            return any(self.value(each) for each in (value.func, *value.args, *value.keywords.values()))
        if isinstance(value, Mapping):
            known = type(value).__module__ in ("builtins", "collections") or not is_foreign(type(value))
            return known and any(self.value(each) for each in list(value.values()))
        if isinstance(value, list | tuple | set | frozenset):
            return any(self.value(each) for each in value if not isinstance(each, int | float | str))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, nn.Module):
            return id(value) not in self._own and any(self._module(each) for each in value.modules())
        call = inspect.getattr_static(type(value), "__call__", None)
        return inspect.isfunction(call) and self.value(call, value)

    def _module(self, module: nn.Module) -> bool:
        return (isinstance(module, MODULES) and not self._scripted) or bool(self.methods(module))

    def _class(self, kind: type) -> bool:
        if issubclass(kind, MODULES):
            return not self._scripted
        return not is_foreign(kind) and any(self.value(value) for _, value in _members(kind))

    def _wrapped(self, function: types.FunctionType) -> bool:
        """Read what a decorator of another library holds, but not its own code."""
        cells = (_cell(function, name) for name in function.__code__.co_freevars)
        return any(self.value(each) for each in cells if inspect.isfunction(each) and not is_foreign(each))

    def _function(self, function: types.FunctionType, owner: Any) -> bool:
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return any(self.value(each) for each in held) or self._code(function.__code__, function, owner)

    def _code(self, code: types.CodeType, function: types.FunctionType, owner: Any) -> bool:
        parsed = _parse(code)
        names = {each.name for each in parsed.references if each.kind == "global"}
        if not self._scripted and (parsed.computed or ("getattr" in names and parsed.strings & self._names)):
            return True
        return (
            any(self._code(each, function, owner) for each in parsed.inner)
            or any(self._reference(each, code, function, owner) for each in parsed.references)
            or ("super" in names and self._parents(parsed, owner))
        )

    def _parents(self, parsed: _Code, owner: Any) -> bool:
        """Read what ``super().name`` may be: the methods of that name of all parents."""
        taken = {name for each in parsed.references for name in each.chain}
        kinds = type(owner).__mro__ if owner is not None else ()
        return any(
            name in vars(kind) and (issubclass(kind, MODULES) or self.value(vars(kind)[name], owner))
            for kind in kinds
            for name in taken
        )

    def _reference(self, reference: _Reference, code: types.CodeType, function: types.FunctionType, owner: Any) -> bool:
        kind, name, chain = reference
        value: Any = _MISSING
        if kind == "global" and name not in self._skipped:
            value = function.__globals__.get(name, vars(builtins).get(name, _MISSING))
        elif kind == "import":
            value = sys.modules.get(name, _MISSING)
        elif kind == "cell" and name in function.__code__.co_freevars:
            value = _cell(function, name)
        elif owner is not None and (name == "self" or (kind == "self" and code is function.__code__)):
            value = owner
        for at, attribute in enumerate(chain):
            if attribute == "__dict__" and _is_space(value):
                break
            if isinstance(value, type) and not is_foreign(value) and self.value(value):
                return True  # such as an autograd function, whose apply is PyTorch's
            holder, value = value, _attribute(value, attribute)
            if value is _MISSING:
                return not self._names.isdisjoint(chain[at:])
            if isinstance(value, nn.Module) and id(value) in self._own:
                return False  # read for itself
            if isinstance(value, types.FunctionType | property):
                return self.value(value, holder if not isinstance(holder, types.ModuleType | type) else None)
        if _is_space(value):
            return not self._scripted
        return value is not _MISSING and reference not in _parse(code).asked and self.value(value)


def compared(modules: Iterable[nn.Module]) -> set[type[nn.Module]]:
    """Return the classes that code of modules compares types with: one that derives from such a class is another."""
    found: set[type[nn.Module]] = set()
    for kind in {type(module) for module in modules}:
        functions = [value for _, value in _members(kind) if inspect.isfunction(value)]
        seen: set[types.FunctionType] = set()
        while functions:
            function = functions.pop()
            if function in seen or is_foreign(function):
                continue
            seen.add(function)
            values = list(_values(function.__code__, function))
            functions += [value for value in values if isinstance(value, types.FunctionType)]
            if type in values or "__class__" in function.__code__.co_names:
                each: Any
                for each in values:
                    held = each if isinstance(each, list | tuple | set | frozenset | dict) else (each,)
                    found.update(value for value in held if isinstance(value, type) and issubclass(value, nn.Module))
    return found


def _values(code: types.CodeType, function: types.FunctionType) -> Iterator[Any]:
    """Yield what the names in code stand for that need no object to be looked up in."""
    for kind, name, chain in _parse(code).references:
        value = function.__globals__.get(name, vars(builtins).get(name, _MISSING)) if kind == "global" else _MISSING
        value = _cell(function, name) if kind == "cell" else value
        for attribute in chain:
            value = _attribute(value, attribute)
        if value is not _MISSING:
            yield value
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _values(inner, function)


def _is_space(value: Any) -> bool:
    return any(value is space for space in _SPACES)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield what a class and its parents define, but those of libraries that are not read; the nearest first."""
    seen: set[str] = set()
    for each in kind.__mro__:
        if not is_foreign(each) and each is not object:
            for name, value in vars(each).items():
                if name not in seen:
                    seen.add(name)
                    yield name, value


def _cell(function: types.FunctionType, name: str) -> Any:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    try:
        return cells[name].cell_contents if name in cells else _MISSING
    except ValueError:  # not filled yet
        return _MISSING


def _attribute(value: Any, name: str) -> Any:
    """Look an attribute up without running code of the object's."""
    if value is _MISSING:
        return _MISSING
    if isinstance(value, nn.Module) and name in value._modules:
        return value._modules[name]
    if isinstance(value, types.ModuleType):
        return vars(value).get(name, _MISSING)
    if isinstance(value, torch._ops._OpNamespace | torch._ops._Ops | torch._ops.OpOverloadPacket):
        return getattr(value, name, _MISSING)
    return inspect.getattr_static(value, name, _MISSING)
