"""How much of a training step's time a translator's tanh and sigmoid take.

Inside a fused LSTM no clock can tell them from the products about them. So what is timed is the same functions by
themselves, with their gradients: of the same mode, in the same format, on as many numbers as every LSTM and the
attention have in one batch. That over the time of the batch's forward and backward pass is the share.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import act
from rarefy.models import GNMT

#: Turns of both measurements at most, and seconds after which no other begins.
TURNS, SECONDS = 5, 2.0


@dataclass(frozen=True)
class ActivationShare:
    """What was measured: medians, in seconds.

    Attributes:
        activations: of tanh and sigmoid of a batch by themselves, forward and backward.
        batch: of the batch's forward and backward pass, without the optimizer's step.

    """

    activations: float
    batch: float

    @property
    def share(self) -> float:
        """Return the one over the other; what a fused form saves may be in it."""
        return self.activations / self.batch


def measure(model: GNMT, loss: Callable[[], Tensor]) -> ActivationShare:
    """Time a batch, whose forward is ``loss``, in turns with its tanh and sigmoid by themselves.

    Gradients are not kept, and the model stays as it is; dropout draws from the random generators. It takes about two
    seconds, or one turn where that is longer.
    """
    parameters = list(model.parameters())
    kinds = _kinds(model, loss)
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(times) < TURNS and (not times or time.perf_counter() - begin < SECONDS):
        alone = sum(count * _seconds(call, parameters[0].device) for call, count in kinds)
        whole = _seconds(lambda: torch.autograd.grad(loss(), parameters), parameters[0].device)
        times.append((alone, whole))
    return ActivationShare(*(statistics.median(column) for column in zip(*times, strict=True)))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _kinds(model: GNMT, loss: Callable[[], Tensor]) -> list[tuple[Callable[[], object], int]]:
    """What computes each kind of activation in a batch, with its gradient, and how often the batch has it."""
    tanh = model.decoder.attention.tanh
    found: Counter[tuple[str, torch.Size, torch.dtype]] = Counter()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        y = output if module is tanh else output[0]
        wide = y.shape[:-1]
        if module is tanh:
            found["tanh", y.shape, y.dtype] += 1
        else:  # of the three gates;  of the candidate and the cell
            found["sigmoid", torch.Size([*wide, 3 * y.shape[-1]]), y.dtype] += 1
            found["tanh", torch.Size([*wide, 2 * y.shape[-1]]), y.dtype] += 1

    modules = [module for module in model.modules() if module is tanh or isinstance(module, nn.LSTM)]
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        loss()
    finally:
        for handle in handles:
            handle.remove()
    device = model.output.weight.device
    return [(_call(name, tanh, shape, dtype, device), count) for (name, shape, dtype), count in found.items()]


def _call(
    name: str, tanh: nn.Module, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Compute a function, of the mode of the model's own tanh, of normal numbers, and its gradient."""
    function: Callable[[Tensor], Tensor] = torch.tanh if name == "tanh" else torch.sigmoid
    if isinstance(tanh, act.Tanh):
        function = act.Tanh(tanh.mode) if name == "tanh" else act.Sigmoid(tanh.mode)
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x), x, dy)
