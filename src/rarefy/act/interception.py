"""Calls of PyTorch's activation functions, caught while a model runs and computed by ours.

A :class:`Watch` is a mode of PyTorch in which every call of a function of PyTorch comes by: of ``torch.tanh`` as of
``F.gelu``, ``Tensor.sigmoid_`` or ``torch.ops.aten.silu``, wherever it is made. It costs a call some 1.4 us.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from rarefy.act import functional
from rarefy.act.kernels.aten import FORMAT_OF, given_table
from rarefy.act.spec import reference
from rarefy.act.spec.table import Table

if TYPE_CHECKING:
    from rarefy.act.swapping import Swap


class Call(NamedTuple):
    """What a function of PyTorch is to us: one of our functions, or (``kept``) why it is left alone."""

    function: str
    in_place: bool = False
    kept: str = ""


_OURS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(functional, name) for name in ("tanh", "sigmoid", "silu", "gelu", "quick_gelu")},
    **{name: getattr(functional, name) for name in ("mish", "softplus", "hardswish", "elu")},
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
#: PyTorch's own, as references and for what is left to them.
PYTORCH: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    **{name: getattr(F, name) for name in ("silu", "gelu", "mish", "softplus", "hardswish", "elu")},
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
# arguments after the first, in their order, and what they must be for ours to compute the same
_POSITIONS = {"elu": ("alpha", "inplace"), "softplus": ("beta", "threshold")}
_NEEDED = {"alpha": 1.0, "beta": 1.0, "threshold": 20.0}

_INSIDE = "computes its {} inside PyTorch"
#: Every function of PyTorch that is replaced, or named in the report because it is not.
CALLS: dict[Any, Call] = {
    torch.special.expit: Call("sigmoid"),
    F.tanhshrink: Call("tanhshrink", kept=_INSIDE.format("tanh")),
    F.glu: Call("glu", kept=_INSIDE.format("gate")),
    torch._C._nn.glu: Call("glu", kept=_INSIDE.format("gate")),
    **{
        getattr(torch, name): Call(name, kept=_INSIDE.format("gates"))
        for name in ("lstm", "gru", "rnn_tanh", "lstm_cell", "gru_cell", "rnn_tanh_cell")
    },
}
for _name in ("tanh", "sigmoid", "silu", "gelu", "mish", "softplus", "hardswish", "elu"):
    for _place in (torch, torch.Tensor, F, torch._C._nn):
        for _found, _in_place in ((getattr(_place, _name, None), False), (getattr(_place, _name + "_", None), True)):
            if _found is not None:
                CALLS[_found] = Call(_name, _in_place)
for _name in ("tanh", "sigmoid"):
    for _list in ("_foreach_" + _name, "_foreach_" + _name + "_"):
        CALLS[getattr(torch, _list)] = Call(_list, kept="computes those of a list inside PyTorch")
for _call in [call for call in CALLS.values() if call.function != "tanhshrink"]:
    _packet = getattr(torch.ops.aten, _call.function + "_" * _call.in_place, None)
    for _found in () if _packet is None else (_packet, *(getattr(_packet, each) for each in _packet.overloads())):
        CALLS[_found] = _call
CALLS[torch.ops.prims.tanh] = CALLS[torch.ops.prims.tanh.default] = Call("tanh")

#: Names by which code may mean one of them.
NAMES = frozenset(name for call in CALLS.values() for name in (call.function, call.function + "_", "expit"))

# In float32, on the CPU, PyTorch's functions are about as exact as mode "exact" and mostly faster. Ours are faster from
# so many elements on (AVX2, one thread; act.swap is to make no network slower):
_FASTER_FROM = {"tanh": 4096, "gelu_tanh": 4096, "mish": 4096, "GRU": 0}
_MANY = 4096
#: Steps of recurrent cells of fewer numbers take longer here, in every format.
_STEP = 1024


def left(function: str, mode: str, table: Table | None, x: Tensor, many: bool | None = None) -> str:
    """Tell why a call is left to PyTorch; "" where it is ours. ``many`` says that x stands for large tensors."""
    if x.dtype not in FORMAT_OF:
        return f"there is no {function} of {str(x.dtype).removeprefix('torch.')} here"
    if mode == "exact" and x.is_cpu:
        count = _MANY if many or torch.compiler.is_compiling() or torch._C._is_tracing() else x.numel()
        if x.dtype is torch.float32 and count < _FASTER_FROM.get(function, math.inf):
            few = " of few numbers" if function in _FASTER_FROM else ""
            by = " (by sigmoid)" if function == "quick_gelu" else ""
            return f"PyTorch's {function}{by} of float32{few} is faster and about as exact"
        if function in ("LSTMCell", "GRUCell") and count < _STEP:
            return f"PyTorch's {function} of few numbers is faster"
    if x.layout is not torch.strided or x.is_nested:
        return f"there is no {function} of sparse or nested tensors here"
    if mode not in reference.MODES or (function in PYTORCH and mode not in reference.modes(function)):
        return f'{function} has no mode "{mode}"'
    if table is not None and (table.format != FORMAT_OF[x.dtype].name or table.function not in ("tanh", function)):
        return f"the table is one of {table.function} in {table.format}"
    return ""


def key_of(what: Any, x: Tensor) -> Hashable:
    """Return what calls have in common for which :func:`left` says the same, of plain tensors."""
    return (what, x.dtype, x.dtype is torch.float32 and x.numel() >= _MANY)


def activation(
    x: Any,
    function: str,
    mode: str,
    grad: str | None = None,
    table: Table | str | None = None,
    in_place: bool = False,
) -> Tensor:
    """Compute one function by ours, or by PyTorch's where :func:`left` says so; in ``torch.fx``, a swapped call."""
    if not isinstance(x, Tensor) and has_torch_function((x,)):
        text = table.text if isinstance(table, Table) else table
        recorded: Tensor = handle_torch_function(activation, (x,), x, function, mode, grad, text, in_place)
        return recorded
    if left(function, mode, given_table(table) if isinstance(table, str) else table, x):
        return x.copy_(PYTORCH[function](x)) if in_place else PYTORCH[function](x)
    if in_place and (torch.compiler.is_compiling() or not torch._C._is_tracing()):
        return functional.in_place(_OURS[function], x, mode=mode, grad=grad, table=table)
    y = _OURS[function](x, mode, grad=grad, table=table)
    return x.copy_(y) if in_place else y


