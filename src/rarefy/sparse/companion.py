"""The optimizer of what a method learns itself: of the kind, and at the rates, of the one that trains the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

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
        optimizers: those that train the weights: one, and what it has inside (SAM's, Lookahead's).
        group: the index of the one of the first's groups that the weights are in, whose learning rate and momenta are
            read at every step.
        parameters: by name.
        rate: multiple of the weights' learning rate.

    Attributes:
        started: whether it has stepped.

    Raises:
        ValueError: an optimizer without a learning rate to go by (LBFGS, an Adafactor that makes its own).
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], group: int, parameters: dict[str, nn.Parameter], rate: float
    ) -> None:
        optimizer = optimizers[0]
        own = optimizer.param_groups[group].get("lr") is None  # as Adafactor's, a function of the step and the weights
        if own or any(isinstance(each, torch.optim.LBFGS) for each in optimizers):
            raise ValueError(
                f"{type(optimizer).__name__} gives no learning rate for what this method learns beside the weights; "
                "give it an lr (Adafactor: lr=1e-3, relative_step=False), take SGD, an Adam, or a method whose masks "
                "are not learned (gmp, rigl, acdc)"
            )
        self._source, self._group, self.rate, self.parameters = optimizer, group, rate, parameters
        found = next((kind for each in optimizers for kind in _KINDS if isinstance(each, kind)), None)
        self._kind, self._alike = found or torch.optim.Adam, found is not None
        self.renew()

    def renew(self, started: bool = False) -> None:
        """Forget what it remembers; ``started``: have it there as after a step, for :meth:`tensors` to be filled."""
        parameters = list(self.parameters.values())
        self._optimizer = self._kind(parameters, lr=1.0, weight_decay=0.0)  # type: ignore[call-arg]
        self.started = False
        if started:
            before = [parameter.detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.step()
            for parameter, value in zip(parameters, before, strict=True):
                parameter.detach().copy_(value)

    def step(self) -> None:
        """Step the parameters that have a gradient, and forget the gradients."""
        self._read()
        self._optimizer.step()
        self.started = True
        for parameter in self.parameters.values():
            parameter.grad = None

    def _read(self) -> None:
        own, theirs = self._optimizer.param_groups[0], self._source.param_groups[self._group]
        if self._alike:  # what another kind calls by these names may be something else
            own.update({key: theirs[key] for key in self._optimizer.defaults if key in theirs and key not in _OWN})
        own["lr"] = theirs["lr"] * self.rate

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """Its state, by parameter and key, in place; before the first step copies of what it will have, all 0.

        So a checkpoint of any step has the same entries, which torch.distributed.checkpoint reads by.
        """
        if not self.started:
            twin = copy.copy(self)
            twin.parameters = {name: nn.Parameter(value.detach().clone()) for name, value in self.parameters.items()}
            twin.renew(started=True)
            return {key: torch.zeros_like(value) for key, value in twin.tensors().items()}
        return {
            (name, key): value
            for name, parameter in self.parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
