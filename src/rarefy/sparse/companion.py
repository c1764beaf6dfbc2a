"""The optimizer of what a method learns itself: of the kind, and at the rates, of the one that trains the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: Kinds that a companion can be; of any other, it is Adam.
_KINDS: tuple[type[Optimizer], ...] = (
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.ASGD,
)

#: What a companion leaves at its own values.
_OWN = {"params", "weight_decay", "fused", "foreach", "capturable", "differentiable", "maximize"}


class Companion:
    """Steps a method's parameters as the optimizer steps the weights of one of its groups, without weight decay.

    Args:
        optimizer: that trains the weights.
        group: the index of the one of its groups that the weights are in, whose learning rate and momenta are read at
            every step.
        parameters: by name.
        rate: multiple of the weights' learning rate.

    Raises:
        ValueError: an optimizer without a learning rate to go by (LBFGS).
    """

    def __init__(self, optimizer: Optimizer, group: int, parameters: dict[str, nn.Parameter], rate: float) -> None:
        if isinstance(optimizer, torch.optim.LBFGS) or "lr" not in optimizer.param_groups[group]:
            raise ValueError(
                f"{type(optimizer).__name__} gives no learning rate for what this method learns beside the weights; "
                "take SGD, an Adam, or a method whose masks are not learned (gmp, rigl, acdc)"
            )
        kind = next((kind for kind in _KINDS if isinstance(optimizer, kind)), torch.optim.Adam)
        self._source, self._group, self.rate, self.parameters = optimizer, group, rate, parameters
        self._optimizer = kind(list(parameters.values()), lr=1.0, weight_decay=0.0)  # type: ignore[call-arg]
        self._shared = [
            key for key in self._optimizer.defaults if key in optimizer.param_groups[group] and key not in _OWN
        ]
        self._read()
        # All state exists from the start, so that a checkpoint of any step has the same entries.
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        before = [parameter.detach().clone() for parameter in parameters.values()]
        self._optimizer.step()
        for parameter, value in zip(parameters.values(), before, strict=True):
            parameter.detach().copy_(value)
            parameter.grad = None
        for value in self.tensors().values():
            value.zero_()

    def step(self) -> None:
        """Step the parameters that have a gradient, and forget the gradients."""
        self._read()
        self._optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _read(self) -> None:
        own, theirs = self._optimizer.param_groups[0], self._source.param_groups[self._group]
        own.update({key: theirs[key] for key in self._shared})
        own["lr"] = theirs["lr"] * self.rate

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """Its state, by parameter and key; in place."""
        return {
            (name, key): value
            for name, parameter in self.parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
