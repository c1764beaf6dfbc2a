"""Layers that are computed with as one: their weights lie in one flat tensor, whatever their number and shapes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.sparse.attachment import with_nested
from rarefy.sparse.companion import Companion
from rarefy.sparse.layers import Layer, dense_in_memory, local
from rarefy.sparse.shards import total

#: How many weights a bucket holds at most, unless a single layer has more: what is computed in passing is as large.
MOST = 1 << 26


class Bucket:
    """Some layers of one device, dtype and group of an optimizer.

    Flat tensors, (N,), hold one number for every weight that this process has of the layers, layer after layer, each in
    the order of the parameter's own memory; :meth:`views` gives them back in the layers' shapes.

    Attributes:
        layers: in the model's order.
        optimizer, group: what trains them, and the index of its group that they are in; None before it is known.
        dense: whether the parameters hold the dense weights now, as in an optimizer's step; else those that are used.
        rows: how many numbers each layer has in tensors that are by rows: 1, or one for each output channel.
        own: what the method learns for these layers besides their weights, by name; flat, or by rows.
        kept: what else the method keeps for them, by name: likewise.
        passes: what a method computes with on the memory of all layers.
        per: the names of those in ``own`` and ``kept`` that have one number a "layer" or output "channel"; the others
            are flat.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        optimizer: Optimizer | None = None,
        group: int | None = None,
        *,
        inputs_last: bool = False,
    ) -> None:
        self.layers, self.optimizer, self.group = list(layers), optimizer, group
        self.dense = False
        self.rows = [1] * len(layers)
        self.own: dict[str, nn.Parameter] = {}
        self.kept: dict[str, Tensor] = {}
        self.per: dict[str, str] = {}
        self.companion: Companion | None = None
        self.passes: Any = None
        self.seen: list[tuple[int, int]] = []
        weights = [layer.local for layer in layers]
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.shapes = [weight.shape for weight in weights]
        self.sizes = [weight.numel() for weight in weights]
        self.offsets = [0, *itertools.accumulate(self.sizes)]
        self._strides = [_strides(weight, inputs_last) for weight in weights]
        self._places: list[int] = []
        self._checked: list[int] = []
        self._weights: list[Tensor] = []
        self._views: list[tuple[Tensor, list[Tensor]]] = []
        self._scratch: Tensor | None = None
        self._channels: Tensor | None = None
        self._made_for = [_about(weight) for weight in weights]
        self._stretches: dict[bool, Tensor] = {}
        self._indices: dict[bool, Tensor] = {}
        self._means: dict[str, tuple[int, float]] = {}

    @property
    def trainers(self) -> list[Optimizer]:
        """The optimizer and those inside of it that hold any of the layers' weights, here or on another process."""
        if self.optimizer is None:
            return []
        weights = {id(layer.parameter) for layer in self.layers}
        held = {
            each: {id(p) for group in each.param_groups for p in group["params"]}
            for each in with_nested(self.optimizer)
        }
        holding = [each for each, mine in held.items() if mine & weights]
        if len(holding) > 1:
            return holding
        # ZeroRedundancyOptimizer gives the one inside a part of its weights, of which these may be none.
        return [each for each, mine in held.items() if mine <= held[self.optimizer]]

    def accompany(self, rate: float) -> None:
        """Have what the method learns here stepped as the weights are, at this multiple of their learning rate."""
        if self.own and self.optimizer is not None and self.group is not None:
            self.companion = Companion(self.trainers, self.group, self.own, rate)

    def forget(self, layer: Layer, where: Tensor) -> None:
        """Set what the optimizers remember of a layer's weights to 0, where this mask says so.

        Codes whose meaning only the optimizer knows (integers, as bitsandbytes keeps) stay, and fade as it steps.
        """
        for optimizer in self.trainers:
            for value in optimizer.state.get(layer.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == layer.parameter.shape and value.is_floating_point():
                    _clear(local(value), where)

    @property
    def maximized(self) -> bool:
        """Whether the optimizer goes up the gradients."""
        return (
            self.optimizer is not None
            and self.group is not None
            and bool(self.optimizer.param_groups[self.group].get("maximize", False))
        )

    @property
    def as_laid_out(self) -> bool:
        """Whether every layer's part of a flat tensor has the strides of its weight."""
        rows = zip(self._made_for, self._strides, strict=True)
        return all(size == 0 or about[3] == strides for size, (about, strides) in zip(self.sizes, rows, strict=True))

    @property
    def size(self) -> int:
        """N."""
        return self.offsets[-1]

    def weights(self) -> list[Tensor]:
        """What the parameters hold now, one tensor a layer."""
        places = [layer.place for layer in self.layers]
        if places != self._places:
            self._places, self._weights = places, [layer.local for layer in self.layers]
        return self._weights

    def grads(self) -> list[Tensor | None]:
        """The gradients, one a layer; None where there is none."""
        return [layer.grad for layer in self.layers]

    def flat(self, value: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """A new flat tensor, (N,), of the layers' dtype unless said otherwise."""
        return torch.full((self.size,), value, dtype=dtype or self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor as one tensor a layer, in the layers' shapes, on the same memory."""
        for kept, views in self._views:
            if kept is flat:
                return views
        if flat.stride() != (1,):
            flat = flat.contiguous()
        start = flat.storage_offset()
        rows = zip(self.shapes, self._strides, self.offsets, strict=False)
        return [flat.as_strided(shape, strides, start + offset) for shape, strides, offset in rows]

    def parts(self, values: Tensor) -> list[Tensor]:
        """A tensor by rows as one tensor a layer, on the same memory."""
        return list(values.split_with_sizes(self.rows))

    def shaped(self, values: Tensor) -> list[Tensor]:
        """A tensor by rows as one tensor a layer to compare its weight with, (1, ..., 1) or (out, 1, ..., 1)."""
        rows = zip(self.parts(values), self.shapes, strict=True)
        return [part.view(-1, *[1] * (len(shape) - 1)) for part, shape in rows]

    def keep(self, name: str, flat: Tensor) -> Tensor:
        """Keep a flat tensor under this name, whose views are always the same tensors."""
        self._views = [(kept, views) for kept, views in self._views if kept is not self.kept.get(name)]
        self.kept[name] = flat
        self._views.append((flat, self.views(flat)))
        return flat

    def scratch(self) -> Tensor:
        """A flat tensor for what is computed in passing."""
        if self._scratch is None:
            self._scratch = self.flat()
            self._views.append((self._scratch, self.views(self._scratch)))
        return self._scratch

    def gather(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """One tensor a layer as a flat one; zeros for None."""
        if out is None:
            flat = self.flat()
        else:
            flat = out.zero_() if any(tensor is None for tensor in tensors) else out
        pairs = [(v, t) for v, t in zip(self.views(flat), tensors, strict=True) if t is not None]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [tensor for _, tensor in pairs])
        return flat

    def scatter(self, flat: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Write a flat tensor into one tensor a layer; nowhere for None."""
        if flat.dtype == self.dtype and all(flat is not kept for kept, _ in self._views):
            flat = self.scratch().copy_(flat)
        pairs = [(t, v) for v, t in zip(self.views(flat), tensors, strict=True) if t is not None]
        if pairs:
            torch._foreach_copy_([tensor for tensor, _ in pairs], [view for _, view in pairs])

    def spread(self, values: Tensor, *, channels: bool = False) -> Tensor:
        """A number a layer, (L,), or an output channel, (C,), to one a weight, (N,); differentiable."""
        return _Spread.apply(values, self, channels)  # type: ignore[no-any-return, no-untyped-call]

    def sums(self, flat: Tensor) -> Tensor:
        """(N,) to (L,): the sum over each layer, over all processes that hold a part of it."""
        if flat.is_cuda:  # where one block adds up a stretch: over channels first, of which there are many
            if self._channels is None:
                self._channels = torch.tensor([shape[0] for shape in self.shapes]).to(self.device)
            summed = torch.segment_reduce(self.channel_sums(flat), "sum", lengths=self._channels, unsafe=True)
        else:
            summed = torch.stack([part.sum() for part in flat.split_with_sizes(self.sizes)])
        return total(summed, [layer.shard for layer in self.layers])

    def means(self, flat: Tensor) -> Tensor:
        """(N,) to (L,): the mean over each layer, over all processes that hold a part of it."""
        sizes = torch.tensor([layer.size for layer in self.layers], dtype=torch.float32, device=self.device)
        return self.sums(flat) / sizes

    def mean(self, name: str) -> float:
        """The mean of what is kept by this name, which is read from the device again only where it was written to."""
        kept = self.kept[name]
        if name not in self._means or self._means[name][0] != kept._version:
            self._means[name] = (kept._version, float(kept.mean()))
        return self._means[name][1]

    def channel_sums(self, flat: Tensor) -> Tensor:
        """(N,) to (C,): the sum over each output channel of each layer, those that this process holds."""
        return torch.segment_reduce(flat, "sum", lengths=self._lengths(True), unsafe=True)

    def _lengths(self, channels: bool) -> Tensor:
        """How many weights each layer or output channel has; on the device."""
        if channels not in self._stretches:
            found = self.sizes
            if channels:
                rows = zip(self.sizes, self.shapes, strict=True)
                found = [size // shape[0] for size, shape in rows for _ in range(shape[0])]
            self._stretches[channels] = torch.tensor(found, device=self.device)
        return self._stretches[channels]

    def _index(self, channels: bool) -> Tensor:
        """Which layer or output channel each weight is of, (N,)."""
        if channels not in self._indices:
            lengths = self._lengths(channels)
            numbers = torch.arange(len(lengths), device=self.device, dtype=torch.int32)
            self._indices[channels] = numbers.repeat_interleave(lengths, output_size=self.size)
        return self._indices[channels]

    def marks(self) -> list[tuple[int, int]]:
        """Where the parameters lie and how often they were written to: equal if nobody has.

        Parts without a weight are left out: ``fully_shard`` replaces them, on the processes that have such.
        """
        rows = zip(self.layers, self.sizes, strict=True)
        return [(layer.place, layer.version) if size else (0, 0) for layer, size in rows]

    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """Have in ``kept`` what was there before weights that somebody else has written were looked at."""
        for name, value in kept.items():
            self.kept[name].copy_(value)
        self.seen = [(0, -1)] * len(self.layers)  # they are looked at again, if they left a mark or not

    def check(self) -> None:
        """Raise RuntimeError if a parameter was cast, moved or laid out anew since the bucket was made."""
        places = [layer.place for layer in self.layers]
        if places == self._checked:
            return
        for layer, known in zip(self.layers, self._made_for, strict=True):
            now = _about(layer.local)
            if now != known:
                raise RuntimeError(
                    f"layer {layer.name!r} is {_told(now)} now, and was {_told(known)} when the sparsifier was "
                    "attached: call attach(optimizer) again after moving or casting the model"
                )
        self._checked = places


class _Spread(torch.autograd.Function):
    """Numbers that stretches of weights share, one for each weight; back: the sums over the stretches, always alike."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bucket: Bucket, channels: bool) -> Tensor:
        ctx.bucket, ctx.channels = bucket, channels
        return values.index_select(0, bucket._index(channels))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sums = ctx.bucket.channel_sums if ctx.channels else ctx.bucket.sums
        return sums(grad.contiguous()), None, None


def _clear(state: Tensor, where: Tensor) -> None:
    """Set an optimizer's state to 0 where this mask says so."""
    if type(state) in (Tensor, nn.Parameter):
        state.masked_fill_(where, 0.0)
    elif where.any():  # a subclass that keeps codes of 8 or 4 bits (torchao) takes numbers by copy_, which rounds all
        state.copy_(state.dequantize().masked_fill(where, 0.0))


def _about(weight: Tensor) -> tuple[torch.device, torch.dtype, torch.Size, tuple[int, ...]]:
    return weight.device, weight.dtype, weight.shape, weight.stride()


def _told(about: tuple[torch.device, torch.dtype, torch.Size, tuple[int, ...]]) -> str:
    device, dtype, shape, strides = about
    return f"{dtype} on {device} of shape {tuple(shape)} and strides {strides}"


def _strides(weight: Tensor, inputs_last: bool) -> tuple[int, ...]:
    """The strides of a layer's part of a flat tensor: the weight's own, or with the inputs next to one another."""
    if inputs_last and weight.dim() > 2:
        return torch.empty(weight.movedim(1, -1).shape, device="meta").movedim(-1, 1).stride()
    if dense_in_memory(weight):
        return weight.stride()
    return torch.empty(weight.shape, device="meta").stride()


def make_buckets(
    layers: Sequence[Layer],
    owners: Sequence[tuple[Optimizer | None, int | None]],
    *,
    inputs_last: bool = False,
) -> list[Bucket]:
    """The layers in buckets, ``owners`` being the optimizer of each and the index of its group."""
    kinds: dict[tuple[Any, ...], list[list[Layer]]] = {}
    about: dict[tuple[Any, ...], tuple[Optimizer | None, int | None]] = {}
    for layer, (optimizer, group) in zip(layers, owners, strict=True):
        weight = layer.local
        kind = (weight.device, weight.dtype, id(optimizer), group, layer.shard is None)
        about[kind] = (optimizer, group)
        lists = kinds.setdefault(kind, [[]])
        if lists[-1] and sum(other.local.numel() for other in lists[-1]) + weight.numel() > MOST:
            lists.append([])
        lists[-1].append(layer)
    return [Bucket(some, *about[kind], inputs_last=inputs_last) for kind, lists in kinds.items() for some in lists]
