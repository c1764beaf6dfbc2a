"""Which parameters take part in which products of one forward, and how often: what :mod:`rarefy.cost` counts from.

Every operator that PyTorch runs passes a :class:`Products` mode, below modules and functions and above the kernels. So
a weight is seen wherever it is used: in a layer, a subclass, attention, a recurrent cell or a plain function, once for
each use. What a tensor is, is followed from operator to operator by its storage:

- the weights of a *parameter*: the parameter, a view of it (a third of a packed projection), a copy in another type or
  order, or what is computed from parameters and constants alone (weight normalisation, a mask times the weights). Of
  several parameters the largest names the product;
- *data*, as soon as the model's input or the output of a layer goes into it;
- a constant otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Products", "Tally", "tensors"]

aten = torch.ops.aten

#: Matrix products, by the place of the first of their two operands.
_MATRIX_PRODUCTS = {
    **dict.fromkeys(
        (aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten._int_mm, aten._scaled_mm, aten._grouped_mm), 0
    ),
    **dict.fromkeys((aten.addmm, aten.addmv, aten.addbmm, aten.baddbmm, aten._addmm_activation), 1),
}
_CONVOLUTIONS = (aten.convolution, aten.convolution_overrideable)
#: Recurrent layers of rarefy.act, whose weights, and projection if any, follow the products with the input.
_RECURRENT = {"rarefy::lstm": 2, "rarefy::gru": 1}
#: How many matrices of the hidden size a recurrent cell has one upon the other, by cuDNN's number of its kind.
_GATES = (1, 1, 4, 3)
#: What is opaque of PyTorch's own: fused for other machines than those above, or where attention cannot be told not to.
_OPAQUE = (aten.miopen_rnn, aten._lstm_mps, aten._native_multi_head_attention, aten._transformer_encoder_layer_fwd)
_ATTENTION = "_scaled_dot_product_"

_CONSTANT, _DATA = "", None


@dataclass
class Tally:
    """The products of one parameter over the whole batch, all its uses together.

    `rows` is how many positions it was applied at, `outputs` how many numbers came out of that, and `nonzeros` how many
    weights were not zero where they were computed from the parameter; None where it was used as it is.
    """

    products: int = 0
    rows: int = 0
    outputs: int = 0
    nonzeros: int | None = None


@dataclass(frozen=True)
class _Product:
    """One product: how many multiplications and outputs, and the operands that may be weights, each with its rows."""

    products: int
    outputs: int
    operands: tuple[tuple[Tensor, int], ...] = ()


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in these values, in their lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
        elif isinstance(value, Mapping):
            yield from tensors(value.values())


def _name(func: Any) -> str:
    """``mm`` of ``aten::mm``, ``library::operator`` of other operators."""
    name: str = func._schema.name if isinstance(func, torch._ops.OpOverload) else func.name()
    return name.removeprefix("aten::")


def _products(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> list[_Product]:
    """The products that an operator is made of; none for most."""
    operator = getattr(func, "_overloadpacket", func)
    if operator in _MATRIX_PRODUCTS:
        first = _MATRIX_PRODUCTS[operator]
        left, right = args[first : first + 2]
        inner = max(left.shape[-1], 1)
        products = left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
        # Where both are parameters the second is the weight, as in x W^T.
        operands = ((right, left.numel() // inner), (left, right.numel() // inner))
        return [_Product(products, outputs[0].numel(), operands)]
    if operator in _CONVOLUTIONS:
        source, weight, transposed = args[0], args[1], args[6]
        # Padding counts as if it were data, as everybody counts it.
        rows = (source if transposed else outputs[0]).numel() // (source if transposed else outputs[0]).shape[1]
        return [_Product(rows * weight.numel(), outputs[0].numel(), ((weight, rows),))]
    if operator is aten._trilinear:  # of nn.Bilinear, whose second product has no weights
        weight, rows = args[1], len(args[0])
        return [_Product(rows * weight.numel(), rows * len(weight), ((weight, rows),))]
    if operator is aten.mkldnn_rnn_layer:
        rows = args[0].shape[:2].numel()
        return [_Product(rows * weight.numel(), rows * len(weight), ((weight, rows),)) for weight in args[1:3]]
    if _name(func) in _RECURRENT:
        rows, weights = len(args[0]), args[1 : 1 + _RECURRENT[_name(func)]]
        kept = [weight for weight in weights if weight is not None]
        return [_Product(rows * weight.numel(), rows * len(weight), ((weight, rows),)) for weight in kept]
    if operator is aten._cudnn_rnn:
        weights, per_layer, mode, hidden, projected, lengths = args[1], args[2], *args[6:9], args[14]
        # Packed samples come as all their steps, one below the other.
        rows = args[0].shape[: 1 if lengths else 2].numel()
        # Of a layer and direction come weight_ih, weight_hh, their biases if any, and weight_hr where there is one.
        sizes = {0: _GATES[mode] * hidden, 1: _GATES[mode] * hidden} | ({per_layer - 1: projected} if projected else {})
        return [
            _Product(rows * weight.numel(), rows * sizes[at % per_layer], ((weight, rows),))
            for at, weight in enumerate(weights)
            if at % per_layer in sizes
        ]
    if _name(func).startswith(_ATTENTION):
        query, key, value = args[:3]
        scores = query.shape[:-1].numel() * key.shape[-2]
        return [_Product(scores * (query.shape[-1] + value.shape[-1]), outputs[0].numel())]
    if operator in flop_registry:
        return [_Product(flop_registry[operator](*args, **kwargs, out_val=outputs[0]) // 2, outputs[0].numel())]
    return []


def _key(tensor: Tensor) -> int:
    """What a tensor shares with its views alone."""
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if strided else id(tensor)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of its storage that is a tensor's, and one past the last."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return 0, tensor.numel()
    first = int(tensor.storage_offset())
    return first, first + 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator writes into."""
    if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
        given = {**kwargs, **{to.name: value for to, value in zip(func._schema.arguments, args, strict=False)}}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from tensors([given.get(argument.name)])


