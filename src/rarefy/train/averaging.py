"""The average of a model's weights over its last steps, which often does better than the weights themselves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rarefy.sparse.layers import local
from rarefy.sparse.masks import write_sparse
from rarefy.train.sharding import part


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name, tied ones once, on the model's memory."""
    return {name: value.detach() for name, value in itertools.chain(model.named_parameters(), model.named_buffers())}


class Average:
    """An exponential moving average of the parameters and buffers of a model.

    Step t, from 0, moves it by 1 - min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten; what
    is no floating-point number is as in the model.

    Args:
        model: what is averaged.
        decay: in (0, 1); 1 / (1 - decay) is about how many steps back it looks.

    Attributes:
        tensors: the averages, by name, split as the model's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: value.clone() for name, value in tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model as step ``step``, counted from 0, has left it."""
        now = tensors(model)
        moved = [name for name, value in now.items() if value.is_floating_point()]
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, new = ([local(held[name]) for name in moved] for held in (self.tensors, now))
        torch._foreach_lerp_(mine, new, 1.0 - decay)
        for name in now.keys() - set(moved):
            local(self.tensors[name]).copy_(local(now[name]))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on with whole averages, of which this process takes its part."""
        for name, value in self.tensors.items():
            value.copy_(part(state[name], value))

    @torch.no_grad()
    def masked(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages with exact zeros where the model's parameters have them, and nowhere else in these."""
        found = {name: value.clone() for name, value in self.tensors.items()}
        for name, parameter in model.named_parameters():
            write_sparse(local(found[name]), local(found[name]), local(parameter.detach()) != 0)
        return found
