"""The one way from a tensor to memory that a kernel may touch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, empty, inference_mode, strided
from torch._C import _dispatch_keys, _functorch

#: What PyTorch looks at to call an operator on a plain tensor of the CPU, and on one made in inference mode: whatever
#: :func:`_not_plain` tells has another key. One look is half of that function's ten.
_PLAIN = [_dispatch_keys(empty(0, device="cpu"))]
with inference_mode():
    _PLAIN.append(_dispatch_keys(empty(0, device="cpu")))


def address(tensor: Tensor, device: str = "cpu") -> int:
    """Return where the elements of a tensor begin in memory, for a kernel that knows its strides and its dtype.

    ``device`` is the type of device that the kernel runs on: "cpu" for native ones.

    Raises TypeError for what is no tensor, and ValueError for one whose numbers do not lie there as they are: on
    another device, sparse, quantised, nested, distributed, conjugated or negated when read, seen by ``torch.func``,
    freed.
    """
    if type(tensor) is Tensor and device == "cpu" and _dispatch_keys(tensor) in _PLAIN and (at := tensor.data_ptr()):
        return at
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a kernel takes a tensor, got {type(tensor).__name__}")
    why = _not_plain(tensor, device)
    where = 0 if why else tensor.data_ptr()
    if where == 0 and (why or tensor.numel() > 0):
        raise ValueError(f"a kernel takes a plain tensor on {device}, got {why or _FREED}")
    return where


class Gate:
    """:func:`address` for lists of tensors that come again and again: a list of the same kinds is not looked at twice.

    What is remembered of each tensor is its class, shape, strides, dtype and layout.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._passed: dict[str, list[object]] = {}

    def known(self, name: str, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the list of this name has gone through with the same kinds of tensors."""
        return self._passed.get(name) == [_kind(tensor) for tensor in tensors]

    def passed(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Let such lists of this name through from here on."""
        self._passed[name] = [_kind(tensor) for tensor in tensors]

    def addresses(self, tensors: Sequence[Tensor | None], known: bool) -> tuple[int, ...]:
        """Where the elements of each begin, 0 for None; looked at one by one unless their kinds are ``known``."""
        if known:
            places = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
            if 0 not in places:
                return places
        return tuple(0 if tensor is None else address(tensor, self.device) for tensor in tensors)


def _kind(tensor: Tensor | None) -> object:
    return None if tensor is None else (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.layout)


_FREED = "one whose memory was freed: gather its shards first"


def _not_plain(tensor: Tensor, device: str) -> str | None:
    """What the tensor is and what to do about it, where its numbers are not simply in memory; otherwise None."""
    if tensor.is_nested:
        return "a nested one: pad it with torch.nested.to_padded_tensor()"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}: give its local tensor (to_local(), full_tensor())"
    if _functorch.is_functorch_wrapped_tensor(tensor):
        return "one inside a transform of torch.func (vmap, grad): call it outside, on the whole batch"
    if tensor.layout is not strided:
        return f"one of layout {tensor.layout}: call it with to_dense()"
    if tensor.device.type != device:
        return f"one on {tensor.device}: call it with {device}()"
    if tensor.is_quantized:
        return f"a quantised one ({tensor.dtype}): call it with dequantize()"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugated or negated view: call it with resolve_conj() and resolve_neg()"
    if tensor._is_zerotensor():
        return "zeros without memory: call it with clone()"
    return None