def _is_opaque(func: Any) -> bool:
    """Whether nobody here knows what an operator multiplies: it is not one of PyTorch's simple ones."""
    known = isinstance(func, torch._ops.OpOverload) and func.namespace in ("aten", "prim", "prims")
    return not known or func._overloadpacket in _OPAQUE


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block the products of every parameter are added up in `tallies`, by its name.

    `uncounted` holds the multiplications of all other products by operator, None where they are not known. `absorbed`
    is the parameters that went into weights which have the name of another, `ragged` whether samples were packed, each
    with a length of its own. `parameters` gives the names and parameters, `inputs` is what the model is called with.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]], inputs: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tallies: dict[str, Tally] = {}
        self.uncounted: dict[str, int | None] = {}
        self.absorbed: set[str] = set()
        self.ragged = False
        self._parameters = parameters
        self._sizes: dict[str, int] = {}
        self._homes: dict[str, int] = {}  # the storage of every parameter
        # By storage: which elements are what. Parameters may share one, as in a recurrent network on a GPU.
        self._parts: dict[int, list[tuple[int, float, str | None]]] = {}
        for tensor in tensors(inputs):
            self._mark(tensor, _DATA)
        self._find_parameters()

    def _find_parameters(self) -> None:
        for name, parameter in self._parameters():
            self._sizes[name] = parameter.numel()
            self._homes[name] = _key(parameter)
            self._mark_part(parameter, name)

    def _mark(self, tensor: Tensor, origin: str | None) -> None:
        """Note what all of a tensor's storage is."""
        self._parts[_key(tensor)] = [(0, math.inf, origin)]

    def _mark_part(self, tensor: Tensor, origin: str) -> None:
        """Note what a tensor is, which may be a part of its storage."""
        part = (*_span(tensor), origin)
        parts = self._parts.setdefault(_key(tensor), [])
        if part not in parts:
            parts.append(part)

    def _origin(self, tensor: Tensor) -> str | None:
        """`_DATA`, or the name of the largest parameter whose weights are in a tensor, or `_CONSTANT`."""
        parts = self._parts.get(_key(tensor), [])
        if len(parts) > 1:
            first, last = _span(tensor)
            parts = [part for part in parts if part[0] < last and first < part[1]]
        names = [name for *_, name in parts]
        return _DATA if _DATA in names else self._largest(names)

    def _largest(self, names: Iterable[str | None]) -> str:
        return max((name for name in names if name), key=self._sizes.__getitem__, default=_CONSTANT)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            # In inference mode operators that are made of others arrive whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = list(tensors((args, kwargs)))
        # torch.tensor(numbers) comes out of an operator whose input nobody made.
        origins = [] if func is aten.lift_fresh.default else [self._origin(tensor) for tensor in given]
        result = func(*args, **kwargs)
        outputs = list(tensors([result]))
        origins += self._count(func, args, kwargs, given, origins, outputs)
        self._follow(given if origins else [], origins, outputs, list(_written(func, args, kwargs)))
        self.ragged |= func is aten._pack_padded_sequence.default
        return result

    def _count(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Sequence[Tensor],
        origins: Sequence[str | None],
        outputs: Sequence[Tensor],
    ) -> list[str | None]:
        """Add up what an operator multiplies; what a layer gives is data, whatever it was given."""
        products = _products(func, args, kwargs, outputs)
        met_data = _DATA in origins
        if not met_data and all(output.dim() < 2 for output in outputs):
            return []  # a weight in the making: its norm, say
        of_layers = [self._add(product) for product in products]
        if met_data:
            for product, counted in zip(products, of_layers, strict=True):
                if not counted:
                    self._leave_out(func, product.products)
            weights = any(origin and tensor.dim() > 1 for tensor, origin in zip(given, origins, strict=True))
            if weights and not products and _is_opaque(func):
                self._leave_out(func, None)
        return [_DATA] if any(of_layers) else []

    def _add(self, product: _Product) -> bool:
        """Add a product to its parameter's, and say whether it has one."""
        for weight, rows in product.operands:
            if self._origin(weight) == _CONSTANT:
                # FSDP puts a gathered parameter into the place of a shard when its module runs.
                self._find_parameters()
            name = self._origin(weight)
            if name:
                tally = self.tallies.setdefault(name, Tally())
                tally.products += product.products
                tally.rows += rows
                tally.outputs += product.outputs
                if _key(weight) != self._homes[name] and weight.numel() == self._sizes[name]:
                    tally.nonzeros = int(torch.count_nonzero(weight))
                return True
        return False

    def _leave_out(self, func: Any, products: int | None) -> None:
        name = "scaled_dot_product_attention" if _name(func).startswith(_ATTENTION) else _name(func)
        before = self.uncounted.get(name, 0)
        self.uncounted[name] = None if products is None or before is None else before + products

    def _follow(
        self,
        given: Sequence[Tensor],
        origins: Sequence[str | None],
        outputs: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> None:
        """Note what came out of an operator: data, a constant, or weights of the largest parameter that went in."""
        origin = _DATA if _DATA in origins else self._largest(origins)
        views = {_key(tensor) for tensor in given}
        for tensor in outputs:
            if _key(tensor) not in views:
                self._mark(tensor, origin)
        for tensor in written:
            if origin is _DATA:
                self._mark(tensor, origin)
            elif origin and all(name is not _DATA for *_, name in self._parts.get(_key(tensor), [])):
                self._mark_part(tensor, origin)
        if origin:
            self.absorbed |= {name for name in origins if name} - {origin}