def is_plain(x: Any) -> bool:
    """Tell whether ``x`` is a tensor as most are: of no other class, dense, on the CPU."""
    return type(x) is Tensor and x.is_cpu and x.layout is torch.strided and not x.is_nested


_watches: WeakValueDictionary[int, Watch] = WeakValueDictionary()
_keys = itertools.count()


@torch.compiler.assume_constant_result
def _tell(key: int, function: str, reason: str) -> bool:
    """Tell a report what a graph that is being compiled calls: run while it is compiled, not when it runs."""
    if key in _watches:
        _watches[key].tell(function, reason)
    return True


class Watch(TorchFunctionMode):
    """What a swapped module knows: how its functions are computed, under what name they are told, and to whom.

    As a mode of PyTorch it replaces the calls that are made while it is active.
    """

    def __init__(self, name: str, mode: str, grad: str | None, table: Table | None, report: Swap | None) -> None:
        super().__init__()
        self.name, self.mode, self.grad, self.table, self.report = name, mode, grad, table, report
        self.key = next(_keys)
        _watches[self.key] = self
        self.what = ""  # the name of a module that is replaced as a whole
        self.unchecked: set[bool] = set()  # states of ``training`` in which a module of its own code has not run yet
        self.seen: set[tuple[str, str]] = set()
        #: By kinds of calls with a plain tensor that were seen: ours with its options, or None for PyTorch's.
        self.ready: dict[Hashable, Callable[[Tensor], Tensor] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the report out: a copy of a model has none."""
        return {**self.__dict__, "report": None, "unchecked": set(), "seen": set(), "ready": {}}

    @property
    def checking(self) -> bool:
        """Whether a part of the model runs for the first time, with every module in it under its watch."""
        return self.report is not None and self.report.checking

    def takes(self, function: str, x: Any, many: bool | None = None) -> bool:
        """Tell whether a call is ours, and note it."""
        if not isinstance(x, Tensor):
            return has_torch_function((x,))
        reason = left(function, self.mode, self.table, x, many)
        self.note(function, reason)
        return not reason

    def remember(self, key: Hashable, function: str, taken: bool) -> None:
        """Be ready for the next call like one with a plain tensor, which was taken or left."""
        if self.report is None or not self.report.checking:
            ours, mode, grad, table = _OURS[function], self.mode, self.gradient(function), self.table
            if grad is None and table is None:
                self.ready[key] = (lambda x: ours(x, mode)) if taken else None
            else:
                self.ready[key] = (lambda x: ours(x, mode, grad=grad, table=table)) if taken else None

    def note(self, function: str, reason: str) -> None:
        """Tell the report of a call when it is the first of its kind."""
        if torch.compiler.is_compiling():
            _tell(self.key, function, reason)
        elif (function, reason) not in self.seen:
            self.seen.add((function, reason))
            self.tell(function, reason)
            if self.report is not None:
                self.report.promote(self.name)

    def tell(self, function: str, reason: str) -> None:
        """Tell the report of a call."""
        if self.report is not None:
            self.report.note(self.name, self.what or f"{function} called", reason)

    def gradient(self, function: str) -> str | None:
        """Return the form of gradient asked for where the function has it, else None for its own."""
        return self.grad if function in ("tanh", "sigmoid") and self.mode != "hard" else None

    def compute(self, x: Tensor, function: str, in_place: bool = False, out: Tensor | None = None) -> Tensor:
        """Compute a function that :meth:`takes` took."""
        grad = self.gradient(function)
        if out is not None:
            return _OURS[function](x, self.mode, grad=grad, table=self.table, out=out)
        return activation(x, function, self.mode, grad, self.table, in_place)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a call of an activation by ours and every other as it is."""
        call = CALLS.get(func)
        if call is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        key: Hashable = None
        if (
            not torch.compiler.is_compiling()
            and len(args) == 1
            and is_plain(args[0])
            and not (kwargs and "out" in kwargs)
        ):
            key = key_of((func, *kwargs.items()) if kwargs else func, args[0])
            ours = self.ready.get(key, self)
            if ours is not self:
                return func(*args, **(kwargs or {})) if ours is None else ours(args[0])  # type: ignore[operator]
        result = self._replaced(call, args, kwargs or {}, key)
        return func(*args, **(kwargs or {})) if result is None else result

    def _replaced(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], key: Hashable) -> Tensor | None:
        """Return what ours makes of a call, or None for one that is left."""
        function, in_place, reason = call
        if reason:
            self.note(function, f"{function} {reason}")
            return None
        options = dict(zip(_POSITIONS.get(function, ("inplace",)), args[1:], strict=False)) | kwargs
        x = args[0] if args else options.pop("input", options.pop("self", None))
        out = options.pop("out", None)
        if function == "gelu" and options.pop("approximate", "none") == "tanh":
            function = "gelu_tanh"
        in_place = bool(options.pop("inplace", in_place))
        if len(args) > 1 + len(_POSITIONS.get(function, ("inplace",))) or any(
            _NEEDED.get(name) != value for name, value in options.items()
        ):
            self.note(function, f"{function} is called with arguments that it has not here")
        elif out is not None and not (isinstance(out, Tensor) and out.shape == x.shape and out.dtype == x.dtype):
            self.note(function, f"{function} is called with an out of another shape or dtype")
        else:
            taken = self.takes(function, x)
            if key is not None and not in_place:
                self.remember(key, function, taken)
            return self.compute(x, function, in_place, out) if taken else None
        return None
