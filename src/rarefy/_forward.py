"""One forward of a model on an example, in which nothing of the model changes, and what it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from rarefy._products import Products, tensors

__all__ = ["Forward", "arguments", "run", "undisturbed"]

_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the model is in eval mode and without gradients; modes and random generators are restored."""
    fused = torch.backends.mha.get_fastpath_enabled()
    modes = [(module, module.training) for module in model.modules()]
    accelerators = [] if device.type == "cpu" else [device]
    try:
        model.eval()
        # Attention fused for inference would hide its products, and so would what a model compiles in its forward.
        torch.backends.mha.set_fastpath_enabled(False)
        eager = torch.compiler.set_stance("force_eager")
        state = torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda")
        with eager, torch.no_grad(), state:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode


def _example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | PackedSequence | None:
    """The argument that says how many samples there are."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, PackedSequence)))
    return next((value for value in given if isinstance(value, PackedSequence) or value.dim() > 0), None)


def arguments(example_input: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with, positional and keyword arguments, of a tensor, a tuple of them, or a dict.

    Raises TypeError for anything else, ValueError where no argument is a tensor with a sample in its first dimension.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, (Tensor, PackedSequence)):
        args = (example_input,)
    elif isinstance(example_input, (tuple, list)):
        args = tuple(example_input)
    elif isinstance(example_input, Mapping) and all(isinstance(name, str) for name in example_input):
        kwargs = dict(example_input)
    else:
        raise TypeError(
            "example_input must be a tensor, a tuple of the model's arguments or a dict of its keyword arguments, "
            f"got {type(example_input).__name__}"
        )
    if args and all(isinstance(value, int) for value in args):
        raise ValueError(f"example_input must hold a tensor, got {args}; where that is a shape, give torch.zeros{args}")
    if not any(isinstance(value, (Tensor, PackedSequence)) for value in (*args, *kwargs.values())):
        raise ValueError(
            f"example_input must hold a tensor of at least one sample, got {example_input!r:.80}: torch.zeros(shape)"
        )
    example = _example(args, kwargs)
    if example is None or (isinstance(example, Tensor) and len(example) == 0):
        raise ValueError("example_input must hold at least one sample in its first dimension")
    return args, kwargs


def _moved(value: Any, device: torch.device) -> Any:
    """An argument with all its tensors on the device."""
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(device)  # type: ignore[arg-type]
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return {name: _moved(item, device) for name, item in value.items()} if type(value) is dict else value


@dataclass
class Forward:
    """One forward and what it did: its products, how many elements each pool read, how many samples there were."""

    products: Products
    pooled: dict[str, int]
    batch: int

    def per_sample(self, name: str, positions: int, *amounts: int) -> list[int]:
        """What was added up over the batch, for one sample; `positions` is for the error."""
        # Packed samples have lengths of their own, of which this is the mean.
        if not self.products.ragged and any(amount % self.batch for amount in (positions, *amounts)):
            raise ValueError(
                f"{name!r} ran at {positions} positions for {self.batch} samples, so its work is not per sample; "
                "give an example_input of one sample"
            )
        return [round(amount / self.batch) for amount in amounts]


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Forward:
    """Call the model with these arguments of :func:`arguments`, moved to its device."""
    args, kwargs = _moved(args, device), _moved(kwargs, device)
    example = _example(args, kwargs)
    assert example is not None
    # The forward runs on copies of the buffers: some modules write to theirs even in eval mode.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    products = Products(model.named_parameters, (args, kwargs))
    products.ragged = isinstance(example, PackedSequence)
    batch = int(example.batch_sizes[0]) if isinstance(example, PackedSequence) else len(example)
    forward = Forward(products, {}, batch)

    def read_by_pool(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            source = args[0] if args else kwargs["input"]
            forward.pooled[name] = forward.pooled.get(name, 0) + source.numel()

        return hook

    def find_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A module that gets the example's dimensions in their order says which of them is the batch, if any.
        source = next(tensors((args, kwargs)))
        if isinstance(example, Tensor) and source.shape[:1] == example.shape[:1]:
            if source.dim() == 2:
                forward.batch = 1
            elif not module.batch_first and source.shape[:2] == example.shape[:2]:
                forward.batch = source.shape[1]

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _POOLS):
            handles.append(module.register_forward_pre_hook(read_by_pool(name), with_kwargs=True))
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            handles.append(module.register_forward_pre_hook(find_batch, with_kwargs=True))
    try:
        with products:
            functional_call(model, buffers, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return forward
