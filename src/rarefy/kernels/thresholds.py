"""Thresholds on the optimizer's side, over all layers at once: what turns used weights to dense ones and back.

A model's weight holds W^, the weight that is used; ``latents`` hold W, the dense one. Before the optimizer's step
:meth:`ThresholdedLayers.before` makes dL/dW of the gradient and puts W into the weight; after it
:meth:`~ThresholdedLayers.after` takes W back and puts W^ there. :func:`mask_` is the hard mask of other methods.

Each is one native call for float32 on the CPU, one Triton launch (and one of sums) for float32, bfloat16 and float16 on
a CUDA device, and PyTorch anywhere else, for layouts that are not dense, and under ``RAREFY_ISA=pytorch``. Weights,
gradients, latents and counts have the same bits in all three. dL/dT is a sum whose order, and so last bits, differ
between them; each gives the same bits every time, whatever the number of threads. On a CUDA device nothing waits, but
for the first call over layers of new sizes; later ones can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rarefy.kernels import _library, _thresholds_native, _thresholds_pytorch
from rarefy.kernels._memory import Gate


class _Implementation(Protocol):
    """What the modules ``_thresholds_*`` offer, for arguments that are checked; kernels want them dense and alike."""

    def before(
        self,
        layers: ThresholdedLayers,
        grads: Sequence[Tensor | None],
        thresholds: Tensor,
        alpha: Tensor,
        lower: Tensor | None,
    ) -> Tensor: ...

    def after(self, layers: ThresholdedLayers, thresholds: Tensor, shrink: Tensor) -> None: ...

    def count(self, layers: ThresholdedLayers, thresholds: Tensor) -> Tensor: ...


class ThresholdedLayers:
    """The weights of some layers, their dense latents and how many thresholds each layer has.

    Args:
        weights: one tensor a layer, of a floating dtype, all on one device. What they hold is W^ but inside a step.
        latents: W, one tensor a weight, of its shape, strides, dtype and device. No two tensors share memory.
        rows: how many thresholds each layer has: 1, or one for each of the ``shape[0]`` output channels.

    Thresholds T and the bounds ``lower`` of all methods are float32 of shape (sum of rows,), row after row and layer
    after layer, ``alpha`` and ``shrink`` float32 of shape (layers,), all on the device of the weights.

    Every method raises ValueError where shapes, dtypes, strides or devices do not fit, before it writes anything.
    """

    def __init__(self, weights: Sequence[Tensor], latents: Sequence[Tensor], rows: Sequence[int]) -> None:
        self.weights, self.latents, self.rows = tuple(weights), tuple(latents), tuple(rows)
        if not len(self.weights) == len(self.latents) == len(self.rows):
            raise ValueError(
                "every layer has one weight, one latent and one number of rows, "
                f"got {len(self.weights)}, {len(self.latents)} and {len(self.rows)}"
            )
        for index, (weight, count) in enumerate(zip(self.weights, self.rows, strict=True)):
            allowed = {1, *weight.shape[:1]}
            if count not in allowed:
                raise ValueError(
                    f"rows[{index}] must be {' or '.join(map(str, sorted(allowed)))} for a weight of shape "
                    f"{tuple(weight.shape)}, got {count}"
                )
        self._gate = Gate(self.weights[0].device.type if self.weights else "cpu")
        self._known: tuple[int, ...] = ()
        self._check()
        places = [place for tensor in (*self.weights, *self.latents) if (place := tensor.data_ptr())]
        if len(set(places)) < len(places):
            raise ValueError("two of the weights and latents share memory: give a tied weight once, latents as clones")
        #: The rows and the values in each of every layer.
        self.sizes = tuple(
            (count, weight.numel() // max(count, 1)) for weight, count in zip(self.weights, self.rows, strict=True)
        )

    @torch.no_grad()
    def before(
        self, grads: Sequence[Tensor | None], thresholds: Tensor, alpha: Tensor, lower: Tensor | None = None
    ) -> Tensor:
        """Make dL/dW of dL/dW^ in place, put W into the weights, and give dL/dT.

        ``grad <- where(|W| <= T, where(|W| < lower, 0, alpha * grad), grad)``, ``weight <- W`` and
        ``dL/dT = -sum over the row of grad * sign(W)`` of the new gradient, with sign(0) = 0.

        Args:
            grads: one tensor a weight, of its shape, dtype and device, of any strides; None counts as zeros.
            thresholds: T >= 0.
            alpha: what share of the gradient a masked weight gets, in [0, 1]. 0 is the sub-gradient of STR, 1 the
                identity straight-through estimator.
            lower: bound of the sparse backward: masked weights with |W| below it get no gradient. None: all get it.

        Returns:
            dL/dT, float32 of the shape of ``thresholds``.

        Source: AutoSparse (arXiv 2304.06941), the proxy derivative ``1 if x > 0 else alpha`` of ``x = |W| - T``.
        """
        self._check()
        known = self._gate.known("grads", grads)
        if not known:
            _alike("grads", grads, "weights", self.weights)
        thresholds, alpha = self._per_row("thresholds", thresholds), self._per_layer("alpha", alpha)
        lower = None if lower is None else self._per_row("lower", lower)
        chosen = self._implementation()
        if chosen is _thresholds_pytorch:
            return _thresholds_pytorch.before(self, grads, thresholds, alpha, lower)
        if known:
            result = chosen.before(self, grads, thresholds, alpha, lower)
            torch.autograd.graph.increment_version([*self.weights, *(grad for grad in grads if grad is not None)])
            return result
        # Gradients of other strides go through a copy that lies as the weight does.
        placed = [
            grad if grad is None or _order(grad) == _order(weight) else torch.empty_like(weight).copy_(grad)
            for grad, weight in zip(grads, self.weights, strict=True)
        ]
        result = chosen.before(self, placed, thresholds, alpha, lower)
        if all(grad is copy for grad, copy in zip(grads, placed, strict=True)):
            self._gate.passed("grads", grads)
        for grad, copy in zip(grads, placed, strict=True):
            if grad is not None and copy is not None and grad is not copy:
                grad.copy_(copy)
        torch.autograd.graph.increment_version([*self.weights, *(grad for grad in placed if grad is not None)])
        return result

    @torch.no_grad()
    def after(self, thresholds: Tensor, shrink: Tensor) -> None:
        """Take W from the weights and put W^ there.

        ``latent <- weight``, ``weight <- 0 if |W| <= T else W - copysign(shrink * T, W)``. NaN and infinities pass.

        Args:
            thresholds: T >= 0.
            shrink: by what share of T living weights come nearer to zero, in [0, 1]: 1 is the soft threshold, 0 the
                hard one.
        """
        self._check()
        thresholds, shrink = self._per_row("thresholds", thresholds), self._per_layer("shrink", shrink)
        chosen = self._implementation()
        chosen.after(self, thresholds, shrink)
        if chosen is not _thresholds_pytorch:
            torch.autograd.graph.increment_version([*self.weights, *self.latents])

    @torch.no_grad()
    def count(self, thresholds: Tensor) -> Tensor:
        """How many |W| > T each layer has: int64 of shape (layers,) on the device, of the latents."""
        self._check()
        return self._implementation().count(self, self._per_row("thresholds", thresholds))

    def _check(self) -> None:
        """Refuse weights and latents that do not go together: a model may have moved since they were given."""
        if self._known and self._known == tuple(tensor.data_ptr() for tensor in (*self.weights, *self.latents)):
            return
        _alike("latents", self.latents, "weights", self.weights)
        for index, (weight, latent) in enumerate(zip(self.weights, self.latents, strict=True)):
            if not weight.is_floating_point():
                raise ValueError(f"weights[{index}] must be of a floating dtype, got {weight.dtype}")
            if weight.device != self.weights[0].device:
                raise ValueError(
                    f"the weights must be on one device, got {self.weights[0].device} and, in weights[{index}], "
                    f"{weight.device}: make one ThresholdedLayers for each device"
                )
            if _order(weight) != _order(latent):
                raise ValueError(
                    f"latents[{index}] must have the strides {weight.stride()} of its weight, got {latent.stride()}: "
                    "make it with weight.detach().clone()"
                )
        self._known, self._gated = tuple(tensor.data_ptr() for tensor in (*self.weights, *self.latents)), False
        self._dense = len({weight.dtype for weight in self.weights}) == 1 and all(
            _dense(weight.shape, weight.stride(), rows) for weight, rows in zip(self.weights, self.rows, strict=True)
        )

    def addresses(self, tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
        """Where weights, latents or gradients lie, 0 for None; for the kernels."""
        if tensors is self.weights or tensors is self.latents:
            if not self._gated:  # PyTorch takes what a kernel cannot
                self._gate.addresses((*self.weights, *self.latents), known=False)
                self._gated = True
            half = len(self.weights)
            return self._known[:half] if tensors is self.weights else self._known[half:]
        return self._gate.addresses(tensors, self._gate.known("grads", tensors))

    def _per_row(self, name: str, given: Tensor) -> Tensor:
        return self._numbers(name, given, sum(self.rows), "one a row")

    def _per_layer(self, name: str, given: Tensor) -> Tensor:
        return self._numbers(name, given, len(self.rows), "one a layer")

    def _numbers(self, name: str, given: Tensor, count: int, each: str) -> Tensor:
        device = self.weights[0].device if self.weights else given.device
        if given.dtype != torch.float32 or given.shape != (count,) or given.device != device:
            raise ValueError(
                f"{name} must be float32 of shape ({count},), {each}, on {device}, got {given.dtype} of shape "
                f"{tuple(given.shape)} on {given.device}"
            )
        return given.contiguous()

    def _implementation(self) -> _Implementation:
        if not self._dense:
            return _thresholds_pytorch
        return _implementation(self.weights[0].device, self.weights[0].dtype)


class Masks:
    """Boolean masks of some layers, to be laid over lists of tensors again and again: see :func:`mask_`.

    Args:
        masks: bool, one tensor a layer.
    """

    def __init__(self, masks: Sequence[Tensor]) -> None:
        self.masks = tuple(masks)
        self._gate = Gate(self.masks[0].device.type if self.masks else "cpu")

    @torch.no_grad()
    def cut_(self, tensors: Sequence[Tensor | None]) -> None:
        """Set ``tensors[i]`` to 0 in place where not ``masks[i]``; None is passed over. See :func:`mask_`."""
        if self._gate.known("tensors", tensors):
            whole = [tensor for tensor in tensors if tensor is not None]
            masks = [mask for tensor, mask in zip(tensors, self.masks, strict=True) if tensor is not None]
            if not whole:
                return
            if _implementation(whole[0].device, whole[0].dtype) is not _thresholds_pytorch:
                self._cut(whole, masks, known=True)
                return
        pairs = [(tensor, mask) for tensor, mask in zip(tensors, self.masks, strict=True) if tensor is not None]
        if mask_([tensor for tensor, _ in pairs], [mask for _, mask in pairs]):
            self._gate.passed("tensors", tensors)

    def _cut(self, tensors: Sequence[Tensor], masks: Sequence[Tensor], known: bool) -> None:
        chosen: Any = _implementation(tensors[0].device, tensors[0].dtype)
        chosen.mask(tensors, self._gate.addresses(tensors, known), self._gate.addresses(masks, known))
        torch.autograd.graph.increment_version(tensors)


@torch.no_grad()
def mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    """Set ``tensors[i]`` to 0 in place where not ``masks[i]``, NaN and infinities too; what stays keeps its bits.

    Args:
        tensors: weights or gradients of any floating dtype.
        masks: bool, each of the shape and device of its tensor.

    Returns:
        Whether a kernel took all of them at once: they are dense, of one dtype and device, and lie as their masks do.

    Raises ValueError where they do not fit, before anything is written.
    """
    if len(tensors) != len(masks):
        raise ValueError(f"every tensor has one mask, got {len(tensors)} tensors and {len(masks)} masks")
    for index, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
        if mask.dtype != torch.bool or mask.shape != tensor.shape or mask.device != tensor.device:
            raise ValueError(
                f"masks[{index}] must be bool of shape {tuple(tensor.shape)} on {tensor.device}, got {mask.dtype} of "
                f"shape {tuple(mask.shape)} on {mask.device}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"tensors[{index}] must be of a floating dtype, got {tensor.dtype}")
    together: dict[tuple[torch.device, torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, mask in zip(tensors, masks, strict=True):
        plain = _dense(tensor.shape, tensor.stride(), 1) and _order(tensor) == _order(mask)
        some, theirs = together.setdefault((tensor.device, tensor.dtype, plain), ([], []))
        some.append(tensor)
        theirs.append(mask)
    kernels = 0
    for (device, dtype, plain), (some, theirs) in together.items():
        chosen = _implementation(device, dtype) if plain else None
        if chosen is None or chosen is _thresholds_pytorch:
            _thresholds_pytorch.mask(some, theirs)
        else:
            Masks(theirs)._cut(some, theirs, known=False)
            kernels += 1
    return len(together) == kernels == 1


def _alike(name: str, tensors: Sequence[Tensor | None], model_name: str, models: Sequence[Tensor]) -> None:
    """Raise ValueError unless every tensor has the shape, dtype and device of its model, and memory of its own."""
    if len(tensors) != len(models):
        raise ValueError(f"{name} must be as many as {model_name}, {len(models)}, got {len(tensors)}")
    for index, (tensor, model) in enumerate(zip(tensors, models, strict=True)):
        if tensor is None:
            continue
        if tensor.shape != model.shape or tensor.dtype != model.dtype or tensor.device != model.device:
            raise ValueError(
                f"{name}[{index}] must be as {model_name}[{index}], {model.dtype} of shape {tuple(model.shape)} on "
                f"{model.device}, got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name}[{index}] is expanded, so its elements share memory: give it as a clone()")


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The strides, but for dimensions of one element, whose stride says nothing."""
    return tuple(stride if size != 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@functools.lru_cache(maxsize=4096)
def _dense(shape: tuple[int, ...], strides: tuple[int, ...], rows: int) -> bool:
    """Whether the elements fill one stretch of memory and, where there are rows, row after row."""
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return rows == 1 or strides[0] * shape[0] == expected


def _implementation(device: torch.device, dtype: torch.dtype) -> _Implementation:
    """What computes on dense tensors of this dtype on this device."""
    if _library.isa() != "pytorch":
        if device.type == "cpu" and dtype == torch.float32 and _thresholds_native.available():
            return _thresholds_native
        if device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16):
            return _triton(device) or _thresholds_pytorch
    return _thresholds_pytorch


@functools.cache
def _triton(device: torch.device) -> _Implementation | None:
    """The Triton kernels, or None where Triton is missing or runs nothing on this device."""
    try:
        from rarefy.kernels import _thresholds_triton

        _thresholds_triton.probe(device)
    except ImportError:
        return None
    except Exception as error:  # a device that is too old, no C compiler: Triton has an exception for each
        warnings.warn(f"Triton does not run on {device}, so thresholds run in PyTorch: {error}", stacklevel=2)
        return None
    return _thresholds_triton
